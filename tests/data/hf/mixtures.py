"""Decoders with mixtures of experts."""

import functools

import numpy as np

from tests.data.hf.cases import (
    TINY,
    Case,
    Family,
    Fields,
    between,
    case,
    chance,
    head_dim_fields,
    llama_fields,
    pick,
    rope_fields,
)


def _experts(rng: np.random.Generator) -> Fields:
    number = between(rng, 3, 6)
    return {"num_experts": number, "num_experts_per_tok": between(rng, 1, number - 1)}


def _local(fields: Fields) -> Fields:
    """As those call it that count experts as local ones."""
    return {"num_local_experts" if name == "num_experts" else name: value for name, value in fields.items()}


def sample_mixtral(rng: np.random.Generator) -> Case:
    fields = llama_fields(rng) | head_dim_fields(rng) | rope_fields(rng, "default") | _local(_experts(rng))
    return Case("MixtralForCausalLM", fields | {"sliding_window": pick(rng, None, between(rng, 3, 7))}, hub=chance(rng))


def _qwen_fields(rng: np.random.Generator) -> Fields:
    fields = llama_fields(rng) | rope_fields(rng, "default", "yarn") | _experts(rng)
    layers = fields["num_hidden_layers"]
    return fields | {
        "moe_intermediate_size": between(rng, 5, 20),
        "norm_topk_prob": chance(rng),
        "use_sliding_window": chance(rng),
        "sliding_window": between(rng, 3, 7),
        "max_window_layers": between(rng, 0, layers),
        **pick(rng, {}, {"decoder_sparse_step": 2}, {"mlp_only_layers": [between(rng, 0, layers - 1)]}),
    }


def sample_qwen2_moe(rng: np.random.Generator) -> Case:
    fields = _qwen_fields(rng) | {"shared_expert_intermediate_size": between(rng, 5, 30), "qkv_bias": chance(rng, 0.8)}
    return Case("Qwen2MoeForCausalLM", fields, hub=chance(rng))


def sample_qwen3_moe(rng: np.random.Generator) -> Case:
    fields = _qwen_fields(rng) | {"head_dim": pick(rng, 4, 6, 10), "attention_bias": chance(rng, 0.3)}
    return Case("Qwen3MoeForCausalLM", fields, hub=chance(rng))


def sample_olmoe(rng: np.random.Generator) -> Case:
    fields = llama_fields(rng) | rope_fields(rng, "default") | _experts(rng) | {"norm_topk_prob": chance(rng)}
    fields["clip_qkv"] = pick(rng, None, 0.8)
    return Case("OlmoeForCausalLM", fields, hub=chance(rng))


def sample_gpt_oss(rng: np.random.Generator) -> Case:
    fields = llama_fields(rng) | rope_fields(rng, "default", "yarn") | _local(_experts(rng))
    fields |= {"head_dim": pick(rng, 4, 6, 10), "sliding_window": between(rng, 3, 7)}
    fields |= {"attention_bias": chance(rng, 0.8), "swiglu_limit": pick(rng, 0.7, 7.0)}
    return Case("GptOssForCausalLM", fields, hub=chance(rng))


def sample_granitemoe(rng: np.random.Generator) -> Case:
    fields = llama_fields(rng) | rope_fields(rng, "default") | _local(_experts(rng)) | {"attention_bias": chance(rng)}
    fields |= {"embedding_multiplier": pick(rng, 1.0, 3.0), "residual_multiplier": pick(rng, 1.0, 0.4)}
    fields |= {"attention_multiplier": pick(rng, 0.1, 0.5), "logits_scaling": pick(rng, 1.0, 2.0)}
    return Case("GraniteMoeForCausalLM", fields, hub=chance(rng))


def sample_glm4_moe(rng: np.random.Generator) -> Case:
    fields = llama_fields(rng) | rope_fields(rng, "default")
    number, layers = between(rng, 3, 6), fields["num_hidden_layers"]
    fields |= {"n_routed_experts": number, "num_experts_per_tok": between(rng, 1, number - 1), "n_group": 1}
    fields |= {"topk_group": 1, "moe_intermediate_size": between(rng, 5, 20), "n_shared_experts": between(rng, 1, 2)}
    fields |= {"first_k_dense_replace": between(rng, 0, layers - 1), "routed_scaling_factor": pick(rng, 1.0, 2.5)}
    fields |= {"head_dim": pick(rng, 4, 8), "use_qk_norm": chance(rng), "attention_bias": chance(rng)}
    return Case("Glm4MoeForCausalLM", fields | {"norm_topk_prob": chance(rng, 0.7)}, hub=chance(rng))


