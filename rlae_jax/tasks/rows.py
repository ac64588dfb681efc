"""The rows of a user's file, whatever it is written in.

In: JSON lines, one JSON list of objects, or a table with a header (.csv, with commas, semicolons or tabs, and .tsv);
plain or gzipped; UTF-8, or UTF-16 with its mark. Out: a dictionary per row with the place that messages call it by, and
what is no row.
"""

import codecs
import contextlib
import csv
import gzip
import io
import json
import re
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlae_jax.errors import SHOWN_PER_KIND, InputError

# How names of files end; each may have .gz behind it.
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
_DELIMITERS = (",", ";", "\t")
_GZIP = b"\x1f\x8b"
# What other files begin with.
_FOREIGN = {
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"PK\x03\x04": "a zip archive (or a spreadsheet)",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
}
_EXPECTED = "expected JSON lines, a JSON list, CSV or TSV, as text or gzipped"
# One half of a character that UTF-16 writes in two: JSON may hold it alone, no text can.
_HALF = re.compile("[\ud800-\udfff]")

Row = Mapping[str, Any]
# (kind, where), for `grouped_error`.
Findings = list[tuple[str, str]]


def kind_of(path: Path) -> str:
    """How a file's name ends, in small letters, whether it is gzipped or not."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def stem_of(path: Path) -> str:
    """A file's name without its ending."""
    return path.with_suffix("").stem if path.suffix.lower() == ".gz" else path.stem


def read_text(path: Path) -> str:
    """A file's text, without the mark that some editors begin it with.

    Raises:
      InputError: it cannot be read, or is of a format that holds no text.
    """
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data.startswith(_GZIP) else data
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    for mark, what in _FOREIGN.items():
        if data.startswith(mark):
            raise InputError(f"{path}: is {what}; {_EXPECTED}")
    utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read ({error}); save it as UTF-8") from error
    if "\0" in text:
        raise InputError(
            f"{path}: cannot be read: it has null characters, as UTF-16 without its mark; save it as UTF-8"
        )
    return text


def read_rows(path: Path) -> tuple[list[tuple[str, Row]], Findings]:
    """The rows of a file, each with its place ("line 7", of a JSON list "item 7"), and the places that are no rows.

    Rows that are blank in all fields are left out, which a warning says, as lines without anything are unsaid. Halves
    of characters become U+FFFD.

    Raises:
      InputError: the file cannot be read, has no usable header, or is one JSON object.
    """
    text = read_text(path)
    read = _table_rows if kind_of(path) in (".csv", ".tsv") else _json_rows
    rows: list[tuple[str, Row]] = []
    findings: Findings = []
    blank = []
    with any_field_size():
        for where, row in read(path, text):
            if isinstance(row, str):
                findings.append((row, where))
            elif isinstance(row, tuple):
                kind, reason = row
                findings.append((kind, f"{where} ({reason})"))
            elif row and all(value is None or (isinstance(value, str) and not value.strip()) for value in row.values()):
                blank.append(where)
            else:
                rows.append((where, row))
    warn_left_out(path, "blank rows", blank)
    return rows, findings


def warn_left_out(path: Path, what: str, places: list[str]) -> None:
    """Says which rows of a file are not used, if there are any."""
    if places:
        shown = ", ".join(places[:SHOWN_PER_KIND]) + (", ..." if len(places) > SHOWN_PER_KIND else "")
        warnings.warn(f"{path}: {len(places)} {what} left out: {shown}", stacklevel=3)


@contextlib.contextmanager
def any_field_size() -> Iterator[None]:
    """Fields of a table may have any length: the csv module stops at 131,072 characters unless it is told."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def whole_text(value: Any) -> Any:
    """A value of JSON whose texts hold no halves of characters."""
    if isinstance(value, str):
        return _HALF.sub("\ufffd", value)
    if isinstance(value, list):
        return [whole_text(item) for item in value]
    if isinstance(value, dict):
        return {whole_text(name): whole_text(item) for name, item in value.items()}
    return value


# A row, or the kind of what is wrong, perhaps with the reason.
_Place = tuple[str, Row | str | tuple[str, str]]


def _json_rows(path: Path, text: str) -> Iterator[_Place]:
    items = _json_list(path, text)
    if items is not None:
        for number, item in enumerate(items, start=1):
            yield f"item {number}", item if isinstance(item, dict) else "items that are not JSON objects"
        return
    # Not splitlines: within a JSON string other line separators, such as U+2028, end no line.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if "\\u" in line:
                row = whole_text(row)
        except (ValueError, RecursionError) as error:  # also an integer too long for Python, or too deep nesting
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error).split(":")[0]
            yield f"line {number}", ("lines that are not JSON", reason)
            continue
        yield f"line {number}", row if isinstance(row, dict) else "lines that are not JSON objects"


def _json_list(path: Path, text: str) -> list[Any] | None:
    """The items of a file that is one JSON list, over however many lines; None for JSON lines."""
    first, _, rest = text.strip().partition("\n")
    if first[:1] != "[" and not (first[:1] == "{" and rest and not _is_json(first)):
        return None
    try:
        whole = whole_text(json.loads(text))
    except (ValueError, RecursionError):  # told line by line
        return None
    if isinstance(whole, dict):
        names = ", ".join(map(repr, list(whole)[:SHOWN_PER_KIND]))
        raise InputError(f"{path}: is one JSON object with {names}; expected a line, or an item of one list, per row")
    return whole if isinstance(whole, list) else None


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _table_rows(path: Path, text: str) -> Iterator[_Place]:
    delimiter = "\t" if kind_of(path) == ".tsv" else _delimiter(text)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = list(reader.fieldnames or ())
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise InputError(f"{path}: its header names {', '.join(map(repr, repeated))} more than once")
        for row in reader:
            if None in row:
                yield f"line {reader.line_num}", "lines with more fields than the header"
            else:
                # A line that ends early has no value for the last columns.
                yield f"line {reader.line_num}", {name: value for name, value in row.items() if value is not None}
    except csv.Error as error:
        yield f"line {reader.reader.line_num}", ("lines that are not CSV", str(error))


def _delimiter(text: str) -> str:
    """What stands between a table's columns: a comma, or what divides a header that has none."""

    def columns(delimiter: str) -> int:
        try:
            return len(next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), ()))
        except csv.Error:
            return 1

    return next((delimiter for delimiter in _DELIMITERS if columns(delimiter) > 1), ",")
