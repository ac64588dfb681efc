"""The shape of every file that is read: JSON values become checked ones here, or an error of one line.

    run's or checkpoint's file ─files.read_json─► object ─check(shape)─► what the shape says, or InputError:
    "RUN/config.json: settings.seed is a text ('seven'); expected int"

A shape is what `msgspec.convert` takes. Files of our own are `Record`s: closed, so that a key that this version does
not know is told as a newer version's, and with the number of their form in `schema`. Their parts may be the dataclasses
of settings, which say themselves what goes together. Files of others (Hugging Face configurations, adapters) are
`TypedDict`s of the keys that are read: others are left alone.
"""

import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import msgspec

from rlae_jax import digests, files
from rlae_jax.errors import InputError, one_line

T = TypeVar("T")

_LARGEST = 1.7976931348623157e308  # of floats
MOST = 2**53  # a whole number that any reader of JSON keeps
Schema = Annotated[int, msgspec.Meta(ge=1, le=MOST)]
Finite = Annotated[float, msgspec.Meta(ge=-_LARGEST, le=_LARGEST)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=_LARGEST)]
Place = Annotated[str, msgspec.Meta(pattern=r"^[^\x00]+\Z")]  # a file, a directory, an address
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=0, le=MOST)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=MOST)]

_UNKNOWN_KEY = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING_KEY = re.compile(r"Object missing required field `(.*)`", re.DOTALL)
_AT = re.compile(r"(.*) - at `(?:key in )?\$(.*)`", re.DOTALL)
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")
_ONE_OF = re.compile(r"expected str matching regex '\^\((.*)\)\\+Z'", re.DOTALL)
_PLAIN_NAME = re.compile(r"[\w:/@+ -]{1,60}")


