"""Llama 1, 2 and 3 (Touvron et al., 2023; Grattafiori et al., 2024), and the many models that share its layout."""

from typing import Any

from rlae_jax.models.config import ModelConfig
from rlae_jax.models.families.base import Family, gated_rms, one_rope


def read(hf: Any) -> dict[str, Any]:
    """Llama's configuration."""
    biases = {"qkv_bias": hf.attention_bias, "attention_out_bias": hf.attention_bias, "ffn_bias": hf.mlp_bias}
    return gated_rms(hf, **one_rope(hf), **biases)


def write(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a model that was made here, in Llama's terms."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.ffn_width,
        "hidden_act": config.activation,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.ffn_bias,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope.base if config.rope else None},
        "tie_word_embeddings": config.tied_head,
        "max_position_embeddings": config.context,
    }


DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
MODULES = {
    "model.embed_tokens": "embedding",
    "model.layers.{i}.input_layernorm": "layers.{i}.attention_norm",
    "model.layers.{i}.self_attn.q_proj": "layers.{i}.attention.q",
    "model.layers.{i}.self_attn.k_proj": "layers.{i}.attention.k",
    "model.layers.{i}.self_attn.v_proj": "layers.{i}.attention.v",
    "model.layers.{i}.self_attn.o_proj": "layers.{i}.attention.o",
    "model.layers.{i}.post_attention_layernorm": "layers.{i}.ffn_norm",
    "model.layers.{i}.mlp.gate_proj": "layers.{i}.ffn.gate",
    "model.layers.{i}.mlp.up_proj": "layers.{i}.ffn.up",
    "model.layers.{i}.mlp.down_proj": "layers.{i}.ffn.down",
    "model.norm": "norm",
    "lm_head": "head",
}

FAMILY = Family(
    model_type="llama",
    architectures=("LlamaForCausalLM",),
    defaults=DEFAULTS,
    read=read,
    modules=MODULES,
    write=write,
)
