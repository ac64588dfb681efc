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
through a `cond` is copied at every step. How a chosen token reaches the members is in `feed.py`: with one tokenizer it
is the same token for all; otherwise it is an entry of their union vocabulary (`union.py`), which each member spells in
its own tokens, and V is the union's size U.
"""

import dataclasses
import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int8, Key

from rlae_jax.fusion.feed import Lockstep, MemberParams, Model, Ragged, Spelling, models_of, prompt_log_probs
from rlae_jax.fusion.operators import Candidates, FusionOperator, Hidden, linear, loglinear
from rlae_jax.fusion.policy import STATS, ChoosesLength, Dims, Fixed, Observation, Policy, of_rows
from rlae_jax.fusion.reading import TextReader
from rlae_jax.fusion.sampling import Sampling, choose_token
from rlae_jax.models import ModelConfig, transformer

# Keeps the stream that draws a row's weights apart from the one that draws its tokens.
_ACTION_STREAM = 0x5EED
# The least log-probability of a token that a policy sees, of members with different tokenizers.
_UNREADABLE = -30.0


class UnionTables(NamedTuple):
    """What the loop reads of a union vocabulary."""

    spellings: tuple[Spelling, ...]  # of each member
    # The state of a UTF-8 automaton after each entry, from each of its states; -1 where the entry would break a
    # character or cannot be written by every member.
    utf8: Int8[Array, "8 U"]


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
    scores: bool = dataclasses.field(default=False, metadata={"static": True})  # keep scores and attributions
    limits: Int[Array, " B"] | None = None  # each row's own longest answer, at most max_new_tokens
    union: UnionTables | None = None  # of members with different tokenizers, or of any that may be skipped
    member_tokens: int = dataclasses.field(default=0, metadata={"static": True})  # with a union: each member's room
    reader: TextReader | None = None  # for policies that read "text"
    forced: Int[Array, "B N"] | None = None  # what is written, whatever is likely: to score given texts

    @property
    def span_lengths(self) -> tuple[int, ...]:
        """The lengths among which the policy chooses for each span; () where all have `span_length`."""
        return getattr(self.policy, "span_lengths", ())

    @property
    def spans(self) -> int:
        """P: the most spans that an answer can have."""
        return -(-self.max_new_tokens // min(self.span_lengths or (self.span_length,)))

    @property
    def vocab(self) -> int:
        """V: the ids that all members have, or U. Rows of a head beyond its tokenizer never win."""
        if self.union is not None:
            return self.union.utf8.shape[1]
        return min(member.usable_vocab for member in self.members)

    @property
    def dims(self) -> Dims:
        text = 0 if self.reader is None else self.reader.config.hidden_width
        return Dims(tuple(member.hidden_width for member in self.members), self.spans, text)

    @property
    def decides_first(self) -> bool:
        """Whether weights are known before the members are read: members without weight need not be."""
        return self.union is not None and not {"hidden", "stats"} & set(self.policy.reads)

    @property
    def may_skip(self) -> bool:
        """Whether members without weight may be left behind: nothing else looks at them."""
        honest = self.fusion in (linear, loglinear)
        return self.decides_first and honest and not self.scores


class Span(NamedTuple):
    """One decision for every row. In a trajectory each field has a leading P axis."""

    observation: Any  # an Observation, or () where observations are not recorded
    action: Float[Array, "B A"]
    weights: Float[Array, "B K"]  # what the action means
    log_prob: Float[Array, " B *N"]  # of each of N agents, where several act
    value: Float[Array, " B"]
    length: Any  # Int[B], the steps that it holds, where the policy chooses them; else ()


class DecodeState(NamedTuple):
    """The loop's carry, and its result."""

    step: Int[Array, ""]  # fused steps so far
    feed: Lockstep | tuple[Ragged, ...]  # what the members have taken in
    done: Bool[Array, " B"]
    ended: Bool[Array, " B"]  # by an end token rather than by the length
    steps: Int[Array, " B"]  # fused steps of each row, the one that chose its end token included
    tokens: Int[Array, "B N"]  # chosen tokens or union entries; zeros from steps[b] on
    row_keys: Any  # Key[B], or () where a result has left the device
    span: Span  # the decision in force
    decisions: Int[Array, " B"]  # taken so far
    next_decision: Any  # Int[B], the step of the next one where the policy chooses how long spans are; else ()
    # Each member's summed log-probability of this span's tokens, Float[B, K]; () where the policy does not read it.
    span_log_probs: Any
    trajectory: Span  # all decisions, [P, B, ...]; spans after a row's end hold no information
    limits: Int[Array, " B"]  # the longest answer of each row
    character: Any  # Int[B], the state of the UTF-8 automaton; () without a union vocabulary
    seen: Any  # Bool[B, V], tokens in prompt and answer; () without a repetition penalty
    prompt_scores: Any  # Float[B, K], see Observation.prompt; () where the policy does not read it
    text: Any  # a `Text`, the prompt and what was written; () where the policy does not read it
    # The chosen tokens' log-probabilities under the fused distribution, Float[B, N], and under each member,
    # Float[B, N, K]; () where they are not asked for.
    scores: Any
    attribution: Any

    @property
    def caches(self) -> tuple[transformer.Cache, ...]:
        """Each forward pass's keys and values."""
        return self.feed.caches if isinstance(self.feed, Lockstep) else tuple(member.cache for member in self.feed)

    def span_mask(self) -> Bool[Array, "P B"]:
        """True where a row really took a decision."""
        spans = np.arange(self.trajectory.value.shape[0])
        return self.decisions[None] > spans[:, None]


