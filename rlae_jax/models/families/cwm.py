"""CWM (Code World Model team, 2025): Llama with windows in three of four layers."""

from typing import Any

from rlae_jax.models.families.base import LOCAL, Family, gated_rms, one_rope, windows
from rlae_jax.models.families.llama import DEFAULTS as LLAMA_DEFAULTS
from rlae_jax.models.families.llama import MODULES

ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1_000_000.0,
    "factor": 16.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}


def read(hf: Any) -> dict[str, Any]:
    """CWM's configuration."""
    counted = [LOCAL if i % 4 else "full_attention" for i in range(hf.num_hidden_layers)]
    return gated_rms(hf, **one_rope(hf), **windows(hf, hf.layer_types or counted), ffn_bias=hf.mlp_bias)


DEFAULTS = LLAMA_DEFAULTS | {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131_072,
    "rope_theta": 1_000_000.0,
    "rope_parameters": ROPE,
    "sliding_window": 8192,
    "layer_types": None,
}
FAMILY = Family(model_type="cwm", architectures=("CwmForCausalLM",), defaults=DEFAULTS, read=read, modules=MODULES)
