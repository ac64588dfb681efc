"""DeBERTa's attention, in which content and relative positions are apart (He et al., 2021, arXiv 2006.03654).

In: activations [B, T, D] and the embeddings of the relative positions that a text of T tokens meets, [1, U, D], which
all layers of a stack share. Out: activations. Relative positions are those of the slots, so that padding on either side
changes nothing. Encoders only: nothing here decodes with a cache.

A score depends on position through the distance t - s alone. Position scores are therefore computed per token and
distance, [B, N, T, 2T - 1], and their rows are shifted against one another by padding and reshaping. That needs no
gather from a [T, T] table of indices, which is slow in its gradient and on TPUs (on the CPU at T = 64, B = 8, N = 12:
7 ms forward and 22 backward against 18 and 103).
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float

from rlae_jax.models.attention import Angles, attend, projections
from rlae_jax.models.config import Convolution, Disentangled, ModelConfig
from rlae_jax.models.layers import ACTIVATIONS, LayerNorm, Linear


def relative_rows(length: int, spec: Disentangled) -> np.ndarray:
    """The table's row of each distance t - s from -(length - 1) to length - 1: [2 * length - 1], ascending.

    Distances beyond m = buckets / 2 share buckets on a logarithmic scale that reaches the last one, 2m - 1, at
    max_position - 1:

        bucket(d) = d  for |d| <= m,  else  sign(d) * (m + ceil(log(|d| / m) / log((max_position - 1) / m) * (m - 1)))
        row(d) = clip(bucket(d) + span, 0, 2 * span - 1)
    """
    distances = np.arange(1 - length, length)
    buckets = distances
    if spec.buckets:
        exact = spec.buckets // 2
        # float32 step by step as the reference does it: at a bucket's edge the last bit decides.
        far = np.maximum(np.abs(distances), exact).astype(np.float32) / np.float32(exact)
        steps = np.log(far) / np.log(np.float32((spec.max_position - 1) / exact)) * np.float32(exact - 1)
        shared = np.sign(distances) * (np.ceil(steps).astype(int) + exact)
        buckets = np.where(np.abs(distances) <= exact, distances, shared)
    return np.clip(buckets + spec.span, 0, 2 * spec.span - 1)


def by_distance(scores_bntj: Float[Array, "B N T J"]) -> Float[Array, "B N T T"]:
    """out[t, s] = scores[t, T - 1 - t + s], for J = 2T - 1: each row is shifted by one against the row above it.

    In memory with rows of 2T entries, that is T - 1 + t * (2T - 1) + s: rows of 2T - 1 entries, T - 1 entries later.
    """
    *lead, t, j = scores_bntj.shape
    flat = jnp.pad(scores_bntj, [(0, 0)] * (len(lead) + 1) + [(0, 1)]).reshape(*lead, t * (j + 1))
    return flat[..., t - 1 : t - 1 + t * j].reshape(*lead, t, j)[..., :t]


class RelativeEmbeddings(nnx.Module):
    """The embeddings of relative positions [2 * span, D], with their layer norm."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        assert config.disentangled is not None
        self.spec = config.disentangled
        values = jax.random.normal(rngs.params(), (2 * self.spec.span, config.width)) * config.width**-0.5
        self.table = nnx.Param(values.astype(config.dtype), axes=("positions", "embed"))
        self.norm = LayerNorm((config.width,), config) if self.spec.norm_embeddings else None

    def sequence(self, length: int) -> Float[Array, "1 U D"]:
        """The rows from the first to the last that a text of this length needs."""
        rows = relative_rows(length, self.spec)
        table_1ud = self.table[...][None, rows[0] : rows[-1] + 1]
        return table_1ud if self.norm is None else self.norm(table_1ud)


