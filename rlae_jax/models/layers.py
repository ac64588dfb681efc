"""The parts that every model here is built from, as Flax NNX modules: linear maps, norms, the feed-forward block.

The modules declare parameters, with logical axis names for sharding rules, and hold no other state. What they are made
of is decided by a `ModelConfig`.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from rlae_jax.models.config import ModelConfig
from rlae_jax.models.quantise import product

# By the names that checkpoints use.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_fast": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "tanh": jnp.tanh,
}


def kernel_inputs(einsum: str) -> int:
    """How many leading axes of a linear layer's kernel are inputs, e.g. 2 for "btnh,nhd->btd"."""
    kernel, output = einsum.split(",")[1].split("->")
    return sum(letter not in output for letter in kernel)


def _along(array: Array, x: Array) -> Array:
    """An array whose axes are the last ones of `x`."""
    return lax.broadcast_to_rank(array, x.ndim)


class Linear(nnx.Module):
    """A linear map written as an einsum over named axes; adapters derive their two factors from the same string.

    Args:
      einsum: activations,kernel->output, e.g. "btd,dnh->btnh". The kernel's axes are inputs, then outputs.
      shape, axes: of the kernel; `axes` are the logical names that sharding rules are written for.
    """

    def __init__(
        self,
        einsum: str,
        shape: Sequence[int],
        axes: Sequence[str],
        config: ModelConfig,
        rngs: nnx.Rngs,
        *,
        bias: bool = False,
    ):
        self.einsum, self.shape = einsum, tuple(shape)
        self.precision = config.precision
        inputs = kernel_inputs(einsum)
        values = jax.random.normal(rngs.params(), shape) * math.prod(shape[:inputs]) ** -0.5
        self.kernel = nnx.Param(values.astype(config.dtype), axes=tuple(axes))
        self.bias = nnx.Param(jnp.zeros(shape[inputs:], config.dtype), axes=tuple(axes[inputs:])) if bias else None
        # What an adapter adds to the output, put here while a program is traced (see `lora.low_rank_delta`).
        self.delta: Callable[[Array], Array] | None = None

    def __call__(self, x: Array) -> Array:
        out = product(self.einsum, x, self.kernel.get_value(), self.precision, self.shape)
        if self.delta is not None:
            out = out + self.delta(x)
        return out if self.bias is None else out + _along(self.bias[...], out)


def unit_rms(x: Array, eps: float) -> Float[Array, "..."]:
    """x / sqrt(mean(x^2) + eps) over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    return wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * (offset + scale), in float32 whatever the activations are (Zhang and Sennrich,
    2019)."""

    def __init__(self, width: int, config: ModelConfig, axis: str = "norm"):
        self.eps, self.offset = config.norm_eps, config.norm_offset
        self.scale = nnx.Param(jnp.full((width,), 1.0 - self.offset, config.dtype), axes=(axis,))

    def __call__(self, x: Array) -> Array:
        normed = unit_rms(x, self.eps)
        if self.offset:
            return (normed * _along(self.offset + self.scale[...].astype(jnp.float32), x)).astype(x.dtype)
        return _along(self.scale[...], x) * normed.astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(variance + eps) * (offset + scale) + bias, in float32 (Ba et al., 2016).

    Args:
      shape: of the scale; the last axis, which is normalised, or that and axes before it.
    """

    def __init__(self, shape: tuple[int, ...], config: ModelConfig, axes: tuple[str, ...] = ("norm",)):
        self.eps, self.offset = config.norm_eps, config.norm_offset
        affine = config.norm_affine
        ones = jnp.full(shape, 1.0 - self.offset, config.dtype)
        self.scale = nnx.Param(ones, axes=axes) if affine else None
        self.bias = nnx.Param(jnp.zeros(shape, config.dtype), axes=axes) if affine and config.norm_bias else None

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normed = centred * lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        scale, bias = (
            None if part is None else _along(part[...].astype(jnp.float32), x) for part in (self.scale, self.bias)
        )
        if scale is not None:
            normed = normed * (self.offset + scale if self.offset else scale)
        return (normed if bias is None else normed + bias).astype(x.dtype)


def make_norm(width: int, config: ModelConfig, axis: str = "norm") -> RMSNorm | LayerNorm:
    """The kind of norm that the model uses."""
    return RMSNorm(width, config, axis) if config.norm == "rms" else LayerNorm((width,), config, (axis,))


class FeedForward(nnx.Module):
    """down(act(gate(x)) * up(x)) (Shazeer, 2020), or down(act(up(x))) where it is not gated.

    Args:
      width: of the block; `config.ffn_width` if None.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, width: int | None = None):
        d, f, bias = config.width, width or config.ffn_width, config.ffn_bias
        self.act = ACTIVATIONS[config.activation]
        self.gate = Linear("btd,df->btf", (d, f), ("embed", "mlp"), config, rngs, bias=bias) if config.gated else None
        self.up = Linear("btd,df->btf", (d, f), ("embed", "mlp"), config, rngs, bias=bias)
        self.down = Linear("btf,fd->btd", (f, d), ("mlp", "embed"), config, rngs, bias=bias)

    def __call__(self, x_btd: Array) -> Array:
        if self.gate is None:
            return self.down(self.act(self.up(x_btd)))
        return self.down(self.act(self.gate(x_btd)) * self.up(x_btd))


def rotary_angles(positions_bt: Array, frequencies: np.ndarray) -> Float[Array, "B T half"]:
    """Radians by which each pair turns at each position."""
    return positions_bt[..., None].astype(jnp.float32) * frequencies[None, None]


def rotate(x_btnh: Array, angles: Float[Array, "B T half"], scale: float = 1.0, *, interleaved: bool = False) -> Array:
    """Rotates the pairs (x_i, x_{i + half}), the pairing of most Hugging Face checkpoints, or, interleaved,
    (x_2i, x_{2i + 1}); entries beyond the pairs stay as they are (partial rotary)."""
    half = angles.shape[-1]
    wide = x_btnh.astype(jnp.float32)
    of_first = slice(0, 2 * half, 2) if interleaved else slice(half)
    of_second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    first, second, rest = wide[..., of_first], wide[..., of_second], x_btnh[..., 2 * half :]
    cos, sin = (f(angles)[:, :, None] * scale for f in (jnp.cos, jnp.sin))
    parts = [first * cos - second * sin, second * cos + first * sin]
    joined = jnp.stack(parts, axis=-1).reshape(*rest.shape[:-1], -1) if interleaved else jnp.concatenate(parts, axis=-1)
    turned = joined.astype(x_btnh.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned
