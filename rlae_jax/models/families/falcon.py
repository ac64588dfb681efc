"""Falcon 7B, 40B and 180B (Almazrouei et al., 2023): parallel branches; q, k and v of a key head lie together."""

from typing import Any

from rlae_jax.models.config import ModelConfig
from rlae_jax.models.families.base import Family, Modules, activation, common, one_rope, refuse

_QKV = "transformer.h.{i}.self_attention.query_key_value"
MODULES: dict[str, str | tuple[str, ...]] = {
    "transformer.word_embeddings": "embedding",
    _QKV: tuple(f"layers.{{i}}.attention.{name}" for name in "qkv"),
    "transformer.h.{i}.self_attention.dense": "layers.{i}.attention.o",
    "transformer.h.{i}.mlp.dense_h_to_4h": "layers.{i}.ffn.up",
    "transformer.h.{i}.mlp.dense_4h_to_h": "layers.{i}.ffn.down",
    "transformer.ln_f": "norm",
    "lm_head": "head",
}


def modules(config: ModelConfig) -> Modules:
    """Two norms that are read in parallel have names of their own."""
    two = config.parallel_branches and not config.shared_norm
    names = ("ln_attn", "ln_mlp") if two else ("input_layernorm", "post_attention_layernorm")
    places = ("layers.{i}.attention_norm", "layers.{i}.ffn_norm")
    return MODULES | {f"transformer.h.{{i}}.{name}": place for name, place in zip(names, places, strict=True)}


def read(hf: Any) -> dict[str, Any]:
    """Falcon's configuration."""
    refuse(alibi=hf.alibi)
    heads, newer = hf.num_attention_heads, hf.new_decoder_architecture
    norms = hf.num_ln_in_parallel_attn or (2 if newer else 1)
    return common(
        hf,
        **one_rope(hf),
        kv_heads=(hf.num_kv_heads or heads) if newer or not hf.multi_query else 1,
        head_width=hf.hidden_size // heads,
        ffn_width=hf.ffn_hidden_size or 4 * hf.hidden_size,
        norm="layer",
        norm_eps=hf.layer_norm_epsilon,
        parallel_branches=newer or hf.parallel_attn,
        shared_norm=(newer or hf.parallel_attn) and norms == 1,
        qkv_bias=hf.bias,
        attention_out_bias=hf.bias,
        ffn_bias=hf.bias,
        gated=False,
        activation=activation(hf.activation),
    )


DEFAULTS = {
    "layer_norm_epsilon": 1e-5,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "alibi": False,
    "new_decoder_architecture": False,
    "multi_query": True,
    "parallel_attn": True,
    "num_ln_in_parallel_attn": None,
    "num_kv_heads": None,
    "ffn_hidden_size": None,
    "bias": False,
    "activation": "gelu",
}
FAMILY = Family(
    model_type="falcon",
    architectures=("FalconForCausalLM",),
    defaults=DEFAULTS,
    read=read,
    modules=modules,
    prefix="transformer.",
    fused_by_head=(_QKV,),
)
