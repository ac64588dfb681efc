"""Evaluation: every method on the same prompts, with intervals; results.json and predictions.jsonl.

In: an ensemble, a task's split and methods. A method is a name with weights (fixed ones or a policy) and, for single
members, the ensemble of that member alone. Choices, such as the static weights, are made on the train split.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from rlae_jax import files, report
from rlae_jax.errors import InputError
from rlae_jax.fusion.ensemble import Ensemble, Generation, Weights
from rlae_jax.fusion.policy import BoundPolicy, Confidence, Schedule
from rlae_jax.tasks import Examples, RewardPool, Task

STATIC_STEP = 0.05
SEARCH_PROMPTS = 1_024
_ROWS = 256  # prompts per timed call
_SEARCH_ROWS = 1_024
_Z95 = 1.959964


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to answer."""

    ensemble: Ensemble
    weights: Weights = None
    span_length: int | None = None


def interval95(rewards: Float[np.ndarray, "N"]) -> tuple[float, float]:
    """A 95% interval of the mean: Wilson's for rewards that are all 0 or 1, else mean +- 1.96 standard errors."""
    n, mean = len(rewards), float(np.mean(rewards))
    if np.all((rewards == 0) | (rewards == 1)):
        centre = (mean + _Z95**2 / (2 * n)) / (1 + _Z95**2 / n)
        half = _Z95 / (1 + _Z95**2 / n) * np.sqrt(mean * (1 - mean) / n + _Z95**2 / (4 * n * n))
        return float(max(centre - half, 0.0)), float(min(centre + half, 1.0))
    half = _Z95 * float(np.std(rewards, ddof=1)) / np.sqrt(n) if n > 1 else float("nan")
    return mean - half, mean + half


def member_names(ensemble: Ensemble) -> list[str]:
    """`single:<name>` per member, with #2, #3 where a name repeats."""
    return unique_names([f"single:{lm.name}" for lm in ensemble.members])


def unique_names(names: Sequence[str]) -> list[str]:
    """The names, each repeat with its number: a, b, a#2."""
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return unique


def simplex_grid(members: int, step: float) -> Float[np.ndarray, "W K"]:
    """All weights whose components are multiples of `step` and sum to 1; the corners are among them."""
    parts = round(1 / step)
    bars = itertools.combinations(range(parts + members - 1), members - 1)
    edges = np.array([(-1, *bar, parts + members - 1) for bar in bars])
    return (np.diff(edges, axis=1) - 1).astype(np.float32) / parts


@dataclasses.dataclass(frozen=True)
class _Answers:
    generations: list[Generation]
    rewards: Float[np.ndarray, "N"]
    seconds: float  # of decoding, compilation left out
    tokens: int

    @property
    def ms_per_token(self) -> float:
        return self.seconds * 1e3 / max(self.tokens, 1)


def _answer(
    method: Method, task: Task, examples: Examples, pool: RewardPool, on_progress: Callable[[int], None]
) -> _Answers:
    """Greedy answers, their rewards, and how long decoding took."""

    def generate(start: int, stop: int) -> Generation:
        return _generate(method, task, examples.prompts[start:stop])

    generations: list[Generation] = []
    pending = []
    seconds = 0.0
    compiled: set[int] = set()
    for start in range(0, len(examples), _ROWS):
        stop = min(start + _ROWS, len(examples))
        if stop - start not in compiled:  # the first call of a size compiles, and is not timed
            compiled.add(stop - start)
            generate(start, stop)
        began = time.perf_counter()
        generation = generate(start, stop)
        seconds += time.perf_counter() - began
        generations.append(generation)
        pending.append(_submit(pool, generation, examples, slice(start, stop)))
        on_progress(stop)
    tokens = sum(sum(generation.steps) for generation in generations)
    return _Answers(generations, np.concatenate([rewards.result() for rewards in pending]), seconds, tokens)


