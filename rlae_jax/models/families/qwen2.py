"""Qwen 2 and 2.5 (Yang et al., 2024): Llama with biases on queries, keys and values."""

from typing import Any

from rlae_jax.models.families.base import Family, gated_rms, one_rope, windows
from rlae_jax.models.families.llama import MODULES


def read(hf: Any) -> dict[str, Any]:
    """Qwen 2's configuration."""
    return gated_rms(hf, **one_rope(hf), **windows(hf), qkv_bias=True)


FAMILY = Family(model_type="qwen2", architectures=("Qwen2ForCausalLM",), read=read, modules=MODULES)
