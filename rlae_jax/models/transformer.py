"""The transformer: `Model`, which is a configuration with arrays, and the Flax NNX modules that it is made of.

In: token ids [B, T] with a mask (1 where there is a token; positions follow the mask) or, while decoding, one token
per row and the key/value cache. Out: last hidden states [B, T, D] after the final norm (what the output head reads)
and the keys and values to cache. One class serves decoders, encoders and encoder-decoders of every family; a
`ModelConfig` says what it is made of.

The modules declare parameters and hold no state: `_declared` gives the static graph once per configuration, a method of
`Model` puts arrays into it while a program is traced, and what runs is a function of plain arrays. Calling a module
through `nnx.jit` walks its whole graph at every call, which costs more than decoding a token on a small model.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from rlae_jax.compilation import jit
from rlae_jax.models import quantise
from rlae_jax.models.attention import Angles, Attention, Packing, RelativeBiasTable
from rlae_jax.models.cache import Cache, LayerCache, Layers, LayerState, Visible, cache_layout
from rlae_jax.models.config import ModelConfig, TextHead
from rlae_jax.models.disentangled import DisentangledAttention, RelativeEmbeddings, TokenConvolution
from rlae_jax.models.experts import ExpertLinear, MixtureOfExperts, Router
from rlae_jax.models.layer_inputs import InputGate, SecondEmbedding
from rlae_jax.models.layers import ACTIVATIONS, FeedForward, Linear, kernel_inputs, make_norm, rotary_angles
from rlae_jax.models.lora import Adapted, Adapters, for_rows, low_rank_delta
from rlae_jax.models.recurrent import make_recurrence
from rlae_jax.models.rope import frequencies
from rlae_jax.sharding import constrain

Params = dict[Any, Any]  # nested dictionaries of arrays, as `nnx.to_pure_dict` gives them


class Layer(nnx.Module):
    """Attention or what stands in its place, attention to an encoder's states if there are any, and the feed-forward
    block, each a branch of the residual stream. Norms are named by their branch and place: `attention_norm`,
    `attention_branch_norm`, ..."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, layer: int):
        self.config = config
        # Any: only models that decode have a `step`, and disentangled attention is for encoders.
        attention: Any = None
        recurrent = layer in config.recurrent_layers
        if not recurrent:
            attention = DisentangledAttention(config, rngs) if config.disentangled else Attention(config, rngs, layer)
        self.attention = attention
        self.recurrence = make_recurrence(config, rngs) if recurrent else None
        self.cross = None if config.encoder is None else Attention(config, rngs, layer, cross=config.encoder.width)
        sparse = config.experts is not None and layer in config.experts.layers
        self.ffn = MixtureOfExperts(config, rngs) if sparse else FeedForward(config, rngs)
        for branch in ("attention", "cross", "ffn"):
            for place in ("before", "branch", "sum"):
                present = place in config.norm_places and (branch != "cross" or self.cross is not None)
                present = present and not (config.shared_norm and branch == "ffn")
                name = f"{branch}_norm" if place == "before" else f"{branch}_{place}_norm"
                setattr(self, name, make_norm(config.width, config) if present else None)
        self.inputs = None if config.layer_inputs is None else InputGate(config.layer_inputs, config, rngs)
        self.scale = nnx.Param(jnp.ones((1,), config.dtype), axes=("layers",)) if config.layer_scale else None

    def _enter(self, branch: str, x: Array) -> Array:
        norm = getattr(self, f"{branch}_norm")
        return x if norm is None else norm(x)

    def _leave(self, branch: str, x: Array, out: Array) -> Array:
        branch_norm, sum_norm = getattr(self, f"{branch}_branch_norm"), getattr(self, f"{branch}_sum_norm")
        out = out if branch_norm is None else branch_norm(out)
        if self.config.branch_scale != 1.0:
            # In float32: what bfloat16 makes of the factor would be off by as much in every layer.
            out = (out.astype(jnp.float32) * self.config.branch_scale).astype(out.dtype)
        # Pinned on a mesh, so that what the devices of a group have each a part of is summed here.
        total = constrain(x + out, "batch")
        return total if sum_norm is None else sum_norm(total)

    def sequence(
        self,
        x: Float[Array, "B T D"],
        angles: Angles,
        real_bt: Array,
        mask_bts: Array,
        relative: Array | None,
        source: tuple[Array, Array] | None = None,
        part: Array | None = None,
        keys_values: tuple[Array, Array] | None = None,
    ) -> tuple[Array, tuple[Array, Array] | LayerState, tuple[Array, Array] | None]:
        """Whole sequences. `real_bt` says which tokens are there and `mask_bts` what they see. `relative` is what the
        stack's layers share of relative positions, scores [1, N, T, T] or embeddings [1, U, D]; `source` the encoder's
        states and mask; `part` the layer's of a second embedding; `keys_values` those of the layer whose it reads.
        Returns the activations, the keys and values, or the state, and those of the source."""
        entered = self._enter("attention", x)
        if self.recurrence is not None:
            out, state = self.recurrence(entered, real_bt)
            return self._after_attention(x, entered, out, part), state, None
        others = {} if keys_values is None else {"keys_values": keys_values}
        out, keys_values = self.attention.sequence(entered, angles, mask_bts, relative, **others)
        if self.cross is None or source is None:
            return self._after_attention(x, entered, out, part), keys_values, None
        x = self._leave("attention", x, out)
        states, mask = source
        source_kv = self.cross.keys_values(states, angles)
        mask_bts = jnp.broadcast_to(mask[:, None, :], (*x.shape[:2], mask.shape[1]))
        out, _ = self.cross.sequence(self._enter("cross", x), angles, mask_bts, keys_values=source_kv)
        x = self._leave("cross", x, out)
        return self._leave("ffn", x, self.ffn(self._enter("ffn", x))), keys_values, source_kv

    def step(
        self,
        x: Float[Array, "B 1 D"],
        angles: Angles,
        cache: LayerCache | LayerState,
        slot: Array,
        visible_bs: Array,
        bias: Array | None,
        source: tuple[LayerCache, Array] | None = None,
        part: Array | None = None,
    ) -> tuple[Array, LayerCache | LayerState]:
        """One token per row, written to `slot`. `source` is the cache of the encoder's states and their mask."""
        entered = self._enter("attention", x)
        if self.recurrence is not None:
            assert isinstance(cache, LayerState)
            out, state = self.recurrence(entered, None, cache)
            return self._after_attention(x, entered, out, part), state
        out, cache = self.attention.step(entered, angles, cache, slot, visible_bs, bias)
        if self.cross is None or source is None:
            return self._after_attention(x, entered, out, part), cache
        x = self._leave("attention", x, out)
        x = self._leave("cross", x, self.cross.read(self._enter("cross", x), angles, *source))
        return self._leave("ffn", x, self.ffn(self._enter("ffn", x))), cache

    def chunk(
        self,
        x: Array,
        angles: Angles,
        cache: LayerCache | LayerState,
        behind_bs: Array,
        slot_b: Array,
        taken_bw: Array,
        packing: Packing | None,
        part: Array | None = None,
        new: LayerCache | LayerState | None = None,
    ) -> tuple[Array, LayerCache | LayerState]:
        """The next W tokens of every row, of which it takes the first; see `Attention.chunk`."""
        entered = self._enter("attention", x)
        if self.recurrence is not None:
            assert isinstance(cache, LayerState)
            out, state = self.recurrence(entered, taken_bw, cache, packing)
            return self._after_attention(x, entered, out, part), state
        out, new = self.attention.chunk(entered, angles, cache, behind_bs, slot_b, packing, new)
        return self._after_attention(x, entered, out, part), new

    def _after_attention(self, x: Array, entered: Array, out: Array, part: Array | None) -> Array:
        """The rest of a layer without attention to a source, from its input, what attention read of it and gave."""
        if self.config.parallel_branches:
            ffn = self.ffn(entered if self.config.shared_norm else self._enter("ffn", x))
            return self._leave("attention", x, out) + ffn
        x = self._leave("attention", x, out)
        x = self._leave("ffn", x, self.ffn(self._enter("ffn", x)))
        if self.inputs is not None and part is not None:
            x = self.inputs(x, part)
        return x if self.scale is None else x * lax.broadcast_to_rank(self.scale[...], x.ndim)


