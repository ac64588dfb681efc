"""The compiled decoding loop: K members, one fusion operator, one policy, one shared text.

In: the members' arrays, `Prompts`, a policy's parameters. Out: a `DecodeState` with the written tokens and the
trajectory of spans. Everything is traced into one XLA program; the host sees nothing between prompt and answer.

A step feeds each row's pending token to every member, fuses the K predictions and chooses the next pending token, so
that N tokens cost N forwards: the last prompt token is the first pending one, and the last token written is never fed.

    prompt   a b c d        prefill: a b c     pending: d
    step 0   feed d  ->  fuse  ->  choose e    pending: e     span 0: weights chosen between feed and fuse
    step 1   feed e  ->  fuse  ->  choose f    pending: f
    ...                                                       span p begins at step p * L

The policy acts inside a `cond` that sees only its small observation. The caches stay outside: a cache that passes
through a `cond` is copied at every step. How a chosen token reaches the members is their own business (`members.py`).
"""

import dataclasses
import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from rlae_jax import sharding
from rlae_jax.fusion.lockstep import Lockstep
from rlae_jax.fusion.members import ForwardPass, MemberParams, Prediction, bind_members, prompt_log_probs
from rlae_jax.fusion.operators import Candidates, Hidden, linear
from rlae_jax.fusion.policy import STATS, ChoosesLength, Observation, SoFar, hide, policy_places, slice_rows
from rlae_jax.fusion.prompts import Prompts, prompts_from_arrays
from rlae_jax.fusion.ragged import Ragged
from rlae_jax.fusion.sampling import RowSampling, Sampling, choose_token
from rlae_jax.fusion.spec import DecodeSpec
from rlae_jax.fusion.state import (
    Answers,
    Decisions,
    DecodeState,
    RowInputs,
    RowOptions,
    Seen,
    Span,
    TokenScores,
    TopTokens,
    answers_of,
    repeat_rows,
)
from rlae_jax.models import lora
from rlae_jax.models.cache import cache_bytes
from rlae_jax.sharding import ROWS, WHOLE, by_rows, constrain

# Keeps the stream that draws a row's weights apart from the one that draws its tokens.
_ACTION_STREAM = 0x5EED


def prefill(params: tuple[MemberParams, ...], prompts: Prompts, spec: DecodeSpec) -> DecodeState:
    """Runs the members over all but the last token of each prompt, an encoder over all of it.

    Args:
      prompts: at least one token in every row; with a union vocabulary in each member's own tokens.
    """
    passes = bind_members(params, spec, prompts.batch)
    kind = Lockstep if spec.union is None else Ragged
    return begin(kind.start(passes, prompts, spec), passes, prompts, spec)


def begin(
    members: Lockstep | Ragged,
    passes: tuple[ForwardPass, ...],
    prompts: Prompts,
    spec: DecodeSpec,
    options: RowOptions | None = None,
) -> DecodeState:
    """The state before the first token, of members that have read the prompts."""
    b, n = prompts.batch, spec.max_new_tokens
    assert prompts.keys is not None
    prompt_scores = prompt_log_probs(passes, prompts) if "prompt" in spec.policy.reads else None
    limits = jnp.asarray(prompts.limits, jnp.int32)
    return DecodeState(
        clock=jnp.zeros((b,), jnp.int32),
        rows=RowInputs(prompts.keys, limits, prompts.forced, prompt_scores, options),
        members=members,
        seen=Seen(
            tokens=_tokens_of(prompts, spec) if spec.sampling.penalised or options is not None else None,
            text=None if spec.reader is None else prompts.text,
        ),
        decisions=_no_decisions(prompts.keys, prompt_scores, spec),
        done=~prompts.active | (limits <= 0),
        ended=jnp.zeros((b,), bool),
        steps=jnp.zeros((b,), jnp.int32),
        tokens=jnp.zeros((b, n), jnp.int32),
        scores=_no_scores(b, spec) if spec.scores else None,
        failed=jnp.zeros((b,), bool),
    )


def _no_scores(b: int, spec: DecodeSpec) -> TokenScores:
    n, k, x = spec.max_new_tokens, len(spec.members), spec.top
    top = TopTokens(jnp.zeros((b, n, x), jnp.int32), jnp.zeros((b, n, x))) if x else None
    return TokenScores(jnp.zeros((b, n)), jnp.zeros((b, n, k)), top)


