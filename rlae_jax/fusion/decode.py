"""The compiled decoding loop: K members, one fusion operator, one policy, one shared text.

In: the members' arrays, prompts Int[B, T] with their mask, a policy's parameters and a key. Out: a `DecodeState` with
the written tokens and the trajectory of spans. Everything is traced into one XLA program; the host sees nothing between
prompt and answer.

A step feeds each row's pending token to every member, fuses the K predictions and chooses the next pending token, so
that N tokens cost N forwards: the last prompt token is the first pending one, and the last token written is never fed.

    prompt   a b c d        prefill: a b c     pending: d
    step 0   feed d  ->  fuse  ->  choose e    pending: e     span 0: weights chosen between feed and fuse
    step 1   feed e  ->  fuse  ->  choose f    pending: f
    ...                                                       span p begins at step p * L

The policy acts inside a `cond` that sees only its small observation. The caches stay outside: a cache that passes
through a `cond` is copied at every step.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from rlae_jax.fusion.operators import FusionOperator, linear
from rlae_jax.fusion.policy import STATS, Dims, Fixed, Observation, Policy
from rlae_jax.fusion.sampling import Sampling, choose_token
from rlae_jax.models import ModelConfig, lora, transformer

MemberParams = transformer.Params | lora.Adapted
# Prompts are read in groups of rows of about this many tokens: activations stay small, and on the CPU inside its cache
# (half the time of one pass at 256 prompts of 64 tokens).
_PREFILL_TOKENS = 2048
# Keeps the stream that draws a row's weights apart from the one that draws its tokens.
_ACTION_STREAM = 0x5EED


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeSpec:
    """What is decoded and how. Its data fields may change without a new compilation; the static ones shape it."""

    sampling: Sampling = dataclasses.field(default_factory=Sampling.create)
    min_new_tokens: Int[Array, ""] | int = 0  # no end token before this many
    members: tuple[ModelConfig, ...] = dataclasses.field(metadata={"static": True})
    # The members are K adapters of one base: one `lora.Adapted` serves them all, and one pass runs K rows per prompt.
    shared_base: bool = dataclasses.field(default=False, metadata={"static": True})
    fusion: FusionOperator = dataclasses.field(default=linear, metadata={"static": True})
    policy: Policy = dataclasses.field(default_factory=Fixed, metadata={"static": True})
    sample_weights: bool = dataclasses.field(default=False, metadata={"static": True})  # draw actions, or take modes
    record: bool = dataclasses.field(default=False, metadata={"static": True})  # keep observations (for training)
    span_length: int = dataclasses.field(default=4, metadata={"static": True})  # L
    max_new_tokens: int = dataclasses.field(default=64, metadata={"static": True})
    end_ids: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})  # () ends at the length only

    @property
    def spans(self) -> int:
        """P: the most spans that an answer can have."""
        return -(-self.max_new_tokens // self.span_length)

    @property
    def vocab(self) -> int:
        """V: the ids that all members have. Rows of a head beyond its tokenizer never win."""
        return min(member.usable_vocab for member in self.members)

    @property
    def dims(self) -> Dims:
        return Dims(tuple(member.hidden_width for member in self.members), self.spans)


class Span(NamedTuple):
    """One decision for every row. In a trajectory each field has a leading P axis."""

    observation: Any  # an Observation, or () where observations are not recorded
    weights: Float[Array, "B K"]
    log_prob: Float[Array, "B"]
    value: Float[Array, "B"]


class DecodeState(NamedTuple):
    """The loop's carry, and its result."""

    step: Int[Array, ""]  # fused steps so far
    pending: Int[Array, "B"]  # the token that each row feeds next
    lengths: Int[Array, "B"]  # tokens fed so far, which is the pending token's position
    starts: Int[Array, "B"]  # first slot in use: rows are padded on the left
    caches: tuple[transformer.Cache, ...]
    done: Bool[Array, "B"]
    ended: Bool[Array, "B"]  # by an end token rather than by the length
    steps: Int[Array, "B"]  # fused steps of each row, the one that chose its end token included
    tokens: Int[Array, "B N"]  # chosen tokens; zeros from steps[b] on
    row_keys: Any  # Key[B], or () where a result has left the device
    span: Span  # the decision in force
    # Each member's summed log-probability of this span's tokens, Float[B, K]; () where the policy does not read it.
    span_log_probs: Any
    trajectory: Span  # all decisions, [P, B, ...]; spans after a row's end hold no information

    def span_mask(self, span_length: int) -> Bool[Array, "P B"]:
        """True where a row really took a decision."""
        first_steps = jnp.arange(self.trajectory.value.shape[0]) * span_length
        return first_steps[:, None] < self.steps[None]


