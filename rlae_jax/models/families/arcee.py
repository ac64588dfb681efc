"""AFM (Arcee AI, 2025): Llama whose feed-forward is down(relu(up(x))^2)."""

from typing import Any

from rlae_jax.models.families import llama
from rlae_jax.models.families.base import Family


def read(hf: Any) -> dict[str, Any]:
    """AFM's configuration."""
    return llama.read(hf) | {"gated": False}


FAMILY = Family(
    model_type="arcee",
    architectures=("ArceeForCausalLM",),
    defaults=llama.DEFAULTS | {"hidden_act": "relu2", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    read=read,
    modules=llama.MODULES,
)
