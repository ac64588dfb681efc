"""Qwen 2 and 2.5 (Yang et al., 2024): Llama with biases on queries, keys and values."""

from typing import Any

from rlae_jax.models.families.base import LOCAL, Family, gated_rms, one_rope, windows
from rlae_jax.models.families.llama import DEFAULTS as LLAMA_DEFAULTS
from rlae_jax.models.families.llama import MODULES

DEFAULTS = LLAMA_DEFAULTS | {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def qwen_windows(hf: Any) -> dict[str, Any]:
    """Windows from some layer on, if they are used at all."""
    if not hf.use_sliding_window:
        return {}
    counted = [LOCAL if i >= hf.max_window_layers else "full_attention" for i in range(hf.num_hidden_layers)]
    return windows(hf, getattr(hf, "layer_types", None) or counted)


def read(hf: Any) -> dict[str, Any]:
    """Qwen 2's configuration."""
    return gated_rms(hf, **one_rope(hf), **qwen_windows(hf), qkv_bias=True)


FAMILY = Family(model_type="qwen2", architectures=("Qwen2ForCausalLM",), defaults=DEFAULTS, read=read, modules=MODULES)
