"""Every baseline worked out by hand, and on which prompts it is chosen."""

import dataclasses

import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax import records
from rlae_jax.evaluation import (
    Method,
    baseline_methods,
    evaluate,
)
from rlae_jax.evaluation import answers as answering
from rlae_jax.evaluation.baselines import ALL, BASELINES
from rlae_jax.evaluation.policies import Replay, replay
from rlae_jax.evaluation.results import read_predictions
from rlae_jax.evaluation.searches import schedule_weights, static_weights
from rlae_jax.tasks import Task
from rlae_jax.tasks.rewards import exact_match
from tests.helpers import toys

SINGLES = ["single:left", "single:right"]


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


def rows_of(out, method):
    return [records.plain(row) for row in read_predictions(out) if row.method == method]


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
        for name in ("random", "shuffled", "draw", "regression", "dllg", "fusionroute"):
            del scores[name]
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
            "online": 5 / 8,  # from static's weights; the one digit decides
            "bayes": 5 / 8,
            "selective": 5 / 8,  # the members differ everywhere, so that all write
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
        for name, settings in (("online", 32), ("bayes", 10), ("selective", 24)):
            assert table[name]["searched"] == (21 + settings) * 64  # static's search, too
        assert (table["online"]["start"], table["bayes"]["start"]) == ("static", "static")
        assert (table["online"]["learning_rate"], table["online"]["share"]) == (0.3, 0.05)
        assert (table["selective"]["threshold"], table["selective"]["member"]) == (0.1, 0)  # of equal ones the first
        assert table["draw"]["searched"] == 11 * 64
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
        policy = replay(ensemble, dataclasses.replace(toys.task(), max_new_tokens=4), weights, 1)
        assert isinstance(policy.policy, Replay)
        answers = ensemble.generate(["a", "a", "f", "f", "b"], policy, max_new_tokens=4, ignore_eos=True)
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
        answer = answering.answer_batch
        monkeypatch.setattr(answering, "answer_batch", lambda *args: calls.append(args) or answer(*args))
        evaluate(baseline_methods(ensemble, task, ["vote", "oracle", *SINGLES]), task)
        assert len(calls) == 2 * 2  # each member once for compiling and once for its answers

    def test_what_they_need(self, ensemble, agent, raises_input_error, capsys):
        task = toys.task()
        raises_input_error(lambda: baseline_methods(ensemble, task, ["shuffled"]), "shuffled", "--policy")
        raises_input_error(lambda: baseline_methods(ensemble, task, ["router"]), "router", "directory")
        raises_input_error(
            lambda: baseline_methods(ensemble, task, ["shuffled"], agents={"rlae_ppo": [Method(ensemble)]}), "policy"
        )
