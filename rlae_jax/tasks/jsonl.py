"""A task from a user's own file, of any format that `rows` reads: a prompt and an answer per row."""

import hashlib
import os
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlae_jax.errors import InputError, grouped_error
from rlae_jax.tasks.base import SPLITS, Examples, Task
from rlae_jax.tasks.rewards import LIKELIHOOD, Reference, get_reward
from rlae_jax.tasks.rows import Row, kind_of, read_rows, stem_of, warn_left_out

# Percent of the examples: train below the first bound, dev below the second.
_BOUNDS = (80, 90)
# So many different prompts hardly ever leave a split empty.
_MANY = 30
# Names that a row's chat messages go by, each message with a role and a text.
_MESSAGES = ("messages", "conversations")
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


def content_hash(text: str) -> int:
    """A number from a text's content; case and white space do not count."""
    content = " ".join(text.lower().split())
    return int.from_bytes(hashlib.sha256(content.encode(errors="surrogatepass")).digest()[:8], "big")


def split_of(prompt: str) -> str:
    """The split of a prompt: a hash of its content, so that repeats never fall into two splits, whatever the order or
    the rest of the file. Case and white space do not count."""
    place = content_hash(prompt) % 100
    return SPLITS[sum(place >= bound for bound in _BOUNDS)]


def deal(contents: Sequence[str]) -> list[str]:
    """The split of each prompt by `split_of`; of a few that leave a split empty, by count in the order of their hashes,
    so that three different ones have one split each."""
    dealt = list(map(split_of, contents))
    ordered = sorted(set(map(content_hash, contents)))
    if len(set(dealt)) == len(SPLITS) or not len(SPLITS) <= len(ordered) < _MANY:
        return dealt
    held = max(1, round(len(ordered) / 10))
    first_of_test, first_of_dev = ordered[-held], ordered[-2 * held]
    hashes = map(content_hash, contents)
    return [SPLITS[(place >= first_of_dev) + (place >= first_of_test)] for place in hashes]


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
    if isinstance(value, dict) and "text" in value:  # as SQuAD has them: {"text": [...], "answer_start": [...]}
        value = value["text"]
    value = _alone(value)
    if _is_scalar(value):
        return str(value)
    if isinstance(value, list) and value and all(map(_is_scalar, value)):
        return tuple(map(str, value))
    return None


def _alone(value: Any) -> Any:
    """The text of a single chat message; anything else as it is."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        return value[0].get("content", value)
    return value


_ABSENT = object()


def _field(row: Row, name: str) -> Any:
    """A field's value, also where its name is a path such as answers.text; `_ABSENT` where there is none."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return _ABSENT
        value = value[part]
    return value


def _exchange(row: Row, prompt_field: str, answer_field: str) -> Row | str:
    """A row of chat messages, one of a user and its answer, as a row of two fields; else what the messages are."""
    (name,) = (name for name in _MESSAGES if name in row)
    messages = row[name] if isinstance(row[name], list) else []
    said = [
        (message.get("role", message.get("from")), message.get("content", message.get("value")))
        for message in messages
        if isinstance(message, dict)
    ]
    if [_ROLES.get(str(role)) for role, _ in said] != ["user", "assistant"]:
        return ", ".join(str(role) for role, _ in said) or "none"
    return {prompt_field: said[0][1], answer_field: said[1][1]}


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
    text_field: str | None = None,
) -> Task:
    """A task from a file of rows, split by content into train, dev and test (80, 10 and 10 percent).

    Rows with an empty prompt are left out, which a warning says.

    Args:
      path: a name that ends in .csv or .tsv is read as a table whose header names the fields, anything else as JSON
        lines or one JSON list; see `rows`.
      prompt_field, answer_field: the names of the fields, or paths of names such as answers.text; values are strings or
        numbers. An answer may also be a list of them, any of which counts, or SQuAD's object with such a list. Rows
        without these fields may have chat messages instead, one of the user and one of the assistant.
      template: the prompt with fields in braces, such as "Question: {question}\\nAnswer:", instead of prompt_field.
      reward: a name of `REWARDS`, "math_equivalence", or "module:function"; or "likelihood", see `Task.by_likelihood`.
      text_field: with "likelihood": rows are texts without prompts, which this field holds.
      stop, chat: as in `Task`.

    Raises:
      InputError: no such file, an empty one, or lines (told by number) that are no rows with these fields.
    """
    path = Path(path)
    by_likelihood = reward == LIKELIHOOD
    reward_function = get_reward("exact_match" if by_likelihood else reward)
    if text_field is not None:
        if not by_likelihood or template is not None:
            raise InputError(f"texts without prompts are scored by their likelihood; give the reward {LIKELIHOOD}")
        prompt_field = answer_field = text_field
    fields = [prompt_field] if template is None else template_fields(template)
    if not fields:
        raise InputError(f"template {template!r} names no field; expected some, as in {{question}}")
    rows, findings = read_rows(path)
    contents: list[str] = []
    prompts: list[str] = []
    references: list[Reference] = []
    empty = []
    has = ""
    for where, row in rows:
        if prompt_field not in row and any(name in row for name in _MESSAGES):
            exchange = _exchange(row, prompt_field, answer_field)
            if isinstance(exchange, str):
                kind = "rows of chat messages that are not one of a user and one of an assistant"
                findings.append((kind, f"{where} (roles: {exchange})"))
                continue
            row = exchange
        values = {field: _alone(_field(row, field)) for field in fields}
        answer = _field(row, answer_field)
        absent = [name for name, value in {**values, answer_field: answer}.items() if value is _ABSENT]
        if absent:
            findings.append(("lines that lack a field", f"{where} has no {' and no '.join(map(repr, absent))}"))
            has = has or f"; the first without has {', '.join(map(repr, row)) or 'none'}"
            continue
        reference = _reference(answer)
        if reference is None or not all(map(_is_scalar, values.values())):
            findings.append(("lines whose fields are neither text nor numbers", where))
            continue
        # Without what a template adds, so that another wording deals the same questions to the same splits.
        content = "\n".join(map(str, values.values()))
        if not content.strip():
            empty.append(where)
            continue
        contents.append(content)
        prompt = str(values[prompt_field]) if template is None else template.format_map(values)
        prompts.append("" if text_field is not None else prompt)
        references.append(reference)
    if findings:
        shape = ", ".join(f'"{field}": "..."' for field in dict.fromkeys([*fields, answer_field]))
        raise grouped_error(f"{path}: unusable lines", findings, f"each line needs {_needed(path, shape)}{has}")
    if not prompts:
        raise InputError(f"{path}: the file is empty, or no row has a prompt; expected one row per line")
    warn_left_out(path, "rows with an empty prompt", empty)
    dealt = deal(contents)
    all_examples = Examples(prompts, references)
    rows_of = {split: [i for i, own in enumerate(dealt) if own == split] for split in SPLITS}
    return Task(
        stem_of(path),
        {split: all_examples.select(places) for split, places in rows_of.items()},
        reward_function,
        max_new_tokens=max_new_tokens,
        span_length=span_length,
        stop=stop,
        chat=chat,
        by_likelihood=by_likelihood,
    )


def _needed(path: Path, shape: str) -> str:
    if kind_of(path) in (".csv", ".tsv"):
        return "the columns " + shape.replace(': "..."', "")
    return f"a JSON object such as {{{shape}}}"
