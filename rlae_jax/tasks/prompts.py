"""Prompts without reference answers, from files: what EMORL's adapters are fine-tuned on and scored with.

In: a file in the layout of PAIR (counselling prompts with graded responses), of Psych8k, or of anybody's own rows. Out:
distinct prompts in three splits, what was left out of them, and for PAIR the graded responses of each split.

The splits are 80, 10 and 10 percent of the prompts by count, in the order of their contents' hashes: neither the
file's order nor what the prompts come with matters, and small files have prompts in every split.
"""

import collections
import csv
import dataclasses
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlae_jax import files
from rlae_jax.errors import SHOWN_PER_KIND, InputError, grouped_error
from rlae_jax.tasks.base import SPLITS
from rlae_jax.tasks.jsonl import content_hash
from rlae_jax.tasks.rows import Findings, any_field_size, kind_of, read_rows, read_text, stem_of, whole_text

LAYOUTS = ("auto", "pair", "psych8k", "rows")
# The columns of PAIR's responses and what they are worth: high, medium and low quality.
GRADES = {"hq1": 1.0, "hq2": 1.0, "mq1": 0.5, **{f"lq{i}": 0.0 for i in range(1, 6)}}
_COLUMNS = ("prompt", *GRADES, "topic")


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """A named set of distinct prompts.

    Attributes:
      splits: "train", "dev" and "test"; no prompt is in two of them.
      skipped: what of the file was left out and why, for people to read.
    """

    name: str
    splits: Mapping[str, tuple[str, ...]]
    skipped: tuple[str, ...] = ()

    def split(self, name: str) -> tuple[str, ...]:
        """The prompts of a split.

        Raises:
          InputError: no such split, or an empty one.
        """
        prompts = self.splits.get(name)
        if prompts is None:
            raise InputError(f"prompts {self.name} have no split {name!r}; they have {', '.join(self.splits)}")
        if not prompts:
            raise InputError(f"prompts {self.name}: their split {name!r} is empty")
        return prompts

    def digest(self) -> dict[str, str]:
        """A hash of each split's content, by which a run knows its data again."""
        return {split: files.digest(prompts) for split, prompts in self.splits.items()}


class Graded(NamedTuple):
    """A response to a prompt and its worth: 1.0 high, 0.5 medium, 0.0 low quality."""

    prompt: str
    response: str
    grade: float


# A row of a file and what messages call it, such as "line 7".
_Row = tuple[str, Mapping[str, Any]]


def read_prompts(path: str | os.PathLike[str], layout: str = "auto", prompt_field: str = "prompt") -> PromptSet:
    """The distinct prompts of a file, split into train, dev and test.

    Of prompts that differ in case or white space alone the first is kept. A row without a prompt is left out, and
    `PromptSet.skipped` says so.

    Args:
      layout: "pair": CSV, with or without a header, of prompt, two responses of high, one of medium and five of low
        quality, and topic. "psych8k": a JSON list of objects whose "input" is the prompt. "rows": whatever
        `rows.read_rows` reads. "auto": "psych8k" for a name that ends in .json whose first object has no
        `prompt_field`, "pair" where the first row looks like it, "rows" otherwise.
      prompt_field: the name of the prompt's field in the layout "rows".

    Raises:
      InputError: an unknown layout, a file that is not in it, no prompts or fewer than three different ones.
    """
    path = Path(path)
    layout = _layout(path, layout, prompt_field)
    prompt_field = {"pair": "prompt", "psych8k": "input"}.get(layout, prompt_field)
    rows = _read(path, layout)
    findings: Findings = []
    kept: dict[int, str] = {}
    for where, row in rows:
        prompt = _text(row, prompt_field)
        if not prompt:
            findings.append(("rows without a prompt", where))
        elif (content := content_hash(prompt)) in kept:
            findings.append(("rows that repeat an earlier prompt", where))
        else:
            kept[content] = prompt
        if layout == "pair":
            empty = [column for column in GRADES if not _text(row, column)]
            findings += [("empty responses", f"{where}, column {column}") for column in empty]
    if not kept:
        has = f"the first row has {', '.join(map(repr, rows[0][1])) or 'none'}" if rows else "it has no rows"
        raise InputError(f"{path}: no prompts in the column {prompt_field!r}; {has}")
    if len(kept) < len(SPLITS):
        raise InputError(f"{path}: {len(kept)} different prompts are too few: train, dev and test need one each")
    return PromptSet(stem_of(path), _deal(kept), _told(findings))


def graded_responses(path: str | os.PathLike[str]) -> dict[str, list[Graded]]:
    """Per split of `read_prompts` the graded responses to its prompts, of a file in the layout "pair".

    Raises:
      InputError: what `read_prompts` raises.
    """
    path = Path(path)
    by_content = {
        content_hash(prompt): (split, prompt)
        for split, prompts in read_prompts(path, "pair").splits.items()
        for prompt in prompts
    }
    graded: dict[str, list[Graded]] = {split: [] for split in SPLITS}
    for _, row in _pair_rows(path):
        prompt = _text(row, "prompt")
        if not prompt:
            continue
        # The spelling of the prompt's first row, so that its responses can be compared.
        split, spelt = by_content[content_hash(prompt)]
        graded[split] += [
            Graded(spelt, response, grade) for column, grade in GRADES.items() if (response := _text(row, column))
        ]
    return graded


