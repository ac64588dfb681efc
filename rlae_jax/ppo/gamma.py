"""Gamma variables of which each agent draws one: the action of several agents that set one member's weight each.

Agent k draws g_k ~ Gamma(alpha_k, 1) and the weights are g / sum g, which are Dir(alpha) distributed; the sum itself is
Gamma(sum alpha, 1), independent of them, and has no effect. So all agents together act like one with a Dirichlet, while
each has a likelihood of its own. Actions are ln g: small concentrations put g itself beyond float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln
from jaxtyping import Array, Float, Key

from rlae_jax.ppo.dirichlet import Dirichlet, clamp_to_simplex


class LogGammas(NamedTuple):
    """ln g_k, g_k ~ Gamma(alpha_k, 1), independent."""

    concentration: Float[Array, "*B K"]

    def sample(self, keys: Key[Array, " B"]) -> Float[Array, "B K"]:
        """One key per row."""
        return jax.vmap(jax.random.loggamma)(keys, self.concentration)

    def mode(self) -> Float[Array, "*B K"]:
        """What the agents do when they do not explore: ln alpha, which gives the weights their mean."""
        return jnp.log(self.concentration)

    def log_prob(self, action: Float[Array, "*B K"]) -> Float[Array, "*B K"]:
        """Each agent's own: alpha_k ln g_k - g_k - ln Gamma(alpha_k), the density of ln g_k."""
        return self.concentration * action - jnp.exp(action) - gammaln(self.concentration)

    def entropy(self) -> Float[Array, "*B"]:
        """That of the weights. An agent's own would count the sum, and so reward what has no effect."""
        return Dirichlet(self.concentration).entropy()

    def to_weights(self, action: Float[Array, "*B K"]) -> Float[Array, "*B K"]:
        """g / sum g."""
        return clamp_to_simplex(jax.nn.softmax(action, axis=-1))
