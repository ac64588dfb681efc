"""Gemma 3, text only (Gemma Team, 2025): Gemma 2 with normalised queries and keys and two rope bases."""

from typing import Any

from rlae_jax.models.families.base import Family, make_rope
from rlae_jax.models.families.gemma2 import MODULES, gemma
from rlae_jax.models.families.qwen3 import NORMS


def read(hf: Any) -> dict[str, Any]:
    """Gemma 3's configuration."""
    ropes = hf.rope_parameters
    return gemma(
        hf,
        rope=make_rope(hf, ropes["full_attention"]),
        local_rope=make_rope(hf, ropes["sliding_attention"]),
        query_key_norm="head",
    )


FAMILY = Family(model_type="gemma3_text", architectures=("Gemma3ForCausalLM",), read=read, modules=MODULES | NORMS)
