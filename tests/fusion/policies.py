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


@dataclasses.dataclass(frozen=True)
class Reader:
    """Scores each member by a fixed linear function of everything in the observation."""

    reads: tuple[str, ...] = ("hidden", "stats", "span")

    def init(self, key, dims):
        rng = np.random.default_rng(int(jax.random.key_data(key)[-1]))
        return {
            "hidden": tuple(jnp.asarray(rng.normal(0, 1.5, (width,)) / width, jnp.float32) for width in dims.widths),
            "stats": jnp.asarray(rng.normal(0, 0.2, 4), jnp.float32),
            "span": jnp.asarray(rng.normal(0, 0.5, (dims.spans, dims.members)), jnp.float32),
        }

    def apply(self, params, observation):
        hidden = jnp.stack([h @ w for h, w in zip(observation.hidden, params["hidden"], strict=True)], axis=1)
        logits = hidden + observation.stats @ params["stats"] + params["span"][observation.span]
        return SoftmaxNoise(logits), jnp.sum(logits, axis=-1)

    def logits(self, params, span, hidden, stats):
        """`apply` for one row, in numpy."""
        scores = [h @ np.asarray(w, np.float64) for h, w in zip(hidden, params["hidden"], strict=True)]
        return scores + stats @ np.asarray(params["stats"], np.float64) + np.asarray(params["span"], np.float64)[span]
