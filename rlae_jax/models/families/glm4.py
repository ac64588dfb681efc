"""GLM-4 of 2025 (GLM-4-0414): GLM with norms on both sides of every branch."""

from typing import Any

from rlae_jax.models.families import glm
from rlae_jax.models.families.base import Family

MODULES = glm.MODULES | {
    "model.layers.{i}.post_self_attn_layernorm": "layers.{i}.attention_branch_norm",
    "model.layers.{i}.post_mlp_layernorm": "layers.{i}.ffn_branch_norm",
}


def read(hf: Any) -> dict[str, Any]:
    """GLM-4's configuration."""
    return glm.read(hf) | {"norm_places": ("before", "branch")}


FAMILY = Family(
    model_type="glm4", architectures=("Glm4ForCausalLM",), defaults=glm.DEFAULTS, read=read, modules=MODULES
)
