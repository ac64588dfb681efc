"""ERNIE 4.5, dense (Baidu, 2025): Llama with neighbouring rotary pairs."""

from typing import Any

from rlae_jax.models.families import llama
from rlae_jax.models.families.base import Family, gated_rms, one_rope


def read(hf: Any) -> dict[str, Any]:
    """ERNIE's configuration."""
    biases = {"qkv_bias": hf.use_bias, "attention_out_bias": hf.use_bias, "ffn_bias": hf.use_bias}
    return gated_rms(hf, **one_rope(hf, interleaved=True), **biases)


DEFAULTS = {
    "hidden_act": "silu",
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131_072,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": True,
    "use_bias": False,
}
FAMILY = Family(
    model_type="ernie4_5", architectures=("Ernie4_5ForCausalLM",), defaults=DEFAULTS, read=read, modules=llama.MODULES
)