def without_caches(state: DecodeState) -> DecodeState:
    """What is read of answers: no caches, which would be copied out of the loop, and no keys, which have no form
    outside."""
    return state._replace(feed=(), row_keys=(), seen=(), prompt_scores=())


def row_keys(key: Key[Array, ""] | Key[Array, " B"], batch: int) -> Key[Array, " B"]:
    """Row b's key is fold_in(key, b); a batch of keys is taken as it is."""
    return jax.vmap(lambda b: jax.random.fold_in(key, b))(jnp.arange(batch)) if key.ndim == 0 else key


def prefill(
    params: tuple[MemberParams, ...],
    prompt_ids: Any,
    prompt_mask: Any,
    key: Key[Array, ""] | Key[Array, " B"],
    spec: DecodeSpec,
    active: Bool[Array, " B"] | None = None,
) -> DecodeState:
    """Runs the members over all but the last token of each prompt, an encoder over all of it.

    Args:
      prompt_ids, prompt_mask: Int[B, T], at least one token in every row; padding on either side. With a union
        vocabulary K of each, in each member's own tokens.
      active: rows that are False write nothing (the filling of a batch bucket).
    """
    b = (prompt_ids if spec.union is None else prompt_ids[0]).shape[0]
    models = models_of(params, spec, b)
    if spec.union is None:
        feed: Any = Lockstep.start(models, prompt_ids, prompt_mask, spec)
        prompts = [(prompt_ids, prompt_mask)] * len(models)
    else:
        prompts = list(zip(prompt_ids, prompt_mask, strict=True))
        feed = tuple(Ragged.start(model, *prompt, spec) for model, prompt in zip(models, prompts, strict=True))
    first_ids, first_mask = prompts[0]
    prompt_scores: Any = ()
    if "prompt" in spec.policy.reads:
        totals = [prompt_log_probs(model, *prompt) for model, prompt in zip(models, prompts, strict=True)]
        counts = jnp.sum(jnp.asarray(first_mask).astype(bool), axis=1, keepdims=True)
        prompt_scores = jnp.concatenate(totals, axis=1) / jnp.maximum(counts - 1, 1).astype(jnp.float32)
    k = len(spec.members)
    seen: Any = ()
    if spec.sampling.penalised:
        # Member 0's ids are the first entries of a union, so that they stand for the prompt there, too.
        in_prompt = jnp.asarray(first_mask).astype(bool) & (spec.members[0].encoder is None)
        rows = jnp.arange(b)[:, None]
        seen = jnp.zeros((b, spec.vocab), bool).at[rows, first_ids].max(in_prompt)
    observation = Observation(
        hidden=tuple(jnp.zeros((b, config.hidden_width)) for config in spec.members)
        if "hidden" in spec.policy.reads
        else (),
        stats=jnp.zeros((b, k, len(STATS))) if "stats" in spec.policy.reads else (),
        span=jnp.zeros((b,), jnp.int32) if "span" in spec.policy.reads else (),
        prompt=prompt_scores,
        text=jnp.zeros((b, spec.dims.text)) if "text" in spec.policy.reads else (),
    )
    keys = row_keys(key, b)
    shapes = jax.eval_shape(lambda: _decision(spec.policy.init(keys[0], spec.dims), observation, keys, spec))
    span = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    span = span._replace(weights=jnp.full((b, k), 1.0 / k))
    n = spec.max_new_tokens
    limits = jnp.full((b,), n, jnp.int32) if spec.limits is None else jnp.asarray(spec.limits, jnp.int32)
    return DecodeState(
        step=jnp.int32(0),
        feed=feed,
        done=(jnp.zeros((b,), bool) if active is None else ~active) | (limits <= 0),
        ended=jnp.zeros((b,), bool),
        steps=jnp.zeros((b,), jnp.int32),
        tokens=jnp.zeros((b, n), jnp.int32),
        row_keys=keys,
        span=span,
        decisions=jnp.zeros((b,), jnp.int32),
        next_decision=jnp.zeros((b,), jnp.int32) if spec.span_lengths else (),
        span_log_probs=jnp.zeros((b, k)) if "stats" in spec.policy.reads else (),
        trajectory=jax.tree.map(lambda leaf: jnp.zeros((spec.spans, *leaf.shape), leaf.dtype), span),
        limits=limits,
        character=() if spec.union is None else jnp.zeros((b,), jnp.int32),
        seen=seen,
        prompt_scores=prompt_scores,
        text=() if spec.reader is None else spec.reader.prompts,
        scores=jnp.zeros((b, n)) if spec.scores else (),
        attribution=jnp.zeros((b, n, k)) if spec.scores else (),
    )