class Record(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A file of ours, or a part of one: a class per kind of file, a field per key. A file's own class also says
    `schema: Schema = newest` and raises `newest` when a reader of before would misread what is written now."""

    newest: ClassVar[int] = 1


def one_of(names: Iterable[str]) -> msgspec.Meta:
    """What makes `Annotated[str, one_of(...)]` one of these names."""
    return msgspec.Meta(pattern=rf"^({'|'.join(map(re.escape, names))})\Z")


def plain(record: Any) -> Any:
    """A record, or a dataclass of settings, as the JSON value that a file holds."""
    return _lists(msgspec.to_builtins(record, enc_hook=lambda number: number.item()))  # of numpy


def _lists(value: Any) -> Any:
    """The value as JSON gives it back: tuples become lists."""
    if isinstance(value, dict):
        return {name: _lists(item) for name, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value


def check(value: Any, shape: type[T], where: object, key: str = "") -> T:
    """A JSON value as its shape says.

    Args:
      where: what messages begin with: the file, or "FILE:LINE"; "" where the caller adds it.
      key: what of the file the value is, if it is not the whole.

    Raises:
      InputError: a value that is not of the shape: where, which key, what it is and what it should be.
    """
    closed = isinstance(shape, type) and (issubclass(shape, Record) or dataclasses.is_dataclass(shape))
    if isinstance(shape, type) and issubclass(shape, Record):
        _check_schema(value, shape.newest, where)
    try:
        found = _convert(value, shape, where, key)
        if closed and (unknown := _unknown(value, plain(found), key)):
            raise InputError(f"{where}: unknown key {unknown}: written by a newer version, or by hand")
    except RecursionError:
        raise _error(where, "nested too deeply") from None
    return found


def _convert(value: Any, shape: type[T], where: object, key: str = "") -> T:
    try:
        return msgspec.convert(value, shape)
    except msgspec.ValidationError as error:
        raise _error(where, _told(error, value, shape, key)) from None
    except RecursionError:
        raise _error(where, "nested too deeply") from None
    except UnicodeEncodeError as error:
        raise _error(where, f"a text is no Unicode ({error})") from None


def _error(where: object, told: str) -> InputError:
    return InputError(f"{where}: {told}" if where else told)


def _unknown(value: Any, known: Any, key: str) -> str:
    """The first key that a value has and what was made of it has not: dataclasses leave out what they do not know."""
    if isinstance(value, dict) and isinstance(known, dict):
        for name, item in value.items():
            at = _join(key, name)
            if name not in known:
                return at
            if found := _unknown(item, known[name], at):
                return found
    elif isinstance(value, list) and isinstance(known, list):
        for i, (one, other) in enumerate(zip(value, known, strict=True)):
            if found := _unknown(one, other, f"{key}[{i}]"):
                return found
    return ""


def read(path: Path, shape: type[T]) -> T:
    """A file with one JSON object, checked.

    Raises:
      InputError: the file cannot be read, is no JSON object, not of the shape, or not what was written.
    """
    try:
        value = files.read_json(path)
    except digests.Damaged as error:
        check(error.value, shape, path)  # which says more where the change made it something else
        raise
    return check(value, shape, path)


def read_lines(path: Path, shape: type[T], *, growing: bool = False) -> list[T]:
    """A file with a JSON object in each line, checked.

    Args:
      growing: a killed process may have left its last line unfinished; that line is left out.

    Raises:
      InputError: the file cannot be read, a line is no JSON object, not of the shape, or not what was written.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    whole, last = lines[:-1], lines[-1]
    if last and not (growing and _is_unfinished(last)):
        whole.append(last)
    return [_line(line, shape, f"{path}:{i}") for i, line in enumerate(whole, 1)]


def _is_unfinished(line: str) -> bool:
    """Whether a line is the beginning of an object: one that goes on behind an object was another one before."""
    try:
        json.JSONDecoder().raw_decode(line)
    except (ValueError, RecursionError):
        return True
    return False


def _line(line: str, shape: type[T], where: str) -> T:
    value = _object(line, where)
    try:
        value = digests.opened(value, where)
    except digests.Damaged as error:
        _convert(error.value, shape, where)
        raise
    return _convert(value, shape, where)


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not one JSON object ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object, found {shown(value)}")
    return value


def _check_schema(value: Any, newest: int, where: object) -> None:
    """A newer form is told as such before its keys are looked at."""
    schema = value.get("schema", 1) if isinstance(value, dict) else 1
    if isinstance(schema, int) and schema > newest:
        raise InputError(f"{where}: schema {schema} was written by a newer version; this one reads up to {newest}")


def _told(error: msgspec.ValidationError, value: Any, shape: Any, under: str) -> str:
    """msgspec's message with the key first, and what the value is."""
    at = _AT.fullmatch(str(error))
    what, place = (at[1], at[2]) if at else (str(error), "")
    found, key = _follow(value, _named(str(error), place, value, shape), under)
    if isinstance(error.__cause__, InputError):  # a dataclass's own word on what goes together
        said = one_line(error.__cause__, 400)
        return f"{key}: {said}" if key else said
    if unknown := _UNKNOWN_KEY.fullmatch(what):
        return f"unknown key {_join(key, unknown[1])}: written by a newer version, or by hand"
    if missing := _MISSING_KEY.fullmatch(what):
        return f"the key {_join(key, missing[1])} is missing"
    wanted = what.split(", got ")[0].replace("`", "")
    wanted = wanted[0].lower() + wanted[1:]
    if names := _ONE_OF.fullmatch(wanted):
        wanted = f"expected one of {names[1].replace(chr(92), '').replace('|', ', ')}"
    if str(_LARGEST) in wanted:
        wanted = "expected a finite number"
    if "matching regex '^[^" in wanted:
        wanted = "expected the name of a file or directory"
    return f"{key or 'the whole'} is {shown(found)}; {wanted}"


def _join(key: str, name: str) -> str:
    name = name if _PLAIN_NAME.fullmatch(name) else repr(name[:60])
    return f"{key}.{name}" if key else name


def _named(message: str, place: str, value: Any, shape: Any) -> list[str | int]:
    """The steps of msgspec's path. Of dictionaries whose keys are data it says only "...": the key is looked for."""
    steps: list[str | int] = []
    for name, index in _STEP.findall(place):
        if index == "...":
            inner = _follow(value, steps)[0]
            names = list(inner) if isinstance(inner, dict) else []
            while len(names) > 1:
                half = names[: len(names) // 2]
                fails = _fails(_with(value, steps, {one: inner[one] for one in half}), shape, message)
                names = half if fails else names[len(half) :]
            if not names:
                break
            steps.append(names[0])
        else:
            steps.append(name or int(index))
    return steps


def _fails(value: Any, shape: Any, message: str) -> bool:
    try:
        msgspec.convert(value, shape)
    except msgspec.ValidationError as error:
        return str(error) == message
    except UnicodeEncodeError:
        return False
    return False


def _with(value: Any, steps: list[str | int], inner: Any) -> Any:
    """The value with something else at a path."""
    if not steps:
        return inner
    copy = value.copy()
    copy[steps[0]] = _with(value[steps[0]], steps[1:], inner)
    return copy


def _follow(value: Any, steps: list[str | int], key: str = "") -> tuple[Any, str]:
    """What lies at a path, as far as it can be followed, and the path for people, which begins with `key`."""
    for step in steps:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            break
        key = f"{key}[{step}]" if isinstance(step, int) else _join(key, step)
    return value, key


def shown(value: Any) -> str:
    """A JSON value as a message shows it: its kind, and itself where it is short."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    kinds: dict[type, str] = {dict: "an object", list: "a list", str: "a text", int: "a number", float: "a number"}
    kind = kinds.get(type(value), type(value).__name__)
    text = repr(value) if not isinstance(value, dict | list) else ""
    return f"{kind} ({text})" if 0 < len(text) <= 40 else kind
