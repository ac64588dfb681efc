"""Files of others, spoilt: every value of a JSON value in turn is another one or missing, and texts are cut."""

import copy
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlae_jax.errors import InputError

VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 3, 10**6, 10**8, 10**12, 2**63, 10**30, 10**400),
    *(0.5, -2.5, float("nan"), float("inf"), 1e308, 1e-320, "", "x", "gelu", "../x", "\ud800", "x" * 5000),
    *([], [None], [1], ["x"], [[]], [{}], [10**9] * 3, {}, {"a": 1}, {"a": {"b": []}}),
)
_MISSING = object()


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where values lie in a JSON value, inside lists those of the first two entries."""
    entries: Any = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, part in entries:
        yield (*at, key)
        yield from places(part, (*at, key))


def spoilt(value: Any, share: float = 1.0) -> Iterator[tuple[str, Any]]:
    """(what was done, the value after it) for every place and change, or a share of them that never varies."""
    for at in places(value):
        for i, new in enumerate((*VALUES, _MISSING)):
            if zlib.crc32(f"{at}{i}".encode()) >= share * 2**32:
                continue
            changed = copy.deepcopy(value)
            inside = changed
            for key in at[:-1]:
                inside = inside[key]
            if new is _MISSING:
                del inside[at[-1]]
            else:
                inside[at[-1]] = new
            yield f"{'.'.join(map(str, at))} is {'missing' if new is _MISSING else repr(new)[:40]}", changed


def garbage(text: str) -> Iterator[tuple[str, bytes]]:
    """(what was done, the bytes after it): cut, of another kind, no text."""
    whole = text.encode()
    for size in sorted({0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 2}):
        yield f"cut to {size} bytes", whole[:size]
    for other in ("null", "[]", "1", '"x"', "[" * 100_000, "{}" * 2, "9" * 5000):
        yield f"the whole is {other[:10]}", other.encode()
    yield "no UTF-8", b"\xff\xfe" + whole
    yield "a zero byte", whole.replace(b":", b"\0:", 1)


def check_all(path: Path, cases: Iterator[tuple[str, Any]], read: Callable[[], Any]) -> tuple[int, int]:
    """Writes each case to a file and reads it: an `InputError` in a line or a few, or else success.

    Returns:
      How many there were, and how many succeeded.
    """
    count = read_well = 0
    for what, value in cases:
        path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
        count += 1
        told = ""
        try:
            read()
            read_well += 1
        except InputError as error:
            told = str(error)
        except BaseException as error:
            pytest.fail(f"{path.name}, {what}: {type(error).__name__}: {error}")
        assert len(told.splitlines()) <= 10, f"{what}: {told}"
    return count, read_well
