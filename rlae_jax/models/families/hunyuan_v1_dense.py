"""Hunyuan, dense (Tencent, 2025): Llama whose queries and keys are normalised after they are rotated."""

from typing import Any

from rlae_jax.models.families import llama
from rlae_jax.models.families.base import Family, gated_rms, kind, one_rope

MODULES = llama.MODULES | {
    "model.layers.{i}.self_attn.query_layernorm": "layers.{i}.attention.q_norm",
    "model.layers.{i}.self_attn.key_layernorm": "layers.{i}.attention.k_norm",
}


def read(hf: Any) -> dict[str, Any]:
    """Hunyuan's configuration. What it calls dynamic scaling is another base, once and for all."""
    for name in ("rope_scaling", "rope_parameters"):
        fields = getattr(hf, name, None) or {}
        if kind(fields) == "dynamic" and fields.get("alpha"):
            h = hf.head_dim or hf.hidden_size // hf.num_attention_heads
            base = fields.get("rope_theta") or hf.rope_theta
            fields = {"rope_type": "default", "rope_theta": base * fields["alpha"] ** (h / (h - 2))}
            setattr(hf, name, fields)
    bias = {"qkv_bias": hf.attention_bias, "attention_out_bias": hf.attention_bias}
    return gated_rms(hf, **one_rope(hf), **bias, query_key_norm="head", norm_rotated=True)


DEFAULTS = llama.DEFAULTS | {"rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "head_dim": None}
FAMILY = Family(
    model_type="hunyuan_v1_dense",
    architectures=("HunYuanDenseV1ForCausalLM",),
    defaults=DEFAULTS,
    read=read,
    modules=MODULES,
)
