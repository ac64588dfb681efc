"""LFM2 with experts (Liquid AI, 2025) after a few dense layers, chosen by sigmoids with a correction."""

from typing import Any

from rlae_jax.models.families import lfm2
from rlae_jax.models.families.base import Family, Modules, experts_of, refuse

_BLOCK = "model.layers.{i}.feed_forward"
MODULES: Modules = lfm2.MODULES | {
    f"{_BLOCK}.gate": "layers.{i}.ffn.router",
    f"{_BLOCK}.expert_bias": "layers.{i}.ffn.correction",
    f"{_BLOCK}.experts.{{e}}.w1": "layers.{i}.ffn.experts.gate",
    f"{_BLOCK}.experts.{{e}}.w3": "layers.{i}.ffn.experts.up",
    f"{_BLOCK}.experts.{{e}}.w2": "layers.{i}.ffn.experts.down",
}


def read(hf: Any) -> dict[str, Any]:
    """LFM2 MoE's configuration."""
    refuse(use_expert_bias=None if hf.use_expert_bias else "False")
    experts = experts_of(
        hf,
        width=hf.moe_intermediate_size,
        layers=tuple(range(hf.num_dense_layers, hf.num_hidden_layers)),
        normalised=bool(hf.norm_topk_prob),
        sigmoid=True,
        scale=float(hf.routed_scaling_factor),
    )
    return lfm2.read(hf) | {"experts": experts if experts.layers else None}


DEFAULTS = {name: value for name, value in lfm2.DEFAULTS.items() if not name.startswith("block_")}
FAMILY = Family(
    model_type="lfm2_moe",
    architectures=("Lfm2MoeForCausalLM",),
    defaults=DEFAULTS
    | {"block_auto_adjust_ff_dim": False, "num_dense_layers": 2, "num_experts_per_tok": 4}
    | {"use_expert_bias": True, "routed_scaling_factor": 1.0, "norm_topk_prob": True},
    read=read,
    modules=MODULES,
    unsuffixed=(f"{_BLOCK}.expert_bias",),
)
