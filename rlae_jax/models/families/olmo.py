"""OLMo (Groeneveld et al., 2024): Llama with layer norms that have no parameters."""

from typing import Any

from rlae_jax.models.families.base import Family, activation, common, one_rope
from rlae_jax.models.families.llama import MODULES


def read(hf: Any) -> dict[str, Any]:
    """OLMo's configuration."""
    return common(
        hf,
        **one_rope(hf),
        ffn_width=hf.intermediate_size,
        norm="layer",
        norm_eps=1e-5,
        norm_affine=False,
        activation=activation(hf.hidden_act),
        qkv_bias=hf.attention_bias,
        attention_out_bias=hf.attention_bias,
        qkv_clip=hf.clip_qkv,
    )


DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "clip_qkv": None,
}
FAMILY = Family(model_type="olmo", architectures=("OlmoForCausalLM",), defaults=DEFAULTS, read=read, modules=MODULES)
