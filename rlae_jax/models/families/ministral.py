"""Ministral 8B (Mistral AI, 2024): Mistral with windows in some layers."""

from typing import Any

from rlae_jax.models.families.base import Family, gated_rms, one_rope, windows
from rlae_jax.models.families.llama import MODULES
from rlae_jax.models.families.mistral import DEFAULTS as MISTRAL_DEFAULTS


def read(hf: Any) -> dict[str, Any]:
    """Ministral's configuration."""
    return gated_rms(hf, **one_rope(hf), **windows(hf, hf.layer_types))


FAMILY = Family(
    model_type="ministral",
    architectures=("MinistralForCausalLM",),
    defaults=MISTRAL_DEFAULTS | {"layer_types": None},
    read=read,
    modules=MODULES,
)