def _text(row: Mapping[str, Any], field: str) -> str:
    """A field's text, or "" for anything else."""
    value = row.get(field)
    return value.strip() if isinstance(value, str) else ""


def _deal(prompts: Mapping[int, str]) -> dict[str, tuple[str, ...]]:
    """The splits of prompts by their contents' hashes."""
    ordered = [prompts[content] for content in sorted(prompts)]
    held = max(1, round(len(ordered) / 10))
    first, second = len(ordered) - 2 * held, len(ordered) - held
    return dict(zip(SPLITS, map(tuple, (ordered[:first], ordered[first:second], ordered[second:])), strict=True))


def _told(findings: Findings) -> tuple[str, ...]:
    """One line per kind, with the first few places."""
    places: dict[str, list[str]] = collections.defaultdict(list)
    for kind, where in findings:
        places[kind].append(where)
    return tuple(
        f"{kind} ({len(found)}) left out: {'; '.join(found[:SHOWN_PER_KIND])}"
        + ("; ..." if len(found) > SHOWN_PER_KIND else "")
        for kind, found in places.items()
    )


def _layout(path: Path, layout: str, prompt_field: str) -> str:
    if layout not in LAYOUTS:
        raise InputError(f"layout must be one of {', '.join(LAYOUTS)}, not {layout!r}")
    if layout != "auto":
        return layout
    if kind_of(path) == ".json":
        return "rows" if _has_prompts(path, prompt_field) else "psych8k"
    return "pair" if kind_of(path) == ".csv" and _looks_like_pair(path, prompt_field) else "rows"


def _looks_like_pair(path: Path, prompt_field: str) -> bool:
    try:
        first = next((record for _, record in _records(read_text(path))), [])
    except csv.Error:
        return False  # `read_rows` says where
    # Without a header the first row has a prompt of several words where a header would have a column's name.
    bare = len(first) == len(_COLUMNS) and prompt_field not in first and len(first[0].split()) > 2
    return bare or _is_header(first)


def _has_prompts(path: Path, prompt_field: str) -> bool:
    """Whether a JSON list's first object has a prompt of its own and is none of Psych8k's."""
    text = read_text(path)
    try:
        first = next(iter(json.loads(text)), None)
    except (ValueError, RecursionError, TypeError):
        return False  # `_psych8k_rows` says what is wrong
    return isinstance(first, dict) and prompt_field in first and "input" not in first


def _read(path: Path, layout: str) -> list[_Row]:
    if layout == "pair":
        return _pair_rows(path)
    if layout == "psych8k":
        return _psych8k_rows(path)
    rows, findings = read_rows(path)
    if findings:
        raise grouped_error(f"{path}: unusable lines", findings, "each line needs to be a JSON object, or a row of CSV")
    return rows


def _records(text: str) -> Iterator[tuple[int, list[str]]]:
    """The records of a CSV file that are not blank, each with the number of the line that it ends on."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    with any_field_size():
        for record in reader:
            if record:
                yield reader.line_num, record


def _is_header(record: Sequence[str]) -> bool:
    return tuple(name.strip().lower() for name in record) == _COLUMNS


def _pair_rows(path: Path) -> list[_Row]:
    try:
        records = list(_records(read_text(path)))
    except csv.Error as error:
        raise InputError(f"{path}: not CSV ({error})") from error
    if records and _is_header(records[0][1]):
        records = records[1:]
    wrong = [
        ("rows with another number of fields", f"line {number} ({len(record)})")
        for number, record in records
        if len(record) != len(_COLUMNS)
    ]
    if wrong:
        raise grouped_error(f"{path}: not in the layout of PAIR", wrong, f"each row needs {', '.join(_COLUMNS)}")
    return [(f"line {number}", dict(zip(_COLUMNS, record, strict=True))) for number, record in records]


def _psych8k_rows(path: Path) -> list[_Row]:
    try:
        items = whole_text(json.loads(read_text(path)))
    except (ValueError, RecursionError) as error:  # also an integer too long for Python, or too deep nesting
        raise InputError(
            f"{path}: cannot be read as one JSON document ({str(error)[:100]}); for JSON lines use a name that ends in "
            ".jsonl"
        ) from error
    shape = 'expected a list of objects such as {"instruction": "...", "input": "...", "output": "..."}'
    if not isinstance(items, list):
        raise InputError(f"{path}: holds {type(items).__name__}; {shape}")
    wrong = [
        ("items that are no objects", f"item {i}") for i, item in enumerate(items, 1) if not isinstance(item, dict)
    ]
    if wrong:
        raise grouped_error(f"{path}: unusable items", wrong, shape)
    return [(f"item {i}", item) for i, item in enumerate(items, 1)]
