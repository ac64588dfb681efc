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


_DELTA: Fields = {
    "linear_key_head_dim": 5,
    "linear_value_head_dim": 6,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "head_dim": 8,
}
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
}
