"""What evaluations leave: rows of results.json, differences with their p-values, predictions.jsonl; and joining them.

In: answers by method, a list entry per seed. Out: content of the files, plain dicts and lists.
"""

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec
import numpy as np
from jaxtyping import Float

from rlae_jax import files, records, statistics
from rlae_jax.errors import InputError
from rlae_jax.evaluation.answers import Answers
from rlae_jax.evaluation.methods import AnyMethod, Method, Pick
from rlae_jax.tasks import Examples

SCHEMA = 1
RESULTS_FILE, PREDICTIONS_FILE = "results.json", "predictions.jsonl"


class Results(records.Record, kw_only=True):
    """The content of results.json.

    Attributes:
      unit, texts: of scores that are no rewards: bits per byte of so many bytes, read in windows of at most so many
        tokens; less is better.
      methods: what `method_row` gives, by name.
      differences: what `differences` gives.
      objectives, sampled: of an evaluation under several objectives, whose `methods` answer greedily.
      predictions: the SHA-256 of predictions.jsonl, whose answers these are the results of; older versions have none.
      verdict: a demo's.
    """

    schema: records.Schema = SCHEMA
    task: str
    split: str
    unit: str | msgspec.UnsetType = msgspec.UNSET
    texts: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    objectives: list[str] | msgspec.UnsetType = msgspec.UNSET
    methods: dict[str, dict[str, Any]]
    differences: list[dict[str, Any]]
    sampled: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    seconds: dict[str, records.Seconds]
    environment: dict[str, Any]
    predictions: str | msgspec.UnsetType = msgspec.UNSET
    verdict: str | msgspec.UnsetType = msgspec.UNSET


class MethodRow(TypedDict):
    """What is used of a method's entry; beside it there is what its search told."""

    score: records.Finite
    n: records.Positive
    ci95: tuple[float, float]
    per_seed: Annotated[list[records.Finite], msgspec.Meta(min_length=1)]
    ms_per_token: records.Seconds
    ms_per_answer: records.Seconds
    reference: NotRequired[bool]


class Prediction(records.Record, kw_only=True):
    """A line of predictions.jsonl.

    Attributes:
      weights: of each span of the answer, or of the whole answer's adapters.
    """

    method: str
    seed: records.Count | msgspec.UnsetType = msgspec.UNSET
    decoding: str | msgspec.UnsetType = msgspec.UNSET
    index: records.Count
    prompt: str
    reference: Any = msgspec.UNSET
    text: str
    reward: records.Finite
    scores: dict[str, records.Finite] | msgspec.UnsetType = msgspec.UNSET
    finish_reason: str | msgspec.UnsetType = msgspec.UNSET
    weights: list[list[float]]


def read_results(directory: Path) -> Results:
    """What an evaluation left in its directory.

    Raises:
      InputError: there is nothing, or it is not of the shape.
    """
    path = directory / RESULTS_FILE
    results = records.read(path, Results)
    if not results.methods:
        raise InputError(f"{path}: methods is empty; expected at least one")
    for name, row in results.methods.items():
        records.check(row, MethodRow, path, f"methods.{name}")
    return results


def read_predictions(directory: Path) -> list[Prediction]:
    """The answers that an evaluation left in its directory.

    Raises:
      InputError: there are none, or they are not of the shape.
    """
    return records.read_lines(directory / PREDICTIONS_FILE, Prediction)


def rewards_of(seeds: Sequence[Answers]) -> Float[np.ndarray, "S N"]:
    """A method's rewards."""
    return np.stack([answers.rewards for answers in seeds]).astype(np.float64)


def method_row(
    methods: Sequence[AnyMethod], seeds: Sequence[Answers], objectives: Sequence[str], *, tokens: bool = False
) -> dict[str, Any]:
    """A method's entry in results.json.

    Args:
      methods: its seeds.
      tokens: also how long answers are.
    """
    seconds = sum(answers.seconds for answers in seeds)
    written = sum(answers.tokens for answers in seeds)
    rewards = rewards_of(seeds)
    row = _score_row(rewards, np.stack([answers.scores for answers in seeds]).astype(np.float64), objectives)
    if tokens:
        row["tokens"] = written / rewards.size
    row |= {"ms_per_token": seconds * 1e3 / max(written, 1), "ms_per_answer": seconds * 1e3 / rewards.size}
    if any(isinstance(method, Pick) and method.oracle for method in methods):
        row["reference"] = True
    records = [method.record for method in methods if isinstance(method, Method)]
    for key in records[0] if records else ():
        row[key] = records[0][key] if len(records) == 1 else [record[key] for record in records]
    return row


