"""Llama 4 (Meta AI, 2025): layers that attend in chunks, each few of them one that sees all and knows no positions;
experts whose inputs are scaled, beside one that every token takes."""

from typing import Any

from rlae_jax.errors import InputError
from rlae_jax.models.config import QueryGrowth
from rlae_jax.models.families.base import Family, Modules, experts_of, gated_rms, one_rope
from rlae_jax.models.families.llama import MODULES as LLAMA_MODULES

_BLOCK = "model.layers.{i}.feed_forward"
_EXPERTS = f"{_BLOCK}.experts"
_LINEARS = ("gate", "up", "down")
_FUSED = (f"{_EXPERTS}.gate_up_proj", f"{_EXPERTS}.down_proj")
MODULES: Modules = (
    {name: ours for name, ours in LLAMA_MODULES.items() if ".mlp." not in name}
    | {f"{_BLOCK}.{name}_proj": f"layers.{{i}}.ffn.{name}" for name in _LINEARS}
    | {f"{_BLOCK}.shared_expert.{name}_proj": f"layers.{{i}}.ffn.shared.{name}" for name in _LINEARS}
    | {
        f"{_BLOCK}.router": "layers.{i}.ffn.router",
        _FUSED[0]: ("layers.{i}.ffn.experts.gate", "layers.{i}.ffn.experts.up"),
        _FUSED[1]: "layers.{i}.ffn.experts.down",
    }
)


def read(hf: Any) -> dict[str, Any]:
    """Llama 4's configuration. `no_rope_layers` has a 1 for each layer that is rotated."""
    layers, size = range(hf.num_hidden_layers), hf.attention_chunk_size
    rotated = hf.no_rope_layers or [(i + 1) % hf.no_rope_layer_interval for i in layers]
    counted = ["chunked_attention" if rotated[i] and size is not None else "full_attention" for i in layers]
    local = tuple(i for i, name in enumerate(hf.layer_types or counted) if name == "chunked_attention")
    step = hf.interleave_moe_layer_step
    sparse = tuple(range(step - 1, hf.num_hidden_layers, step) if hf.moe_layers is None else hf.moe_layers)
    if beyond := [i for i in sparse if i >= hf.num_hidden_layers]:
        raise InputError(f"moe_layers names the layer {beyond[0]} of {hf.num_hidden_layers}")
    experts = experts_of(hf, layers=sparse, scaled_inputs=True, shared_width=hf.intermediate_size) if sparse else None
    growth = QueryGrowth(float(hf.attn_scale), int(hf.floor_scale), offset=1, unrotated=True)
    return gated_rms(
        hf,
        **one_rope(hf, interleaved=True),
        **({"local_layers": local, "window": size, "chunked": True} if local else {}),
        ffn_width=hf.intermediate_size_mlp,
        unrotated_layers=tuple(i for i in layers if not rotated[i]),
        query_key_norm="unit" if hf.use_qk_norm else None,
        norm_rotated=True,
        query_growth=growth if hf.attn_temperature_tuning else None,
        qkv_bias=hf.attention_bias,
        attention_out_bias=hf.attention_bias,
        experts=experts,
    )


FAMILY = Family(
    model_type="llama4_text",
    architectures=("Llama4ForCausalLM",),
    defaults={
        "hidden_act": "silu",
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131_072,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "moe_layers": None,
        "interleave_moe_layer_step": 1,
        "use_qk_norm": True,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
        "layer_types": None,
        "attention_chunk_size": 8192,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "attn_scale": 0.1,
    },
    read=read,
    modules=MODULES,
    inputs_first=_FUSED,
    unsuffixed=_FUSED,
)
