"""Ministral 3 (Mistral AI, 2025): Mistral with stretched positions and queries that grow with them."""

from typing import Any

from rlae_jax.models.config import QueryGrowth
from rlae_jax.models.families import llama, mistral
from rlae_jax.models.families.base import Family

ROPE = {
    "type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16_384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def read(hf: Any) -> dict[str, Any]:
    """Ministral 3's configuration."""
    scaling = getattr(hf, "rope_scaling", None) or hf.rope_parameters
    old = scaling.get("original_max_position_embeddings") or hf.max_position_embeddings
    return mistral.read(hf) | {"query_growth": QueryGrowth(float(scaling["llama_4_scaling_beta"]), int(old))}


DEFAULTS = mistral.DEFAULTS | {
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 262_144,
    "sliding_window": None,
    "rope_parameters": ROPE,
}
FAMILY = Family(
    model_type="ministral3",
    architectures=("Ministral3ForCausalLM",),
    defaults=DEFAULTS,
    read=read,
    modules=llama.MODULES,
)