def repeat_rows(state: DecodeState, spec: DecodeSpec, times: int) -> DecodeState:
    """Every row `times` times, one after another, each with a key of its own: samples that share one prefill. What an
    encoder read stays as it is, for all of them."""
    b = len(state.done)

    def repeat(leaf: Any, axis: int = 0) -> Any:
        if isinstance(leaf, transformer.Cache):
            return leaf._replace(layers=jax.tree.map(repeat, leaf.layers))
        if leaf.shape[axis] != b:  # one batch of rows per member of a shared base
            split = leaf.reshape(-1, b, *leaf.shape[1:])
            return jnp.repeat(split, times, axis=1).reshape(-1, *leaf.shape[1:])
        return jnp.repeat(leaf, times, axis=axis)

    per_row = dict(state._asdict())
    step, keys, trajectory = (per_row.pop(name) for name in ("step", "row_keys", "trajectory"))
    folded = jax.vmap(lambda key: jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(times)))(keys)
    return DecodeState(
        step=step,
        row_keys=folded.reshape(b * times),
        trajectory=jax.tree.map(lambda leaf: repeat(leaf, 1), trajectory),
        **jax.tree.map(repeat, per_row, is_leaf=lambda leaf: isinstance(leaf, transformer.Cache)),
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


def _decision(policy_params: Any, observation: Observation, keys: Key[Array, " B"], spec: DecodeSpec) -> Span:
    """What the policy does about an observation; the keys are its rows' own for this span."""
    b = len(keys)
    distribution, value = spec.policy.apply(policy_params, observation)
    action = distribution.sample(keys) if spec.sample_weights else distribution.mode()
    action = jnp.broadcast_to(action, (b, action.shape[1]))
    log_prob = distribution.log_prob(action)
    return Span(
        observation=observation if spec.record else (),
        action=action,
        weights=distribution.to_weights(action),
        log_prob=jnp.broadcast_to(log_prob, (b, *log_prob.shape[1:])),
        value=jnp.broadcast_to(value, (b,)),
        length=cast(ChoosesLength, distribution).to_length(action) if spec.span_lengths else (),
    )


def _take_decision(
    state: DecodeState, policy_params: Any, hidden: tuple[Array, ...], log_probs: tuple[Array, ...], spec: DecodeSpec
) -> Span:
    reads = spec.policy.reads
    index: Array = jnp.full(state.done.shape, state.step // spec.span_length)
    last_length: Any = spec.span_length
    if spec.span_lengths:
        index = state.decisions
        last_length = jnp.maximum(state.span.length, 1)[:, None].astype(jnp.float32)
    observation = Observation(
        hidden=tuple(h.astype(jnp.float32) for h in hidden) if "hidden" in reads else (),
        stats=member_stats(log_probs, state.span_log_probs / last_length) if "stats" in reads else (),
        span=index if "span" in reads else (),
        prompt=state.prompt_scores,
        text=spec.reader.read(state.text) if spec.reader is not None else (),
    )

    def own_key(key: Key[Array, ""], index: Array) -> Key[Array, ""]:
        return jax.random.fold_in(jax.random.fold_in(key, _ACTION_STREAM), index)

    return _decision(policy_params, observation, jax.vmap(own_key)(state.row_keys, index), spec)


def _choose_rows(rows: Bool[Array, " B"], new: Any, old: Any) -> Any:
    """Leaves [B, ...] of `new` in some rows and of `old` in the others."""
    return jax.tree.map(lambda x, y: jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), x, y), new, old)


