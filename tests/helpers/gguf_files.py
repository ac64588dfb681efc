"""Hugging Face checkpoints written as GGUF files, as llama.cpp's conversion writes them.

The names of tensors and the container are the `gguf` package's; what the conversion does to settings and tensors is
written out here once more, forwards, from llama.cpp's conversion/*.py.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

Array = np.ndarray
Config = Mapping[str, Any]
KINDS = gguf.GGMLQuantizationType

# model_type of config.json -> general.architecture.
ARCHITECTURES = {
    **dict.fromkeys(("llama", "mistral"), "llama"),
    **{name: name for name in ("qwen2", "qwen3", "gemma2", "phi3", "olmo2")},
    "gemma3_text": "gemma3",
}
PERMUTED = ("llama",)
SHIFTED = ("gemma2", "gemma3")


def permute(tensor: Array, heads: int) -> Array:
    """Rows of each head: 0, W/2, 1, W/2 + 1, ... (`LlamaModel.permute`)."""
    width = len(tensor) // heads
    rows = [
        head * width + half * (width // 2) + i for head in range(heads) for i in range(width // 2) for half in (0, 1)
    ]
    return tensor[rows]


def llama3_factors(config: Config, scaling: Config, base: float) -> Array:
    """What the frequency of every pair is divided by (`LlamaModel.generate_extra_tensors`)."""
    width, old = config["head_dim"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    factors = []
    for i in range(0, width, 2):
        wavelength = 2 * math.pi * base ** (i / width)
        if wavelength < old / high:
            factors.append(1.0)
        elif wavelength > old / low:
            factors.append(scaling["factor"])
        else:
            smooth = (old / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(factors, np.float32)


def _rope_fields(config: Config) -> dict[str, Any]:
    """Rotary fields of either spelling; Gemma 3's are those of its global layers."""
    fields = dict(config.get("rope_parameters") or {})
    fields = fields.get("full_attention", fields)
    own = {key: config[key] for key in ("rope_theta", "partial_rotary_factor") if key in config}
    fields = own | fields | dict(config.get("rope_scaling") or {})
    return fields | {"rope_type": fields.get("rope_type") or fields.get("type") or "default"}


def _add_rope(writer: gguf.GGUFWriter, config: Config) -> None:
    rope, context = _rope_fields(config), config["max_position_embeddings"]
    kind = rope["rope_type"]
    if "rope_theta" in rope:
        writer.add_rope_freq_base(rope["rope_theta"])
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_rope_dimension_count(int(rope.get("partial_rotary_factor", 1.0) * head))
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for key, add in (
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if key in rope:
                add(rope[key])
    if kind == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config, rope, rope["rope_theta"]))
    if kind == "longrope":
        old = config["original_max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(old)
        scale = context / old
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(old)) if scale > 1 else 1.0)
        for which in ("long", "short"):
            writer.add_tensor(f"rope_factors_{which}.weight", np.array(rope[f"{which}_factor"], np.float32))


def _add_settings(writer: gguf.GGUFWriter, config: Config) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    for key, add in (
        ("intermediate_size", writer.add_feed_forward_length),
        ("num_key_value_heads", writer.add_head_count_kv),
        ("head_dim", writer.add_key_length),
        ("rms_norm_eps", writer.add_layer_norm_rms_eps),
        ("sliding_window", writer.add_sliding_window),
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
    ):
        if config.get(key) is not None:
            add(config[key])
    # What config.json left out is in every file.
    if "rms_norm_eps" not in config:
        writer.add_layer_norm_rms_eps(1e-5 if config["model_type"] in ("phi3", "olmo2") else 1e-6)
    if config.get("num_key_value_heads") is None:
        writer.add_head_count_kv(config["num_attention_heads"])
    _add_rope(writer, config)


def _convert(name: str, tensor: Array, config: Config, architecture: str) -> Array:
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config.get("num_key_value_heads")}
    module = name.split(".")[-2]
    if architecture in PERMUTED and module in heads:
        return permute(tensor, heads[module] or config["num_attention_heads"])
    if architecture in SHIFTED and name.endswith("norm.weight"):
        return tensor + 1
    return tensor


def write(
    path: Path,
    directory: Path,
    kind: Callable[[str, Array], KINDS] = lambda name, tensor: KINDS.F32,
    add: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    **arguments: Any,
) -> Path:
    """A Hugging Face directory as a GGUF file.

    Args:
      kind: of a tensor, by its Hugging Face name.
      add: further metadata.
      arguments: of `gguf.GGUFWriter`, such as how to split the file.
    """
    config = json.loads((directory / "config.json").read_text())
    architecture = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, architecture, **arguments)
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[architecture], config["num_hidden_layers"])
    _add_settings(writer, config)
    add(writer)
    for name, tensor in load_file(directory / "model.safetensors").items():
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        converted = np.ascontiguousarray(_convert(name, tensor, config, architecture))
        chosen = kind(name, converted) if converted.ndim > 1 else KINDS.F32
        add_tensor(writer, own, converted, chosen)
    finish(writer)
    return path


def add_tensor(writer: gguf.GGUFWriter, name: str, tensor: Array, kind: KINDS) -> None:
    writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# Where the float16 scales lie in a block; all else is bits of which any will do.
_SCALES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip
QUANTISED = tuple(_SCALES)


def random_blocks(rng: np.random.Generator, kind: str, rows: int, inputs: int) -> Array:
    """The bytes [rows, ...] of a quantised tensor: any bits, and scales of ordinary size."""
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[KINDS[kind]]
    blocks = rng.integers(0, 256, (rows * inputs // per_block, block_bytes), dtype=np.uint8)
    for offset in _SCALES[kind]:
        scales = rng.uniform(0.001, 0.1, (len(blocks), 1)).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8)
    return blocks.reshape(rows, -1)
