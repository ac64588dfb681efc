"""Decoders with rotary positions and gated feed-forward blocks, which differ from Llama in few fields each."""

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


def sample_llama(rng: np.random.Generator) -> Case:
    fields = llama_fields(rng) | head_dim_fields(rng) | rope_fields(rng, "default", "llama3", "linear", "yarn")
    fields |= {"attention_bias": chance(rng), "mlp_bias": chance(rng)}
    if "rope_theta" in fields and "rope_scaling" not in fields and chance(rng):
        fields["partial_rotary_factor"] = 0.5  # which transformers ignores here
    return Case("LlamaForCausalLM", fields, hub=chance(rng))


def sample_mistral(rng: np.random.Generator) -> Case:
    window = pick(rng, None, between(rng, 3, 7))
    fields = llama_fields(rng) | head_dim_fields(rng) | rope_fields(rng, "default") | {"sliding_window": window}
    return Case("MistralForCausalLM", fields, hub=chance(rng))


def _qwen_windows(rng: np.random.Generator, layers: int) -> Fields:
    return {
        "use_sliding_window": chance(rng, 0.7),
        "sliding_window": between(rng, 3, 7),
        "max_window_layers": between(rng, 0, layers),
    }


def sample_qwen2(rng: np.random.Generator) -> Case:
    fields = llama_fields(rng) | rope_fields(rng, "default", "yarn")
    fields |= _qwen_windows(rng, fields["num_hidden_layers"])
    return Case("Qwen2ForCausalLM", fields, hub=chance(rng))


def sample_qwen3(rng: np.random.Generator) -> Case:
    fields = llama_fields(rng) | {"head_dim": pick(rng, 4, 6, 10)} | rope_fields(rng, "default", "yarn")
    fields |= _qwen_windows(rng, fields["num_hidden_layers"])
    return Case("Qwen3ForCausalLM", fields, hub=chance(rng))


def sample_gemma2(rng: np.random.Generator) -> Case:
    fields = llama_fields(rng) | rope_fields(rng, "default")
    fields |= {
        "head_dim": pick(rng, 4, 6, 10),
        "query_pre_attn_scalar": between(rng, 3, 24),
        "sliding_window": between(rng, 3, 7),
        "attn_logit_softcapping": pick(rng, None, 1.5, 50.0),
        "final_logit_softcapping": pick(rng, None, 4.0, 30.0),
    }
    return Case("Gemma2ForCausalLM", fields, hub=chance(rng))


def sample_gemma3_text(rng: np.random.Generator) -> Case:
    fields = llama_fields(rng)
    fields |= {
        "head_dim": pick(rng, 4, 6, 10),
        "query_pre_attn_scalar": between(rng, 3, 24),
        "sliding_window": between(rng, 3, 7),
    }
    theta, local = pick(rng, 5000.0, 1000000.0), pick(rng, 50.0, 10000.0)
    scaling = {"rope_type": "linear", "factor": pick(rng, 2.0, 8.0)} if chance(rng, 0.7) else None
    if chance(rng):
        fields |= {
            "sliding_window_pattern": pick(rng, 2, 3),
            "rope_theta": theta,
            "rope_local_base_freq": local,
            "rope_scaling": scaling,
        }
    else:
        fields |= {
            "layer_types": [pick(rng, "sliding_attention", "full_attention") for _ in range(2)] + ["full_attention"],
            "num_hidden_layers": 3,
            "rope_parameters": {
                "full_attention": {"rope_theta": theta, **(scaling or {"rope_type": "default"})},
                "sliding_attention": {"rope_theta": local, "rope_type": "default"},
            },
        }
    return Case("Gemma3ForCausalLM", fields, hub=chance(rng))


