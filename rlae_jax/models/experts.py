"""Mixtures of experts: a feed-forward block per expert, of which every token takes a few.

In: activations [B, T, D]. Out: the same, the weighted sum of what each token's experts give, exactly: no expert has a
capacity, so that no token, filling included, changes another's result.

A token and one of its experts are a pair. Pairs are put in order of their experts and cut into blocks of some rows,
each of one expert, whose kernels are the only ones that the block reads:

    token, expert     0,2  0,5  1,2  2,5  2,2  3,0        (two experts per token ...)
    expert 0          3 .                                 blocks of two rows; a dot is filling
    expert 2          0 1 | 2 .
    expert 5          0 2

With one token a block is one row, and a step reads the kernels of the experts that it takes and no others. On a TPU
many tokens are one ragged product per kernel instead; elsewhere `jax.lax.ragged_dot` is a product with all experts.

On a mesh every device has some of the experts or, where it does not divide them, a part of each; what the devices of a
group give is summed.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from rlae_jax import sharding
from rlae_jax.models import quantise
from rlae_jax.models.config import Experts, ModelConfig
from rlae_jax.models.layers import ACTIVATIONS, FeedForward, Linear
from rlae_jax.models.quantise import Quantised, product

# Rows of a block: on a CPU one of 16 rows takes twice as long as one of a single row, which waits for the kernels.
_FEW_ROWS, _MOST_ROWS = 16, 128
# Bytes of a kernel that are read at a time on a CPU, where a slice is copied before it is multiplied: what stays in the
# processor's cache. At batch 1 two experts of 35 MB take 4.6 ms so, 5.7 ms in parts of a quarter of that and 23 ms
# whole; two dense blocks of their size take 3.9 ms.
_TILE_BYTES = 2**21
_UNROLLED_BLOCKS = 8  # on accelerators, whose loops cost more than their text
# Beyond so many tokens a TPU takes ragged products.
_RAGGED_TOKENS = 16

# "gate", "up" and "down", each a "kernel" [E, ...], which may be quantised, and perhaps a "bias".
Parts = dict[str, dict[str, Any]]


class ExpertLinear(nnx.Module):
    """A linear map per expert: a kernel [E, inputs, outputs] and perhaps a bias [E, outputs]."""

    def __init__(self, shape: tuple[int, int, int], axes: tuple[str, str], config: ModelConfig, rngs: nnx.Rngs):
        assert config.experts is not None
        values = jax.random.normal(rngs.params(), shape) * shape[1] ** -0.5
        self.kernel = nnx.Param(values.astype(config.dtype), axes=("experts", *axes))
        bias = jnp.zeros((shape[0], shape[2]), config.dtype)
        self.bias = nnx.Param(bias, axes=("experts", axes[1])) if config.experts.bias else None


class ExpertKernels(nnx.Module):
    """The experts of a layer: gate, up and down of all of them."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        assert config.experts is not None
        e, d, f = config.experts.number, config.width, config.experts.width
        self.gate = ExpertLinear((e, d, f), ("embed", "mlp"), config, rngs)
        self.up = ExpertLinear((e, d, f), ("embed", "mlp"), config, rngs)
        self.down = ExpertLinear((e, f, d), ("mlp", "embed"), config, rngs)


