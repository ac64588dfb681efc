"""Qwen 3 Next (Qwen Team, 2025): Qwen 3.5's layers with many small experts, and linear attention's maps fused."""

from typing import Any

from rlae_jax.models.families import qwen3_5
from rlae_jax.models.families.base import Family, Modules
from rlae_jax.models.families.qwen2_moe import EXPERTS, SHARED, qwen_experts

_FUSED: dict[str, tuple[str, ...]] = {
    "model.layers.{i}.linear_attn.in_proj_qkvz": ("q", "k", "v", "gate"),
    "model.layers.{i}.linear_attn.in_proj_ba": ("strength", "decay"),
}
MODULES: Modules = (
    {name: ours for name, ours in qwen3_5.MODULES.items() if ".in_proj_" not in name}
    | {name: tuple(f"layers.{{i}}.recurrence.{part}" for part in parts) for name, parts in _FUSED.items()}
    | EXPERTS
    | SHARED
)


def read(hf: Any) -> dict[str, Any]:
    """Qwen 3 Next's configuration."""
    experts = qwen_experts(hf, shared_width=hf.shared_expert_intermediate_size, shared_gate=True)
    return qwen3_5.read(hf, experts=experts)


FAMILY = Family(
    model_type="qwen3_next",
    architectures=("Qwen3NextForCausalLM",),
    defaults=qwen3_5.DEFAULTS
    | {"num_key_value_heads": 2, "num_experts_per_tok": 10, "norm_topk_prob": True}
    | {"decoder_sparse_step": 1, "mlp_only_layers": None},
    read=read,
    modules=MODULES,
    fused_by_head=(*qwen3_5.FAMILY.fused_by_head, *_FUSED),
    unsuffixed=qwen3_5.FAMILY.unsuffixed,
    ignored=qwen3_5.FAMILY.ignored,
)
