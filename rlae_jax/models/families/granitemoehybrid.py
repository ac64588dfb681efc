"""Granite 4 without state-space layers and experts (Granite Team, 2025): Granite 3 under other names."""

from typing import Any

from rlae_jax.errors import InputError
from rlae_jax.models.families import granite, llama
from rlae_jax.models.families.base import Family

MODULES: dict[str, str | tuple[str, ...]] = {
    **{name: path for name, path in llama.MODULES.items() if ".mlp." not in name},
    "model.layers.{i}.shared_mlp.input_linear": ("layers.{i}.ffn.gate", "layers.{i}.ffn.up"),
    "model.layers.{i}.shared_mlp.output_linear": "layers.{i}.ffn.down",
}


def read(hf: Any) -> dict[str, Any]:
    """Granite 4's configuration.

    Raises:
      InputError: state-space layers or experts.
    """
    others = set(hf.layer_types or ["mamba"]) - {"attention", "full_attention"}
    if others or hf.num_local_experts:
        raise InputError("Granite 4 with state-space layers (mamba) or experts is not supported")
    hf.intermediate_size = hf.shared_intermediate_size
    fields = granite.read(hf)
    return fields if hf.position_embedding_type == "rope" else fields | {"rope": None}


FAMILY = Family(
    model_type="granitemoehybrid",
    architectures=("GraniteMoeHybridForCausalLM",),
    defaults=granite.DEFAULTS
    | {"num_local_experts": 8, "position_embedding_type": None, "layer_types": None, "shared_intermediate_size": 1024},
    read=read,
    modules=MODULES,
)