class DisentangledAttention(nnx.Module):
    """softmax(A / sqrt(H * terms)) V, where terms counts the summands of A (He et al., 2021, section 3.1):

        A[t, s] = Q[t] K[s]  +  Q[t] Kr[row(t - s)]  +  K[s] Qr[row(t - s)]
                  content       content to position     position to content

    Kr and Qr are maps of the relative positions' embeddings, by matrices of their own or by the content's.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        assert config.disentangled is not None
        self.config, self.spec = config, config.disentangled
        self.q, self.k, self.v, self.o = projections(config, rngs)

        def own(wanted: bool) -> Linear | None:
            shape, axes = (config.width, config.heads, config.head_width), ("embed", "heads", "head")
            return Linear("btd,dnh->btnh", shape, axes, config, rngs, bias=config.qkv_bias) if wanted else None

        separate = not self.spec.shared_projections
        self.position_k = own(separate and self.spec.content_to_position)
        self.position_q = own(separate and self.spec.position_to_content)
        terms = 1 + self.spec.content_to_position + self.spec.position_to_content
        self.scale = (config.head_width * terms) ** -0.5

    def sequence(
        self, x_btd: Array, angles: Angles, mask_bts: Bool[Array, "B T S"], relative_1ud: Float[Array, "1 U D"]
    ) -> tuple[Array, tuple[Array, Array]]:
        """Whole sequences. Returns the output [B, T, D] and the keys and values [B, T, N, H].

        Queries of padding attend too, where the published model masks them; no token ever reads what they give.
        """
        q, k, v = self.q(x_btd), self.k(x_btd), self.v(x_btd)
        bias_bnts = self._position_scores(q, k, relative_1ud)
        return self.o(attend(q, k, v, mask_bts, self.config, self.scale, bias_bnts)), (k, v)

    def _position_scores(self, q_btnh: Array, k_bsnh: Array, relative_1ud: Array) -> Array | None:
        """What positions add to the scaled scores. Maps of positions are [B, U, N, H] under adapters of each row."""
        rows = relative_rows(q_btnh.shape[1], self.spec)
        rows = rows - rows[0]
        einsum, precision = "btnh,bjnh->bntj", self.config.precision
        scores = []
        if self.spec.content_to_position:
            # The columns of row t are s = 0, 1, ...: descending distances.
            keys_bjnh = (self.position_k or self.k)(relative_1ud)[:, rows[::-1]]
            scores.append(by_distance(jnp.einsum(einsum, q_btnh, keys_bjnh, precision=precision)))
        if self.spec.position_to_content:
            queries_bjnh = (self.position_q or self.q)(relative_1ud)[:, rows]
            scores_bnst = by_distance(jnp.einsum(einsum, k_bsnh, queries_bjnh, precision=precision))
            scores.append(jnp.swapaxes(scores_bnst, -1, -2))
        return sum(scores[1:], start=scores[0]) * self.scale if scores else None


class TokenConvolution(nnx.Module):
    """act(conv(x)) over neighbouring tokens, whose kernel is [outputs, inputs per group, tokens]."""

    def __init__(self, spec: Convolution, config: ModelConfig, rngs: nnx.Rngs):
        self.groups, self.precision, self.act = spec.groups, config.precision, ACTIVATIONS[spec.activation]
        d, inputs = config.width, config.width // spec.groups
        values = jax.random.normal(rngs.params(), (d, inputs, spec.width)) * (inputs * spec.width) ** -0.5
        self.kernel = nnx.Param(values.astype(config.dtype), axes=("embed", "embed", "window"))
        self.bias = nnx.Param(jnp.zeros((d,), config.dtype), axes=("embed",))

    def __call__(self, x_btd: Array, mask_bt: Bool[Array, "B T"]) -> Array:
        out = lax.conv_general_dilated(
            jnp.where(mask_bt[..., None], x_btd, 0),  # padding looks like the ends of the text
            self.kernel[...],
            window_strides=(1,),
            padding="SAME",
            dimension_numbers=("NWC", "OIW", "NWC"),
            feature_group_count=self.groups,
            precision=self.precision,
        )
        return self.act(out + self.bias[...][None, None])
