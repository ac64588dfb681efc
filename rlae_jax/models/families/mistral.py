"""Mistral (Jiang et al., 2023): Llama with a sliding window."""

from typing import Any

from rlae_jax.models.families.base import Family, gated_rms, one_rope, windows
from rlae_jax.models.families.llama import DEFAULTS as LLAMA_DEFAULTS
from rlae_jax.models.families.llama import MODULES


def read(hf: Any) -> dict[str, Any]:
    """Mistral's configuration: every layer is local, if any is."""
    return gated_rms(hf, **one_rope(hf), **windows(hf, None))


DEFAULTS = LLAMA_DEFAULTS | {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096}
FAMILY = Family(
    model_type="mistral", architectures=("MistralForCausalLM",), defaults=DEFAULTS, read=read, modules=MODULES
)
