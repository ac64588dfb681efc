"""Decoders of 2024 to 2026 that differ from Llama in a few fields each: layers without positions, norms after branches,
multipliers, neighbouring rotary pairs."""

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

_FULL, _LOCAL = "full_attention", "sliding_attention"


def _layer_types(rng: np.random.Generator, fields: Fields) -> Fields:
    """Any kinds of layers, the last one without a window."""
    return {"layer_types": [pick(rng, _LOCAL, _FULL) for _ in range(fields["num_hidden_layers"] - 1)] + [_FULL]}


def _plain_heads(fields: Fields) -> Fields:
    """Of models whose heads share the width."""
    return {"head_dim": fields["hidden_size"] // fields["num_attention_heads"]}


def sample_gemma(rng: np.random.Generator) -> Case:
    fields = llama_fields(rng) | {"head_dim": pick(rng, 4, 6, 10)} | rope_fields(rng, "default")
    fields |= {"hidden_act": pick(rng, "gelu", "gelu_pytorch_tanh"), "attention_bias": chance(rng)}
    return Case("GemmaForCausalLM", fields, hub=chance(rng))


def sample_gemma4_text(rng: np.random.Generator) -> Case:
    fields = llama_fields(rng) | {"num_hidden_layers": 4}
    kinds = [_LOCAL, _FULL, pick(rng, _LOCAL, _FULL), _FULL]
    fields |= {
        # Scores are not scaled and much is normalised: narrower ones amplify what float32 rounds a hundredfold.
        "hidden_size": pick(rng, 24, 32),
        "layer_types": kinds,
        "head_dim": pick(rng, 4, 6),
        "global_head_dim": pick(rng, 4, 6, 8),
        "sliding_window": between(rng, 3, 7),
        "hidden_size_per_layer_input": 0,
        "use_double_wide_mlp": chance(rng),
        "attention_k_eq_v": chance(rng),
        "final_logit_softcapping": pick(rng, None, 4.0, 30.0),
    }
    if chance(rng):
        fields["num_global_key_value_heads"] = 1
    if chance(rng, 0.7):
        # transformers cannot generate where layers share keys and values and have no inputs of their own.
        fields |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": fields["vocab_size"]}
        fields["num_kv_shared_layers"] = between(rng, 0, 2)
    return Case("Gemma4ForCausalLM", fields, hub=chance(rng))


def sample_smollm3(rng: np.random.Generator) -> Case:
    fields = llama_fields(rng) | head_dim_fields(rng) | rope_fields(rng, "default", "yarn")
    fields |= {"attention_bias": chance(rng), "mlp_bias": chance(rng)}
    if chance(rng):
        fields["no_rope_layer_interval"] = 2
    else:
        fields["no_rope_layers"] = [int(chance(rng)) for _ in range(fields["num_hidden_layers"])]
    if chance(rng):
        fields |= {"use_sliding_window": True, "sliding_window": between(rng, 3, 7)}
    return Case("SmolLM3ForCausalLM", fields, hub=chance(rng))


def sample_olmo3(rng: np.random.Generator) -> Case:
    fields = llama_fields(rng) | {"sliding_window": between(rng, 3, 7)}
    theta = pick(rng, 300.0, 500000.0)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    scaling = yarn if chance(rng, 0.7) else None
    if chance(rng):
        fields |= {"rope_theta": theta} | ({} if scaling is None else {"rope_scaling": scaling})
    else:
        ropes = {_FULL: {"rope_theta": theta, **(scaling or {"rope_type": "default"})}}
        fields |= {"rope_parameters": ropes | {_LOCAL: {"rope_theta": 70.0, "rope_type": "default"}}}
    if chance(rng):
        fields |= _layer_types(rng, fields)
    return Case("Olmo3ForCausalLM", fields, hub=chance(rng))


def sample_olmo(rng: np.random.Generator) -> Case:
    fields = llama_fields(rng) | rope_fields(rng, "default")
    fields |= {"attention_bias": chance(rng), "clip_qkv": pick(rng, None, 0.5)}
    return Case("OlmoForCausalLM", fields, hub=chance(rng))


def sample_granite(rng: np.random.Generator) -> Case:
    fields = llama_fields(rng) | head_dim_fields(rng) | rope_fields(rng, "default", "llama3")
    fields |= {
        "attention_bias": chance(rng),
        "mlp_bias": chance(rng),
        "embedding_multiplier": pick(rng, 1.0, 3.0, 12.0),
        "attention_multiplier": pick(rng, 0.015625, 0.4),
        "residual_multiplier": pick(rng, 0.22, 0.8),
        "logits_scaling": pick(rng, 8.0, 10.0),
    }
    return Case("GraniteForCausalLM", fields, hub=chance(rng))


def _glm(rng: np.random.Generator) -> Fields:
    fields = llama_fields(rng) | {"head_dim": pick(rng, 4, 8, 12)} | rope_fields(rng, "default")
    fields |= {"partial_rotary_factor": 1.0} if chance(rng, 0.3) else {}
    return fields | {"attention_bias": chance(rng)}


def sample_glm(rng: np.random.Generator) -> Case:
    return Case("GlmForCausalLM", _glm(rng), hub=chance(rng))


def sample_glm4(rng: np.random.Generator) -> Case:
    return Case("Glm4ForCausalLM", _glm(rng), hub=chance(rng))


def sample_ministral(rng: np.random.Generator) -> Case:
    # transformers itself cannot do without `head_dim` here.
    fields = llama_fields(rng) | {"head_dim": pick(rng, 4, 6, 10)} | rope_fields(rng, "default")
    fields |= {"sliding_window": between(rng, 3, 7)} | (_layer_types(rng, fields) if chance(rng) else {})
    return Case("MinistralForCausalLM", fields, hub=chance(rng))


def sample_ministral3(rng: np.random.Generator) -> Case:
    fields = llama_fields(rng) | {"head_dim": pick(rng, 4, 6, 10), "sliding_window": pick(rng, None, 5)}
    fields["rope_parameters"] = {
        "type": "yarn",
        "rope_theta": pick(rng, 1000.0, 1000000.0),
        "factor": pick(rng, 4.0, 16.0),
        "original_max_position_embeddings": pick(rng, 8, 32),
        "max_position_embeddings": fields["max_position_embeddings"],
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": pick(rng, 0.1, 0.7),
    }
    return Case("Ministral3ForCausalLM", fields, hub=chance(rng))


def sample_exaone4(rng: np.random.Generator) -> Case:
    fields = llama_fields(rng) | head_dim_fields(rng) | rope_fields(rng, "default", "llama3")
    kind = pick(rng, "none", "pattern", "types")
    if kind == "none":
        fields |= {"sliding_window": None, "layer_types": [_FULL] * fields["num_hidden_layers"]}
    else:
        fields |= {"sliding_window": between(rng, 3, 7)}
        fields |= {"sliding_window_pattern": 2} if kind == "pattern" else _layer_types(rng, fields)
    return Case("Exaone4ForCausalLM", fields, hub=chance(rng))


def _cohere(rng: np.random.Generator) -> Fields:
    fields = llama_fields(rng) | rope_fields(rng, "default")
    del fields["rms_norm_eps"]
    return fields | {
        "layer_norm_eps": pick(rng, 1e-5, 1e-3),
        "logit_scale": pick(rng, 0.0625, 0.25),
        "attention_bias": chance(rng),
    }


def sample_cohere(rng: np.random.Generator) -> Case:
    return Case("CohereForCausalLM", _cohere(rng) | {"use_qk_norm": chance(rng)}, hub=chance(rng))


def sample_cohere2(rng: np.random.Generator) -> Case:
    fields = _cohere(rng) | {"sliding_window": between(rng, 3, 7)}
    fields |= {"sliding_window_pattern": 2} if chance(rng) else _layer_types(rng, fields)
    return Case("Cohere2ForCausalLM", fields, hub=chance(rng))


def sample_seed_oss(rng: np.random.Generator) -> Case:
    fields = llama_fields(rng) | {"head_dim": pick(rng, 4, 6, 10)} | rope_fields(rng, "default")
    fields |= {name: chance(rng) for name in ("attention_bias", "attention_out_bias", "mlp_bias")}
    return Case("SeedOssForCausalLM", fields, hub=chance(rng))


def sample_helium(rng: np.random.Generator) -> Case:
    fields = llama_fields(rng) | rope_fields(rng, "default")
    fields |= _plain_heads(fields) | {"attention_bias": chance(rng), "mlp_bias": chance(rng)}
    return Case("HeliumForCausalLM", fields, hub=chance(rng))


def sample_arcee(rng: np.random.Generator) -> Case:
    fields = llama_fields(rng) | head_dim_fields(rng) | rope_fields(rng, "default", "yarn")
    fields |= {"attention_bias": chance(rng), "mlp_bias": chance(rng)}
    return Case("ArceeForCausalLM", fields, hub=chance(rng))


def sample_granitemoehybrid(rng: np.random.Generator) -> Case:
    fields = sample_granite(rng).fields
    fields |= {
        "layer_types": [pick(rng, "attention", "full_attention")] * fields["num_hidden_layers"],
        "num_local_experts": 0,
        "shared_intermediate_size": between(rng, 9, 40),
        "position_embedding_type": pick(rng, "rope", "nope"),
        # transformers checks the sizes of state-space layers, which there are none of.
        "mamba_n_heads": 2,
        "mlp_bias": False,
    }
    return Case("GraniteMoeHybridForCausalLM", fields, hub=chance(rng))


def sample_ernie4_5(rng: np.random.Generator) -> Case:
    fields = (
        llama_fields(rng) | {"head_dim": pick(rng, 4, 6, 10), "use_bias": chance(rng)} | rope_fields(rng, "default")
    )
    return Case("Ernie4_5ForCausalLM", fields, hub=chance(rng))


def sample_hunyuan_v1_dense(rng: np.random.Generator) -> Case:
    fields = llama_fields(rng) | {"head_dim": pick(rng, 4, 6, 10), "attention_bias": chance(rng)}
    scaling = {"type": "dynamic", "alpha": pick(rng, 10.0, 1000.0), "factor": 1.0} if chance(rng) else None
    fields |= {"rope_theta": pick(rng, 100.0, 10000.0), "rope_scaling": scaling}
    return Case("HunYuanDenseV1ForCausalLM", fields, hub=chance(rng))


def sample_vaultgemma(rng: np.random.Generator) -> Case:
    fields = llama_fields(rng) | rope_fields(rng, "default")
    fields |= {
        "head_dim": pick(rng, 4, 6, 10),
        "query_pre_attn_scalar": between(rng, 3, 24),
        "sliding_window": between(rng, 3, 7),
        "attn_logit_softcapping": pick(rng, None, 1.5),
        "final_logit_softcapping": pick(rng, None, 4.0),
    }
    return Case("VaultGemmaForCausalLM", fields, hub=chance(rng))


def sample_cwm(rng: np.random.Generator) -> Case:
    fields = llama_fields(rng) | {"head_dim": pick(rng, 4, 6, 10), "sliding_window": between(rng, 3, 7)}
    fields |= {"mlp_bias": chance(rng)} | rope_fields(rng, "default", "llama3")
    fields |= _layer_types(rng, fields) if chance(rng) else {}
    return Case("CwmForCausalLM", fields, hub=chance(rng))


_wide: Fields = TINY | {"hidden_size": 24}
_tall: Fields = _wide | {"num_hidden_layers": 3}

FAMILIES = {
    "gemma": Family(
        "decoder",
        "gemma",
        # Published with the name of the exact gelu, which is not meant.
        {"gelu": case("GemmaForCausalLM", TINY, hub=True, head_dim=10, hidden_act="gelu", num_key_value_heads=1)},
        sample_gemma,
    ),
    "gemma4_text": Family(
        "decoder",
        "gemma4_text",
        {
            "readers": case(
                "Gemma4ForCausalLM",
                _wide,
                hub=True,
                num_hidden_layers=4,
                layer_types=[_LOCAL, _FULL, _LOCAL, _FULL],
                head_dim=4,
                global_head_dim=6,
                num_global_key_value_heads=1,
                attention_k_eq_v=True,
                num_kv_shared_layers=2,
                use_double_wide_mlp=True,
                hidden_size_per_layer_input=8,
                vocab_size_per_layer_input=41,
                sliding_window=5,
            )
        },
        sample_gemma4_text,
    ),
    "smollm3": Family(
        "decoder",
        "smollm3",
        {
            "windows": case(
                "SmolLM3ForCausalLM",
                _tall,
                hub=True,
                no_rope_layer_interval=2,
                use_sliding_window=True,
                sliding_window=5,
                rope_theta=900.0,
            )
        },
        sample_smollm3,
    ),
    "olmo": Family("decoder", "olmo", {"clipped": case("OlmoForCausalLM", _wide, hub=True, clip_qkv=0.7)}, sample_olmo),
    "olmo3": Family(
        "decoder",
        "olmo3",
        {
            "stretched": case(
                "Olmo3ForCausalLM",
                _tall,
                hub=True,
                sliding_window=5,
                layer_types=[_LOCAL, _FULL, _LOCAL],
                rope_theta=300.0,
                rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
            )
        },
        sample_olmo3,
    ),
    "granite": Family(
        "decoder",
        "granite",
        {
            "multipliers": case(
                "GraniteForCausalLM",
                _wide,
                hub=True,
                embedding_multiplier=3.0,
                attention_multiplier=0.3,
                residual_multiplier=0.8,
                logits_scaling=0.5,
            )
        },
        sample_granite,
    ),
    "granitemoehybrid": Family(
        "decoder",
        "granitemoehybrid",
        {
            "dense": case(
                "GraniteMoeHybridForCausalLM",
                _wide,
                hub=True,
                layer_types=["attention"] * 2,
                num_local_experts=0,
                shared_intermediate_size=22,
                position_embedding_type="rope",
                mamba_n_heads=2,
                embedding_multiplier=3.0,
                attention_multiplier=0.3,
                residual_multiplier=0.8,
                logits_scaling=0.5,
            )
        },
        sample_granitemoehybrid,
    ),
    "ernie4_5": Family(
        "decoder", "ernie4_5", {"pairs": case("Ernie4_5ForCausalLM", TINY, head_dim=6)}, sample_ernie4_5
    ),
    "glm": Family("decoder", "glm", {"half": case("GlmForCausalLM", _wide, hub=True, head_dim=8)}, sample_glm),
    "glm4": Family(
        "decoder", "glm4", {"half": case("Glm4ForCausalLM", _wide, head_dim=12, attention_bias=False)}, sample_glm4
    ),
    "ministral": Family(
        "decoder",
        "ministral",
        {
            "windows": case(
                "MinistralForCausalLM", _tall, head_dim=10, sliding_window=5, layer_types=[_LOCAL, _FULL, _LOCAL]
            )
        },
        sample_ministral,
    ),
    "ministral3": Family(
        "decoder",
        "ministral3",
        {
            "growing": case(
                "Ministral3ForCausalLM",
                TINY,
                hub=True,
                head_dim=10,
                rope_parameters={
                    "type": "yarn",
                    "rope_theta": 1000.0,
                    "factor": 16.0,
                    "original_max_position_embeddings": 8,
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "mscale": 1.0,
                    "mscale_all_dim": 1.0,
                    "llama_4_scaling_beta": 0.4,
                },
            )
        },
        sample_ministral3,
    ),
    "exaone4": Family(
        "decoder",
        "exaone4",
        {"windows": case("Exaone4ForCausalLM", _tall, hub=True, sliding_window=5, sliding_window_pattern=2)},
        sample_exaone4,
    ),
    "cohere": Family(
        "decoder",
        "cohere",
        {"norms": case("CohereForCausalLM", _wide, hub=True, use_qk_norm=True, logit_scale=2.0)},
        sample_cohere,
    ),
    "cohere2": Family(
        "decoder",
        "cohere2",
        {
            "windows": case(
                "Cohere2ForCausalLM", _tall, hub=True, sliding_window=5, sliding_window_pattern=3, logit_scale=2.0
            )
        },
        sample_cohere2,
    ),
    "seed_oss": Family(
        "decoder", "seed_oss", {"biases": case("SeedOssForCausalLM", TINY, hub=True, head_dim=6)}, sample_seed_oss
    ),
    "helium": Family("decoder", "helium", {"pairs": case("HeliumForCausalLM", _wide, head_dim=6)}, sample_helium),
    "hunyuan_v1_dense": Family(
        "decoder",
        "hunyuan_v1_dense",
        {
            "alpha": case(
                "HunYuanDenseV1ForCausalLM",
                TINY,
                hub=True,
                head_dim=10,
                rope_scaling={"type": "dynamic", "alpha": 100.0, "factor": 1.0},
            )
        },
        sample_hunyuan_v1_dense,
    ),
    "vaultgemma": Family(
        "decoder",
        "vaultgemma",
        {"caps": case("VaultGemmaForCausalLM", TINY, hub=True, head_dim=10, query_pre_attn_scalar=7, sliding_window=5)},
        sample_vaultgemma,
    ),
    "cwm": Family(
        "decoder", "cwm", {"windows": case("CwmForCausalLM", TINY, head_dim=6, sliding_window=5)}, sample_cwm
    ),
    "arcee": Family("decoder", "arcee", {"squares": case("ArceeForCausalLM", _wide, hub=True)}, sample_arcee),
}