class Router(nnx.Module):
    """A score per expert, float32. Adapters leave it alone."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        assert config.experts is not None
        d, e = config.width, config.experts.number
        values = jax.random.normal(rngs.params(), (d, e)) * d**-0.5
        self.kernel = nnx.Param(values.astype(config.dtype), axes=("embed", "router"))
        bias = jnp.zeros((e,), config.dtype)
        self.bias = nnx.Param(bias, axes=("router",)) if config.experts.router_bias else None
        self.precision = config.precision

    def __call__(self, x_nd: Array) -> Float[Array, "N E"]:
        kernel = self.kernel.get_value()
        scores = product("nd,de->ne", x_nd, kernel, self.precision, (x_nd.shape[1], kernel.shape[-1]), jnp.float32)
        return scores if self.bias is None else scores + self.bias[...].astype(jnp.float32)[None]


class MixtureOfExperts(nnx.Module):
    """sum_e p_e(x) * f_e(x), f_e(x) = down_e(act(gate_e(x)) * up_e(x)), over the experts with the highest scores, and
    perhaps a block that every token takes (Jiang et al., 2024; Qwen Team, 2024). With scaled inputs, sum_e
    f_e(p_e(x) * x)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        assert config.experts is not None
        self.config = config
        self.spec = spec = config.experts
        self.router = Router(config, rngs)
        self.experts = ExpertKernels(config, rngs)
        self.shared = FeedForward(config, rngs, spec.shared_width) if spec.shared_width else None
        self.correction = nnx.Param(jnp.zeros((spec.number,), config.dtype), axes=("router",)) if spec.sigmoid else None
        gate = ("embed", "shared_gate")
        self.shared_gate = Linear("btd,do->bto", (config.width, 1), gate, config, rngs) if spec.shared_gate else None

    def route(self, x_nd: Array) -> tuple[Int[Array, "N k"], Float[Array, "N k"]]:
        """The experts of every token and their weights."""
        spec, scores_ne = self.spec, self.router(x_nd)
        if self.correction is not None:
            shares_ne = jax.nn.sigmoid(scores_ne)
            ids_nk = lax.top_k(shares_ne + self.correction[...].astype(jnp.float32)[None], spec.active)[1]
            weights_nk = jnp.take_along_axis(shares_ne, ids_nk, axis=1)
            total_n1 = jnp.sum(weights_nk, axis=-1, keepdims=True) if spec.normalised else jnp.ones((), jnp.float32)
            return ids_nk, weights_nk / total_n1 * spec.scale
        best_nk, ids_nk = lax.top_k(scores_ne, spec.active)
        if spec.scaled_inputs:
            return ids_nk, jax.nn.sigmoid(best_nk)
        if spec.normalised:
            return ids_nk, jax.nn.softmax(best_nk, axis=-1) * spec.scale
        return ids_nk, jnp.exp(best_nk - jax.nn.logsumexp(scores_ne, axis=-1, keepdims=True)) * spec.scale

    def __call__(self, x_btd: Array) -> Array:
        x_nd = x_btd.reshape(-1, x_btd.shape[-1])
        leaves = {
            name: {kind: leaf for kind in ("kernel", "bias") if (leaf := getattr(linear, kind)) is not None}
            for name, linear in (("gate", self.experts.gate), ("up", self.experts.up), ("down", self.experts.down))
        }
        parts = {name: {kind: leaf.get_value() for kind, leaf in part.items()} for name, part in leaves.items()}
        names = {
            name: {kind: leaf.get_metadata()["axes"] for kind, leaf in part.items()} for name, part in leaves.items()
        }
        axes = quantise.logical_axes(names, parts)
        spec, rows = self.spec, (x_nd, *self.route(x_nd))
        if spec.scaled_inputs:
            spec, rows = dataclasses.replace(spec, active=1), _pairs_alone(*rows)
        apply = functools.partial(apply_experts, spec=spec, config=self.config)
        out_nd = sharding.sum_of_parts(apply, rows, parts, axes)
        if spec.scaled_inputs:
            out_nd = jnp.sum(out_nd.reshape(len(x_nd), -1, x_nd.shape[1]), axis=1)
        out: Array = out_nd.reshape(x_btd.shape)
        if self.shared is None:
            return out
        shared: Array = self.shared(x_btd)
        return out + (shared if self.shared_gate is None else jax.nn.sigmoid(self.shared_gate(x_btd)) * shared)


def _pairs_alone(x_nd: Array, ids_nk: Array, weights_nk: Array) -> tuple[Array, Array, Array]:
    """Each pair of a token and an expert as a token of its own that takes one, scaled: the arguments of
    `apply_experts`."""
    x_pd = (x_nd[:, None] * weights_nk[..., None].astype(x_nd.dtype)).reshape(-1, x_nd.shape[1])
    return x_pd, ids_nk.reshape(-1, 1), jnp.ones((len(x_pd), 1))