def left_align_padding(ids_bt: Int[Array | np.ndarray, "B T"], mask_bt: Array | np.ndarray) -> tuple[Array, Array]:
    """Moves every row's padding to its left, keeping the order of its tokens."""
    real = mask_bt.astype(bool)
    order = jnp.argsort(real, axis=1, stable=True)
    return jnp.take_along_axis(ids_bt, order, axis=1), jnp.take_along_axis(real, order, axis=1)


def row_keys(key: Key[Array, ""] | Key[Array, "B"], batch: int) -> Key[Array, "B"]:
    """Row b's key is fold_in(key, b); a batch of keys is taken as it is."""
    return jax.vmap(lambda b: jax.random.fold_in(key, b))(jnp.arange(batch)) if key.ndim == 0 else key


class _Model(NamedTuple):
    """One forward pass of the loop: a member, or all members over one base."""

    config: ModelConfig
    params: transformer.Params
    adapters: lora.Adapters | None
    members: int  # whose rows it runs, one batch after another

    def tile(self, array: Array) -> Array:
        """An array of rows, once per member."""
        return jnp.concatenate([array] * self.members) if self.members > 1 else array


def _models(params: tuple[MemberParams, ...], spec: DecodeSpec, batch: int) -> tuple[_Model, ...]:
    models = []
    members = len(spec.members) if spec.shared_base else 1
    for config, p in zip(spec.members, params, strict=not spec.shared_base):
        if spec.shared_base and isinstance(p, lora.Adapted):
            p = p._replace(weights=jnp.repeat(jnp.eye(members), batch, axis=0))  # member k's rows use adapter k
        models.append(_Model(config, *lora.unpack(p, members * batch), members))
    return tuple(models)


