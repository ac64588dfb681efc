"""A task from a user's own file: one JSON object per line with a prompt and an answer."""

import hashlib
import json
import os
from pathlib import Path

from rlae_jax.errors import InputError, grouped_error
from rlae_jax.tasks.base import SPLITS, Examples, Task
from rlae_jax.tasks.rewards import get_reward

# Percent of the examples: train below the first bound, dev below the second.
_BOUNDS = (80, 90)


def split_of(prompt: str) -> str:
    """The split of a prompt: a hash of its content, so that repeats never fall into two splits, whatever the order or
    the rest of the file. Case and white space do not count."""
    content = " ".join(prompt.lower().split())
    place = int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big") % 100
    return SPLITS[sum(place >= bound for bound in _BOUNDS)]


def jsonl(
    path: str | os.PathLike[str],
    *,
    prompt_field: str = "prompt",
    answer_field: str = "answer",
    reward: str = "exact_match",
    max_new_tokens: int = 64,
) -> Task:
    """A task from a JSON lines file, split by content into train, dev and test (80, 10 and 10 percent).

    Args:
      prompt_field, answer_field: the names of the fields; values are strings or numbers.
      reward: "exact_match" or "last_number".

    Raises:
      InputError: no such file, an empty one, or lines (told by number) that are not JSON objects with both fields.
    """
    path = Path(path)
    reward_function = get_reward(reward)
    try:
        # Not splitlines: within a JSON string other line separators, such as U+2028, end no line.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    examples: dict[str, tuple[list[str], list[str]]] = {split: ([], []) for split in SPLITS}
    findings = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # also an integer too long for Python, or too deep nesting
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error).split(":")[0]
            findings.append(("lines that are not JSON", f"line {number} ({reason})"))
            continue
        if not isinstance(row, dict):
            findings.append(("lines that are not JSON objects", f"line {number}"))
            continue
        absent = [field for field in (prompt_field, answer_field) if field not in row]
        if absent:
            findings.append(("lines that lack a field", f"line {number} has no {' and no '.join(map(repr, absent))}"))
            continue
        values = [row[prompt_field], row[answer_field]]
        if not all(isinstance(value, str | int | float) and not isinstance(value, bool) for value in values):
            findings.append(("lines whose fields are neither text nor numbers", f"line {number}"))
            continue
        prompt, answer = map(str, values)
        if not prompt.strip():
            findings.append(("lines with an empty prompt", f"line {number}"))
            continue
        prompts, references = examples[split_of(prompt)]
        prompts.append(prompt)
        references.append(answer)
    if findings:
        raise grouped_error(
            f"{path}: unusable lines",
            findings,
            f'each line needs a JSON object such as {{"{prompt_field}": "...", "{answer_field}": "..."}}',
        )
    if not any(prompts for prompts, _ in examples.values()):
        raise InputError(f"{path}: the file is empty; expected one JSON object per line")
    splits = {split: Examples(prompts, references) for split, (prompts, references) in examples.items()}
    return Task(path.stem, splits, reward_function, max_new_tokens=max_new_tokens)
