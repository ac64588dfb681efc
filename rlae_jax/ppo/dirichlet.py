"""The Dirichlet distribution over weights: sampling, mean, log-density and entropy that stay finite at the corners.

Concentrations far below 1 put almost all mass where float32 has no numbers: components underflow to 0 and log-densities
to infinity. So samples come from the logarithms of Gamma variables, and every component is clamped to at least
`SMALLEST_WEIGHT` before a density is taken.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import digamma, gammaln
from jaxtyping import Array, Float, Key

SMALLEST_WEIGHT = 1e-6


def clamp_to_simplex(weights: Float[Array, "*B K"]) -> Float[Array, "*B K"]:
    """The nearest weights with every component at least about `SMALLEST_WEIGHT`, summing to 1."""
    clamped = jnp.maximum(weights, SMALLEST_WEIGHT)
    return clamped / jnp.sum(clamped, axis=-1, keepdims=True)


class Dirichlet(NamedTuple):
    """Dir(alpha) per row: density prod_k w_k^(alpha_k - 1) / B(alpha) on the simplex."""

    concentration: Float[Array, "*B K"]

    def sample(self, keys: Key[Array, " B"]) -> Float[Array, "B K"]:
        """g_k ~ Gamma(alpha_k, 1), w = g / sum g, one key per row."""
        log_gammas = jax.vmap(jax.random.loggamma)(keys, self.concentration)
        return clamp_to_simplex(jax.nn.softmax(log_gammas, axis=-1))

    def mode(self) -> Float[Array, "*B K"]:
        """What an agent does when it does not explore: the mean alpha / sum alpha. The density's own maximum lies at a
        corner, and jumps between corners, as soon as a concentration falls below 1."""
        return self.concentration / jnp.sum(self.concentration, axis=-1, keepdims=True)

    def log_prob(self, weights: Float[Array, "*B K"]) -> Float[Array, "*B"]:
        """ln Gamma(sum alpha) - sum ln Gamma(alpha_k) + sum (alpha_k - 1) ln w_k, with w clamped."""
        alpha, log_w = self.concentration, jnp.log(clamp_to_simplex(weights))
        return gammaln(jnp.sum(alpha, axis=-1)) + jnp.sum((alpha - 1.0) * log_w - gammaln(alpha), axis=-1)

    def entropy(self) -> Float[Array, "*B"]:
        """ln B(alpha) + (a0 - K) psi(a0) - sum (alpha_k - 1) psi(alpha_k), a0 = sum alpha; differential, in nats."""
        alpha = self.concentration
        total = jnp.sum(alpha, axis=-1)
        log_beta = jnp.sum(gammaln(alpha), axis=-1) - gammaln(total)
        return log_beta + (total - alpha.shape[-1]) * digamma(total) - jnp.sum((alpha - 1.0) * digamma(alpha), axis=-1)

    def to_weights(self, action: Float[Array, "*B K"]) -> Float[Array, "*B K"]:
        """An action is the weights themselves."""
        return action
