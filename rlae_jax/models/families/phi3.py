"""Phi-3, Phi-3.5 and Phi-4 (Abdin et al., 2024): Llama with fused projections, partial rotary and longrope."""

from typing import Any

from rlae_jax.models.families.base import Family, gated_rms, one_rope, windows
from rlae_jax.models.families.llama import MODULES as LLAMA_MODULES

GATE_UP = {"model.layers.{i}.mlp.gate_up_proj": ("layers.{i}.ffn.gate", "layers.{i}.ffn.up")}
_FUSED = GATE_UP | {
    "model.layers.{i}.self_attn.qkv_proj": tuple(f"layers.{{i}}.attention.{name}" for name in "qkv"),
}
_SPLIT = {path for paths in _FUSED.values() for path in paths}
MODULES = {name: path for name, path in LLAMA_MODULES.items() if path not in _SPLIT} | _FUSED


def read(hf: Any) -> dict[str, Any]:
    """Phi-3's configuration: every layer is local, if any is."""
    return gated_rms(hf, **one_rope(hf, partial=True), **windows(hf, None))


DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "sliding_window": None,
}
FAMILY = Family(model_type="phi3", architectures=("Phi3ForCausalLM",), defaults=DEFAULTS, read=read, modules=MODULES)
