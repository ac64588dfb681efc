"""A task from a user's own file: JSON lines, or CSV with a header; a prompt and an answer per row."""

import csv
import hashlib
import io
import json
import os
import string
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlae_jax.errors import InputError, grouped_error
from rlae_jax.tasks.base import SPLITS, Examples, Task
from rlae_jax.tasks.rewards import Reference, get_reward

# Percent of the examples: train below the first bound, dev below the second.
_BOUNDS = (80, 90)

Row = Mapping[str, Any]
# (kind, where), for `grouped_error`.
Findings = list[tuple[str, str]]


def content_hash(text: str) -> int:
    """A number from a text's content; case and white space do not count."""
    content = " ".join(text.lower().split())
    return int.from_bytes(hashlib.sha256(content.encode(errors="surrogatepass")).digest()[:8], "big")


def split_of(prompt: str) -> str:
    """The split of a prompt: a hash of its content, so that repeats never fall into two splits, whatever the order or
    the rest of the file. Case and white space do not count."""
    place = content_hash(prompt) % 100
    return SPLITS[sum(place >= bound for bound in _BOUNDS)]


def read_text(path: Path) -> str:
    """A file's text, without the mark that some editors begin it with.

    Raises:
      InputError: it cannot be read.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error


def read_rows(path: Path) -> tuple[list[tuple[int, Row]], Findings]:
    """The rows of a file with the number of the line that each ends on, and the lines that are no rows.

    A name that ends in .csv is a table with a header, anything else JSON lines.

    Raises:
      InputError: the file cannot be read, or has no usable header.
    """
    text = read_text(path)
    rows: list[tuple[int, Row]] = []
    findings: Findings = []
    for number, row in (_csv_rows if path.suffix.lower() == ".csv" else _json_rows)(path, text):
        if isinstance(row, str):
            findings.append((row, f"line {number}"))
        elif isinstance(row, tuple):
            kind, reason = row
            findings.append((kind, f"line {number} ({reason})"))
        else:
            rows.append((number, row))
    return rows, findings


# A row, or the kind of what is wrong, perhaps with the reason.
_Line = tuple[int, Row | str | tuple[str, str]]


def _json_rows(path: Path, text: str) -> Iterator[_Line]:
    # Not splitlines: within a JSON string other line separators, such as U+2028, end no line.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # also an integer too long for Python, or too deep nesting
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error).split(":")[0]
            yield number, ("lines that are not JSON", reason)
            continue
        yield number, row if isinstance(row, dict) else "lines that are not JSON objects"


def _csv_rows(path: Path, text: str) -> Iterator[_Line]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        names = list(reader.fieldnames or ())
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise InputError(f"{path}: its header names {', '.join(map(repr, repeated))} more than once")
        for row in reader:
            if None in row:
                yield reader.line_num, "lines with more fields than the header"
            else:
                # A line that ends early has no value for the last columns.
                yield reader.line_num, {name: value for name, value in row.items() if value is not None}
    except csv.Error as error:
        yield reader.reader.line_num, ("lines that are not CSV", str(error))


def template_fields(template: str) -> list[str]:
    """The names that a template such as "Question: {question}\\nAnswer:" asks for.

    Raises:
      InputError: unbalanced braces, or anything but a name between them.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"template {template!r}: {error}; write {{{{ and }}}} for braces themselves") from error
    fields = list(dict.fromkeys(name for _, name, _, _ in parts if name is not None))
    if any(form or conversion for _, _, form, conversion in parts) or any(
        not name or set(name) & set(".[") for name in fields
    ):
        raise InputError(f"template {template!r}: expected names alone between braces, as in {{question}}")
    return fields


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _reference(value: Any) -> Reference | None:
    """One answer as text, several as a tuple of texts; None for anything else."""
    if _is_scalar(value):
        return str(value)
    if isinstance(value, list) and value and all(map(_is_scalar, value)):
        return tuple(map(str, value))
    return None


def jsonl(
    path: str | os.PathLike[str],
    *,
    prompt_field: str = "prompt",
    answer_field: str = "answer",
    template: str | None = None,
    reward: str = "exact_match",
    max_new_tokens: int = 64,
    span_length: int = 4,
    stop: tuple[str, ...] = (),
    chat: bool = False,
) -> Task:
    """A task from a JSON lines or CSV file, split by content into train, dev and test (80, 10 and 10 percent).

    Args:
      path: a name that ends in .csv is read as a table whose header names the fields, anything else as JSON lines.
      prompt_field, answer_field: the names of the fields; values are strings or numbers. An answer may also be a list
        of them, any of which counts.
      template: the prompt with fields in braces, such as "Question: {question}\\nAnswer:", instead of prompt_field.
      reward: a name of `REWARDS`, "math_equivalence", or "module:function".
      stop, chat: as in `Task`.

    Raises:
      InputError: no such file, an empty one, or lines (told by number) that are no rows with these fields.
    """
    path = Path(path)
    reward_function = get_reward(reward)
    fields = [prompt_field] if template is None else template_fields(template)
    if not fields:
        raise InputError(f"template {template!r} names no field; expected some, as in {{question}}")
    make: Callable[[Row], str] = (lambda row: str(row[prompt_field])) if template is None else template.format_map
    rows, findings = read_rows(path)
    examples: dict[str, tuple[list[str], list[Reference]]] = {split: ([], []) for split in SPLITS}
    has = ""
    for number, row in rows:
        absent = [field for field in dict.fromkeys([*fields, answer_field]) if field not in row]
        if absent:
            findings.append(("lines that lack a field", f"line {number} has no {' and no '.join(map(repr, absent))}"))
            has = has or f"; the first without has {', '.join(map(repr, row)) or 'none'}"
            continue
        reference = _reference(row[answer_field])
        if reference is None or not all(_is_scalar(row[field]) for field in fields):
            findings.append(("lines whose fields are neither text nor numbers", f"line {number}"))
            continue
        # Without what a template adds, so that another wording deals the same questions to the same splits.
        content = "\n".join(str(row[field]) for field in fields)
        if not content.strip():
            findings.append(("lines with an empty prompt", f"line {number}"))
            continue
        prompts, references = examples[split_of(content)]
        prompts.append(make(row))
        references.append(reference)
    if findings:
        shape = ", ".join(f'"{field}": "..."' for field in dict.fromkeys([*fields, answer_field]))
        raise grouped_error(f"{path}: unusable lines", findings, f"each line needs {_needed(path, shape)}{has}")
    if not any(prompts for prompts, _ in examples.values()):
        raise InputError(f"{path}: the file is empty; expected one row per line")
    splits = {split: Examples(prompts, references) for split, (prompts, references) in examples.items()}
    return Task(
        path.stem,
        splits,
        reward_function,
        max_new_tokens=max_new_tokens,
        span_length=span_length,
        stop=stop,
        chat=chat,
    )


def _needed(path: Path, shape: str) -> str:
    if path.suffix.lower() == ".csv":
        return "the columns " + shape.replace(': "..."', "")
    return f"a JSON object such as {{{shape}}}"
