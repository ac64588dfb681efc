"""What tells changed content from what was written: digests, made on writing and compared on reading.

    a JSON object of ours, a file or a line   its last key, "digest": that of the others, but for seconds
    a directory that is made at once          DIRECTORY/digests.json: the SHA-256 of every other file

What has none, from older versions or from others, is taken as it is. Hashing takes one to two seconds a GB.
"""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from rlae_jax.errors import InputError

KEY, FILE = "digest", "digests.json"
_DIGITS = 16  # of a JSON object's
_TIME = re.compile(r"seconds|^ms_per_")


class Damaged(InputError):
    """Content that is not what was written.

    Attributes:
      value: a JSON object without its digest, for those who can say more about it.
    """

    value: dict[str, Any]


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its digest."""
    rest = {key: item for key, item in value.items() if key != KEY}
    return rest | {KEY: _digest(rest)}


def opened(value: dict[str, Any], where: object) -> dict[str, Any]:
    """A JSON object without its digest, if it has one.

    Args:
      where: what the message begins with.

    Raises:
      Damaged: another content has this digest.
    """
    if not re.fullmatch(rf"[0-9a-f]{{{_DIGITS}}}", str(value.get(KEY))):
        return value
    rest = {key: item for key, item in value.items() if key != KEY}
    if value[KEY] != _digest(rest):
        error = Damaged(
            f'{where}: content differs from its digest: damaged, or edited by hand (then remove the key "{KEY}")'
        )
        error.value = rest
        raise error
    return rest


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(_without_times(value)).encode()).hexdigest()[:_DIGITS]


def _without_times(value: Any) -> Any:
    """The value without what the clock gave: what two runs have alike has one digest."""
    if isinstance(value, Mapping):
        return {key: _without_times(item) for key, item in value.items() if not _TIME.search(str(key))}
    return [_without_times(item) for item in value] if isinstance(value, list | tuple) else value


def seal(directory: Any) -> None:
    """Writes the digests of all files of a directory. Parts that have their own digests are left to these.

    Args:
      directory: a path, or one of etils' for buckets.
    """
    (directory / FILE).write_text(json.dumps({"schema": 1, "files": dict(_digests(directory))}, indent=2) + "\n")


def _digests(directory: Any, under: str = "") -> Iterator[tuple[str, str]]:
    for path in sorted(directory.iterdir(), key=lambda path: str(path.name)):
        name = f"{under}{path.name}"
        if path.is_dir():
            own = path / FILE
            yield from [(f"{name}/{FILE}", _file_digest(own))] if own.exists() else _digests(path, f"{name}/")
        elif name != FILE:
            yield name, _file_digest(path)


def _file_digest(path: Any) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(directory: Any, ending: str = "") -> str | None:
    """What of a directory differs from its digests, in a few words; None where nothing does, or where it has none.

    Args:
      ending: of the names of the files that are compared.
    """
    path = directory / FILE
    try:
        text = path.read_bytes() if path.exists() else b""
    except OSError as error:
        return f"{FILE}: cannot be read ({error.strerror})"
    if not text:  # an empty one: the process ended before it wrote it
        return None
    try:
        known = json.loads(text)
        names = dict(known["files"])
        assert known["schema"] == 1
    except (ValueError, KeyError, TypeError, AssertionError, RecursionError):
        return f"{FILE}: not a list of digests"
    for name, digest in names.items():
        if not name.endswith(ending):
            continue
        place = directory
        for part in name.split("/"):
            if part in ("", "..") or "\0" in part:
                return f"{FILE}: {name!r} is not the name of a file"
            place = place / part
        try:
            if not place.exists():
                return f"incomplete: {name} is missing"
            if _file_digest(place) != digest:
                return f"{name}: content differs from its digest"
        except OSError as error:
            return f"{name}: cannot be read ({error.strerror})"
    return None


def has_digests(directory: Any) -> bool:
    """Whether a directory's files have digests."""
    return (directory / FILE).exists() and bool((directory / FILE).read_bytes())


@contextlib.contextmanager
def checking(directory: Any) -> Iterator[None]:
    """Compares a directory with its digests while its files are read.

    Raises:
      Damaged: a file differs or is missing, in place of whatever error reading it may have raised.
    """
    found: list[str | None] = []
    thread = threading.Thread(target=lambda: found.append(damage(directory)), name="digests")
    thread.start()
    try:
        yield
    except Exception:
        thread.join()
        _raise(directory, found)
        raise
    thread.join()
    _raise(directory, found)


def check(directory: Any, ending: str = "") -> None:
    """Raises `Damaged` where a directory differs from its digests, see `damage`."""
    _raise(directory, [damage(directory, ending)])


def _raise(directory: Any, found: list[str | None]) -> None:
    if found and found[0] is not None:
        raise Damaged(f"{directory}: {found[0]}; restore it, or remove {FILE} if the change was meant")
