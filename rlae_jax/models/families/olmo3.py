"""OLMo 3 (OLMo Team, 2025): OLMo 2 with windows in three of four layers, whose positions are never stretched."""

from typing import Any

from rlae_jax.models.families import olmo2
from rlae_jax.models.families.base import LOCAL, Family, make_rope, windows

_THETA = 500_000.0


def read(hf: Any) -> dict[str, Any]:
    """OLMo 3's configuration."""
    ropes = hf.rope_parameters or {}
    everywhere = {"rope_theta": hf.rope_theta, **(ropes.get("full_attention") or {}), **(hf.rope_scaling or {})}
    local = {"rope_theta": _THETA, **(ropes.get(LOCAL) or {})}
    counted = [LOCAL if (i + 1) % 4 else "full_attention" for i in range(hf.num_hidden_layers)]
    return olmo2.read(hf) | {
        "rope": make_rope(hf, everywhere),
        "local_rope": make_rope(hf, local),
        **windows(hf, hf.layer_types or counted),
    }


DEFAULTS = olmo2.DEFAULTS | {
    "rope_theta": _THETA,
    "rope_parameters": None,
    "rope_scaling": None,
    "sliding_window": 4096,
    "layer_types": None,
}
FAMILY = Family(
    model_type="olmo3", architectures=("Olmo3ForCausalLM",), defaults=DEFAULTS, read=read, modules=olmo2.MODULES
)
