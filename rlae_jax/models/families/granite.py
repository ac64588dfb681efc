"""Granite 3 (Granite Team, 2024): Llama with multipliers of embeddings, scores, branches and logits."""

from typing import Any

from rlae_jax.models.families import llama
from rlae_jax.models.families.base import Family


def read(hf: Any) -> dict[str, Any]:
    """Granite's configuration."""
    return llama.read(hf) | {
        "embedding_scale": hf.embedding_multiplier,
        "attention_scale": hf.attention_multiplier,
        "branch_scale": hf.residual_multiplier,
        "logit_scale": 1 / hf.logits_scaling,
    }


DEFAULTS = llama.DEFAULTS | {
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
}
FAMILY = Family(
    model_type="granite", architectures=("GraniteForCausalLM",), defaults=DEFAULTS, read=read, modules=llama.MODULES
)