def sample_llama4(rng: np.random.Generator) -> Case:
    """Chunks end inside the prompts."""
    fields = llama_fields(rng) | rope_fields(rng, "default", "llama3") | {"head_dim": pick(rng, 4, 6, 8)}
    number, layers = between(rng, 3, 6), between(rng, 2, 3)
    fields |= {"num_local_experts": number, "num_experts_per_tok": pick(rng, 1, 1, 2), "num_hidden_layers": layers}
    fields |= {"attention_chunk_size": between(rng, 2, 9), "intermediate_size_mlp": between(rng, 9, 40)}
    fields |= {"use_qk_norm": chance(rng, 0.7), "attn_temperature_tuning": chance(rng, 0.8)}
    fields |= {"floor_scale": between(rng, 2, 9), "attn_scale": pick(rng, 0.1, 0.5), "attention_bias": chance(rng, 0.3)}
    if chance(rng):
        fields["no_rope_layer_interval"] = 2
    else:
        fields["no_rope_layers"] = [int(chance(rng, 0.7)) for _ in range(layers)]
    fields |= pick(rng, {}, {"interleave_moe_layer_step": 2}, {"moe_layers": [between(rng, 0, layers - 1)]})
    return Case("Llama4ForCausalLM", fields, hub=chance(rng))


_mixtral = functools.partial(case, "MixtralForCausalLM", TINY | {"num_local_experts": 4})
_MIXTRAL = {
    "window": _mixtral(hub=True, sliding_window=5, hidden_size=24, rope_theta=900.0),
    "one_expert": _mixtral(head_dim=10, num_experts_per_tok=1, num_local_experts=3, tie_word_embeddings=True),
}

_qwen2_moe = functools.partial(
    case,
    "Qwen2MoeForCausalLM",
    TINY
    | {
        "hidden_size": 24,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 9,
        "shared_expert_intermediate_size": 14,
    },
)
_QWEN2_MOE = {
    "shared": _qwen2_moe(hub=True, rope_theta=900.0),
    "every_second": _qwen2_moe(num_hidden_layers=3, decoder_sparse_step=2, norm_topk_prob=True, num_experts_per_tok=3),
}

_qwen3_moe = functools.partial(
    case,
    "Qwen3MoeForCausalLM",
    TINY | {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 9, "norm_topk_prob": True},
)
_QWEN3_MOE = {
    "wide_heads": _qwen3_moe(hub=True, head_dim=10, rope_theta=1000000.0),
    "dense_layer": _qwen3_moe(head_dim=6, num_hidden_layers=3, mlp_only_layers=[1], norm_topk_prob=False),
}

_olmoe = functools.partial(
    case, "OlmoeForCausalLM", TINY | {"hidden_size": 24, "num_experts": 5, "num_experts_per_tok": 3}
)
_OLMOE = {
    "grouped": _olmoe(hub=True, rope_theta=500.0),
    "normalised": _olmoe(norm_topk_prob=True, num_key_value_heads=4, num_hidden_layers=3),
}

_gpt_oss = functools.partial(
    case, "GptOssForCausalLM", TINY | {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 8}
)
_GPT_OSS = {
    # Yarn of its own kind by default.
    "alternating": _gpt_oss(hub=True, sliding_window=5, num_hidden_layers=3),
    "clamped": _gpt_oss(
        sliding_window=4,
        swiglu_limit=0.5,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 500.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "truncate": False,
        },
    ),
}

_GRANITEMOE = {
    "multipliers": case(
        "GraniteMoeForCausalLM",
        TINY,
        hub=True,
        hidden_size=24,
        num_local_experts=4,
        num_experts_per_tok=2,
        **{"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2, "logits_scaling": 2.0},
    )
}

_GLM4_MOE = {
    "shared": case(
        "Glm4MoeForCausalLM",
        TINY,
        hub=True,
        hidden_size=24,
        head_dim=8,
        n_routed_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=9,
        routed_scaling_factor=2.0,
        use_qk_norm=True,
    )
}

_LLAMA4 = {
    # As published, but for sizes.
    "chunks": case(
        "Llama4ForCausalLM",
        TINY,
        hub=True,
        hidden_size=24,
        head_dim=8,
        num_hidden_layers=4,
        num_local_experts=5,
        intermediate_size=9,
        intermediate_size_mlp=14,
        interleave_moe_layer_step=2,
        no_rope_layers=[],
        attention_chunk_size=5,
        floor_scale=4,
        rope_theta=500.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    )
}

FAMILIES = {
    "mixtral": Family("decoder", "mixtral", _MIXTRAL, sample_mixtral),
    "qwen2_moe": Family("decoder", "qwen2_moe", _QWEN2_MOE, sample_qwen2_moe),
    "qwen3_moe": Family("decoder", "qwen3_moe", _QWEN3_MOE, sample_qwen3_moe),
    "olmoe": Family("decoder", "olmoe", _OLMOE, sample_olmoe),
    "granitemoe": Family("decoder", "granitemoe", _GRANITEMOE, sample_granitemoe),
    "glm4_moe": Family("decoder", "glm4_moe", _GLM4_MOE, sample_glm4_moe),
    "gpt_oss": Family("decoder", "gpt_oss", _GPT_OSS, sample_gpt_oss),
    "llama4": Family("decoder", "llama4_text", _LLAMA4, sample_llama4),
}
