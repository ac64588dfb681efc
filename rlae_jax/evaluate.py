"""Evaluation: every method on the same prompts, with intervals and tests; results.json and predictions.jsonl.

In: an ensemble, a task's split and methods. A method writes answers with an ensemble under some weights (`Method`),
with the weights that an agent used for other prompts (`Shuffled`), or takes one of several methods' answers (`Pick`).
Several seeds of a method are a list. What has to be chosen, such as the static weights, is chosen on the train split;
only the router, an agent, also looks at dev, as agents do.
"""

import dataclasses
import functools
import itertools
import os
import string
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from rlae_jax import files, report, statistics
from rlae_jax.config import PPOConfig
from rlae_jax.errors import InputError
from rlae_jax.fusion import search
from rlae_jax.fusion.ensemble import Ensemble, Weights
from rlae_jax.fusion.policy import (
    BoundPolicy,
    Confidence,
    Consistency,
    Deterministic,
    Dims,
    Gate,
    Observation,
    Perplexity,
    Policy,
    Schedule,
    slice_params,
)
from rlae_jax.fusion.prompts import bucket
from rlae_jax.ppo.dirichlet import Dirichlet
from rlae_jax.ppo.train import check_members, load_policy, read_run, train_seeds
from rlae_jax.runs.metrics import read_metrics
from rlae_jax.tasks import Examples, RewardPool, Task

STATIC_STEP = 0.05
SEARCH_PROMPTS = 1_024
_FIRST_PROMPTS = search.FIRST_PROMPTS  # of a search's first round
_SCHEDULE_POINTS = 100  # weights that a schedule's search tries for a span
_ROWS = 256  # prompts per call


@dataclasses.dataclass(frozen=True)
class Replay:
    """Weights that were decided elsewhere. Its parameters are Float[B, P, K], rows beyond the batch included; later
    spans take a row's last."""

    reads: tuple[str, ...] = ("span",)

    def init(self, key: Key[Array, ""], dims: Dims) -> Float[Array, "1 P K"]:
        """Uniform weights, for any number of rows."""
        del key
        return jnp.full((1, dims.spans, dims.members), 1.0 / dims.members)

    def apply(
        self, params: Float[Array, "B P K"], observation: Observation
    ) -> tuple[Deterministic, Float[Array, " B"]]:
        rows = jnp.arange(len(observation.span)) % params.shape[0]
        weights = params[rows, jnp.minimum(observation.span, params.shape[1] - 1)]
        return Deterministic(weights), jnp.zeros(weights.shape[0])

    def slice_rows(
        self, params: Float[Array, "B P K"], start: Array | int, n: int, total: int
    ) -> tuple["Replay", Array]:
        del total
        return self, slice_params(params, start, n)


@dataclasses.dataclass(frozen=True)
class RandomWeights:
    """Weights that are drawn anew for each row and span, all equally likely: Dirichlet(1, ..., 1)."""

    reads: tuple[str, ...] = ("span",)

    def init(self, key: Key[Array, ""], dims: Dims) -> Float[Array, " K"]:
        del key
        return jnp.ones(dims.members)

    def apply(self, params: Float[Array, " K"], observation: Observation) -> tuple[Dirichlet, Float[Array, " B"]]:
        rows = len(observation.span)
        return Dirichlet(jnp.broadcast_to(params, (rows, len(params)))), jnp.zeros(rows)


