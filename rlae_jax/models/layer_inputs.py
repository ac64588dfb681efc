"""A second embedding, of which every layer has a part of its own; see `config.LayerInputs` for the equation.

In: token ids [B, T] and the embedding [B, T, D] that enters the first layer. Out: the parts [B, T, L, W] of all layers;
then, in each layer, its activations with what it makes of its part.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from rlae_jax.models.config import LayerInputs, ModelConfig
from rlae_jax.models.layers import ACTIVATIONS, Linear, make_norm


class SecondEmbedding(nnx.Module):
    """The table of all layers' parts, and what they take from the first embedding."""

    def __init__(self, spec: LayerInputs, config: ModelConfig, rngs: nnx.Rngs):
        d, layers, w = config.width, config.layers, spec.width
        values = jax.random.normal(rngs.params(), (spec.rows, layers * w)) * w**-0.5
        self.table = nnx.Param(values.astype(config.dtype), axes=("vocab", "embed"))
        self.project = Linear("btd,dlw->btlw", (d, layers, w), ("embed", "layers", "mlp"), config, rngs)
        self.norm = make_norm(w, config)

    def __call__(self, ids_bt: Int[Array, "B T"], x_btd: Float[Array, "B T D"]) -> Float[Array, "B T L W"]:
        projected = self.norm(self.project(x_btd) * x_btd.shape[-1] ** -0.5)
        rows = self.table[...][ids_bt].reshape(projected.shape)
        scale = jnp.asarray(projected.shape[-1] ** 0.5, rows.dtype)  # rounded to the dtype, as the embedding's is
        parts_btlw: Array = (projected + rows * scale) * 2.0**-0.5
        return parts_btlw


class InputGate(nnx.Module):
    """x + norm(out(act(gate(x)) * part))."""

    def __init__(self, spec: LayerInputs, config: ModelConfig, rngs: nnx.Rngs):
        d, w = config.width, spec.width
        self.gate = Linear("btd,dw->btw", (d, w), ("embed", "mlp"), config, rngs)
        self.out = Linear("btw,wd->btd", (w, d), ("mlp", "embed"), config, rngs)
        self.norm = make_norm(d, config)
        self.act = ACTIVATIONS[config.activation]

    def __call__(self, x_btd: Float[Array, "B T D"], part_btw: Float[Array, "B T W"]) -> Float[Array, "B T D"]:
        return x_btd + self.norm(self.out(self.act(self.gate(x_btd)) * part_btw))
