"""StableLM 2 (Bellagente et al., 2024): Llama with layer norms and a quarter of each head rotated."""

from typing import Any

from rlae_jax.models.families.base import Family, activation, common, one_rope, refuse
from rlae_jax.models.families.llama import MODULES


def read(hf: Any) -> dict[str, Any]:
    """StableLM's configuration."""
    refuse(qk_layernorm=hf.qk_layernorm)
    return common(
        hf,
        **one_rope(hf, partial=True),
        head_width=hf.hidden_size // hf.num_attention_heads,
        ffn_width=hf.intermediate_size,
        norm="layer",
        norm_eps=hf.layer_norm_eps,
        parallel_branches=hf.use_parallel_residual,
        shared_norm=hf.use_parallel_residual,
        activation=activation(hf.hidden_act),
        qkv_bias=hf.use_qkv_bias,
    )


DEFAULTS = {
    "hidden_act": "silu",
    "num_key_value_heads": 32,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "partial_rotary_factor": 0.25,
    "use_qkv_bias": False,
    "qk_layernorm": False,
    "use_parallel_residual": False,
}
FAMILY = Family(
    model_type="stablelm", architectures=("StableLmForCausalLM",), defaults=DEFAULTS, read=read, modules=MODULES
)
