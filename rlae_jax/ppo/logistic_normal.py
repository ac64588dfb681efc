"""The logistic-normal distribution over weights: softmax of a Gaussian. Beside the Dirichlet, its spread is a parameter
of its own and its density has no poles at the corners."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

_HALF_LOG_TAU = 0.5 * math.log(2 * math.pi)


class LogisticNormal(NamedTuple):
    """z ~ N(mean, exp(log_std)^2) in K - 1 dimensions, w = softmax([z, 0]) (Aitchison and Shen, 1980). Actions: z."""

    mean: Float[Array, "B J"]
    log_std: Float[Array, "B J"]

    def sample(self, keys: Key[Array, " B"]) -> Float[Array, "B J"]:
        """One key per row."""
        noise = jax.vmap(lambda key: jax.random.normal(key, self.mean.shape[1:]))(keys)
        return self.mean + jnp.exp(self.log_std) * noise

    def mode(self) -> Float[Array, "B J"]:
        """The mean of z."""
        return self.mean

    def log_prob(self, action: Float[Array, "B J"]) -> Float[Array, " B"]:
        """The density of z, which differs from that of the weights by a factor that depends on no parameter."""
        standard = (action - self.mean) * jnp.exp(-self.log_std)
        return jnp.sum(-0.5 * standard**2 - self.log_std - _HALF_LOG_TAU, axis=-1)

    def entropy(self) -> Float[Array, " B"]:
        """That of z, in nats: sum ln sigma + (K - 1) (1 + ln 2 pi) / 2."""
        return jnp.sum(self.log_std + 0.5 + _HALF_LOG_TAU, axis=-1)

    def to_weights(self, action: Float[Array, "B J"]) -> Float[Array, "B K"]:
        """softmax([z, 0])."""
        return jax.nn.softmax(jnp.pad(action, ((0, 0), (0, 1))), axis=-1)