class Branches(NamedTuple):
    """Where several texts stand in one row, each of which goes on in several ways:

        token       a b c d e f  p q r s .      the texts a b, a b c d, a b e f and p q, p q r, p q s
        text        1 1 1 1 1 1  2 2 2 2 0
        branch      0 0 1 1 2 2  0 0 1 2 0
        position    0 1 2 3 2 3  0 1 2 2 0

    A token sees those before it of its own text, of what the branches share and of its own branch. What begins alike is
    read once. Not for models that see places instead of positions (`ModelConfig.takes_branches`).
    """

    positions_bt: Int[Array, "B T"]
    text_bt: Int[Array, "B T"]  # 0 is padding
    branch_bt: Int[Array, "B T"]  # 0 is what the branches of a text share

    def visible(self) -> Bool[Array, "B T T"]:
        """Which tokens belong to what a token sees, before it or not."""
        text, branch = self.text_bt, self.branch_bt
        shared_or_own = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
        return (text[:, :, None] == text[:, None, :]) & shared_or_own


class ScoringHead(nnx.Module):
    """out(act(dense(h))) of the state h of each text's first token."""

    def __init__(self, spec: TextHead, config: ModelConfig, rngs: nnx.Rngs):
        d, labels = config.width, len(spec.labels)
        self.dense = Linear("btd,de->bte", (d, d), ("embed", "embed"), config, rngs, bias=True)
        self.out = Linear("btd,dv->btv", (d, labels), ("embed", "labels"), config, rngs, bias=True)
        self.act = ACTIVATIONS[spec.activation]

    def __call__(self, hidden_btd: Array, mask_bt: Array) -> Float[Array, "B labels"]:
        first_b = jnp.argmax(mask_bt.astype(bool), axis=1)
        first_b1d = jnp.take_along_axis(hidden_btd, first_b[:, None, None], axis=1)
        return self.out(self.act(self.dense(first_b1d)))[:, 0].astype(jnp.float32)


