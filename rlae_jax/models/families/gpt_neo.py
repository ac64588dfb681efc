"""GPT-Neo (Black et al., 2021): GPT-2 with windows in every other layer and scores that are not scaled."""

from typing import Any

from rlae_jax.errors import InputError
from rlae_jax.models.families.base import Family, activation, common
from rlae_jax.models.families.gpt2 import MODULES as GPT2_MODULES

_ATTENTION = "transformer.h.{i}.attn.attention"
MODULES = {name: path for name, path in GPT2_MODULES.items() if ".attn." not in name} | {
    **{f"{_ATTENTION}.{name}_proj": f"layers.{{i}}.attention.{name}" for name in "qkv"},
    f"{_ATTENTION}.out_proj": "layers.{i}.attention.o",
}


def read(hf: Any) -> dict[str, Any]:
    """GPT-Neo's configuration."""
    hf.num_attention_heads, hf.num_hidden_layers = hf.num_heads, hf.num_layers
    kinds = [kind for pattern, times in hf.attention_types for kind in pattern * times]
    if len(kinds) != hf.num_layers:
        raise InputError(f"attention_types names {len(kinds)} layers of {hf.num_layers}")
    local = tuple(i for i, kind in enumerate(kinds) if kind == "local")
    return common(
        hf,
        ffn_width=hf.optional("intermediate_size") or 4 * hf.hidden_size,
        norm="layer",
        norm_eps=hf.layer_norm_epsilon,
        rope=None,
        learned_positions=hf.max_position_embeddings,
        attention_scale=1.0,
        attention_out_bias=True,
        window=hf.window_size if local else 0,
        local_layers=local,
        ffn_bias=True,
        gated=False,
        activation=activation(hf.activation_function),
    )


DEFAULTS = {
    "max_position_embeddings": 2048,
    "attention_types": [[["global", "local"], 12]],
    "window_size": 256,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}
FAMILY = Family(
    model_type="gpt_neo",
    architectures=("GPTNeoForCausalLM",),
    defaults=DEFAULTS,
    read=read,
    modules=MODULES,
    prefix="transformer.",
    ignored=(r"attention\.(masked_)?bias$",),
)