def _generate(method: Method, task: Task, prompts: Sequence[str]) -> Generation:
    return method.ensemble.generate(
        prompts,
        method.weights,
        span_length=method.span_length,
        max_new_tokens=task.max_new_tokens,
        stop=task.stop,
        chat=task.chat,
    )


def _submit(pool: RewardPool, generation: Generation, examples: Examples, part: slice) -> Any:
    return pool.submit(examples.prompts[part], generation.texts, examples.references[part])


def _mean_reward(ensemble: Ensemble, task: Task, examples: Examples, weights: Weights, pool: RewardPool) -> float:
    """Mean reward of greedy answers, `_SEARCH_ROWS` prompts at a time."""
    method = Method(ensemble, weights, task.span_length)
    pending = []
    for start in range(0, len(examples), _SEARCH_ROWS):
        part = slice(start, start + _SEARCH_ROWS)
        pending.append(_submit(pool, _generate(method, task, examples.prompts[part]), examples, part))
    return float(np.mean(np.concatenate([rewards.result() for rewards in pending])))


def _best(grid: Float[np.ndarray, "W K"], scores: Sequence[float]) -> Float[np.ndarray, "K"]:
    """The best point; of equally good ones the nearest to uniform weights."""
    distances = np.sum((grid - 1 / grid.shape[1]) ** 2, axis=1)
    return grid[min(range(len(grid)), key=lambda i: (-scores[i], distances[i]))]


