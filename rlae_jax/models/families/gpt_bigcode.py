"""StarCoder and SantaCoder (Li et al., 2023): GPT-2 whose query heads share one key head, stored outputs first."""

from typing import Any

from rlae_jax.models.families import gpt2
from rlae_jax.models.families.base import Family


def read(hf: Any) -> dict[str, Any]:
    """StarCoder's configuration."""
    return gpt2.read(hf) | ({"kv_heads": 1} if hf.multi_query else {})


FAMILY = Family(
    model_type="gpt_bigcode",
    architectures=("GPTBigCodeForCausalLM",),
    defaults=gpt2.DEFAULTS | {"activation_function": "gelu_pytorch_tanh", "multi_query": True},
    read=read,
    modules=gpt2.MODULES,
    prefix="transformer.",
    fused_by_head=("transformer.h.{i}.attn.c_attn",),
    ignored=(r"h\.\d+\.attn\.(masked_)?bias$",),
)
