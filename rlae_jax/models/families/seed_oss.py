"""Seed-OSS (ByteDance, 2025): Llama with biases on queries, keys and values."""

from typing import Any

from rlae_jax.models.families import llama
from rlae_jax.models.families.base import Family


def read(hf: Any) -> dict[str, Any]:
    """Seed-OSS's configuration."""
    return llama.read(hf) | {"attention_out_bias": hf.attention_out_bias}


DEFAULTS = llama.DEFAULTS | {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 524_288,
    "attention_bias": True,
    "attention_out_bias": False,
}
FAMILY = Family(
    model_type="seed_oss", architectures=("SeedOssForCausalLM",), defaults=DEFAULTS, read=read, modules=llama.MODULES
)
