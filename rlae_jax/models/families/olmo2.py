"""OLMo 2 (OLMo Team, 2024): norms after each branch, and over all queries and all keys."""

from typing import Any

from rlae_jax.models.families.base import Family, gated_rms, one_rope
from rlae_jax.models.families.llama import DEFAULTS as LLAMA_DEFAULTS
from rlae_jax.models.families.llama import MODULES as LLAMA_MODULES
from rlae_jax.models.families.qwen3 import NORMS

_BEFORE = "model.layers.{i}.input_layernorm"
MODULES = (
    {name: path for name, path in LLAMA_MODULES.items() if name != _BEFORE}
    | NORMS
    | {
        "model.layers.{i}.post_attention_layernorm": "layers.{i}.attention_branch_norm",
        "model.layers.{i}.post_feedforward_layernorm": "layers.{i}.ffn_branch_norm",
    }
)


def read(hf: Any) -> dict[str, Any]:
    """OLMo 2's configuration."""
    bias = {"qkv_bias": hf.attention_bias, "attention_out_bias": hf.attention_bias}
    return gated_rms(hf, **one_rope(hf), **bias, norm_places=("branch",), query_key_norm="all")


DEFAULTS = LLAMA_DEFAULTS | {"rms_norm_eps": 1e-5}
FAMILY = Family(model_type="olmo2", architectures=("Olmo2ForCausalLM",), defaults=DEFAULTS, read=read, modules=MODULES)
