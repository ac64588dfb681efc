"""What families make of settings in config.json, and what they refuse; needs no weights."""

import json

import pytest

from rlae_jax.models import checkpoint_files
from rlae_jax.models.families import nearest
from tests.data import hf


@pytest.fixture
def read(tmp_path):
    """read(family, **settings): the `ModelConfig` of the family's first stored case with other settings."""

    def read(family, **settings):
        case = next(iter(hf.FAMILIES[family].cases))
        (tmp_path / "config.json").write_text(json.dumps(hf.read_stored(family, case).config | settings))
        source = checkpoint_files.read_source(tmp_path)
        return checkpoint_files.read_config(source, tmp_path, dtype="float32", precision=None, tensors=False)

    return read


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "olmo2", "granite", "gemma"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_fraction_of_rotated_entries_is_ignored_where_transformers_ignores_it(read, family, inside):
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    settings = {"rope_parameters": rope} if inside else {"partial_rotary_factor": 0.5, "rope_parameters": None}
    assert read(family, rope_scaling=None, **settings).rope.fraction == 1.0


@pytest.mark.parametrize("family", ["phi3", "phi", "glm", "glm4", "stablelm", "nemotron"])
def test_a_fraction_of_rotated_entries_is_read_where_there_are_some(read, family):
    assert read(family, partial_rotary_factor=0.25, head_dim=8, rope_parameters=None).rope.fraction == 0.25


def test_settings_of_llama_4(read):
    """The first releases give a number for whether queries grow, and no layers for those without rotary positions."""
    config = read("llama4", attn_temperature_tuning=4, no_rope_layers=[])
    assert (config.local_layers, config.window, config.unrotated_layers) == ((0, 1, 2), 5, (3,))
    assert config.query_growth is not None
    assert config.experts.layers == (1, 3)
    assert read("llama4", attn_temperature_tuning=False).query_growth is None
    plain = read("llama4", moe_layers=[], attention_chunk_size=None, use_qk_norm=False)
    assert (plain.experts, plain.local_layers, plain.chunked, plain.query_key_norm) == (None, (), False, None)


@pytest.mark.parametrize(
    ("family", "settings", "part"),
    [
        ("granitemoehybrid", {"layer_types": ["mamba", "attention"]}, "state-space layers"),
        ("granitemoehybrid", {"num_local_experts": 4}, "experts"),
        ("gemma4_text", {"enable_moe_block": True}, "enable_moe_block"),
        ("gemma4_text", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ("gemma4_text", {"num_kv_shared_layers": 3}, "num_kv_shared_layers = 3"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("lfm2", {"layer_types": ["conv", "mamba", "conv", "full_attention"]}, "mamba"),
        ("lfm2", {"conv_L_cache": 0}, "conv_L_cache is a number (0)"),
        ("qwen3_5", {"layer_types": ["linear_attention"] * 3}, "3 entries for 4 layers"),
        ("qwen3_5", {"linear_num_value_heads": 3}, "linear_num_key_heads (2) must divide linear_num_value_heads (3)"),
        ("qwen3_5", {"linear_key_head_dim": 2.5}, "linear_key_head_dim is a number (2.5)"),
        ("falcon", {"alibi": True}, "alibi"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm"),
        ("gptj", {"tie_word_embeddings": True}, "tie_word_embeddings"),
        ("ministral3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "llama_4_scaling_beta"),
    ],
)
def test_what_is_refused_is_named(read, raises_input_error, family, settings, part):
    raises_input_error(lambda: read(family, **settings), "config.json", part)


@pytest.mark.parametrize(
    ("names", "first"),
    [
        (("Qwen3OmniMoeForConditionalGeneration", "qwen3_omni_moe"), "Qwen3MoeForCausalLM"),
        (("Gemma5ForCausalLM", "gemma5_text"), "Gemma4ForCausalLM"),
        (("LLaMAForCausalLM", "LLaMA"), "LlamaForCausalLM"),
        (("Olmo4ForCausalLM", "olmo4"), "Olmo3ForCausalLM"),
    ],
)
def test_refusals_name_what_is_near(names, first):
    assert first in nearest(*names)


@pytest.mark.parametrize(
    ("model_type", "architecture", "reason"),
    [
        ("gemma3n_text", "Gemma3nForCausalLM", "AltUp"),
        ("gemma3n", "Gemma3nForConditionalGeneration", "AltUp"),
    ],
)
def test_some_refusals_say_why(tmp_path, raises_input_error, model_type, architecture, reason):
    raw = {"architectures": [architecture], "model_type": model_type, "text_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    raises_input_error(lambda: checkpoint_files.read_source(tmp_path), architecture, reason)


def test_nothing_may_be_near():
    assert nearest("XyzzyForCausalLM", "xyzzy") == []
