"""Command R (Cohere, 2024): parallel branches that read one layer norm without bias, neighbouring rotary pairs."""

from typing import Any

from rlae_jax.models.families.base import Family, activation, common, one_rope
from rlae_jax.models.families.llama import MODULES as LLAMA_MODULES
from rlae_jax.models.families.qwen3 import NORMS

MODULES = LLAMA_MODULES | NORMS


def cohere(hf: Any, **fields: Any) -> dict[str, Any]:
    """What Command R and its successors share."""
    return common(
        hf,
        **one_rope(hf, interleaved=True),
        ffn_width=hf.intermediate_size,
        norm="layer",
        norm_eps=hf.layer_norm_eps,
        norm_bias=False,
        parallel_branches=True,
        shared_norm=True,
        activation=activation(hf.hidden_act),
        qkv_bias=hf.attention_bias,
        attention_out_bias=hf.attention_bias,
        logit_scale=hf.logit_scale,
        **fields,
    )


def read(hf: Any) -> dict[str, Any]:
    """Command R's configuration; the larger model normalises queries and keys."""
    return cohere(hf, query_key_norm="heads" if hf.use_qk_norm else None)


DEFAULTS = {
    "hidden_act": "silu",
    "layer_norm_eps": 1e-5,
    "logit_scale": 0.0625,
    "rope_theta": 500_000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "use_qk_norm": False,
}
FAMILY = Family(
    model_type="cohere", architectures=("CohereForCausalLM",), defaults=DEFAULTS, read=read, modules=MODULES
)
