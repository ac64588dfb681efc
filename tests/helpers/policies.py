"""Policies for tests: a small one that reads everything and can be computed in numpy as well."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class SoftmaxNoise(NamedTuple):
    """softmax(logits + Gumbel noise); its mode is softmax(logits)."""

    logits_bk: Any

    def sample(self, keys):
        noise = jax.vmap(lambda key: jax.random.gumbel(key, self.logits_bk.shape[1:]))(keys)
        return jax.nn.softmax(self.logits_bk + noise, axis=-1)

    def mode(self):
        return jax.nn.softmax(self.logits_bk, axis=-1)

    def log_prob(self, weights_bk):
        return jnp.sum(weights_bk * self.logits_bk, axis=-1)

    def entropy(self):
        return jnp.zeros(self.logits_bk.shape[0])

    def to_weights(self, action_bk):
        return action_bk


@dataclasses.dataclass(frozen=True)
class Reader:
    """Scores each member by a fixed linear function of everything in the observation."""

    reads: tuple[str, ...] = ("hidden", "stats", "span")

    def init(self, key, dims):
        stats, span, *hidden = jax.random.split(key, 2 + dims.members)
        return {
            "hidden": tuple(1.5 * jax.random.normal(k, (w,)) / w for k, w in zip(hidden, dims.widths, strict=True)),
            "stats": 0.2 * jax.random.normal(stats, (4,)),
            "span": 0.5 * jax.random.normal(span, (dims.spans, dims.members)),
        }

    def apply(self, params, observation):
        hidden = jnp.stack([h @ w for h, w in zip(observation.hidden, params["hidden"], strict=True)], axis=1)
        logits = hidden + observation.stats @ params["stats"] + params["span"][observation.span]
        return SoftmaxNoise(logits), jnp.sum(logits, axis=-1)

    def logits(self, params, span, hidden, stats):
        """`apply` for one row, in numpy."""
        scores = [h @ np.asarray(w, np.float64) for h, w in zip(hidden, params["hidden"], strict=True)]
        return scores + stats @ np.asarray(params["stats"], np.float64) + np.asarray(params["span"], np.float64)[span]
