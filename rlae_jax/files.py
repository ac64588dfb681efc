"""Writing files so that a reader never meets a half-written one: a temporary name first, then a rename. Of several
processes the first one writes."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlae_jax import hosts
from rlae_jax.errors import InputError

_LONGEST_NAME = 255
_LFS_POINTER = b"version https://git-lfs"


def write_text(path: Path, text: str) -> None:
    """Replaces the file's content at once."""
    if not hosts.is_first():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """One indented JSON document."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """One JSON value per line."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_json_lines(path: Path, **fields: Any) -> list[dict[str, Any]]:
    """The rows of a JSON lines file of our own whose fields have the given values."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [row for row in rows if all(row[name] == value for name, value in fields.items())]


def check_fetched(path: Path) -> None:
    """Raises an `InputError` for what git leaves in the place of a large file that was not fetched."""
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise InputError(f"{path}: a git-LFS pointer, not the file itself; fetch it with: git lfs pull")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      InputError: the file cannot be read, or is something else.
    """
    try:
        check_fetched(path)
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # of bytes, of JSON, of numbers and nesting without end
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def inside(root: Path, name: str, where: object = None) -> Path:
    """The file that a name in some file means: in the directory `root`, or in one below.

    Args:
      where: the file that says the name; by default the directory.

    Raises:
      InputError: a name that is no relative path with plain parts, or by links leads out of the directory. (The links
        of the Hub's cache, from its snapshots into the same repository's blobs, lead nowhere else.)
    """
    named = f"{root if where is None else where}: the name {name[:80]!r}"
    parts = name.split("/")
    if not all(parts) or {".", ".."} & set(parts) or any(c in name for c in "\\\0") or len(name) > _LONGEST_NAME:
        raise InputError(f"{named} is no file's in {root}: it must be a relative path, without .. and \\")
    path = root / name
    try:
        real, home = path.resolve(), root.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # no text for this file system; links in a circle
        raise InputError(f"{named} cannot be followed ({error})") from None
    homes = [home] + ([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])
    if not any(real.is_relative_to(one) for one in homes):
        raise InputError(f"{named} is a link that leads out of {root}")
    return path


def digest(value: Any) -> str:
    """A hash of a JSON value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def require_writable_parent(path: Path) -> None:
    """Raises an `InputError` if no directory can be made at `path`, before any work is done for it."""
    existing = path
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise InputError(f"{path}: {existing} is a file, so no directory can be made there")
    if not os.access(existing, os.W_OK):
        raise InputError(f"{path}: {existing} is not writable")
