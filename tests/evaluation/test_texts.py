"""Methods scored by the likelihood of texts: units, intervals, the best fixed weights, rules over a union, files."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax import statistics
from rlae_jax.config import AgentConfig
from rlae_jax.evaluation import evaluate, join_results
from rlae_jax.evaluation.methods import Method, Shuffled
from rlae_jax.evaluation.results import read_predictions, read_results
from rlae_jax.evaluation.texts import TextScorer, best_fixed, evaluate_rules, per_text, text_methods
from rlae_jax.fusion.cutting import rules
from rlae_jax.fusion.policy import BoundPolicy, Dims
from rlae_jax.ppo.agent import PPOAgent
from rlae_jax.tasks import Examples, Task, get_task, jsonl
from rlae_jax.tasks.rewards import exact_match
from tests.helpers.tokenizers import byte_level, sentencepiece

L = 3


@pytest.fixture(scope="module")
def examples():
    """Fresh in every run."""
    rng = np.random.default_rng()
    texts = ["".join(rng.choice(list("théx"), rng.integers(1, 16))) for _ in range(9)]
    return Examples(["x th", "the", ""] * 3 + ["x"], [*texts, "txxt"])


@pytest.fixture(scope="module")
def task(examples):
    splits = dict.fromkeys(("train", "dev", "test"), examples)
    return Task("texts", splits, exact_match, span_length=L, max_new_tokens=16, by_likelihood=True)


def members(make_lm, tokenizers):
    return [
        make_lm(k, tokenizer=t, vocab=len(t), end_ids=(t.eos_token_id,), layers=1, sharpness=3.0)
        for k, t in enumerate(tokenizers)
    ]


@pytest.fixture(scope="module")
def alike(make_lm):
    return rj.Ensemble(members(make_lm, [byte_level([b"th"], ["</s>"])] * 2))


@pytest.fixture(scope="module")
def union(make_lm):
    return rj.Ensemble(members(make_lm, (byte_level([b"th", b"xx"], ["</s>"]), sentencepiece(["▁the", "é", "th"]))))


def agent_of(ensemble, spans=16):
    agent, dims = PPOAgent(AgentConfig(projection=4, ffn_width=8, span_embedding=4)), Dims(ensemble.widths, spans)
    return Method(ensemble, BoundPolicy(agent, agent.init(jax.random.key(1), dims), dims, L))


def bits(ensemble, examples, weights, **options):
    """Of all bytes, by reading the texts under the weights; texts without prompts stand behind what begins a text."""
    given = ensemble.encode([prompt or "x" for prompt in examples.prompts])
    rows = [row if prompt else ensemble.codec.start() for prompt, row in zip(examples.prompts, given, strict=True)]
    pairs = zip(examples.prompts, examples.references, strict=True)
    tokens = [ensemble.codec.continuation(prompt, text, bool(prompt)) for prompt, text in pairs]
    found = ensemble.score_tokens(rows, tokens, weights, **options)
    nats = sum(float(one.fused.sum(dtype=np.float64)) for one in found)
    return -nats / math.log(2) / sum(len(text.encode()) for text in examples.references)


class TestATable:
    @pytest.fixture(scope="class")
    def results(self, alike, task, tmp_path_factory):
        out = tmp_path_factory.mktemp("texts") / "out"
        methods = {**text_methods(alike, task, directory=out / "texts"), "rlae_ppo": [agent_of(alike)] * 2}
        return out, evaluate({**methods}, task, "test", out=out)

    def test_scores_are_bits_per_byte(self, results, alike, examples):
        _, found = results
        assert found["unit"] == "bits per byte"
        assert found["texts"]["bytes"] == sum(len(text.encode()) for text in examples.references)
        table = found["methods"]
        static = np.array(table["static"]["weights"], np.float32)
        cases = {"uniform": None, "static": static / static.sum(), "rlae_ppo": agent_of(alike).weights}
        cases |= {name: np.eye(2)[k] for k, name in enumerate(["single:tiny-0", "single:tiny-1"])}
        for name, weights in cases.items():
            assert table[name]["score"] == pytest.approx(bits(alike, examples, weights), rel=1e-3), name
        nats = table["uniform"]["scores"]["nats per token"]
        size = found["texts"]["bytes"] / table["uniform"]["tokens"]
        assert table["uniform"]["score"] == pytest.approx(nats / math.log(2) / size)
        assert table["oracle"]["reference"]
        assert table["oracle"]["score"] <= min(table[f"single:tiny-{k}"]["score"] for k in range(2))
        assert table["static"]["score"] <= table["uniform"]["score"] + 1e-6  # train is test here

    def test_agents_are_compared_with_all_others(self, results):
        _, found = results
        table = found["methods"]
        compared = {(row["a"], row["b"]): row for row in found["differences"]}
        assert set(compared) == {("rlae_ppo", name) for name in table if name not in ("rlae_ppo", "oracle")}
        for (a, b), row in compared.items():
            assert row["difference"] == pytest.approx(table[a]["score"] - table[b]["score"])
            assert row["ci95"][0] <= row["difference"] <= row["ci95"][1]

    def test_files(self, results, task, raises_input_error):
        out, found = results
        assert read_results(out).unit == "bits per byte"
        lines = [line for line in read_predictions(out) if line.method == "uniform"]
        total = sum(line.reward for line in lines)
        assert found["methods"]["uniform"]["score"] == pytest.approx(-total / math.log(2) / found["texts"]["bytes"])
        raises_input_error(lambda: join_results([out, out]), "bits per byte", str(out))

    def test_methods_that_keep_account_of_a_text_are_read_under_their_weights(self, alike, task, examples):
        method = text_methods(alike, task, ["online"])["online"]
        found = TextScorer(task, examples).nats(method).sum() / -math.log(2)
        expected = bits(alike, examples, "online", span_length=1)
        assert found / sum(len(text.encode()) for text in examples.references) == pytest.approx(expected, rel=1e-4)

    def test_what_has_no_likelihood(self, alike, task, raises_input_error):
        raises_input_error(lambda: text_methods(alike, task, ["vote"]), "'vote'", "oracle", "online")
        raises_input_error(lambda: evaluate({"a": Shuffled(agent_of(alike))}, task), "shuffled", "written")


class TestUnits:
    def test_intervals_are_those_of_a_ratio(self):
        """Against drawing texts and taking the ratio of what was drawn."""
        rng = np.random.default_rng()
        size = rng.integers(1, 200, 300).astype(float)
        nats = -size * rng.gamma(4.0, 0.2, 300)
        values = per_text(nats[None], size)[0]
        ratio = -nats.sum() / math.log(2) / size.sum()
        assert values.mean() == pytest.approx(ratio)
        drawn = rng.integers(300, size=(4000, 300))
        ratios = -nats[drawn].sum(axis=1) / math.log(2) / size[drawn].sum(axis=1)
        low, high = statistics.bootstrap_interval(values)
        expected = np.percentile(ratios, [2.5, 97.5])
        np.testing.assert_allclose([low, high], expected, atol=0.15 * np.ptp(expected))

    def test_a_constant_share_saved_is_sure(self):
        """However different texts are in length: one method takes 1% fewer bits in each."""
        rng = np.random.default_rng()
        size = rng.integers(1, 2000, 50).astype(float)
        one, other = (per_text(-share * size[None], size) for share in (0.99, 1.0))
        found = statistics.paired_difference(one, other, bounded=False)
        assert found.difference == pytest.approx(-0.01 / math.log(2))
        assert found.ci95 == pytest.approx((found.difference,) * 2)

    @pytest.mark.parametrize("name", ["alike", "union"])
    def test_the_best_fixed_weights(self, request, task, name):
        """Against a fine grid."""
        scorer = TextScorer(task, task.split("train"))
        kept = scorer.kept(request.getfixturevalue(name), L)
        found = best_fixed(kept)
        log_probs, mass = kept.by_token()

        def score(w):
            return np.sum(np.log(np.exp(log_probs) @ w) - (0 if mass is None else np.log(np.exp(mass) @ w)))

        with np.errstate(divide="ignore"):
            best = max(score(np.array([w, 1 - w])) for w in np.linspace(0, 1, 2001))
        assert score(found.astype(np.float64)) == pytest.approx(best, abs=2e-3 * len(log_probs))
        assert found.sum() == pytest.approx(1.0)


class TestRules:
    def test_each_is_reported_apart(self, union, task, tmp_path):
        found = evaluate_rules(
            union, task, "test", ["all"], {"rlae_ppo": [agent_of(union)]}, out=tmp_path, limit=6, search_prompts=5
        )
        assert rules(union) == ["own:0", "own:1", "longest"]
        mixtures = [f"{name} [{rule}]" for rule in rules(union) for name in ("uniform", "static", "oracle", "rlae_ppo")]
        assert set(found["methods"]) == {"single:tiny-0", "single:tiny-1", *mixtures}
        compared = {(row["a"], row["b"]) for row in found["differences"]}
        assert compared == {
            (f"rlae_ppo [{rule}]", other)
            for rule in rules(union)
            for other in ("single:tiny-0", "single:tiny-1", f"uniform [{rule}]", f"static [{rule}]")
        }
        assert json.loads((tmp_path / "results.json").read_text())["methods"]["uniform [longest]"]["cut"] == "longest"

    def test_a_method_that_gives_a_text_no_chance_is_left_out(self, alike, task, capsys, monkeypatch):
        alone = {"other": Method(alike, [0.0, 1.0], L), "uniform": Method(alike, None, L)}

        def nats(scorer, method, beside=()):
            return np.array([-1.0, -np.inf if method is alone["other"] else -2.0] * (len(scorer.examples) // 2))

        monkeypatch.setattr(TextScorer, "nats", nats)
        found = evaluate(alone, task, "test")
        assert set(found["methods"]) == {"uniform"}
        assert "left out: other" in "".join(capsys.readouterr())

    def test_windows_are_those_of_the_agent_with_the_least_room(self, alike, task):
        found = evaluate({"rlae_ppo": agent_of(alike, 2), "rlae_mappo": agent_of(alike, 3)}, task, "test")
        assert found["texts"]["window"] == 2 * L
        assert evaluate({"uniform": Method(alike, None, L)}, task, "test")["texts"]["window"] is None


class TestTasks:
    def test_texts_without_prompts(self, tmp_path, raises_input_error):
        path = tmp_path / "docs.jsonl"
        path.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(40)))
        task = jsonl(path, text_field="text", reward="likelihood")
        assert task.reads_texts
        assert set(task.split("train").prompts) == {""}
        assert task.split("train").texts()[0].startswith("text ")
        assert {one for split in task.splits.values() for one in split.texts()} == {f"text {i}" for i in range(40)}
        raises_input_error(lambda: jsonl(path, text_field="text"), "likelihood")

    def test_every_task_has_the_reward(self):
        task = get_task("skills", reward="likelihood")
        assert task.reads_texts
        assert task.split("dev").texts() == list(task.split("dev").references)

    def test_right_options(self):
        examples = Examples(["a", "b"], ["B", "A"], [(" x", " y"), (" z", " w")])
        assert examples.texts() == [" y", " z"]
        task = Task("t", {"test": examples}, exact_match, by_likelihood=True)
        assert not task.reads_texts
        assert not dataclasses.replace(task, by_likelihood=False).reads_texts
