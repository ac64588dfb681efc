"""Evaluation: intervals, grids, names, what is searched and on which prompts, and the files that are written."""

import json
import math

import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax import files
from rlae_jax.evaluate import (
    BASELINES,
    Method,
    baseline_methods,
    evaluate,
    interval95,
    member_names,
    schedule_weights,
    simplex_grid,
    static_weights,
    unique_names,
)
from rlae_jax.tasks import Examples, Task
from rlae_jax.tasks.rewards import exact_match
from tests import toys


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


class TestIntervals:
    @pytest.mark.parametrize(
        ("successes", "n", "low", "high"),
        # Wilson's score interval, e.g. R's prop.test(correct = FALSE).
        [
            (0, 10, 0.0, 0.27753),
            (10, 10, 0.72247, 1.0),
            (5, 10, 0.23659, 0.76341),
            (1, 20, 0.00888, 0.23613),
            (81, 263, 0.2553, 0.3662),
        ],
    )
    def test_wilson(self, successes, n, low, high):
        rewards = np.arange(n) < successes
        np.testing.assert_allclose(interval95(rewards.astype(float)), (low, high), atol=1e-4)

    def test_other_rewards_take_the_standard_error(self):
        rewards = np.array([0.0, 0.5, 1.0, 0.5])
        half = 1.959964 * math.sqrt(0.5 / 3) / 2
        np.testing.assert_allclose(interval95(rewards), (0.5 - half, 0.5 + half), rtol=1e-6)

    def test_one_prompt(self):
        np.testing.assert_allclose(interval95(np.array([1.0])), (0.20655, 1.0), atol=2e-5)


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
        static = static_weights(ensemble, task)
        schedule = schedule_weights(ensemble, task, np.array([0.5, 0.5], np.float32))
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


class TestFiles:
    def test_results(self, evaluated):
        results, out, _ = evaluated
        assert json.loads((out / "results.json").read_text()) == results
        assert set(results) == {"schema", "task", "split", "methods", "seconds", "environment"}
        assert (results["schema"], results["task"], results["split"]) == (1, "toy", "test")
        for method in results["methods"].values():
            assert {"score", "accuracy", "n", "ci95", "per_seed", "scores", "ms_per_token"} <= set(method)
            assert method["n"] == 64
            assert method["accuracy"] == method["score"]
            assert method["per_seed"] == [method["score"]]
            low, high = method["ci95"]
            assert 0 <= low < method["score"] < high <= 1
            assert method["ms_per_token"] > 0
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