@dataclasses.dataclass(frozen=True)
class Tunable:
    """A policy some of whose fields are its parameters, {name: number}: trying others compiles nothing anew."""

    policy: Any  # a dataclass
    names: tuple[str, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(self.policy.reads)

    def init(self, key: Key[Array, ""], dims: Dims) -> dict[str, Any]:
        del key, dims
        return {name: getattr(self.policy, name) for name in self.names}

    def apply(self, params: dict[str, Any], observation: Observation) -> tuple[Any, Float[Array, " B"]]:
        policy: Policy = dataclasses.replace(self.policy, **params)
        return policy.apply((), observation)


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """Answers of an ensemble.

    Attributes:
      span_length: by default the policy's own.
      found: what a search found and how many answers it looked at; goes into results.json.
    """

    ensemble: Ensemble
    weights: Weights = None
    span_length: int | None = None
    found: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Shuffled:
    """Answers under an agent's weights for another prompt, span by span: what is left of an agent if it is right about
    how much to trust each member on the whole, but not about when."""

    agent: Method


@dataclasses.dataclass(frozen=True, eq=False)
class Pick:
    """One of several methods' own answers to each prompt: the one that most of them agree with (of equally many the
    first), or, as an oracle, one that is right if any is. An oracle is a reference line, no method to win against."""

    methods: tuple[Method, ...]
    oracle: bool = False


AnyMethod = Method | Shuffled | Pick
_Row = TypeVar("_Row")


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


def _spans(task: Task, span_length: int) -> int:
    return -(-task.max_new_tokens // span_length)


def _replayed(ensemble: Ensemble, task: Task, weights: Float[np.ndarray, "B P K"], span_length: int) -> Method:
    """The method that uses these weights for the rows of one batch."""
    filling = np.repeat(weights[:1], bucket(len(weights)) - len(weights), axis=0)
    params = np.concatenate([weights, filling]).astype(np.float32)
    dims = Dims(ensemble.widths, _spans(task, span_length))
    return Method(ensemble, BoundPolicy(Replay(), params, dims, span_length))


class Budget(NamedTuple):
    """How much searches look at.

    Attributes:
      answers: no fewer than this many, if the train split has enough prompts.
      prompts: of the train split at most; by default at least `SEARCH_PROMPTS`, and as many as `answers` needs.
    """

    answers: int = 0
    prompts: int | None = None


_NO_BUDGET = Budget()


class _Batch(NamedTuple):
    """Answers to some prompts."""

    texts: list[str]
    finish_reasons: list[str]
    weights: list[Float[np.ndarray, "P K"]]  # of each row's own spans
    tokens: int


def _answer(method: Method, task: Task, examples: Examples) -> _Batch:
    """Greedy answers, or the letters of the likeliest options: of the highest log-probability per byte, so that long
    options are not at a disadvantage. Such an answer counts as one token, and its weights are not kept."""
    if task.by_likelihood:
        assert examples.options is not None
        found = method.ensemble.log_likelihoods(
            examples.prompts, examples.options, method.weights, method.span_length, chat=task.chat
        )
        texts = [
            string.ascii_uppercase[np.argmax(row / [len(option.encode()) for option in options])]
            for row, options in zip(found, examples.options, strict=True)
        ]
        none = np.zeros((0, len(method.ensemble.members)), np.float32)
        return _Batch(texts, ["likeliest"] * len(texts), [none] * len(texts), len(texts))
    generation = method.ensemble.generate(
        examples.prompts,
        method.weights,
        span_length=method.span_length,
        max_new_tokens=task.max_new_tokens,
        stop=task.stop,
        chat=task.chat,
    )
    weights = [used[~np.isnan(used[:, 0])] for used in generation.weights]
    return _Batch(generation.texts, generation.finish_reasons, weights, sum(generation.steps))


def _with_room(ensemble: Ensemble, task: Task) -> Task:
    """Of a task by likelihood, the task whose longest answer is its longest option in the ensemble's tokens."""
    if not task.by_likelihood:
        return task
    options = {option for examples in task.splits.values() for own in examples.options or () for option in own}
    return dataclasses.replace(task, max_new_tokens=max(ensemble.lengths(ensemble.encode(sorted(options)))))


@dataclasses.dataclass(frozen=True)
class _Answers:
    texts: list[str]
    finish_reasons: list[str]
    weights: list[Float[np.ndarray, "P K"]]  # of each row's own spans; of picked answers who was picked, [1, K]
    rewards: Float[np.ndarray, " N"]
    seconds: float  # of decoding, compilation left out
    tokens: int


class _Writer:
    """Answers of methods to the same prompts; what several methods share is written once."""

    def __init__(self, task: Task, examples: Examples, pool: RewardPool) -> None:
        self._task, self._examples, self._pool = task, examples, pool
        self._known: dict[AnyMethod, _Answers] = {}

    def answers(self, method: AnyMethod, on_progress: Callable[[int], None] = lambda done: None) -> _Answers:
        if method not in self._known:
            if isinstance(method, Method):
                made = self._write(lambda part: method, on_progress)
            elif isinstance(method, Shuffled):
                made = self._write(self._shuffled(method.agent), on_progress)
            else:
                made = self._pick(method)
            self._known[method] = made
        on_progress(len(self._examples))
        return self._known[method]

    def _write(self, method_for: Callable[[slice], Method], on_progress: Callable[[int], None]) -> _Answers:
        """Greedy answers, their rewards, and how long decoding took.

        Args:
          method_for: gives the method for a batch of rows.
        """
        examples = self._examples
        batches: list[_Batch] = []
        pending = []
        seconds = 0.0
        compiled: set[int] = set()
        for start in range(0, len(examples), _ROWS):
            places = slice(start, min(start + _ROWS, len(examples)))
            method, part = method_for(places), examples.select(range(places.start, places.stop))
            if len(part) not in compiled:  # the first call of a size compiles, and is not timed
                compiled.add(len(part))
                _answer(method, self._task, part)
            began = time.perf_counter()
            batch = _answer(method, self._task, part)
            seconds += time.perf_counter() - began
            batches.append(batch)
            pending.append(self._pool.submit(part.prompts, batch.texts, part.references))
            on_progress(places.stop)
        return _Answers(
            [text for batch in batches for text in batch.texts],
            [reason for batch in batches for reason in batch.finish_reasons],
            [used for batch in batches for used in batch.weights],
            np.concatenate([rewards.result() for rewards in pending]),
            seconds,
            sum(batch.tokens for batch in batches),
        )

    def _shuffled(self, agent: Method) -> Callable[[slice], Method]:
        used = self.answers(agent).weights
        spans = max(map(len, used))
        filled = np.stack([np.pad(row, ((0, spans - len(row)), (0, 0)), mode="edge") for row in used])
        filled = filled[np.random.default_rng(0).permutation(len(filled))]
        length = agent.span_length or _policy(agent).span_length
        return lambda part: _replayed(agent.ensemble, self._task, filled[part], length)

    def _pick(self, method: Pick) -> _Answers:
        members = [self.answers(one) for one in method.methods]
        rewards = np.stack([one.rewards for one in members])
        votes = rewards if method.oracle else self._agreement([one.texts for one in members])
        chosen = np.argmax(votes, axis=0)  # the first of the best
        return _Answers(
            [members[k].texts[n] for n, k in enumerate(chosen)],
            [members[k].finish_reasons[n] for n, k in enumerate(chosen)],
            [np.eye(len(members))[[k]] for k in chosen],
            np.take_along_axis(rewards, chosen[None], axis=0)[0],
            sum(one.seconds for one in members),
            sum(one.tokens for one in members),
        )

    def _agreement(self, texts: Sequence[Sequence[str]]) -> Float[np.ndarray, "K N"]:
        """How many members' answers say the same as each member's. Two answers are the same if the reward takes the one
        for the other, so that what it takes no notice of makes no difference here either, or if their texts are."""
        stripped = np.array([[text.strip() for text in column] for column in texts])
        same = stripped[:, None] == stripped[None]
        # Another pool: that a reward cannot take an answer as a reference is no problem to be told.
        with RewardPool(self._task.reward) as pool:
            pairs = list(itertools.permutations(range(len(texts)), 2))
            pending = [pool.submit(self._examples.prompts, texts[i], texts[j]) for i, j in pairs]
            for (i, j), scores in zip(pairs, pending, strict=True):
                same[i, j] |= scores.result() == 1
        return (same | same.swapaxes(0, 1)).sum(axis=1)


def _policy(agent: Method) -> BoundPolicy:
    """An agent's policy.

    Raises:
      InputError: a method without one.
    """
    if not isinstance(agent.weights, BoundPolicy):
        raise InputError(f"an agent needs a trained policy as its weights, not {type(agent.weights).__name__}")
    return agent.weights


def search_size(points: int, prompts: int) -> int:
    """How many answers a search among so many points looks at."""
    return search.search_size(points, prompts, _FIRST_PROMPTS, again=True)


def _search_prompts(task: Task, points: int, budget: Budget) -> int:
    """On how many training prompts a search has to try its points."""
    most = len(task.split("train"))
    if budget.prompts is not None:
        return min(budget.prompts, most)
    enough = (n for n in range(SEARCH_PROMPTS, most, 64) if search_size(points, n) >= budget.answers)
    return min(next(enough, most), most)


def _filled(rows: Sequence[_Row]) -> Iterator[tuple[Sequence[_Row], int]]:
    """Batches of rows, and how many of each count. Where there are several, the last is filled up with rows that do
    not, so that all run the same program."""
    for start in range(0, len(rows), _ROWS):
        part = rows[start : start + _ROWS]
        missing = _ROWS - len(part) if start else 0
        yield [*part, *rows[:missing]], len(part)


def _search(
    name: str, ensemble: Ensemble, task: Task, candidates: Float[np.ndarray, "W P K"], budget: Budget
) -> tuple[int, int]:
    """Which of the weights per span has the best mean reward on training prompts; of equally good ones the nearest to
    uniform. And at how many answers it looked.

    All are tried on a few prompts, the better ones on four times as many, and so on; the last round reads all prompts.
    A batch holds several candidates, as weights are per row.
    """
    examples = task.split("train").take(_search_prompts(task, len(candidates), budget))
    distances = np.sum((candidates - 1 / candidates.shape[2]) ** 2, axis=(1, 2))
    left = list(range(len(candidates)))
    done, total = 0, search_size(len(candidates), len(examples))
    with RewardPool(task.reward) as pool, report.progress(f"search for {name}", total, "answers") as update:
        for n, kept in search.halving_rounds(len(candidates), len(examples), _FIRST_PROMPTS):
            rows = [(point, i) for point in left for i in range(n)]
            pending = []
            for batch, counting in _filled(rows):
                points, places = zip(*batch, strict=True)
                part, weights = examples.select(places), candidates[list(points)]
                if task.by_likelihood:  # each option is a row
                    weights = np.repeat(weights, [len(own) for own in part.options or ()], axis=0)
                texts = _answer(_replayed(ensemble, task, weights, task.span_length), task, part).texts[:counting]
                pending.append(pool.submit(part.prompts[:counting], texts, part.references[:counting]))
                done += counting
                update(done, "")
            scores = (
                np.concatenate([rewards.result() for rewards in pending])
                .reshape(len(left), n)
                .mean(axis=1, dtype=np.float64)
            )
            order = np.lexsort((distances[left], -scores))
            left = [left[i] for i in order[:kept]]
    return left[0], done


def _with(grid: Float[np.ndarray, "W K"], weights: Float[np.ndarray, " K"]) -> Float[np.ndarray, "W K"]:
    """The grid and a point that may lie beside it."""
    known = np.any(np.all(np.isclose(grid, weights, atol=1e-6), axis=1))
    return grid if known else np.concatenate([grid, weights[None]]).astype(np.float32)


def _uniform(members: int) -> Float[np.ndarray, " K"]:
    return np.full(members, 1 / members, np.float32)


def static_weights(ensemble: Ensemble, task: Task, budget: Budget = _NO_BUDGET) -> tuple[Float[np.ndarray, " K"], int]:
    """The best fixed weights: the simplex grid of step 0.05, which has the one-hots, and equal weights, on training
    prompts.

    Returns the weights, and at how many answers it looked.
    """
    members = len(ensemble.members)
    grid = _with(simplex_grid(members, STATIC_STEP), _uniform(members))
    best, looked = _search("static", ensemble, task, grid[:, None], budget)
    return grid[best], looked


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
    spans = _spans(task, task.span_length)
    weights = np.tile(start, (spans, 1)).astype(np.float32)
    looked = 0
    for p in range(spans):
        points = _with(grid, weights[p])
        candidates = np.repeat(weights[None], len(points), axis=0)
        candidates[:, p] = points
        name = f"schedule, span {p + 1} of {spans}"
        best, size = _search(name, ensemble, task, candidates, budget._replace(answers=-(-budget.answers // spans)))
        weights[p] = points[best]
        looked += size
    return BoundPolicy(Schedule(), weights, Dims(ensemble.widths, spans), task.span_length), looked


# Values that are tried; of equally good ones the first is taken.
_TEMPERATURES = {
    "perplexity": (1.0, 0.3, 0.1, 0.03, 0.01, 3.0, 10.0),
    "consistency": (0.25, 0.1, 0.05, 0.02, 0.5, 1.0, 2.5),
}
_THRESHOLDS = (0.5, 0.3, 0.7, 0.8, 0.9, 0.95, 0.99)
_TOP_KS = (10, 1, 2, 3, 5, 20, 50)


def _tuned(
    name: str, task: Task, options: Sequence[Mapping[str, Any]], budget: Budget, make: Callable[..., Method]
) -> Method:
    """The method of the options that have the best mean reward on training prompts; of equally good ones the first."""
    n = budget.prompts or max(SEARCH_PROMPTS, -(-budget.answers // len(options)))
    examples = task.split("train").take(min(n, len(task.split("train"))))
    began = time.perf_counter()
    scores = []
    with (
        RewardPool(task.reward) as pool,
        report.progress(f"search for {name}", len(options) * len(examples), "answers") as update,
    ):
        for option in options:
            pending = []
            for batch, counting in _filled(range(len(examples))):
                part = examples.select(batch)
                texts = _answer(make(**option), task, part).texts[:counting]
                pending.append(pool.submit(part.prompts[:counting], texts, part.references[:counting]))
            scores.append(np.mean(np.concatenate([rewards.result() for rewards in pending])))
            update(len(scores) * len(examples), "")
    best = options[int(np.argmax(scores))]
    return dataclasses.replace(make(**best), found={**best, **_cost(len(options) * len(examples), began)})


def _cost(answers: int, began: float) -> dict[str, Any]:
    """What a search took, for results.json."""
    return {"searched": answers, "search_seconds": time.perf_counter() - began}


def _untrained(ensemble: Ensemble, task: Task, policy: Any, span_length: int, **settings: float) -> Method:
    """A policy that needs no training, under other settings."""
    dims = Dims(ensemble.widths, _spans(task, span_length))
    params = {name: np.float32(value) if isinstance(value, float) else value for name, value in settings.items()}
    return Method(ensemble, BoundPolicy(Tunable(policy, tuple(params)), params, dims, span_length))


def with_fusion(ensemble: Ensemble, fusion: str) -> Ensemble:
    """The same members under another operator."""
    return ensemble.with_fusion(fusion)


# In the order of the table.
BASELINES = ("uniform", "static", "confidence", "schedule")
ALL = (
    *("uniform", "static", "schedule", "router", "confidence", "perplexity", "consistency", "gate", "topk"),
    *("random", "shuffled", "vote", "oracle"),
)


def baseline_methods(
    ensemble: Ensemble,
    task: Task,
    names: Sequence[str] | None = None,
    *,
    agents: Mapping[str, Sequence[Method]] | None = None,
    config: PPOConfig | None = None,
    runs: Path | None = None,
    search_prompts: int | None = None,
) -> dict[str, AnyMethod | list[AnyMethod]]:
    """The methods to compare agents with, by name; several seeds of one are a list.

    Args:
      names: None means each member alone and `BASELINES`. "all" stands for each member alone and all of `ALL` for which
        there is what they need: `shuffled` needs an agent, `router` a directory, `perplexity` members that are no
        encoder-decoders.
      agents: trained ones by name; `shuffled` is the first of them, with each of its seeds.
      config: of the router: the agents' own settings. Every search looks at no fewer answers than an agent saw with
        them in training, if the train split has enough prompts.
      search_prompts: of the train split, that searches read at most; see `Budget`.
      runs: where the router's run is kept (as `router`), and taken up again.

    Raises:
      InputError: an unknown name, or one that lacks what it needs.
    """
    task = _with_room(ensemble, task)
    singles = member_names(ensemble)
    agent = next(iter((agents or {}).values()), ())
    known = [*singles, *ALL]
    lacking = {}
    if not agent or any(getattr(_policy(method).policy, "span_lengths", ()) for method in agent):
        # Weights per span do not say for which steps they were, where an agent chooses how long its spans are.
        lacking["shuffled"] = "needs a trained agent (--policy RUN) whose spans all have the same length"
    if runs is None:
        lacking["router"] = "is trained, and needs a directory for its run"
    if task.by_likelihood:
        lacking |= dict.fromkeys(("router", "shuffled"), "is for written answers, not for the likeliest option")
    if not ensemble.continues:
        lacking["perplexity"] = "reads how likely a prompt is, which an encoder-decoder cannot say"
    if names is None:
        names = [*singles, *BASELINES]
    elif "all" in names:
        possible = [name for name in known if name not in lacking]
        names = list(dict.fromkeys(name for given in names for name in (possible if given == "all" else [given])))
        for name, reason in lacking.items():
            report.console.print(f"left out: {name} {reason}", highlight=False, markup=False)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(
            f"methods {', '.join(unknown)} are unknown; known: {', '.join(known)}, all (agents: --policy RUN)"
        )
    for name in names:
        if name in lacking:
            raise InputError(f"method {name} {lacking[name]}")
    length = task.span_length
    seen = 0 if config is None else config.iterations * config.prompts * config.samples
    budget = Budget(seen, search_prompts)

    def single(name: str) -> Method:
        k = singles.index(name)
        # Alone, a member is itself under any operator.
        return Method(Ensemble([ensemble.members[k]], end_ids=ensemble.member_ends[k]), None, length)

    def static() -> Method:
        began = time.perf_counter()
        weights, looked = static_weights(ensemble, task, budget)
        return Method(ensemble, weights, length, {"weights": np.round(weights, 4).tolist(), **_cost(looked, began)})

    def schedule() -> Method:
        start = made("static")
        assert isinstance(start, Method)
        began = time.perf_counter() - start.found["search_seconds"]
        policy, looked = schedule_weights(ensemble, task, np.asarray(start.weights), budget)
        cost = _cost(looked + start.found["searched"], began)
        return Method(ensemble, policy, None, {"weights": np.round(policy.params, 4).tolist(), **cost})

    def router() -> list[AnyMethod]:
        assert runs is not None
        return [Method(ensemble, policy) for policy in train_router(ensemble, task, config, runs / "router")]

    def tuned(name: str, policy: Any, options: Sequence[Mapping[str, Any]], span_length: int) -> Method:
        return _tuned(
            name, task, options, budget, lambda **option: _untrained(ensemble, task, policy, span_length, **option)
        )

    def temperatures(name: str) -> list[dict[str, float]]:
        return [{"temperature": value} for value in _TEMPERATURES[name]]

    thresholds = [{"threshold": t, "member": m} for t in _THRESHOLDS for m in range(len(singles))]
    spans = _spans(task, length)
    # Where k is the whole vocabulary, topk is uniform.
    entries = max(lm.config.vocab for lm in ensemble.members)
    drawn = BoundPolicy(
        RandomWeights(), np.ones(len(singles), np.float32), Dims(ensemble.widths, spans), length, sample=True
    )

    def alone() -> tuple[Method, ...]:
        return tuple(made(name) for name in singles)  # type: ignore[misc]

    makers: dict[str, Callable[[], AnyMethod | list[AnyMethod]]] = {
        **{name: functools.partial(single, name) for name in singles},
        "uniform": lambda: Method(ensemble, None, length),
        "static": static,
        "schedule": schedule,
        "router": router,
        "confidence": lambda: Method(ensemble, Confidence(), 1),
        "perplexity": lambda: tuned("perplexity", Perplexity(), temperatures("perplexity"), length),
        "consistency": lambda: tuned("consistency", Consistency(), temperatures("consistency"), 1),
        "gate": lambda: tuned("gate", Gate(), thresholds, 1),
        "topk": lambda: _tuned(
            *("topk", task, [{"k": k} for k in _TOP_KS if k < entries], budget),
            lambda k: Method(with_fusion(ensemble, f"topk:{k}"), None, length),
        ),
        "random": lambda: Method(ensemble, drawn),
        "shuffled": lambda: [Shuffled(method) for method in agent],
        "vote": lambda: Pick(alone()),
        "oracle": lambda: Pick(alone(), oracle=True),
    }

    @functools.cache
    def made(name: str) -> AnyMethod | list[AnyMethod]:
        return makers[name]()

    return {name: made(name) for name in names}


def train_router(ensemble: Ensemble, task: Task, config: PPOConfig | None, out: Path) -> list[BoundPolicy]:
    """The same agent with the same training, but one action for the whole answer. Goes on with the run in `out`."""
    config = PPOConfig() if config is None else config
    agent = dataclasses.replace(config.agent, span_lengths=())
    longest = task.max_new_tokens
    config = dataclasses.replace(config, agent=agent, span_length=longest, max_new_tokens=longest)
    with report.progress("training router", config.iterations, "iterations") as update:

        def show(progress: Any) -> None:
            update(progress.iteration, f"reward {progress.metrics['reward']:.3f}")

        return train_seeds(ensemble, task, config, out, resume=True, on_progress=show)


def router_config(runs: Sequence[Path]) -> PPOConfig | None:
    """The settings of a router that is to be compared with these runs' agents: the first algorithm's, PPO's if it is
    among them, with as many seeds as there are agents of it, and as many iterations as were done at most. None where
    there are no runs."""
    configs = sorted((read_run(run)[0] for run in runs), key=lambda config: config.algorithm != "ppo")
    if not configs:
        return None
    done = max((row["iteration"] for run in runs for row in read_metrics(Path(run))), default=configs[0].iterations)
    seeds = sum(config.seeds for config in configs if config.algorithm == configs[0].algorithm)
    return dataclasses.replace(configs[0], seeds=seeds, iterations=done)


def load_agents(ensemble: Ensemble, task: Task, runs: Sequence[Path]) -> dict[str, list[Method]]:
    """The agents of run directories by name, `rlae_ppo` or `rlae_mappo`. Several runs of one algorithm, and the agents
    that a run trained side by side, are its seeds.

    Raises:
      InputError: not a run directory, or an agent of other members or for shorter answers than the task's.
    """
    agents: dict[str, list[Method]] = {}
    task = _with_room(ensemble, task)
    for run in runs:
        config, _ = read_run(run)
        for policy in [load_policy(run, seed=config.seed + e) for e in range(config.seeds)]:
            ensemble.bind(policy, 1, _spans(task, policy.span_length))  # tells now what does not fit
            agents.setdefault(f"rlae_{config.algorithm}", []).append(Method(ensemble, policy))
        check_members(run, ensemble)
    return agents


def _seeds(method: AnyMethod | Sequence[AnyMethod]) -> list[AnyMethod]:
    return list(method) if isinstance(method, Sequence) else [method]


def evaluate(
    methods: Mapping[str, AnyMethod | Sequence[AnyMethod]],
    task: Task,
    split: str = "test",
    *,
    out: Path | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Runs every method on the same prompts and returns (and, with `out`, writes) the content of results.json.

    Agents, whose names begin with `rlae_`, are compared with each other method; without agents all are compared with
    `uniform`. All p-values of a table are corrected together.

    Args:
      methods: name -> method, in the order of the table. A list holds the seeds of a method, each of which may have its
        own ensemble; seed s of one is compared with seed s of another (see `statistics.paired_difference`).
      out: a run directory; `results.json` and `predictions.jsonl` are written into it.
      limit: only the split's first prompts.

    Raises:
      InputError: an unknown or empty split, prompts that do not fit.
    """
    examples = task.split(split)
    if limit is not None:
        examples = examples.take(limit)
    began = time.perf_counter()
    answers: dict[str, list[_Answers]] = {}
    table: dict[str, Any] = {}
    predictions: list[dict[str, Any]] = []
    total = sum(len(_seeds(method)) for method in methods.values()) * len(examples)
    done = 0
    with RewardPool(task.reward) as pool, report.progress("evaluation", total, "answers") as update:
        writer = _Writer(task, examples, pool)
        for name, method in methods.items():
            answers[name] = []
            for seed, one in enumerate(_seeds(method)):
                answers[name].append(writer.answers(one, functools.partial(_shift, update, done, name)))
                done += len(examples)
                predictions += _predictions(name, seed, examples, answers[name][-1])
            table[name] = _measured(_seeds(method), answers[name])
    if pool.problems:
        report.console.print(str(pool.problems), highlight=False, markup=False)
    results = {
        "schema": 1,
        "task": task.name,
        "split": split,
        "methods": table,
        "differences": _differences(
            {name: _rewards(seeds) for name, seeds in answers.items() if not table[name].get("reference")}
        ),
        "seconds": {"evaluation": time.perf_counter() - began},
        "environment": report.environment(),
    }
    if out is not None:
        files.write_json_lines(out / "predictions.jsonl", predictions)
        files.write_json(out / "results.json", results)
    return results


def _shift(update: report.Update, before: int, note: str, done: int) -> None:
    update(before + done, note)


def _rewards(seeds: Sequence[_Answers]) -> Float[np.ndarray, "S N"]:
    return np.stack([answers.rewards for answers in seeds]).astype(np.float64)


def _measured(methods: Sequence[AnyMethod], seeds: Sequence[_Answers]) -> dict[str, Any]:
    """A method's entry in results.json."""
    seconds = sum(answers.seconds for answers in seeds)
    rewards = _rewards(seeds)
    row = _row(rewards) | {
        "ms_per_token": seconds * 1e3 / max(sum(answers.tokens for answers in seeds), 1),
        "ms_per_answer": seconds * 1e3 / rewards.size,
    }
    if any(isinstance(method, Pick) and method.oracle for method in methods):
        row["reference"] = True
    found = [method.found for method in methods if isinstance(method, Method)]
    for key in found[0] if found else ():
        row[key] = found[0][key] if len(found) == 1 else [one[key] for one in found]
    return row


def _row(rewards: Float[np.ndarray, "S N"]) -> dict[str, Any]:
    """What an entry in results.json says about rewards."""
    score = float(np.mean(rewards))
    binary = bool(np.all((rewards == 0) | (rewards == 1)))
    return {
        "score": score,
        "accuracy": score if binary else None,
        "n": rewards.shape[1],
        "ci95": list(statistics.interval95(rewards)),
        "per_seed": rewards.mean(axis=1).tolist(),
        "scores": {"reward": score},
    }


def join_results(directories: Sequence[str | os.PathLike[str]]) -> dict[str, Any]:
    """Evaluations of the same methods on the same prompts, each with its own members and agents, as one results.json
    with all their seeds. Times are means; what searches found is listed.

    Args:
      directories: each has the `results.json` and `predictions.jsonl` that `evaluate` wrote.

    Raises:
      InputError: evaluations that differ in their prompts, in their methods, or in how many seeds a method has.
    """
    paths = [Path(directory) for directory in directories]
    parts = [files.read_json(path / "results.json") for path in paths]
    rewards: list[dict[str, Float[np.ndarray, "S N"]]] = []
    asked = set()
    for path, part in zip(paths, parts, strict=True):
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in part["methods"]}
        for row in files.read_json_lines(path / "predictions.jsonl"):
            rows[row["method"]].append(row)
        rewards.append(
            {
                name: np.array([row["reward"] for row in of]).reshape(-1, part["methods"][name]["n"])
                for name, of in rows.items()
            }
        )
        prompts = tuple(row["prompt"] for of in rows.values() for row in of if row["seed"] == 0)
        shape = tuple((name, table.shape) for name, table in rewards[-1].items())
        asked.add((part["task"], part["split"], shape, prompts))
    if len(asked) != 1:
        names = " and ".join(map(str, paths[:2]))
        raise InputError(
            f"evaluations differ in their prompts, methods or seeds, such as {names}; they cannot be joined"
        )
    joined = {name: np.concatenate([part[name] for part in rewards]) for name in rewards[0]}
    table: dict[str, Any] = {}
    for name, values in joined.items():
        of = [part["methods"][name] for part in parts]
        table[name] = _row(values)
        for key in of[0].keys() - table[name].keys():
            found = [one[key] for one in of]
            if key in ("ms_per_token", "ms_per_answer"):
                table[name][key] = float(np.mean(found))
            else:
                table[name][key] = found[0] if key == "reference" else found
    return {
        "schema": 1,
        "task": parts[0]["task"],
        "split": parts[0]["split"],
        "methods": table,
        "differences": _differences({name: v for name, v in joined.items() if not table[name].get("reference")}),
        "seconds": {"evaluation": sum(part["seconds"]["evaluation"] for part in parts)},
        "environment": parts[0]["environment"],
    }


def _differences(rewards: Mapping[str, Float[np.ndarray, "S N"]]) -> list[dict[str, Any]]:
    """Agents against all others; without agents all against `uniform`."""
    agents = [name for name in rewards if name.startswith("rlae_")]
    pairs = [(a, b) for i, a in enumerate(agents) for b in rewards if b not in agents[: i + 1]]
    if not agents and "uniform" in rewards:
        pairs = [(a, "uniform") for a in rewards if a != "uniform"]
    found = [statistics.paired_difference(rewards[a], rewards[b]) for a, b in pairs]
    corrected = statistics.holm([one.p for one in found])
    return [
        {"a": a, "b": b, "difference": one.difference, "ci95": list(one.ci95), "p": one.p, "p_holm": p}
        for (a, b), one, p in zip(pairs, found, corrected, strict=True)
    ]


def _predictions(name: str, seed: int, examples: Examples, answers: _Answers) -> Iterator[dict[str, Any]]:
    for index, text in enumerate(answers.texts):
        yield {
            "method": name,
            "seed": seed,
            "index": index,
            "prompt": examples.prompts[index],
            "reference": examples.references[index],
            "text": text,
            "reward": float(answers.rewards[index]),
            "finish_reason": answers.finish_reasons[index],
            "weights": np.round(answers.weights[index], 4).tolist(),
        }


def transfer_matrix(
    agents: Mapping[str, BoundPolicy | Sequence[BoundPolicy]],
    pools: Mapping[str, Ensemble | Sequence[Ensemble]],
    tasks: Mapping[str, Task],
    split: str = "test",
    *,
    limit: int | None = None,
) -> dict[str, Any]:
    """Scores of agents on tasks that they were not trained on, each with the members of the task that it is tested on.

    Args:
      agents: by the name of the task that they were trained on; several are seeds.
      pools: by the name of the task; with several, seed s of an agent is tested on pool s.
      tasks: the columns.

    Returns {"split", "rows", "columns", "scores", "ci95", "per_seed"}; the last three are [row][column].

    Raises:
      InputError: a task without a pool, seeds that do not match, members of other widths than an agent's.
    """
    missing = [name for name in tasks if name not in pools]
    if missing:
        raise InputError(f"no members for tasks {', '.join(missing)}; there are some for {', '.join(pools)}")
    columns: dict[str, Any] = {}
    for name, task in tasks.items():
        methods: dict[str, list[AnyMethod]] = {}
        for row, agent in agents.items():
            policies = [agent] if isinstance(agent, BoundPolicy) else list(agent)
            pool = pools[name]
            members = [pool] * len(policies) if isinstance(pool, Ensemble) else list(pool)
            if len(members) != len(policies):
                raise InputError(f"{len(policies)} agents of {row} for {len(members)} sets of members of {name}")
            methods[row] = [Method(m, policy) for m, policy in zip(members, policies, strict=True)]
        columns[name] = evaluate(methods, task, split, limit=limit)["methods"]

    def cells(key: str) -> list[list[Any]]:
        return [[columns[column][row][key] for column in columns] for row in agents]

    return {
        "split": split,
        "rows": list(agents),
        "columns": list(columns),
        "scores": cells("score"),
        "ci95": cells("ci95"),
        "per_seed": cells("per_seed"),
    }
