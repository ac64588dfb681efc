"""Two models write one answer, with fixed weights and with weights of your own making.

    python examples/two_models.py DIR_A DIR_B "Once upon a time"

The directories hold language models; their tokenizers may differ.
"""

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import rlae_jax as rj
from rlae_jax.fusion.policy import Deterministic, Dims, Observation


@dataclasses.dataclass(frozen=True)
class TakeTurns:
    """All weight on one member for a span, then on the next: a policy is just `reads`, `init` and `apply`."""

    reads: tuple[str, ...] = ("span",)

    def init(self, key: Array, dims: Dims) -> Array:
        return jnp.eye(dims.members)

    def apply(self, params: Array, observation: Observation) -> tuple[Deterministic, Array]:
        weights = params[observation.span % params.shape[0]]
        return Deterministic(weights), jnp.zeros(weights.shape[0])


def geometric_mean(log_probs: tuple[Array, ...], weights: Array) -> Array:
    """A fusion operator of one's own: a pure function of K arrays [B, V] and weights [B, K]."""
    return sum((weights[:, k, None] * log_p for k, log_p in enumerate(log_probs)), jnp.zeros_like(log_probs[0]))


def main(first: str, second: str, prompt: str) -> None:
    ensemble = rj.Ensemble([rj.load(first), rj.load(second)])
    settings: dict[str, Any] = {"equal weights": None, "one to three": [1, 3], "taking turns": TakeTurns()}
    for name, weights in settings.items():
        print(f"{name}: {prompt}{ensemble.generate([prompt], weights, max_new_tokens=32).texts[0]}")
    own = rj.Ensemble(ensemble.members, fusion=geometric_mean)
    print(f"own operator: {prompt}{own.generate([prompt], max_new_tokens=32).texts[0]}")
    print(f"on {jax.devices()[0].device_kind}")


if __name__ == "__main__":
    main(*sys.argv[1:])
