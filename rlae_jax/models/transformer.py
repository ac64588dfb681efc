"""The decoder-only transformer as Flax NNX modules, and pure functions over (ModelConfig, dict of arrays).

In: token ids [B, T] with a mask (1 where there is a token; positions follow the mask) or, while decoding, one token
per row and the key/value cache. Out: last hidden states [B, T, D] after the final norm (what the output head reads)
and the keys and values to cache.

The modules declare parameters and hold no state: `split` gives the static graph once per configuration, `_merge` puts
arrays into it while a program is traced, and what runs is a function of plain arrays. Calling a module through
`nnx.jit` walks its whole graph at every call, which costs more than decoding a token on a small model.

The cache is one pair of arrays per layer, unrolled: keys and values as [B, G, H, S], slots innermost, which is the
layout in which the batched products of a decoding step are fastest on the CPU (14 ms a step against 20 to 30 for
[B, S, G, H] and [B, G, S, H] at batch 256). Rows are padded on the left, so that all rows write the same slot:

    slot      0 1 2 3 4 5 6 7 ...
    row 0     . . a b c|d e        start = 2      . never attended to
    row 1     p q r s t|u v        start = 0      | end of the prompt
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from rlae_jax.models.config import ModelConfig

Params = dict[Any, Any]  # nested dictionaries of arrays, as `nnx.to_pure_dict` gives them
LayerCache = tuple[Float[Array, "B G H S"], Float[Array, "B G H S"]]
Cache = tuple[LayerCache, ...]


class Linear(nnx.Module):
    """A linear map written as an einsum over named axes; adapters derive their two factors from the same string.

    Args:
      einsum: activations,kernel->output, e.g. "btd,dnh->btnh".
      shape, axes: of the kernel; `axes` are the logical names that sharding rules are written for.
    """

    def __init__(self, einsum: str, shape: Sequence[int], axes: Sequence[str], config: ModelConfig, rngs: nnx.Rngs):
        self.einsum = einsum
        self.precision = config.precision
        inputs, kernel = einsum.split("->")[0].split(",")
        fan_in = math.prod(n for letter, n in zip(kernel, shape, strict=True) if letter in inputs)
        values = jax.random.normal(rngs.params(), shape) * fan_in**-0.5
        self.kernel = nnx.Param(values.astype(config.dtype), axes=tuple(axes))

    def __call__(self, x: Array) -> Array:
        return jnp.einsum(self.einsum, x, self.kernel[...], precision=self.precision)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale, in float32 whatever the activations are (Zhang and Sennrich, 2019)."""

    def __init__(self, width: int, config: ModelConfig):
        self.eps = config.norm_eps
        self.scale = nnx.Param(jnp.ones((width,), config.dtype), axes=("embed",))

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        normed = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return self.scale[...] * normed.astype(x.dtype)


def rotary_angles(positions_bt: Int[Array, "B T"], config: ModelConfig) -> Float[Array, "B T half"]:
    """position * base^(-2i/H) for i < H/2 (Su et al., 2021, eq. 15)."""
    exponents = jnp.arange(0, config.head_width, 2, dtype=jnp.float32) / config.head_width
    return positions_bt[..., None].astype(jnp.float32) * (config.rope_base**-exponents)


def rotate(x_btnh: Array, angles: Float[Array, "B T half"]) -> Array:
    """Rotates the pairs (x_i, x_{i + H/2}), the pairing of the Hugging Face checkpoints."""
    first, second = jnp.split(x_btnh.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_btnh.dtype)


