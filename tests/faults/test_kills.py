"""The harness itself: what it compares, what it finds; and a few kills, of which `python -m tests.faults.kills` has
more."""

import json

import numpy as np
import pytest

from tests.faults import compare, kills


def write(directory, name, text):
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


class TestCompare:
    @pytest.fixture
    def runs(self, tmp_path):
        """Two directories with the same content, written at different speeds."""
        for name, seconds in (("one", 1.5), ("two", 7.25)):
            run = tmp_path / name
            rows = [
                {"iteration": i, "reward": i / 3, "seconds": seconds, "update_seconds": 2 * seconds} for i in (1, 2)
            ]
            write(run, "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
            write(run, "results.json", json.dumps({"score": 0.1 + 0.2, "seconds": {"total": seconds}}))
            write(run, "table.md", f"| a | score | seconds |\n|---|---|---|\n| 1 | 0.3 | {round(seconds)} |\n")
        return tmp_path / "one", tmp_path / "two"

    def differences(self, runs):
        return list(compare.differences(*map(compare.content, runs)))

    def test_how_long_it_took_does_not_count(self, runs):
        assert self.differences(runs) == []

    @pytest.mark.parametrize(
        ("name", "old", "new"),
        [
            ("metrics.jsonl", "0.3333333333333333", "0.3333333333333334"),
            ("results.json", "0.30000000000000004", "0.3"),
            ("table.md", "| 0.3 |", "| 0.4 |"),
        ],
    )
    def test_a_digit_counts(self, runs, name, old, new):
        path = runs[1] / name
        path.write_text(path.read_text().replace(old, new))
        (found,) = self.differences(runs)
        assert found.startswith(f"{name} differs")

    def test_files_that_one_lacks(self, runs):
        write(runs[0], "specialists/weights.bin", "x")
        (runs[0] / "table.md").unlink()
        assert self.differences(runs) == ["specialists/weights.bin should not be there", "table.md is missing"]

    def test_temporary_files(self, runs):
        for name in (".config.json.partial-12", "deep/.base.partial-7/model.safetensors", "tmpx/y"):
            write(runs[0], name, "")
        assert len(compare.leftovers(runs[0])) == 3
        assert compare.leftovers(runs[1]) == []


def test_what_happens_follows_from_the_seed():
    known = kills.Reference({}, 2.0, 5)
    drawn = [
        [str(kills.draw(np.random.default_rng(i), known, False, kills.KINDS)) for i in range(40)] for _ in range(2)
    ]
    assert drawn[0] == drawn[1]
    assert {fault.split(" after")[0] for fault in drawn[0]} >= {"SIGKILL", "SIGTERM", "SIGINT"}
    assert {f"SIGKILL at write {n}" for n in range(1, 6)} & set(drawn[0])


@pytest.mark.rare
@pytest.mark.parametrize("only", ["specialists", "emorl-export", "emorl-random"])
def test_kills(only, tmp_path_factory, capsys):
    directory = tmp_path_factory.getbasetemp() / "kills"
    assert kills.run(2, 0, directory, only=[only], kinds=["kill"]) == 2
    assert "kills_survived: 2 of 2" in capsys.readouterr().out