def _tokens_of(prompts: Prompts, spec: DecodeSpec) -> Bool[Array, "B V"]:
    """Which tokens stand in each prompt. Member 0's ids are the first entries of a union, so that they stand for the
    prompt there, too."""
    in_prompt = jnp.asarray(prompts.mask[0]).astype(bool) & (spec.members[0].encoder is None)
    rows = jnp.arange(prompts.batch)[:, None]
    return jnp.zeros((prompts.batch, spec.vocab), bool).at[rows, prompts.ids[0]].max(in_prompt)


def _no_decisions(keys: Key[Array, " B"], prompt_scores: Float[Array, "B K"] | None, spec: DecodeSpec) -> Decisions:
    """Before the first span: equal weights, and room for P decisions."""
    b, k = len(keys), len(spec.members)
    reads = spec.policy.reads
    observation = Observation(
        hidden=tuple(jnp.zeros((b, config.hidden_width)) for config in spec.members) if "hidden" in reads else (),
        stats=jnp.zeros((b, k, len(STATS))) if "stats" in reads else (),
        span=jnp.zeros((b,), jnp.int32) if "span" in reads else (),
        prompt=() if prompt_scores is None else prompt_scores,
        text=jnp.zeros((b, spec.dims.text)) if "text" in reads else (),
        agreement=jnp.zeros((b, k, k)) if "agreement" in reads else (),
        so_far=SoFar.nothing(b, k) if "so_far" in reads else (),
    )
    shapes = jax.eval_shape(lambda: act(spec.policy.init(keys[0], spec.dims), observation, keys, spec))
    span = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return Decisions(
        span=span._replace(weights=jnp.full((b, k), 1.0 / k)),
        taken=jnp.zeros((b,), jnp.int32),
        trajectory=jax.tree.map(lambda leaf: jnp.zeros((b, spec.spans, *leaf.shape[1:]), leaf.dtype), span),
        next_step=jnp.zeros((b,), jnp.int32) if spec.span_lengths else None,
        token_log_probs=jnp.zeros((b, k)) if "stats" in reads else None,
        so_far=SoFar.nothing(b, k) if "so_far" in reads else None,
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


def member_agreement(log_probs: tuple[Float[Array, "B V"], ...]) -> Float[Array, "B K K"]:
    """sum_v sqrt(p_v q_v) of every two members (Bhattacharyya): 1 where they predict the same, 0 where they share no
    token."""
    k, b = len(log_probs), len(log_probs[0])
    rows = [[jnp.ones(b) for _ in range(k)] for _ in range(k)]
    for i in range(k):
        for j in range(i):  # sums that need no memory of their own, unlike a product of all pairs
            rows[i][j] = rows[j][i] = jnp.sum(jnp.exp(0.5 * (log_probs[i] + log_probs[j])), axis=-1)
    return jnp.stack([jnp.stack(row, axis=1) for row in rows], axis=1)


def action_keys(keys: Key[Array, " B"], span: Int[Array, " B"]) -> Key[Array, " B"]:
    """What rows draw their weights for a span with."""

    def one(key: Key[Array, ""], span: Array) -> Key[Array, ""]:
        return jax.random.fold_in(jax.random.fold_in(key, _ACTION_STREAM), span)

    return jax.vmap(one)(keys, span)


def act(policy_params: Any, observation: Observation, keys: Key[Array, " B"], spec: DecodeSpec) -> Span:
    """What the policy does about an observation; the keys are its rows' own for this span."""
    b = len(keys)
    if spec.record:
        observation = hide(spec.policy, observation, keys)
    distribution, value = spec.policy.apply(policy_params, observation)
    action = distribution.sample(keys) if spec.sample_weights else distribution.mode()
    action = jnp.broadcast_to(action, (b, action.shape[1]))
    log_prob = distribution.log_prob(action)
    return Span(
        observation=observation if spec.record else None,
        action=action,
        weights=distribution.to_weights(action),
        log_prob=jnp.broadcast_to(log_prob, (b, *log_prob.shape[1:])),
        value=jnp.broadcast_to(value, (b,)),
        length=cast(ChoosesLength, distribution).to_length(action) if spec.span_lengths else None,
    )


def _due(state: DecodeState, spec: DecodeSpec) -> Bool[Array, ""] | Bool[Array, " B"]:
    """Whether rows take a decision now: all at once, or each by itself."""
    if state.decisions.next_step is None:
        return state.step % spec.span_length == 0
    return ~state.done & (state.step >= state.decisions.next_step)


def _decide(
    state: DecodeState, due: Array, prediction: Prediction | None, policy_params: Any, spec: DecodeSpec
) -> Span:
    """The decision in force from now on. `prediction` is None where the policy does not look at one."""
    last = state.decisions

    def take() -> Span:
        observation = _observe(state, prediction, spec)
        keys = action_keys(state.rows.keys, _spans(state, spec))
        return act(policy_params, observation, keys, spec)

    def take_where_due() -> Span:
        return _select_rows(due, take(), last.span)

    some, decide = (jnp.any(due), take_where_due) if spec.span_lengths else (due, take)
    span: Span = lax.cond(some, decide, lambda: last.span)
    return span


def _decide_once(state: DecodeState, policy_params: Any, spec: DecodeSpec) -> Decisions:
    """All decisions of a policy whose decisions are alike, before the loop: on an accelerator a branch in every step
    costs more than such a policy."""
    span = act(policy_params, _observe(state, None, spec), state.rows.keys, spec)
    last = state.decisions.trajectory
    trajectory = jax.tree.map(lambda spans, one: jnp.broadcast_to(one[:, None], spans.shape), last, span)
    return state.decisions._replace(span=span, trajectory=trajectory)


def _spans(state: DecodeState, spec: DecodeSpec) -> Int[Array, " B"]:
    """The number of each row's span that begins now."""
    if not spec.span_lengths:
        return jnp.full(state.done.shape, state.step // spec.span_length)
    options = state.rows.options
    return state.decisions.taken if options is None else state.decisions.taken + options.spans


def _observe(state: DecodeState, prediction: Prediction | None, spec: DecodeSpec) -> Observation:
    """What the policy sees, as far as it reads it."""
    reads, decisions = spec.policy.reads, state.decisions
    last_length: Array | int = spec.span_length
    if decisions.span.length is not None:
        last_length = jnp.maximum(decisions.span.length, 1)[:, None].astype(jnp.float32)
    hidden: tuple[Array, ...] = ()
    stats: Array | tuple[()] = ()
    agreement: Array | tuple[()] = ()
    if prediction is not None and "hidden" in reads:
        hidden = tuple(h.astype(jnp.float32) for h in prediction.hidden)
    if prediction is not None and decisions.token_log_probs is not None:
        stats = member_stats(prediction.log_probs, decisions.token_log_probs / last_length)
    if prediction is not None and "agreement" in reads:
        agreement = member_agreement(prediction.log_probs)
    text = state.seen.text
    return Observation(
        hidden=hidden,
        stats=stats,
        span=_spans(state, spec) if "span" in reads else (),
        prompt=() if state.rows.prompt_scores is None else state.rows.prompt_scores,
        text=spec.reader.read(text) if spec.reader is not None and text is not None else (),
        agreement=agreement,
        so_far=() if decisions.so_far is None else decisions.so_far,
    )


def _select_rows(rows: Bool[Array, " B"], new: Span, old: Span) -> Span:
    """Leaves [B, ...] of `new` in some rows and of `old` in the others."""
    selected: Span = jax.tree.map(lambda x, y: jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), x, y), new, old)
    return selected


