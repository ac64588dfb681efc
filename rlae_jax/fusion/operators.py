"""Fusion operators: K predictions and weights -> one distribution.

An operator is a pure function `(log_probs, weights) -> fused`, with log_probs a tuple of K arrays Float[B, V] (each
row's log-probabilities under one member), weights Float[B, K] and fused Float[B, V]: log-probabilities up to a constant
per row, which neither the choice of a token nor a softmax sees. Give `Ensemble` one of the names below or a function of
your own; it is traced into the decoding loop. `Hidden` alone fuses states, of members that share a head.

With different tokenizers V is the union vocabulary and a member's log-probability is -inf for entries that it lacks.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from rlae_jax import ranges
from rlae_jax.errors import InputError
from rlae_jax.ranges import Count, CountOr0, Factor

FusionOperator = Callable[..., Array]  # (log_probs, weights) -> fused; hashable


def linear(log_probs: tuple[Float[Array, "B V"], ...], weights: Float[Array, "#B K"]) -> Float[Array, "B V"]:
    """log sum_k w_k p_k: the weighted mean of probabilities (RLAE, arXiv 2506.00439, section 3).

    Summed in the log domain, so that a token improbable to every member keeps its order, and so that a one-hot weight
    returns that member's log-probabilities bit for bit.
    """
    # A member with weight 0 has no say, not even by numbers that are none.
    logs = [jnp.where(weights[:, k, None] == 0, 0.0, log_p) for k, log_p in enumerate(log_probs)]
    terms = [log_p + jnp.log(weights[:, k, None]) for k, log_p in enumerate(logs)]
    largest = terms[0]
    for term in terms[1:]:
        largest = jnp.maximum(largest, term)
    # Where even the largest term is -inf the token is impossible; shifting by 0 there avoids inf - inf.
    shift = jnp.where(jnp.isfinite(largest), largest, 0.0)
    total = sum(jnp.exp(term - shift) for term in terms)
    return shift + jnp.log(total)


def loglinear(log_probs: tuple[Float[Array, "B V"], ...], weights: Float[Array, "#B K"]) -> Float[Array, "B V"]:
    """sum_k w_k log p_k, up to each row's normaliser: the weighted geometric mean (product of experts)."""
    # A member with weight 0 has no say, not even by a probability of 0 (0 * -inf).
    terms = [jnp.where(weights[:, k, None] <= 0, 0.0, weights[:, k, None] * log_p) for k, log_p in enumerate(log_probs)]
    return sum(terms[1:], terms[0])


# Operators for which a member of weight 0 need not be read at all.
IGNORE_ZERO_WEIGHTS: tuple[FusionOperator, ...] = (linear, loglinear)


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The weighted mean of probabilities over a few candidates: the k most probable tokens of each member with weight
    (UniTE, arXiv 2410.12777), or of one chosen member.

    A member that lacks a candidate is read through the first token of its spelling. Each member's probabilities are
    normalised over the candidates.
    """

    k: Count = 10
    primary: CountOr0 | None = None  # the only member that names candidates; None: every member with weight

    def __post_init__(self) -> None:
        ranges.check(self)

    def __call__(
        self,
        log_probs: tuple[Float[Array, "B V"], ...],
        weights: Float[Array, "#B K"],
        read: tuple[Float[Array, "B V"], ...] | None = None,
    ) -> Float[Array, "B V"]:
        """`read` is like `log_probs`, but through first tokens where a member lacks one; by default the same."""
        candidate = jnp.zeros(log_probs[0].shape, bool)
        for m, log_p in enumerate(log_probs):
            if self.primary in (None, m):
                least = lax.top_k(log_p, min(self.k, log_p.shape[1]))[0][:, -1:]
                # What is no number is a candidate, so that it is noticed.
                named = ((log_p >= least) & (log_p > -jnp.inf)) | jnp.isnan(log_p)
                candidate = candidate | (named if self.primary == m else named & (weights[:, m, None] > 0))
        normalised = []
        for log_p in log_probs if read is None else read:
            kept = jnp.where(candidate, log_p, -jnp.inf)
            total = jax.nn.logsumexp(kept, axis=-1, keepdims=True)
            # A member that can read no candidate has no say.
            normalised.append(jnp.where(jnp.isneginf(total), -jnp.inf, kept - total))
        return linear(tuple(normalised), weights)


@dataclasses.dataclass(frozen=True)
class Proxy:
    """log p_base + alpha (log p_expert - log p_anti-expert) of three members in this order (proxy tuning, Liu et al.,
    2024, on log-probabilities). Weights are not read. The difference counts where both have the token."""

    alpha: Factor = 1.0

    def __post_init__(self) -> None:
        ranges.check(self)

    def __call__(
        self, log_probs: tuple[Float[Array, "B V"], ...], weights: Float[Array, "#B K"] | None
    ) -> Float[Array, "B V"]:
        del weights
        base, expert, anti = log_probs
        both = ~(jnp.isneginf(expert) | jnp.isneginf(anti))
        return base + self.alpha * jnp.where(both, jnp.where(both, expert, 0.0) - jnp.where(both, anti, 0.0), 0.0)


@dataclasses.dataclass(frozen=True)
class Hidden:
    """head(sum_k w_k h_k): the members' last hidden states, after the final norm, are summed, and the head that they
    share reads the sum (EMORL, arXiv 2505.02579, section 3.2). Weights are taken as given, not normalised.

    With a linear head without soft caps the result is sum_k w_k logits_k, exactly; what it saves is all heads but one.
    Greedily it depends on the direction of the weights alone; their size is an inverse temperature when sampling.
    """

    def __call__(self, hidden: tuple[Float[Array, "B D"], ...], weights: Float[Array, "#B K"]) -> Float[Array, "B D"]:
        """The fused state. Unlike those of other operators, the arguments are states rather than log-probabilities."""
        total = sum(weights[:, k, None] * h.astype(jnp.float32) for k, h in enumerate(hidden))
        return jnp.asarray(total).astype(hidden[0].dtype)


# What each name makes; those with a parameter take a number after a colon.
OPERATORS: dict[str, Any] = {
    "linear": lambda: linear,
    "loglinear": lambda: loglinear,
    "topk": lambda k="10": Candidates(ranges.read(k, Count, "fusion topk:")),
    "primary": lambda member="0": Candidates(primary=ranges.read(member, CountOr0, "fusion primary:")),
    "proxy": lambda alpha="1": Proxy(ranges.read(alpha, Factor, "fusion proxy:")),
    "hidden": Hidden,
}


def get_operator(fusion: str | FusionOperator, members: int) -> FusionOperator:
    """The operator of a name ("linear", "loglinear", "topk[:k]", "primary[:member]", "proxy[:alpha]", "hidden"), or the
    function itself.

    Raises:
      InputError: an unknown name, a number it cannot take, or another number of members than it needs.
    """
    if not isinstance(fusion, str):
        operator = fusion
    else:
        name, *number = fusion.split(":", 1)
        if name not in OPERATORS or (number and not inspect.signature(OPERATORS[name]).parameters):
            raise InputError(f"fusion {fusion!r} is unknown; use one of {', '.join(OPERATORS)}, or a pure function")
        operator = OPERATORS[name](*number)
    if isinstance(operator, Proxy) and members != 3:
        raise InputError(f"proxy needs three members (base, expert, anti-expert), not {members}")
    if isinstance(operator, Candidates) and operator.primary is not None and operator.primary >= members:
        raise InputError(f"primary:{operator.primary}: the members are numbered 0 to {members - 1}")
    return operator
