"""docs/tpu.md is made of docs/tpu/results.json."""

from pathlib import Path

import pytest

from benchmarks import tpu

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_that_of_the_stored_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    results = tpu.read_results()
    assert tpu.page(results) == tpu.PAGE.read_text()
    assert set(results["cases"]) == {case.name for case in tpu.CASES}


def test_cases_that_are_left_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    results = tpu.read_results()
    last = tpu.CASES[-1].name
    del results["cases"][last]
    assert f"Not compiled yet: {last}" in tpu.page(results)


def test_rows_by_hand() -> None:
    row = {"model": "1B", "kind": "v5e", "chips": 8, "batch": 4, "weights": 2**30, "cache": 2**29, "temporaries": 0}
    row |= {"read_per_step": 819e6, "cycles": 3e6, "exchanges": {"all-reduce": 2}, "cache_copies": 0}
    row |= {"compile_seconds": 9.6}
    cells = tpu._cells(row)
    assert cells[:6] == ["1B pair", "8 x v5e", "4", "1.00", "0.50", "0.00"]
    assert cells[6:] == ["3.00", "2.00", "1.00", "0.50", "2,000", "2", "-", "10"]
