"""Qwen 3 (Yang et al., 2025): queries and keys are normalised per head."""

from typing import Any

from rlae_jax.models.families.base import Family, gated_rms, one_rope
from rlae_jax.models.families.llama import MODULES
from rlae_jax.models.families.qwen2 import DEFAULTS as QWEN2_DEFAULTS
from rlae_jax.models.families.qwen2 import qwen_windows

NORMS = {
    "model.layers.{i}.self_attn.q_norm": "layers.{i}.attention.q_norm",
    "model.layers.{i}.self_attn.k_norm": "layers.{i}.attention.k_norm",
}


def read(hf: Any) -> dict[str, Any]:
    """Qwen 3's configuration."""
    bias = {"qkv_bias": hf.attention_bias, "attention_out_bias": hf.attention_bias}
    return gated_rms(hf, **one_rope(hf), **qwen_windows(hf), **bias, query_key_norm="head")


FAMILY = Family(
    model_type="qwen3",
    architectures=("Qwen3ForCausalLM",),
    defaults=QWEN2_DEFAULTS | {"head_dim": 128},
    read=read,
    modules=MODULES | NORMS,
)