def _prompt_cache(model: _Model, ids: Array, real: Array) -> transformer.Cache:
    """What decoding keeps of whole prompts."""
    rows = () if model.adapters is None else model.adapters.rows
    inputs = (model.tile(ids), model.tile(real), rows)

    def read(group: Any) -> transformer.Cache:
        ids, real, rows = group
        adapters = None if model.adapters is None else model.adapters._replace(rows=rows)
        return transformer.read_prompt(model.config, model.params, ids, real, adapters)

    b, t = inputs[0].shape
    size = max(_PREFILL_TOKENS // t, 1)
    groups = b // size
    if groups <= 1 or b % size:
        return read(inputs)
    grouped = lax.map(read, jax.tree.map(lambda leaf: leaf.reshape(groups, size, *leaf.shape[1:]), inputs))
    return jax.tree.map(lambda leaf: leaf.reshape(b, *leaf.shape[2:]), grouped)


def prefill(
    params: tuple[MemberParams, ...],
    prompt_ids: Int[Array | np.ndarray, "B T"],
    prompt_mask: Array | np.ndarray,
    key: Key[Array, ""] | Key[Array, "B"],
    spec: DecodeSpec,
    active: Bool[Array, "B"] | None = None,
) -> DecodeState:
    """Runs the members over all but the last token of each prompt, an encoder over all of it.

    Args:
      prompt_ids, prompt_mask: at least one token in every row; padding on either side.
      active: rows that are False write nothing (the filling of a batch bucket).
    """
    ids, real = left_align_padding(prompt_ids, prompt_mask)
    if ids.shape[1] == 1:  # the members need something to read before the pending token
        ids, real = (jnp.pad(array, ((0, 0), (1, 0))) for array in (ids, real))
    b, t = ids.shape
    k = len(spec.members)
    caches = []
    for model in _models(params, spec, b):
        # An encoder reads the whole prompt, and its decoder starts from a token of its own.
        is_encoder = model.config.encoder is not None
        read = slice(None) if is_encoder else slice(-1)
        cache = _prompt_cache(model, ids[:, read], real[:, read])
        caches.append(transformer.extend_cache(cache, (1 if is_encoder else t) + spec.max_new_tokens))
    counts = jnp.sum(real, axis=1, dtype=jnp.int32)
    observation = Observation(
        hidden=tuple(jnp.zeros((b, config.hidden_width)) for config in spec.members)
        if "hidden" in spec.policy.reads
        else (),
        stats=jnp.zeros((b, k, len(STATS))) if "stats" in spec.policy.reads else (),
        span=jnp.zeros((b,), jnp.int32) if "span" in spec.policy.reads else (),
    )
    span = Span(observation if spec.record else (), jnp.full((b, k), 1.0 / k), jnp.zeros((b,)), jnp.zeros((b,)))
    return DecodeState(
        step=jnp.int32(0),
        pending=ids[:, -1],
        lengths=counts - 1,
        starts=t - counts,
        caches=tuple(caches),
        done=jnp.zeros((b,), bool) if active is None else ~active,
        ended=jnp.zeros((b,), bool),
        steps=jnp.zeros((b,), jnp.int32),
        tokens=jnp.zeros((b, spec.max_new_tokens), jnp.int32),
        row_keys=row_keys(key, b),
        span=span,
        span_log_probs=jnp.zeros((b, k)) if "stats" in spec.policy.reads else (),
        trajectory=jax.tree.map(lambda leaf: jnp.zeros((spec.spans, *leaf.shape), leaf.dtype), span),
    )


def member_stats(
    log_probs: tuple[Float[Array, "B V"], ...], span_log_probs: Float[Array, "B K"]
) -> Float[Array, "B K 4"]:
    """The columns of STATS: entropy in nats, largest probability, mean log-probability of the tokens chosen in the last
    span, and KL(member || uniform mixture), which is at most log K."""
    mixture = linear(log_probs, jnp.full((1, len(log_probs)), 1.0 / len(log_probs)))
    columns = []
    for log_p in log_probs:
        p = jnp.exp(log_p)
        columns.append(
            (
                -jnp.sum(p * jnp.where(p > 0, log_p, 0.0), axis=-1),
                jnp.max(p, axis=-1),
                jnp.sum(p * jnp.where(p > 0, log_p - mixture, 0.0), axis=-1),
            )
        )
    entropy, top_prob, disagreement = (jnp.stack(column, axis=1) for column in zip(*columns, strict=True))
    return jnp.stack([entropy, top_prob, span_log_probs, disagreement], axis=-1)


def _take_decision(
    state: DecodeState, policy_params: Any, hidden: tuple[Array, ...], log_probs: tuple[Array, ...], spec: DecodeSpec
) -> Span:
    b = state.done.shape[0]
    reads = spec.policy.reads
    index = state.step // spec.span_length
    observation = Observation(
        hidden=tuple(h.astype(jnp.float32) for h in hidden) if "hidden" in reads else (),
        stats=member_stats(log_probs, state.span_log_probs / spec.span_length) if "stats" in reads else (),
        span=jnp.full((b,), index, jnp.int32) if "span" in reads else (),
    )
    distribution, value = spec.policy.apply(policy_params, observation)
    if spec.sample_weights:
        keys = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, _ACTION_STREAM), index))(state.row_keys)
        weights = distribution.sample(keys)
    else:
        weights = distribution.mode()
    weights = jnp.broadcast_to(weights, (b, len(spec.members)))
    log_prob, value = distribution.log_prob(weights), jnp.broadcast_to(value, (b,))
    return Span(observation if spec.record else (), weights, jnp.broadcast_to(log_prob, (b,)), value)


