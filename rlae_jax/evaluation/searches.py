"""What a baseline has to have chosen, chosen on the train split: fixed weights, a schedule, settings of a policy.

In: an ensemble, a task, how much to look at (`Budget`). Out: what was chosen, and at how many answers the search
looked. Candidates are rows of one batch, as weights are per row.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rlae_jax import report
from rlae_jax.evaluation.answers import ROWS, answer_batch
from rlae_jax.evaluation.methods import Method
from rlae_jax.evaluation.policies import dims_for, drawn_members, replay, span_count
from rlae_jax.fusion import search
from rlae_jax.fusion.ensemble import Ensemble
from rlae_jax.fusion.policy import BoundPolicy, Schedule
from rlae_jax.tasks import Examples, RewardPool, Task

STATIC_STEP = 0.05
_DRAW_STEP = 0.1
SEARCH_PROMPTS = 1_024
FIRST_PROMPTS = search.FIRST_PROMPTS  # of a search's first round
_SCHEDULE_POINTS = 100  # weights that a schedule's search tries for a span


class Budget(NamedTuple):
    """How much searches look at.

    Attributes:
      answers: no fewer than this many, if the train split has enough prompts.
      prompts: of the train split at most; by default at least `SEARCH_PROMPTS`, and as many as `answers` needs.
    """

    answers: int = 0
    prompts: int | None = None


_NO_BUDGET = Budget()


def search_size(points: int, prompts: int) -> int:
    """How many answers a search among so many points looks at."""
    return search.search_size(points, prompts, FIRST_PROMPTS, again=True)


def cost(answers: int, began: float) -> dict[str, Any]:
    """What a search took, for results.json."""
    return {"searched": answers, "search_seconds": time.perf_counter() - began}


def simplex_grid(members: int, step: float) -> Float[np.ndarray, "W K"]:
    """All weights whose components are multiples of `step` and sum to 1; the corners are among them."""
    parts = round(1 / step)
    bars = itertools.combinations(range(parts + members - 1), members - 1)
    edges = np.array([(-1, *bar, parts + members - 1) for bar in bars])
    return (np.diff(edges, axis=1) - 1).astype(np.float32) / parts


def static_weights(ensemble: Ensemble, task: Task, budget: Budget = _NO_BUDGET) -> tuple[Float[np.ndarray, " K"], int]:
    """The best fixed weights: the simplex grid of step 0.05, which has the one-hots, and equal weights, on training
    prompts.

    Returns the weights, and at how many answers it looked.
    """
    weights, looked = _best_weights("static", ensemble, task, _fixed_weights(ensemble), budget)
    return weights[0], looked


def draw_weights(ensemble: Ensemble, task: Task, budget: Budget = _NO_BUDGET) -> tuple[Float[np.ndarray, " K"], int]:
    """The best weights to draw a member per step with, as `static_weights` finds its own but in steps of 0.1: what is
    drawn scatters by more."""

    def draw(own: Float[np.ndarray, "B 1 K"]) -> BoundPolicy:
        return drawn_members(ensemble, task, own[:, 0])

    weights, looked = _best_weights("draw", ensemble, task, _fixed_weights(ensemble, _DRAW_STEP), budget, draw)
    return weights[0], looked


def _fixed_weights(ensemble: Ensemble, step: float = STATIC_STEP) -> Float[np.ndarray, "W 1 K"]:
    members = len(ensemble.members)
    uniform = np.full(members, 1 / members, np.float32)
    return _with(simplex_grid(members, step), uniform)[:, None]


def schedule_weights(
    ensemble: Ensemble,
    task: Task,
    start: Float[np.ndarray, " K"],
    budget: Budget = _NO_BUDGET,
) -> tuple[BoundPolicy, int]:
    """The best weights per span index, which see no state: one pass of coordinate search over the spans.

    Each span in turn takes the best point of a grid while the others keep theirs; all begin at `start`. The grid is the
    one of `static_weights`, or a coarser one if that has more than 100 points, with the span's weights so far: on the
    training prompts the result is never worse than `start` in every span, unless the first rounds of the search drop
    it. Also returns at how many answers it looked.
    """
    step = STATIC_STEP
    while len(grid := simplex_grid(len(ensemble.members), step)) > _SCHEDULE_POINTS:
        step *= 2
    spans = span_count(task, task.span_length)
    weights = np.tile(start, (spans, 1)).astype(np.float32)
    looked = 0
    for p in range(spans):
        points = _with(grid, weights[p])
        candidates = np.repeat(weights[None], len(points), axis=0)
        candidates[:, p] = points
        name = f"schedule, span {p + 1} of {spans}"
        part = budget._replace(answers=-(-budget.answers // spans))
        weights, size = _best_weights(name, ensemble, task, candidates, part)
        looked += size
    return BoundPolicy(Schedule(), weights, dims_for(ensemble, task, task.span_length), task.span_length), looked


def best_settings(
    name: str, task: Task, settings: Sequence[Mapping[str, Any]], budget: Budget, make: Callable[..., Method]
) -> Method:
    """The method of the settings that have the best mean reward on training prompts; of equally good ones the first.

    Args:
      make: makes the method of some settings, its keyword arguments.
    """
    n = budget.prompts or max(SEARCH_PROMPTS, -(-budget.answers // len(settings)))
    examples = task.split("train").take(min(n, len(task.split("train"))))
    began = time.perf_counter()
    scores: list[Any] = []
    total = len(settings) * len(examples)
    with RewardPool(task.reward) as pool, report.progress(f"search for {name}", total, "answers") as update:
        for one in settings:
            scores.append(np.mean(_rewards(task, examples, pool, range(len(examples)), _always(make(**one)))))
            update(len(scores) * len(examples), "")
    best = settings[int(np.argmax(scores))]
    return dataclasses.replace(make(**best), record={**best, **cost(total, began)})


def _best_weights(
    name: str,
    ensemble: Ensemble,
    task: Task,
    candidates: Float[np.ndarray, "W P K"],
    budget: Budget,
    use: Callable[[Float[np.ndarray, "B P K"]], BoundPolicy] | None = None,
) -> tuple[Float[np.ndarray, "P K"], int]:
    """Which of the weights per span has the best mean reward on training prompts; of equally good ones the nearest to
    uniform. And at how many answers it looked.

    Args:
      use: what the rows of a batch do with their weights; by default they are held.
    """
    _, spans, members = candidates.shape
    examples = task.split("train").take(_prompts_to_search(task, len(candidates), budget))
    total, done = search_size(len(candidates), len(examples)), 0
    with RewardPool(task.reward) as pool, report.progress(f"search for {name}", total, "answers") as update:

        def evaluate(points: Float[np.ndarray, "N d"], places: Int[np.ndarray, " n"]) -> Float[np.ndarray, "N n 1"]:
            nonlocal done
            weights = points.astype(np.float32).reshape(-1, spans, members)

            def method_for(rows: Int[np.ndarray, " B"], part: Examples) -> Method:
                own = weights[rows // len(places)]
                if task.by_likelihood:  # each option is a row
                    own = np.repeat(own, [len(options) for options in part.options or ()], axis=0)
                held = replay(ensemble, task, own, task.span_length) if use is None else use(own)
                return Method(ensemble, held)

            before = done
            asked = np.tile(places, len(points))
            rewards = _rewards(task, examples, pool, asked, method_for, lambda n: update(before + n, ""))
            done += len(asked)
            return rewards.reshape(len(points), len(places), 1)

        best = search.successive_halving(
            *(evaluate, candidates.reshape(len(candidates), -1), len(examples), FIRST_PROMPTS),
            again=True,
            costs=np.sum((candidates - 1 / members) ** 2, axis=(1, 2)),
        )
    return best.weights.astype(np.float32).reshape(spans, members), best.evaluations


def _prompts_to_search(task: Task, points: int, budget: Budget) -> int:
    """On how many training prompts a search has to try its points."""
    most = len(task.split("train"))
    if budget.prompts is not None:
        return min(budget.prompts, most)
    enough = (n for n in range(SEARCH_PROMPTS, most, 64) if search_size(points, n) >= budget.answers)
    return min(next(enough, most), most)


def _rewards(
    task: Task,
    examples: Examples,
    pool: RewardPool,
    places: Sequence[int] | Int[np.ndarray, " N"],
    method_for: Callable[[Int[np.ndarray, " B"], Examples], Method],
    on_progress: Callable[[int], None] = lambda done: None,
) -> Float[np.ndarray, " N"]:
    """Rewards of answers to the examples at some places.

    Args:
      method_for: gives the method for the rows of a batch (their numbers among the N) and their examples.
    """
    pending = []
    done = 0
    for rows, counting in _full_batches(len(places)):
        part = examples.select([places[row] for row in rows])
        texts = answer_batch(method_for(rows, part), task, part).texts[:counting]
        pending.append(pool.share(part.prompts[:counting], texts, part.references[:counting]))
        done += counting
        on_progress(done)
    return np.concatenate([rewards() for rewards in pending])


def _always(method: Method) -> Callable[[Int[np.ndarray, " B"], Examples], Method]:
    return lambda rows, part: method


def _full_batches(n: int) -> Iterator[tuple[Int[np.ndarray, " B"], int]]:
    """Batches of the rows 0 .. n - 1, and how many of each count. Where there are several, the last is filled up with
    rows that do not, so that all run the same program."""
    for start in range(0, n, ROWS):
        rows = np.arange(start, min(start + ROWS, n))
        missing = ROWS - len(rows) if start else 0
        yield np.concatenate([rows, np.arange(missing)]), len(rows)


def _with(grid: Float[np.ndarray, "W K"], weights: Float[np.ndarray, " K"]) -> Float[np.ndarray, "W K"]:
    """The grid and a point that may lie beside it."""
    known = np.any(np.all(np.isclose(grid, weights, atol=1e-6), axis=1))
    return grid if known else np.concatenate([grid, weights[None]]).astype(np.float32)
