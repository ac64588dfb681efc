"""Gemma 3, text only (Gemma Team, 2025): Gemma 2 with normalised queries and keys and two rope bases."""

from typing import Any

from rlae_jax.models.families.base import LOCAL, Family, counted_windows, make_rope
from rlae_jax.models.families.gemma2 import DEFAULTS as GEMMA2_DEFAULTS
from rlae_jax.models.families.gemma2 import MODULES, gemma
from rlae_jax.models.families.qwen3 import NORMS


def read(hf: Any) -> dict[str, Any]:
    """Gemma 3's configuration."""
    ropes = getattr(hf, "rope_parameters", None) or {}
    everywhere = {"rope_theta": hf.rope_theta, **(ropes.get("full_attention") or {}), **(hf.rope_scaling or {})}
    local = {"rope_theta": hf.rope_local_base_freq, **(ropes.get(LOCAL) or {})}
    return gemma(
        hf,
        getattr(hf, "layer_types", None) or counted_windows(hf),
        rope=make_rope(hf, everywhere),
        local_rope=make_rope(hf, local),
        query_key_norm="head",
    )


DEFAULTS = GEMMA2_DEFAULTS | {
    "max_position_embeddings": 131_072,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "sliding_window_pattern": 6,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "rope_scaling": None,
}
FAMILY = Family(
    model_type="gemma3_text",
    architectures=("Gemma3ForCausalLM",),
    defaults=DEFAULTS,
    read=read,
    modules=MODULES | NORMS,
)
