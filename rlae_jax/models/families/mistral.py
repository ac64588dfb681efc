"""Mistral (Jiang et al., 2023): Llama with a sliding window."""

from typing import Any

from rlae_jax.models.families.base import Family, gated_rms, one_rope
from rlae_jax.models.families.llama import MODULES


def read(hf: Any) -> dict[str, Any]:
    """Mistral's configuration: every layer is local, if any is."""
    window = {"window": hf.sliding_window, "local_layers": tuple(range(hf.num_hidden_layers))}
    return gated_rms(hf, **one_rope(hf), **(window if hf.sliding_window else {}))


FAMILY = Family(model_type="mistral", architectures=("MistralForCausalLM",), read=read, modules=MODULES)
