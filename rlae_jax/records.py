"""The shape of every file that is read: JSON values become checked ones here, or an error of one line.

    run's or checkpoint's file ─files.read_json─► object ─check(shape)─► what the shape says, or InputError:
    "RUN/config.json: settings.seed is a text ('seven'); expected int"

A shape is what `msgspec.convert` takes. Files of our own are `Record`s: closed, so that a key that this version does
not know is told as a newer version's, and with the number of their form in `schema`. Files of others (Hugging Face
configurations, adapters) are `TypedDict`s of the keys that are read: others are left alone.
"""

import json
import re
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import msgspec

from rlae_jax import files
from rlae_jax.errors import InputError

T = TypeVar("T")

_UNKNOWN_KEY = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING_KEY = re.compile(r"Object missing required field `(.*)`", re.DOTALL)
_AT = re.compile(r"(.*) - at `(?:key in )?\$(.*)`", re.DOTALL)
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")


class Record(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A file of ours, or a part of one: a class per kind of file, a field per key. A file's own class also says
    `schema: int = newest` and raises `newest` when a reader of before would misread what is written now."""

    newest: ClassVar[int] = 1


def check(value: Any, shape: type[T], where: object) -> T:
    """A JSON value as its shape says.

    Args:
      where: what messages begin with: the file, or "FILE:LINE".

    Raises:
      InputError: a value that is not of the shape: where, which key, what it is and what it should be.
    """
    if isinstance(shape, type) and issubclass(shape, Record):
        _check_schema(value, shape.newest, where)
    try:
        return msgspec.convert(value, shape)
    except msgspec.ValidationError as error:
        raise InputError(f"{where}: {_told(str(error), value, shape)}") from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply") from None


def read(path: Path, shape: type[T]) -> T:
    """A file with one JSON object, checked.

    Raises:
      InputError: the file cannot be read, is no JSON object, or not of the shape.
    """
    return check(files.read_json(path), shape, path)


def read_lines(path: Path, shape: type[T], *, growing: bool = False) -> list[T]:
    """A file with a JSON object in each line, checked.

    Args:
      growing: a killed process may have left its last line unfinished; that line is left out.

    Raises:
      InputError: the file cannot be read, a line is no JSON object, or not of the shape.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    whole, last = lines[:-1], lines[-1]
    rows = [check(_object(line, f"{path}:{i}"), shape, f"{path}:{i}") for i, line in enumerate(whole, 1)]
    if last and not growing:
        rows.append(check(_object(last, f"{path}:{len(lines)}"), shape, f"{path}:{len(lines)}"))
    return rows


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


def _told(message: str, value: Any, shape: Any) -> str:
    """msgspec's message with the key first, and what the value is."""
    at = _AT.fullmatch(message)
    what, place = (at[1], at[2]) if at else (message, "")
    found, key = _follow(value, place)
    if unknown := _UNKNOWN_KEY.fullmatch(what):
        return f"unknown key {_join(key, unknown[1])}: written by a newer version, or by hand"
    if missing := _MISSING_KEY.fullmatch(what):
        return f"the key {_join(key, missing[1])} is missing"
    wanted = what.split(", got ")[0].replace("`", "")
    wanted = wanted[0].lower() + wanted[1:]
    return f"{key or 'the whole'} is {shown(found)}; {wanted}"


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _follow(value: Any, place: str) -> tuple[Any, str]:
    """What lies at msgspec's path, as far as the path can be followed, and the path for people."""
    for name, index in _STEP.findall(place):
        if name and name != "..." and isinstance(value, dict):
            value = value.get(name)
        elif index not in ("", "...") and isinstance(value, list) and int(index) < len(value):
            value = value[int(index)]
        else:
            return "...", place.lstrip(".")
    return value, place.lstrip(".")


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
