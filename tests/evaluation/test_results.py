"""The files that evaluations write: rows, seeds, differences, predictions; what is joined and what is drawn."""

import dataclasses
import json

import numpy as np
import pytest

from rlae_jax import files, records, report, statistics
from rlae_jax.evaluation import (
    Method,
    evaluate,
    join_results,
)
from rlae_jax.evaluation.methods import Pick
from rlae_jax.evaluation.results import read_predictions, read_results
from rlae_jax.tasks import Examples, Task
from rlae_jax.tasks.rewards import exact_match
from tests.helpers import toys


def rows_of(out, method):
    return [records.plain(row) for row in read_predictions(out) if row.method == method]


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
        static = dataclasses.replace(other, record={"weights": [0, 1]})
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

    def test_what_was_edited_is_told_with_its_file(self, ensemble, agent, tmp_path, raises_input_error):
        out = tmp_path / "run"
        evaluate({"rlae_ppo": agent}, toys.task(), out=out, limit=3)
        results, lines = (out / name for name in ("results.json", "predictions.jsonl"))
        known, rows = json.loads(results.read_text()), lines.read_text().splitlines(keepends=True)

        def told(*parts):
            raises_input_error(lambda: join_results([out, out]), *parts)

        lines.write_text("".join(rows[:2]))
        told(str(lines), "2 answers of rlae_ppo; results.json has 1 seeds of 3")
        lines.write_text("".join(rows).replace("rlae_ppo", "other"))
        told(f"{lines}:1: content differs from its digest")
        lines.write_text("".join(files.json_line(json.loads(row) | {"method": "other"}) for row in rows))
        told(str(lines), "has answers of 'other', results.json has none")
        lines.write_text("".join(rows) + "{}\n")
        told(f"{lines}:4: the key method is missing")
        del known["digest"]
        lines.write_text("".join(rows))
        join_results([out, out])
        files.write_json_lines(lines, [json.loads(row) | {"text": "other"} for row in rows])
        told(f"{lines}: not the answers that results.json is of")
        files.write_json(results, {key: item for key, item in known.items() if key != "predictions"})
        join_results([out, out])  # of an older version
        results.write_text(json.dumps(known | {"methods": {"a": {"n": 3}}}))
        told(f"{results}: the key methods.a.score is missing")
        results.write_text(json.dumps(known | {"colour": 3}))
        told(f"{results}: unknown key colour: written by a newer version")

    def test_without_agents_all_are_compared_with_uniform(self, evaluated):
        rows = evaluated[0]["differences"]
        assert [(row["a"], row["b"]) for row in rows] == [
            (name, "uniform") for name in evaluated[0]["methods"] if name != "uniform"
        ]
        first = rows[0]
        np.testing.assert_allclose(first["difference"], 2 / 8)
        assert first["p"] == statistics.sign_flip_p(np.repeat([1.0, -1.0], [40, 24]))
        assert first["p_holm"] > first["p"]


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
        assert files.read_json(out / "results.json") == results
        assert records.plain(read_results(out)) == results
        assert set(results) == {
            *("schema", "task", "split", "methods", "differences", "seconds", "environment", "predictions")
        }
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
            rewards = [row["reward"] for row in rows_of(out, name)]
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
