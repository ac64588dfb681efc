"""Gemma (Gemma Team, 2024): Llama with norms stored as differences from 1, scaled embeddings and a gelu gate."""

from typing import Any

from rlae_jax.models.families.base import Family, gated_rms, one_rope, refuse
from rlae_jax.models.families.llama import DEFAULTS as LLAMA_DEFAULTS
from rlae_jax.models.families.llama import MODULES


def read(hf: Any) -> dict[str, Any]:
    """Gemma's configuration. What the first releases call "gelu" is the tanh approximation."""
    refuse(use_bidirectional_attention=hf.use_bidirectional_attention)
    hf.hidden_act = "gelu_pytorch_tanh" if hf.hidden_act == "gelu" else hf.hidden_act
    bias = {"qkv_bias": hf.attention_bias, "attention_out_bias": hf.attention_bias}
    return gated_rms(hf, **one_rope(hf), **bias, norm_offset=1.0, embedding_scale=hf.hidden_size**0.5)


DEFAULTS = LLAMA_DEFAULTS | {
    "hidden_act": "gelu_pytorch_tanh",
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "use_bidirectional_attention": None,
}
FAMILY = Family(model_type="gemma", architectures=("GemmaForCausalLM",), defaults=DEFAULTS, read=read, modules=MODULES)
