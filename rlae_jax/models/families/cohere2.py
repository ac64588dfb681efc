"""Command R7B and Command A (Cohere, 2024, 2025): Command R with windows; layers without one know no positions."""

from typing import Any

from rlae_jax.models.families import cohere
from rlae_jax.models.families.base import Family, counted_windows, windows


def read(hf: Any) -> dict[str, Any]:
    """Command A's configuration."""
    hf.head_dim = None  # follows from the width, whatever the file says
    local = windows(hf, hf.layer_types or counted_windows(hf))
    unrotated = tuple(i for i in range(hf.num_hidden_layers) if i not in local.get("local_layers", ()))
    return cohere.cohere(hf, **local, unrotated_layers=unrotated)


FAMILY = Family(
    model_type="cohere2",
    architectures=("Cohere2ForCausalLM",),
    defaults=cohere.DEFAULTS
    | {"rope_theta": 10_000.0, "sliding_window": 4096, "sliding_window_pattern": 4, "layer_types": None},
    read=read,
    modules=cohere.MODULES,
)
