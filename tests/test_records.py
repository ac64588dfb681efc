"""Files are checked against a shape as they are read: what is wrong is told in a line that names file and key."""

import ast
import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec
import pytest

from rlae_jax import records
from rlae_jax.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
# Who may parse JSON. What is read from files goes through the first two; a new reader belongs there, not here.
PARSE = {
    *("rlae_jax.files", "rlae_jax.records", "rlae_jax.digests"),
    *("rlae_jax.tasks.rows", "rlae_jax.tasks.prompts"),  # users' rows, whatever is in them
    *("rlae_jax.hosts", "rlae_jax.workers", "rlae_jax.worker_script", "rlae_jax.serving.fields"),  # messages
    "rlae_jax.runs.lock",  # of a process that may be writing it
    "rlae_jax.fusion.vocabulary.tokens",  # what a library gives of a tokenizer that it has read
    "rlae_jax.models.stored",  # a header that a library has read
    *("benchmarks.load", "benchmarks.soak"),  # messages
    *("benchmarks.members", "benchmarks.mixed", "benchmarks.real_models", "benchmarks.scoring", "benchmarks.serving"),
}
# Who may have an object unchecked: to check it against one of several shapes, to compare it, to hand it on.
UNCHECKED = {
    *("rlae_jax.records", "rlae_jax.runs.directory", "rlae_jax.runs.metrics"),
    *(f"rlae_jax.models.{name}" for name in ("checkpoint_files", "lm", "peft_files", "quantised_files")),
    *("benchmarks.accelerator", "benchmarks.study", "benchmarks.tpu"),
}


class _Part(records.Record):
    size: int
    names: list[str] = msgspec.field(default_factory=list)


class _File(records.Record, kw_only=True):
    newest = 2
    schema: int = 2
    part: _Part
    rate: float | None = None


@dataclasses.dataclass(frozen=True)
class _Settings:
    steps: int = 3
    rate: float = 0.5
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps must be at least 1, not {self.steps}")


class _Run(records.Record, kw_only=True):
    settings: _Settings = _Settings()
    kind: Annotated[str, records.one_of(("a-b", "c"))] = "c"
    parts: dict[str, _Part] = msgspec.field(default_factory=dict)
    score: records.Finite = 0.0
    count: records.Count = 0


class _Foreign(TypedDict, total=False):
    architectures: list[str]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({}, "the key part is missing"),
        ({"part": {}}, "the key part.size is missing"),
        ({"part": {"size": "7"}}, r"part\.size is a text \('7'\); expected int"),
        ({"part": {"size": True}}, r"part\.size is true; expected int"),
        ({"part": {"size": 1, "names": ["a", {}]}}, r"part\.names\[1\] is an object; expected str"),
        ({"part": {"size": 1}, "rate": []}, r"rate is a list; expected float \| null"),
        ({"part": {"size": 1, "colour": 3}}, r"unknown key part\.colour: written by a newer version"),
        (
            {"part": {"size": 1}, "schema": 3, "new": 1},
            "schema 3 was written by a newer version; this one reads up to 2",
        ),
        ({"part": {"size": 1}, "schema": "x"}, r"schema is a text \('x'\); expected int"),
        ([], "expected a JSON object, found list"),
    ],
)
def test_what_is_wrong_is_told_with_file_and_key(tmp_path: Path, value: Any, told: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(value))
    with pytest.raises(InputError, match=rf"config\.json: {told}"):
        records.read(path, _File)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "9" * 10_000, "\udc80", "null", "NaN"])
