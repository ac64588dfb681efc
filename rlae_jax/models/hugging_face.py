"""The shapes of files that others write: config.json and what lies beside it in a model's or an adapter's directory.

    config.json ─Fields─► a value, checked when a family asks for it        other files ─records.check─► what is read

Only keys that are read have a shape: others' files have many more, and new ones. A value of another kind or out of its
range is an `InputError` that names file and key; what the keys mean together is checked by who reads them. Ranges are
far beyond any model, and keep what is counted or allocated from them possible.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypedDict, get_type_hints

import msgspec
import regex
from msgspec import Meta

from rlae_jax import records
from rlae_jax.errors import InputError

MOST_LAYERS = 512
Width = Annotated[int, Meta(ge=1, le=1 << 20)]  # of states, heads and blocks
Rows = Annotated[int, Meta(ge=1, le=1 << 24)]  # of a table, an entry per token
Heads = Annotated[int, Meta(ge=1, le=1 << 16)]
Experts = Annotated[int, Meta(ge=0, le=1 << 16)]
Layers = Annotated[int, Meta(ge=1, le=MOST_LAYERS)]
Layer = Annotated[int, Meta(ge=0, lt=MOST_LAYERS)]  # one of them, or a number of some of them
Positions = Annotated[int, Meta(ge=1, lt=1 << 31)]  # which are int32 in programs
Window = Annotated[int, Meta(ge=0, lt=1 << 31)] | None  # 0 and null: none
Period = Annotated[int, Meta(ge=1, lt=1 << 31)]
Taps = Annotated[int, Meta(ge=1, le=1024)]
Number = Annotated[float, Meta(ge=-1e30, le=1e30)]  # finite, by its bounds
Positive = Annotated[float, Meta(gt=0, le=1e30)]
Epsilon = Annotated[float, Meta(gt=0, le=1)]
Share = Annotated[float, Meta(ge=0, le=1)]
Switch = bool | None  # null is off
TokenId = Annotated[int, Meta(ge=-1, lt=1 << 31)]  # -1, of the first Llamas: none
Bits = Annotated[int, Meta(ge=1, le=16)]
GroupSize = Annotated[int, Meta(ge=-1, le=1 << 20)]
TokenIds = TokenId | list[TokenId] | None
Kind = Literal[
    "full_attention", "sliding_attention", "chunked_attention", "linear_attention", "conv", "attention", "mamba"
]


class Rope(TypedDict, total=False):
    """`rope_scaling` or `rope_parameters`, and the settings of one kind of layers among the latter."""

    rope_type: str | None
    type: str | None
    rope_theta: Positive
    partial_rotary_factor: Share | None
    factor: Positive | None
    original_max_position_embeddings: Positions | None
    low_freq_factor: Positive | None
    high_freq_factor: Positive | None
    beta_fast: Positive | None
    beta_slow: Positive | None
    attention_factor: Positive | None
    mscale: Number | None
    mscale_all_dim: Number | None
    truncate: Switch
    short_factor: list[Positive]
    long_factor: list[Positive]
    alpha: Positive | None
    llama_4_scaling_beta: Number


class Ropes(Rope, total=False):
    """`rope_parameters` of one kind, or of several kinds of layers."""

    full_attention: Rope | None
    sliding_attention: Rope | None


class OfLayer(TypedDict, total=False):
    """What Gemma 4 says of one layer."""

    head_dim: Width
    num_key_value_heads: Heads


class Identity(TypedDict, total=False):
    """Of config.json what tells which model it is."""

    architectures: list[str] | None
    model_type: str | None
    text_config: dict[str, Any] | None


class Generation(TypedDict, total=False):
    """generation_config.json; config.json has the same keys."""

    bos_token_id: TokenId | None
    eos_token_id: TokenIds
    pad_token_id: TokenId | None


class Config(Generation, total=False):
    """config.json: every key that some family reads."""

    architectures: list[str] | None
    # Sizes.
    vocab_size: Rows
    hidden_size: Width
    n_embd: Width
    d_model: Width
    num_hidden_layers: Layers
    n_layer: Layers
    num_layers: Layers
    num_decoder_layers: Layers | None
    num_attention_heads: Heads
    n_head: Heads
    num_heads: Heads
    num_key_value_heads: Heads | None
    num_kv_heads: Heads | None
    multi_query: Switch
    head_dim: Width | None
    d_kv: Width
    attention_head_size: Width
    intermediate_size: Width
    intermediate_size_mlp: Width
    ffn_hidden_size: Width | None
    ffn_dim: Width
    d_ff: Width
    n_inner: Width | None
    shared_intermediate_size: Width
    block_ff_dim: Width | None
    block_auto_adjust_ff_dim: Switch
    block_ffn_dim_multiplier: Annotated[float, Meta(gt=0, le=64)] | None
    block_multiple_of: Width
    embedding_size: Width
    word_embed_proj_dim: Width | None
    type_vocab_size: Annotated[int, Meta(ge=0, le=1 << 24)]
    max_position_embeddings: Positions
    n_positions: Positions
    hidden_size_per_layer_input: Annotated[int, Meta(ge=0, le=1 << 20)] | None
    vocab_size_per_layer_input: Rows
    # Norms, biases, activations.
    rms_norm_eps: Epsilon
    norm_eps: Epsilon
    norm_epsilon: Epsilon
    layer_norm_eps: Epsilon
    layer_norm_epsilon: Epsilon
    layer_norm_elementwise_affine: Switch
    do_layer_norm_before: Switch
    _remove_final_layer_norm: Switch
    hidden_act: str | None
    hidden_activation: str | None
    activation_function: str
    activation: str
    feed_forward_proj: str
    attention_bias: Switch
    attention_out_bias: Switch
    mlp_bias: Switch
    qkv_bias: Switch
    use_bias: Switch
    use_qkv_bias: Switch
    enable_bias: Switch
    bias: Switch
    # Positions.
    rope_theta: Positive
    rope_local_base_freq: Positive
    rotary_emb_base: Positive
    rotary_pct: Share
    rotary_dim: Width
    partial_rotary_factor: Share | None
    rope_scaling: Ropes | None
    rope_parameters: Ropes | None
    original_max_position_embeddings: Positions | None
    position_embedding_type: str | None
    alibi: Switch
    no_rope_layers: list[Annotated[int, Meta(ge=0, le=1)]] | None
    no_rope_layer_interval: Period
    relative_attention_num_buckets: Annotated[int, Meta(ge=4, le=1 << 16)]
    relative_attention_max_distance: Positions
    # Attention.
    layer_types: list[Kind] | None
    sliding_window: Window
    sliding_window_pattern: Window | str  # "LLLG" is spelt out
    use_sliding_window: Switch
    max_window_layers: Annotated[int, Meta(ge=0, lt=1 << 31)]
    window_size: Positions
    attention_chunk_size: Positions | None
    attention_types: list[tuple[list[Literal["global", "local"]], Layer]]
    attention_k_eq_v: Switch
    global_head_dim: Width
    num_global_key_value_heads: Heads | None
    per_layer_config: dict[str, OfLayer] | None
    num_kv_shared_layers: Layer
    use_double_wide_mlp: Switch
    use_bidirectional_attention: bool | str | None
    qk_layernorm: Switch
    use_qk_norm: Switch
    clip_qkv: Positive | None
    query_pre_attn_scalar: Positive
    attn_logit_softcapping: Positive | None
    scale_attn_weights: Switch
    scale_attn_by_inverse_layer_idx: Switch
    attn_temperature_tuning: bool | int | None  # the first releases say how much
    attn_scale: Number
    floor_scale: Annotated[float, Meta(ge=1, lt=1 << 31)]
    add_cross_attention: Switch
    is_decoder: Switch
    parallel_attn: Switch
    use_parallel_residual: Switch
    new_decoder_architecture: Switch
    num_ln_in_parallel_attn: Annotated[int, Meta(ge=1, le=2)] | None
    # Layers with a state.
    full_attn_idxs: list[Layer] | None
    full_attention_interval: Period
    conv_L_cache: Taps
    conv_bias: Switch
    linear_conv_kernel_dim: Taps
    linear_num_key_heads: Heads
    linear_num_value_heads: Heads
    linear_key_head_dim: Width
    linear_value_head_dim: Width
    # Experts.
    num_experts: Experts | None
    num_local_experts: Experts | None
    n_routed_experts: Experts | None
    num_experts_per_tok: Experts
    moe_intermediate_size: Width
    shared_expert_intermediate_size: Width
    n_shared_experts: Annotated[int, Meta(ge=0, le=1024)]
    n_group: Experts | None
    norm_topk_prob: Switch
    routed_scaling_factor: Positive
    use_expert_bias: Switch
    enable_moe_block: Switch
    moe_layers: list[Layer] | None
    interleave_moe_layer_step: Period
    decoder_sparse_step: Period
    mlp_only_layers: list[Layer] | None
    first_k_dense_replace: Layer
    num_dense_layers: Layer
    swiglu_alpha: Number
    swiglu_limit: Positive
    # Scales, the head and what ends a text.
    embedding_multiplier: Number
    attention_multiplier: Number
    residual_multiplier: Number
    logits_scaling: Positive
    logit_scale: Number
    final_logit_softcapping: Positive | None
    tie_word_embeddings: Switch
    tie_embedding: Switch
    scale_decoder_outputs: Switch
    decoder_start_token_id: TokenId | None
    # Encoders.
    id2label: dict[Annotated[str, Meta(pattern=r"^\d{1,5}$")], Any] | None
    num_labels: Annotated[int, Meta(ge=0, le=1 << 16)] | None
    pooler_hidden_size: Width | None
    pooler_hidden_act: str
    relative_attention: Switch
    max_relative_positions: Annotated[int, Meta(ge=-1, le=1 << 20)]
    position_buckets: Annotated[int, Meta(ge=-1, le=1 << 20)]
    position_biased_input: Switch
    pos_att_type: str | list[str] | None
    share_att_key: Switch
    norm_rel_ebd: str
    conv_kernel_size: Annotated[int, Meta(ge=0, le=1024)]
    conv_groups: Width
    conv_act: str


class Adapter(TypedDict, total=False):
    """adapter_config.json of PEFT. Settings that are refused when they are set at all are looked at as they are."""

    peft_type: str | None
    base_model_name_or_path: str | None
    r: Width
    lora_alpha: Number
    lora_dropout: Annotated[float, Meta(ge=0, lt=1)] | None
    use_rslora: Switch
    bias: str | None
    init_lora_weights: bool | str | None
    rank_pattern: dict[str, Width] | None
    alpha_pattern: dict[str, Number] | None


class Index(TypedDict):
    """model.safetensors.index.json."""

    weight_map: dict[str, str]


class Numbers(TypedDict, total=False):
    """The weights of a group of layers, of compressed-tensors."""

    type: str | None
    num_bits: Bits | None
    strategy: str | None
    group_size: GroupSize | None
    block_structure: str | list[Width] | None


class Group(TypedDict, total=False):
    """A group of layers, of compressed-tensors."""

    targets: list[str] | None
    format: str | None
    weights: Numbers | None


class Form(TypedDict, total=False):
    """A part of the settings of a quantisation that has but a form."""

    format: str | None
    quant_algo: str | None
    config_groups: Any


class Method(TypedDict, total=False):
    """Of the settings of a quantisation whose they are."""

    quant_method: str | None


class Quantised(Method, total=False):
    """`quantization_config`, or the file beside config.json that older checkpoints have."""

    format: str | None
    checkpoint_format: str | None
    version: str | None
    bits: Bits | None
    w_bit: Bits | None
    group_size: GroupSize | None
    q_group_size: GroupSize | None
    sym: Switch
    zero_point: Switch
    is_marlin_format: Switch
    dynamic: dict[str, dict[str, Any]] | None
    weight_block_size: str | list[Width] | None
    config_groups: dict[str, Group] | None
    sparsity_config: Form | None
    transform_config: Form | None
    quantization: Form | None
    quant_algo: str | None


class Token(TypedDict, total=False):
    """A special token with its settings."""

    content: str
    lstrip: bool
    rstrip: bool
    single_word: bool
    normalized: bool
    special: bool


SpecialToken = str | Token | None


class SpecialTokens(TypedDict, total=False):
    """special_tokens_map.json."""

    bos_token: SpecialToken
    eos_token: SpecialToken
    unk_token: SpecialToken
    sep_token: SpecialToken
    pad_token: SpecialToken
    cls_token: SpecialToken
    mask_token: SpecialToken
    additional_special_tokens: list[str | Token] | None


class Template(TypedDict):
    """One of several chat templates."""

    name: str
    template: str


class ChatTemplate(TypedDict, total=False):
    """chat_template.json."""

    chat_template: str | list[Template] | dict[str, str] | None


class Tokenizer(SpecialTokens, ChatTemplate, total=False):
    """tokenizer_config.json."""

    tokenizer_class: str | None
    added_tokens_decoder: dict[Annotated[str, Meta(pattern=r"^\d{1,9}$")], Token] | None
    model_max_length: float | None
    padding_side: Literal["left", "right"] | None
    truncation_side: Literal["left", "right"] | None
    fast_tokenizer_files: list[str]
    model_input_names: list[str] | None
    clean_up_tokenization_spaces: Switch
    add_prefix_space: Switch
    add_bos_token: Switch
    add_eos_token: Switch


class AddedToken(Token, total=False):
    """A token of tokenizer.json beside its model's."""

    id: Annotated[int, Meta(ge=0, lt=1 << 31)]