def fuse(
    passes: tuple[ForwardPass, ...],
    members: Lockstep | Ragged,
    prediction: Prediction,
    weights: Float[Array, "B K"],
    policy_params: Any,
    spec: DecodeSpec,
) -> Float[Array, "B V"]:
    """Log-probabilities of the next token, up to each row's normaliser; -inf where it may not follow."""
    fused = _fuse(passes, members, prediction, weights, spec)
    complement = getattr(spec.policy, "complement", None)
    if complement is None:
        return fused
    own: Array = complement(policy_params, tuple(h.astype(jnp.float32) for h in prediction.hidden))
    return fused + own


def _fuse(
    passes: tuple[ForwardPass, ...],
    members: Lockstep | Ragged,
    prediction: Prediction,
    weights: Float[Array, "B K"],
    spec: DecodeSpec,
) -> Float[Array, "B V"]:
    if isinstance(spec.fusion, Hidden):
        return passes[0].base_logits(spec.fusion(prediction.hidden, weights), spec.vocab)
    log_probs = tuple(members.allowed(log_p, spec) for log_p in prediction.log_probs)
    if isinstance(spec.fusion, Candidates):
        fused = spec.fusion(log_probs, weights, members.through_first_token(prediction, spec))
    else:
        fused = spec.fusion(log_probs, weights)
    return members.allowed(fused, spec)


