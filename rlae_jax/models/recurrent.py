"""Layers that keep a state of constant size instead of keys and values: short convolutions, and linear attention with
the gated delta rule.

In: activations [B, W, D] of the next W tokens of every row, which of them each row takes, and the state before them.
Out: the same, and the state after what was taken. A prompt, a step and a chunk of a ragged batch are one function: what
is padding or filling changes no state. A prompt begins with a state of zeros.

    taken     . . a b c      a prompt, padded on the left
    taken     d              a step
    taken     e f . .        a chunk, of which this row takes two
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float

from rlae_jax.models.attention import Packing
from rlae_jax.models.cache import LayerState, pin_state, zero_state
from rlae_jax.models.config import GatedDelta, ModelConfig, ShortConvolution
from rlae_jax.models.layers import ACTIVATIONS, Linear, RMSNorm
from rlae_jax.sharding import constrain

CHUNK = 64  # tokens whose updates of a memory are made together
_STRONGEST = -20.0  # decay of one token, where tokens are taken together
_NORM_EPS = 1e-6


class CausalConvolution(nnx.Module):
    """y_t = sum_j kernel_j * x_{t - J + 1 + j} of every channel, J being the number of taps.

    The kernel lies as checkpoints have it, [C, 1, J]. Its channels may belong to several parts, one after another.
    """

    def __init__(self, channels: int, taps: int, config: ModelConfig, rngs: nnx.Rngs, *, bias: bool = False):
        values = jax.random.normal(rngs.params(), (channels, 1, taps)) * taps**-0.5
        self.kernel = nnx.Param(values.astype(config.dtype), axes=("channels", "group", "window"))
        zeros = jnp.zeros((channels,), config.dtype)
        self.bias = nnx.Param(zeros, axes=("channels",)) if bias else None

    def __call__(
        self, parts: Sequence[Float[Array, "B W *C"]], before: Sequence[Array], taken_bw: Bool[Array, "B W"] | None
    ) -> tuple[list[Float[Array, "B W *C"]], tuple[Array, ...]]:
        """The next W outputs, and the last J - 1 inputs.

        Args:
          before: the last J - 1 inputs of every part so far, [B, J - 1, *C].
          taken_bw: which inputs are there, one after another; None: all.
        """
        kernel_cj = self.kernel[...][:, 0]
        taps, start = kernel_cj.shape[1], 0
        outputs, last = [], []
        for x, old in zip(parts, before, strict=True):
            w, channels = x.shape[1], x.shape[2:]
            if taken_bw is not None:
                x = jnp.where(lax.expand_dims(taken_bw, range(2, x.ndim)), x, 0)
            inputs = jnp.concatenate([old, x], axis=1)
            own = slice(start, start := start + x[0, 0].size)
            # Whole on every device of a mesh: pieces of a part that is divided would be sent from device to device, by
            # permutes of all devices, which those that are done with their rows would never join.
            kernel = constrain(kernel_cj[own]).T.reshape(taps, 1, 1, *channels)
            out = functools.reduce(jnp.add, (inputs[:, j : j + w] * kernel[j] for j in range(taps)))
            outputs.append(out if self.bias is None else out + constrain(self.bias[...][own]).reshape(1, 1, *channels))
            last.append(_last(inputs, taken_bw, taps - 1))
        return outputs, tuple(last)


def _last(inputs: Float[Array, "B X *C"], taken_bw: Bool[Array, "B W"] | None, n: int) -> Float[Array, "B n *C"]:
    """The last n inputs up to each row's last that is there. X is n + W."""
    if taken_bw is None:
        return inputs[:, inputs.shape[1] - n :]
    end_b = jnp.max(jnp.where(taken_bw, jnp.arange(1, taken_bw.shape[1] + 1)[None], 0), axis=1, initial=0)
    places_bn = end_b[:, None] + jnp.arange(n)[None]
    return jnp.take_along_axis(inputs, lax.expand_dims(places_bn, range(2, inputs.ndim)), axis=1)


class GatedShortConvolution(nnx.Module):
    """o(c * conv(b * x)), where b, c and x are linear maps of the activations (Liquid AI, 2025)."""

    def __init__(self, spec: ShortConvolution, config: ModelConfig, rngs: nnx.Rngs):
        d = config.width

        def linear(einsum: str, axes: tuple[str, str]) -> Linear:
            return Linear(einsum, (d, d), axes, config, rngs, bias=spec.bias)

        self.config = config
        self.b, self.c, self.x = (linear("btd,df->btf", ("embed", "mlp")) for _ in range(3))
        self.o = linear("btf,fd->btd", ("mlp", "embed"))
        self.convolution = CausalConvolution(d, spec.taps, config, rngs, bias=spec.bias)

    def __call__(
        self,
        x_btd: Float[Array, "B W D"],
        taken_bw: Bool[Array, "B W"] | None,
        state: LayerState | None = None,
        packing: Packing | None = None,
    ) -> tuple[Float[Array, "B W D"], LayerState]:
        """See the module's text; with a packing activations are [R, 1, D]."""
        inputs = self.b(x_btd) * self.x(x_btd)
        if packing is not None:
            inputs = packing.unpack(inputs)
        state = zero_state(self.config, len(inputs)) if state is None else state
        (out,), last = self.convolution([inputs], state.inputs, taken_bw)
        out = self.c(x_btd) * (out if packing is None else packing.pack(out))
        return self.o(out), pin_state(LayerState(last), self.config)


