"""GLM 4.5 and 4.6 (Zeng et al., 2025): experts after a few dense layers, chosen by sigmoids with a correction."""

from typing import Any

from rlae_jax.models.families.base import Family, experts_of, gated_rms, one_rope, refuse
from rlae_jax.models.families.llama import DEFAULTS as LLAMA_DEFAULTS
from rlae_jax.models.families.llama import MODULES as LLAMA_MODULES
from rlae_jax.models.families.qwen2_moe import EXPERTS
from rlae_jax.models.families.qwen3 import NORMS

_CORRECTION = "model.layers.{i}.mlp.gate.e_score_correction_bias"
_SHARED = {
    f"model.layers.{{i}}.mlp.shared_experts.{name}_proj": f"layers.{{i}}.ffn.shared.{name}"
    for name in ("gate", "up", "down")
}


def read(hf: Any) -> dict[str, Any]:
    """GLM 4 MoE's configuration."""
    refuse(n_group=None if hf.n_group == 1 else hf.n_group)
    experts = experts_of(
        hf,
        width=hf.moe_intermediate_size,
        layers=tuple(range(hf.first_k_dense_replace, hf.num_hidden_layers)),
        normalised=bool(hf.norm_topk_prob),
        sigmoid=True,
        scale=float(hf.routed_scaling_factor),
        shared_width=hf.n_shared_experts * hf.moe_intermediate_size,
    )
    norm = "head" if hf.use_qk_norm else None
    return gated_rms(hf, **one_rope(hf, partial=True), qkv_bias=hf.attention_bias, query_key_norm=norm, experts=experts)


DEFAULTS = {name: value for name, value in LLAMA_DEFAULTS.items() if name != "mlp_bias"}
FAMILY = Family(
    model_type="glm4_moe",
    architectures=("Glm4MoeForCausalLM",),
    defaults=DEFAULTS
    | {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 131_072, "use_qk_norm": False}
    | {"num_experts_per_tok": 8, "n_shared_experts": 1, "routed_scaling_factor": 1.0, "n_group": 1}
    | {"first_k_dense_replace": 1, "norm_topk_prob": True, "partial_rotary_factor": 0.5},
    read=read,
    modules=LLAMA_MODULES | EXPERTS | _SHARED | NORMS | {_CORRECTION: "layers.{i}.ffn.correction"},
    unsuffixed=(_CORRECTION,),
    ignored=(r"^model\.layers\.(46|92)\.",),  # that predict several tokens ahead
)
