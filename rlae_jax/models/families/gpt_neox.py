"""GPT-NeoX and Pythia (Black et al., 2022; Biderman et al., 2023): parallel branches, partial rotary positions."""

from typing import Any

from rlae_jax.models.families.base import Family, Modules, activation, common, one_rope

MODULES: Modules = {
    "gpt_neox.embed_in": "embedding",
    "gpt_neox.layers.{i}.input_layernorm": "layers.{i}.attention_norm",
    "gpt_neox.layers.{i}.attention.query_key_value": tuple(f"layers.{{i}}.attention.{name}" for name in "qkv"),
    "gpt_neox.layers.{i}.attention.dense": "layers.{i}.attention.o",
    "gpt_neox.layers.{i}.post_attention_layernorm": "layers.{i}.ffn_norm",
    "gpt_neox.layers.{i}.mlp.dense_h_to_4h": "layers.{i}.ffn.up",
    "gpt_neox.layers.{i}.mlp.dense_4h_to_h": "layers.{i}.ffn.down",
    "gpt_neox.final_layer_norm": "norm",
    "embed_out": "head",
}


DEFAULTS = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "attention_bias": True,
    "rotary_emb_base": 10_000.0,
    "rotary_pct": 0.25,
}


def read(hf: Any) -> dict[str, Any]:
    """GPT-NeoX's configuration."""
    return common(
        hf,
        **one_rope(hf, {"rope_theta": hf.rotary_emb_base, "partial_rotary_factor": hf.rotary_pct}, partial=True),
        ffn_width=hf.intermediate_size,
        norm="layer",
        norm_eps=hf.layer_norm_eps,
        parallel_branches=hf.use_parallel_residual,
        qkv_bias=hf.attention_bias,
        attention_out_bias=hf.attention_bias,
        ffn_bias=True,
        gated=False,
        activation=activation(hf.hidden_act),
    )


FAMILY = Family(
    model_type="gpt_neox",
    architectures=("GPTNeoXForCausalLM",),
    defaults=DEFAULTS,
    read=read,
    modules=MODULES,
    prefix="gpt_neox.",
    fused_by_head=("gpt_neox.layers.{i}.attention.query_key_value",),
    ignored=(r"attention\.(masked_)?bias$",),
)