def _to_union(k: int, log_probs: Float[Array, "B V"], spelling: Spelling) -> Float[Array, "B U"]:
    """A member's log-probabilities as those of the union's entries; -inf where it has no such token."""
    u = spelling.partner.shape[0]
    if k == 0:  # whose ids are the first entries
        return jnp.pad(log_probs, ((0, 0), (0, u - log_probs.shape[1])), constant_values=-jnp.inf)
    return jnp.where(spelling.partner >= 0, log_probs[:, spelling.partner], -jnp.inf)


def _through_first(log_probs: Float[Array, "B V"], spelling: Spelling) -> Float[Array, "B U"]:
    """As `_to_union`, but entries that the member lacks are read through the first token of their spelling."""
    return jnp.where(spelling.first >= 0, log_probs[:, spelling.first], -jnp.inf)


def _chosen_log_prob(log_probs: Float[Array, "B V"], spelling: Spelling, entries: Array) -> Float[Array, " B"]:
    ids = spelling.first[entries]
    read = jnp.take_along_axis(log_probs, jnp.maximum(ids, 0)[:, None], axis=1)[:, 0]
    return jnp.where(ids >= 0, read, -jnp.inf)


def _read(
    models: tuple[Model, ...], spec: DecodeSpec, state: DecodeState, weights: Float[Array, "B K"]
) -> tuple[Any, tuple[Array, ...], tuple[Array, ...]]:
    """Feeds what is pending. Returns the new feed, each member's hidden states and its own tokens' log-probabilities.
    What they are for members without weight, where those may be skipped, has no meaning."""
    if isinstance(state.feed, Lockstep):
        feed, states = state.feed.read(models, state.step, spec)
        hidden: list[Array] = []
        log_probs: list[Array] = []
        for model, h in zip(models, states, strict=True):
            hidden += feed.batches(model, h)
            log_probs += feed.batches(model, model.log_probs(h, spec.vocab))
        return feed, tuple(hidden), tuple(log_probs)
    assert spec.union is not None
    members: list[Ragged] = []
    all_log_probs: list[Array] = []
    for k, (model, member) in enumerate(zip(models, state.feed, strict=True)):
        vocab = spec.union.spellings[k].own.shape[0]
        needed = ~state.done & (weights[:, k] > 0) if spec.may_skip else ~state.done
        member = member.read(model, needed)
        predict = functools.partial(model.log_probs, member.hidden, vocab)
        if spec.may_skip:
            skipped = jnp.zeros((len(needed), vocab))
            all_log_probs.append(lax.cond(jnp.any(needed), predict, lambda skipped=skipped: skipped))
        else:
            all_log_probs.append(predict())
        members.append(member)
    return tuple(members), tuple(member.hidden for member in members), tuple(all_log_probs)


