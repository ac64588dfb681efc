"""A batch whose answers are written by fewer rows than it has: a row that ends is given the next prompt, so that one
long answer holds up one row and not the batch.

All prompts are read at once. Then `slots.advance` makes a few steps of all rows at a time; between these it is seen
which rows have ended. Nothing of it is the host's: it is traced into one program, in which rows take what waits.

    two rows    look     |       |       |       |       |
    row 0       prompt   0 0 0 0 0 0 . . 3 3 3 3 3 3 3 3
    row 1       prompt   1 1 1 . 2 2 2 2 2 2 2 . 4 . . .

An answer is that of `decode.decode_batch`, as a row draws with its prompt's key and stands at its own step.
"""

import dataclasses
import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from rlae_jax.fusion import slots
from rlae_jax.fusion.decode import begin
from rlae_jax.fusion.lockstep import Lockstep
from rlae_jax.fusion.members import ForwardPass, MemberParams, aligned, bind_members, prompt_cache
from rlae_jax.fusion.policy import ChoosesLength, Dims, Distribution, Observation, Policy
from rlae_jax.fusion.prompts import Prompts
from rlae_jax.fusion.ragged import Ragged
from rlae_jax.fusion.spec import DecodeSpec
from rlae_jax.fusion.state import Answers, DecodeState
from rlae_jax.models.cache import Cache, LayerCache, LayerState

_STEPS = 8  # at least, between two looks


class _Held(NamedTuple):
    """A distribution whose actions all hold equally long."""

    of_weights: Distribution
    length: int

    def sample(self, keys: Key[Array, " B"]) -> Float[Array, "B A"]:
        return self.of_weights.sample(keys)

    def mode(self) -> Float[Array, "B A"]:
        return self.of_weights.mode()

    def log_prob(self, action: Float[Array, "B A"]) -> Float[Array, " B *N"]:
        return self.of_weights.log_prob(action)

    def entropy(self) -> Float[Array, " B"]:
        return self.of_weights.entropy()

    def to_weights(self, action: Float[Array, "B A"]) -> Float[Array, "B K"]:
        return self.of_weights.to_weights(action)

    def to_length(self, action: Float[Array, "B A"]) -> Int[Array, " B"]:
        return jnp.full((len(action),), self.length, jnp.int32)


@dataclasses.dataclass(frozen=True)
class Held:
    """A policy whose spans are all equally long as one that says so of each: rows then have spans of their own."""

    policy: Policy
    length: int

    @property
    def reads(self) -> tuple[str, ...]:
        return self.policy.reads

    @property
    def span_lengths(self) -> tuple[int, ...]:
        return (self.length,)

    def init(self, key: Key[Array, ""], dims: Dims) -> Any:
        """The policy's own parameters."""
        return self.policy.init(key, dims)

    def apply(self, params: Any, observation: Observation) -> tuple[ChoosesLength, Float[Array, " B"]]:
        of_weights, value = self.policy.apply(params, observation)
        return _Held(of_weights, self.length), value


class _Queue(NamedTuple):
    """What waits to be written: B prompts, which are read."""

    prompts: Prompts
    read: tuple[Cache, ...]  # by each forward pass; all but the last token, padded on the left, no rings
    begun: DecodeState  # before the first token, without members


class _Progress(NamedTuple):
    """How far A answers of E agents are, written by R rows."""

    state: DecodeState  # of the rows
    answer: Int[Array, " R"]  # which one each row writes; A where none
    taken: Int[Array, " E"]  # answers that were begun
    answers: Answers  # of all


