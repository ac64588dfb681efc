"""GPT-2 (Radford et al., 2019): learned positions, layer norms, fused projections stored inputs first."""

from typing import Any

from rlae_jax.models.families.base import Family, Modules, activation, common, refuse

MODULES: Modules = {
    "transformer.wte": "embedding",
    "transformer.wpe": "positions",
    "transformer.h.{i}.ln_1": "layers.{i}.attention_norm",
    "transformer.h.{i}.attn.c_attn": tuple(f"layers.{{i}}.attention.{name}" for name in "qkv"),
    "transformer.h.{i}.attn.c_proj": "layers.{i}.attention.o",
    "transformer.h.{i}.ln_2": "layers.{i}.ffn_norm",
    "transformer.h.{i}.mlp.c_fc": "layers.{i}.ffn.up",
    "transformer.h.{i}.mlp.c_proj": "layers.{i}.ffn.down",
    "transformer.ln_f": "norm",
    "lm_head": "head",
}


DEFAULTS = {
    "n_inner": None,
    "n_positions": 1024,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
# GPT-2 has names of its own for what the others call so.
NAMES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def read(hf: Any) -> dict[str, Any]:
    """GPT-2's configuration."""
    for name, own in NAMES.items():
        setattr(hf, name, getattr(hf, own))
    refuse(add_cross_attention=hf.add_cross_attention)
    return common(
        hf,
        ffn_width=hf.n_inner or 4 * hf.n_embd,
        norm="layer",
        norm_eps=hf.layer_norm_epsilon,
        rope=None,
        learned_positions=hf.n_positions,
        attention_scale=None if hf.scale_attn_weights else 1.0,
        scale_by_depth=hf.scale_attn_by_inverse_layer_idx,
        qkv_bias=True,
        attention_out_bias=True,
        ffn_bias=True,
        gated=False,
        activation=activation(hf.activation_function),
    )


FAMILY = Family(
    model_type="gpt2",
    architectures=("GPT2LMHeadModel",),
    defaults=DEFAULTS,
    read=read,
    modules=MODULES,
    prefix="transformer.",
    inputs_first=tuple(
        f"transformer.h.{{i}}.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ),
    ignored=(r"h\.\d+\.attn\.(masked_)?bias$",),
)
