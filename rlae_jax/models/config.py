"""What a language model is made of, as one frozen (hashable) record: the static half of every model.

The other half, its arrays, is a plain nested dictionary (see `transformer.py`). Two models with equal configurations
share every compiled program. What differs between families of models is data in these records, read from a checkpoint's
own configuration by `families/`.
"""

import dataclasses
from typing import Any, Literal

HeadKind = Literal["classifier", "next_sentence"]


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions (Su et al., 2021). What turns by how much is worked out in `rope.py`."""

    base: float = 10_000.0
    fraction: float = 1.0  # of a head's entries that turn, from the first on
    # "linear", "dynamic", "llama3", "yarn", "longrope" or "proportional" with its numbers, as (name, value) pairs.
    kind: str = "default"
    numbers: tuple[tuple[str, Any], ...] = ()
    interleaved: bool = False  # pairs are neighbours (x_2i, x_2i+1), not (x_i, x_i+half)


@dataclasses.dataclass(frozen=True)
class QueryGrowth:
    """Queries at position p are multiplied by 1 + rate * log(1 + floor((p + offset) / step)), so that attention stays
    sharp over long texts (Llama 4's published code)."""

    rate: float
    step: int
    offset: int = 0
    unrotated: bool = False  # in layers without rotary positions alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wide:
    """How the attention of layers without a window differs from that of the others (Gemma 4)."""

    head_width: int
    kv_heads: int
    keys_are_values: bool  # one projection gives both


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerInputs:
    """A second embedding, of which every layer has a part of its own (Gemma 3n and 4).

    With e the embedding that enters the first layer and p = (norm(project(e) / sqrt(D)) + sqrt(W) * table[id]) /
    sqrt(2), a layer's output x becomes x + norm(out(act(gate(x)) * p_layer)).
    """

    rows: int  # of the table
    width: int  # W, of one layer's part


@dataclasses.dataclass(frozen=True)
class RelativeBias:
    """T5's learned scores per head and bucket of distances (Raffel et al., 2020, section 2.1)."""

    buckets: int
    max_distance: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Disentangled:
    """DeBERTa's attention to content and to relative positions (He et al., 2021; v3: He et al., 2023)."""

    span: int  # relative positions, or their buckets, are clipped to -span..span - 1
    buckets: int = 0  # positions beyond buckets / 2 share logarithmic buckets; 0: every position has its own
    max_position: int = 0  # the distance of the last bucket
    content_to_position: bool = True
    position_to_content: bool = True
    shared_projections: bool = True  # positions use the content's query and key matrices
    norm_embeddings: bool = True  # a layer norm over the relative positions' embeddings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convolution:
    """What runs beside the first layer of DeBERTa v2's larger models: x1 becomes norm(x1 + act(conv(x0)))."""

    width: int  # tokens, an odd number
    activation: str = "tanh"
    groups: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """Feed-forward blocks of which a token takes a few (Shazeer et al., 2017). What they compute: `experts.py`."""

    number: int  # E, of a layer
    active: int  # of them, that a token takes
    width: int  # of one expert's feed-forward block
    layers: tuple[int, ...]  # that have experts; the others have one dense block
    # The weights of a token's experts are probabilities among those that it takes (they sum to 1), or among all.
    normalised: bool = True
    # The weights come from sigmoids of the scores, and a learned correction joins these where experts are chosen, and
    # nowhere else (DeepSeek-AI, 2024).
    sigmoid: bool = False
    # Sigmoids of the scores multiply what an expert reads; what the experts of a token give is summed (Llama 4's
    # published code).
    scaled_inputs: bool = False
    scale: float = 1.0  # of the weights
    router_bias: bool = False
    bias: bool = False  # of the experts' own linear maps
    shared_width: int = 0  # of a block beside them that every token takes
    shared_gate: bool = False  # that block's output is multiplied by sigmoid(gate(x))
    # gpt-oss: (alpha, limit) of (up + 1) * gate * sigmoid(alpha * gate), both clamped, instead of act(gate) * up.
    clamped: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShortConvolution:
    """Layers that mix every token with the few before it, in the place of attention. What they compute:
    `recurrent.GatedShortConvolution`."""

    layers: tuple[int, ...]
    taps: int  # J: tokens, its own included
    bias: bool = False  # of its linear maps and of the convolution


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedDelta:
    """Layers of linear attention, in the place of attention. What they compute: `recurrent.GatedDeltaNet`."""

    layers: tuple[int, ...]
    taps: int  # J: tokens of the convolution over queries, keys and values
    key_heads: int
    heads: int  # of values, a multiple
    key_width: int
    value_width: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextHead:
    """An encoder's head, which scores a whole text: out(act(dense(h))) of its first token's state h."""

    kind: HeadKind  # what the checkpoint's names tell apart, and nothing else
    labels: tuple[str, ...]
    activation: str = "tanh"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A transformer. The letters are the axis names used in shapes and einsum strings.

    The defaults are Llama's. A model with an `encoder` is an encoder-decoder, and these are its decoder's sizes.
    """

    vocab: int  # V: rows of the output head
    width: int  # D
    layers: int
    heads: int  # N: query heads
    kv_heads: int  # G: key/value heads, a divisor of N
    head_width: int  # H
    ffn_width: int  # F

    # Norms: where they stand around a branch (attention or feed-forward) and its sum with the residual stream,
    # "before" f(norm(x)), "branch" norm(f(x)), "sum" norm(x + f(x)).
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    norm_places: tuple[Literal["before", "branch", "sum"], ...] = ("before",)
    norm_offset: float = 0.0  # added to the stored scale (Gemma stores scale - 1)
    norm_affine: bool = True
    norm_bias: bool = True  # of layer norms
    final_norm: bool = True
    # Over each head's entries, the same with a scale for every head ("heads"), or over all heads' entries at once; or
    # over each head's, without a scale, in layers that are rotated ("unit").
    query_key_norm: Literal["head", "heads", "all", "unit"] | None = None
    norm_rotated: bool = False  # queries and keys are normalised after they are rotated
    value_norm: bool = False  # RMS over each head's entries, without a scale
    parallel_branches: bool = False  # x + attention(norm(x)) + ffn(norm(x))
    shared_norm: bool = False  # parallel branches read one norm, attention's
    branch_scale: float = 1.0  # of what a branch adds to the residual stream

    # Positions: any of rotary, learned and relative.
    rope: Rope | None = Rope()
    unrotated_layers: tuple[int, ...] = ()  # these know no positions
    query_growth: QueryGrowth | None = None
    learned_positions: int = 0  # rows of the table
    position_offset: int = 0  # row of the first position (OPT, RoBERTa)
    relative_bias: RelativeBias | None = None
    disentangled: Disentangled | None = None
    convolution: Convolution | None = None

    # Attention.
    causal: bool = True
    attention_scale: float | None = None  # None: H^-1/2
    scale_by_depth: bool = False  # divide it by the layer's number, from 1
    attention_cap: float | None = None  # scores s become cap * tanh(s / cap)
    qkv_clip: float | None = None  # queries, keys and values are cut to -clip..clip
    qkv_bias: bool = False
    attention_out_bias: bool = False
    attention_gate: bool = False  # what attention gives is multiplied, entry by entry, by sigmoid(gate(x))
    local_layers: tuple[int, ...] = ()  # these attend to the last `window` tokens only, their own included
    window: int = 0
    chunked: bool = False  # or to the tokens of their own chunk, of which each is `window` positions, from 0 on
    attention_sinks: bool = False  # a learned score per head joins each softmax and takes its share to nowhere
    local_rope: Rope | None = None  # of the local layers; None: the same as everywhere
    wide: Wide | None = None  # of the layers without a window; None: as the local ones
    recurrent: ShortConvolution | GatedDelta | None = None  # layers without attention, which have a state
    # The last so many layers have no keys and values, but read those of the last layer of their kind before them (with
    # a window or without).
    reading_layers: int = 0

    # Feed-forward.
    activation: str = "silu"
    gated: bool = True  # down(act(gate(x)) * up(x)), or down(act(up(x)))
    ffn_bias: bool = False
    reading_ffn_width: int | None = None  # of the layers that read others' keys and values; None: F

    layer_inputs: LayerInputs | None = None
    layer_scale: bool = False  # each layer's output is multiplied by a number of its own
    experts: Experts | None = None

    # Embedding and head.
    embedding_width: int | None = None  # None: D; else projected to D, and back before the head
    embedding_scale: float = 1.0
    narrow_positions: bool = False  # learned positions and token types are of that width too, and projected with it
    embedding_norm: bool = False
    token_types: int = 0  # rows of the segment table (BERT)
    tied_head: bool = False  # the output head reads the embedding table
    has_head: bool = True  # False for encoders
    head_bias: bool = False
    head_scale: float = 1.0  # of the hidden states before the head (T5)
    logit_scale: float = 1.0
    logit_cap: float | None = None  # as `attention_cap`, of the scaled logits
    scorer: TextHead | None = None

    encoder: "ModelConfig | None" = None
    start_id: int | None = None  # an encoder-decoder's decoder starts from it

    # Of the text.
    context: int = 2048  # positions the model was made for
    tokens: int | None = None  # ids that the tokenizer has; head rows beyond never win. None: all
    bos_id: int | None = None
    pad_id: int | None = None
    end_ids: tuple[int, ...] = ()  # any of these ends a text

    dtype: str = "float32"  # of parameters and activations; norms, rotary angles and softmax are float32 always
    kv_dtype: Literal["int8", "fp8"] | None = None  # of keys and values in the cache; None: `dtype`
    # TPUs (and TF32 GPUs) round float32 operands of a product unless told otherwise. Without effect on bfloat16.
    precision: str | None = "highest"

    @property
    def hidden_width(self) -> int:
        """The width of what the output head reads, or of an encoder's states."""
        return self.width if self.embedding_width is None or not self.has_head else self.embedding_width

    def of_layer(self, i: int) -> "ModelConfig":
        """The configuration as one layer sees it, with that layer's own widths."""
        changes: dict[str, Any] = {}
        if self.wide is not None and i not in self.local_layers:
            changes |= {"head_width": self.wide.head_width, "kv_heads": self.wide.kv_heads}
        if self.reading_ffn_width is not None and i >= self.layers - self.reading_layers:
            changes |= {"ffn_width": self.reading_ffn_width}
        return dataclasses.replace(self, **changes) if changes else self

    def source_layer(self, i: int) -> int:
        """The layer whose keys and values a layer reads: its own, or those of the last of its kind that has some."""
        own = range(self.layers - self.reading_layers)
        if i in own:
            return i
        local = set(self.local_layers)
        return max(j for j in own if (j in local) == (i in local))

    @property
    def recurrent_layers(self) -> tuple[int, ...]:
        """Those that have a state instead of keys and values."""
        return () if self.recurrent is None else self.recurrent.layers

    @property
    def takes_branches(self) -> bool:
        """Whether several texts may stand in one row (`transformer.Branches`): what a token makes of the others follows
        from their positions, not from their places."""
        return not (
            self.recurrent_layers or self.relative_bias or self.disentangled or self.convolution or self.encoder
        )

    @property
    def usable_vocab(self) -> int:
        """The ids that may be chosen: those that the head and the tokenizer both have."""
        return self.vocab if self.tokens is None else min(self.vocab, self.tokens)
