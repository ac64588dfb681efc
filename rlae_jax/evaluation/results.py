"""What evaluations leave: rows of results.json, differences with their p-values, predictions.jsonl; and joining them.

In: answers by method, a list entry per seed. Out: content of the files, plain dicts and lists.
"""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from rlae_jax import files, statistics
from rlae_jax.errors import InputError
from rlae_jax.evaluation.answers import Answers
from rlae_jax.evaluation.methods import AnyMethod, Method, Pick
from rlae_jax.tasks import Examples

SCHEMA = 1
RESULTS_FILE, PREDICTIONS_FILE = "results.json", "predictions.jsonl"


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
    rewards: Mapping[str, Float[np.ndarray, "S N"]], pairs: Sequence[tuple[str, str]]
) -> list[dict[str, Any]]:
    """The rows of a table of differences; p-values are corrected together."""
    tested = [statistics.paired_difference(rewards[a], rewards[b]) for a, b in pairs]
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
) -> Iterator[dict[str, Any]]:
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
        yield {key: value for key, value in row.items() if key in keys}


def write_results(out: Path, results: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes both files into a run's directory."""
    files.write_json_lines(out / PREDICTIONS_FILE, lines)
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
    parts = [files.read_json(path / RESULTS_FILE) for path in paths]
    rewards: list[dict[str, Float[np.ndarray, "S N"]]] = []
    asked = set()
    for path, part in zip(paths, parts, strict=True):
        own, prompts = _read_rewards(path, part)
        rewards.append(own)
        shape = tuple((name, table.shape) for name, table in own.items())
        asked.add((part["task"], part["split"], shape, prompts))
    if len(asked) != 1:
        names = " and ".join(map(str, paths[:2]))
        raise InputError(
            f"evaluations differ in their prompts, methods or seeds, such as {names}; they cannot be joined"
        )
    joined = {name: np.concatenate([part[name] for part in rewards]) for name in rewards[0]}
    table = {name: _joined_row(values, [part["methods"][name] for part in parts]) for name, values in joined.items()}
    return {
        "schema": SCHEMA,
        "task": parts[0]["task"],
        "split": parts[0]["split"],
        "methods": table,
        "differences": compare_agents(joined, table),
        "seconds": {"evaluation": sum(part["seconds"]["evaluation"] for part in parts)},
        "environment": parts[0]["environment"],
    }


def _read_rewards(
    path: Path, results: Mapping[str, Any]
) -> tuple[dict[str, Float[np.ndarray, "S N"]], tuple[str, ...]]:
    """An evaluation's rewards by method, and its prompts, once for each method."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in results["methods"]}
    for row in files.read_json_lines(path / PREDICTIONS_FILE):
        rows[row["method"]].append(row)
    rewards = {
        name: np.array([row["reward"] for row in own]).reshape(-1, results["methods"][name]["n"])
        for name, own in rows.items()
    }
    return rewards, tuple(row["prompt"] for own in rows.values() for row in own if row["seed"] == 0)


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