def static_weights(
    ensemble: Ensemble, task: Task, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Float[np.ndarray, "K"]:
    """The best fixed weights: the simplex grid of step 0.05 with the one-hots, on (at least 1,000) training prompts."""
    examples = task.split("train").take(SEARCH_PROMPTS)
    grid = simplex_grid(len(ensemble.members), STATIC_STEP)
    scores = []
    with RewardPool(task.reward) as pool:
        for i, point in enumerate(grid):
            scores.append(_mean_reward(ensemble, task, examples, point, pool))
            on_progress(i + 1, len(grid))
    return _best(grid, scores)


def schedule_weights(
    ensemble: Ensemble,
    task: Task,
    start: Float[np.ndarray, "K"],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> BoundPolicy:
    """The best weights per span index, which see no state: one pass of coordinate search over the spans.

    Each span in turn takes the best point of the static grid while the others keep theirs; all begin at `start`. On the
    training prompts the result is never worse than `start` in every span.
    """
    examples = task.split("train").take(SEARCH_PROMPTS)
    grid = simplex_grid(len(ensemble.members), STATIC_STEP)
    dims = ensemble.spec(span_length=task.span_length, max_new_tokens=task.max_new_tokens).dims
    weights = np.tile(start, (dims.spans, 1)).astype(np.float32)

    def bound(params: Float[np.ndarray, "P K"]) -> BoundPolicy:
        return BoundPolicy(Schedule(), params, dims, task.span_length)

    with RewardPool(task.reward) as pool:
        for p in range(dims.spans):
            scores = []
            for i, point in enumerate(grid):
                candidate = weights.copy()
                candidate[p] = point
                scores.append(_mean_reward(ensemble, task, examples, bound(candidate), pool))
                on_progress(p * len(grid) + i + 1, dims.spans * len(grid))
            weights[p] = _best(grid, scores)
    return bound(weights)


BASELINES = ("uniform", "static", "confidence", "schedule")


def baseline_methods(ensemble: Ensemble, task: Task, names: Sequence[str] | None = None) -> dict[str, Method]:
    """The methods that need no training run, by name; None means each member alone and all of `BASELINES`.

    Raises:
      InputError: an unknown name.
    """
    singles = dict(zip(member_names(ensemble), ensemble.members, strict=True))
    known = [*singles, *BASELINES]
    names = known if names is None else names
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"methods {', '.join(unknown)} are unknown; known: {', '.join(known)} (agents: --policy RUN)")
    static = np.full(len(singles), 1 / len(singles), np.float32)
    if "static" in names or "schedule" in names:
        with report.progress("search for static", len(simplex_grid(len(singles), STATIC_STEP)), "points") as update:
            static = static_weights(ensemble, task, lambda done, total: update(done, ""))
    methods: dict[str, Method] = {}
    for name in names:
        if name in singles:
            ends = ensemble.member_ends[list(singles).index(name)]
            alone = Ensemble([singles[name]], end_ids=ends)  # alone, a member is itself under any operator
            methods[name] = Method(alone, None, task.span_length)
        elif name == "uniform":
            methods[name] = Method(ensemble, None, task.span_length)
        elif name == "confidence":
            methods[name] = Method(ensemble, Confidence(), 1)
        elif name == "static":
            methods[name] = Method(ensemble, static, task.span_length)
        else:
            spans = -(-task.max_new_tokens // task.span_length)
            points = spans * len(simplex_grid(len(singles), STATIC_STEP))
            with report.progress("search for schedule", points, "points") as update:
                policy = schedule_weights(ensemble, task, static, lambda done, total: update(done, ""))
            methods[name] = Method(ensemble, policy)
    return methods


def evaluate(
    methods: Mapping[str, Method], task: Task, split: str = "test", *, out: Path | None = None, limit: int | None = None
) -> dict[str, Any]:
    """Runs every method on the same prompts and returns (and, with `out`, writes) the content of results.json.

    Args:
      methods: name -> method, in the order of the table.
      out: a run directory; `results.json` and `predictions.jsonl` are written into it.
      limit: only the split's first prompts.

    Raises:
      InputError: an unknown or empty split, prompts that do not fit.
    """
    examples = task.split(split)
    if limit is not None:
        examples = examples.take(limit)
    began = time.perf_counter()
    table: dict[str, Any] = {}
    predictions: list[dict[str, Any]] = []
    with (
        RewardPool(task.reward) as pool,
        report.progress("evaluation", len(methods) * len(examples), "answers") as update,
    ):
        for i, (name, method) in enumerate(methods.items()):
            before = i * len(examples)
            answers = _answer(method, task, examples, pool, functools.partial(_shift, update, before, name))
            score = float(np.mean(answers.rewards))
            binary = bool(np.all((answers.rewards == 0) | (answers.rewards == 1)))
            table[name] = {
                "score": score,
                "accuracy": score if binary else None,
                "n": len(examples),
                "ci95": list(interval95(answers.rewards)),
                "per_seed": [score],
                "scores": {"reward": score},
                "ms_per_token": answers.ms_per_token,
            }
            searched = method.weights.params if isinstance(method.weights, BoundPolicy) else method.weights
            if isinstance(searched, np.ndarray):
                table[name]["weights"] = np.round(searched, 4).tolist()
            predictions += _predictions(name, examples, answers)
    if pool.problems:
        report.console.print(str(pool.problems), highlight=False, markup=False)
    results = {
        "schema": 1,
        "task": task.name,
        "split": split,
        "methods": table,
        "seconds": {"evaluation": time.perf_counter() - began},
        "environment": report.environment(),
    }
    if out is not None:
        files.write_json_lines(out / "predictions.jsonl", predictions)
        files.write_json(out / "results.json", results)
    return results


def _shift(update: report.Update, before: int, note: str, done: int) -> None:
    update(before + done, note)


def _predictions(name: str, examples: Examples, answers: _Answers) -> list[dict[str, Any]]:
    rows = []
    index = 0
    for generation in answers.generations:
        for b, text in enumerate(generation.texts):
            used = generation.weights[b][~np.isnan(generation.weights[b, :, 0])]
            rows.append(
                {
                    "method": name,
                    "index": index,
                    "prompt": examples.prompts[index],
                    "reference": examples.references[index],
                    "text": text,
                    "reward": float(answers.rewards[index]),
                    "finish_reason": generation.finish_reasons[b],
                    "weights": np.round(used, 4).tolist(),
                }
            )
            index += 1
    return rows
