"""Documents made wrong: nodes of a JSON value replaced, deleted, inserted, moved; bytes flipped, cut, repeated.

Every choice is asked of a `random.Random`, so that who drives it may be a seed, hypothesis, or a fuzzer's bytes.
"""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

# What a value may be instead of what it should be.
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 2**31, -(2**31) - 1, 2**63, 10**30, 10**400, 0.5, -0.5, 1e308, -1e-320),
    *(
        float("nan"),
        float("inf"),
        float("-inf"),
        "",
        "x",
        "0",
        "nan",
        "../../x",
        "/etc/passwd",
        "a\0b",
        "\ud800",
        "é" * 300,
    ),
    *(
        "{{ 1 }}",
        "null",
        [],
        {},
        [{}],
        [[]],
        [None],
        {"": None},
        {"a": {"b": 1}},
        ["a"],
        [0],
        [1.5],
        [1, 2, 3],
        ["", ""],
    ),
    *("a" * 100_000, [0] * 5_000),
)
# What a text may have in it.
PIECES = (
    *("", " ", "\n", "\r\n", "\t", ",", ";", ":", "=", "+", "-", ".", "..", "/", "\\", '"', "'", "[", "]", "{", "}"),
    *(
        "\0",
        "\ufeff",
        "\u2028",
        "é",
        "𝕏",
        "nan",
        "inf",
        "1e999",
        "-1",
        "0",
        "1",
        "9" * 30,
        "9" * 5_000,
        "null",
        "{{",
        "}}",
        "{%",
    ),
    *("linear", "ppo", "none", "true", "data", "model", "a.b", "a" * 3_000),
)


def value(source: random.Random, document: Any) -> Any:
    """A JSON value with one to three changes."""
    holder = [json.loads(json.dumps(document))]
    for _ in range(source.choice((1, 1, 1, 2, 3))):
        _change(source, holder)
    return holder[0]


def _odd(source: random.Random) -> Any:
    return copy.deepcopy(source.choice(ODD))


def _places(holder: list[Any]) -> list[tuple[Any, Any]]:
    """Every (container, key) of a value, but for the middle of long lists."""
    found: list[tuple[Any, Any]] = []
    waiting: list[Any] = [holder]
    while waiting:
        at = waiting.pop()
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if len(keys) > 60:
            keys = keys[:40] + keys[-20:]
        for key in keys:
            found.append((at, key))
            if isinstance(at[key], dict | list):
                waiting.append(at[key])
    return found


def _change(source: random.Random, holder: list[Any]) -> None:
    places = _places(holder)
    at, key = source.choice(places)
    kind = source.choice(("replace", "replace", "near", "delete", "insert", "move", "wrap", "deep"))
    if kind == "delete" and at is not holder:
        del at[key]
    elif kind == "insert" and isinstance(at, dict):
        at[source.choice(("new", "schema", "", "type", "_" * 20, str(key) + "_2"))] = _odd(source)
    elif kind == "insert":
        at.insert(0, _odd(source)) if at is not holder else None
    elif kind == "move":
        other, name = source.choice(places)
        if name in other if isinstance(other, dict) else name < len(other):
            at[key] = json.loads(json.dumps(other[name]))
    elif kind == "wrap":
        at[key] = source.choice(([at[key]], {"x": at[key]}, [at[key], copy.deepcopy(at[key])], str(at[key])))
    elif kind == "deep":
        nested: Any = source.choice(ODD[:10])
        for _ in range(source.choice((3, 50, 250))):
            nested = source.choice(([nested], {"a": nested}))
        at[key] = nested
    elif kind == "near" and isinstance(at[key], int | float) and not isinstance(at[key], bool):
        at[key] = source.choice(
            (
                at[key] + 1,
                at[key] - 1,
                -at[key],
                at[key] * 2,
                at[key] * 1_000_000_007,
                at[key] / 2 if abs(at[key]) < 1e9 else 0,
            )
        )
    elif kind == "near" and isinstance(at[key], str):
        at[key] = text(source, at[key])
    else:
        at[key] = _odd(source)


def text(source: random.Random, original: str) -> str:
    """A text with one to three changes."""
    changed = original
    for _ in range(source.choice((1, 1, 2, 3))):
        start = source.randrange(len(changed) + 1)
        end = min(start + source.choice((0, 0, 1, 1, 2, 5, 40)), len(changed))
        piece = source.choice((*PIECES, changed[start : start + 20], changed))
        changed = changed[:start] + piece + changed[end:]
    return changed[:300_000]


def raw(source: random.Random, original: bytes) -> bytes:
    """Bytes with one to three changes."""
    changed = bytearray(original)
    for _ in range(source.choice((1, 1, 2, 3))):
        start = source.randrange(len(changed) + 1)
        kind = source.choice(("flip", "flip", "cut", "end", "insert", "number", "repeat"))
        if kind == "flip" and start < len(changed):
            changed[start] ^= 1 << source.randrange(8)
        elif kind == "cut":
            del changed[start : start + source.choice((1, 4, 100))]
        elif kind == "end":
            del changed[start:]
        elif kind == "number":
            number = source.choice((0, 1, -1, 2**31 - 1, 2**62, -(2**63), 10**9))
            changed[start : start + 8] = number.to_bytes(8, "little", signed=True)
        elif kind == "repeat":
            changed[start:start] = changed[max(start - 50, 0) : start]
        else:
            changed[start:start] = bytes(source.randrange(256) for _ in range(source.choice((1, 3, 8))))
    return bytes(changed)


def _dumped(document: Any) -> bytes:
    return json.dumps(document).encode("utf-8", "surrogatepass")


def _mostly(source: random.Random, data: bytes) -> bytes:
    """One in eight of the structured documents is spoilt byte by byte, too; in one of forty something never ends."""
    if source.randrange(40) == 0:
        start = source.randrange(len(data) + 1)
        return data[:start] + source.choice((b"[", b'{"a":', b"(", b"{{", b'"')) * 50_000 + data[start:]
    return raw(source, data) if source.randrange(8) == 0 else data


def json_bytes(source: random.Random, original: bytes) -> bytes:
    """Of a file with a JSON value."""
    return _mostly(source, _dumped(value(source, json.loads(original))))


def lines(source: random.Random, original: bytes) -> bytes:
    """Of a file with a JSON value in each line."""
    rows = [json.loads(line) for line in original.splitlines()]
    changed = value(source, rows)
    rows = changed if isinstance(changed, list) else [changed]
    return _mostly(source, b"".join(_dumped(row) + b"\n" for row in rows))


def text_bytes(source: random.Random, original: bytes) -> bytes:
    """Of a text file."""
    return _mostly(source, text(source, original.decode()).encode("utf-8", "surrogatepass"))


def safetensors(source: random.Random, original: bytes) -> bytes:
    """Of a safetensors file: its header as a JSON value, its length, or bytes of all."""
    if source.randrange(4) == 0:
        return raw(source, original)
    size = int.from_bytes(original[:8], "little")
    header = _dumped(value(source, json.loads(original[8 : 8 + size])))
    told = len(header) if source.randrange(10) else source.choice((0, 1, len(header) - 1, len(header) + 1, 2**40))
    return told.to_bytes(8, "little") + header + original[8 + size :]


Mutation = Callable[[random.Random, bytes], bytes]
