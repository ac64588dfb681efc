"""Decoders of which some layers have a state instead of keys and values."""

import numpy as np

from tests.data.hf.cases import TINY, Case, Family, Fields, between, case, chance, llama_fields, pick, rope_fields


def _layer_types(rng: np.random.Generator, name: str) -> Fields:
    """Three or four layers of both kinds; transformers finds the length of its cache in a layer of attention."""
    kinds = [name, "full_attention", *(pick(rng, name, "full_attention") for _ in range(between(rng, 1, 2)))]
    return {"layer_types": [str(kind) for kind in rng.permutation(kinds)], "num_hidden_layers": len(kinds)}


def sample_lfm2(rng: np.random.Generator) -> Case:
    fields = llama_fields(rng) | rope_fields(rng, "default") | _layer_types(rng, "conv")
    fields["norm_eps"] = fields.pop("rms_norm_eps")
    fields |= {
        "conv_L_cache": between(rng, 2, 5),
        "block_auto_adjust_ff_dim": chance(rng),
        "block_multiple_of": pick(rng, 1, 8),
        "block_ffn_dim_multiplier": pick(rng, 1.0, 1.5),
    }
    return Case("Lfm2ForCausalLM", fields, hub=chance(rng))


def _experts(rng: np.random.Generator) -> Fields:
    number = between(rng, 3, 6)
    fields = {"num_experts": number, "num_experts_per_tok": between(rng, 1, number - 1)}
    return fields | {"moe_intermediate_size": between(rng, 5, 20)}


def sample_lfm2_moe(rng: np.random.Generator) -> Case:
    fields = sample_lfm2(rng).fields | _experts(rng)
    fields = {name: value for name, value in fields.items() if not name.startswith("block_")}
    fields |= {"num_dense_layers": between(rng, 0, fields["num_hidden_layers"] - 1), "norm_topk_prob": chance(rng, 0.7)}
    return Case("Lfm2MoeForCausalLM", fields | {"routed_scaling_factor": pick(rng, 1.0, 2.5)}, hub=chance(rng))


def delta_fields(rng: np.random.Generator) -> Fields:
    keys = between(rng, 1, 3)
    return {
        "linear_conv_kernel_dim": between(rng, 2, 5),
        "linear_key_head_dim": pick(rng, 4, 5, 8),
        "linear_value_head_dim": pick(rng, 4, 6, 8),
        "linear_num_key_heads": keys,
        "linear_num_value_heads": keys * between(rng, 1, 3),
    }


def sample_qwen3_5(rng: np.random.Generator) -> Case:
    fields = llama_fields(rng) | rope_fields(rng, "default") | delta_fields(rng)
    # What a first query reads may be near zero, and is normalised: with a small eps transformers in float32 is 1e-4 off
    # what it is in float64.
    fields |= {"head_dim": pick(rng, 8, 16), "attention_bias": chance(rng), "rms_norm_eps": 0.1}
    fields |= {"hidden_size": pick(rng, 24, 32), "intermediate_size": between(rng, 24, 40)}
    if chance(rng, 0.7):
        fields |= _layer_types(rng, "linear_attention")
    else:
        fields |= {"num_hidden_layers": 4} | ({"full_attention_interval": 2} if chance(rng) else {})
    rope = fields.get("rope_parameters")
    if rope is not None:
        rope |= {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0], "mrope_interleaved": True}
    return Case("Qwen3_5ForCausalLM", fields, hub=chance(rng))


def _shared(rng: np.random.Generator) -> Fields:
    return _experts(rng) | {"shared_expert_intermediate_size": between(rng, 5, 30)}


def sample_qwen3_5_moe(rng: np.random.Generator) -> Case:
    fields = sample_qwen3_5(rng).fields | _shared(rng)
    del fields["intermediate_size"]
    return Case("Qwen3_5MoeForCausalLM", fields, hub=chance(rng))


def sample_qwen3_next(rng: np.random.Generator) -> Case:
    fields = sample_qwen3_5(rng).fields | _shared(rng) | {"norm_topk_prob": chance(rng, 0.7)}
    if "rope_parameters" in fields:
        fields["rope_parameters"] = {k: v for k, v in fields["rope_parameters"].items() if not k.startswith("mrope")}
    dense = {"mlp_only_layers": [between(rng, 0, fields["num_hidden_layers"] - 1)]}
    return Case("Qwen3NextForCausalLM", fields | pick(rng, {}, dense, {"decoder_sparse_step": 2}), hub=chance(rng))


_DELTA: Fields = {
    "linear_key_head_dim": 5,
    "linear_value_head_dim": 6,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "head_dim": 8,
}
_MIXED: Fields = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 9}
_SHARED: Fields = _MIXED | {"shared_expert_intermediate_size": 14}
FAMILIES = {
    "lfm2": Family(
        "decoder",
        "lfm2",
        {
            "mixed": case(
                "Lfm2ForCausalLM",
                TINY | {"hidden_size": 16},
                hub=True,
                num_hidden_layers=4,
                full_attn_idxs=[1, 3],
                block_multiple_of=8,
            )
        },
        sample_lfm2,
    ),
    "qwen3_5": Family(
        "decoder",
        "qwen3_5_text",
        {"published": case("Qwen3_5ForCausalLM", TINY | _DELTA, hub=True, num_hidden_layers=4)},
        sample_qwen3_5,
    ),
    "lfm2_moe": Family(
        "decoder",
        "lfm2_moe",
        {
            "mixed": case(
                "Lfm2MoeForCausalLM",
                TINY | {"hidden_size": 16},
                hub=True,
                num_hidden_layers=4,
                layer_types=["conv", "full_attention", "conv", "full_attention"],
                num_dense_layers=1,
                **_MIXED,
            )
        },
        sample_lfm2_moe,
    ),
    "qwen3_5_moe": Family(
        "decoder",
        "qwen3_5_moe_text",
        {
            "published": case(
                "Qwen3_5MoeForCausalLM", TINY | _DELTA | _SHARED, hub=True, num_hidden_layers=4, rms_norm_eps=0.1
            )
        },
        sample_qwen3_5_moe,
    ),
    "qwen3_next": Family(
        "decoder",
        "qwen3_next",
        {
            "fused": case(
                "Qwen3NextForCausalLM", TINY | _DELTA | _SHARED, hub=True, num_hidden_layers=4, rms_norm_eps=0.1
            )
        },
        sample_qwen3_next,
    ),
}
