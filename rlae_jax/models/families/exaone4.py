"""EXAONE 4 (LG AI Research, 2025): OLMo 2's norms; with windows, the layers without one know no positions."""

from typing import Any

from rlae_jax.models.families.base import Family, counted_windows, gated_rms, one_rope, windows
from rlae_jax.models.families.llama import DEFAULTS as LLAMA_DEFAULTS
from rlae_jax.models.families.olmo2 import MODULES


def read(hf: Any) -> dict[str, Any]:
    """EXAONE 4's configuration."""
    local = windows(hf, hf.layer_types or counted_windows(hf)) if hf.sliding_window else {}
    unrotated = set(range(hf.num_hidden_layers)) - set(local.get("local_layers", ())) if hf.sliding_window else set()
    return gated_rms(
        hf,
        **one_rope(hf),
        **local,
        unrotated_layers=tuple(sorted(unrotated)),
        norm_places=("branch",),
        query_key_norm="head",
    )


DEFAULTS = LLAMA_DEFAULTS | {
    "rms_norm_eps": 1e-5,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
    "layer_types": None,
}
FAMILY = Family(
    model_type="exaone4", architectures=("Exaone4ForCausalLM",), defaults=DEFAULTS, read=read, modules=MODULES
)