def test_what_is_no_object_is_told(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(InputError, match=r"config\.json"):
        records.read(path, _File)
    path.write_bytes(text.encode("utf-8", "surrogatepass") + b"\n")
    with pytest.raises(InputError, match=r"config\.json"):
        records.read_lines(path, _File)


def test_a_file_of_others_may_have_more_keys() -> None:
    assert records.check({"architectures": ["A"], "x": 1}, _Foreign, "f") == {"architectures": ["A"]}
    with pytest.raises(InputError, match=r"f: architectures\[0\] is an object; expected str"):
        records.check({"architectures": [{}]}, _Foreign, "f")


def test_lines_are_numbered_and_an_unfinished_one_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"size": 1}\n{"size": 2}\n{"si')
    assert [row.size for row in records.read_lines(path, _Part, growing=True)] == [1, 2]
    with pytest.raises(InputError, match=r"lines\.jsonl:3: not one JSON object"):
        records.read_lines(path, _Part)
    path.write_text('{"size": 1}\n[]\n')
    with pytest.raises(InputError, match=r"lines\.jsonl:2: expected a JSON object, found a list"):
        records.read_lines(path, _Part, growing=True)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"settings": {"steps": 0}}, "settings: steps must be at least 1, not 0"),
        ({"settings": {"steps": None}}, "settings.steps is null; expected int"),
        ({"settings": {"colour": 1}}, "unknown key settings.colour: written by a newer version, or by hand"),
        ({"settings": []}, "settings is a list; expected object"),
        ({"kind": "d"}, "kind is a text ('d'); expected one of a-b, c"),
        ({"kind": "c\n"}, "kind is a text ('c\\n'); expected one of a-b, c"),
        ({"score": math.nan}, "score is a number (nan); expected a finite number"),
        ({"score": -math.inf}, "score is a number (-inf); expected a finite number"),
        ({"score": 10**400}, "score is a number; number out of range"),
        ({"count": -1}, "count is a number (-1); expected int >= 0"),
        ({"count": 10**30}, "count is a number (1000000000000000000000000000000); expected int <= 9007199254740992"),
        (
            {"parts": {**{f"p{i}": {"size": i} for i in range(9)}, "of.two\nlines": {"size": "x"}}},
            "parts.'of.two\\nlines'.size is a text ('x'); expected int",
        ),
        ({"parts": {"p": {"size": 1, "new": 2}}}, "unknown key parts.p.new: written by a newer version, or by hand"),
        ({"new\nkey": 1}, "unknown key 'new\\nkey': written by a newer version, or by hand"),
    ],
)
def test_what_is_told_of_settings_numbers_and_names(value: Any, told: str) -> None:
    with pytest.raises(InputError) as raised:
        records.check(value, _Run, "f")
    assert str(raised.value) == f"f: {told}"


def test_a_part_is_named_by_its_key() -> None:
    for value, told in (({"size": []}, "f: a.b.size is a list; expected int"), ({}, "f: the key a.b.size is missing")):
        with pytest.raises(InputError) as raised:
            records.check(value, _Part, "f", "a.b")
        assert str(raised.value) == told


def test_what_is_written_is_read_again() -> None:
    record = _Run(settings=_Settings(names=("x", "y")), parts={"a": _Part(size=2)})
    written = records.plain(record)
    assert written["settings"] == {"steps": 3, "rate": 0.5, "names": ["x", "y"]}
    assert records.check(json.loads(json.dumps(written)), _Run, "f") == record


def _uses(names: set[str]) -> set[str]:
    """The modules that name one of these, as json.loads or files.read_json."""
    found = set()
    for package in ("rlae_jax", "benchmarks", "examples"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                used = isinstance(node, ast.Attribute) and ast.unparse(node) in names
                imported = isinstance(node, ast.ImportFrom) and {f"{node.module}.{a.name}" for a in node.names} & names
                if used or imported:
                    found.add(".".join(path.relative_to(ROOT).with_suffix("").parts))
    return found


def test_who_parses_json() -> None:
    parsers = {"json.load", "json.loads", "json.JSONDecoder", "msgspec.json.decode", "msgspec.json.Decoder"}
    assert _uses({*parsers, "pickle.load", "pickle.loads", "ast.literal_eval"}) <= PARSE
    assert _uses({"files.read_json", "rlae_jax.files.read_json"}) <= UNCHECKED
    assert _uses({"json.loads"}) >= {"rlae_jax.files", "rlae_jax.records"}
