"""Qwen 3.5 and 3.6 with experts, text only (Qwen Team, 2026). Published checkpoints in bfloat16 hold the experts of a
layer as one tensor, those in fp8 and what transformers saves one by one."""

from typing import Any

from rlae_jax.models.families import qwen3_5
from rlae_jax.models.families.base import Family, experts_of
from rlae_jax.models.families.qwen2_moe import EXPERTS, SHARED

_EXPERTS = "model.layers.{i}.mlp.experts"


def read(hf: Any) -> dict[str, Any]:
    """Qwen 3.5 MoE's configuration: every layer has experts."""
    hf.intermediate_size = hf.moe_intermediate_size
    experts = experts_of(hf, shared_width=hf.shared_expert_intermediate_size, shared_gate=True)
    return qwen3_5.read(hf, experts=experts)


FAMILY = Family(
    model_type="qwen3_5_moe_text",
    architectures=("Qwen3_5MoeForCausalLM",),
    defaults=qwen3_5.DEFAULTS | {"num_key_value_heads": 2, "num_experts_per_tok": 8},
    read=read,
    modules=qwen3_5.MODULES | EXPERTS | SHARED,
    stacked={
        f"{_EXPERTS}.gate_up_proj": ("layers.{i}.ffn.experts.gate", "layers.{i}.ffn.experts.up"),
        f"{_EXPERTS}.down_proj": "layers.{i}.ffn.experts.down",
    },
    fused_by_head=qwen3_5.FAMILY.fused_by_head,
    unsuffixed=qwen3_5.FAMILY.unsuffixed,
    ignored=qwen3_5.FAMILY.ignored,
)