class GatedDeltaNet(nnx.Module):
    """Linear attention whose memory S forgets, and replaces what a key stands for (Yang et al., 2025).

        q, k, v = silu(conv(maps of x)), q and k of length 1 and H^-1/2
        S_t = a_t S_{t-1} + k_t (b_t (v_t - a_t S_{t-1}^T k_t))^T
        out = o(norm(S_t^T q_t) * silu(gate(x)))

    with a = exp(-exp(log_rate) softplus(decay(x) + decay_bias)) and b = sigmoid(strength(x)), a number per head.
    """

    def __init__(self, spec: GatedDelta, config: ModelConfig, rngs: nnx.Rngs):
        d, g, n = config.width, spec.key_heads, spec.heads
        self.config, self.spec = config, spec

        def heads(number: int, width: int, axis: str) -> Linear:
            return Linear("btd,dnh->btnh", (d, number, width), ("embed", axis, "head"), config, rngs)

        def per_head() -> Linear:
            return Linear("btd,dn->btn", (d, n), ("embed", "heads"), config, rngs)

        self.q, self.k = (heads(g, spec.key_width, "kv_heads") for _ in range(2))
        self.v, self.gate = (heads(n, spec.value_width, "heads") for _ in range(2))
        self.strength, self.decay = per_head(), per_head()
        self.decay_bias = nnx.Param(jnp.ones((n,), config.dtype), axes=("heads",))
        rates = jax.random.uniform(rngs.params(), (n,), minval=0.01, maxval=16.0)
        self.log_rate = nnx.Param(jnp.log(rates).astype(config.dtype), axes=("heads",))
        channels = 2 * g * spec.key_width + n * spec.value_width
        self.convolution = CausalConvolution(channels, spec.taps, config, rngs)
        plain = dataclasses.replace(config, norm_offset=0.0)  # whatever the model's other norms are
        self.head_norm = RMSNorm(spec.value_width, plain, "head_norm")
        out = ("btnh,nhd->btd", (n, spec.value_width, d), ("heads", "head", "embed"))
        self.o = Linear(*out, config, rngs)
        self.act = ACTIVATIONS[config.activation]

    def __call__(
        self,
        x_btd: Float[Array, "B W D"],
        taken_bw: Bool[Array, "B W"] | None,
        state: LayerState | None = None,
        packing: Packing | None = None,
    ) -> tuple[Float[Array, "B W D"], LayerState]:
        """See the module's text; with a packing activations are [R, 1, D]."""
        parts = [self.q(x_btd), self.k(x_btd), self.v(x_btd)]
        strength = jax.nn.sigmoid(self.strength(x_btd)).astype(jnp.float32)
        shifted = self.decay(x_btd).astype(jnp.float32) + self.decay_bias[...].astype(jnp.float32)[None, None]
        decay = -jnp.exp(self.log_rate[...].astype(jnp.float32))[None, None] * jax.nn.softplus(shifted)
        if packing is not None:
            parts = [packing.unpack(part) for part in parts]
            strength, decay = packing.unpack(strength), packing.unpack(decay)
        if taken_bw is not None:
            strength, decay = (jnp.where(taken_bw[..., None], part, 0.0) for part in (strength, decay))
        state = zero_state(self.config, len(decay)) if state is None else state
        assert state.memory is not None
        convolved, last = self.convolution(parts, state.inputs, taken_bw)
        q, k, v = (self.act(part).astype(jnp.float32) for part in convolved)
        q, k = _unit(q) * self.spec.key_width**-0.5, _unit(k)
        rule = delta_step if decay.shape[1] == 1 else delta_rule
        out, memory = rule(q, k, v, decay, strength, state.memory, self.config.precision)
        out = out.astype(x_btd.dtype)
        out = self.head_norm(out if packing is None else packing.pack(out))
        gated = out.astype(jnp.float32) * jax.nn.silu(self.gate(x_btd).astype(jnp.float32))
        return self.o(gated.astype(x_btd.dtype)), pin_state(LayerState(last, memory), self.config)


Recurrence = GatedShortConvolution | GatedDeltaNet


def make_recurrence(config: ModelConfig, rngs: nnx.Rngs) -> Recurrence:
    """What stands in the place of attention in the layers that have a state."""
    spec = config.recurrent
    assert spec is not None
    return (
        GatedDeltaNet(spec, config, rngs) if isinstance(spec, GatedDelta) else GatedShortConvolution(spec, config, rngs)
    )


def _unit(x: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
    return x * lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + _NORM_EPS)


