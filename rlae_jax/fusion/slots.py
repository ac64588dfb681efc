"""Rows that begin at different times, as an engine's: reading a part of a prompt, a newcomer's row, and a number of
steps of all rows.

    read_first   [1, W] tokens of one prompt into a cache of its own, which has no rings
    read_chunk   and the next ones
    admit        that cache into a row of the batch's, behind the slot that all rows write next
    advance      all rows some steps on
    resize       caches with more or fewer slots

A row's answer does not depend on the other rows: it reads its own slots, draws with its own key, and stands at its own
step (`state.RowOptions`). What is written by `advance` comes back as `Answers` of these steps alone.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Integer

from rlae_jax.compilation import jit
from rlae_jax.fusion.decode import begin, decode_spans
from rlae_jax.fusion.lockstep import Lockstep
from rlae_jax.fusion.members import ForwardPass, MemberParams, bind_members
from rlae_jax.fusion.menu import Menu
from rlae_jax.fusion.policy import Fixed
from rlae_jax.fusion.prompts import Prompts
from rlae_jax.fusion.ragged import WIDEST, Ragged, RaggedMember
from rlae_jax.fusion.sampling import RowSampling
from rlae_jax.fusion.spec import DecodeSpec
from rlae_jax.fusion.state import Answers, DecodeState, RowOptions, answers_of
from rlae_jax.models import ModelConfig, lora, transformer
from rlae_jax.models.cache import Cache, LayerCache, empty_cache, visible, write_chunk

# The step of the next decision of a row that takes none: beyond every answer's end.
NEVER = 2**30
# The slot that is written first where all rows write the same one: no prompt before it has negative ones.
_FIRST = 2**20


def no_options(rows: int) -> RowOptions:
    """Of rows that are not in use."""
    zeros, ones = jnp.zeros((rows,), jnp.int32), jnp.ones((rows,))
    sampling = RowSampling(jnp.zeros((rows,)), zeros, ones, jnp.zeros((rows,)), ones)
    return RowOptions(sampling, zeros, jnp.zeros((rows,), bool), zeros, zeros + 1, zeros - 1, zeros, zeros)


@functools.partial(jit, static_argnames=("rows", "slots"))
def empty_state(
    params: tuple[MemberParams, ...], prompts: Prompts, spec: DecodeSpec, rows: int, slots: int
) -> DecodeState:
    """All rows free.

    Args:
      prompts: of as many rows, for what is kept of a prompt; its own tokens do not count.
      slots: of every row's cache.
    """
    passes = bind_members(params, spec, rows)
    zeros = jnp.zeros((rows,), jnp.int32)
    members: Lockstep | Ragged
    if spec.union is None:
        caches = tuple(empty_cache(run.model.config, rows * run.members, slots) for run in passes)
        members = Lockstep(zeros, zeros, zeros + _FIRST, zeros + _FIRST, caches)
    else:
        members = Ragged(tuple(_empty_member(run, rows, slots) for run in passes), zeros)
    state = begin(members, passes, prompts, spec, no_options(rows))
    if state.decisions.next_step is not None:
        state = state._replace(decisions=state.decisions._replace(next_step=zeros + NEVER))
    return _strong(state)


def _strong(state: DecodeState) -> DecodeState:
    """The same without weak types, which would make every program's state another one's argument of another kind."""

    def one(leaf: Array) -> Array:
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return leaf if is_key else lax.convert_element_type(leaf, leaf.dtype)

    strong: DecodeState = jax.tree.map(one, state)
    return strong


def _empty_member(run: ForwardPass, rows: int, slots: int) -> RaggedMember:
    config, zeros = run.model.config, jnp.zeros((rows,), jnp.int32)
    return RaggedMember(
        text=jnp.zeros((rows, slots), jnp.int32),
        written=zeros,
        fed=zeros,
        lengths=zeros,
        starts=zeros,
        room=zeros,
        hidden=jnp.zeros((rows, config.hidden_width), config.dtype),
        cache=empty_cache(config, rows, slots + WIDEST, WIDEST),
    )


@functools.partial(jit, static_argnames=("config", "rows", "slots"))
def empty_prompt(config: ModelConfig, rows: int, slots: int) -> Cache:
    """Where a prompt is read into: a member's rows, no rings."""
    return empty_cache(config, rows, slots, ahead=None)


@functools.partial(jit, static_argnames="slots")
def resize(state: DecodeState, spec: DecodeSpec, slots: int) -> DecodeState:
    """The same with caches of so many slots, where all rows write the same one."""
    assert isinstance(state.members, Lockstep)
    return state._replace(members=state.members.resize(slots, spec))


@functools.partial(jit, static_argnames="slots")
def grow(cache: Cache, slots: int) -> Cache:
    """A prompt's cache with more slots."""

    def pad(leaf: Array) -> Array:
        return jnp.pad(leaf, [*[(0, 0)] * (leaf.ndim - 1), (0, slots - cache.slots)])

    return dataclasses.replace(_of_slots(cache, pad), slots=slots)


def _of_slots(cache: Cache, change: Callable[[Array], Array]) -> Cache:
    """A cache with every array changed that has slots."""
    layers = tuple(jax.tree.map(change, layer) if isinstance(layer, LayerCache) else layer for layer in cache.layers)
    return dataclasses.replace(cache, layers=layers)


def _model(params: MemberParams, config: ModelConfig, members: int) -> transformer.Model:
    """Of a row for each of the members that one pass runs."""
    if members > 1 and isinstance(params, lora.Adapted):
        params = params._replace(weights=jnp.eye(members))
    return transformer.Model.bind(config, params, members)


