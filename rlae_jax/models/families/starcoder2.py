"""StarCoder 2 (Lozhkov et al., 2024): Mistral with layer norms, biases and a plain feed-forward."""

from typing import Any

from rlae_jax.models.families.base import Family, activation, common, one_rope, windows
from rlae_jax.models.families.llama import MODULES as LLAMA_MODULES

MODULES = {name: path for name, path in LLAMA_MODULES.items() if ".mlp." not in name} | {
    "model.layers.{i}.mlp.c_fc": "layers.{i}.ffn.up",
    "model.layers.{i}.mlp.c_proj": "layers.{i}.ffn.down",
}


def read(hf: Any) -> dict[str, Any]:
    """StarCoder 2's configuration: every layer is local, if any is."""
    return common(
        hf,
        **one_rope(hf),
        **windows(hf, None),
        ffn_width=hf.intermediate_size,
        norm="layer",
        norm_eps=hf.norm_epsilon,
        qkv_bias=hf.use_bias,
        attention_out_bias=hf.use_bias,
        ffn_bias=hf.use_bias,
        gated=False,
        activation=activation(hf.hidden_act),
    )


DEFAULTS = {
    "hidden_act": "gelu_pytorch_tanh",
    "num_key_value_heads": 2,
    "norm_epsilon": 1e-5,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "sliding_window": None,
    "use_bias": True,
}
FAMILY = Family(
    model_type="starcoder2", architectures=("Starcoder2ForCausalLM",), defaults=DEFAULTS, read=read, modules=MODULES
)
