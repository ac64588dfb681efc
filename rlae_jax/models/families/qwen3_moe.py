"""Qwen 3 with experts (Yang et al., 2025): no shared expert, queries and keys are normalised per head."""

from typing import Any

from rlae_jax.models.families.base import Family, gated_rms, one_rope, windows
from rlae_jax.models.families.llama import MODULES as LLAMA_MODULES
from rlae_jax.models.families.qwen2_moe import DEFAULTS as QWEN2_DEFAULTS
from rlae_jax.models.families.qwen2_moe import EXPERTS, qwen_experts
from rlae_jax.models.families.qwen3 import NORMS


def read(hf: Any) -> dict[str, Any]:
    """Qwen 3 MoE's configuration: every layer is local, if any is."""
    bias = {"qkv_bias": hf.attention_bias, "attention_out_bias": hf.attention_bias}
    local = windows(hf, None) if hf.use_sliding_window else {}
    return gated_rms(hf, **one_rope(hf), **local, **bias, query_key_norm="head", experts=qwen_experts(hf))


_OF_QWEN2 = ("qkv_bias", "max_window_layers")
DEFAULTS = {name: value for name, value in QWEN2_DEFAULTS.items() if name not in _OF_QWEN2}
DEFAULTS |= {"num_key_value_heads": 4, "num_experts_per_tok": 8}
FAMILY = Family(
    model_type="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    defaults=DEFAULTS,
    read=read,
    modules=LLAMA_MODULES | EXPERTS | NORMS,
)