def _score_row(
    rewards: Float[np.ndarray, "S N"], scores: Float[np.ndarray, "S N M"], objectives: Sequence[str]
) -> dict[str, Any]:
    """What an entry in results.json says about scores. Of several objectives there is no accuracy."""
    score = float(np.mean(rewards))
    binary = len(objectives) == 1 and bool(np.all((rewards == 0) | (rewards == 1)))
    means = scores.reshape(-1, len(objectives)).mean(axis=0)
    return {
        "score": score,
        "accuracy": score if binary else None,
        "n": rewards.shape[1],
        "ci95": list(statistics.interval95(rewards)),
        "per_seed": rewards.mean(axis=1).tolist(),
        "scores": dict(zip(objectives, means.tolist(), strict=True)),
    }


def agent_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Agents, whose names begin with `rlae_`, against all others; without agents all against `uniform`."""
    agents = [name for name in names if name.startswith("rlae_")]
    if not agents and "uniform" in names:
        return [(name, "uniform") for name in names if name != "uniform"]
    return [(a, b) for i, a in enumerate(agents) for b in names if b not in agents[: i + 1]]


def pairs_with(name: str, names: Sequence[str]) -> list[tuple[str, str]]:
    """One method, if it is among them, against all others."""
    return [(name, other) for other in names if other != name] if name in names else []


def differences(
    rewards: Mapping[str, Float[np.ndarray, "S N"]], pairs: Sequence[tuple[str, str]], *, bounded: bool = True
) -> list[dict[str, Any]]:
    """The rows of a table of differences; p-values are corrected together. See `statistics.paired_difference`."""
    tested = [statistics.paired_difference(rewards[a], rewards[b], bounded=bounded) for a, b in pairs]
    corrected = statistics.holm([one.p for one in tested])
    return [
        {"a": a, "b": b, "difference": one.difference, "ci95": list(one.ci95), "p": one.p, "p_holm": p}
        for (a, b), one, p in zip(pairs, tested, corrected, strict=True)
    ]


def compare_agents(
    rewards: Mapping[str, Float[np.ndarray, "S N"]], table: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The differences of `agent_pairs`, but for methods that the table calls references."""
    tested = {name: values for name, values in rewards.items() if not table[name].get("reference")}
    return differences(tested, agent_pairs(list(tested)))


def predictions(
    name: str,
    seed: int,
    way: str,
    examples: Examples,
    answers: Answers,
    objectives: Sequence[str],
    keys: Collection[str],
) -> Iterator[Prediction]:
    """The lines of predictions.jsonl of one seed of a method.

    Args:
      way: how the answers were decoded.
      keys: what a line tells, of those below.
    """
    rewards = answers.rewards.tolist()
    for index, text in enumerate(answers.texts):
        row = {
            "method": name,
            "seed": seed,
            "decoding": way,
            "index": index,
            "prompt": examples.prompts[index],
            "reference": examples.references[index],
            "text": text,
            "reward": rewards[index],
            "scores": dict(zip(objectives, answers.scores[index].tolist(), strict=True)),
            "finish_reason": answers.finish_reasons[index],
            "weights": np.round(answers.weights[index], 4).tolist(),
        }
        yield Prediction(**{key: value for key, value in row.items() if key in keys})


def write_results(out: Path, results: dict[str, Any], lines: Sequence[Prediction]) -> None:
    """Writes both files into a run's directory. The results get the key `predictions`, so that those of another
    evaluation, which ended between the two files, are not taken for these."""
    text = "".join(files.json_line(records.plain(line)) for line in lines)
    results["predictions"] = hashlib.sha256(text.encode()).hexdigest()
    files.write_text(out / PREDICTIONS_FILE, text)
    files.write_json(out / RESULTS_FILE, results)