def _step(models: tuple[Model, ...], policy_params: Any, spec: DecodeSpec, state: DecodeState) -> DecodeState:
    union = spec.union
    due = state.step % spec.span_length == 0  # whether rows take a decision: all at once, or each by itself
    if spec.span_lengths:
        due = ~state.done & (state.step >= state.next_decision)
    span = state.span

    def decide(hidden: tuple[Array, ...], log_probs: tuple[Array, ...]) -> Span:
        take = functools.partial(_take_decision, state, policy_params, hidden, log_probs, spec)
        if not spec.span_lengths:
            return lax.cond(due, take, lambda: state.span)
        return lax.cond(jnp.any(due), lambda: _choose_rows(due, take(), state.span), lambda: state.span)

    if spec.decides_first:
        span = decide((), ())
    feed, hidden, own_log_probs = _read(models, spec, state, span.weights)
    log_probs = own_log_probs
    if union is not None:
        pairs = zip(own_log_probs, union.spellings, strict=True)
        log_probs = tuple(_to_union(k, *pair) for k, pair in enumerate(pairs))
    if not spec.decides_first:
        span = decide(hidden, log_probs)

    if union is not None:
        allowed = union.utf8[state.character] >= 0
        log_probs = tuple(jnp.where(allowed, log_p, -jnp.inf) for log_p in log_probs)
    if isinstance(spec.fusion, Hidden):
        fused = models[0].base_logits(spec.fusion(hidden, span.weights), spec.vocab)
    elif isinstance(spec.fusion, Candidates) and union is not None:
        read = tuple(map(_through_first, own_log_probs, union.spellings))
        fused = spec.fusion(log_probs, span.weights, read)
    else:
        fused = spec.fusion(log_probs, span.weights)
    if union is not None:
        fused = jnp.where(allowed, fused, -jnp.inf)
    ends = jnp.asarray(np.isin(np.arange(spec.vocab), spec.end_ids))
    normalised = fused
    if spec.sampling.penalised or spec.scores:
        normalised = fused - jax.nn.logsumexp(fused, axis=-1, keepdims=True)
    scored = spec.sampling.penalise(normalised, state.seen)
    scored = jnp.where(ends & (state.step < spec.min_new_tokens), -jnp.inf, scored)
    if spec.forced is None:
        token = choose_token(scored, state.row_keys, state.step, spec.sampling)
    else:
        token = lax.dynamic_index_in_dim(spec.forced, state.step, axis=1, keepdims=False)

    alive = ~state.done
    full = jnp.zeros_like(alive)  # rows that cannot go on
    if union is not None:
        full = alive & ~jnp.any(jnp.isfinite(scored), axis=-1) & (spec.forced is None)
        for member, spelling in zip(feed, union.spellings, strict=True):
            full = full | (alive & ~member.fits(spelling, token))
        alive = alive & ~full
    token = jnp.where(alive, token, 0)
    ended = alive & ends[token]
    steps = state.steps + alive.astype(jnp.int32)
    character = state.character
    if union is None:
        feed = feed._replace(pending=token)
    else:
        spelled = zip(feed, union.spellings, strict=True)
        feed = tuple(member.append(spelling, token, alive) for member, spelling in spelled)
        character = jnp.where(alive, union.utf8[character, token].astype(jnp.int32), character)

    span_log_probs, scores, attribution = state.span_log_probs, state.scores, state.attribution
    if "stats" in spec.policy.reads or spec.scores:
        if union is None:
            by_member = [jnp.take_along_axis(lp, token[:, None], axis=1)[:, 0] for lp in log_probs]
        else:
            pairs = zip(own_log_probs, union.spellings, strict=True)
            by_member = [_chosen_log_prob(log_p, spelling, token) for log_p, spelling in pairs]
        chosen = jnp.stack(by_member, axis=1)
        if "stats" in spec.policy.reads:
            # A policy gets finite numbers, also of a token that a member cannot read.
            finite = chosen if union is None else jnp.maximum(chosen, _UNREADABLE)
            span_log_probs = jnp.where(due[..., None], 0.0, span_log_probs) + finite
        if spec.scores:
            score = jnp.take_along_axis(normalised, token[:, None], axis=1)
            scores = lax.dynamic_update_slice(scores, score, (0, state.step))
            attribution = lax.dynamic_update_slice(attribution, chosen[:, None], (0, state.step, 0))
    seen = state.seen
    if spec.sampling.penalised:
        seen = seen.at[jnp.arange(len(token)), token].max(alive)
    next_decision = state.next_decision
    if spec.span_lengths:
        place = jnp.where(due, state.decisions, spec.spans), jnp.arange(len(due))  # beyond the end nothing is written
        trajectory = jax.tree.map(lambda spans, one: spans.at[place].set(one, mode="drop"), state.trajectory, span)
        next_decision = jnp.where(due, state.step + span.length, next_decision)
    else:
        # Written at every step, not only at boundaries: an in-place write of a few numbers beats a branch.
        write = functools.partial(lax.dynamic_update_index_in_dim, index=state.step // spec.span_length, axis=0)
        trajectory = jax.tree.map(write, state.trajectory, span)
    return DecodeState(
        step=state.step + 1,
        feed=feed,
        done=state.done | full | ended | (state.step + 1 >= state.limits),
        ended=state.ended | ended,
        steps=steps,
        tokens=lax.dynamic_update_slice(state.tokens, token[:, None], (0, state.step)),
        row_keys=state.row_keys,
        span=span,
        span_log_probs=span_log_probs,
        decisions=state.decisions + (due & alive).astype(jnp.int32),
        next_decision=next_decision,
        trajectory=trajectory,
        limits=state.limits,
        character=character,
        seen=seen,
        prompt_scores=state.prompt_scores,
        text=() if spec.reader is None else spec.reader.append(state.text, token, alive),
        scores=scores,
        attribution=attribution,
    )


def decode_spans(
    params: tuple[MemberParams, ...],
    state: DecodeState,
    policy_params: Any,
    spec: DecodeSpec,
    until: Int[Array, ""] | None = None,
) -> DecodeState:
    """Runs the loop until every row is done, or up to step `until`. Jit it with `state` donated: the caches are updated
    in place."""
    rows = state.feed.rows(len(spec.members)) if isinstance(state.feed, Lockstep) else len(state.done)
    models = models_of(params, spec, rows)  # outside the loop: what adapters need is laid out once
    step = functools.partial(_step, models, policy_params, spec)

    def going(state: DecodeState) -> Array:
        some = ~jnp.all(state.done)
        return some if until is None else some & (state.step < until)

    return lax.while_loop(going, step, state)


def decode(
    params: tuple[MemberParams, ...],
    prompt_ids: Any,
    prompt_mask: Any,
    policy_params: Any,
    key: Key[Array, ""] | Key[Array, " B"],
    spec: DecodeSpec,
    active: Bool[Array, " B"] | None = None,
) -> DecodeState:
    """Prefill and the whole loop: the pure function behind `Ensemble.generate`. Jit, vmap and shard it as you like.

    Args:
      params: the members' `LM.params`, in the order of `spec.members`; a `lora.Adapted` for members with adapters.
      prompt_ids, prompt_mask: Int[B, T], at least one token per row, padding on either side. With a union vocabulary
        K of each, in each member's own tokens.
      policy_params: what `spec.policy` takes; for `Fixed` the weights, Float[B, K] or [1, K], on the simplex.
      key: row b draws from fold_in(key, b), or from key[b] if there is a batch of keys.
      active: rows that are False write nothing.
    """
    return decode_spans(params, prefill(params, prompt_ids, prompt_mask, key, spec, active), policy_params, spec)


# Bytes of weights, keys and values that a step finds in a processor's cache, and the fewest rows whose products are
# still efficient.
_CACHED_BYTES = 16 * 2**20
_LEAST_ROWS = 32


class _Rows(NamedTuple):
    """What belongs to the rows of a batch."""

    ids: Any
    mask: Any
    keys: Key[Array, " B"]
    active: Any
    limits: Any
    forced: Any
    text: Any


def answers(
    params: tuple[MemberParams, ...],
    prompt_ids: Any,
    prompt_mask: Any,
    policy_params: Any,
    key: Key[Array, ""] | Key[Array, " B"],
    spec: DecodeSpec,
    active: Bool[Array, " B"] | None = None,
    samples: int = 1,
) -> DecodeState:
    """As `decode`, for who reads the answers alone (`without_caches`). On the CPU a large batch may be decoded a group
    of rows after another, which gives the same answers.

    Args:
      samples: answers per prompt, one after another, which share its prefill.
    """
    b = (prompt_ids if spec.union is None else prompt_ids[0]).shape[0]
    text = () if spec.reader is None else spec.reader.prompts
    rows = _Rows(prompt_ids, prompt_mask, row_keys(key, b), active, spec.limits, spec.forced, text)

    def run(rows: _Rows, spec: DecodeSpec, policy_params: Any) -> DecodeState:
        state = prefill(params, rows.ids, rows.mask, rows.keys, spec, rows.active)
        state = state if samples == 1 else repeat_rows(state, spec, samples)
        return without_caches(decode_spans(params, state, policy_params, spec))

    groups = _groups(params, rows, spec, samples)
    if groups == 1:
        return run(rows, spec, policy_params)
    n = b // groups

    def of_group(group: tuple[Array, _Rows]) -> DecodeState:
        start, own = group
        policy, own_params = of_rows(spec.policy, policy_params, start * samples, n * samples, b * samples)
        reader = spec.reader and dataclasses.replace(spec.reader, prompts=own.text)
        changes = {"policy": policy, "limits": own.limits, "forced": own.forced, "reader": reader}
        return run(own, dataclasses.replace(spec, **changes), own_params)

    split = jax.tree.map(lambda leaf: jnp.asarray(leaf).reshape(groups, n, *leaf.shape[1:]), rows)
    states = lax.map(of_group, (jnp.arange(groups) * n, split))
    trajectory = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), states.trajectory)
    per_row = states._replace(step=(), trajectory=())
    joined: DecodeState = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), per_row)
    return joined._replace(
        step=jnp.max(states.step),
        trajectory=jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0], -1, *leaf.shape[3:]), trajectory),
    )


