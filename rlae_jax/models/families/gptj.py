"""GPT-J (Wang and Komatsuzaki, 2021): parallel branches that read one norm, neighbouring rotary pairs."""

from typing import Any

from rlae_jax.errors import InputError
from rlae_jax.models.config import Rope
from rlae_jax.models.families.base import Family, activation, common, refuse
from rlae_jax.models.families.gpt2 import NAMES

MODULES = {
    "transformer.wte": "embedding",
    "transformer.h.{i}.ln_1": "layers.{i}.attention_norm",
    **{f"transformer.h.{{i}}.attn.{name}_proj": f"layers.{{i}}.attention.{name}" for name in "qkv"},
    "transformer.h.{i}.attn.out_proj": "layers.{i}.attention.o",
    "transformer.h.{i}.mlp.fc_in": "layers.{i}.ffn.up",
    "transformer.h.{i}.mlp.fc_out": "layers.{i}.ffn.down",
    "transformer.ln_f": "norm",
    "lm_head": "head",
}


def read(hf: Any) -> dict[str, Any]:
    """GPT-J's configuration."""
    for name, own in NAMES.items():
        setattr(hf, name, getattr(hf, own))
    refuse(tie_word_embeddings=hf.tie_word_embeddings)  # the head has a bias
    fields = common(
        hf,
        ffn_width=hf.n_inner or 4 * hf.n_embd,
        norm="layer",
        norm_eps=hf.layer_norm_epsilon,
        parallel_branches=True,
        shared_norm=True,
        ffn_bias=True,
        head_bias=True,
        gated=False,
        activation=activation(hf.activation_function),
    )
    if hf.rotary_dim > fields["head_width"]:
        raise InputError(f"rotary_dim is {hf.rotary_dim}, a head has {fields['head_width']} entries")
    return fields | {"rope": Rope(fraction=hf.rotary_dim / fields["head_width"], interleaved=True)}


DEFAULTS = {
    "n_inner": None,
    "n_positions": 2048,
    "rotary_dim": 64,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
}
FAMILY = Family(
    model_type="gptj",
    architectures=("GPTJForCausalLM",),
    defaults=DEFAULTS,
    read=read,
    modules=MODULES,
    prefix="transformer.",
    ignored=(r"attn\.(masked_)?bias$",),
)
