"""Gemma 4, text only (Gemma Team, 2026): Gemma 3 with wider heads in layers without a window, norms of values, layers
that read the keys and values of others, and a second embedding for every layer."""

from typing import Any

from rlae_jax.errors import InputError
from rlae_jax.models.config import LayerInputs, Wide
from rlae_jax.models.families.base import LOCAL, Family, gated_rms, make_rope, refuse, windows
from rlae_jax.models.families.gemma2 import MODULES as GEMMA2_MODULES
from rlae_jax.models.families.qwen3 import NORMS

_FULL = "full_attention"
MODULES = (
    GEMMA2_MODULES
    | NORMS
    | {
        "model.embed_tokens_per_layer": "second.table",
        "model.per_layer_model_projection": "second.project",
        "model.per_layer_projection_norm": "second.norm",
        "model.layers.{i}.per_layer_input_gate": "layers.{i}.inputs.gate",
        "model.layers.{i}.per_layer_projection": "layers.{i}.inputs.out",
        "model.layers.{i}.post_per_layer_input_norm": "layers.{i}.inputs.norm",
        "model.layers.{i}.layer_scalar": "layers.{i}.scale",
    }
)
ROPES = {
    LOCAL: {"rope_type": "default", "rope_theta": 10_000.0},
    _FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}


def read(hf: Any) -> dict[str, Any]:
    """Gemma 4's configuration.

    Raises:
      InputError: experts; layers that read others' keys and values where none before has any.
    """
    refuse(use_bidirectional_attention=hf.use_bidirectional_attention == "all", enable_moe_block=hf.enable_moe_block)
    layers, reading = hf.num_hidden_layers, hf.num_kv_shared_layers
    kinds = list(hf.layer_types or [LOCAL if (i + 1) % 6 else _FULL for i in range(layers)])
    kinds[-1] = _FULL
    if reading >= layers or set(kinds[: layers - reading]) != set(kinds):
        raise InputError(f"num_kv_shared_layers = {reading}: no layer before these has keys and values of each kind")
    local, everywhere = (hf.rope_parameters.get(kind) or ROPES[kind] for kind in (LOCAL, _FULL))
    one = hf.attention_k_eq_v
    kv_heads = (one and hf.num_global_key_value_heads) or hf.num_key_value_heads
    wide = {"head_dim": hf.global_head_dim, "num_key_value_heads": kv_heads}
    if hf.per_layer_config is not None:  # as transformers writes it; the last layer never has a window
        wide = {"head_dim": hf.head_dim, "num_key_value_heads": hf.num_key_value_heads}
        wide |= hf.per_layer_config.get(str(layers - 1), {})
    per_layer = hf.hidden_size_per_layer_input
    return gated_rms(
        hf,
        **windows(hf, kinds),
        rope=make_rope(hf, everywhere, partial=everywhere.get("rope_type") == "proportional"),
        local_rope=make_rope(hf, local),
        wide=Wide(head_width=wide["head_dim"], kv_heads=wide["num_key_value_heads"], keys_are_values=one),
        reading_layers=reading,
        reading_ffn_width=2 * hf.intermediate_size if hf.use_double_wide_mlp else None,
        norm_places=("before", "branch"),
        query_key_norm="head",
        value_norm=True,
        attention_scale=1.0,
        logit_cap=hf.final_logit_softcapping,
        embedding_scale=hf.hidden_size**0.5,
        qkv_bias=hf.attention_bias,
        attention_out_bias=hf.attention_bias,
        layer_inputs=LayerInputs(rows=hf.vocab_size_per_layer_input, width=per_layer) if per_layer else None,
        layer_scale=True,
    )


DEFAULTS = {
    "hidden_activation": "gelu_pytorch_tanh",
    "num_key_value_heads": 4,
    "head_dim": 256,
    "global_head_dim": 512,
    "num_global_key_value_heads": None,
    "per_layer_config": None,
    "attention_k_eq_v": False,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
    "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": 262_144,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "rope_parameters": ROPES,
    "sliding_window": 512,
    "layer_types": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": None,
    "enable_moe_block": False,
}
FAMILY = Family(
    model_type="gemma4_text",
    architectures=("Gemma4ForCausalLM",),
    defaults=DEFAULTS,
    read=read,
    modules=MODULES,
    unsuffixed=("model.layers.{i}.layer_scalar",),
    # Of layers that read others' keys and values.
    ignored=(r"self_attn\.[kv]_(proj|norm)\.weight$",),
)
