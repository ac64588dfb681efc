"""Helium (Kyutai, 2025): Llama with neighbouring rotary pairs."""

from typing import Any

from rlae_jax.models.families import llama
from rlae_jax.models.families.base import Family, one_rope


def read(hf: Any) -> dict[str, Any]:
    """Helium's configuration; the output map has no bias whatever the others have."""
    return llama.read(hf) | one_rope(hf, interleaved=True) | {"attention_out_bias": False}


DEFAULTS = llama.DEFAULTS | {
    "num_key_value_heads": 20,
    "head_dim": 128,
    "rms_norm_eps": 1e-8,
    "max_position_embeddings": 4096,
    "rope_theta": 100_000.0,
}
FAMILY = Family(
    model_type="helium", architectures=("HeliumForCausalLM",), defaults=DEFAULTS, read=read, modules=llama.MODULES
)
