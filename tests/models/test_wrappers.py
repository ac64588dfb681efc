"""The language models of multimodal checkpoints: the same parameters as in a checkpoint of their own, under the names
that transformers 4 and 5 write, and the logits of transformers' whole model for texts without images."""

import json
import re

import chex
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import rlae_jax as rj
from rlae_jax.models import checkpoint_files
from tests.data import hf

# A wrapper, a family's stored case for its language model, what its text_config calls that, and its class.
CASES = {
    "gemma3": ("gemma3_text", "pattern", "gemma3_text", "Gemma3ForConditionalGeneration"),
    "gemma4": ("gemma4_text", "readers", "gemma4_text", "Gemma4ForConditionalGeneration"),
    "mistral3": ("ministral3", "growing", "ministral3", "Mistral3ForConditionalGeneration"),
    "qwen2_vl": ("qwen2", "window_above", "qwen2_vl_text", "Qwen2VLForConditionalGeneration"),
    "qwen2_5_vl": ("qwen2", "window_everywhere", "qwen2_5_vl_text", "Qwen2_5_VLForConditionalGeneration"),
    "qwen3_vl": ("qwen3", "wide_heads", "qwen3_vl_text", "Qwen3VLForConditionalGeneration"),
    "qwen3_5": ("qwen3_5", "published", "qwen3_5_text", "Qwen3_5ForConditionalGeneration"),
    "qwen3_5_moe": ("qwen3_5_moe", "published", "qwen3_5_moe_text", "Qwen3_5MoeForConditionalGeneration"),
    "llava": ("llama", "grouped", "llama", "LlavaForConditionalGeneration"),
    "llama4": ("llama4", "chunks", "llama4_text", "Llama4ForConditionalGeneration"),
}
VISION = {name: np.ones((2, 3), np.float32) for name in ("vision_tower.a.weight", "model.visual.b.weight")}
NAMES = {
    4: lambda name: f"language_model.{name}",
    5: lambda name: name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name,
    "flat": lambda name: name,
}


def stack_experts(tensors):
    """As published: all experts of a layer in one tensor, gates above ups."""
    stacked = {name: array for name, array in tensors.items() if not re.search(r"\.experts\.\d", name)}
    for name in tensors:
        if ".experts.0.gate_proj." in name:
            layer = name.split(".0.gate_proj.")[0]
            of = {}
            for module in ("gate_proj", "up_proj", "down_proj"):
                number = sum(other.startswith(layer) and module in other for other in tensors)
                of[module] = np.stack([tensors[f"{layer}.{e}.{module}.weight"] for e in range(number)])
            stacked[f"{layer}.gate_up_proj"] = np.concatenate([of["gate_proj"], of["up_proj"]], axis=1)
            stacked[f"{layer}.down_proj"] = of["down_proj"]
    return stacked