class _Choice(NamedTuple):
    """What was chosen in a step."""

    token: Int[Array, " B"]  # 0 in rows that write nothing
    written: Bool[Array, " B"]  # rows that wrote it
    stuck: Bool[Array, " B"]  # rows that could not go on
    failed: Bool[Array, " B"]  # of these those whose prediction was not finite
    ended: Bool[Array, " B"]  # rows whose token ends them
    log_prob: Float[Array, "B 1"] | None  # of the token under the fused distribution, where scores are asked for
    top: tuple[Float[Array, "B X"], Int[Array, "B X"]] | None  # the likeliest tokens, where they are asked for


def _choose(state: DecodeState, members: Lockstep | Ragged, fused: Float[Array, "B V"], spec: DecodeSpec) -> _Choice:
    ends = constrain(jnp.asarray(np.isin(np.arange(spec.vocab), spec.end_ids)))
    options = state.rows.options
    normalised, scores = _scores(state, fused, spec)
    step, least = state.step, spec.min_new_tokens
    sampling: Sampling | RowSampling = spec.sampling
    may_end = jnp.ones((1,), bool)
    if options is not None:
        step, least = step + options.steps, options.min_new_tokens
        sampling, may_end = options.sampling, ~options.ignore_eos
    early = jnp.reshape(step < least, (-1, 1)) & may_end[:, None]
    scores = jnp.where(ends[None] & early, -jnp.inf, scores)
    if state.rows.forced is None:
        token, score = choose_token(scores, state.rows.keys, step, sampling)
    else:
        token = lax.dynamic_index_in_dim(state.rows.forced, state.step, axis=1, keepdims=False)
        score = jnp.take_along_axis(fused, token[:, None], axis=1)[:, 0]
    failed = ~state.done & _not_finite(score, members, state.rows.forced is not None)
    stuck = failed | (~state.done & members.stuck(scores, token, state.rows.forced is not None, spec))
    written = ~state.done & ~stuck
    token = jnp.where(written, token, 0)
    log_prob = jnp.take_along_axis(normalised, token[:, None], axis=1) if spec.scores else None
    ended = written & ends[token] & may_end
    return _Choice(token, written, stuck, failed, ended, log_prob, _top(normalised, options, spec))


def _not_finite(score: Float[Array, " B"], members: Lockstep | Ragged, forced: bool) -> Bool[Array, " B"]:
    """Rows whose prediction is not finite, by the score of what was chosen: a maximum, which any NaN makes NaN. Tokens
    at -inf may not follow; of a union it happens that none may, which is no failure."""
    failed = ~(score < jnp.inf)
    return failed if forced or isinstance(members, Ragged) else failed | (score == -jnp.inf)


def _scores(state: DecodeState, fused: Float[Array, "B V"], spec: DecodeSpec) -> tuple[Array, Array]:
    """Log-probabilities as far as somebody looks at them, else up to their normaliser, and with penalties."""

    def normalise() -> Array:
        return fused - jax.nn.logsumexp(fused, axis=-1, keepdims=True)

    options, seen = state.rows.options, state.seen.tokens
    if options is None or seen is None:
        normalised = normalise() if spec.sampling.penalised or spec.scores else fused
        return normalised, spec.sampling.penalise(normalised, seen)
    needed = options.sampling.penalised | (options.told > 0)

    def where_needed() -> tuple[Array, Array]:
        normalised = jnp.where(needed[:, None], normalise(), fused)
        return normalised, options.sampling.penalise(normalised, seen)

    found: tuple[Array, Array] = lax.cond(jnp.any(needed & ~state.done), where_needed, lambda: (fused, fused))
    return found


def _top(normalised: Float[Array, "B V"], options: RowOptions | None, spec: DecodeSpec) -> Any:
    """The likeliest tokens and their log-probabilities, if a row asks for them."""
    if not spec.top:
        return None
    if options is None:
        return lax.top_k(normalised, spec.top)
    b = len(normalised)
    nothing = jnp.zeros((b, spec.top)), jnp.zeros((b, spec.top), jnp.int32)
    asked = jnp.any(options.told > 1)
    return lax.cond(asked, lambda: tuple(lax.top_k(normalised, spec.top)), lambda: nothing)


