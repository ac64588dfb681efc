"""From what a user gives as weights to a policy with its parameters for a batch."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from rlae_jax.errors import InputError, grouped_error
from rlae_jax.fusion.operators import FusionOperator, Hidden
from rlae_jax.fusion.policy import NAMED_POLICIES, BoundPolicy, Dims, Fixed, Policy
from rlae_jax.fusion.sampling import DEFAULT_SPAN_LENGTH

# Also what is no weights at all, of which `bind_weights` says what is wrong.
Weights = Sequence[float] | Sequence[Sequence[float]] | np.ndarray | Array | float | str | Policy | BoundPolicy | None


class PolicyForBatch(NamedTuple):
    """What decoding needs to know about weights."""

    policy: Policy
    params: Any
    sample: bool  # whether actions are drawn


def named_policy(weights: Weights) -> Weights:
    """Weights in which a policy's name is the policy.

    Raises:
      InputError: an unknown name.
    """
    if not isinstance(weights, str):
        return weights
    if weights not in NAMED_POLICIES:
        raise InputError(f"policy {weights!r} is unknown; known: {', '.join(NAMED_POLICIES)}")
    return NAMED_POLICIES[weights]


def span_length_of(weights: Weights, given: int | None) -> int:
    """L: as given, or what the policy was made for, else 4.

    Raises:
      InputError: a length below 1.
    """
    if given is None:
        return getattr(named_policy(weights), "span_length", DEFAULT_SPAN_LENGTH)
    if given < 1:
        raise InputError(f"span_length must be at least 1, not {given}")
    return given


def normalise_weights(weights: Any, batch: int, members: int, *, given: bool = False) -> Float[np.ndarray, "B K"]:
    """Checks [K] or [B, K] weights and scales each row to sum to 1, or leaves them as they are given.

    Raises:
      InputError: a wrong shape, or a row that is negative, not finite or all zero.
    """
    try:
        array = np.asarray(weights, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"weights must be numbers, [K] or [B, K], or a policy ({error})") from error
    if array.shape not in ((members,), (batch, members)):
        raise InputError(
            f"weights have shape {list(array.shape)}; expected [{members}] (one per member) or [{batch}, {members}] "
            "(one row per prompt)"
        )
    rows = np.broadcast_to(array, (batch, members))
    findings = []
    for b, row in enumerate(rows if array.ndim == 2 else rows[:1]):
        where = f"prompt {b}: {row.tolist()}" if array.ndim == 2 else str(row.tolist())
        if not np.all(np.isfinite(row)):
            findings.append(("not finite", where))
        elif np.any(row < 0):
            findings.append(("negative", where))
        elif not np.any(row > 0):
            findings.append(("all zero", where))
    if findings:
        raise grouped_error("unusable weights", findings, "each row needs weights >= 0, at least one of them > 0")
    return rows if given else rows / rows.sum(axis=1, keepdims=True)


def bind_weights(
    weights: Weights,
    batch: int,
    dims: Dims,
    span_length: int | None,
    *,
    fusion: FusionOperator,
    continues: bool,
    fingerprints: Callable[[], Sequence[str]],
) -> PolicyForBatch:
    """The policy that any of `Ensemble.generate`'s weights are.

    Args:
      dims: of the ensemble's members and of the answers at hand.
      span_length: as given by the user.
      continues: whether answers continue their prompts.
      fingerprints: gives the members'.

    Raises:
      InputError: weights of a wrong shape or value, a policy trained for other members, if it takes only those, for
        shorter answers or for another span length.
    """
    weights = named_policy(weights)
    if isinstance(weights, BoundPolicy):
        for_members = getattr(weights.policy, "for_members", None)
        if for_members is None and weights.dims.widths != dims.widths:
            raise InputError(
                f"the policy was trained for members of width {list(weights.dims.widths)}; "
                f"these have {list(dims.widths)} (a set agent takes any members)"
            )
        if span_length not in (None, weights.span_length):
            raise InputError(
                f"the policy was trained with spans of {weights.span_length} steps, not {span_length}; "
                "leave span_length out"
            )
        if "span" in weights.policy.reads and dims.spans > weights.dims.spans:
            raise InputError(
                f"{dims.spans} spans of {weights.span_length} tokens: the policy was trained for answers of at most "
                f"{weights.dims.spans}, {weights.dims.spans * weights.span_length} tokens; lower max_new_tokens, or "
                "train with a larger agent.max_spans"
            )
        policy = weights.policy
        if for_members is not None and weights.members:
            policy = for_members(tuple(mark in weights.members for mark in fingerprints()))
        return PolicyForBatch(policy, weights.params, weights.sample)
    k = dims.members
    if weights is None:
        return PolicyForBatch(Fixed(), np.full((batch, k), 1 / k, np.float32), False)
    if isinstance(weights, Policy):
        if "prompt" in weights.reads and not continues:
            raise InputError(f"{type(weights).__name__} reads how likely a prompt is; an encoder-decoder cannot say")
        params = weights.init(jax.random.key(0), dims)
        return PolicyForBatch(weights, params, getattr(weights, "draws_members", False))
    normalised = normalise_weights(weights, batch, k, given=isinstance(fusion, Hidden))
    return PolicyForBatch(Fixed(), normalised, False)
