"""LFM2 (Liquid AI, 2025): short convolutions, with attention in some layers."""

from typing import Any

from rlae_jax.models.config import ShortConvolution
from rlae_jax.models.families.base import Family, common, layers_of, one_rope


def feed_forward_width(hf: Any) -> int:
    """Two thirds of what is named, a multiple of it, and that rounded up."""
    width = int(getattr(hf, "block_ff_dim", None) or hf.intermediate_size)
    if not hf.block_auto_adjust_ff_dim:
        return width
    width = int(2 * width / 3)
    if hf.block_ffn_dim_multiplier is None:
        return width
    multiple = int(hf.block_multiple_of)
    return -(-int(hf.block_ffn_dim_multiplier * width) // multiple) * multiple


def convolutions(hf: Any) -> ShortConvolution | None:
    """The layers without attention, by their types or by the numbers of the others."""
    layers = range(hf.num_hidden_layers)
    named = getattr(hf, "full_attn_idxs", None)
    attending = layers if named is None else named
    kinds = hf.layer_types or ["full_attention" if i in attending else "conv" for i in layers]
    found = layers_of(hf, "conv", kinds)
    return ShortConvolution(layers=found, taps=hf.conv_L_cache, bias=hf.conv_bias) if found else None


def read(hf: Any) -> dict[str, Any]:
    """LFM2's configuration."""
    return common(
        hf,
        **one_rope(hf),
        ffn_width=feed_forward_width(hf),
        norm_eps=hf.norm_eps,
        query_key_norm="head",
        recurrent=convolutions(hf),
        tied_head=bool(getattr(hf, "tie_embedding", hf.tie_word_embeddings)),
    )


DEFAULTS = {
    "num_key_value_heads": 8,
    "norm_eps": 1e-5,
    "max_position_embeddings": 128_000,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
    "conv_bias": False,
    "conv_L_cache": 3,
    "block_multiple_of": 256,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": True,
    "layer_types": None,
}
MODULES: dict[str, str | tuple[str, ...]] = {
    "model.embed_tokens": "embedding",
    "model.layers.{i}.operator_norm": "layers.{i}.attention_norm",
    "model.layers.{i}.self_attn.q_proj": "layers.{i}.attention.q",
    "model.layers.{i}.self_attn.k_proj": "layers.{i}.attention.k",
    "model.layers.{i}.self_attn.v_proj": "layers.{i}.attention.v",
    "model.layers.{i}.self_attn.out_proj": "layers.{i}.attention.o",
    "model.layers.{i}.self_attn.q_layernorm": "layers.{i}.attention.q_norm",
    "model.layers.{i}.self_attn.k_layernorm": "layers.{i}.attention.k_norm",
    "model.layers.{i}.conv.in_proj": tuple(f"layers.{{i}}.recurrence.{part}" for part in "bcx"),
    "model.layers.{i}.conv.conv": "layers.{i}.recurrence.convolution",
    "model.layers.{i}.conv.out_proj": "layers.{i}.recurrence.o",
    "model.layers.{i}.ffn_norm": "layers.{i}.ffn_norm",
    "model.layers.{i}.feed_forward.w1": "layers.{i}.ffn.gate",
    "model.layers.{i}.feed_forward.w3": "layers.{i}.ffn.up",
    "model.layers.{i}.feed_forward.w2": "layers.{i}.ffn.down",
    "model.embedding_norm": "norm",
    "lm_head": "head",
}
FAMILY = Family(model_type="lfm2", architectures=("Lfm2ForCausalLM",), defaults=DEFAULTS, read=read, modules=MODULES)
