"""Phi 1, 1.5 and 2 (Li et al., 2023): parallel branches that read one norm, partial rotary positions, biases."""

from typing import Any

from rlae_jax.models.families.base import Family, activation, common, one_rope, refuse

MODULES = {
    "model.embed_tokens": "embedding",
    "model.layers.{i}.input_layernorm": "layers.{i}.attention_norm",
    **{f"model.layers.{{i}}.self_attn.{name}_proj": f"layers.{{i}}.attention.{name}" for name in "qkv"},
    "model.layers.{i}.self_attn.dense": "layers.{i}.attention.o",
    "model.layers.{i}.self_attn.q_layernorm": "layers.{i}.attention.q_norm",
    "model.layers.{i}.self_attn.k_layernorm": "layers.{i}.attention.k_norm",
    "model.layers.{i}.mlp.fc1": "layers.{i}.ffn.up",
    "model.layers.{i}.mlp.fc2": "layers.{i}.ffn.down",
    "model.final_layernorm": "norm",
    "lm_head": "head",
}


def read(hf: Any) -> dict[str, Any]:
    """Phi's configuration."""
    refuse(tie_word_embeddings=hf.tie_word_embeddings)  # the head has a bias
    return common(
        hf,
        **one_rope(hf, partial=True),
        ffn_width=hf.intermediate_size,
        norm="layer",
        norm_eps=hf.layer_norm_eps,
        parallel_branches=True,
        shared_norm=True,
        query_key_norm="head" if hf.qk_layernorm else None,
        qkv_bias=True,
        attention_out_bias=True,
        ffn_bias=True,
        head_bias=True,
        gated=False,
        activation=activation(hf.hidden_act),
    )


DEFAULTS = {
    "hidden_act": "gelu_new",
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "partial_rotary_factor": 0.5,
    "qk_layernorm": False,
}
FAMILY = Family(model_type="phi", architectures=("PhiForCausalLM",), defaults=DEFAULTS, read=read, modules=MODULES)
