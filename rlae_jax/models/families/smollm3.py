"""SmolLM3 (Bakouch et al., 2025): Llama whose every fourth layer knows no positions."""

from typing import Any

from rlae_jax.models.families.base import LOCAL, Family, gated_rms, one_rope, windows
from rlae_jax.models.families.llama import DEFAULTS as LLAMA_DEFAULTS
from rlae_jax.models.families.llama import MODULES


def read(hf: Any) -> dict[str, Any]:
    """SmolLM3's configuration. `no_rope_layers` has a 1 for each layer that is rotated."""
    layers = range(hf.num_hidden_layers)
    rotated = hf.no_rope_layers or [(i + 1) % hf.no_rope_layer_interval for i in layers]
    counted = ["full_attention" if rotated[i] else LOCAL for i in layers]
    local = windows(hf, hf.layer_types or counted) if hf.use_sliding_window else {}
    biases = {"qkv_bias": hf.attention_bias, "attention_out_bias": hf.attention_bias, "ffn_bias": hf.mlp_bias}
    unrotated = tuple(i for i in layers if not rotated[i])
    return gated_rms(hf, **one_rope(hf), **local, **biases, unrotated_layers=unrotated)


DEFAULTS = LLAMA_DEFAULTS | {
    "num_key_value_heads": 4,
    "max_position_embeddings": 32_768,
    "rope_theta": 2_000_000.0,
    "tie_word_embeddings": True,
    "no_rope_layers": None,
    "no_rope_layer_interval": 4,
    "layer_types": None,
    "use_sliding_window": False,
    "sliding_window": None,
}
FAMILY = Family(
    model_type="smollm3", architectures=("SmolLM3ForCausalLM",), defaults=DEFAULTS, read=read, modules=MODULES
)
