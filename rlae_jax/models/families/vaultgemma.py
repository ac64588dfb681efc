"""VaultGemma (Sinha et al., 2025): Gemma 2 without norms after its branches."""

from typing import Any

from rlae_jax.models.families import gemma2, llama
from rlae_jax.models.families.base import Family

MODULES = {name: path for name, path in llama.MODULES.items() if path != "layers.{i}.ffn_norm"} | {
    "model.layers.{i}.pre_feedforward_layernorm": "layers.{i}.ffn_norm"
}


def read(hf: Any) -> dict[str, Any]:
    """VaultGemma's configuration."""
    return gemma2.read(hf) | {"norm_places": ("before",)}


FAMILY = Family(
    model_type="vaultgemma",
    architectures=("VaultGemmaForCausalLM",),
    defaults=gemma2.DEFAULTS,
    read=read,
    modules=MODULES,
)