def _step(models: tuple[_Model, ...], policy_params: Any, spec: DecodeSpec, state: DecodeState) -> DecodeState:
    caches, hidden, log_probs = [], [], []
    for model, cache in zip(models, state.caches, strict=True):
        pending, position, starts = state.pending, state.lengths, state.starts
        if model.config.encoder is not None:  # its slots hold no prompt, and it starts from a token of its own
            pending = jnp.where(state.step == 0, model.config.start_id or 0, pending)
            position, starts = jnp.full_like(position, state.step), jnp.zeros_like(starts)
        slot = cache.slots - spec.max_new_tokens - 1 + state.step
        indices = jnp.arange(cache.slots)
        visible = (indices >= starts[:, None]) & (indices <= slot)
        pending, position, visible = (model.tile(array) for array in (pending, position, visible))
        h, cache = transformer.decode_step(
            model.config, model.params, pending, position, cache, slot, visible, model.adapters
        )
        logits = transformer.output_head(model.config, model.params, h, model.adapters)[:, : spec.vocab]
        caches.append(cache)
        hidden += jnp.split(h, model.members)
        log_probs += jnp.split(jax.nn.log_softmax(logits, axis=-1), model.members)

    boundary = state.step % spec.span_length == 0
    decide = functools.partial(_take_decision, state, policy_params, tuple(hidden), tuple(log_probs), spec)
    span = lax.cond(boundary, decide, lambda: state.span)

    fused = spec.fusion(tuple(log_probs), span.weights)
    ends = jnp.asarray(np.isin(np.arange(spec.vocab), spec.end_ids))
    fused = jnp.where(ends & (state.step < spec.min_new_tokens), -jnp.inf, fused)
    token = choose_token(fused, state.row_keys, state.step, spec.sampling)

    alive = ~state.done
    token = jnp.where(alive, token, 0)
    ended = alive & ends[token]
    steps = state.steps + alive
    span_log_probs = state.span_log_probs
    if "stats" in spec.policy.reads:
        chosen = jnp.stack([jnp.take_along_axis(lp, token[:, None], axis=1)[:, 0] for lp in log_probs], axis=1)
        span_log_probs = jnp.where(boundary, 0.0, span_log_probs) + chosen
    return DecodeState(
        step=state.step + 1,
        pending=token,
        lengths=state.lengths + 1,
        starts=state.starts,
        caches=tuple(caches),
        done=state.done | ended | (state.step + 1 >= spec.max_new_tokens),
        ended=state.ended | ended,
        steps=steps,
        tokens=lax.dynamic_update_slice(state.tokens, token[:, None], (0, state.step)),
        row_keys=state.row_keys,
        span=span,
        span_log_probs=span_log_probs,
        trajectory=jax.tree.map(
            # Written at every step, not only at boundaries: an in-place write of a few numbers beats a branch.
            lambda all_spans, one: lax.dynamic_update_index_in_dim(all_spans, one, state.step // spec.span_length, 0),
            state.trajectory,
            span,
        ),
    )


def decode_spans(
    params: tuple[MemberParams, ...], state: DecodeState, policy_params: Any, spec: DecodeSpec
) -> DecodeState:
    """Runs the loop until every row is done. Jit it with `state` donated: the caches are updated in place."""
    models = _models(params, spec, len(state.done))  # outside the loop: what adapters need is laid out once
    step = functools.partial(_step, models, policy_params, spec)
    return lax.while_loop(lambda state: ~jnp.all(state.done), step, state)


def decode(
    params: tuple[MemberParams, ...],
    prompt_ids: Int[Array | np.ndarray, "B T"],
    prompt_mask: Array | np.ndarray,
    policy_params: Any,
    key: Key[Array, ""] | Key[Array, "B"],
    spec: DecodeSpec,
    active: Bool[Array, "B"] | None = None,
) -> DecodeState:
    """Prefill and the whole loop: the pure function behind `Ensemble.generate`. Jit, vmap and shard it as you like.

    Args:
      params: the members' `LM.params`, in the order of `spec.members`; a `lora.Adapted` for members with adapters.
      prompt_ids, prompt_mask: Int[B, T], at least one token per row, padding on either side.
      policy_params: what `spec.policy` takes; for `Fixed` the weights, Float[B, K] or [1, K], on the simplex.
      key: row b draws from fold_in(key, b), or from key[b] if there is a batch of keys.
      active: rows that are False write nothing.
    """
    return decode_spans(params, prefill(params, prompt_ids, prompt_mask, key, spec, active), policy_params, spec)