class Transformer(nnx.Module):
    """Embedding, layers, final norm and output head; an encoder-decoder holds its encoder as a second transformer.

    Args:
      embedded: the encoder of an encoder-decoder reads its decoder's embedding table.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, *, embedded: bool = False):
        self.config = config
        d, narrow = config.width, config.embedding_width or config.width
        summand = narrow if config.narrow_positions else d

        def table(rows: int, width: int, axis: str) -> nnx.Param[Array]:
            values = jax.random.normal(rngs.params(), (rows, width)) * width**-0.5
            return nnx.Param(values.astype(config.dtype), axes=(axis, "embed"))

        def projection(einsum: str, shape: tuple[int, int]) -> Linear | None:
            return Linear(einsum, shape, ("embed", "embed"), config, rngs) if narrow != d else None

        self.embedding = None if embedded else table(config.vocab, narrow, "vocab")
        self.positions = table(config.learned_positions, summand, "positions") if config.learned_positions else None
        self.token_types = table(config.token_types, summand, "types") if config.token_types else None
        self.embedding_norm = make_norm(d, config) if config.embedding_norm else None
        self.project_in = projection("btc,cd->btd", (narrow, d))
        self.project_out = projection("btd,dc->btc", (d, narrow)) if config.has_head else None
        self.relative_bias = RelativeBiasTable(config, rngs) if config.relative_bias else None
        self.relative_embeddings = RelativeEmbeddings(config, rngs) if config.disentangled else None
        inputs = config.layer_inputs
        self.second = None if inputs is None else SecondEmbedding(inputs, config, rngs)
        self.layers = nnx.List([Layer(config.of_layer(i), rngs, i) for i in range(config.layers)])
        self.convolution = TokenConvolution(config.convolution, config, rngs) if config.convolution else None
        self.convolution_norm = make_norm(d, config) if config.convolution else None
        self.norm = make_norm(d, config) if config.final_norm else None
        own_head = config.has_head and not config.tied_head
        head = ("btd,dv->btv", (narrow, config.vocab), ("embed", "vocab"))
        self.head = Linear(*head, config, rngs, bias=config.head_bias) if own_head else None
        self.scorer = ScoringHead(config.scorer, config, rngs) if config.scorer else None
        self.encoder = None if config.encoder is None else Transformer(config.encoder, rngs, embedded=True)

    def _embed(self, table: Array, ids_bt: Array, positions_bt: Array, types_bt: Array | None = None) -> Array:
        config = self.config
        x = quantise.rows(table, ids_bt, config.dtype)
        if self.project_in is not None and not config.narrow_positions:
            x = self.project_in(x)
        if config.embedding_scale != 1.0:
            x = x * jnp.asarray(config.embedding_scale, x.dtype)  # rounded to the dtype, as Gemma's is
        if self.positions is not None:
            x = x + self.positions[...][positions_bt + config.position_offset]
        if self.token_types is not None:
            x = x + self.token_types[...][jnp.zeros_like(ids_bt) if types_bt is None else types_bt]
        if self.project_in is not None and config.narrow_positions:
            x = self.project_in(x)
        x = constrain(x, "batch")
        return x if self.embedding_norm is None else self.embedding_norm(x)

    @property
    def _table(self) -> Any:
        assert self.embedding is not None  # None only inside an encoder-decoder, whose own table is passed along
        return self.embedding.get_value()

    def _angles(self, positions_bt: Array) -> Angles:
        config = self.config
        wide = config.head_width if config.wide is None else config.wide.head_width
        ropes = dict.fromkeys([(config.rope, wide), (config.local_rope or config.rope, config.head_width)])
        angles: Angles = {
            (rope, width): rotary_angles(positions_bt, frequencies(rope, width)[0])
            for rope, width in ropes
            if rope is not None
        }
        growth = config.query_growth
        if growth is not None:
            steps = ((positions_bt + growth.offset) // growth.step).astype(jnp.float32)
            angles[growth] = 1.0 + growth.rate * jnp.log1p(steps)
        if config.chunked:
            angles["positions"] = positions_bt
        return angles

    def _parts(self, ids_bt: Array, x: Array) -> list[Array | None]:
        """What each layer has of a second embedding."""
        if self.second is None:
            return [None] * self.config.layers
        parts_btlw = self.second(ids_bt, x)
        return [parts_btlw[:, :, i] for i in range(self.config.layers)]

    def _relative(self, length: int) -> Array | None:
        """What the layers share of relative positions, see `Layer.sequence`."""
        table = self.relative_embeddings if self.relative_bias is None else self.relative_bias
        return None if table is None else table.sequence(length)

    def _finish(self, x: Array) -> Array:
        if self.norm is not None:
            x = self.norm(x)
        return x if self.project_out is None else self.project_out(x)

    def encode(self, ids_bt: Array, mask_bt: Array, *, remat: bool = False) -> Float[Array, "B T D"]:
        """The encoder's last hidden states."""
        assert self.encoder is not None
        return self.encoder.sequence(ids_bt, mask_bt, table=self._table, remat=remat)[0]

    def sequence(
        self,
        ids_bt: Int[Array, "B T"],
        mask_bt: Array,
        *,
        types_bt: Array | None = None,
        source: tuple[Array, Array] | None = None,
        table: Array | None = None,
        remat: bool = False,
        branches: Branches | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Whole sequences: last hidden states, and the keys and values of every layer."""
        t = ids_bt.shape[1]
        real = mask_bt.astype(bool)
        mask_bts = jnp.broadcast_to(real[:, None, :], (len(ids_bt), t, t))
        if self.config.causal:
            mask_bts = mask_bts & jnp.tri(t, dtype=bool)[None]
        if branches is not None:
            mask_bts = mask_bts & branches.visible()
        positions_bt = positions(mask_bt) if branches is None else branches.positions_bt
        angles = self._angles(positions_bt)
        if branches is not None:  # how far tokens are apart is not how far their places are
            angles["positions"] = positions_bt
        relative = self._relative(t)
        x = embedded = self._embed(self._table if table is None else table, ids_bt, positions_bt, types_bt)
        parts = self._parts(ids_bt, x)
        kept: list[Any] = []
        cached: list[LayerCache | LayerState] = []
        kept_source: list[LayerCache] = []
        for i, layer in enumerate(self.layers):
            owner = self.config.source_layer(i)
            run = functools.partial(
                layer.sequence,
                angles=angles,
                real_bt=real,
                mask_bts=mask_bts,
                relative=relative,
                source=source,
                part=parts[i],
                keys_values=None if owner == i else kept[owner],
            )
            # With `remat` a layer's activations are computed again for its gradient instead of being kept.
            x, keys_values, source_kv = (jax.checkpoint(run) if remat else run)(x)
            if i == 0 and self.convolution is not None and self.convolution_norm is not None:
                x = self.convolution_norm(x + self.convolution(embedded, real))
            if owner == i:
                kept.append(keys_values)
                if isinstance(keys_values, LayerState):
                    cached.append(keys_values)
                else:
                    cached.append(cache_layout(keys_values[0], keys_values[1], self.config))
            if source_kv is not None:
                kept_source.append(cache_layout(source_kv[0], source_kv[1], self.config))
        if source is None:
            return self._finish(x), Cache(tuple(cached), t)
        return self._finish(x), Cache(tuple(cached), t, tuple(kept_source), source[1])

    def read_source(self, ids_bt: Array, mask_bt: Array) -> Cache:
        """Runs the encoder. The cache that a decoder without any token yet starts from: S is 0."""
        states = self.encode(ids_bt, mask_bt)
        c = self.config
        source = tuple(cache_layout(*layer.cross.keys_values(states, {}), c) for layer in self.layers if layer.cross)
        empty = jnp.zeros((len(ids_bt), c.kv_heads, c.head_width, 0), states.dtype)
        return Cache((LayerCache(empty, empty),) * c.layers, 0, source, mask_bt.astype(bool))

    def step(
        self, ids_b: Int[Array, " B"], position_b: Int[Array, " B"], cache: Cache, slot: Array, visible: Visible
    ) -> tuple[Float[Array, "B D"], Cache]:
        """One token per row."""
        positions_bt = position_b[:, None]
        angles = self._angles(positions_bt)
        bias = None if self.relative_bias is None else self.relative_bias.step(slot, cache.slots)
        x = self._embed(self._table, ids_b[:, None], positions_bt)
        parts = self._parts(ids_b[:, None], x)
        new: list[LayerCache | LayerState] = []
        for i, layer in enumerate(self.layers):
            source = (cache.source[i], cache.source_mask) if cache.source else None
            owner = self.config.source_layer(i)
            held = cache.layers[i] if owner == i else new[owner]
            place, seen = slot % max(cache.slots, 1), visible.whole
            if visible.ring is not None and cache.is_ring(owner):
                assert isinstance(held, LayerCache)
                place, seen = slot % held.slots, visible.ring >= 0
            x, layer_cache = layer.step(x, angles, held, place, seen, bias, source, parts[i])
            if owner == i:
                new.append(layer_cache)
        return self._finish(x)[:, 0], dataclasses.replace(cache, layers=tuple(new))

    def chunk(
        self,
        ids_bt: Int[Array, "_B _W"],
        positions_bt: Int[Array, "_B _W"],
        count_b: Int[Array, " B"],
        cache: Cache,
        behind: Visible,
        slot_b: Int[Array, " B"],
        packing: Packing | None,
    ) -> tuple[Float[Array, "B D"], Layers]:
        """Up to W tokens per row; see `Model.decode_chunk`."""
        angles = self._angles(positions_bt)
        x = self._embed(self._table, ids_bt, positions_bt)
        parts = self._parts(ids_bt, x)
        # How many tokens a row may take of this pass, and which it does.
        width = ids_bt.shape[1] if packing is None else packing.source_bw.shape[1]
        taken_bw = jnp.arange(width)[None] < count_b[:, None]
        new: list[LayerCache | LayerState] = []
        for i, layer in enumerate(self.layers):
            owner = self.config.source_layer(i)
            seen = behind.ring if behind.ring is not None and cache.is_ring(owner) else behind.whole
            given = None if owner == i else new[owner]
            x, keys_values = layer.chunk(
                x, angles, cache.layers[owner], seen, slot_b, taken_bw, packing, part=parts[i], new=given
            )
            if owner == i:
                new.append(keys_values)
        last_b1 = jnp.maximum(count_b - 1, 0)[:, None]
        if packing is None:
            last_b1d = jnp.take_along_axis(x, last_b1[..., None], axis=1)
        else:
            last_b1d = x[jnp.take_along_axis(packing.source_bw, last_b1, axis=1)[:, 0]]
        return self._finish(last_b1d)[:, 0], tuple(new)

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """The output head, float32."""
        if self.head is None:
            kernel, einsum = self._table, "...d,vd->...v"
        else:
            kernel, einsum = self.head.kernel.get_value(), "...d,dv->...v"
        if self.config.head_scale != 1.0:
            hidden = hidden * jnp.asarray(self.config.head_scale, hidden.dtype)
        out = quantise.product(einsum, hidden, kernel, self.config.precision, dtype=jnp.float32)
        if self.head is not None and self.head.delta is not None:
            out = out + self.head.delta(hidden).astype(jnp.float32)
        if self.head is not None and self.head.bias is not None:
            out = out + lax.broadcast_to_rank(self.head.bias[...].astype(jnp.float32), out.ndim)
        if self.config.logit_scale != 1.0:
            out = out * self.config.logit_scale
        out = constrain(out, "batch", *[None] * (out.ndim - 2), "vocab")
        cap = self.config.logit_cap
        return out if cap is None else cap * jnp.tanh(out / cap)

    def scores(self, hidden_btd: Float[Array, "B T D"], mask_bt: Array) -> Float[Array, "B labels"]:
        """An encoder's head, float32."""
        assert self.scorer is not None
        return self.scorer(hidden_btd, mask_bt)


def positions(mask_bt: Array) -> Int[Array, "B T"]:
    """The position of each token: how many tokens stand before it in its row. Padding gets 0 or its neighbour's."""
    return jnp.maximum(jnp.cumsum(mask_bt.astype(jnp.int32), axis=1) - 1, 0)


class Spec(NamedTuple):
    """A linear layer, as adapters and checkpoint tables see it."""

    einsum: str
    shape: tuple[int, ...]  # of the kernel: inputs, then outputs
    axes: tuple[str, ...]  # the logical names of the same axes

    @property
    def inputs(self) -> int:
        """How many leading axes of the kernel are inputs."""
        return kernel_inputs(self.einsum)


class _Declared(NamedTuple):
    """What the modules of a configuration declare."""

    graph: Any  # nnx's
    params: Params  # of `jax.ShapeDtypeStruct`s
    axes: dict[Any, Any]  # of tuples of names
    linears: dict[str, Spec]
    mixture_linears: dict[str, Spec]


class _OneKey:
    """Stands for `nnx.Rngs` where only shapes are wanted: counting draws is most of the time that declaring takes."""

    def params(self) -> Array:
        return jax.random.key(0)


@functools.cache
def _declared(config: ModelConfig) -> _Declared:
    abstract = nnx.eval_shape(lambda: Transformer(config, cast(nnx.Rngs, _OneKey())))
    graph, state = nnx.split(abstract)
    axes = nnx.to_pure_dict(state, extract_fn=lambda param: param.get_metadata()["axes"])
    linears = {
        ".".join(map(str, path)): Spec(module.einsum, module.kernel.shape, module.kernel.get_metadata()["axes"])
        for path, module in nnx.iter_modules(abstract)
        if isinstance(module, Linear)
    }
    mixture_linears = {
        ".".join(map(str, path)): Spec("sd,df->sf", module.kernel.shape[-2:], module.kernel.get_metadata()["axes"][-2:])
        for path, module in nnx.iter_modules(abstract)
        if isinstance(module, Router | ExpertLinear)
    }
    return _Declared(graph, nnx.to_pure_dict(state), axes, linears, mixture_linears)


def abstract_params(config: ModelConfig) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`s: what a checkpoint has to fill."""
    return _copied(_declared(config).params)


def logical_axes(config: ModelConfig) -> dict[Any, Any]:
    """The tree of `abstract_params` with, for every array, a tuple of its axes' names: what a table of sharding rules
    is written for.

    vocab, embed (D, or a narrower embedding), heads, kv_heads, head (entries of one head), mlp, experts, labels;
    norm and head_norm (the scales of norms of activations, and of queries and keys); router and shared_gate
    (scores of a mixture of experts); positions, types, buckets, window (rows of small tables), layers (parts of a
    second embedding), and channels and group (a convolution's). A map from D to D is ("embed", "embed"): where both
    axes of an array would go to one mesh axis, the first of them does, and so it is with ("experts", "embed", "mlp").
    """
    return _copied(_declared(config).axes)


def _copied(tree: dict[Any, Any]) -> dict[Any, Any]:
    """New dictionaries with the same leaves."""
    return {name: _copied(branch) if isinstance(branch, dict) else branch for name, branch in tree.items()}


def linears(config: ModelConfig) -> dict[str, Spec]:
    """Every linear layer by its dotted path, e.g. "layers.0.attention.q"."""
    return _declared(config).linears


def mixture_linears(config: ModelConfig) -> dict[str, Spec]:
    """The linear maps of mixtures of experts that adapters leave alone, by dotted path: "layers.0.ffn.router" and, for
    one of the experts, "layers.0.ffn.experts.up", where the kernels of all are one array, [E, inputs, outputs]."""
    return _declared(config).mixture_linears


def experts_share(config: ModelConfig, rows: int = 1) -> float:
    """How much of its experts a step of so many rows reads in the mean, if they choose at random."""
    experts = config.experts
    return 1.0 if experts is None else 1 - (1 - experts.active / experts.number) ** rows


def active_bytes(config: ModelConfig, sizes: Mapping[str, int] | None = None, rows: int = 1) -> int:
    """Bytes of the parameters that a decoding step reads: all but an encoder and tables of which it looks up a row, and
    of experts those that its rows take (`experts_share`).

    Args:
      sizes: of every parameter by its dotted path, where they are not those of the configuration's dtype: on a device
        of a mesh, or quantised.
    """
    if sizes is None:
        leaves = jax.tree_util.tree_flatten_with_path(abstract_params(config))[0]
        sizes = {".".join(str(key.key) for key in path): leaf.size * leaf.dtype.itemsize for path, leaf in leaves}
    looked_up = {"positions", "token_types", "second.table", "encoder"} | (set() if config.tied_head else {"embedding"})
    share = experts_share(config, rows)
    read = {path: n for path, n in sizes.items() if not {path, path.split(".")[0]} & looked_up}
    return round(sum(n * (share if ".ffn.experts." in path else 1) for path, n in read.items()))


@functools.partial(jit, static_argnums=0)
def init_params(config: ModelConfig, key: Array) -> Params:
    """Fresh random parameters: normal with standard deviation fan_in^-1/2, norms at 1, biases at 0."""
    return nnx.to_pure_dict(nnx.state(Transformer(config, nnx.Rngs(params=key))))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A transformer with its arrays, and the adapters that a batch uses: what runs is a method, traced.

    A pytree whose configuration is static: jit a function that takes one, or `jax.jit(Model.forward)` itself.
    """

    config: ModelConfig = dataclasses.field(metadata={"static": True})
    params: Params
    adapters: Adapters | None = None  # their rows, or blocks of rows, are the batch's

    @classmethod
    def bind(cls, config: ModelConfig, params: Params | Adapted, batch: int) -> "Model":
        """The model that a batch of so many rows runs with, from plain parameters or those with a stack of adapters,
        whose weights are one row for all or a row for each."""
        if not isinstance(params, Adapted):
            return cls(config, params)
        weights = jnp.broadcast_to(params.weights, (batch, params.weights.shape[1]))
        return cls(config, params.base, for_rows(params.stack, weights))

    def _modules(self) -> Transformer:
        """The modules with the arrays in them."""
        declared = _declared(self.config)
        transformer: Transformer = nnx.merge(declared.graph, self.params)
        if self.adapters is not None:
            for path in self.adapters.a:
                layer = _module_at(transformer, path)
                layer.delta = low_rank_delta(self.adapters, path, declared.linears[path].einsum, self.config.precision)
        return transformer

    def forward(
        self,
        ids_bt: Int[Array, "B T"],
        mask_bt: Array,
        *,
        decoder_ids: Int[Array, "R W"] | None = None,
        types_bt: Int[Array, "B T"] | None = None,
        remat: bool = False,
        branches: Branches | None = None,
    ) -> tuple[Float[Array, "_B _T D"], Cache]:
        """Last hidden states [B, T, D] (after the final norm) and every layer's keys and values.

        Args:
          mask_bt: 1 where there is a token, 0 for padding on either side; positions follow the mask.
          decoder_ids: of an encoder-decoder, whose `ids_bt` go to the encoder; the first is the start token. There may
            be several rows per row of `ids_bt`, one after another, which is then encoded once (adapters must be in
            blocks).
          types_bt: segment ids, for encoders that have them.
          remat: for training, compute each layer's activations again instead of keeping them for its gradient. XLA for
            CPUs merges the two computations again, so that nothing is saved there.
          branches: where rows hold several texts.
        """
        transformer = self._modules()
        if self.config.encoder is None:
            return transformer.sequence(ids_bt, mask_bt, types_bt=types_bt, remat=remat, branches=branches)
        assert decoder_ids is not None
        times = len(decoder_ids) // len(ids_bt)
        states = transformer.encode(ids_bt, mask_bt, remat=remat)
        source = jnp.repeat(states, times, axis=0), jnp.repeat(mask_bt.astype(bool), times, axis=0)
        return transformer.sequence(decoder_ids, jnp.ones_like(decoder_ids), source=source, remat=remat)

    def read_prompt(self, ids_bt: Int[Array, "B T"], mask_bt: Array) -> Cache:
        """The cache of whole prompts: T slots, or for an encoder-decoder none but what its encoder read."""
        if self.config.encoder is None:
            return self.forward(ids_bt, mask_bt)[1]
        return self._modules().read_source(ids_bt, mask_bt)

    def decode_step(
        self,
        ids_b: Int[Array, " B"],
        position_b: Int[Array, " B"],
        cache: Cache,
        slot: Int[Array, ""],
        visible: Visible,
    ) -> tuple[Float[Array, "B D"], Cache]:
        """Feeds one token per row: writes `slot` of every layer's cache, attends to what is visible, which includes
        it."""
        return self._modules().step(ids_b, position_b, cache, slot, visible)

    def decode_chunk(
        self,
        ids_bt: Int[Array, "_B _W"],
        positions_bt: Int[Array, "_B _W"],
        count_b: Int[Array, " B"],
        cache: Cache,
        behind: Visible,
        slot_b: Int[Array, " B"],
        packing: Packing | None = None,
    ) -> tuple[Float[Array, "B D"], Layers]:
        """Feeds the first `count_b` of W tokens of every row, which see the slots behind them and each other.

        The cache is only read. Returns the state of each row's last token and the W keys and values of every layer
        [B, G, H, W], for `write_chunk` to put into the slots from `slot_b` on, or its state after `count_b` of them.
        What lies beyond a row's count is filling.

        Args:
          ids_bt, positions_bt: [B, W], or [R, 1] with a packing: then all but attention is done for R tokens, and the
            rows of adapters are theirs.
        """
        return self._modules().chunk(ids_bt, positions_bt, count_b, cache, behind, slot_b, packing)

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """The output head, float32, of any leading axes ([B, T] or [B] where an adapter changes the head)."""
        return self._modules().logits(hidden)

    def scores(self, hidden_btd: Float[Array, "B T D"], mask_bt: Array) -> Float[Array, "B labels"]:
        """Float32 scores of whole texts by the head of an encoder that has one (`config.scorer`), from the state of
        each row's first token."""
        return self._modules().scores(hidden_btd, mask_bt)

    def target_log_probs(
        self, hidden_btd: Float[Array, "B T D"], targets_bt: Int[Array, "B T"], *, alive: int = 2**26
    ) -> Float[Array, "B T"]:
        """log p(targets[b, t] | hidden[b, t]), with at most about `alive` logits in memory at a time.

        Some positions of all rows are taken together; the gradient computes their logits again, so that training needs
        no [B, T, V] array either.
        """
        b, t, d = hidden_btd.shape

        def of_positions(hidden_bcd: Array, targets_bc: Array) -> Array:
            logits = self.logits(hidden_bcd)
            chosen = jnp.take_along_axis(logits, targets_bc[..., None], axis=-1)[..., 0]
            return chosen - jax.nn.logsumexp(logits, axis=-1)

        c = min(max(alive // (b * self.config.vocab), 1), t)
        if c == t:
            return of_positions(hidden_btd, targets_bt)
        groups = -(-t // c)
        pad = groups * c - t
        hidden = jnp.pad(hidden_btd, ((0, 0), (0, pad), (0, 0))).reshape(b, groups, c, d)
        targets = jnp.pad(targets_bt, ((0, 0), (0, pad))).reshape(b, groups, c)
        log_probs = lax.map(
            lambda group: jax.checkpoint(of_positions)(*group),
            (jnp.moveaxis(hidden, 1, 0), jnp.moveaxis(targets, 1, 0)),
        )
        return jnp.moveaxis(log_probs, 0, 1).reshape(b, groups * c)[:, :t]


def _module_at(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = module[int(name)] if name.isdigit() else getattr(module, name)
    return module