def _record(
    state: DecodeState,
    members: Lockstep | Ragged,
    prediction: Prediction,
    due: Array,
    span: Span,
    choice: _Choice,
    spec: DecodeSpec,
) -> DecodeState:
    """The state after a step: what was chosen is written, and pending for every member."""
    step, token = state.step, choice.token
    token_log_probs, so_far, scores = state.decisions.token_log_probs, state.decisions.so_far, state.scores
    if token_log_probs is not None or so_far is not None or scores is not None:
        by_member = members.token_log_probs(prediction, token, spec)
        if token_log_probs is not None:
            token_log_probs = jnp.where(due[..., None], 0.0, token_log_probs) + members.observed(by_member)
        if so_far is not None:
            so_far = so_far.and_token(members.observed(by_member), span.weights, due, choice.written)
        if scores is not None and choice.log_prob is not None:
            top = scores.top
            if top is not None and choice.top is not None:
                log_probs, tokens = choice.top
                top = TopTokens(
                    lax.dynamic_update_slice(top.tokens, tokens[:, None], (0, step, 0)),
                    lax.dynamic_update_slice(top.log_probs, log_probs[:, None], (0, step, 0)),
                )
            scores = TokenScores(
                lax.dynamic_update_slice(scores.fused, choice.log_prob, (0, step)),
                lax.dynamic_update_slice(scores.members, by_member[:, None], (0, step, 0)),
                top,
            )
    seen = state.seen
    if seen.tokens is not None:
        seen = seen._replace(tokens=seen.tokens.at[jnp.arange(len(token)), token].max(choice.written))
    if spec.reader is not None and seen.text is not None:
        seen = seen._replace(text=spec.reader.append(seen.text, token, choice.written))
    return DecodeState(
        clock=state.clock + 1,
        rows=state.rows,
        members=members.append(token, choice.written, spec),
        seen=seen,
        decisions=_remember(state, due, span, choice.written, spec)._replace(
            token_log_probs=token_log_probs, so_far=so_far
        ),
        done=state.done | choice.stuck | choice.ended | (step + 1 >= state.rows.limits),
        ended=state.ended | choice.ended,
        steps=state.steps + choice.written.astype(jnp.int32),
        tokens=lax.dynamic_update_slice(state.tokens, token[:, None], (0, step)),
        scores=scores,
        failed=state.failed | choice.failed,
    )


