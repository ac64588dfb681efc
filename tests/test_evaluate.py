"""Evaluation: every baseline worked out by hand, what is searched and on which prompts, the files that are written."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax import evaluate as evaluation
from rlae_jax import files, report, statistics
from rlae_jax.evaluate import (
    ALL,
    BASELINES,
    Budget,
    Method,
    Pick,
    Replay,
    baseline_methods,
    evaluate,
    join_results,
    load_agents,
    member_names,
    router_config,
    schedule_weights,
    search_size,
    simplex_grid,
    static_weights,
    transfer_matrix,
    unique_names,
)
from rlae_jax.fusion.policy import BoundPolicy, Deterministic, Dims
from rlae_jax.runs.directory import CONFIG_FILE
from rlae_jax.tasks import Examples, Task
from rlae_jax.tasks.rewards import exact_match
from tests.helpers import toys

SINGLES = ["single:left", "single:right"]


@dataclasses.dataclass(frozen=True)
class ByLetter:
    """All weight on the member that knows the last letter."""

    reads: tuple[str, ...] = ("hidden",)

    def init(self, key, dims):
        return ()

    def apply(self, params, observation):
        letter = jnp.argmax(observation.hidden[0], axis=1)
        weights = jax.nn.one_hot(jnp.where(letter < len(toys.KNOWN["left"]), 0, 1), 2)
        return Deterministic(weights), jnp.zeros(len(letter))


@pytest.fixture(scope="module")
def ensemble(make_chain_lm, make_tokenizer):
    return rj.Ensemble(toys.members(make_chain_lm, make_tokenizer))


@pytest.fixture(scope="module")
def evaluated(ensemble, tmp_path_factory):
    """(results, directory, the splits that choosing the methods asked for)."""
    task = toys.task()
    methods = baseline_methods(ensemble, task)
    asked = set(task.splits.names)
    out = tmp_path_factory.mktemp("evaluated")
    return evaluate(methods, task, "test", out=out), out, asked


class TestGrid:
    @pytest.mark.parametrize(("k", "n"), [(1, 1), (2, 21), (3, 231)])
    def test_counts_sums_and_corners(self, k, n):
        grid = simplex_grid(k, 0.05)
        assert grid.shape == (n, k)
        assert len({tuple(point) for point in grid.tolist()}) == n
        np.testing.assert_allclose(grid.sum(axis=1), 1.0, rtol=1e-6)
        assert np.all(grid >= 0)
        np.testing.assert_allclose(grid * 20, np.round(grid * 20), atol=1e-5)
        for corner in np.eye(k):
            assert corner.tolist() in grid.tolist()


class TestSearch:
    def test_how_many_answers_it_looks_at(self):
        assert search_size(21, 1_024) == 21 * 1_024  # two members: every point on every prompt
        assert search_size(231, 1_024) == 231 * 64 + 58 * 256 + 15 * 1_024
        assert search_size(231, 40) == 231 * 40
        assert search_size(1, 1_024) == 1_024

    def test_halving_finds_what_the_whole_grid_finds(self, make_chain_lm, make_tokenizer, monkeypatch):
        """Of three members the surest one must be outweighed, and the other two be balanced."""
        members = toys.members(make_chain_lm, make_tokenizer)
        logits = np.zeros((toys.END + 1, toys.END + 1), np.float32)
        logits[:, len(toys.LETTERS)] = 8.0  # "0", which is right after a and e
        members.append(make_chain_lm(logits, tokenizer=members[0].tokenizer, name="zero", end_ids=(), context=64))
        ensemble, task = rj.Ensemble(members, end_ids=(toys.END,)), toys.task()
        whole, looked = static_weights(ensemble, task)
        assert looked == 232 * 64  # the grid and equal weights
        monkeypatch.setattr(evaluation, "_FIRST_PROMPTS", 16)
        halved, looked = static_weights(ensemble, task)
        np.testing.assert_array_equal(halved, whole)
        assert looked == search_size(232, 64) < 232 * 64 / 1.5

    def test_it_looks_at_no_fewer_answers_than_asked_for(self, ensemble, monkeypatch):
        monkeypatch.setattr(evaluation, "SEARCH_PROMPTS", 8)
        task = toys.task()
        n = len(task.split("train"))
        assert n == 64
        assert static_weights(ensemble, task)[1] == 21 * 8
        assert static_weights(ensemble, task, Budget(21 * 8 + 1))[1] == 21 * n  # in steps of 64 prompts
        assert static_weights(ensemble, task, Budget(10**9))[1] == 21 * n
        assert static_weights(ensemble, task, Budget(10**9, prompts=5))[1] == 21 * 5
        config = dataclasses.replace(toys.SETTINGS, iterations=1, prompts=100)
        (found,) = baseline_methods(ensemble, task, ["perplexity"], config=config).values()
        assert found.found["searched"] == 7 * 15 >= 100
        (found,) = baseline_methods(ensemble, task, ["perplexity"], config=config, search_prompts=4).values()
        assert found.found["searched"] == 7 * 4


def test_repeated_names_are_numbered(make_lm):
    assert unique_names(["a", "b", "a", "a", "b"]) == ["a", "b", "a#2", "a#3", "b#2"]
    assert unique_names([]) == []
    same = rj.Ensemble([make_lm(0, name="model"), make_lm(1, name="model"), make_lm(2, name="other")])
    assert member_names(same) == ["single:model", "single:model#2", "single:other"]


class TestMethods:
    def test_the_scores_worked_out_by_hand(self, evaluated):
        scores = {name: method["score"] for name, method in evaluated[0]["methods"].items()}
        assert scores == {
            "single:left": 5 / 8,
            "single:right": 3 / 8,
            "uniform": 3 / 8,
            "static": 5 / 8,
            "confidence": 3 / 8,  # the surer member is the worse one
            "schedule": 5 / 8,
        }

    def test_of_equally_good_static_weights_those_nearest_to_uniform(self, evaluated):
        np.testing.assert_allclose(evaluated[0]["methods"]["static"]["weights"], [0.55, 0.45], atol=1e-4)

    def test_searches_read_the_training_split_alone(self, evaluated):
        assert evaluated[2] == {"train"}

    def test_a_schedule_finds_out_who_is_needed_when(self, make_chain_lm, make_tokenizer):
        """One member knows the digit, the other, surer one that an end follows it: no fixed weights write both."""
        first, then = toys.table("left"), np.zeros((toys.END + 1, toys.END + 1), np.float32)
        first[len(toys.LETTERS) :] = 0.0
        first[len(toys.LETTERS) :, 0] = 6.0
        then[:, toys.END] = 7.0
        tokenizer = make_tokenizer(toys.CHARACTERS)
        pair = [
            make_chain_lm(logits, tokenizer=tokenizer, name=name, end_ids=(toys.END,), context=64)
            for name, logits in (("first", first), ("then", then))
        ]
        prompts = [a + b for a in toys.LETTERS for b in toys.KNOWN["left"]]
        task = Task("two", {"train": toys.examples(prompts)}, exact_match, max_new_tokens=2, span_length=1)
        ensemble = rj.Ensemble(pair)
        static, _ = static_weights(ensemble, task)
        schedule, _ = schedule_weights(ensemble, task, np.array([0.5, 0.5], np.float32))
        answers = ensemble.generate(prompts, schedule, max_new_tokens=2)
        assert answers.texts == [toys.right_digit(prompt[-1]) for prompt in prompts]
        assert answers.finish_reasons == ["stop"] * len(prompts)
        fixed = ensemble.generate(prompts, static, max_new_tokens=2, span_length=1)
        assert all(text != good for text, good in zip(fixed.texts, answers.texts, strict=True))

    def test_names(self, ensemble, raises_input_error):
        chosen = baseline_methods(ensemble, toys.task(), ["confidence", "single:right", "uniform"])
        assert list(chosen) == ["confidence", "single:right", "uniform"]
        assert chosen["confidence"].span_length == 1
        assert [lm.name for lm in chosen["single:right"].ensemble.members] == ["right"]
        raises_input_error(
            lambda: baseline_methods(ensemble, toys.task(), ["static", "best", "rlae_ppo"]),
            "best, rlae_ppo",
            *BASELINES,
            "single:left",
            "--policy",
        )


@pytest.fixture(scope="module")
def agent(ensemble):
    return Method(ensemble, BoundPolicy(ByLetter(), (), Dims(ensemble.widths, 2), 1))


@pytest.fixture(scope="module")
def everything(ensemble, agent, tmp_path_factory):
    """(methods, results, directory, the splits that choosing the methods asked for) of `all` without a router."""
    task = toys.task()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "_TOP_KS", (10, 1))  # each compiles a program
        methods = baseline_methods(ensemble, task, ["all"], agents={"rlae_ppo": [agent]})
    asked = set(task.splits.names)
    out = tmp_path_factory.mktemp("everything")
    return methods, evaluate({**methods, "rlae_ppo": agent}, task, "test", out=out), out, asked


def rows_of(out, method):
    return files.read_json_lines(out / "predictions.jsonl", method=method)


def knows(member, row):
    return row["prompt"][-1] in toys.KNOWN[member]


@pytest.mark.slow
class TestAll:
    def test_what_it_stands_for(self, everything, ensemble, capsys):
        assert list(everything[0]) == [*SINGLES, *(name for name in ALL if name != "router")]
        assert everything[3] == {"train"}
        fewer = baseline_methods(ensemble, toys.task(), ["random", "vote", "random"])
        assert list(fewer) == ["random", "vote"]

    def test_scores_worked_out_by_hand(self, everything):
        scores = {name: method["score"] for name, method in everything[1]["methods"].items()}
        del scores["random"], scores["shuffled"]
        assert scores == {
            "single:left": 5 / 8,
            "single:right": 3 / 8,
            "uniform": 3 / 8,
            "static": 5 / 8,
            "schedule": 5 / 8,
            "confidence": 3 / 8,
            "perplexity": 5 / 8,  # the better member finds letters after letters likelier
            "consistency": 5 / 8,  # the surer member differs more from the mixture
            "gate": 5 / 8,
            "topk": 3 / 8,
            "vote": 5 / 8,  # they never agree, so that the first member has it
            "oracle": 1.0,
            "rlae_ppo": 1.0,
        }

    def test_what_was_chosen(self, everything):
        table = everything[1]["methods"]
        assert (table["gate"]["threshold"], table["gate"]["member"]) == (0.5, 0)
        assert table["perplexity"]["temperature"] == 1.0
        assert table["consistency"]["temperature"] < 0.25  # equal weights, nearly, are the other member's
        assert table["topk"]["k"] == 10
        assert table["static"]["searched"] == 21 * 64
        assert table["schedule"]["searched"] == 3 * 21 * 64
        assert table["gate"]["searched"] == 14 * 64
        assert "searched" not in table["uniform"]

    def test_random_weights(self, everything):
        sure = {name: np.exp(s) / (np.exp(s) + toys.END) for name, s in toys.SURENESS.items()}
        rows = rows_of(everything[2], "random")
        weights = np.array([row["weights"][0] for row in rows])
        for row, (left, right) in zip(rows, weights, strict=True):
            assert row["reward"] == knows("left" if left * sure["left"] > right * sure["right"] else "right", row)
        assert len({tuple(row) for row in weights.tolist()}) == 64
        np.testing.assert_allclose(weights.sum(axis=1), 1.0, atol=1e-3)
        np.testing.assert_allclose(np.mean(weights, axis=0), 0.5, atol=0.1)
        np.testing.assert_allclose(np.var(weights, axis=0), 1 / 12, atol=0.03)
        assert all(row["weights"][0] != row["weights"][1] for row in rows)

    def test_shuffled_weights_are_the_agents_of_another_prompt(self, everything):
        rows = rows_of(everything[2], "shuffled")
        order = np.random.default_rng(0).permutation(64)
        used = [row["weights"] for row in rows_of(everything[2], "rlae_ppo")]
        assert [row["weights"] for row in rows] == [used[i] for i in order]
        assert [row["reward"] for row in rows] == [
            float(knows("left", row) == knows("left", rows[i])) for row, i in zip(rows, order, strict=True)
        ]

    def test_shuffled_spans_go_on_with_a_rows_last(self, ensemble):
        """In a batch that does not fill its bucket, of rows with fewer spans than others."""
        weights = np.array([[[1, 0], [0, 1]], [[0, 1], [0, 1]], [[1, 0], [1, 0]]] * 3, np.float32)[:5]
        method = evaluation._replayed(ensemble, dataclasses.replace(toys.task(), max_new_tokens=4), weights, 1)
        assert isinstance(method.weights.policy, Replay)
        answers = ensemble.generate(["a", "a", "f", "f", "b"], method.weights, max_new_tokens=4, ignore_eos=True)
        np.testing.assert_array_equal(answers.weights[:, :2], weights)
        np.testing.assert_array_equal(answers.weights[:, 3], weights[:, 1])

    def test_the_oracle_is_a_reference(self, everything):
        results, out = everything[1], everything[2]
        assert [name for name, method in results["methods"].items() if method.get("reference")] == ["oracle"]
        assert not [row for row in results["differences"] if "oracle" in (row["a"], row["b"])]
        for row in rows_of(out, "oracle"):
            assert row["weights"] == [[float(knows("left", row)), float(knows("right", row))]]

    def test_members_write_once_for_vote_and_oracle(self, ensemble, monkeypatch):
        task = toys.task()
        calls = []
        answer = evaluation._answer
        monkeypatch.setattr(evaluation, "_answer", lambda *args: calls.append(args) or answer(*args))
        evaluate(baseline_methods(ensemble, task, ["vote", "oracle", *SINGLES]), task)
        assert len(calls) == 2 * 2  # each member once for compiling and once for its answers

    def test_what_they_need(self, ensemble, agent, raises_input_error, capsys):
        task = toys.task()
        raises_input_error(lambda: baseline_methods(ensemble, task, ["shuffled"]), "shuffled", "--policy")
        raises_input_error(lambda: baseline_methods(ensemble, task, ["router"]), "router", "directory")
        raises_input_error(
            lambda: baseline_methods(ensemble, task, ["shuffled"], agents={"rlae_ppo": [Method(ensemble)]}), "policy"
        )


class TestVote:
    @pytest.fixture(scope="class")
    def writers(self, make_chain_lm, make_tokenizer):
        """writers(*digits) -> the methods of members that write always the same digit."""
        tokenizer = make_tokenizer(toys.CHARACTERS)

        def make(*digits):
            methods = []
            for digit in digits:
                logits = np.zeros((toys.END + 1, toys.END + 1), np.float32)
                logits[: len(toys.LETTERS), len(toys.LETTERS) + digit] = 5.0
                logits[len(toys.LETTERS) :, toys.END] = 5.0
                lm = make_chain_lm(logits, tokenizer=tokenizer, name=f"{digit}", end_ids=(toys.END,), context=64)
                methods.append(Method(rj.Ensemble([lm])))
            return methods

        return make

    def picked(self, writers, reward, *digits, oracle=False):
        task = Task("vote", {"test": Examples(["a"], ["3"])}, reward, max_new_tokens=2)
        row = evaluate({"vote": Pick(tuple(writers(*digits)), oracle)}, task)["methods"]["vote"]
        return row["score"]

    def test_the_majority(self, writers):
        assert self.picked(writers, exact_match, 1, 3, 3) == 1.0
        assert self.picked(writers, exact_match, 3, 1, 1) == 0.0

    def test_of_equally_many_the_first(self, writers):
        assert self.picked(writers, exact_match, 3, 2, 1) == 1.0
        assert self.picked(writers, exact_match, 2, 2, 3, 3) == 0.0

    def test_answers_are_the_same_if_the_reward_takes_one_for_the_other(self, writers):
        def parity(text, reference):
            return float((int(text) - int(reference)) % 2 == 0)

        assert self.picked(writers, parity, 2, 1, 3) == 1.0
        assert self.picked(writers, exact_match, 2, 1, 3) == 0.0

    def test_a_reward_that_compares_no_answers(self, writers, capsys):
        def only_three(text, reference):
            if reference != "3":
                raise ValueError(reference)
            return 0.5

        assert self.picked(writers, only_three, 2, 1, 1) == 0.5
        assert "reward failed" not in capsys.readouterr().out


class TestSeeds:
    @pytest.fixture(scope="class")
    def results(self, ensemble, tmp_path_factory):
        out = tmp_path_factory.mktemp("seeds")
        left, right = (Method(ensemble, weights, 1, {"searched": 7}) for weights in ([1, 0], [0, 1]))
        methods = {"uniform": Method(ensemble, None, 1), "rlae_ppo": [left, right, left], "rlae_mappo": [right] * 3}
        return evaluate(methods, toys.task(), out=out), out

    def test_every_seed_is_kept(self, results):
        table = results[0]["methods"]
        assert table["rlae_ppo"]["per_seed"] == [5 / 8, 3 / 8, 5 / 8]
        np.testing.assert_allclose(table["rlae_ppo"]["score"], 13 / 24)
        assert table["rlae_ppo"]["searched"] == [7, 7, 7]
        assert [row["n"] for row in table.values()] == [64, 64, 64]
        rows = rows_of(results[1], "rlae_ppo")
        assert [(row["seed"], row["index"]) for row in rows] == [(s, i) for s in range(3) for i in range(64)]
        low, high = table["rlae_ppo"]["ci95"]
        # Of three seeds the interval is wide, as Student's is: 13/24 -+ 4.3 * 0.083.
        assert low < 0.3
        assert high > 0.75

    def test_differences(self, results):
        rewards = {
            name: np.array([row["reward"] for row in rows_of(results[1], name)]).reshape(-1, 64)
            for name in results[0]["methods"]
        }
        rows = results[0]["differences"]
        pairs = [("rlae_ppo", "uniform"), ("rlae_ppo", "rlae_mappo"), ("rlae_mappo", "uniform")]
        assert [(row["a"], row["b"]) for row in rows] == pairs
        for row in rows:
            expected = statistics.paired_difference(rewards[row["a"]], rewards[row["b"]])
            assert (row["difference"], tuple(row["ci95"]), row["p"]) == expected
        assert [row["p_holm"] for row in rows] == statistics.holm([row["p"] for row in rows])
        np.testing.assert_allclose(rows[0]["difference"], 13 / 24 - 3 / 8)
        np.testing.assert_allclose(rows[0]["p"], 0.1835, atol=1e-4)  # t = 2 of (1/4, 0, 1/4)
        assert rows[2]["p"] == 1.0

    def test_repetitions_become_seeds(self, ensemble, agent, tmp_path, raises_input_error):
        """Two evaluations, joined from their files, are what one evaluation of both seeds is."""
        other = Method(ensemble, [1, 0], 1, {"weights": [1, 0]})
        static = dataclasses.replace(other, found={"weights": [0, 1]})
        task = toys.task()
        oracle = Pick((agent, other), oracle=True)
        evaluate({"rlae_ppo": agent, "static": static, "oracle": oracle}, task, out=tmp_path / "a")
        evaluate({"rlae_ppo": other, "static": other, "oracle": oracle}, task, out=tmp_path / "b")
        whole = evaluate({"rlae_ppo": [agent, other], "static": [static, other], "oracle": [oracle, oracle]}, task)
        joined = join_results([tmp_path / "a", tmp_path / "b"])
        assert joined["differences"] == whole["differences"]
        for name, row in whole["methods"].items():
            assert {**joined["methods"][name], "ms_per_token": 0, "ms_per_answer": 0} == {
                **row,
                "ms_per_token": 0,
                "ms_per_answer": 0,
            }
        evaluate({"rlae_ppo": agent, "uniform": other}, task, out=tmp_path / "c")
        raises_input_error(lambda: join_results([tmp_path / "a", tmp_path / "c"]), "methods", str(tmp_path / "c"))
        evaluate({"rlae_ppo": agent, "static": static, "oracle": oracle}, task, out=tmp_path / "d", limit=3)
        raises_input_error(lambda: join_results([tmp_path / "a", tmp_path / "d"]), "prompts")

    def test_without_agents_all_are_compared_with_uniform(self, evaluated):
        rows = evaluated[0]["differences"]
        assert [(row["a"], row["b"]) for row in rows] == [
            (name, "uniform") for name in evaluated[0]["methods"] if name != "uniform"
        ]
        first = rows[0]
        np.testing.assert_allclose(first["difference"], 2 / 8)
        assert first["p"] == statistics.sign_flip_p(np.repeat([1.0, -1.0], [40, 24]))
        assert first["p_holm"] > first["p"]


class TestByLikelihood:
    """The toy task as multiple choice: the options are the four digits."""

    @staticmethod
    def options(examples, more=()):
        n = len(examples)
        letters = ["ABCD"[int(reference)] for reference in examples.references]
        return dataclasses.replace(examples, references=letters, options=[(*toys.DIGITS, *more)] * n)

    def task(self):
        task = toys.task()
        splits = {name: self.options(examples) for name, examples in task.splits.items()}
        return dataclasses.replace(task, splits=splits, by_likelihood=True)

    def test_it_scores_what_writing_scores(self, ensemble, agent, raises_input_error):
        task = self.task()
        names = [*SINGLES, "uniform", "static", "schedule", "confidence", "gate", "random", "vote", "oracle"]
        methods = baseline_methods(ensemble, task, names) | {"rlae_ppo": agent}
        rows = evaluate(methods, task)["methods"]
        scores = {name: row["score"] for name, row in rows.items() if name != "random"}
        assert scores == {
            "single:left": 5 / 8,
            "single:right": 3 / 8,
            "uniform": 3 / 8,
            "static": 5 / 8,
            "schedule": 5 / 8,
            "confidence": 3 / 8,
            "gate": 5 / 8,
            "vote": 5 / 8,
            "oracle": 1,
            "rlae_ppo": 1,
        }
        for name in ("router", "shuffled"):
            raises_input_error(
                lambda name=name: baseline_methods(ensemble, task, [name], agents={"rlae_ppo": [agent]}),
                name,
                "likeliest",
            )

    def test_long_options_are_at_no_disadvantage(self, ensemble):
        """Compared with the likelihoods themselves, per byte; prompts may have options of different number."""
        task = self.task()
        examples = self.options(toys.task().split("test").take(6), more=("00", "123"))
        options = [own if i % 2 else own[2:] for i, own in enumerate(examples.options)]
        task = dataclasses.replace(task, splits={"test": dataclasses.replace(examples, options=options)})
        texts = evaluation._answer(Method(ensemble, [1, 1]), task, task.split("test")).texts
        for prompt, own, text in zip(examples.prompts, options, texts, strict=True):
            (likely,) = ensemble.log_likelihoods([prompt], [own], [1, 1])
            assert text == "ABCDEF"[int(np.argmax([p / len(option) for p, option in zip(likely, own, strict=True)]))]

    def test_the_longest_option_has_room(self, ensemble):
        examples = self.options(toys.task().split("test"), more=("0123012",))
        task = dataclasses.replace(self.task(), splits={"train": examples, "test": examples})
        methods = baseline_methods(ensemble, task, ["schedule", "random"])
        assert methods["schedule"].weights.params.shape == (7, 2)
        assert evaluate(methods, task)["methods"]["schedule"]["score"] == 5 / 8

    def test_agents_are_trained_on_written_answers(self, ensemble, tmp_path, raises_input_error):
        raises_input_error(lambda: rj.train(ensemble, self.task(), toys.SETTINGS, tmp_path / "run"), "likelihood")


class TestRouter:
    @pytest.mark.slow
    def test_one_action_per_answer_and_the_agents_settings(self, ensemble, tmp_path):
        task = toys.task()
        config = dataclasses.replace(toys.SETTINGS, iterations=2, prompts=8, eval_prompts=8, eval_every=2, seeds=2)
        (methods,) = baseline_methods(ensemble, task, ["router"], config=config, runs=tmp_path).values()
        settings = files.read_json(tmp_path / "router" / CONFIG_FILE)["settings"]
        assert (settings["span_length"], settings["max_new_tokens"], settings["seeds"]) == (2, 2, 2)
        assert settings["learning_rate"] == config.learning_rate
        answers = ensemble.generate(["ab"], methods[0].weights, max_new_tokens=2)
        assert answers.weights.shape == (1, 1, 2)
        # Agents trained side by side are seeds, and so are runs.
        run = tmp_path / "router"
        agents = load_agents(ensemble, task, [run, run])
        assert {name: len(seeds) for name, seeds in agents.items()} == {"rlae_ppo": 4}
        for loaded, trained in zip(agents["rlae_ppo"][:2], methods, strict=True):
            jax.tree.map(np.testing.assert_array_equal, loaded.weights.params, trained.weights.params)
        again = router_config([run, run])
        assert (again.seeds, again.agent) == (4, config.agent)
        assert router_config([]) is None


class TestTransfer:
    def test_every_cell(self, ensemble, agent, tmp_path):
        easy = toys.task()
        easy = dataclasses.replace(easy, name="easy", splits={"test": toys.examples(["a", "b", "f"])})
        left = dataclasses.replace(agent.weights, policy=Replay(), params=np.array([[[1, 0]]], np.float32))
        agents = {"toy": agent.weights, "easy": [left, left]}
        pools = {"toy": ensemble, "easy": [ensemble, ensemble]}
        matrix = transfer_matrix({"easy": agents["easy"]}, pools, {"toy": toys.task(), "easy": easy})
        np.testing.assert_allclose(matrix["scores"], [[5 / 8, 2 / 3]])
        assert matrix["per_seed"] == [[[5 / 8] * 2, [2 / 3] * 2]]
        pools["easy"] = ensemble
        matrix = transfer_matrix(agents, pools, {"toy": toys.task(), "easy": easy})
        np.testing.assert_allclose(matrix["scores"], [[1, 1], [5 / 8, 2 / 3]])
        assert (matrix["rows"], matrix["columns"], matrix["split"]) == (["toy", "easy"], ["toy", "easy"], "test")
        assert all(low <= high for row in matrix["ci95"] for low, high in row)
        report.transfer_map(tmp_path / "transfer.png", matrix, "transfer")
        assert (tmp_path / "transfer.png").read_bytes().startswith(b"\x89PNG")

    def test_what_does_not_match(self, ensemble, agent, raises_input_error):
        tasks = {"toy": toys.task()}
        raises_input_error(lambda: transfer_matrix({"toy": agent.weights}, {"x": ensemble}, tasks), "toy", "x")
        raises_input_error(
            lambda: transfer_matrix({"toy": [agent.weights] * 3}, {"toy": [ensemble] * 2}, tasks), "3 agents", "2 sets"
        )


class TestPictures:
    def test_scores(self, everything, evaluated, tmp_path):
        for i, results in enumerate((everything[1], evaluated[0])):
            path = tmp_path / f"{i}.png"
            report.scores_chart(path, results)
            assert path.read_bytes().startswith(b"\x89PNG")

    def test_tables(self, everything, capsys):
        results = everything[1]
        report.console.print(report.results_table(results), width=200)
        report.console.print(report.differences_table(results), width=200)
        printed = capsys.readouterr().out
        assert "oracle (reference)" in printed
        assert printed.count("rlae_ppo") == 1 + len(results["differences"])


class TestFiles:
    def test_results(self, evaluated):
        results, out, _ = evaluated
        assert json.loads((out / "results.json").read_text()) == results
        assert set(results) == {"schema", "task", "split", "methods", "differences", "seconds", "environment"}
        assert (results["schema"], results["task"], results["split"]) == (1, "toy", "test")
        for method in results["methods"].values():
            assert {"score", "accuracy", "n", "ci95", "per_seed", "scores", "ms_per_token", "ms_per_answer"} <= set(
                method
            )
            assert method["n"] == 64
            assert method["accuracy"] == method["score"]
            assert method["per_seed"] == [method["score"]]
            low, high = method["ci95"]
            assert 0 <= low < method["score"] < high <= 1
            assert method["ms_per_token"] > 0
            np.testing.assert_allclose(method["ms_per_answer"], 2 * method["ms_per_token"])  # a digit and the end
        assert {"jax", "rlae_jax", "backend", "device"} <= set(results["environment"])
        assert results["seconds"]["evaluation"] > 0

    def test_predictions_are_one_line_per_prompt_and_method(self, evaluated):
        results, out, _ = evaluated
        rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
        test = toys.task().splits["test"]
        assert [(row["method"], row["index"]) for row in rows] == [
            (m, i) for m in results["methods"] for i in range(64)
        ]
        for row in rows:
            assert row["prompt"] == test.prompts[row["index"]]
            assert row["reference"] == test.references[row["index"]]
            assert row["reward"] == exact_match(row["text"], row["reference"])
            assert row["finish_reason"] == "stop"
            np.testing.assert_allclose(np.sum(row["weights"], axis=1), 1.0, atol=1e-3)
        for name, method in results["methods"].items():
            rewards = [row["reward"] for row in files.read_json_lines(out / "predictions.jsonl", method=name)]
            assert np.mean(rewards) == method["score"]

    def test_rewards_between_0_and_1_have_no_accuracy(self, ensemble):
        examples = toys.examples(toys.LETTERS)
        splits = {"test": examples}
        task = Task("graded", splits, lambda text, reference: 0.25 + 0.5 * (text == reference), max_new_tokens=2)
        table = evaluate({"left": Method(ensemble, [1, 0], 1)}, task)["methods"]["left"]
        assert table["accuracy"] is None
        np.testing.assert_allclose(table["score"], 0.25 + 0.5 * 5 / 8)

    def test_limit_takes_the_first_prompts(self, ensemble):
        task = toys.task()
        methods = {"left": Method(ensemble, [1, 0], 1)}
        table = evaluate(methods, task, "test", limit=8)["methods"]["left"]
        assert (table["n"], table["score"]) == (8, 5 / 8)

    def test_unknown_and_empty_splits(self, ensemble, raises_input_error):
        task = Task("small", {"test": Examples([], [])}, exact_match)
        methods = {"left": Method(ensemble, [1, 0])}
        raises_input_error(lambda: evaluate(methods, task, "test"), "'test'", "empty")
        raises_input_error(lambda: evaluate(methods, task, "dev"), "'dev'", "test")