@functools.partial(jit, static_argnames=("config", "members", "slots"))
def read_first(
    params: MemberParams, ids: Int[Array, "1 W"], count: Int[Array, ""], config: ModelConfig, members: int, slots: int
) -> Cache:
    """A cache of one prompt after its first `count` tokens, which are the last ones of `ids`: as `generate` reads them,
    since what `read_chunk` would look for in the cache is not there.

    Args:
      members: that one pass runs, a row each: adapters of one base.
    """
    w = ids.shape[1]
    real = jnp.arange(w)[None] >= w - count
    ids, real = (jnp.tile(array, (members, 1)) for array in (ids, real))
    cache = _model(params, config, members).read_prompt(ids, real)
    read: Cache = grow(_of_slots(cache, lambda leaf: jnp.roll(leaf, count - w, axis=-1)), slots)
    return read


@functools.partial(jit, static_argnames=("config", "members"))
def read_chunk(
    params: MemberParams,
    cache: Cache,
    ids: Int[Array, "1 W"],
    slot: Int[Array, ""],
    count: Int[Array, ""],
    config: ModelConfig,
    members: int,
) -> Cache:
    """The cache of one prompt after its next `count` tokens, which go into the slots from `slot` on.

    Args:
      members: that one pass runs, a row each: adapters of one base.
    """
    model = _model(params, config, members)
    w = ids.shape[1]
    starts, slots = jnp.zeros((members,), jnp.int32), jnp.full((members,), slot)
    behind = visible(cache, config, starts, slots - 1)
    positions = slots[:, None] + jnp.arange(w)[None]
    counts = jnp.full((members,), count)
    _, new = model.decode_chunk(jnp.tile(ids, (members, 1)), positions, counts, cache, behind, slots)
    return write_chunk(cache, new, slots)


@functools.partial(jit, donate_argnames="state")
def admit(
    params: tuple[MemberParams, ...],
    state: DecodeState,
    read: tuple[Cache, ...],
    prompts: Prompts,
    row: Int[Array, ""],
    seed: Integer[Array, ""],
    sample: Int[Array, ""],
    several: Bool[Array, ""],
    options: RowOptions,
    weights: Float[Array, "1 K"],
    room: Int[Array, ""],
    spec: DecodeSpec,
) -> DecodeState:
    """A row begins anew.

    Args:
      read: by each forward pass, from `read_first` and `read_chunk`; all but the prompt's last token.
      prompts: of one row, without keys.
      seed, sample, several: which of a request's samples the row is, and whether there are several.
      options: of this row.
      weights: for the whole answer, if it follows no policy.
      room: with a union, the tokens that each member may write.
    """
    passes = bind_members(params, spec, len(state.done))
    members: Lockstep | Ragged
    if isinstance(state.members, Lockstep):
        members = state.members.admit(row, prompts.ids[0], prompts.mask[0], read, passes)
    else:
        members = state.members.admit(row, prompts, read, room, passes)
    # As the first row of `Ensemble.generate`, see `state.repeat_rows`.
    key = jax.random.fold_in(jax.random.key(seed), 0)
    keys = jnp.where(several, jax.random.fold_in(key, sample), key)[None]
    prompts = prompts._replace(keys=keys)
    one = begin(members, bind_members(params, spec, 1), prompts, spec, options)
    decisions = one.decisions._replace(span=one.decisions.span._replace(weights=weights))
    if decisions.next_step is not None:
        decisions = decisions._replace(next_step=jnp.where(options.policy < 0, NEVER, 0))
    one = one._replace(decisions=decisions)

    def put(whole: Array, own: Array) -> Array:
        return whole.at[row].set(own[0])

    others: DecodeState = jax.tree.map(put, state._replace(members=None), one._replace(members=None))  # type: ignore[arg-type]
    return _strong(others._replace(members=members, clock=state.clock))


@functools.partial(jit, donate_argnames="state")
def advance(
    params: tuple[MemberParams, ...],
    state: DecodeState,
    policy_params: Any,
    going: Bool[Array, " B"],
    steps: Int[Array, ""],
    spec: DecodeSpec,
) -> tuple[DecodeState, Answers]:
    """All rows up to `steps` steps on, and what they wrote in these.

    Args:
      policy_params: the policy's; with a `Menu` those of each of its policies; with `Fixed` weights are the rows' own.
      going: rows that are in use; what others wrote so far is given up.
    """
    state = _turn_page(state._replace(done=state.done | ~going))
    if isinstance(state.members, Lockstep):
        state = state._replace(members=state.members.rebase())
    options = state.rows.options
    assert options is not None
    if isinstance(spec.policy, Menu):
        policy_params = (options.policy, options.span_length, policy_params)
    elif isinstance(spec.policy, Fixed):
        policy_params = state.decisions.span.weights
    state = decode_spans(params, state, policy_params, spec, steps)
    return _strong(state), answers_of(state)


def _turn_page(state: DecodeState) -> DecodeState:
    """The state with nothing written in its buffers: rows remember how far they are."""
    options, decisions = state.rows.options, state.decisions
    assert options is not None
    options = options._replace(steps=options.steps + state.steps, spans=options.spans + decisions.taken)
    zeros = jnp.zeros_like(state.steps)
    next_step = decisions.next_step
    if next_step is not None:
        next_step = next_step - state.steps
    return state._replace(
        clock=zeros,
        rows=state.rows._replace(options=options, limits=state.rows.limits - state.steps),
        decisions=decisions._replace(taken=zeros, next_step=next_step),
        ended=jnp.zeros_like(state.ended),
        failed=jnp.zeros_like(state.failed),
        steps=zeros,
    )
