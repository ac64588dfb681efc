"""Every file that we write and read again, with every key spoilt in every way: its reader returns, or raises an
`InputError` of few lines that names the file."""

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlae_jax.emorl import display
from rlae_jax.errors import InputError
from tests.helpers import run_files
from tests.helpers.run_files import READERS, write

DEEP: Any = []
for _ in range(400):
    DEEP = [DEEP]
SPOILT: list[Any] = [
    *(None, True, -1, 0, 2**31, 2**70, 10**400, 1e-400, 0.5, float("inf"), float("-inf"), float("nan")),
    *("", "x", "../../x", "a\nb", "\0", "\udc80", "x" * 5_000),
    *([], {}, [{}], [[]], [None], {"a": 1}, {"": None}, {"a": {}}, DEEP),
]
FEW: list[Any] = [None, True, -1, 10**400, float("inf"), "x", [], {}, [{}], {"a": 1}, DEEP]
BYTES = [
    b"",
    b"\n",
    b"{",
    b"[]\n",
    b"null\n",
    b'"x"\n',
    b"\x80\xff\x00\n",
    b"\xef\xbb\xbf{}\n",
    b"[" * 100_000,
    b"\0" * 64,
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a file of every kind."""
    root = tmp_path_factory.mktemp("files")
    run_files.make(root)
    return root


# What messages name if not the file or its directory: what it tells to load, or its run's objectives together.
NAMED = {"adapters/config.json": "", "adapters/objectives/brevity/config.json": "adapters"}


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The paths of all values inside."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def spoilt(value: Any, values: list[Any]) -> Iterator[tuple[str, Any]]:
    """(what was done, the value) for every key that is taken out or replaced, and for further keys."""
    for path in places(value):
        for what in [*values, "taken out"]:
            other = copy.deepcopy(value)
            inner = other
            for key in path[:-1]:
                inner = inner[key]
            if what == "taken out":
                del inner[path[-1]]
            else:
                inner[path[-1]] = what
            yield f"{path} {repr(what)[:40]}", other
    for path in [(), *places(value)]:
        other = copy.deepcopy(value)
        inner = other
        for key in path:
            inner = inner[key]
        if isinstance(inner, dict):
            for name, new in {"new": 99, "": 99, "a\nb": 99, "schema": 99, "digest": "0" * 16}.items():
                inner[name] = new
                yield f"{path} {name!r} is new", other
                del inner[name]


def read_all(root: Path, name: str, what: str) -> int:
    """Reads a file in every way. Returns how often it was refused."""
    refused = 0
    content = (root / name).read_bytes()
    for reader in READERS[name]:
        try:
            reader(root)
        except InputError as error:
            told = str(error)
            assert NAMED.get(name, str((root / name).parent)) in told, f"{name}, {what}: {told}"
            assert len(told.splitlines()) <= 10, f"{name}, {what}: {told}"
            assert name in NAMED or len(told) < 2_000, f"{name}, {what}: {told[:500]} and so on"
            refused += 1
        except BaseException as error:
            raise AssertionError(f"{name}, {what}: {type(error).__name__}: {str(error)[:300]}") from error
        (root / name).write_bytes(content)  # what reads may write
    return refused


def check_file(root: Path, name: str, values: list[Any]) -> tuple[int, int]:
    """How many spoilt files were refused, and how many there were."""
    path, there = root / name, sorted(root.rglob("*"))
    good = path.read_bytes()
    value = [json.loads(line) for line in good.splitlines()] if path.suffix == ".jsonl" else json.loads(good)
    refused = total = 0
    try:
        for what, other in spoilt(value, values):
            write(path, other)
            refused += read_all(root, name, what) > 0
            total += 1
        for content in (*BYTES, good[:-2], good[: len(good) // 2], good + good, good + b"\x00"):
            path.write_bytes(content)
            read_all(root, name, repr(content[:20]))
    finally:
        path.write_bytes(good)
    assert sorted(root.rglob("*")) == there, "who only reads makes nothing"
    return refused, total


@pytest.fixture
def quiet(run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory; what is told while its files are read is not shown, and nothing waits for a disk."""
    monkeypatch.setattr(display.report, "say", lambda *told: None)
    monkeypatch.setattr(display.report.console, "print", lambda *told, **options: None)
    monkeypatch.setattr(os, "fsync", lambda file: None)
    return run


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_a_spoilt_file_is_read_or_told(quiet: Path, name: str) -> None:
    refused, total = check_file(quiet, name, FEW)
    assert total > 20
    assert refused > total / 2, f"{refused} of {total}"


@pytest.mark.rare
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_a_file_spoilt_in_many_ways_is_read_or_told(quiet: Path, name: str) -> None:
    check_file(quiet, name, SPOILT)


@pytest.mark.parametrize("name", READERS)
def test_a_file_as_it_is_written_is_read(quiet: Path, name: str) -> None:
    """But for what is not there: checkpoints and models. So every refusal above is one of the file's."""
    last = READERS[name][-1]
    last(quiet)
    content = (quiet / name).read_text()
    if name.endswith(".json"):
        assert '"schema"' in content
        newer = ("schema", "digest")
        write(quiet / name, {key: item for key, item in json.loads(content).items() if key not in newer})
        last(quiet)
        (quiet / name).write_text(content)
