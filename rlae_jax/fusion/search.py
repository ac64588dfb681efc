"""Search for weights: what to try next, given scores of what was tried. Knows nothing of models.

In: a function from points Float[N, d] to their scores Float[N, M] under M objectives, all of a call at once, so that it
can decode them as rows of one batch. Out: the best point, all points with their scores, what a picture needs.

- `hierarchical`: EMORL's search (arXiv 2505.02579, section 3.3) in a box, or in a simplex, where what is subdivided are
  simplices rather than boxes.
- `grid`, `random_points`: every point of a grid, or random ones.
- `successive_halving`: the best of given points, most of which are tried on a few prompts only.

No point is evaluated twice (`Scores`), and what was evaluated can be kept in a file from which a search goes on: its
result and its costs are those of one that was not interrupted. The last one may be asked to evaluate points again.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from jaxtyping import Float, Int, Num

from rlae_jax import files, hosts, records
from rlae_jax.errors import InputError

Evaluate = Callable[[Float[np.ndarray, "N d"]], Float[np.ndarray, "N M"]]
# Points and places of prompts to the scores of each point on each of these prompts.
EvaluatePrompts = Callable[[Float[np.ndarray, "N d"], Int[np.ndarray, " n"]], Float[np.ndarray, "N n M"]]
SPACES = ("box", "simplex")
_DIGITS = 9  # of a point's coordinates, by which it is known again
# A search over more points than two members' grid of step 0.05 has tries them on so many prompts first, and all prompts
# are for this many of them.
_EXHAUSTIVE = 21
MOST_POINTS = 100_000  # of a search: each is decoded, and compared with all others
FIRST_PROMPTS = 64
_FINALISTS = 8


class ScoredPoint(records.Record):
    """A line of a search's file: an evaluation and its cost. In older ones there is no cost.

    Attributes:
      prompts: on which, as the first one's place and how many; None: on all.
      scores: under each objective; on some prompts those of the first one, then those of the second, and so on.
    """

    point: Annotated[list[records.Share], msgspec.Meta(min_length=1)]
    scores: Annotated[list[records.Finite], msgspec.Meta(min_length=1)]
    prompts: tuple[records.Count, records.Positive] | None = None
    answers: records.Count | None = None
    seconds: records.Seconds = 0.0


def require_few(points: int, what: str, fewer: str) -> None:
    """Raises an `InputError` for more points than a search can try.

    Args:
      what: which search.
      fewer: what would make it smaller.
    """
    if points > MOST_POINTS:
        raise InputError(f"{what} has {_count(points)} points, of which {MOST_POINTS:,} can be tried; {fewer}")


def _count(points: int) -> str:
    return f"{points:,}" if points < 10**15 else f"about 10^{math.log10(points):.0f}"


def grid_size(dimensions: int, steps: int, space: str = "box") -> int:
    """The points of a grid with so many steps from 0 to 1."""
    return (steps + 1) ** dimensions if space == "box" else math.comb(steps + dimensions - 1, steps)


def require_grid(dimensions: int, step: float, space: str = "box", most: int = MOST_POINTS) -> None:
    """Raises an `InputError` for a grid of more points than can be tried, with the smallest step that could be.

    Args:
      most: points that are to be tried.
    """
    points = grid_size(dimensions, round(1 / step), space)
    if points <= most:
        return
    few = next((n for n in range(1, 101) if grid_size(dimensions, n + 1, space) > most), 100)
    fewer = f"a step of {1 / few:.3g} gives {grid_size(dimensions, few, space):,}"
    if grid_size(dimensions, few, space) > most:
        fewer = "give a larger budget" if most < MOST_POINTS else "try fewer weights"
    raise InputError(
        f"a grid of step {step:g} over {dimensions} weights has {_count(points)} points, of which {most:,} can be "
        f"tried; {fewer}; or give another method with a budget"
    )


_Key = tuple[tuple[float, ...], tuple[int, int] | None]  # a point, and on which prompts, if not on all


class Scores:
    """Points and their scores; evaluates those that are new, and knows what all that was asked for has cost.

    Args:
      evaluate: points to scores; the objectives' mean is what a search raises.
      on_prompts: the same of some prompts, for `on`.
      scale_invariant: a point's scores depend on its direction from the origin alone, as with greedily decoded hidden
        states; of several points in one direction one is evaluated.
      path: a file with a line per evaluation, which says what it cost. What it has already is not evaluated again.
      sizes: d and M of such a file; by default those of its first line.
      batch: points per call at most.
      answers: that a point takes, of all prompts and of one.

    Attributes:
      points: in the order in which they were asked for.
      evaluations, answers, seconds: of what was asked for, whether it was evaluated now or is from the file.

    Raises:
      InputError: a file with something else in it; scores that are not finite, or not one row per point.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        on_prompts: EvaluatePrompts | None = None,
        *,
        scale_invariant: bool = False,
        path: Path | None = None,
        sizes: tuple[int, int] | None = None,
        batch: int | None = None,
        answers: tuple[int, int] = (0, 0),
    ):
        self._evaluate, self._on_prompts = evaluate, on_prompts
        self._scale_invariant, self._path, self._batch = scale_invariant, path, batch
        self._sizes, self._answers = sizes, answers
        self._known: dict[_Key, ScoredPoint] = {}
        self._asked: set[_Key] = set()
        self.points: list[tuple[float, ...]] = []
        self.evaluations = self.answers = 0
        self.seconds = 0.0
        if path is not None and path.is_file():
            self._read(path)

    def _read(self, path: Path) -> None:
        rows = records.read_lines(path, ScoredPoint, growing=True)
        sizes = self._sizes
        for i, row in enumerate(rows, 1):
            own = len(row.point), len(row.scores) / (1 if row.prompts is None else row.prompts[1])
            sizes = (own[0], int(own[1])) if sizes is None else sizes
            if own != sizes:
                raise InputError(
                    f"{path}:{i}: {own[0]} weights and {own[1]:g} scores; expected {sizes[0]} and {sizes[1]}"
                )
            self._known[self._key(row.point), row.prompts] = row
        if not path.read_bytes().endswith(b"\n"):  # cut off in the middle; what comes next needs a line of its own
            files.write_json_lines(path, map(records.plain, rows))

    def _key(self, point: Sequence[float]) -> tuple[float, ...]:
        values = np.asarray(point, np.float64)
        if self._scale_invariant and values.max() > 0:
            values = values / values.max()
        return tuple(float(value) for value in np.round(values, _DIGITS))

    def __call__(self, points: Float[np.ndarray, "N d"]) -> Float[np.ndarray, "N M"]:
        """The scores of these points."""
        wanted = [tuple(float(value) for value in np.round(point, _DIGITS)) for point in points]
        tried = set(self.points)
        self.points += [point for point in dict.fromkeys(wanted) if point not in tried]
        return self._scores(wanted, None, self._evaluate, self._answers[0])

    def on(self, points: Float[np.ndarray, "N d"], rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "N n M"]:
        """The scores of these points on prompts that follow each other."""
        assert self._on_prompts is not None
        evaluate, n = self._on_prompts, len(rows)

        def flat(points: Float[np.ndarray, "N d"]) -> Float[np.ndarray, "N nM"]:
            return _checked(evaluate(points, rows), len(points), n).reshape(len(points), -1)

        wanted = [tuple(map(float, point)) for point in points]
        scores = self._scores(wanted, (int(rows[0]), n), flat, n * self._answers[1])
        return scores.reshape(len(wanted), n, -1)

    def _scores(
        self, wanted: Sequence[tuple[float, ...]], prompts: tuple[int, int] | None, evaluate: Evaluate, answers: int
    ) -> Float[np.ndarray, "N s"]:
        keys = [(self._key(point), prompts) for point in wanted]
        new = {key: point for key, point in zip(keys, wanted, strict=True) if key not in self._known}
        size = self._batch or max(len(new), 1)
        items = list(new.items())
        for start in range(0, len(items), size):
            part = items[start : start + size]
            began = time.perf_counter()
            scores = np.asarray(evaluate(np.array([point for _, point in part])), np.float64)
            if scores.ndim != 2 or len(scores) != len(part) or not np.all(np.isfinite(scores)):
                raise InputError(
                    f"scores of {len(part)} points must be {len(part)} rows of finite numbers, not of shape "
                    f"{list(scores.shape)}: {scores.ravel()[:5].tolist()}"
                )
            each = (time.perf_counter() - began) / len(part)
            for (key, point), row in zip(part, scores.tolist(), strict=True):
                self._known[key] = ScoredPoint(
                    point=list(point), scores=row, prompts=prompts, answers=answers, seconds=each
                )
            self._write([self._known[key] for key, _ in part])
        for key in keys:
            if key not in self._asked:
                self._asked.add(key)
                row = self._known[key]
                self.evaluations += 1
                self.answers += answers if row.answers is None else row.answers
                self.seconds += row.seconds
        return np.array([self._known[key].scores for key in keys])

    def _write(self, rows: Sequence[ScoredPoint]) -> None:
        if self._path is None or not hosts.is_first():
            return
        with files.GrowingFile(self._path) as file:
            file.write("".join(files.json_line(records.plain(row)) for row in rows))


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
      weights: the point with the highest mean score; of equally good ones the first that was tried.
      score: that mean.
      points, scores: all that were tried, in order, with their scores under each objective.
      evaluations: of them, how many had to be evaluated; of successive halving, how many answers were scored, one for
        each pair of a point and a prompt.
      regions: of a hierarchical search, the corners of each level's regions, one region after another.
    """

    weights: Float[np.ndarray, " d"]
    score: float
    points: Float[np.ndarray, "N d"]
    scores: Float[np.ndarray, "N M"]
    evaluations: int
    regions: list[Float[np.ndarray, "C d"]] = dataclasses.field(default_factory=list)


def _result(known: Scores, regions: list[np.ndarray] | None = None) -> SearchResult:
    points = np.array(known.points)
    scores = known(points)
    best = int(np.argmax(scores.mean(axis=1)))
    return SearchResult(
        points[best], float(scores[best].mean()), points, scores, known.evaluations, [] if regions is None else regions
    )


def hierarchical(known: Scores, dimensions: int, levels: int = 5, space: str = "box", beams: int = 1) -> SearchResult:
    """EMORL's hierarchical grid search.

    A level tries the points that cut its regions in half along every axis (3^d in a box), and the next level's regions
    are those parts (of 2^d each) whose corners have the highest sums of scores. N levels in a box take
    3^d + (N - 1)(3^d - 2^d) evaluations with one region, since a part's corners are known.

    The published rule keeps one region, and so never comes back to another part of the box: it finds the best where the
    score falls off gently around it. Where scores lie on plateaus with edges between them, as those of fused
    probabilities do (an answer changes all at once), the part with the best corners need not hold the best point: keep
    two or three. With all of them every point of the last level's grid is tried.

    Args:
      space: "box" for [0, 1]^d, as published, or "simplex" for weights that sum to 1. The parts of a simplex are those
        of its edgewise subdivision (Edelsbrunner and Grayson, 2000): d(d + 1)/2 points and 2^(d - 1) parts.
      beams: regions kept at each level; of equally good ones the first. What they share is evaluated once.

    Raises:
      InputError: an unknown space, no levels, no dimensions or no beams; more points than can be tried.
    """
    if space not in SPACES:
        raise InputError(f"space must be one of {', '.join(SPACES)}, not {space!r}")
    if levels < 1 or dimensions < 1 or beams < 1:
        raise InputError(
            f"a search needs at least one level, one dimension and one beam, not {levels}, {dimensions} and {beams}"
        )
    require_levels(levels, dimensions, space, beams)
    parts = _box_parts if space == "box" else _simplex_parts
    whole = np.array(list(itertools.product((0.0, 1.0), repeat=dimensions))) if space == "box" else np.eye(dimensions)
    kept, regions = [whole], []
    for _ in range(levels):
        regions.append(np.concatenate(kept))
        candidates = [part for region in kept for part in parts(region)]
        points = np.unique(np.round(np.concatenate(candidates), _DIGITS), axis=0)
        known(points)
        totals = [known(corners).mean(axis=1).sum() for corners in candidates]
        kept = [candidates[i] for i in np.argsort(-np.array(totals), kind="stable")[:beams]]
    return _result(known, regions)


def level_sizes(dimensions: int, space: str) -> tuple[int, int]:
    """The new points of the first level of a hierarchical search, and of each region of a later one at most."""
    if space == "box":
        return 3**dimensions, 3**dimensions - 2**dimensions
    return dimensions * (dimensions + 1) // 2, dimensions * (dimensions - 1) // 2


def _regions_below(levels: int, dimensions: int, space: str, beams: int) -> int:
    """How many regions all levels but the first look at, at most."""
    parts = 2**dimensions if space == "box" else 2 ** (dimensions - 1)
    return sum(min(beams, parts**level) for level in range(1, levels))


def hierarchical_size(levels: int, dimensions: int, space: str = "box", beams: int = 1) -> int:
    """How many points a hierarchical search tries at most: exactly so many with one region in a box."""
    first, later = level_sizes(dimensions, space)
    new = first + later * _regions_below(levels, dimensions, space, beams)
    return min(new, grid_size(dimensions, 2**levels, space))


def require_levels(levels: int, dimensions: int, space: str = "box", beams: int = 1) -> None:
    """Raises an `InputError` for a hierarchical search of more points than can be tried."""
    regions = 1 + _regions_below(levels, dimensions, space, beams)
    if space == "box":  # of many regions that lie side by side most points are the same
        looked_at = min(3**dimensions * regions, grid_size(dimensions, 2**levels))
    else:
        looked_at = math.comb(2 * dimensions - 1, dimensions - 1) * regions
    beside = f" with {beams} beams" if beams > 1 else ""
    require_few(
        looked_at,
        f"a search of {levels} levels over {dimensions} weights{beside}",
        "give fewer levels, weights or beams",
    )


def _box_parts(region: Float[np.ndarray, "C d"]) -> Iterator[Float[np.ndarray, "C d"]]:
    """The 2^d boxes of half the size, each as its corners."""
    low, high = region.min(axis=0), region.max(axis=0)
    axes = [((a, (a + b) / 2), ((a + b) / 2, b)) for a, b in zip(low, high, strict=True)]
    for sides in itertools.product(*axes):
        yield np.array(list(itertools.product(*sides)))


def _simplex_parts(region: Float[np.ndarray, "d d"]) -> Iterator[Float[np.ndarray, "d d"]]:
    """The 2^(d - 1) simplices of the edgewise subdivision in halves, each as its corners.

    A part is a table of 2 x d numbers that, read row by row, rise from 0 to d - 1 in steps of at most 1; the mean of
    the corners that a column names is a corner of the part, and no two columns are alike.
    """
    d = len(region)
    for rises in itertools.combinations(range(1, 2 * d), d - 1):
        table = np.searchsorted(rises, np.arange(2 * d), side="right").reshape(2, d)
        if len({tuple(column) for column in table.T}) == d:
            yield region[table].mean(axis=0)


def grid(known: Scores, dimensions: int, step: float, space: str = "box") -> SearchResult:
    """Every point whose coordinates are multiples of `step`; in a simplex those that sum to 1."""
    require_grid(dimensions, step, space)
    n = round(1 / step)
    if space == "box":
        points = np.array(list(itertools.product(range(n + 1), repeat=dimensions))) / n
    else:
        bars = itertools.combinations(range(n + dimensions - 1), dimensions - 1)
        points = (np.diff([(-1, *bar, n + dimensions - 1) for bar in bars], axis=1) - 1) / n
    known(points)
    return _result(known)


def draw(dimensions: int, points: int, seed: int = 0, space: str = "box") -> Float[np.ndarray, "N d"]:
    """Points drawn uniformly."""
    require_few(points, "a search among random points", "give a smaller budget, or fewer weights")
    rng = np.random.default_rng(seed)
    return rng.random((points, dimensions)) if space == "box" else rng.dirichlet(np.ones(dimensions), points)


def random_points(known: Scores, dimensions: int, points: int, seed: int = 0, space: str = "box") -> SearchResult:
    """Points drawn uniformly."""
    known(draw(dimensions, points, seed, space))
    return _result(known)


def halving_rounds(points: int, prompts: int, first: int = FIRST_PROMPTS) -> list[tuple[int, int]]:
    """Successive halving: per round on how many prompts points are tried, and how many of them are kept.

    Args:
      first: prompts of the first round.
    """
    rounds, n = [], first
    while points > _EXHAUSTIVE and n < prompts:
        points = max(_FINALISTS, -(-points // 4))
        rounds.append((n, points))
        n *= 4
    return [*rounds, (prompts, 1)]


def search_size(points: int, prompts: int, first: int = FIRST_PROMPTS, *, again: bool = False) -> int:
    """How many answers successive halving among so many points looks at.

    Args:
      again: a round answers all of its prompts, also those of the rounds before.
    """
    rounds = halving_rounds(points, prompts, first)
    tried = [points, *(kept for _, kept in rounds)]
    known = [0, *(0 if again else n for n, _ in rounds)]
    return sum(left * (n - before) for left, before, (n, _) in zip(tried, known, rounds, strict=False))


def successive_halving(
    evaluate: EvaluatePrompts,
    points: Float[np.ndarray, "N d"],
    prompts: int,
    first: int = FIRST_PROMPTS,
    *,
    again: bool = False,
    costs: Float[np.ndarray, " N"] | None = None,
) -> SearchResult:
    """Tries all points on a few prompts, the better ones on four times as many, and so on (`halving_rounds`).

    A round asks for the scores on the prompts that are new in it, and keeps the points with the highest means of all
    their scores so far, under all objectives; of equally good ones the first.

    Args:
      evaluate: gets the points that are left and the places of prompts, of 0 .. prompts - 1 in their order.
      again: a round asks for the scores on all of its prompts, also those of the rounds before.
      costs: of equally good points the cheapest are kept, and of equally cheap ones those that were better in the round
        before; they are asked for in this order.

    Returns the points that were scored on all prompts, in their order, with their mean scores under each objective.
    `evaluations` counts answers and is `search_size(len(points), prompts, first, again=again)`.

    Raises:
      InputError: no points or no prompts; scores that are not finite, or not one per point, prompt and objective.
    """
    points = np.asarray(points, np.float64)
    if points.ndim != 2 or not len(points) or prompts < 1 or first < 1:
        raise InputError(
            f"a search needs rows of points and at least one prompt, not points of shape {list(points.shape)}, "
            f"{prompts} prompts and {first} in the first round"
        )
    left = np.arange(len(points))
    table: Float[np.ndarray, "N n M"] | None = None
    answers = 0
    for n, kept in halving_rounds(len(points), prompts, first):
        known = None if again else table
        rows = np.arange(0 if known is None else known.shape[1], n)
        new = _checked(evaluate(points[left], rows), len(left), len(rows))
        answers += new.shape[0] * new.shape[1]
        table = new if known is None else np.concatenate([known, new], axis=1)
        if n < prompts:
            best = _ranking(table.mean(axis=(1, 2)), left, costs)[:kept]
            best = np.sort(best) if costs is None else best
            left, table = left[best], table[best]
    assert table is not None
    scores = table.mean(axis=1)
    winner = _ranking(scores.mean(axis=1), left, costs)[0]
    order = np.argsort(left)
    return SearchResult(points[left[winner]], float(scores[winner].mean()), points[left[order]], scores[order], answers)


def _checked(scores: Any, points: int, prompts: int) -> Float[np.ndarray, "N n M"]:
    """The scores as an array of finite numbers."""
    array = np.asarray(scores, np.float64)
    if array.ndim != 3 or array.shape[:2] != (points, prompts) or not np.all(np.isfinite(array)):
        raise InputError(
            f"scores of {points} points on {prompts} prompts must be finite numbers of shape [{points}, {prompts}, "
            f"objectives], not of shape {list(array.shape)}: {array.ravel()[:5].tolist()}"
        )
    return array


def _ranking(
    means: Float[np.ndarray, " n"], left: Int[np.ndarray, " n"], costs: Float[np.ndarray, " N"] | None
) -> Int[np.ndarray, " n"]:
    """Places of the points that are left, the one with the best score first, of equally good ones the cheapest."""
    return np.argsort(-means, kind="stable") if costs is None else np.lexsort((costs[left], -means))


def pareto(scores: Float[np.ndarray, "N M"]) -> list[int]:
    """The points that no other one beats: is at least as good under every objective, and better under one."""
    values = np.asarray(scores, np.float64)
    return [
        i for i, row in enumerate(values) if not np.any(np.all(values >= row, axis=1) & np.any(values > row, axis=1))
    ]


def hypervolume(scores: Num[np.ndarray, "N M"], reference: Sequence[float] | np.ndarray | None = None) -> float:
    """The volume of what lies below at least one point and above the reference, by default 0 in every objective.

    By slices along the last objective, recursively (Fonseca, Paquete and Lopez-Ibanez, 2006).
    """
    values = np.asarray(scores, np.float64)
    low = np.zeros(values.shape[1]) if reference is None else np.asarray(reference, np.float64)
    return _volume(np.maximum(values - low, 0.0))


def _volume(values: Float[np.ndarray, "N M"]) -> float:
    if not len(values):
        return 0.0
    if values.shape[1] == 1:
        return float(values.max())
    order = np.argsort(-values[:, -1], kind="stable")
    total = 0.0
    for i, row in enumerate(order):
        below = values[order[i + 1], -1] if i + 1 < len(order) else 0.0
        height = values[row, -1] - below
        if height > 0:
            total += height * _volume(values[order[: i + 1], :-1])
    return total