def _groups(params: tuple[MemberParams, ...], rows: _Rows, spec: DecodeSpec, samples: int) -> int:
    """In how many groups a batch is decoded.

    A step of small members at a large batch spends most of its time reading keys and values, and reads them all again
    in the next one. On the CPU those of a group may stay in the processor's cache, if the weights, which every group
    reads anew, do so, too.
    """
    if jax.default_backend() != "cpu" or any(not isinstance(p, dict) for p in params):
        return 1
    b = len(rows.keys)
    ids = [rows.ids] * len(spec.members) if spec.union is None else rows.ids
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    kept = 0
    for member, own, p in zip(spec.members, ids, params, strict=True):
        slots = samples * (spec.max_new_tokens if spec.union is None else spec.member_tokens)
        slots += own.shape[1] * (samples if member.encoder is None else 1)  # samples share what an encoder read
        itemsize = jax.tree.leaves(p)[0].dtype.itemsize
        kept += 2 * member.layers * member.kv_heads * member.head_width * slots * itemsize * b
    agents = getattr(spec.policy, "agents", 1)  # whose rows stand together
    groups = 1
    while weights + kept / groups > _CACHED_BYTES:
        groups = agents if groups == 1 < agents else 2 * groups
        if b % groups or b // groups * samples < _LEAST_ROWS:
            return 1
    return groups
