"""Gemma 2 (Gemma Team, 2024): norms on both sides of every branch, soft caps, alternating windows."""

from typing import Any

from rlae_jax.models.families.base import LOCAL, Family, gated_rms, one_rope, refuse, windows
from rlae_jax.models.families.llama import MODULES as LLAMA_MODULES

MODULES = LLAMA_MODULES | {
    "model.layers.{i}.post_attention_layernorm": "layers.{i}.attention_branch_norm",
    "model.layers.{i}.pre_feedforward_layernorm": "layers.{i}.ffn_norm",
    "model.layers.{i}.post_feedforward_layernorm": "layers.{i}.ffn_branch_norm",
}


DEFAULTS = {
    "hidden_activation": "gelu_pytorch_tanh",
    "num_key_value_heads": 4,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "use_bidirectional_attention": False,
}


def gemma(hf: Any, layer_types: list[str], **fields: Any) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common."""
    refuse(use_bidirectional_attention=hf.use_bidirectional_attention)
    return gated_rms(
        hf,
        **windows(hf, layer_types),
        norm_places=("before", "branch"),
        norm_offset=1.0,
        activation=hf.hidden_activation,
        attention_scale=hf.query_pre_attn_scalar**-0.5,
        attention_cap=hf.attn_logit_softcapping,
        logit_cap=hf.final_logit_softcapping,
        embedding_scale=hf.hidden_size**0.5,
        qkv_bias=hf.attention_bias,
        attention_out_bias=hf.attention_bias,
        **fields,
    )


def read(hf: Any) -> dict[str, Any]:
    """Gemma 2's configuration."""
    alternating = [LOCAL if i % 2 == 0 else "full_attention" for i in range(hf.num_hidden_layers)]
    return gemma(hf, getattr(hf, "layer_types", None) or alternating, **one_rope(hf))


FAMILY = Family(
    model_type="gemma2", architectures=("Gemma2ForCausalLM",), defaults=DEFAULTS, read=read, modules=MODULES
)