class TokenizerModel(TypedDict, total=False):
    """The model of tokenizer.json."""

    type: str | None
    unk_token: str | None
    unk_id: int | None
    vocab: dict[str, Annotated[int, Meta(ge=0, lt=1 << 31)]] | list[tuple[str, Number]]
    merges: list[str | list[str]]


class TokenizerFile(TypedDict, total=False):
    """tokenizer.json, of which the tokenizers library reads more."""

    version: str | None
    added_tokens: list[AddedToken]
    model: TokenizerModel


# What is checked beside config.json before a tokenizer is made of it.
TOKENIZER_FILES: Mapping[str, Any] = {
    "tokenizer_config.json": Tokenizer,
    "special_tokens_map.json": SpecialTokens,
    "added_tokens.json": dict[str, Annotated[int, Meta(ge=0, lt=1 << 31)]],
    "chat_template.json": ChatTemplate,
}

_LENGTH_OF = {"layer_types": "num_hidden_layers", "no_rope_layers": "num_hidden_layers"}
_SHAPES: Mapping[str, Any] = {
    name: msgspec.defstruct("Key", [("value", shape, msgspec.field(name=name))])
    for name, shape in get_type_hints(Config, include_extras=True).items()
}


class Fields:
    """The fields of config.json as attributes, each checked when it is asked for; one that is not there is what the
    family says it is, or else an `AttributeError`.

    Args:
      given: the file's fields.
      defaults: what it may leave out.
      own: fields that are ours.

    Messages begin with the field; who reads adds the file.
    """

    def __init__(self, given: Mapping[str, Any], defaults: Mapping[str, Any], **own: Any) -> None:
        self.__dict__.update(own)
        self._given, self._defaults = given, defaults

    def __getattr__(self, name: str) -> Any:
        """The checked field, in the kind in which the file has it: 1 stays 1 where a float is wanted.

        Raises:
          InputError: another kind or out of its range.
          AttributeError: there is none.
        """
        if name not in self._given:
            if name in self._defaults:
                return self._defaults[name]
            raise AttributeError(f"there is no {name}", name=name, obj=self)
        value = self._given[name]
        if value is None and self._defaults.get(name, False) is None:
            return None
        records.check({name: value}, _SHAPES[name], "")
        wanted = _LENGTH_OF.get(name)
        if wanted is not None and value and len(value) != getattr(self, wanted):
            raise InputError(f"{name} has {len(value)} entries for {getattr(self, wanted)} layers")
        return value

    def optional(self, name: str) -> Any:
        """The same of a field that only some families can do without: None where it is missing or null."""
        return None if self._given.get(name) is None else getattr(self, name)


def matches(pattern: str, text: str, where: object) -> bool:
    """Whether a regular expression of a file matches the beginning of a text.

    Raises:
      InputError: it is none, or takes for ever.
    """
    try:
        return regex.match(pattern, text, timeout=1.0) is not None
    except (regex.error, RecursionError, MemoryError, OverflowError) as error:
        raise InputError(f"{where}: {pattern[:80]!r} is no regular expression ({error})") from None
    except TimeoutError:
        raise InputError(f"{where}: the regular expression {pattern[:80]!r} takes for ever on {text!r}") from None