def delta_step(
    q_bwgk: Float[Array, "B 1 G K"],
    k_bwgk: Float[Array, "B 1 G K"],
    v_bwnv: Float[Array, "B 1 N V"],
    decay_bwn: Float[Array, "B 1 N"],
    strength_bwn: Float[Array, "B 1 N"],
    memory_bnkv: Float[Array, "B N K V"],
    precision: str | None,
) -> tuple[Float[Array, "B 1 N V"], Float[Array, "B N K V"]]:
    """`delta_rule` of one token, which reads the memory once."""
    del precision  # sums of products, without a matrix product
    times = v_bwnv.shape[2] // k_bwgk.shape[2]
    q, k = (jnp.repeat(x[:, 0], times, axis=1) for x in (q_bwgk, k_bwgk))
    a, b, v = jnp.exp(decay_bwn[:, 0])[..., None], strength_bwn[:, 0][..., None], v_bwnv[:, 0]
    by_k, by_q = (jnp.sum(memory_bnkv * x[..., None], axis=2) for x in (k, q))
    new = b * (v - a * by_k)
    out = a * by_q + jnp.sum(q * k, axis=-1, keepdims=True) * new
    return out[:, None], a[..., None] * memory_bnkv + k[..., None] * new[:, :, None]


def delta_rule(
    q_btgk: Float[Array, "B T G K"],
    k_btgk: Float[Array, "B T G K"],
    v_btnv: Float[Array, "B T N V"],
    decay_btn: Float[Array, "B T N"],
    strength_btn: Float[Array, "B T N"],
    memory_bnkv: Float[Array, "B N K V"],
    precision: str | None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N K V"]]:
    """What T tokens read of a memory to which each of them adds, float32; see `GatedDeltaNet` for the rule.

    The updates of a chunk of C tokens are solved for together (Yang et al., 2024, section 3.2; with decay: Yang et al.,
    2025, section 3.3). With c_i the sum of the chunk's decays up to token i, S the memory before it and u_i what token
    i adds for its key,

        u_i + sum_{j < i} b_i e^(c_i - c_j) (k_i . k_j) u_j = b_i (v_i - e^(c_i) S^T k_i)
        out_i = e^(c_i) S^T q_i + sum_{j <= i} e^(c_i - c_j) (q_i . k_j) u_j
        S after it = e^(c_C) S + sum_j e^(c_C - c_j) k_j u_j^T

    of which only the products with S go from chunk to chunk. N / G heads, one after another, share queries and keys.
    """
    b, t, n, _ = v_btnv.shape
    times = n // k_btgk.shape[2]
    size = min(max(t, 1), CHUNK)
    chunks = max(-(-t // size), 1)

    def cut(x: Array, times: int = 1) -> Array:
        """[chunks, B, N, C, ...] of [B, T, N or G, ...]; what is added adds nothing and forgets nothing."""
        x = jnp.pad(x, [(0, 0), (0, chunks * size - t), *[(0, 0)] * (x.ndim - 2)])
        x = x.reshape(b, chunks, size, *x.shape[2:])
        return jnp.repeat(jnp.moveaxis(x, (1, 3), (0, 2)), times, axis=2)

    def product(einsum: str, *operands: Array) -> Array:
        return jnp.einsum(einsum, *operands, precision=precision)

    q, k, v = cut(q_btgk, times), cut(k_btgk, times), cut(v_btnv)
    # What is left of a memory after the strongest is beyond float32; sums of stronger ones would lose the weak ones.
    decay = jnp.cumsum(cut(jnp.maximum(decay_btn, _STRONGEST)), axis=-1)
    strength = cut(strength_btn)[..., None]
    grown = jnp.exp(decay)[..., None]
    # Above the diagonal sums of decays are negative and their exponentials without bound.
    between = jnp.where(jnp.tri(size, dtype=bool), decay[..., :, None] - decay[..., None, :], -jnp.inf)
    between = jnp.exp(between)
    own = strength * product("...ik,...jk->...ij", k, k) * between
    sides = strength * jnp.concatenate([v, grown * k], axis=-1)
    solved = lax.linalg.triangular_solve(own, sides, left_side=True, lower=True, unit_diagonal=True)
    added, by_memory = jnp.split(solved, [v.shape[-1]], axis=-1)  # u = added - by_memory S
    reads = product("...ik,...jk->...ij", q, k) * between
    left = jnp.exp(decay[..., -1:] - decay)[..., None]  # of what a token adds, at the end of its chunk

    def one(memory: Array, chunk: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, reads, added, by_memory, kept = chunk
        u = added - product("bnik,bnkv->bniv", by_memory, memory)
        out = product("bnik,bnkv->bniv", q, memory) + product("bnij,bnjv->bniv", reads, u)
        return kept * memory + product("bnjk,bnjv->bnkv", k, u), out

    parts = (grown * q, left * k, reads, added, by_memory, grown[..., -1:, :])
    memory, out = lax.scan(one, memory_bnkv, parts)
    return jnp.moveaxis(out, (0, 2), (1, 3)).reshape(b, chunks * size, n, -1)[:, :t], memory
