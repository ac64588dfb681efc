"""Fusion operators: K predictions and weights -> one distribution.

An operator is a pure function `(log_probs, weights) -> fused`, with log_probs a tuple of K arrays Float[B, V] (each
row's log-probabilities under one member), weights Float[B, K] and fused Float[B, V]: log-probabilities up to a constant
per row, which neither the choice of a token nor a softmax sees. Give `Ensemble` one of the names below or a function of
your own; it is traced into the decoding loop.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from rlae_jax.errors import InputError

FusionOperator = Callable[[tuple[Array, ...], Array], Array]


def linear(log_probs: tuple[Float[Array, "B V"], ...], weights: Float[Array, "B K"]) -> Float[Array, "B V"]:
    """log sum_k w_k p_k: the weighted mean of probabilities (RLAE, arXiv 2506.00439, section 3).

    Summed in the log domain, so that a token improbable to every member keeps its order, and so that a one-hot weight
    returns that member's log-probabilities bit for bit.
    """
    terms = [log_p + jnp.log(weights[:, k, None]) for k, log_p in enumerate(log_probs)]
    largest = terms[0]
    for term in terms[1:]:
        largest = jnp.maximum(largest, term)
    # Where even the largest term is -inf the token is impossible; shifting by 0 there avoids inf - inf.
    shift = jnp.where(jnp.isfinite(largest), largest, 0.0)
    total = sum(jnp.exp(term - shift) for term in terms)
    return shift + jnp.log(total)


def loglinear(log_probs: tuple[Float[Array, "B V"], ...], weights: Float[Array, "B K"]) -> Float[Array, "B V"]:
    """sum_k w_k log p_k, up to each row's normaliser: the weighted geometric mean (product of experts)."""
    # A member with weight 0 has no say, not even by a probability of 0 (0 * -inf).
    terms = [jnp.where(weights[:, k, None] > 0, weights[:, k, None] * log_p, 0.0) for k, log_p in enumerate(log_probs)]
    return sum(terms[1:], terms[0])


OPERATORS: dict[str, FusionOperator] = {"linear": linear, "loglinear": loglinear}


def get_operator(fusion: str | FusionOperator) -> FusionOperator:
    """The operator of a name, or the function itself.

    Raises:
      InputError: an unknown name.
    """
    if callable(fusion):
        return fusion
    if fusion not in OPERATORS:
        raise InputError(f"fusion {fusion!r} is unknown; use one of {', '.join(OPERATORS)}, or a pure function")
    return OPERATORS[fusion]
