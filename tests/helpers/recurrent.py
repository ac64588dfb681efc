"""Tiny models of which some layers have a state, and what their rules compute, token by token in float64."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

import rlae_jax as rj
from rlae_jax.models.config import GatedDelta, ShortConvolution

FIELDS: dict[str, dict[str, Any]] = {
    "short": {"recurrent": ShortConvolution(layers=(0,), taps=3, bias=True), "layers": 2},
    "delta": {
        "recurrent": GatedDelta(layers=(0,), taps=4, key_heads=2, heads=4, key_width=4, value_width=6),
        "layers": 2,
        "attention_gate": True,
        "query_key_norm": "head",
        "norm_offset": 1.0,
    },
}


def recurrent_lm(make_lm: Callable[..., rj.LM], kind: str, seed: int = 0, **fields: Any) -> rj.LM:
    """A model whose memories last: rates as they are drawn elsewhere forget nearly all at every token."""
    lm = make_lm(seed, **FIELDS[kind] | fields)
    layers = {i: dict(layer) for i, layer in lm.params["layers"].items()}
    for i in lm.config.recurrent_layers if kind == "delta" else ():
        own = layers[i]["recurrence"]
        rates = np.random.default_rng(seed).uniform(-5.0, 0.0, own["log_rate"].shape)
        layers[i]["recurrence"] = own | {"log_rate": jnp.asarray(rates, lm.config.dtype)}
    return dataclasses.replace(lm, params=lm.params | {"layers": layers})


def delta_rule_slowly(
    q_btgk: np.ndarray,
    k_btgk: np.ndarray,
    v_btnv: np.ndarray,
    decay_btn: np.ndarray,
    strength_btn: np.ndarray,
    memory_bnkv: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """S <- e^decay S; S <- S + k (strength (v - S^T k))^T; out = S^T q, for one token of one head after another."""
    b, t, n, v = v_btnv.shape
    each = n // k_btgk.shape[2]
    memory, out = np.array(memory_bnkv, np.float64), np.zeros((b, t, n, v))
    for row, i, head in np.ndindex(b, t, n):
        q, k = (np.asarray(x[row, i, head // each], np.float64) for x in (q_btgk, k_btgk))
        s = np.exp(np.float64(decay_btn[row, i, head])) * memory[row, head]
        s = s + np.outer(k, strength_btn[row, i, head] * (v_btnv[row, i, head] - s.T @ k))
        memory[row, head], out[row, i, head] = s, s.T @ q
    return out, memory
