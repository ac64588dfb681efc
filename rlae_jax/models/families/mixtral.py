"""Mixtral (Jiang et al., 2024): Mistral with experts in every layer."""

from typing import Any

from rlae_jax.models.families.base import Family, experts_of, gated_rms, one_rope, windows
from rlae_jax.models.families.llama import DEFAULTS as LLAMA_DEFAULTS
from rlae_jax.models.families.llama import MODULES as LLAMA_MODULES

ATTENTION = {name: path for name, path in LLAMA_MODULES.items() if ".mlp." not in name}
_BLOCK = "model.layers.{i}.block_sparse_moe"
MODULES = ATTENTION | {
    f"{_BLOCK}.gate": "layers.{i}.ffn.router",
    f"{_BLOCK}.experts.{{e}}.w1": "layers.{i}.ffn.experts.gate",
    f"{_BLOCK}.experts.{{e}}.w3": "layers.{i}.ffn.experts.up",
    f"{_BLOCK}.experts.{{e}}.w2": "layers.{i}.ffn.experts.down",
}


def read(hf: Any) -> dict[str, Any]:
    """Mixtral's configuration: every layer is local, if any is."""
    return gated_rms(hf, **one_rope(hf), **windows(hf, None), experts=experts_of(hf))


DEFAULTS = LLAMA_DEFAULTS | {
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "max_position_embeddings": 131_072,
    "sliding_window": None,
    "num_experts_per_tok": 2,
}
FAMILY = Family(
    model_type="mixtral", architectures=("MixtralForCausalLM",), defaults=DEFAULTS, read=read, modules=MODULES
)