def apply_experts(
    rows: tuple[Array, Array, Array], parts: Parts, device: Any, *, spec: Experts, config: ModelConfig
) -> Float[Array, "N D"]:
    """The weighted sum of what each token's experts give.

    Args:
      rows: activations [N, D], each token's experts [N, k] and their weights [N, k].
      parts: of all experts, or a device's part of them.
      device: the number of the part, 0 where there is one.
    """
    x_nd, ids_nk, weights_nk = rows
    n, k = ids_nk.shape
    local, _, width = _shape(parts["gate"]["kernel"])
    apart = local < spec.number
    if width < spec.width and "bias" in parts["down"]:
        # Every device has a part of each expert's sum, and one of them adds the bias.
        bias = parts["down"]["bias"]
        parts = parts | {"down": parts["down"] | {"bias": jnp.where(device == 0, bias, jnp.zeros_like(bias))}}
    ids_p = ids_nk.reshape(-1)
    if apart:
        ids_p = ids_p - device * local
        ids_p = jnp.where((ids_p >= 0) & (ids_p < local), ids_p, local)  # a further group: of other devices' experts
    order_p = jnp.argsort(ids_p)
    starts_e = jnp.searchsorted(ids_p[order_p], jnp.arange(local + 1)).astype(jnp.int32)
    few_bits = any(isinstance(part["kernel"], Quantised) for part in parts.values())
    ways = {"tpu": _ragged if n > _RAGGED_TOKENS and not few_bits else _in_blocks, "default": _in_blocks}
    given = {name: functools.partial(way, spec=spec, config=config) for name, way in ways.items()}
    y_pd = lax.platform_dependent(x_nd, parts, ids_p, order_p, starts_e, **given)
    y_nkd = y_pd.reshape(n, k, -1).astype(jnp.float32)
    if apart:
        y_nkd = jnp.where((ids_p < local).reshape(n, k, 1), y_nkd, 0)
    out: Array = jnp.einsum("nk,nkd->nd", weights_nk, y_nkd, precision=lax.Precision.HIGHEST).astype(x_nd.dtype)
    return out


def rows_of_a_block(tokens: int, spec: Experts) -> int:
    """As many rows as an expert has on average, within bounds, so that little of the blocks is filling."""
    average = tokens * spec.active // spec.number
    return min(tokens, max(_FEW_ROWS, 1 << max(average - 1, 0).bit_length()), _MOST_ROWS)


def _blocks(tokens: int, experts: int, active: int, size: int) -> int:
    """The most blocks of a size that there can be."""
    pairs = tokens * active
    groups = min(experts, pairs)  # at most, that are not empty
    return groups if size >= tokens else (pairs + groups * (size - 1)) // size


def block_rows(tokens: int, spec: Experts) -> int:
    """The rows of all blocks for so many tokens."""
    size = rows_of_a_block(tokens, spec)
    return size * _blocks(tokens, spec.number, spec.active, size)


def _act(gate: Array, up: Array, spec: Experts, config: ModelConfig) -> Array:
    if spec.clamped is None:
        gated: Array = ACTIVATIONS[config.activation](gate) * up
        return gated
    alpha, limit = spec.clamped
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return (up + 1) * (gate * jax.nn.sigmoid(alpha * gate))


