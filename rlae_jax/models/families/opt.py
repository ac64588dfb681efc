"""OPT (Zhang et al., 2022): learned positions from row 2 on; the 350M model narrows its embedding and norms sums."""

from typing import Any

from rlae_jax.models.config import ModelConfig
from rlae_jax.models.families.base import Family, activation, common

MODULES = {
    "model.decoder.embed_tokens": "embedding",
    "model.decoder.embed_positions": "positions",
    "model.decoder.project_in": "project_in",
    "model.decoder.project_out": "project_out",
    "model.decoder.layers.{i}.self_attn.q_proj": "layers.{i}.attention.q",
    "model.decoder.layers.{i}.self_attn.k_proj": "layers.{i}.attention.k",
    "model.decoder.layers.{i}.self_attn.v_proj": "layers.{i}.attention.v",
    "model.decoder.layers.{i}.self_attn.out_proj": "layers.{i}.attention.o",
    "model.decoder.layers.{i}.fc1": "layers.{i}.ffn.up",
    "model.decoder.layers.{i}.fc2": "layers.{i}.ffn.down",
    "model.decoder.final_layer_norm": "norm",
    "lm_head": "head",
}


DEFAULTS = {
    "max_position_embeddings": 2048,
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "word_embed_proj_dim": None,
    "activation_function": "relu",
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "tie_word_embeddings": True,
}


def modules(config: ModelConfig) -> dict[str, str]:
    """One name for a layer's norm, whether it stands before the branch or after the sum."""
    place = "norm" if "before" in config.norm_places else "sum_norm"
    return MODULES | {
        "model.decoder.layers.{i}.self_attn_layer_norm": f"layers.{{i}}.attention_{place}",
        "model.decoder.layers.{i}.final_layer_norm": f"layers.{{i}}.ffn_{place}",
    }


def read(hf: Any) -> dict[str, Any]:
    """OPT's configuration."""
    before = hf.do_layer_norm_before
    return common(
        hf,
        ffn_width=hf.ffn_dim,
        norm="layer",
        norm_eps=1e-5,
        norm_affine=hf.layer_norm_elementwise_affine,
        norm_places=("before",) if before else ("sum",),
        final_norm=before and not hf._remove_final_layer_norm,
        rope=None,
        learned_positions=hf.max_position_embeddings + 2,
        position_offset=2,
        embedding_width=None if hf.word_embed_proj_dim in (None, hf.hidden_size) else hf.word_embed_proj_dim,
        qkv_bias=hf.enable_bias,
        attention_out_bias=hf.enable_bias,
        ffn_bias=hf.enable_bias,
        gated=False,
        activation=activation(hf.activation_function),
    )


FAMILY = Family(model_type="opt", architectures=("OPTForCausalLM",), defaults=DEFAULTS, read=read, modules=modules)
