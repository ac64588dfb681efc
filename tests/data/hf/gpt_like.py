"""Decoders with layer norms, most of them with biases and a plain feed-forward."""

import dataclasses
import functools

import numpy as np

from tests.data.hf.cases import (
    IDS,
    TINY,
    Case,
    Family,
    Fields,
    between,
    case,
    chance,
    llama_fields,
    pick,
    rope_fields,
    vocabulary_fields,
)


def sample_gpt2(rng: np.random.Generator) -> Case:
    heads = between(rng, 2, 4)
    fields = {
        **vocabulary_fields(rng),
        "n_head": heads,
        "n_embd": heads * between(rng, 4, 8),
        "n_layer": between(rng, 2, 3),
        "n_positions": between(rng, 128, 140),
        "n_inner": pick(rng, None, between(rng, 9, 40)),
        "layer_norm_epsilon": pick(rng, 1e-5, 1e-3),
        "activation_function": pick(rng, "gelu_new", "gelu", "relu"),
        "scale_attn_weights": chance(rng),
        "scale_attn_by_inverse_layer_idx": chance(rng),
        "tie_word_embeddings": chance(rng),
    }
    return Case("GPT2LMHeadModel", fields, hub=chance(rng))


def sample_gpt_neo(rng: np.random.Generator) -> Case:
    heads, layers = between(rng, 2, 4), between(rng, 2, 3)
    fields = {
        **vocabulary_fields(rng),
        "num_heads": heads,
        "hidden_size": heads * between(rng, 4, 8),
        "num_layers": layers,
        "attention_types": [[["local"], 1], [["global"], layers - 1]] if chance(rng) else [[["global"], layers]],
        "max_position_embeddings": between(rng, 128, 140),
        "intermediate_size": pick(rng, None, between(rng, 9, 40)),
        "window_size": between(rng, 3, 7),
        "layer_norm_epsilon": pick(rng, 1e-5, 1e-3),
        "tie_word_embeddings": chance(rng),
    }
    return Case("GPTNeoForCausalLM", fields, hub=chance(rng))


def sample_gpt_bigcode(rng: np.random.Generator) -> Case:
    fields = sample_gpt2(rng).fields | {"multi_query": chance(rng)}
    del fields["scale_attn_by_inverse_layer_idx"]
    return Case("GPTBigCodeForCausalLM", fields, hub=chance(rng))


def sample_gpt_neox(rng: np.random.Generator) -> Case:
    heads = between(rng, 2, 4)
    head = pick(rng, 4, 8)
    fields = {
        **vocabulary_fields(rng),
        "num_attention_heads": heads,
        "hidden_size": heads * head,
        "intermediate_size": between(rng, 9, 40),
        "num_hidden_layers": between(rng, 2, 3),
        "max_position_embeddings": between(rng, 128, 200),
        "layer_norm_eps": pick(rng, 1e-5, 1e-3),
        "hidden_act": pick(rng, "gelu", "gelu_fast"),
        "use_parallel_residual": chance(rng),
        "attention_bias": chance(rng),
        "rotary_pct": pick(rng, 0.5, 1.0),
        "rotary_emb_base": pick(rng, 100, 10000),
        "tie_word_embeddings": chance(rng),
    }
    return Case("GPTNeoXForCausalLM", fields, hub=chance(rng))


def sample_opt(rng: np.random.Generator) -> Case:
    heads = between(rng, 2, 4)
    width = heads * between(rng, 4, 8)
    fields = {
        **vocabulary_fields(rng),
        "num_attention_heads": heads,
        "hidden_size": width,
        "word_embed_proj_dim": pick(rng, width, between(rng, 6, 20)),
        "ffn_dim": between(rng, 9, 40),
        "num_hidden_layers": between(rng, 2, 3),
        "max_position_embeddings": between(rng, 128, 140),
        "activation_function": pick(rng, "relu", "gelu"),
        "do_layer_norm_before": chance(rng),
        "enable_bias": chance(rng),
        "layer_norm_elementwise_affine": chance(rng),
        "tie_word_embeddings": chance(rng),
    }
    return Case("OPTForCausalLM", fields, hub=chance(rng))


