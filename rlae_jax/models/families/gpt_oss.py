"""gpt-oss (Agarwal et al., 2025): attention sinks, alternating windows, experts with biases and a clamped gate."""

from typing import Any

from rlae_jax.models.families.base import LOCAL, Family, Modules, experts_of, gated_rms, one_rope, windows
from rlae_jax.models.families.mixtral import ATTENTION

_EXPERTS = "model.layers.{i}.mlp.experts"
MODULES: Modules = ATTENTION | {
    "model.layers.{i}.self_attn.sinks": "layers.{i}.attention.sinks",
    "model.layers.{i}.mlp.router": "layers.{i}.ffn.router",
    f"{_EXPERTS}.gate_up_proj": ("layers.{i}.ffn.experts.gate", "layers.{i}.ffn.experts.up"),
    f"{_EXPERTS}.down_proj": "layers.{i}.ffn.experts.down",
}
_FUSED = (f"{_EXPERTS}.gate_up_proj", f"{_EXPERTS}.down_proj")
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def read(hf: Any) -> dict[str, Any]:
    """gpt-oss's configuration."""
    if not (hf.rope_scaling or getattr(hf, "rope_parameters", None)):
        hf.rope_scaling = _YARN
    clamped = float(hf.swiglu_alpha), float(hf.swiglu_limit)
    experts = experts_of(hf, router_bias=True, bias=True, clamped=clamped)
    alternating = [LOCAL if i % 2 == 0 else "full_attention" for i in range(hf.num_hidden_layers)]
    return gated_rms(
        hf,
        **one_rope(hf),
        **windows(hf, getattr(hf, "layer_types", None) or alternating),
        qkv_bias=hf.attention_bias,
        attention_out_bias=hf.attention_bias,
        attention_sinks=True,
        experts=experts,
    )


FAMILY = Family(
    model_type="gpt_oss",
    architectures=("GptOssForCausalLM",),
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "rope_theta": 150_000.0,
        "rope_scaling": None,
        "num_experts_per_tok": 4,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
    },
    read=read,
    modules=MODULES,
    inputs_first=_FUSED,
    interleaved=_FUSED[:1],
    unsuffixed=("model.layers.{i}.self_attn.sinks", *_FUSED),
)
