"""GLM-4 of 2024 (GLM Team, 2024): half of each head is rotated, in neighbouring pairs; gate and up are one matrix."""

from typing import Any

from rlae_jax.models.families.base import Family, gated_rms, one_rope
from rlae_jax.models.families.llama import MODULES as LLAMA_MODULES
from rlae_jax.models.families.phi3 import GATE_UP

_SPLIT = ("layers.{i}.ffn.gate", "layers.{i}.ffn.up")
MODULES = {name: path for name, path in LLAMA_MODULES.items() if path not in _SPLIT} | GATE_UP


def read(hf: Any) -> dict[str, Any]:
    """GLM's configuration."""
    return gated_rms(hf, **one_rope(hf, partial=True, interleaved=True), qkv_bias=hf.attention_bias)


DEFAULTS = {
    "hidden_act": "silu",
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rms_norm_eps": 1.5625e-7,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": False,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
}
FAMILY = Family(model_type="glm", architectures=("GlmForCausalLM",), defaults=DEFAULTS, read=read, modules=MODULES)