def _remember(
    state: DecodeState,
    due: Array,
    span: Span,
    written: Bool[Array, " B"],
    spec: DecodeSpec,
) -> Decisions:
    """The trajectory with the decision in force."""
    last = state.decisions
    trajectory, next_step = last.trajectory, last.next_step
    if spec.decides_once:
        pass
    elif next_step is not None and span.length is not None:
        place = jnp.arange(len(due)), jnp.where(due, last.taken, spec.spans)  # beyond the end nothing is written
        trajectory = jax.tree.map(lambda spans, one: spans.at[place].set(one, mode="drop"), last.trajectory, span)
        next_step = jnp.where(due, state.step + span.length, next_step)
    else:
        # Written at every step, not only at boundaries: an in-place write of a few numbers beats a branch.
        write = functools.partial(lax.dynamic_update_index_in_dim, index=state.step // spec.span_length, axis=1)
        trajectory = jax.tree.map(write, last.trajectory, span)
    taken = last.taken + (due & written).astype(jnp.int32)
    return last._replace(span=span, taken=taken, trajectory=trajectory, next_step=next_step)


def _step(passes: tuple[ForwardPass, ...], policy_params: Any, spec: DecodeSpec, state: DecodeState) -> DecodeState:
    """Read, decide, fuse, choose, record."""
    due = _due(state, spec)
    span, prediction = state.decisions.span, None
    if spec.decides_first and not spec.decides_once:
        span = _decide(state, due, prediction, policy_params, spec)
    members, prediction = state.members.read(passes, state.step, ~state.done, span.weights, spec)
    if not spec.decides_first and not spec.decides_once:
        span = _decide(state, due, prediction, policy_params, spec)
    fused = fuse(passes, members, prediction, span.weights, policy_params, spec)
    choice = _choose(state, members, fused, spec)
    return _record(state, members, prediction, due, span, choice, spec)


def decode_spans(
    params: tuple[MemberParams, ...],
    state: DecodeState,
    policy_params: Any,
    spec: DecodeSpec,
    until: Int[Array, ""] | None = None,
) -> DecodeState:
    """Runs the loop until every row is done, or up to step `until`. Jit it with `state` donated: the caches are updated
    in place."""
    # Outside the loop: what adapters need is laid out once.
    passes = bind_members(params, spec, state.members.rows(len(spec.members)))
    if spec.decides_once:
        state = state._replace(decisions=_decide_once(state, policy_params, spec))
    step = functools.partial(_step, passes, policy_params, spec)

    def going(state: DecodeState) -> Bool[Array, ""]:
        some = ~jnp.all(state.done)
        return some if until is None else some & (state.step < until)

    return lax.while_loop(going, step, state)


def params_places(params: tuple[MemberParams, ...], spec: DecodeSpec) -> tuple[Any, ...]:
    """Where the members' arrays lie in `sharding.by_rows`: rows' choices of adapters with their rows."""

    def one(p: MemberParams) -> Any:
        if not isinstance(p, lora.Adapted):
            return WHOLE
        return lora.Adapted._make((WHOLE, WHOLE, ROWS if len(p.weights) > 1 and not spec.shared_base else WHOLE))

    return tuple(map(one, params))


def decoding_places(params: tuple[MemberParams, ...], policy_params: Any, spec: DecodeSpec) -> tuple[Any, ...]:
    """Where members' arrays, rows (prompts or a state), a policy's parameters and the spec lie in `by_rows`."""
    return params_places(params, spec), ROWS, policy_places(spec.policy, policy_params), WHOLE


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
    prompts = prompts_from_arrays(prompt_ids, prompt_mask, spec.max_new_tokens, key, active)

    def run(params: tuple[MemberParams, ...], prompts: Prompts, policy_params: Any, spec: DecodeSpec) -> DecodeState:
        return decode_spans(params, prefill(params, prompts, spec), policy_params, spec)

    state: DecodeState = by_rows(run, decoding_places(params, policy_params, spec))(
        params, prompts, policy_params, spec
    )
    return state


# Bytes of weights, keys and values that a step finds in a processor's cache, and the fewest rows whose products are
# still efficient.
_CACHED_BYTES = 16 * 2**20
_LEAST_ROWS = 32


def decode_batch(
    params: tuple[MemberParams, ...], prompts: Prompts, policy_params: Any, spec: DecodeSpec, samples: int = 1
) -> Answers:
    """As `decode`, for who reads the answers alone. On the CPU a large batch may be decoded a group of rows after
    another, which gives the same answers.

    Args:
      samples: answers per prompt, one after another, which share its prefill.
    """
    b = prompts.batch

    def run(prompts: Prompts, spec: DecodeSpec, policy_params: Any) -> Answers:
        state = prefill(params, prompts, spec)
        state = state if samples == 1 else repeat_rows(state, samples)
        return answers_of(decode_spans(params, state, policy_params, spec))

    groups = _row_groups(params, prompts, spec, samples)
    if groups == 1:
        return run(prompts, spec, policy_params)
    n = b // groups

    def of_group(group: tuple[Array, Prompts]) -> Answers:
        start, own = group
        policy, own_params = slice_rows(spec.policy, policy_params, start * samples, n * samples, b * samples)
        return run(own, dataclasses.replace(spec, policy=policy), own_params)

    split = jax.tree.map(lambda leaf: jnp.asarray(leaf).reshape(groups, n, *leaf.shape[1:]), prompts)
    answers = lax.map(of_group, (jnp.arange(groups) * n, split))
    joined: Answers = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), answers)
    return joined


def _row_groups(params: tuple[MemberParams, ...], prompts: Prompts, spec: DecodeSpec, samples: int) -> int:
    """In how many groups a batch is decoded.

    A step of small members at a large batch spends most of its time reading keys and values, and reads them all again
    in the next one. On the CPU those of a group may stay in the processor's cache, if the weights, which every group
    reads anew, do so, too.
    """
    if sharding.platform() != "cpu" or any(not isinstance(p, dict) for p in params):
        return 1
    b = prompts.batch
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    kept = 0
    for k, member in enumerate(spec.members):
        prompt = prompts.ids[k % len(prompts.ids)].shape[1]
        answer = spec.max_new_tokens if spec.union is None else spec.member_tokens
        if member.encoder is None:
            kept += b * samples * cache_bytes(member, prompt + answer)
        else:  # samples share what it read
            kept += b * (cache_bytes(member, prompt) + samples * cache_bytes(member, answer))
    agents = getattr(spec.policy, "agents", 1)  # whose rows stand together
    groups = 1
    while weights + kept / groups > _CACHED_BYTES:
        groups = agents if groups == 1 < agents else 2 * groups
        if b % groups or b // groups * samples < _LEAST_ROWS:
            return 1
    return groups
