"""Multi-head attention over whole sequences and over a cache.

In: activations [B, T, D]. Out: activations and, for the cache, keys and values as [B, G, H, T]: slots innermost, which
is the layout in which the batched products of a decoding step are fastest on the CPU (14 ms a step against 20 to 30 for
[B, S, G, H] and [B, G, S, H] at batch 256).
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from rlae_jax.models.cache import LayerCache, as_numbers, cache_layout, pin_cache
from rlae_jax.models.config import ModelConfig, QueryGrowth, RelativeBias, Rope
from rlae_jax.models.layers import LayerNorm, Linear, RMSNorm, make_norm, rotate, unit_rms
from rlae_jax.models.rope import frequencies

# What depends on the tokens' positions: angles [B, T, half] of each rope and head width, factors [B, T] of queries, and
# where layers attend in chunks, or rows hold several texts, the positions [B, T] themselves.
Angles = dict[tuple[Rope, int] | QueryGrowth | Literal["positions"], Array]
LOWEST = float(np.finfo(np.float32).min)
_BLOCK = 2**18  # quantised keys or values that a CPU converts at a time: 1 MiB of float32
_SINGLE_QUERIES = 8  # up to as many queries of one key head the CPU takes one by one


def _capped(scores: Array, cap: float | None) -> Array:
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def _softmax(scores: Array, sinks: Array | None) -> Array:
    """Over the last axis; with sinks, scores of the leading shape that join it and whose share is left out."""
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    largest = lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1), sinks))[..., None]
    weights = jnp.exp(scores - largest)
    return weights / (jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sinks[..., None] - largest))


def attend(
    q_btnh: Array,
    k_bsgh: Array,
    v_bsgh: Array,
    mask_bts: Bool[Array, "B T S"],
    config: ModelConfig,
    scale: float,
    bias_bnts: Float[Array, "#B N T S"] | None = None,
    sinks_n: Float[Array, " N"] | None = None,
) -> Float[Array, "B T N H"]:
    """Whole sequences. `jax.nn.dot_product_attention`, but where scores are capped or have sinks, which it cannot do.

    `sinks_n`, here and below: a learned score per head that joins each softmax (Agarwal et al., 2025).
    """
    if config.attention_cap is None and sinks_n is None:
        with jax.default_matmul_precision(config.precision):
            return jax.nn.dot_product_attention(q_btnh, k_bsgh, v_bsgh, bias_bnts, mask_bts[:, None], scale=scale)
    b, t, n, h = q_btnh.shape
    g = k_bsgh.shape[2]
    q_btgmh = (q_btnh * scale).reshape(b, t, g, n // g, h)
    scores = jnp.einsum("btgmh,bsgh->bgmts", q_btgmh, k_bsgh, precision=config.precision).astype(jnp.float32)
    scores = jnp.where(mask_bts[:, None, None], _capped(scores, config.attention_cap), LOWEST)
    sinks = None if sinks_n is None else jnp.broadcast_to(sinks_n.reshape(1, g, -1, 1), scores.shape[:-1])
    weights = _softmax(scores, sinks).astype(v_bsgh.dtype)
    return jnp.einsum("bgmts,bsgh->btgmh", weights, v_bsgh, precision=config.precision).reshape(b, t, n, h)


def attend_cached(
    q_rnh: Array,
    cache: LayerCache,
    visible_bs: Bool[Array, "B S"],
    config: ModelConfig,
    scale: float,
    bias_bns: Float[Array, "#B N S"] | None = None,
    sinks_n: Float[Array, " N"] | None = None,
) -> Float[Array, "R N H"]:
    """One query per row against the cache, softmax in float32.

    There may be P = R / B rows, one after another, for each row of the cache, which is read once for all of them. With
    a bias P is 1.
    """
    r, n, h = q_rnh.shape
    b, g = cache.keys.shape[:2]
    p = r // b
    # Queries of one key head lie together, M = P N / G.
    q_bgmh = (q_rnh * scale).reshape(b, p, g, n // g, h).swapaxes(1, 2).reshape(b, g, -1, h)
    scores_bgms = _scores(q_bgmh, cache, config)
    if bias_bns is not None:
        scores_bgms = scores_bgms + bias_bns.reshape(-1, g, n // g, bias_bns.shape[-1])
    scores_bgms = _capped(scores_bgms, config.attention_cap)
    masked = jnp.where(visible_bs[:, None, None], scores_bgms, LOWEST)
    sinks = None if sinks_n is None else _repeat_sinks(sinks_n, b, g, p)
    weights_bgms = _softmax(masked, sinks)
    few = p == 1 or q_bgmh.shape[2] <= _SINGLE_QUERIES
    out_bgmh = _weighted(weights_bgms, cache, config, few=few)
    return out_bgmh.reshape(b, g, p, n // g, h).swapaxes(1, 2).reshape(r, n, h)


def _repeat_sinks(sinks_n: Array, b: int, g: int, times: int) -> Float[Array, "B G M"]:
    """For each of so many queries of a row and head."""
    return jnp.broadcast_to(jnp.tile(sinks_n.reshape(g, -1), (1, times))[None], (b, g, times * len(sinks_n) // g))


def attend_behind(
    q_bwnh: Array,
    cache: LayerCache,
    new: LayerCache,
    behind_bws: Bool[Array, "B W S"],
    among_bww: Bool[Array, "B W X"],
    config: ModelConfig,
    scale: float,
    sinks_n: Float[Array, " N"] | None = None,
) -> Float[Array, "B W N H"]:
    """W queries per row against the cache as it is and X new keys and values, softmax in float32.

    The two parts are not joined: the cache is only read, so that it may be closed over by a branch.
    """
    b, w, n, h = q_bwnh.shape
    g = cache.keys.shape[1]
    # Queries of one key head lie together: [B, G, W * M, H], M = N / G.
    q_bgqh = jnp.einsum("bwgmh->bgwmh", (q_bwnh * scale).reshape(b, w, g, n // g, h)).reshape(b, g, -1, h)

    def scores_of(held: LayerCache, mask_bws: Array) -> Array:
        scores = _capped(_scores(q_bgqh, held, config), config.attention_cap).reshape(b, g, w, n // g, -1)
        return jnp.where(mask_bws[:, None, :, None], scores, LOWEST).reshape(b, g, w * (n // g), -1)

    old_scores, new_scores = scores_of(cache, behind_bws), scores_of(new, among_bww)
    largest = jnp.maximum(jnp.max(old_scores, axis=-1), jnp.max(new_scores, axis=-1))[..., None]
    sinks = None if sinks_n is None else _repeat_sinks(sinks_n, b, g, w)[..., None]
    if sinks is not None:
        largest = jnp.maximum(largest, sinks)
    old_weights, new_weights = jnp.exp(old_scores - largest), jnp.exp(new_scores - largest)
    total = jnp.sum(old_weights, axis=-1) + jnp.sum(new_weights, axis=-1)
    if sinks is not None:
        total = total + jnp.exp(sinks - largest)[..., 0]
    out = _weighted(old_weights, cache, config, few=w * (n // g) <= _SINGLE_QUERIES)
    out = out + _weighted(new_weights, new, config, few=None)
    out = (out / total[..., None].astype(out.dtype)).reshape(b, g, w, n // g, h)
    return jnp.einsum("bgwmh->bwgmh", out).reshape(b, w, n, h)


def _scores(q_bgqh: Array, held: LayerCache, config: ModelConfig) -> Float[Array, "B G Q S"]:
    """Products of queries and keys, float32."""

    def product(q: Array, k: Array) -> Array:
        return jnp.einsum("bgqh,bghs->bgqs", q, as_numbers(k, q.dtype), precision=config.precision)

    def in_blocks(q: Array, k: Array) -> Array:
        def write(scores: Array, start: Array | int, k: Array) -> Array:
            return lax.dynamic_update_slice_in_dim(scores, product(q, k), start, axis=3)

        return _over_blocks(write, jnp.zeros((*q.shape[:3], k.shape[3]), q.dtype), k)

    cpu = in_blocks if held.key_scale is not None or _degenerate(held) else product
    scores: Array = lax.platform_dependent(q_bgqh, held.keys, cpu=cpu, default=product)
    scores = scores.astype(jnp.float32)
    return scores if held.key_scale is None else scores * held.key_scale[:, :, None]


def _degenerate(held: LayerCache) -> bool:
    """Whether the CPU compiler would copy the cache: it drops axes of size 1 before a product, and where they are those
    of what was just written, it writes the slot a second time, into a copy. A loop over blocks reads what is there."""
    return min(held.keys.shape[:2]) == 1 and held.keys.size >= 2 * _BLOCK


def _weighted(weights_bgqs: Array, held: LayerCache, config: ModelConfig, *, few: bool | None) -> Array:
    """Sums of values by float32 weights, [B, G, Q, H]. `few`: whether there are few queries; None for few values,
    where it makes no difference."""

    def per_query(weights: Array, v: Array) -> Array:
        # The CPU compiler vectorises a batched matrix-vector product over the innermost slots, but not a batched
        # product of small matrices: one per query head of the group takes 5.5 instead of 13 ms at batch 256.
        v = as_numbers(v, weights.dtype)
        queries = [
            jnp.einsum("bgs,bghs->bgh", weights[:, :, i], v, precision=config.precision)
            for i in range(weights.shape[2])
        ]
        return jnp.stack(queries, axis=2)

    def together(weights: Array, v: Array) -> Array:
        return jnp.einsum("bgqs,bghs->bgqh", weights, as_numbers(v, weights.dtype), precision=config.precision)

    if held.value_scale is not None:
        weights_bgqs = weights_bgqs * held.value_scale[:, :, None]
    weights_bgqs = weights_bgqs.astype(config.dtype)
    on_cpu = per_query if few else together
    if few is None:
        return together(weights_bgqs, held.values)

    def in_blocks(weights: Array, v: Array) -> Array:
        def add(total: Array, start: Array | int, v: Array) -> Array:
            part = lax.dynamic_slice_in_dim(weights, start, v.shape[3], axis=3)
            return total + on_cpu(part, v).astype(jnp.float32)

        none = jnp.zeros((*weights.shape[:3], v.shape[2]))
        return _over_blocks(add, none, v).astype(weights.dtype)

    cpu = in_blocks if held.value_scale is not None or _degenerate(held) else on_cpu
    out: Array = lax.platform_dependent(weights_bgqs, held.values, cpu=cpu, default=together)
    return out


def _over_blocks(use: Callable[[Array, Array | int, Array], Array], carry: Array, cached_bghs: Array) -> Array:
    """use(carry, first slot, those slots) over blocks of slots, one after another. The compiler for CPUs converts what
    a product reads beforehand and in memory: of a block that stays in the processor's cache."""
    slots = cached_bghs.shape[3]
    size = max(_BLOCK // (cached_bghs.size // slots), 16)
    blocks = slots // size
    if blocks > 1:

        def one(i: Array, carry: Array) -> Array:
            return use(carry, i * size, lax.dynamic_slice_in_dim(cached_bghs, i * size, size, axis=3))

        carry = lax.fori_loop(0, blocks, one, carry)
    done = blocks * size if blocks > 1 else 0
    return carry if done == slots else use(carry, done, cached_bghs[..., done:])


def distance_buckets(length: int, bias: RelativeBias, *, bidirectional: bool) -> np.ndarray:
    """The bucket of each distance behind the query, 0..length - 1 (Raffel et al., 2020, as in T5's published code).

    Half of the buckets stand for one distance each, the others for logarithmically growing ranges up to
    `max_distance`. Where the model looks both ways, half of all buckets belong to either side.
    """
    buckets = bias.buckets // 2 if bidirectional else bias.buckets
    exact = buckets // 2
    distances = np.arange(length)
    # float32 step by step as the reference does it: at a bucket's edge the last bit decides.
    ratio = np.log(np.maximum(distances, 1).astype(np.float32) / np.float32(exact))
    large = exact + (ratio / np.float32(math.log(bias.max_distance / exact)) * np.float32(buckets - exact)).astype(int)
    return np.where(distances < exact, distances, np.minimum(large, buckets - 1))


class RelativeBiasTable(nnx.Module):
    """T5's score for each head and bucket of distances; one table serves all layers of a stack."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        assert config.relative_bias is not None
        self.spec, self.bidirectional = config.relative_bias, not config.causal
        values = 0.1 * jax.random.normal(rngs.params(), (self.spec.buckets, config.heads))
        self.table = nnx.Param(values.astype(config.dtype), axes=("buckets", "heads"))

    def sequence(self, length: int) -> Float[Array, "1 N T T"]:
        """Scores of every query and key of a sequence."""
        behind = distance_buckets(length, self.spec, bidirectional=self.bidirectional)
        ahead = behind + self.spec.buckets // 2 if self.bidirectional else np.zeros_like(behind)
        offsets = np.arange(length)[None, :] - np.arange(length)[:, None]
        buckets = np.where(offsets > 0, ahead[np.abs(offsets)], behind[np.abs(offsets)])
        return jnp.einsum("tsn->nts", self.table[...][buckets])[None]

    def step(self, slot: Array, slots: int) -> Float[Array, "1 N S"]:
        """Scores of the query in `slot` and the keys of all slots; those ahead of it are masked anyway."""
        buckets = jnp.asarray(distance_buckets(slots, self.spec, bidirectional=False))
        return jnp.einsum("sn->ns", self.table[...][buckets[jnp.maximum(slot - jnp.arange(slots), 0)]])[None]


def projections(
    config: ModelConfig, rngs: nnx.Rngs, source: int | None = None
) -> tuple[Linear, Linear, Linear, Linear]:
    """The linear maps q, k, v and o; keys and values come from states of the width `source`, D if None."""
    d, n, g, h = config.width, config.heads, config.kv_heads, config.head_width
    bias, source = config.qkv_bias, source or d
    return (
        Linear("btd,dnh->btnh", (d, n, h), ("embed", "heads", "head"), config, rngs, bias=bias),
        Linear("btd,dgh->btgh", (source, g, h), ("embed", "kv_heads", "head"), config, rngs, bias=bias),
        Linear("btd,dgh->btgh", (source, g, h), ("embed", "kv_heads", "head"), config, rngs, bias=bias),
        Linear("btnh,nhd->btd", (n, h, d), ("heads", "head", "embed"), config, rngs, bias=config.attention_out_bias),
    )


class Packing(NamedTuple):
    """The next token of each of B rows and then E further ones of some rows, R = B + E in all: [R, 1, ...].

    A row seldom has more than one token to take in at the same time as others have one. What lies beyond a row's tokens
    is filling.
    """

    row_e: Int[Array, " E"]
    place_e: Int[Array, " E"]  # from 1: how many tokens of the row stand before
    source_bw: Int[Array, "B W"]  # where each row's tokens lie among the R

    def unpack(self, x_r1: Float[Array, "R 1 *X"]) -> Float[Array, "B W *X"]:
        """By row."""
        return x_r1[:, 0][self.source_bw]

    def pack(self, x_bw: Float[Array, "B W *X"]) -> Float[Array, "R 1 *X"]:
        """What `unpack` had."""
        return jnp.concatenate([x_bw[:, :1], x_bw[self.row_e, self.place_e][:, None]])


def _head_norm(config: ModelConfig, heads: int, axis: str) -> RMSNorm | LayerNorm | None:
    """The norm of queries or keys, if the model has one."""
    kind, h = config.query_key_norm, config.head_width
    if kind == "heads":
        return LayerNorm((heads, h), config, (axis, "head_norm"))
    return None if kind in (None, "unit") else make_norm(h if kind == "head" else heads * h, config, "head_norm")


class Attention(nnx.Module):
    """Grouped-query attention: q, k and v from the activations, rotary positions, an output map.

    Args:
      layer: the layer's number, from 0; local layers see a window.
      cross: keys and values come from an encoder's states of the given width.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, layer: int, cross: int | None = None):
        self.reads = config.source_layer(layer) != layer  # another layer's keys and values
        one = config.wide is not None and config.wide.keys_are_values and layer not in config.local_layers
        self.q, k, v, self.o = projections(config, rngs, cross)
        self.k: Any = None if self.reads else k
        self.v = None if self.reads or one else v
        gate = ("btd,dnh->btnh", self.q.shape, ("embed", "heads", "head"))
        self.gate = Linear(*gate, config, rngs, bias=config.qkv_bias) if config.attention_gate else None
        self.q_norm = _head_norm(config, config.heads, "heads")
        self.k_norm = None if self.reads else _head_norm(config, config.kv_heads, "kv_heads")
        sinks = jnp.zeros((config.heads,), config.dtype)
        self.sinks = nnx.Param(sinks, axes=("heads",)) if config.attention_sinks else None
        self.config = config
        self.scale = config.head_width**-0.5 if config.attention_scale is None else config.attention_scale
        if config.scale_by_depth:
            self.scale /= layer + 1
        local = layer in config.local_layers and cross is None
        self.window = config.window if local else 0
        self.rope = None if cross else (config.local_rope or config.rope) if local else config.rope
        if layer in config.unrotated_layers:
            self.rope = None
        growth = config.query_growth
        self.growth = None if growth is not None and growth.unrotated and self.rope is not None else growth

    @property
    def _sinks_n(self) -> Array | None:
        return None if self.sinks is None else self.sinks[...].astype(jnp.float32)

    def _rotate(self, x_btnh: Array, angles: Angles) -> Array:
        rope = self.rope
        if rope is None:
            return x_btnh
        scale = frequencies(rope, self.config.head_width)[1]
        return rotate(x_btnh, angles[rope, self.config.head_width], scale, interleaved=rope.interleaved)

    def _norm(self, norm: RMSNorm | LayerNorm | None, x_btnh: Array) -> Array:
        if self.config.query_key_norm == "unit" and self.rope is not None:
            return unit_rms(x_btnh, self.config.norm_eps).astype(x_btnh.dtype)
        if norm is None:
            return x_btnh
        if self.config.query_key_norm == "all":
            return norm(x_btnh.reshape(*x_btnh.shape[:2], -1)).reshape(x_btnh.shape)
        return norm(x_btnh)

    def _clip(self, x_btnh: Array) -> Array:
        clip = self.config.qkv_clip
        return x_btnh if clip is None else jnp.clip(x_btnh, -clip, clip)

    def _place(self, norm: RMSNorm | LayerNorm | None, x_btnh: Array, angles: Angles) -> Array:
        """Queries or keys, normalised, clipped and rotated."""
        if self.config.norm_rotated:
            return self._norm(norm, self._rotate(self._clip(x_btnh), angles))
        return self._rotate(self._clip(self._norm(norm, x_btnh)), angles)

    def _queries(self, x_btd: Array, angles: Angles) -> Array:
        q_btnh = self._place(self.q_norm, self.q(x_btd), angles)
        growth = self.growth
        return q_btnh if growth is None else q_btnh * angles[growth].astype(q_btnh.dtype)[:, :, None, None]

    def _reach(self, positions: Array | None) -> Any:
        """How many tokens before its own a token sees at most, of a window or, where positions are given, a chunk."""
        return self.window - 1 if positions is None else positions % self.window

    def _out(self, x_btd: Array, out_btnh: Array) -> Array:
        """The output map, of what attention gave for the activations."""
        return self.o(out_btnh if self.gate is None else out_btnh * jax.nn.sigmoid(self.gate(x_btd)))

    def keys_values(self, x_btd: Array, angles: Angles) -> tuple[Array, Array]:
        """Keys and values [B, T, G, H]."""
        projected = self.k(x_btd)
        k_btgh = self._place(self.k_norm, projected, angles)
        v_btgh = projected if self.v is None else self._clip(self.v(x_btd))
        if self.config.value_norm:
            v_btgh = unit_rms(v_btgh, self.config.norm_eps).astype(v_btgh.dtype)
        return k_btgh, v_btgh

    def _new(self, x_btd: Array, angles: Angles, packing: Packing | None) -> LayerCache:
        """Keys and values of a chunk as the cache holds them."""
        keys_values = self.keys_values(x_btd, angles)
        if packing is not None:
            keys_values = packing.unpack(keys_values[0]), packing.unpack(keys_values[1])
        return cache_layout(keys_values[0], keys_values[1], self.config)

    def _near(self, t: int, angles: Angles) -> Bool[Array, "#B T T"]:
        """Which tokens of a sequence are no further from one another than this layer sees."""
        positions_bt = angles.get("positions")
        if self.config.chunked:
            assert positions_bt is not None
            chunk_bt = positions_bt // self.window
            return chunk_bt[:, :, None] == chunk_bt[:, None, :]
        if positions_bt is not None:
            return positions_bt[:, None, :] > positions_bt[:, :, None] - self.window
        return jnp.asarray(np.arange(t)[None, :] > np.arange(t)[:, None] - self.window)[None]

    def sequence(
        self,
        x_btd: Array,
        angles: Angles,
        mask_bts: Bool[Array, "B T S"],
        bias_1nts: Array | None = None,
        keys_values: tuple[Array, Array] | None = None,
    ) -> tuple[Array, tuple[Array, Array]]:
        """Whole sequences. Returns the output [B, T, D] and the keys and values [B, S, G, H]."""
        k, v = self.keys_values(x_btd, angles) if keys_values is None else keys_values
        if self.window:
            mask_bts = mask_bts & self._near(mask_bts.shape[-1], angles)
        out = attend(self._queries(x_btd, angles), k, v, mask_bts, self.config, self.scale, bias_1nts, self._sinks_n)
        return self._out(x_btd, out), (k, v)

    def step(
        self,
        x_btd: Array,
        angles: Angles,
        cache: LayerCache,
        slot: Any,
        visible_bs: Bool[Array, "B S"],
        bias_bns: Array | None = None,
    ) -> tuple[Array, LayerCache]:
        """One token per row, written to `slot` of the cache, if it is this layer's own, and attending to the visible
        slots."""

        def write(cached: Array, new: Array) -> Array:
            return pin_cache(lax.dynamic_update_slice_in_dim(cached, new, slot, axis=cached.ndim - 1))

        if not self.reads:
            k_bghs, v_bghs = (x[:, 0, :, :, None] for x in self.keys_values(x_btd, angles))
            cache = jax.tree.map(write, cache, LayerCache.hold(k_bghs, v_bghs, self.config))
        if 0 < self.window < cache.slots:
            first_seen = slot - self._reach(angles.get("positions"))
            visible_bs = visible_bs & (jnp.arange(visible_bs.shape[1])[None] >= first_seen)
        return self.read(x_btd, angles, cache, visible_bs, bias_bns), cache

    def chunk(
        self,
        x_btd: Array,
        angles: Angles,
        cache: LayerCache,
        behind_bs: Bool[Array, "B S"] | Int[Array, "B S"],
        slot_b: Array,
        packing: Packing | None,
        new: LayerCache | None = None,
    ) -> tuple[Array, LayerCache]:
        """The next W tokens of every row, the first of which belongs into `slot_b`, against the slots behind it: those
        that are True, or of a ring the slots that its places hold (-1: none). Returns the output like the input,
        [B, W, D] or packed, and the W keys and values, which are not written; `new` has them where they are another
        layer's."""
        q_btnh = self._queries(x_btd, angles)
        new = self._new(x_btd, angles, packing) if new is None else new
        b, w = len(new.keys), new.slots
        positions = angles.get("positions")
        next_b = None if positions is None else positions[:b, 0]

        def attend(q: Array, rows: Array | None, places: Array) -> Array:
            """Queries [., W', N, H] of some rows (None: all), which stand at `places` [., W'] of their W tokens."""
            of_rows = (cache, new, behind_bs, slot_b, next_b)
            if rows is not None:
                of_rows = jax.tree.map(lambda a: a[rows], of_rows)
            cache_r, new_r, behind, slot, position = of_rows
            behind = jnp.broadcast_to(behind[:, None], (*places.shape, behind.shape[1]))
            among = jnp.arange(w)[None, None] <= places[..., None]
            if self.window:
                reach = self._reach(None if position is None else position[:, None] + places)
                first_seen = slot[:, None] + places - reach
                if behind.dtype == bool:
                    behind = behind & (jnp.arange(behind.shape[-1])[None, None] >= first_seen[..., None])
                else:
                    behind = (behind >= 0) & (behind >= first_seen[..., None])
                among = among & (jnp.arange(w)[None, None] >= (places - reach)[..., None])
            return attend_behind(q, cache_r, new_r, behind, among, self.config, self.scale, self._sinks_n)

        if packing is None:
            out = attend(q_btnh, None, jnp.broadcast_to(jnp.arange(w), (b, w)))
        else:
            next_token = attend(q_btnh[:b], None, jnp.zeros((b, 1), jnp.int32))
            further = attend(q_btnh[b:], packing.row_e, packing.place_e[:, None])
            out = jnp.concatenate([next_token, further])
        return self._out(x_btd, out), new

    def read(
        self,
        x_btd: Array,
        angles: Angles,
        cache: LayerCache,
        visible_bs: Bool[Array, "B S"],
        bias_bns: Array | None = None,
    ) -> Array:
        """One query per row against keys and values as they are, of which several rows may share one; see
        `attend_cached`. Returns [R, 1, D]."""
        q_bnh = self._queries(x_btd, angles)[:, 0]
        out = attend_cached(q_bnh, cache, visible_bs, self.config, self.scale, bias_bns, self._sinks_n)
        return self._out(x_btd, out[:, None])
