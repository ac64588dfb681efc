"""Which weights adapters should be fused with: points decoded in batches, scored, searched, kept and drawn.

In: fused adapters, prompts, objectives, a method. Out: a directory

    config.json  points.jsonl  search.json  weights.png (of three adapters)  points.png  contributions.png

All points are scored on the same prompts, with the same keys. `points.jsonl` has a line per evaluation, from which an
interrupted search goes on; its lines say what they cost, of which the totals are sums.
"""

import dataclasses
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from jaxtyping import Float

from rlae_jax import files, ranges, records, report
from rlae_jax.emorl.fused import DEFAULT_MEMORY, MODES, Fused, PointDecoder
from rlae_jax.emorl.scorers import Objective
from rlae_jax.errors import InputError
from rlae_jax.fusion import search as searching
from rlae_jax.fusion.search import SearchResult, level_sizes
from rlae_jax.ranges import Count, Levels, Seed, ShareAbove0, Temperature
from rlae_jax.runs import lock
from rlae_jax.runs.directory import RunConfig, claim_directory
from rlae_jax.statistics import rank_correlation

METHODS = ("hierarchical", "grid", "random", "halving")
POINTS_FILE, SEARCH_FILE = "points.jsonl", "search.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """What is searched, and how.

    Attributes:
      method: "hierarchical" (EMORL's), "grid", "random", or "halving": random points, the worse half of which is
        dropped after a few prompts, and so on.
      levels: of the hierarchical search.
      beams: boxes (or simplices) that it keeps at each level, 1 as published; `fusion.search.hierarchical` says when
        more are needed.
      budget: evaluations at most; it takes whole levels, or limits the points of the other methods.
      step: of the grid.
      space: "box" for weights in [0, 1]^M as published, "simplex" for weights that sum to 1.
      temperature, samples: how answers are decoded.
    """

    method: str = "hierarchical"
    levels: Levels = 5
    beams: Count = 1
    budget: Count | None = None
    step: ShareAbove0 = 0.1
    space: str = "box"
    max_new_tokens: Count = 64
    temperature: Temperature = 0.0
    samples: Count = 1
    seed: Seed = 0

    def __post_init__(self) -> None:
        ranges.check(self)
        if self.method not in METHODS:
            raise InputError(f"a search's method must be one of {', '.join(METHODS)}, not {self.method!r}")
        if self.space not in searching.SPACES:
            raise InputError(f"space must be one of {', '.join(searching.SPACES)}, not {self.space!r}")
        if abs(1 / self.step - round(1 / self.step)) > 1e-6:
            raise InputError(f"step must be 1 over a whole number, such as 0.1, not {self.step}")
        if self.beams > 1 and self.method != "hierarchical":
            raise InputError(f"beams are of the hierarchical search, not of {self.method}: leave them out")
        if self.samples > 1 and self.temperature == 0:
            raise InputError("samples are alike at temperature 0: give a higher one")


def levels_within(config: SearchConfig, dimensions: int) -> int:
    """The levels that the budget is enough for.

    Raises:
      InputError: it is not enough for one.
    """
    if config.budget is None:
        return config.levels
    first, _ = level_sizes(dimensions, config.space)
    if config.budget < first:
        raise InputError(
            f"a budget of {config.budget} evaluations is below one level, which takes {first} of {dimensions} "
            "adapters; give more, fewer adapters, or another method"
        )
    within = (n for n in range(config.levels, 1, -1) if _size(config, n, dimensions) <= config.budget)
    return next(within, 1)


def _size(config: SearchConfig, levels: int, dimensions: int) -> int:
    return searching.hierarchical_size(levels, dimensions, config.space, config.beams)


def most_points(config: SearchConfig, dimensions: int) -> int:
    """How many points a search of so many adapters tries at most.

    Raises:
      InputError: the budget is not enough for one level.
    """
    if config.method == "hierarchical":
        return _size(config, levels_within(config, dimensions), dimensions)
    if config.method == "grid":
        return searching.grid_size(dimensions, round(1 / config.step), config.space)
    return config.budget or 3**dimensions


def require_points(config: SearchConfig, dimensions: int) -> None:
    """Raises an `InputError` for a search of more points than its budget, or than any can try; or of fewer than one
    level."""
    if config.method == "hierarchical":
        searching.require_levels(levels_within(config, dimensions), dimensions, config.space, config.beams)
    elif config.method == "grid":
        most = min(config.budget or searching.MOST_POINTS, searching.MOST_POINTS)
        searching.require_grid(dimensions, config.step, config.space, most)
    else:
        points = config.budget or 3**dimensions
        searching.require_few(points, f"a search by {config.method}", "give a smaller --budget")


class PointEvaluator:
    """Scores points: their answers to some prompts, under some objectives."""

    def __init__(
        self,
        fused: Fused,
        prompts: Sequence[str],
        objectives: Sequence[Objective],
        config: SearchConfig,
        memory: int = DEFAULT_MEMORY,
        on_points: Callable[[int], None] = lambda decoded: None,
    ):
        self._prompts, self._objectives, self._samples = list(prompts), list(objectives), config.samples
        self._fused, self._config, self._memory = fused, config, memory
        self._on_points = on_points
        self.decoder = self._read(self._prompts, 0)
        self._part: tuple[tuple[int, int], PointDecoder] | None = None  # of some prompts
        self.decoded = 0  # points decoded so far

    def _read(self, prompts: Sequence[str], first: int) -> PointDecoder:
        """What answers these prompts, the first of which has this number, under many points."""
        config = self._config
        return self._fused.prepare(
            self._fused.ensemble.encode(prompts),
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            samples=config.samples,
            seed=config.seed,
            first=first,
            memory=self._memory,
        )

    def __call__(self, points: Float[np.ndarray, "N d"]) -> Float[np.ndarray, "N M"]:
        """Mean scores over the prompts."""
        means: Float[np.ndarray, "N M"] = self._scores(self.decoder, self._prompts, points).mean(axis=1)
        return means

    def on(self, points: Float[np.ndarray, "N d"], rows: Any) -> Float[np.ndarray, "N n M"]:
        """Scores on some of the prompts, which follow each other."""
        chosen, place = [self._prompts[i] for i in rows], (int(rows[0]), len(rows))
        if self._part is None or self._part[0] != place:
            self._part = place, self._read(chosen, place[0])
        return self._scores(self._part[1], chosen, points)

    def _scores(
        self, decoder: PointDecoder, prompts: Sequence[str], points: Float[np.ndarray, "N d"]
    ) -> Float[np.ndarray, "N n M"]:
        texts = decoder.texts(decoder.decode(points))
        self.decoded += len(points)
        asked = [prompt for prompt in prompts for _ in range(self._samples)] * len(points)
        flat = [text for own in texts for text in own]
        scores = np.stack([objective.share(asked, flat) for objective in self._objectives], axis=-1)
        self._on_points(self.decoded)
        means: Float[np.ndarray, "N n M"] = scores.reshape(len(points), len(prompts), self._samples, -1).mean(axis=2)
        return means


class SearchRun(RunConfig, kw_only=True, tag_field="command", tag="emorl search"):
    """The content of config.json: what a directory's points depend on, and how deep the search goes."""

    mode: Annotated[str, records.one_of(MODES)]
    adapters: Annotated[list[str], msgspec.Meta(min_length=1)]
    members: list[str]
    objectives: list[str]
    prompts: str
    settings: SearchConfig


class FoundPoint(records.Record):
    """A point of the Pareto set."""

    weights: list[records.Finite]
    scores: list[records.Finite]


class Found(records.Record, kw_only=True):
    """The content of search.json."""

    schema: records.Schema = 1
    weights: dict[str, records.Share]
    score: records.Finite
    scores: dict[str, records.Finite]
    points: records.Count
    evaluations: records.Count
    answers: records.Count
    pareto: list[FoundPoint]
    hypervolume: float
    rank_correlations: dict[str, float | None]
    seconds: records.Seconds
    mode: Annotated[str, records.one_of(MODES)]


def read_found(directory: Path, adapters: Collection[str]) -> Found | None:
    """What a search found, if one ended in the directory.

    Args:
      adapters: those that there are.

    Raises:
      InputError: its file is not of the shape, or names others.
    """
    path = directory / SEARCH_FILE
    if not path.is_file():
        return None
    found = records.read(path, Found)
    if unknown := [name for name in found.weights if name not in adapters]:
        raise InputError(
            f"{path}: weights.{unknown[0][:60]} is of no adapter of this run; it has {', '.join(adapters)}"
        )
    if len(found.weights) < 2:
        raise InputError(f"{path}: weights are of {len(found.weights)} adapters; a fusion needs two")
    return found


@dataclasses.dataclass(frozen=True)
class SearchOutcome:
    """A search's result and its cost."""

    result: SearchResult
    mode: str
    names: tuple[str, ...]  # of the adapters
    objectives: tuple[str, ...]
    answers: int  # decoded for it
    seconds: float  # that these took

    def summary(self) -> Found:
        """What search.json holds."""
        scores = self.result.scores
        front = searching.pareto(scores)
        best = int(np.argmax(scores.mean(axis=1)))
        return Found(
            weights=dict(zip(self.names, map(float, self.result.weights), strict=True)),
            score=self.result.score,
            scores=dict(zip(self.objectives, map(float, scores[best]), strict=True)),
            points=len(scores),
            evaluations=self.result.evaluations,
            answers=self.answers,
            pareto=[FoundPoint(weights=self.result.points[i].tolist(), scores=scores[i].tolist()) for i in front],
            hypervolume=searching.hypervolume(scores),
            rank_correlations=self.correlations(),
            seconds=self.seconds,
            mode=self.mode,
        )

    def correlations(self) -> dict[str, float | None]:
        """Of each adapter that bears an objective's name: the rank correlation of its share of the weights and that
        objective's score over all points."""
        kept = self.result.points.max(axis=1) > 0
        points, scores = self.result.points[kept], self.result.scores[kept]
        shares = points / points.sum(axis=1, keepdims=True)
        correlations: dict[str, float | None] = {}
        for m, name in enumerate(self.names):
            if name in self.objectives:
                value = rank_correlation(shares[:, m], scores[:, self.objectives.index(name)])
                correlations[name] = None if np.isnan(value) else value
        return correlations


@lock.writes("out")
def search(
    fused: Fused,
    prompts: Sequence[str],
    objectives: Sequence[Objective],
    config: SearchConfig,
    out: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    memory: int = DEFAULT_MEMORY,
    on_points: Callable[[int], None] = lambda decoded: None,
) -> SearchOutcome:
    """Searches the weights with the highest mean score over prompts and objectives.

    Args:
      out: a directory for points, results and pictures; None keeps nothing.
      resume: go on with the search in `out`.
      memory: bytes of keys and values at once.
      on_points: called with the number of points decoded so far.

    Raises:
      InputError: a budget below one level, a directory with another search.
    """
    d = len(fused.names)
    require_points(config, d)
    levels = levels_within(config, d) if config.method == "hierarchical" else 0
    path = None
    if out is not None:
        path = Path(out) / POINTS_FILE
        claim_directory(Path(out), _identity(fused, prompts, objectives, config), resume=resume)
    evaluator = PointEvaluator(fused, prompts, objectives, config, memory, on_points)
    known = searching.Scores(
        evaluator,
        evaluator.on,
        scale_invariant=fused.scale_invariant(config.temperature),
        path=path,
        sizes=(d, len(objectives)),
        batch=evaluator.decoder.at_once,
        answers=(len(prompts) * config.samples, config.samples),
    )
    if config.method == "hierarchical":
        result = searching.hierarchical(known, d, levels, config.space, config.beams)
    elif config.method == "grid":
        result = searching.grid(known, d, config.step, config.space)
    else:
        n = config.budget or 3**d
        drawn = searching.draw(d, n, config.seed, config.space)
        if config.method == "random":
            result = searching.random_points(known, d, n, config.seed, config.space)
        else:
            result = searching.successive_halving(known.on, drawn, len(prompts))
    names = tuple(objective.name for objective in objectives)
    outcome = SearchOutcome(result, fused.mode, fused.names, names, known.answers, known.seconds)
    if out is not None:
        files.write_json(Path(out) / SEARCH_FILE, records.plain(outcome.summary()))
        draw(outcome, Path(out))
    return outcome


def _identity(fused: Fused, prompts: Sequence[str], objectives: Sequence[Objective], config: SearchConfig) -> SearchRun:
    return SearchRun(
        mode=fused.mode,
        adapters=list(fused.names),
        members=list(fused.ensemble.fingerprints),
        objectives=[objective.name for objective in objectives],
        prompts=files.digest(list(prompts)),
        settings=config,
    )


def draw(outcome: SearchOutcome, out: Path) -> None:
    """The pictures of a search."""
    result = outcome.result
    title = f"{len(result.points)} points, mode {outcome.mode}"
    if len(outcome.names) == 3:
        report.weight_triangle(out / "weights.png", result.points, result.scores.mean(axis=1), outcome.names, title)
    if outcome.names == outcome.objectives:
        pareto = searching.pareto(result.scores)
        report.parallel_coordinates(out / "points.png", result.points, result.scores, outcome.names, title, pareto)
        report.contributions(out / "contributions.png", result.points, result.scores, outcome.names, title)
