"""The transfer matrix."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from rlae_jax import records, report
from rlae_jax.evaluation import leave_one_out, transfer_matrix
from rlae_jax.evaluation import transfer as transfer_module
from rlae_jax.evaluation.policies import Replay
from tests.helpers import toys


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


class TestLeaveOneOut:
    SETTINGS = dataclasses.replace(toys.SETTINGS, iterations=10, prompts=32, eval_every=5, max_new_tokens=None)

    @pytest.fixture(scope="class")
    def tasks(self):
        # "left" knows a to e: a and b tell nothing of whom to trust after f.
        return [toys.of_letters(name, letters) for name, letters in (("one", "af"), ("two", "bg"), ("three", "abcfgh"))]

    @pytest.fixture(scope="class")
    def finished(self, ensemble, tasks, tmp_path_factory):
        out = tmp_path_factory.mktemp("transfer") / "out"
        return out, leave_one_out(ensemble, tasks, self.SETTINGS, out, limit=24)

    def test_who_is_trained_on_what(self, finished):
        out, _ = finished
        trained = {path.name: json.loads((path / "config.json").read_text()) for path in (out / "runs").iterdir()}
        assert {name: run["task"] for name, run in trained.items()} == {
            "only-one": "one",
            "only-two": "two",
            "only-three": "three",
            "without-one": "two + three",
            "without-two": "one + three",
            "without-three": "one + two",
        }
        assert all(run["settings"]["iterations"] == 10 for run in trained.values())

    def test_every_cell_is_the_answers_of_the_run_that_it_names(self, finished, tasks):
        out, results = finished
        assert results.columns == ["one", "two", "three"]
        fixed = ["uniform", "static"]
        assert results.rows == [
            *fixed,
            *(f"only {t}" for t in results.columns),
            *(f"all but {t}" for t in results.columns),
        ]
        for c, task in enumerate(tasks):
            told = (out / "tasks" / task.name / "predictions.jsonl").read_text()
            lines = [json.loads(line) for line in told.splitlines()]
            for r, row in enumerate(results.rows):
                name = row.replace("only ", "only-").replace("all but ", "without-")
                name = "rlae_ppo_others" if name == f"without-{task.name}" else name
                own = [line["reward"] for line in lines if line["method"] == name]
                assert results.scores[r][c] == pytest.approx(np.mean(own)), (row, task.name)
                assert len(own) == results.n[c] == len(task.split("test").take(24))
        (three,) = [one for one in results.left_out if one.task == "three"]
        cells = {row: scores[2] for row, scores in zip(results.rows, results.scores, strict=True)}
        told = (three.uniform, three.static, three.alone, three.others)
        assert told == tuple(cells[row] for row in ("uniform", "static", "only three", "all but three"))
        assert three.above_static.difference == pytest.approx(three.others - three.static)
        assert three.above_uniform.difference == pytest.approx(three.others - three.uniform)

    def test_p_values_are_corrected_for_the_tasks(self, finished):
        _, results = finished
        for name in ("above_static", "above_uniform"):
            found = [getattr(one, name) for one in results.left_out]
            order = sorted(range(len(found)), key=lambda i: found[i].p)
            at_least = itertools.accumulate((found[i].p * (len(found) - k) for k, i in enumerate(order)), max)
            assert [found[i].p_holm for i in order] == pytest.approx([min(p, 1.0) for p in at_least])

    def test_what_it_leaves(self, finished):
        out, results = finished
        assert {path.name for path in out.iterdir()} == {
            *("config.json", "runs", "tasks", "results.json", "table.md", "transfer.png")
        }
        there = records.read(out / "results.json", transfer_module.TransferResults)
        assert records.plain(there) == records.plain(results)
        assert "others - static" in (out / "table.md").read_text()

    def test_going_on_trains_and_answers_nothing_twice(self, finished, ensemble, tasks, monkeypatch):
        out, results = finished

        def again(*args, **options):
            raise AssertionError("done again")

        monkeypatch.setattr(transfer_module, "evaluate", again)
        monkeypatch.setattr("rlae_jax.ppo.train._iterate", again)
        gone_on = leave_one_out(ensemble, tasks, self.SETTINGS, out, limit=24, resume=True)
        assert (gone_on.scores, gone_on.left_out) == (results.scores, results.left_out)
        with pytest.raises(AssertionError, match="done again"):
            leave_one_out(ensemble, tasks, self.SETTINGS, out, limit=23, resume=True)

    def test_two_tasks_need_no_run_twice(self, ensemble, tasks, tmp_path):
        settings = dataclasses.replace(self.SETTINGS, iterations=1)
        results = leave_one_out(ensemble, tasks[:2], settings, tmp_path / "out", limit=4)
        assert results.rows == ["uniform", "static", "only one", "only two"]
        assert [one.others for one in results.left_out] == [results.scores[3][0], results.scores[2][1]]
        assert {path.name for path in (tmp_path / "out" / "runs").iterdir()} == {"only-one", "only-two"}

    def test_mistakes(self, finished, ensemble, tasks, tmp_path, raises_input_error):
        def refused(given, *told, out=tmp_path / "new", **settings):
            config = dataclasses.replace(self.SETTINGS, **settings)
            before = files_of(out)
            raises_input_error(lambda: leave_one_out(ensemble, given, config, out), *told)
            assert files_of(out) == before

        refused(tasks[:1], "two or more", "--task")
        refused(tasks, "equal shares", shares=(1, 2, 3))
        refused([tasks[0], tasks[0]], "one is given twice")
        refused(tasks, "resume", out=finished[0])
        refused(tasks[:2], "another configuration", out=finished[0])

    def test_agents_can_answer_the_longest_task(self, tasks):
        longer = dataclasses.replace(tasks[1], max_new_tokens=7)
        config = transfer_module._for_all(dataclasses.replace(self.SETTINGS, span_length=2), [tasks[0], longer])
        assert config.agent.max_spans == 4
        assert config.max_new_tokens is None


def files_of(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_frames_are_drawn_around_cells(tmp_path):
    matrix = {"rows": ["only a", "all but a"], "columns": ["a", "b"], "scores": [[0.1, 0.9], [0.5, 0.6]]}
    plain, framed = tmp_path / "plain.png", tmp_path / "framed.png"
    report.transfer_map(plain, matrix, "title")
    report.transfer_map(framed, matrix, "title", [(1, 0)])
    assert plain.read_bytes() != framed.read_bytes()