def sample_gptj(rng: np.random.Generator) -> Case:
    heads, head = between(rng, 2, 4), pick(rng, 4, 8)
    fields = {
        **vocabulary_fields(rng),
        "n_head": heads,
        "n_embd": heads * head,
        "n_layer": between(rng, 2, 3),
        "n_positions": between(rng, 128, 140),
        "n_inner": pick(rng, None, between(rng, 9, 40)),
        "rotary_dim": pick(rng, 2, 4),
        "layer_norm_epsilon": pick(rng, 1e-5, 1e-3),
        "activation_function": pick(rng, "gelu_new", "gelu"),
    }
    return Case("GPTJForCausalLM", fields, hub=chance(rng))


def _layer_normed(rng: np.random.Generator, eps: str = "layer_norm_eps") -> Fields:
    """Sizes as Llama's, with layer norms and partial rotary positions."""
    fields = llama_fields(rng) | rope_fields(rng, "default")
    del fields["rms_norm_eps"]
    head = fields["hidden_size"] // fields["num_attention_heads"]
    rotated = pick(rng, *(n for n in range(2, head + 1, 2)))
    return fields | {eps: pick(rng, 1e-5, 1e-3), "partial_rotary_factor": rotated / head}


def sample_phi(rng: np.random.Generator) -> Case:
    fields = _layer_normed(rng) | {"qk_layernorm": chance(rng), "tie_word_embeddings": False}
    return Case("PhiForCausalLM", fields, hub=chance(rng))


def sample_stablelm(rng: np.random.Generator) -> Case:
    fields = _layer_normed(rng) | {"use_qkv_bias": chance(rng), "use_parallel_residual": chance(rng)}
    return Case("StableLmForCausalLM", fields, hub=chance(rng))


def sample_nemotron(rng: np.random.Generator) -> Case:
    fields = _layer_normed(rng, "norm_eps") | {"attention_bias": chance(rng), "mlp_bias": chance(rng)}
    return Case("NemotronForCausalLM", fields, hub=chance(rng))


def sample_starcoder2(rng: np.random.Generator) -> Case:
    fields = _layer_normed(rng, "norm_epsilon")
    del fields["partial_rotary_factor"]
    fields |= {"use_bias": chance(rng), "sliding_window": pick(rng, None, between(rng, 3, 7))}
    return Case("Starcoder2ForCausalLM", fields, hub=chance(rng))


def sample_falcon(rng: np.random.Generator) -> Case:
    heads = pick(rng, 2, 4)
    fields = {
        **vocabulary_fields(rng),
        **rope_fields(rng, "default"),
        "num_attention_heads": heads,
        "num_hidden_layers": between(rng, 2, 3),
        "hidden_size": heads * pick(rng, 4, 8),
        "max_position_embeddings": between(rng, 128, 200),
        "layer_norm_epsilon": pick(rng, 1e-5, 1e-3),
        "ffn_hidden_size": pick(rng, None, between(rng, 9, 40)),
        "bias": chance(rng),
        "tie_word_embeddings": chance(rng),
    }
    if chance(rng):
        fields |= {"new_decoder_architecture": True, "num_kv_heads": pick(rng, 1, 2, heads)}
        fields |= {"num_ln_in_parallel_attn": pick(rng, 1, 2)}
    else:
        fields |= {"multi_query": chance(rng), "parallel_attn": chance(rng)}
    return Case("FalconForCausalLM", fields, hub=chance(rng))


_GPT2_TINY: Fields = {
    "vocab_size": 41,
    "n_embd": 20,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 128,
    "bos_token_id": 40,
    "eos_token_id": 40,
}
_gpt2 = functools.partial(case, "GPT2LMHeadModel", _GPT2_TINY)
_GPT2 = {
    # Names without a prefix and causal masks among the tensors, as in the first checkpoints.
    "bare": dataclasses.replace(
        _gpt2(hub=True, layer_norm_epsilon=1e-3),
        bare=True,
        extra={f"h.{i}.attn.bias": (1, 1, 128, 128) for i in range(2)},
    ),
    "inner": _gpt2(n_inner=27, scale_attn_by_inverse_layer_idx=True, n_layer=3, reorder_and_upcast_attn=True),
    "untied_unscaled": _gpt2(
        hub=True, n_head=2, scale_attn_weights=False, tie_word_embeddings=False, activation_function="relu"
    ),
}

