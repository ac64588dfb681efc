"""EXAONE 4 (LG AI Research, 2025): OLMo 2's norms; with windows, the layers without one know no positions."""

from typing import Any

from rlae_jax.models.families.base import LOCAL, Family, gated_rms, one_rope, windows
from rlae_jax.models.families.llama import DEFAULTS as LLAMA_DEFAULTS
from rlae_jax.models.families.olmo2 import MODULES


def read(hf: Any) -> dict[str, Any]:
    """EXAONE 4's configuration. A pattern "LLLG" is a number of layers, spelt out."""
    pattern = hf.sliding_window_pattern
    period = len(pattern) if isinstance(pattern, str) else pattern
    counted = [LOCAL if period and (i + 1) % period else "full_attention" for i in range(hf.num_hidden_layers)]
    local = windows(hf, hf.layer_types or counted) if hf.sliding_window else {}
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
