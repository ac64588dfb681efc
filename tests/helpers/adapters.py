"""LoRA adapters for tests: random in both factors, and merged by hand; prompts to write after with them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rlae_jax as rj
from rlae_jax.fusion.prompts import pad_rows

# Five rows are filled up to a bucket of six.
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7], [11, 22, 0], [1, 2]]
N = 9
EVERY_LAYER = (r".*",)  # the output head too, which `targets=None` leaves out


def random_adapter(
    lm: rj.LM, seed: int, *, rank: int = 3, alpha: float = 4.0, targets: Sequence[str] | None = None, name: str = ""
) -> rj.Adapter:
    """An adapter whose B is random too, so that what it adds is about as large as a layer's own output."""
    config = rj.LoraConfig(rank=rank, alpha=alpha, targets=None if targets is None else tuple(targets))
    fresh = rj.init_adapter(lm, config, seed=seed, name=name or f"adapter-{seed}")
    rng = np.random.default_rng(seed)

    def draw(leaf: jax.Array) -> jax.Array:
        return jnp.asarray(rng.normal(0.0, rank**-0.5, leaf.shape), leaf.dtype)

    params = {path: {"a": leaf["a"], "b": draw(leaf["b"])} for path, leaf in fresh.params.items()}
    return rj.Adapter(config, params, fresh.name)


def leaf_at(params: Any, path: str) -> Any:
    """What stands at a dotted path of a parameter tree."""
    for name in path.split("."):
        params = params[int(name) if name.isdigit() else name]
    return params


def add_by_hand(lm: rj.LM, adapters: Sequence[rj.Adapter], weights: Sequence[float]) -> Any:
    """The base parameters with sum_m weights[m] * alpha_m / rank_m * A_m B_m added to the kernels, in float64."""
    params = jax.tree.map(lambda leaf: leaf, lm.params)
    for adapter, weight in zip(adapters, weights, strict=True):
        for path, factors in adapter.params.items():
            layer = leaf_at(params, path)
            a, b = (np.asarray(factors[side], np.float64) for side in "ab")
            change = weight * adapter.config.alpha / adapter.config.rank * np.tensordot(a, b, axes=1)
            layer["kernel"] = np.asarray(layer["kernel"], np.float64) + change
    return jax.tree.map(lambda leaf, like: jnp.asarray(leaf, like.dtype), params, lm.params)


def write(ensemble: rj.Ensemble, rows: list[list[int]] = PROMPTS, **options: Any) -> rj.Generation:
    """What the ensemble writes after rows of ids."""
    ids, mask = pad_rows(rows, 8)
    return ensemble.generate(prompt_ids=ids, prompt_mask=mask, **{"max_new_tokens": N} | options)