_NEOX_TINY: Fields = {key: value for key, value in TINY.items() if key != "num_key_value_heads"} | {"hidden_size": 32}
_neox = functools.partial(case, "GPTNeoXForCausalLM", _NEOX_TINY)
_NEOX = {
    # Rotates a quarter of each head by default, 2 of 8.
    "parallel": _neox(hub=True, layer_norm_eps=1e-3),
    "serial": _neox(hub=True, use_parallel_residual=False, rotary_pct=0.5, rotary_emb_base=300),
    "unbiased_tied": _neox(
        hidden_size=24,
        num_hidden_layers=3,
        attention_bias=False,
        tie_word_embeddings=True,
        hidden_act="gelu_fast",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
    ),
}

_OPT_TINY: Fields = {
    **IDS,
    "vocab_size": 41,
    "hidden_size": 20,
    "ffn_dim": 27,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_opt = functools.partial(case, "OPTForCausalLM", _OPT_TINY)
_OPT = {
    "norm_before": _opt(hub=True, pad_token_id=1, bos_token_id=2),
    "norm_after": _opt(word_embed_proj_dim=12, do_layer_norm_before=False),
    "plain_norms": _opt(hub=True, enable_bias=False, layer_norm_elementwise_affine=False, activation_function="gelu"),
    "untied": _opt(num_hidden_layers=3, word_embed_proj_dim=26, tie_word_embeddings=False),
}


FAMILIES = {
    "gpt2": Family("decoder", "gpt2", _GPT2, sample_gpt2),
    "gpt_neox": Family("decoder", "gpt_neox", _NEOX, sample_gpt_neox),
    "opt": Family("decoder", "opt", _OPT, sample_opt),
    "gpt_neo": Family(
        "decoder",
        "gpt_neo",
        {
            "windows": case(
                "GPTNeoForCausalLM",
                {key: value for key, value in _GPT2_TINY.items() if not key.startswith("n_")},
                hub=True,
                hidden_size=20,
                num_heads=4,
                num_layers=3,
                attention_types=[[["global", "local"], 1], [["local"], 1]],
                max_position_embeddings=128,
                window_size=5,
            )
        },
        sample_gpt_neo,
    ),
    "gpt_bigcode": Family(
        "decoder", "gpt_bigcode", {"one_key": case("GPTBigCodeForCausalLM", _GPT2_TINY, hub=True)}, sample_gpt_bigcode
    ),
    "gptj": Family(
        "decoder",
        "gptj",
        {"pairs": case("GPTJForCausalLM", _GPT2_TINY, hub=True, n_embd=32, rotary_dim=4, n_inner=27)},
        sample_gptj,
    ),
    "phi": Family(
        "decoder",
        "phi",
        {"norms": case("PhiForCausalLM", _NEOX_TINY, hub=True, qk_layernorm=True, hidden_act="gelu")},
        sample_phi,
    ),
    "stablelm": Family(
        "decoder",
        "stablelm",
        {
            "parallel": case(
                "StableLmForCausalLM",
                TINY,
                hub=True,
                hidden_size=32,
                use_parallel_residual=True,
                use_qkv_bias=True,
            )
        },
        sample_stablelm,
    ),
    "nemotron": Family(
        "decoder", "nemotron", {"half": case("NemotronForCausalLM", TINY, hub=True, hidden_size=32)}, sample_nemotron
    ),
    "falcon": Family(
        "decoder",
        "falcon",
        {
            "groups": case(
                "FalconForCausalLM",
                _NEOX_TINY,
                hub=True,
                new_decoder_architecture=True,
                num_kv_heads=2,
                ffn_hidden_size=27,
                bias=True,
            )
        },
        sample_falcon,
    ),
    "starcoder2": Family(
        "decoder",
        "starcoder2",
        {"window": case("Starcoder2ForCausalLM", TINY, hub=True, hidden_size=24, sliding_window=5)},
        sample_starcoder2,
    ),
}