def wrap(plain, directory, wrapper, style):
    """Writes the checkpoint of a language model as that of a multimodal model."""
    _, _, text_type, architecture = CASES[wrapper]
    text = json.loads((plain / "config.json").read_text())
    del text["architectures"]
    outer = {"architectures": [architecture], "model_type": wrapper, "vision_config": {"hidden_size": 4}}
    if style == "flat":
        outer = text | outer
    else:
        outer["text_config"] = text | {"model_type": text_type}
    tensors = {NAMES[style](name): array for name, array in load_file(plain / "model.safetensors").items()}
    tensors = stack_experts(tensors) if style == 5 else tensors
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(outer))
    save_file(tensors | VISION, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize(
    ("wrapper", "style"),
    [(wrapper, style) for wrapper in CASES for style in (4, 5)] + [("qwen2_vl", "flat"), ("qwen2_5_vl", "flat")],
)
def test_the_language_model_is_that_of_its_own_checkpoint(tmp_path, stored_checkpoint, wrapper, style):
    family, case, *_ = CASES[wrapper]
    plain = stored_checkpoint(case, family)
    alone = rj.load(plain)
    with pytest.warns(UserWarning, match="images are not read"):
        lm = rj.load(wrap(plain, tmp_path / "wrapped", wrapper, style))
    assert lm.config == alone.config
    chex.assert_trees_all_equal(lm.params, alone.params)
    # What is saved is the language model alone.
    rj.save(lm, tmp_path / "saved")
    again = rj.load(tmp_path / "saved")
    assert again.source.family is alone.source.family
    assert again.config == lm.config


def test_published_sizes_that_are_left_out(tmp_path):
    directory = tmp_path / "gemma"
    directory.mkdir()
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    raw = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    (directory / "config.json").write_text(json.dumps(raw | {"eos_token_id": [1, 106]}))
    with pytest.warns(UserWarning, match="images"):
        source = checkpoint_files.read_source(directory)
    config = checkpoint_files.read_config(source, directory, dtype="float32", precision=None, tensors=False)
    assert (config.vocab, config.heads, config.kv_heads, config.head_width) == (262_208, 8, 4, 256)
    assert config.tied_head
    assert config.end_ids == (1, 106)


def test_a_language_model_that_is_not_supported_is_named(tmp_path, raises_input_error):
    directory = tmp_path / "model"
    directory.mkdir()
    raw = {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3"}
    (directory / "config.json").write_text(json.dumps(raw | {"text_config": {"model_type": "ministral4"}}))
    raises_input_error(lambda: rj.load(directory), "its language model, ministral4, is not", "Ministral3ForCausalLM")


# Small vision parts for transformers' own classes.
_VIT = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8}
_QWEN_VIT = {
    "depth": 1,
    "hidden_size": 8,
    "num_heads": 2,
    "patch_size": 4,
    "intermediate_size": 8,
    "out_hidden_size": 24,
}
VISION_CONFIGS = {
    "gemma3": {"model_type": "siglip_vision_model", "patch_size": 4, **_VIT},
    "gemma4": {"num_key_value_heads": 2, "head_dim": 4, "patch_size": 4, "position_embedding_size": 16, **_VIT},
    "mistral3": {"model_type": "pixtral", "patch_size": 4, "head_dim": 4, **_VIT},
    "qwen2_vl": {"model_type": "qwen2_vl_vision", "depth": 1, "embed_dim": 8, "num_heads": 2},
    "qwen2_5_vl": {"model_type": "qwen2_5_vl_vision", "fullatt_block_indexes": [0], **_QWEN_VIT},
    "qwen3_vl": {"model_type": "qwen3_vl_vision", "deepstack_visual_indexes": [0], **_QWEN_VIT},
    "qwen3_5": {"model_type": "qwen3_5_vision", **_QWEN_VIT},
    "llava": {"model_type": "clip_vision_model", "patch_size": 4, "projection_dim": 8, **_VIT},
    "llama4": {"model_type": "llama4_vision_model", "patch_size": 4, "vision_output_dim": 8, **_VIT},
}


@pytest.mark.parametrize(
    "wrapper", ["gemma3", *(pytest.param(name, marks=pytest.mark.rare) for name in [*VISION_CONFIGS][1:])]
)
def test_logits_equal_transformers_whole_model(torch, tmp_path, wrapper):
    import transformers

    family, case, text_type, architecture = CASES[wrapper]
    text = hf.read_stored(family, case).config | {"model_type": text_type}
    raw = {
        "model_type": wrapper,
        "text_config": text,
        "vision_config": dict(VISION_CONFIGS[wrapper]),
        "image_token_index": 1,
    }
    raw["tie_word_embeddings"] = text.setdefault("tie_word_embeddings", False)
    if wrapper.startswith("qwen2"):
        text.pop("head_dim", None)  # which transformers reads in one place and not in the other
    if wrapper.startswith("qwen3_5"):
        raw["vision_config"]["out_hidden_size"] = text["hidden_size"]
        text["rms_norm_eps"] = 0.1  # see the samplers
    if "vl" in wrapper:
        raw["vision_config"] |= {"hidden_size" if wrapper == "qwen2_vl" else "out_hidden_size": text["hidden_size"]}
        # Three positions a token, which are one and the same without images.
        half = (text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]) // 2
        section = [half - 2, 1, 1] if half > 2 else [1, 1, 1]
        text["rope_scaling"] = {"type": "default", "mrope_section": section, "rope_theta": 1000.0}
        text.pop("rope_parameters", None)
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(raw))
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(directory)
    model = getattr(transformers, architecture)(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.normal_(std=0.3 if "embed" in name else weight.shape[1] ** -0.5)
    model.save_pretrained(directory)
    ids = np.random.default_rng(0).integers(3, text["vocab_size"], (2, 11))
    with torch.no_grad():
        # transformers 5.24 asks Llama 4's language model for what only images give.
        whole = model.language_model if wrapper == "llama4" else model
        expected = whole(input_ids=torch.from_numpy(ids)).logits.float().numpy()
    with pytest.warns(UserWarning, match="images are not read"):
        lm = rj.load(directory)
    actual = np.asarray(lm.logits(ids, np.ones_like(ids)))
    assert np.abs(actual - expected).max() <= 2e-5 * np.abs(expected).max()