def attend_cached(
    q_bnh: Array, k_bghs: Array, v_bghs: Array, visible_bs: Bool[Array, "B S"], precision: str | None
) -> Array:
    """One query per row against the cache, softmax in float32. Returns [B, N, H]."""
    b, n, h = q_bnh.shape
    g = k_bghs.shape[1]
    q_bgmh = (q_bnh * h**-0.5).reshape(b, g, n // g, h)
    scores_bgms = jnp.einsum("bgmh,bghs->bgms", q_bgmh, k_bghs, precision=precision).astype(jnp.float32)
    masked = jnp.where(visible_bs[:, None, None], scores_bgms, jnp.finfo(jnp.float32).min)
    weights_bgms = jax.nn.softmax(masked, axis=-1).astype(v_bghs.dtype)

    def per_head(weights: Array, v: Array) -> Array:
        # The CPU compiler vectorises a batched matrix-vector product over the innermost slots, but not a batched
        # product of small matrices: one per query head of the group takes 5.5 instead of 13 ms at batch 256.
        heads = [jnp.einsum("bgs,bghs->bgh", weights[:, :, m], v, precision=precision) for m in range(weights.shape[2])]
        return jnp.stack(heads, axis=2)

    def together(weights: Array, v: Array) -> Array:
        return jnp.einsum("bgms,bghs->bgmh", weights, v, precision=precision)

    return lax.platform_dependent(weights_bgms, v_bghs, cpu=per_head, default=together).reshape(b, n, h)


class Attention(nnx.Module):
    """Grouped-query causal attention with rotary positions."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        d, n, g, h = config.width, config.heads, config.kv_heads, config.head_width
        self.q = Linear("btd,dnh->btnh", (d, n, h), ("embed", "heads", "head"), config, rngs)
        self.k = Linear("btd,dgh->btgh", (d, g, h), ("embed", "kv_heads", "head"), config, rngs)
        self.v = Linear("btd,dgh->btgh", (d, g, h), ("embed", "kv_heads", "head"), config, rngs)
        self.o = Linear("btnh,nhd->btd", (n, h, d), ("heads", "head", "embed"), config, rngs)
        self.precision = config.precision

    def _project(self, x_btd: Array, angles: Array) -> tuple[Array, Array, Array]:
        return rotate(self.q(x_btd), angles), rotate(self.k(x_btd), angles), self.v(x_btd)

    def sequence(self, x_btd: Array, angles: Array, mask_bts: Bool[Array, "B T T"]) -> tuple[Array, LayerCache]:
        """Whole sequences. Returns the output [B, T, D] and the keys and values [B, G, H, T]."""
        q, k, v = self._project(x_btd, angles)
        with jax.default_matmul_precision(self.precision):
            out = jax.nn.dot_product_attention(q, k, v, mask=mask_bts[:, None])
        return self.o(out), (jnp.einsum("btgh->bght", k), jnp.einsum("btgh->bght", v))

    def step(
        self, x_btd: Array, angles: Array, cache: LayerCache, slot: Int[Array, ""], visible_bs: Bool[Array, "B S"]
    ) -> tuple[Array, LayerCache]:
        """One token per row, written to `slot` of the cache and attending to the visible slots."""
        q, k, v = self._project(x_btd, angles)
        keys, values = (
            lax.dynamic_update_slice_in_dim(cached, new[:, 0, :, :, None], slot, axis=3)
            for cached, new in zip(cache, (k, v), strict=True)
        )
        out = attend_cached(q[:, 0], keys, values, visible_bs, self.precision)
        return self.o(out[:, None]), (keys, values)


class FeedForward(nnx.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, 2020, SwiGLU)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        d, f = config.width, config.ffn_width
        self.gate = Linear("btd,df->btf", (d, f), ("embed", "mlp"), config, rngs)
        self.up = Linear("btd,df->btf", (d, f), ("embed", "mlp"), config, rngs)
        self.down = Linear("btf,fd->btd", (f, d), ("mlp", "embed"), config, rngs)

    def __call__(self, x_btd: Array) -> Array:
        return self.down(jax.nn.silu(self.gate(x_btd)) * self.up(x_btd))


class Layer(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.width, config)
        self.attention = Attention(config, rngs)
        self.ffn_norm = RMSNorm(config.width, config)
        self.ffn = FeedForward(config, rngs)

    def sequence(self, x_btd: Array, angles: Array, mask_bts: Array) -> tuple[Array, LayerCache]:
        out, kv = self.attention.sequence(self.attention_norm(x_btd), angles, mask_bts)
        x_btd = x_btd + out
        return x_btd + self.ffn(self.ffn_norm(x_btd)), kv

    def step(
        self, x_btd: Array, angles: Array, cache: LayerCache, slot: Array, visible_bs: Array
    ) -> tuple[Array, LayerCache]:
        out, cache = self.attention.step(self.attention_norm(x_btd), angles, cache, slot, visible_bs)
        x_btd = x_btd + out
        return x_btd + self.ffn(self.ffn_norm(x_btd)), cache


class Transformer(nnx.Module):
    """Embedding, layers, final norm and output head."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        table = jax.random.normal(rngs.params(), (config.vocab, config.width)) * config.width**-0.5
        self.embedding = nnx.Param(table.astype(config.dtype), axes=("vocab", "embed"))
        self.layers = nnx.List([Layer(config, rngs) for _ in range(config.layers)])
        self.norm = RMSNorm(config.width, config)
        if not config.tied_head:
            self.head = Linear("btd,dv->btv", (config.width, config.vocab), ("embed", "vocab"), config, rngs)

    def sequence(self, ids_bt: Int[Array, "B T"], mask_bt: Array) -> tuple[Float[Array, "B T D"], Cache]:
        t = ids_bt.shape[1]
        real = mask_bt.astype(bool)
        mask_bts = jnp.tri(t, dtype=bool) & real[:, None, :]
        angles = rotary_angles(positions(mask_bt), self.config)
        x_btd = self.embedding[...][ids_bt]
        keys_values = []
        for layer in self.layers:
            x_btd, kv = layer.sequence(x_btd, angles, mask_bts)
            keys_values.append(kv)
        return self.norm(x_btd), tuple(keys_values)

    def step(
        self, ids_b: Int[Array, "B"], position_b: Int[Array, "B"], cache: Cache, slot: Array, visible_bs: Array
    ) -> tuple[Float[Array, "B D"], Cache]:
        angles = rotary_angles(position_b[:, None], self.config)
        x_btd = self.embedding[...][ids_b[:, None]]
        new_cache = []
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x_btd, layer_cache = layer.step(x_btd, angles, layer_cache, slot, visible_bs)
            new_cache.append(layer_cache)
        return self.norm(x_btd)[:, 0], tuple(new_cache)

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        if self.config.tied_head:
            kernel, einsum = self.embedding[...], "...d,vd->...v"
        else:
            kernel, einsum = self.head.kernel[...], "...d,dv->...v"
        return jnp.einsum(einsum, hidden, kernel, precision=self.config.precision, preferred_element_type=jnp.float32)


def positions(mask_bt: Array) -> Int[Array, "B T"]:
    """The position of each token: how many tokens stand before it in its row. Padding gets 0 or its neighbour's."""
    return jnp.maximum(jnp.cumsum(mask_bt.astype(jnp.int32), axis=1) - 1, 0)


@functools.cache
def _split(config: ModelConfig) -> tuple[Any, Params]:
    abstract = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    return graph, nnx.to_pure_dict(state)


def _merge(config: ModelConfig, params: Params) -> Transformer:
    return nnx.merge(_split(config)[0], params)


def abstract_params(config: ModelConfig) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`s: what a checkpoint has to fill."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), _split(config)[1])


@functools.partial(jax.jit, static_argnums=0)
def init_params(config: ModelConfig, key: Array) -> Params:
    """Fresh random parameters: normal with standard deviation fan_in^-1/2, norms at 1."""
    return nnx.to_pure_dict(nnx.state(Transformer(config, nnx.Rngs(params=key))))


def forward(
    config: ModelConfig, params: Params, ids_bt: Int[Array, "B T"], mask_bt: Array
) -> tuple[Float[Array, "B T D"], Cache]:
    """Last hidden states [B, T, D] (after the final norm) and, per layer, keys and values [B, G, H, T]."""
    return _merge(config, params).sequence(ids_bt, mask_bt)


def decode_step(
    config: ModelConfig,
    params: Params,
    ids_b: Int[Array, "B"],
    position_b: Int[Array, "B"],
    cache: Cache,
    slot: Int[Array, ""],
    visible_bs: Bool[Array, "B S"],
) -> tuple[Float[Array, "B D"], Cache]:
    """Feeds one token per row: writes `slot` of every layer's cache, attends to `visible_bs` (which includes it)."""
    return _merge(config, params).step(ids_b, position_b, cache, slot, visible_bs)


def output_head(config: ModelConfig, params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Float32 logits of hidden states; any leading axes."""
    return _merge(config, params).logits(hidden)


def extend_cache(keys_values: Cache, slots: int) -> Cache:
    """The cache of `slots` slots whose first T hold the given keys and values [B, G, H, T]."""
    grow = slots - keys_values[0][0].shape[3]
    return jax.tree.map(lambda array: jnp.pad(array, ((0, 0), (0, 0), (0, 0), (0, grow))), keys_values)