def decode_queued(
    params: tuple[MemberParams, ...],
    prompts: Prompts,
    policy_params: Any,
    spec: DecodeSpec,
    rows: int,
    samples: int = 1,
) -> Answers:
    """As `decode.decode_batch` without scores, with so many rows that write.

    Args:
      rows: R. Where several agents act, whose prompts stand together, each has as many of them.
      samples: answers per prompt, one after another, which share its prefill.
    """
    agents = getattr(spec.policy, "agents", 1)
    each, rows = prompts.batch * samples // agents, rows // agents * agents
    page = _page(spec)
    passes = bind_members(params, page, rows)
    queue = _read(params, prompts, page)

    def look(progress: _Progress) -> _Progress:
        free = progress.state.done.reshape(agents, -1)
        place = progress.taken[:, None] + jnp.cumsum(free, axis=1, dtype=jnp.int32) - free.astype(jnp.int32)
        takes = free & (place < each)
        answer = jnp.where(free, agents * each, progress.answer.reshape(agents, -1))
        answer = jnp.where(takes, jnp.arange(agents)[:, None] * each + place, answer).reshape(-1)
        taken = progress.taken + jnp.sum(takes, axis=1, dtype=jnp.int32)
        state = _admit(progress.state, queue, answer, takes.reshape(-1), samples, passes, page)
        going = answer < agents * each
        state, written = slots.advance(params, state, policy_params, going, jnp.int32(page.max_new_tokens), page)
        return _Progress(state, answer, taken, _keep(progress.answers, state, written, answer))

    def unwritten(progress: _Progress) -> Bool[Array, ""]:
        return ~jnp.all(progress.state.done) | jnp.any(progress.taken < each)

    longest = max(ids.shape[1] for ids in prompts.ids)
    places = longest + 1 + (spec.max_new_tokens if spec.union is None else spec.member_tokens)
    start = _start(params, queue, page, rows, places)
    nothing = _no_answers(queue.begun, agents * each, spec)
    none = jnp.full((rows,), agents * each)
    progress = _Progress(start, none, jnp.zeros((agents,), jnp.int32), nothing)
    answers = lax.while_loop(unwritten, look, progress).answers
    if not spec.span_lengths:
        answers = answers._replace(trajectory=answers.trajectory._replace(length=None))
    return answers


def _page(spec: DecodeSpec) -> DecodeSpec:
    """Of the steps between two looks: whole spans, so that all rows take their decisions in the same steps."""
    if spec.span_lengths:
        return dataclasses.replace(spec, max_new_tokens=min(_STEPS, spec.max_new_tokens))
    spans = min(-(-_STEPS // spec.span_length), spec.spans)
    policy = Held(spec.policy, spec.span_length)
    return dataclasses.replace(spec, policy=policy, max_new_tokens=spans * spec.span_length)


def _read(params: tuple[MemberParams, ...], prompts: Prompts, page: DecodeSpec) -> _Queue:
    """Runs the members over all but the last token of each prompt."""
    b = prompts.batch
    passes = bind_members(params, page, b)
    caches = []
    for i, run in enumerate(passes):
        ids, real = aligned(*_own_ids(prompts, i))
        caches.append(prompt_cache(run, ids[:, :-1], real[:, :-1], ahead=ids.shape[1]))  # so much ahead, no ring
    options = slots.no_options(b)._replace(
        sampling=page.sampling.of_rows(b), min_new_tokens=jnp.full((b,), page.min_new_tokens, jnp.int32)
    )
    nobody = cast(Lockstep, None)
    return _Queue(prompts, tuple(caches), _without_seen(begin(nobody, passes, prompts, page, options), page))


def _without_seen(state: DecodeState, page: DecodeSpec) -> DecodeState:
    """Without [B, V] for the tokens that came, where no penalty looks at them."""
    return state if page.sampling.penalised else state._replace(seen=state.seen._replace(tokens=None))


def _own_ids(prompts: Prompts, i: int) -> tuple[Array, Array]:
    """The ids that a forward pass reads, and where there are any."""
    return prompts.ids[i % len(prompts.ids)], prompts.mask[i % len(prompts.mask)]


def _start(params: tuple[MemberParams, ...], queue: _Queue, page: DecodeSpec, rows: int, places: int) -> DecodeState:
    """All rows free."""
    some = jnp.arange(rows) % queue.prompts.batch
    prompts: Prompts = jax.tree.map(lambda leaf: leaf[some], queue.prompts)
    state: DecodeState = slots.empty_state(
        params, prompts._replace(active=jnp.zeros((rows,), bool)), page, rows, places
    )
    # Those of the queue, so that no prompt is read for others.
    scores = jax.tree.map(lambda leaf: leaf[some], queue.begun.rows.prompt_scores)
    return _without_seen(state._replace(rows=state.rows._replace(prompt_scores=scores)), page)


def _no_answers(begun: DecodeState, n: int, spec: DecodeSpec) -> Answers:
    """Room for n."""
    zeros, false = jnp.zeros((n,), jnp.int32), jnp.zeros((n,), bool)
    trajectory = jax.tree.map(lambda leaf: jnp.zeros((n, spec.spans, *leaf.shape[2:]), leaf.dtype), begun.trajectory)
    return Answers(~false, false, zeros, jnp.zeros((n, spec.max_new_tokens), jnp.int32), zeros, trajectory, None, false)


def _small(state: DecodeState) -> DecodeState:
    """The state without what a row's beginning does not change: of a page only what was written in it counts."""
    return state._replace(members=None, tokens=None, decisions=state.decisions._replace(trajectory=None))  # type: ignore[arg-type]


def _with(small: DecodeState, members: Lockstep | Ragged, tokens: Array, trajectory: Any) -> DecodeState:
    """The inverse of `_small`."""
    return small._replace(members=members, tokens=tokens, decisions=small.decisions._replace(trajectory=trajectory))


def _admit(
    state: DecodeState,
    queue: _Queue,
    answer: Int[Array, " R"],
    takes: Bool[Array, " R"],
    samples: int,
    passes: tuple[ForwardPass, ...],
    page: DecodeSpec,
) -> DecodeState:
    """Some rows begin the answers that they take."""
    prompt = jnp.minimum(answer // samples, queue.prompts.batch - 1)
    begun: DecodeState = jax.tree.map(lambda leaf: leaf[prompt], _small(queue.begun))
    if samples > 1:  # as in `state.repeat_rows`
        keys = jax.vmap(jax.random.fold_in)(begun.rows.keys, answer % samples)
        begun = begun._replace(rows=begun.rows._replace(keys=keys))

    def put(new: Array, old: Array) -> Array:
        return jnp.where(takes.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    small: DecodeState = jax.tree.map(put, begun, _small(state))
    newcomers_first = jnp.argsort(~takes, stable=True)

    def take_in(i: Array, members: Lockstep | Ragged) -> Lockstep | Ragged:
        row = newcomers_first[i]
        return _take_in(members, queue, row, prompt[row], passes, page)

    members = lax.fori_loop(0, jnp.sum(takes, dtype=jnp.int32), take_in, state.members)
    return _with(small, members, state.tokens, state.trajectory)


def _take_in(
    members: Lockstep | Ragged,
    queue: _Queue,
    row: Int[Array, ""],
    prompt: Int[Array, ""],
    passes: tuple[ForwardPass, ...],
    page: DecodeSpec,
) -> Lockstep | Ragged:
    """One row's members have read a prompt."""
    b = queue.prompts.batch
    read = []
    for i, (run, cache) in enumerate(zip(passes, queue.read, strict=True)):
        tokens = jnp.sum(_own_ids(queue.prompts, i)[1][prompt], dtype=jnp.int32) - 1
        take = functools.partial(_prompt_of, rows=[prompt + k * b for k in range(run.members)], tokens=tokens)
        read.append(dataclasses.replace(cache, layers=tuple(map(take, cache.layers))))
    own: Prompts = jax.tree.map(
        lambda leaf: lax.dynamic_slice_in_dim(jnp.asarray(leaf), prompt, 1), queue.prompts._replace(keys=None)
    )
    if isinstance(members, Lockstep):
        return members.admit(row, own.ids[0], own.mask[0], tuple(read), passes)
    return members.admit(row, own, tuple(read), jnp.int32(page.member_tokens), passes)


def _prompt_of(held: LayerCache | LayerState, rows: list[Array], tokens: Int[Array, ""]) -> LayerCache | LayerState:
    """Some rows of a layer; their last `tokens` places come first."""

    def take(leaf: Array) -> Array:
        taken = jnp.concatenate([lax.dynamic_slice_in_dim(leaf, row, 1) for row in rows])
        return jnp.roll(taken, tokens, axis=-1) if isinstance(held, LayerCache) else taken

    own: LayerCache | LayerState = jax.tree.map(take, held)
    return own


def _keep(answers: Answers, state: DecodeState, page: Answers, answer: Int[Array, " R"]) -> Answers:
    """All answers, with what rows wrote in a page behind what they had."""
    options = state.rows.options
    assert options is not None

    def append(whole: Array, part: Array, before: Int[Array, " R"], count: Int[Array, " R"]) -> Array:
        n = np.arange(part.shape[1])[None]
        places = jnp.where(n < count[:, None], before[:, None] + n, whole.shape[1])  # beyond the end nothing is written
        return whole.at[answer[:, None], places].set(part, mode="drop")

    spans = functools.partial(append, before=options.spans, count=page.decisions)
    return answers._replace(
        ended=answers.ended.at[answer].set(page.ended, mode="drop"),
        failed=answers.failed.at[answer].set(page.failed, mode="drop"),
        steps=answers.steps.at[answer].set(options.steps + page.steps, mode="drop"),
        tokens=append(answers.tokens, page.tokens, options.steps, page.steps),
        decisions=answers.decisions.at[answer].set(options.spans + page.decisions, mode="drop"),
        trajectory=jax.tree.map(spans, answers.trajectory, page.trajectory),
    )
