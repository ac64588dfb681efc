"""OLMoE (Muennighoff et al., 2024): experts in every layer, norms over all queries and all keys."""

from typing import Any

from rlae_jax.models.families.base import Family, experts_of, gated_rms, one_rope
from rlae_jax.models.families.llama import DEFAULTS as LLAMA_DEFAULTS
from rlae_jax.models.families.mixtral import ATTENTION
from rlae_jax.models.families.qwen2_moe import EXPERTS
from rlae_jax.models.families.qwen3 import NORMS


def read(hf: Any) -> dict[str, Any]:
    """OLMoE's configuration."""
    bias = {"qkv_bias": hf.attention_bias, "attention_out_bias": hf.attention_bias}
    experts = experts_of(hf, normalised=bool(hf.norm_topk_prob))
    return gated_rms(hf, **one_rope(hf), **bias, query_key_norm="all", qkv_clip=hf.clip_qkv, experts=experts)


FAMILY = Family(
    model_type="olmoe",
    architectures=("OlmoeForCausalLM",),
    defaults=LLAMA_DEFAULTS
    | {
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "clip_qkv": None,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    read=read,
    modules=ATTENTION | EXPERTS | NORMS,
)
