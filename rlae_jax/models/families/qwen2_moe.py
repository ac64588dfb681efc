"""Qwen 1.5 and 2 with experts (Yang et al., 2024): many small experts beside one that every token takes."""

from typing import Any

from rlae_jax.models.config import Experts
from rlae_jax.models.families.base import LOCAL, Family, experts_of, gated_rms, one_rope, windows
from rlae_jax.models.families.llama import MODULES as LLAMA_MODULES
from rlae_jax.models.families.qwen2 import DEFAULTS as QWEN2_DEFAULTS

_LINEARS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
EXPERTS = {"model.layers.{i}.mlp.gate": "layers.{i}.ffn.router"} | {
    f"model.layers.{{i}}.mlp.experts.{{e}}.{name}": f"layers.{{i}}.ffn.experts.{ours}"
    for name, ours in _LINEARS.items()
}
SHARED = {"model.layers.{i}.mlp.shared_expert_gate": "layers.{i}.ffn.shared_gate"} | {
    f"model.layers.{{i}}.mlp.shared_expert.{name}": f"layers.{{i}}.ffn.shared.{ours}" for name, ours in _LINEARS.items()
}
DEFAULTS = QWEN2_DEFAULTS | {
    "num_key_value_heads": 16,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "norm_topk_prob": False,
    "num_experts_per_tok": 4,
    "qkv_bias": True,
}


def qwen_experts(hf: Any, **fields: Any) -> Experts | None:
    """Experts in every n-th layer but those that are named as dense."""
    dense = hf.mlp_only_layers or ()
    step = hf.decoder_sparse_step
    sparse = tuple(i for i in range(hf.num_hidden_layers) if i not in dense and (i + 1) % step == 0)
    if not sparse:
        return None
    normalised = bool(hf.norm_topk_prob)
    return experts_of(hf, width=hf.moe_intermediate_size, layers=sparse, normalised=normalised, **fields)


def _layer_types(hf: Any) -> list[str]:
    """Every other layer below `max_window_layers` is local, which transformers counts here otherwise than in Qwen 2."""
    given = getattr(hf, "layer_types", None)
    local = [i % 2 == 0 and i < hf.max_window_layers for i in range(hf.num_hidden_layers)]
    return given or [LOCAL if here else "full_attention" for here in local]


def read(hf: Any) -> dict[str, Any]:
    """Qwen 2 MoE's configuration."""
    local = windows(hf, _layer_types(hf)) if hf.use_sliding_window else {}
    experts = qwen_experts(hf, shared_width=hf.shared_expert_intermediate_size, shared_gate=True)
    return gated_rms(hf, **one_rope(hf), **local, qkv_bias=hf.qkv_bias, experts=experts)


FAMILY = Family(
    model_type="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    defaults=DEFAULTS,
    read=read,
    modules=LLAMA_MODULES | EXPERTS | SHARED,
)