def join_results(directories: Sequence[str | os.PathLike[str]]) -> dict[str, Any]:
    """Evaluations of the same methods on the same prompts, each with its own members and agents, as one results.json
    with all their seeds. Times are means; what searches chose is listed.

    Args:
      directories: each has the `results.json` and `predictions.jsonl` that `evaluate` wrote.

    Raises:
      InputError: evaluations that differ in their prompts, in their methods, or in how many seeds a method has.
    """
    paths = [Path(directory) for directory in directories]
    parts = [read_results(path) for path in paths]
    if by_unit := [path for path, part in zip(paths, parts, strict=True) if part.unit is not msgspec.UNSET]:
        raise InputError(f"{by_unit[0]} has bits per byte, which are not joined; evaluate all agents in one call")
    rewards: list[dict[str, Float[np.ndarray, "S N"]]] = []
    asked = set()
    for path, part in zip(paths, parts, strict=True):
        own, prompts = _read_rewards(path, part)
        rewards.append(own)
        shape = tuple((name, table.shape) for name, table in own.items())
        asked.add((part.task, part.split, shape, prompts))
    if len(asked) != 1:
        names = " and ".join(map(str, paths[:2]))
        raise InputError(
            f"evaluations differ in their prompts, methods or seeds, such as {names}; they cannot be joined"
        )
    joined = {name: np.concatenate([part[name] for part in rewards]) for name in rewards[0]}
    table = {}
    for name, values in joined.items():
        rows = [part.methods[name] for part in parts]
        for path, row in zip(paths, rows, strict=True):
            if lacking := [key for key in rows[0] if key not in row]:
                raise InputError(
                    f"{path / RESULTS_FILE}: the key methods.{name}.{lacking[0]} is missing, which {paths[0]} has"
                )
        table[name] = _joined_row(values, rows)
    return {
        "schema": SCHEMA,
        "task": parts[0].task,
        "split": parts[0].split,
        "methods": table,
        "differences": compare_agents(joined, table),
        "seconds": {"evaluation": sum(part.seconds.get("evaluation", 0.0) for part in parts)},
        "environment": parts[0].environment,
    }


def _read_rewards(path: Path, results: Results) -> tuple[dict[str, Float[np.ndarray, "S N"]], tuple[str, ...]]:
    """An evaluation's rewards by method, and its prompts, once for each method."""
    rows: dict[str, list[Prediction]] = {name: [] for name in results.methods}
    for row in read_predictions(path):
        if row.method not in rows:
            raise InputError(f"{path / PREDICTIONS_FILE}: has answers of {row.method[:60]!r}, {RESULTS_FILE} has none")
        rows[row.method].append(row)
    rewards = {}
    for name, own in rows.items():
        n, seeds = results.methods[name]["n"], len(results.methods[name]["per_seed"])
        if len(own) != n * seeds:
            raise InputError(
                f"{path / PREDICTIONS_FILE}: {len(own)} answers of {name}; {RESULTS_FILE} has {seeds} seeds of {n}"
            )
        rewards[name] = np.array([row.reward for row in own]).reshape(seeds, n)
    known = results.predictions
    if known is not msgspec.UNSET and hashlib.sha256((path / PREDICTIONS_FILE).read_bytes()).hexdigest() != known:
        raise InputError(
            f"{path / PREDICTIONS_FILE}: not the answers that {RESULTS_FILE} is of: an evaluation was stopped between "
            "the two, or they were changed; evaluate again"
        )
    return rewards, tuple(row.prompt for own in rows.values() for row in own if row.seed == 0)


def _joined_row(rewards: Float[np.ndarray, "S N"], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A method's entry, of all evaluations' entries."""
    joined = _score_row(rewards, rewards[..., None], ("reward",))
    for key in [key for key in rows[0] if key not in joined]:
        values = [row[key] for row in rows]
        if key in ("ms_per_token", "ms_per_answer"):
            joined[key] = float(np.mean(values))
        else:
            joined[key] = values[0] if key == "reference" else values
    return joined