def sample_phi3(rng: np.random.Generator) -> Case:
    fields = llama_fields(rng)
    fields["sliding_window"] = pick(rng, None, between(rng, 3, 7))
    fields["rope_theta"] = pick(rng, 100.0, 10000.0)
    head = fields["hidden_size"] // fields["num_attention_heads"]
    rotated = pick(rng, *(n for n in range(2, head + 1, 2)))
    fields["partial_rotary_factor"] = rotated / head
    load = {}
    if chance(rng, 0.7):
        long = chance(rng)
        fields["original_max_position_embeddings"] = 8 if long else 96
        fields["rope_scaling"] = {
            "type": "longrope",
            "short_factor": [float(f) for f in rng.uniform(1, 1.5, rotated // 2).round(3)],
            "long_factor": [float(f) for f in rng.uniform(2, 6, rotated // 2).round(3)],
        }
        if long:
            load = {"context": fields["max_position_embeddings"]}
    return Case("Phi3ForCausalLM", fields, hub=chance(rng), load=load)


def sample_olmo2(rng: np.random.Generator) -> Case:
    return Case("Olmo2ForCausalLM", llama_fields(rng) | rope_fields(rng, "default"), hub=chance(rng))


_llama = functools.partial(case, "LlamaForCausalLM", TINY)
_LLAMA = {
    "grouped": _llama(head_dim=10, rope_parameters={"rope_type": "default", "rope_theta": 500.0}, rms_norm_eps=1e-3),
    "llama3": _llama(
        hub=True,
        head_dim=10,
        num_key_value_heads=1,
        vocab_size=37,
        tie_word_embeddings=True,
        rope_theta=500000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "linear": _llama(hub=True, head_dim=6, rope_scaling={"type": "linear", "factor": 4.0}, num_key_value_heads=4),
    "yarn": _llama(
        head_dim=16,
        num_hidden_layers=3,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 200.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 4.0,
            "beta_slow": 0.5,
            "attention_factor": 0.8,
            "truncate": False,
        },
    ),
    "biases": _llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=4),
}

_mistral = functools.partial(case, "MistralForCausalLM", TINY)
_MISTRAL = {
    "window": _mistral(hub=True, head_dim=10, sliding_window=5, rope_theta=300.0, rms_norm_eps=1e-3),
    "no_window": _mistral(head_dim=6, sliding_window=None, num_key_value_heads=1, vocab_size=53),
    "tied_window": _mistral(sliding_window=4, hidden_size=24, num_hidden_layers=3, tie_word_embeddings=True),
}

_qwen2 = functools.partial(case, "Qwen2ForCausalLM", TINY | {"hidden_size": 24})
_QWEN2 = {
    "window_above": _qwen2(
        hub=True, num_hidden_layers=3, use_sliding_window=True, sliding_window=5, max_window_layers=1, rope_theta=900.0
    ),
    # A window that is configured and not used.
    "unused_window": _qwen2(
        hub=True, use_sliding_window=False, sliding_window=3, max_window_layers=0, tie_word_embeddings=True
    ),
    "window_everywhere": _qwen2(
        head_dim=10,
        num_key_value_heads=1,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=0,
        vocab_size=29,
    ),
}

_qwen3 = functools.partial(case, "Qwen3ForCausalLM", TINY)
_QWEN3 = {
    "wide_heads": _qwen3(head_dim=10, rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}),
    "tied_windows": _qwen3(
        head_dim=6,
        num_hidden_layers=3,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "yarn": _qwen3(
        hub=True,
        head_dim=8,
        hidden_size=20,
        rms_norm_eps=1e-3,
        rope_theta=400.0,
        rope_scaling={"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 80},
    ),
}

_gemma2 = functools.partial(case, "Gemma2ForCausalLM", TINY | {"num_hidden_layers": 3})
_GEMMA2 = {
    # Ties its head and has its activation by default.
    "caps": _gemma2(
        hub=True,
        head_dim=10,
        query_pre_attn_scalar=7,
        sliding_window=5,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=6.0,
    ),
    "untied": _gemma2(
        head_dim=6,
        num_key_value_heads=1,
        query_pre_attn_scalar=20,
        sliding_window=4,
        tie_word_embeddings=False,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        rms_norm_eps=1e-3,
    ),
    "default_caps": _gemma2(head_dim=8, vocab_size=31, query_pre_attn_scalar=4, sliding_window=6, num_hidden_layers=2),
}

_gemma3 = functools.partial(case, "Gemma3ForCausalLM", TINY | {"num_hidden_layers": 3})
_GEMMA3 = {
    "pattern": _gemma3(
        hub=True,
        head_dim=10,
        query_pre_attn_scalar=12,
        sliding_window=5,
        sliding_window_pattern=2,
        rope_theta=3000.0,
        rope_local_base_freq=60.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    ),
    "layer_types": _gemma3(
        head_dim=6,
        num_key_value_heads=1,
        query_pre_attn_scalar=5,
        sliding_window=4,
        tie_word_embeddings=False,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
        },
    ),
    # Bases by default: 1000000 and 10000.
    "default_bases": _gemma3(
        hub=True, head_dim=8, vocab_size=31, query_pre_attn_scalar=8, sliding_window=6, sliding_window_pattern=3
    ),
}

_phi3 = functools.partial(case, "Phi3ForCausalLM", TINY | {"hidden_size": 24})
_FACTORS = {"short_factor": [1.0, 1.3], "long_factor": [2.5, 5.0]}
_PHI3 = {
    "window": _phi3(hub=True, sliding_window=5, rope_theta=200.0, rms_norm_eps=1e-3),
    "short": _phi3(
        hub=True,
        num_key_value_heads=1,
        hidden_size=32,
        partial_rotary_factor=0.5,
        original_max_position_embeddings=96,
        rope_theta=500.0,
        rope_scaling={"type": "longrope", **_FACTORS},
    ),
    "long": _phi3(
        load={"context": 160},
        num_key_value_heads=4,
        hidden_size=32,
        num_hidden_layers=3,
        partial_rotary_factor=0.5,
        original_max_position_embeddings=8,
        rope_theta=500.0,
        rope_scaling={"type": "longrope", **_FACTORS},
    ),
    "tied_partial": _phi3(
        head_dim=10,
        vocab_size=53,
        tie_word_embeddings=True,
        sliding_window=7,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.6},
    ),
}

_olmo2 = functools.partial(case, "Olmo2ForCausalLM", TINY)
_OLMO2 = {
    "grouped": _olmo2(hub=True, hidden_size=24, rope_theta=500.0, rms_norm_eps=1e-3),
    "multi_query": _olmo2(
        head_dim=10, num_key_value_heads=1, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}
    ),
    "tied": _olmo2(hidden_size=24, num_key_value_heads=4, num_hidden_layers=3, tie_word_embeddings=True, vocab_size=29),
}


FAMILIES = {
    "llama": Family("decoder", "llama", _LLAMA, sample_llama),
    "mistral": Family("decoder", "mistral", _MISTRAL, sample_mistral),
    "qwen2": Family("decoder", "qwen2", _QWEN2, sample_qwen2),
    "qwen3": Family("decoder", "qwen3", _QWEN3, sample_qwen3),
    "gemma2": Family("decoder", "gemma2", _GEMMA2, sample_gemma2),
    "gemma3_text": Family("decoder", "gemma3_text", _GEMMA3, sample_gemma3_text),
    "phi3": Family("decoder", "phi3", _PHI3, sample_phi3),
    "olmo2": Family("decoder", "olmo2", _OLMO2, sample_olmo2),
}
