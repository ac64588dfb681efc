"""Nemotron 3 and 4, Minitron (NVIDIA, 2024): layer norms stored as differences from 1, relu^2, partial rotary."""

from typing import Any

from rlae_jax.models.families.base import Family, activation, common, one_rope
from rlae_jax.models.families.llama import MODULES


def read(hf: Any) -> dict[str, Any]:
    """Nemotron's configuration."""
    return common(
        hf,
        **one_rope(hf, partial=True),
        ffn_width=hf.intermediate_size,
        norm="layer",
        norm_eps=hf.norm_eps,
        norm_offset=1.0,
        qkv_bias=hf.attention_bias,
        attention_out_bias=hf.attention_bias,
        ffn_bias=hf.mlp_bias,
        gated=False,
        activation=activation(hf.hidden_act),
    )


DEFAULTS = {
    "hidden_act": "relu2",
    "norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "partial_rotary_factor": 0.5,
    "attention_bias": False,
    "mlp_bias": False,
}
FAMILY = Family(
    model_type="nemotron", architectures=("NemotronForCausalLM",), defaults=DEFAULTS, read=read, modules=MODULES
)
