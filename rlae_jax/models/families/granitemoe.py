"""Granite 3 with experts (Granite Team, 2024): a layer's experts are one tensor."""

from typing import Any

from rlae_jax.models.families import granite
from rlae_jax.models.families.base import Family, Modules, experts_of
from rlae_jax.models.families.mixtral import ATTENTION

_BLOCK = "model.layers.{i}.block_sparse_moe"
MODULES: Modules = ATTENTION | {
    f"{_BLOCK}.router.layer": "layers.{i}.ffn.router",
    f"{_BLOCK}.input_linear": ("layers.{i}.ffn.experts.gate", "layers.{i}.ffn.experts.up"),
    f"{_BLOCK}.output_linear": "layers.{i}.ffn.experts.down",
}


def read(hf: Any) -> dict[str, Any]:
    """Granite 3 MoE's configuration."""
    return granite.read(hf) | {"experts": experts_of(hf)}


FAMILY = Family(
    model_type="granitemoe",
    architectures=("GraniteMoeForCausalLM",),
    defaults=granite.DEFAULTS | {"num_experts_per_tok": 2},
    read=read,
    modules=MODULES,
)
