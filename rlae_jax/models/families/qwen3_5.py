"""Qwen 3.5, text only (Qwen Team, 2026): three layers of linear attention with the gated delta rule for every layer of
attention, whose output is gated."""

from typing import Any

from rlae_jax.models.config import GatedDelta
from rlae_jax.models.families.base import Family, gated_rms, layers_of, one_rope
from rlae_jax.models.families.llama import MODULES as LLAMA_MODULES
from rlae_jax.models.families.qwen3 import NORMS

_ATTENTION, _RECURRENCE = "layers.{i}.attention", "layers.{i}.recurrence"
_OWN: dict[str, str | tuple[str, ...]] = {
    "model.layers.{i}.self_attn.q_proj": (f"{_ATTENTION}.q", f"{_ATTENTION}.gate"),
    "model.layers.{i}.linear_attn.in_proj_qkv": tuple(f"{_RECURRENCE}.{part}" for part in "qkv"),
    "model.layers.{i}.linear_attn.in_proj_z": f"{_RECURRENCE}.gate",
    "model.layers.{i}.linear_attn.in_proj_b": f"{_RECURRENCE}.strength",
    "model.layers.{i}.linear_attn.in_proj_a": f"{_RECURRENCE}.decay",
    "model.layers.{i}.linear_attn.dt_bias": f"{_RECURRENCE}.decay_bias",
    "model.layers.{i}.linear_attn.A_log": f"{_RECURRENCE}.log_rate",
    "model.layers.{i}.linear_attn.conv1d": f"{_RECURRENCE}.convolution",
    "model.layers.{i}.linear_attn.norm": f"{_RECURRENCE}.head_norm",
    "model.layers.{i}.linear_attn.out_proj": f"{_RECURRENCE}.o",
}
MODULES = {**LLAMA_MODULES, **NORMS, **_OWN}


def linear_attention(hf: Any) -> GatedDelta | None:
    """The layers of linear attention, by their types or all but every n-th."""
    layers, each = hf.num_hidden_layers, getattr(hf, "full_attention_interval", 4)
    kinds = hf.layer_types or ["linear_attention" if (i + 1) % each else "full_attention" for i in range(layers)]
    found = layers_of(hf, "linear_attention", kinds)
    if not found:
        return None
    return GatedDelta(
        layers=found,
        taps=hf.linear_conv_kernel_dim,
        key_heads=hf.linear_num_key_heads,
        heads=hf.linear_num_value_heads,
        key_width=hf.linear_key_head_dim,
        value_width=hf.linear_value_head_dim,
    )


def read(hf: Any, **fields: Any) -> dict[str, Any]:
    """Qwen 3.5's configuration."""
    return gated_rms(
        hf,
        **one_rope(hf, partial=True),
        qkv_bias=hf.attention_bias,
        attention_out_bias=hf.attention_bias,
        query_key_norm="head",
        norm_offset=1.0,
        attention_gate=True,
        recurrent=linear_attention(hf),
        **fields,
    )


DEFAULTS = {
    "hidden_act": "silu",
    "num_key_value_heads": 4,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "partial_rotary_factor": 0.25,
    "layer_types": None,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
FAMILY = Family(
    model_type="qwen3_5_text",
    architectures=("Qwen3_5ForCausalLM",),
    defaults=DEFAULTS,
    read=read,
    modules=MODULES,
    fused_by_head=("model.layers.{i}.self_attn.q_proj",),
    unsuffixed=("model.layers.{i}.linear_attn.dt_bias", "model.layers.{i}.linear_attn.A_log"),
    ignored=(r"^mtp\.",),  # layers that predict several tokens at once
)