def _in_blocks(
    x_nd: Array, parts: Parts, ids_p: Array, order_p: Array, starts_e: Array, spec: Experts, config: ModelConfig
) -> Float[Array, "P D"]:
    """What each pair's expert gives, block by block."""
    (n, d), pairs, experts = x_nd.shape, len(ids_p), len(starts_e) - 1
    size = rows_of_a_block(n, spec)
    blocks = _blocks(n, experts, pairs // n, size)
    counts_e = starts_e[1:] - starts_e[:-1]
    blocks_e = -(-counts_e // size)
    ends_e = jnp.cumsum(blocks_e)
    firsts_e = ends_e - blocks_e
    block_b = jnp.arange(blocks)
    expert_b = jnp.minimum(jnp.searchsorted(ends_e, block_b, side="right"), experts - 1)
    place_bs = (starts_e[expert_b] + (block_b - firsts_e[expert_b]) * size)[:, None] + jnp.arange(size)[None]
    token_bs = order_p[jnp.minimum(place_bs, pairs - 1)] // (pairs // n)

    def over_blocks(in_tiles: bool, skipping: bool) -> Callable[..., Array]:
        def apply(x_nd: Array, parts: Parts, token_bs: Array, expert_b: Array, used_b: Array) -> Array:
            def compute(token_s: Array, expert: Array) -> Array:
                def linear(name: str, x_sd: Array) -> Array:
                    return _linear(x_sd, parts[name], expert, config, in_tiles)

                x_sd = x_nd[token_s]
                return linear("down", _act(linear("gate", x_sd), linear("up", x_sd), spec, config))

            # Gradients compute a block again: else a copy of its kernels would be kept for each.
            @jax.checkpoint
            def block(token_s: Array, expert: Array, used: Array) -> Array:
                if not skipping:
                    return compute(token_s, expert)
                nothing = jnp.zeros((size, d), x_nd.dtype)
                y_sd: Array = lax.cond(used, compute, lambda *_: nothing, token_s, expert)
                return y_sd

            unroll = 1 if in_tiles or blocks > _UNROLLED_BLOCKS else blocks
            scanned = (token_bs, expert_b, used_b)
            y_bsd: Array = lax.scan(lambda _, given: ((), block(*given)), (), scanned, unroll=unroll)[1]
            return y_bsd

        return apply

    apart = experts < spec.number
    # A branch costs an accelerator a wait, more than what it would skip but where other devices have most of the pairs.
    ways = {"cpu": over_blocks(True, apart or n > 1), "default": over_blocks(False, apart)}
    y_bsd = lax.platform_dependent(x_nd, parts, token_bs, expert_b, block_b < ends_e[-1], **ways)
    expert_p = jnp.minimum(ids_p, experts - 1)
    slot_p = firsts_e[expert_p] * size + jnp.argsort(order_p) - starts_e[expert_p]
    y_pd: Array = y_bsd.reshape(-1, d)[jnp.clip(slot_p, 0, blocks * size - 1)]
    return y_pd


def _shape(kernel: Any) -> tuple[int, int, int]:
    """Experts, inputs and outputs of a kernel, which may be quantised, its inputs in groups."""
    shape = kernel.values.shape if isinstance(kernel, Quantised) else kernel.shape
    return shape[0], math.prod(shape[1:-1]), shape[-1]


def _linear(x_sd: Array, part: dict[str, Any], expert: Array, config: ModelConfig, in_tiles: bool) -> Array:
    """The linear map of one expert."""
    own = functools.partial(_inputs_of_expert, part["kernel"], expert)
    _, inputs, outputs = _shape(part["kernel"])
    if in_tiles:
        out = _in_tiles(x_sd, own, part["kernel"], config.precision).astype(x_sd.dtype)
    else:
        out = product("sd,df->sf", x_sd, own(0, None), config.precision, (inputs, outputs))
    return out if "bias" not in part else out + part["bias"][expert][None]


def _inputs_of_expert(kernel: Any, expert: Array, start: Any, count: int | None) -> Any:
    """Some inputs (or groups of inputs; None: all) of one expert's kernel."""

    def own(array: Array) -> Array:
        shared = array.shape[1] == 1  # a scale of all inputs
        first, size = (0, array.shape[1]) if shared or count is None else (start, count)
        at = [jnp.asarray(place, jnp.int32) for place in (expert, first, *[0] * (array.ndim - 2))]
        return lax.dynamic_slice(array, at, (1, size, *array.shape[2:]))[0]

    return jax.tree.map(own, kernel)


def _in_tiles(x_sd: Array, own: Callable[[Any, int], Any], kernel: Any, precision: str | None) -> Float[Array, "S F"]:
    """The product for a CPU, whose compiler copies (and converts) a slice before it multiplies by it: some inputs at a
    time, float32."""
    _, inputs, outputs = _shape(kernel)
    few_bits = isinstance(kernel, Quantised)
    units = (kernel.values if few_bits else kernel).shape[1]  # inputs, or groups of them
    rows, itemsize = inputs // units, 4 if few_bits else kernel.dtype.itemsize
    if few_bits:
        x_sd = x_sd.astype(jnp.float32)
    count = max(n for n in range(1, max(_TILE_BYTES // (rows * outputs * itemsize), 1) + 1) if units % n == 0)

    def tile(start: Any) -> Array:
        part = own(start, count)
        weights = (part.weights() if few_bits else part).reshape(count * rows, outputs)
        x = lax.dynamic_slice_in_dim(x_sd, start * rows, count * rows, axis=1)
        return jnp.einsum("sd,df->sf", x, weights, precision=precision, preferred_element_type=jnp.float32)

    if count == units:
        return tile(0)
    out: Array = lax.fori_loop(
        0, units // count, lambda i, out: out + tile(i * count), jnp.zeros((len(x_sd), outputs), jnp.float32)
    )
    return out


def _ragged(
    x_nd: Array, parts: Parts, ids_p: Array, order_p: Array, starts_e: Array, spec: Experts, config: ModelConfig
) -> Float[Array, "P D"]:
    """What each pair's expert gives, by ragged products over all pairs in the order of their experts."""
    counts_e = starts_e[1:] - starts_e[:-1]
    expert_p = jnp.minimum(ids_p[order_p], len(counts_e) - 1)

    def linear(name: str, x_pd: Array) -> Array:
        part = parts[name]
        out = lax.ragged_dot(
            x_pd, part["kernel"], counts_e, precision=config.precision, preferred_element_type=jnp.float32
        ).astype(x_pd.dtype)
        return out if "bias" not in part else out + part["bias"][expert_p]

    x_pd = x_nd[order_p // (len(ids_p) // len(x_nd))]
    y_pd = linear("down", _act(linear("gate", x_pd), linear("up", x_pd), spec, config))
    return y_pd[jnp.argsort(order_p)]
