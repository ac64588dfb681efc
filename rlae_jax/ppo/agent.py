"""The PPO agent: one network that reads the observation and sets all weights of a span at once.

hidden [B, D_k]   -> normalised -> a projection per member -+
stats  [B, K, 4]  ------------------------------------------+-> actor MLP  -> Dirichlet over the simplex
span   [B]        -> embedding -----------------------------+-> critic MLP -> value
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from rlae_jax.config import AgentConfig
from rlae_jax.fusion.policy import STATS, Dims, Observation
from rlae_jax.ppo.dirichlet import Dirichlet

Mlp = dict[str, Array]


def init_mlp(key: Key[Array, ""], inputs: int, width: int, outputs: int) -> Mlp:
    """One hidden layer; the output layer starts near zero, so that training starts from an undecided agent."""
    first, second = jax.random.split(key)
    return {
        "w1": jax.random.normal(first, (inputs, width)) * inputs**-0.5,
        "b1": jnp.zeros((width,)),
        "w2": jax.random.normal(second, (width, outputs)) * 0.01 * width**-0.5,
        "b2": jnp.zeros((outputs,)),
    }


def apply_mlp(mlp: Mlp, x: Float[Array, "B I"]) -> Float[Array, "B O"]:
    """w2 tanh(w1 x + b1) + b2."""
    return jnp.tanh(x @ mlp["w1"] + mlp["b1"]) @ mlp["w2"] + mlp["b2"]


@dataclasses.dataclass(frozen=True)
class PPOAgent:
    """A `Policy` (see rlae_jax.fusion.policy) with a Dirichlet over the simplex and a learned value."""

    config: AgentConfig = dataclasses.field(default_factory=AgentConfig)

    @property
    def reads(self) -> tuple[str, ...]:
        return self.config.reads

    def init(self, key: Key[Array, ""], dims: Dims) -> dict[str, Any]:
        """Parameters for members of these widths and answers of at most `dims.spans` spans."""
        config = self.config
        keys = jax.random.split(key, dims.members + 3)
        params: dict[str, Any] = {}
        inputs = 0
        if "hidden" in config.reads:
            params["projections"] = {
                f"member_{k}": jax.random.normal(keys[3 + k], (width, config.projection)) * width**-0.5
                for k, width in enumerate(dims.widths)
            }
            inputs += dims.members * config.projection
        if "stats" in config.reads:
            inputs += dims.members * len(STATS)
        if "prompt" in config.reads:
            inputs += dims.members
        if "span" in config.reads:
            params["span_embedding"] = jax.random.normal(keys[0], (dims.spans, config.span_embedding)) * 0.1
            inputs += config.span_embedding
        params["actor"] = init_mlp(keys[1], inputs, config.ffn_width, dims.members)
        # softplus^-1: every weight starts with this concentration.
        params["actor"]["b2"] += math.log(math.expm1(config.initial_concentration))
        params["critic"] = init_mlp(keys[2], inputs, config.ffn_width, 1)
        return params

    def features(self, params: dict[str, Any], observation: Observation) -> Float[Array, "B I"]:
        """The concatenated parts of the observation that the configuration names."""
        parts = []
        if "hidden" in self.reads:
            for k, hidden in enumerate(observation.hidden):
                normed = hidden * jax.lax.rsqrt(jnp.mean(hidden * hidden, axis=-1, keepdims=True) + 1e-6)
                parts.append(normed @ params["projections"][f"member_{k}"])
        if "stats" in self.reads:
            parts.append(observation.stats.reshape(observation.stats.shape[0], -1))
        if "prompt" in self.reads:
            parts.append(observation.prompt)
        if "span" in self.reads:
            # Answers longer than in training reuse the last span's embedding.
            last = params["span_embedding"].shape[0] - 1
            parts.append(params["span_embedding"][jnp.minimum(observation.span, last)])
        return jnp.concatenate(parts, axis=-1)

    def apply(self, params: dict[str, Any], observation: Observation) -> tuple[Dirichlet, Float[Array, "B"]]:
        """Dir(softplus(actor) + floor) (RLAE, arXiv 2506.00439, section 3.3) and the critic's value."""
        features = self.features(params, observation)
        concentration = jax.nn.softplus(apply_mlp(params["actor"], features)) + self.config.concentration_floor
        return Dirichlet(concentration), apply_mlp(params["critic"], features)[:, 0]
