"""Hugging Face checkpoints written as GGUF files, as llama.cpp's conversion writes them.

The names of tensors and the container are the `gguf` package's; what the conversion does to settings and tensors is
written out here once more, forwards, from llama.cpp's conversion/*.py.
"""

import json
import math
import re
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
    **dict.fromkeys(("llama", "mistral", "mixtral"), "llama"),
    **{
        name: name for name in ("qwen2", "qwen3", "gemma", "gemma2", "phi3", "olmo", "olmo2", "olmoe", "gpt2", "falcon")
    },
    **{name: name for name in ("smollm3", "granite", "arcee", "seed_oss", "ernie4_5", "glm4", "exaone4", "cohere2")},
    **{name: name for name in ("stablelm", "nemotron", "starcoder2")},
    **{
        "gemma3_text": "gemma3",
        "olmo3": "olmo2",
        "phi": "phi2",
        "cohere": "command-r",
        "gpt_neox": "gptneox",
        "ministral3": "mistral3",
    },
    **{"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gpt_oss": "gpt-oss", "llama4_text": "llama4"},
    **{"lfm2": "lfm2", "lfm2_moe": "lfm2moe", "qwen3_5_text": "qwen35", "qwen3_5_moe_text": "qwen35moe"},
}
PERMUTED = ("llama", "mistral3", "smollm3", "granite", "arcee", "olmo")
SHIFTED = ("gemma", "gemma2", "gemma3", "nemotron", "qwen35", "qwen35moe")
PARTLY_ROTATED = {
    "glm4": 0.5,
    "stablelm": 0.25,
    "nemotron": 0.5,
    "phi": 0.5,
    "gpt_neox": 0.25,
    "qwen3_5_text": 0.25,
    "qwen3_5_moe_text": 0.25,
}  # unless config.json says
# Fields that some families call otherwise.
ALIASES = {
    "n_embd": "hidden_size", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings", "n_inner": "intermediate_size", "ffn_hidden_size": "intermediate_size",
    "num_kv_heads": "num_key_value_heads", "norm_eps": "layer_norm_eps", "norm_epsilon": "layer_norm_eps",
    "layer_norm_epsilon": "layer_norm_eps", "rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta",
}  # fmt: skip


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
    part = rope.get("partial_rotary_factor", PARTLY_ROTATED.get(config["model_type"], 1.0))
    writer.add_rope_dimension_count(int(part * head))
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
    family, rope = config["model_type"], _rope_fields(config)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    # What config.json left out is in every file.
    short = family in (
        "phi3",
        "olmo2",
        "olmo3",
        "olmoe",
        "mixtral",
        "arcee",
        "exaone4",
        "gpt_oss",
        "ernie4_5",
        "ministral3",
        "llama4_text",
        "lfm2",
        "lfm2_moe",
    )
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-5 if short else 1e-6))
    writer.add_layer_norm_eps(config.get("layer_norm_eps", 1e-5))
    writer.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
    dense = config.get("intermediate_size_mlp") or config.get("intermediate_size")
    writer.add_feed_forward_length(dense or 4 * config["hidden_size"])
    for key, add in (
        ("head_dim", writer.add_key_length),
        ("sliding_window", writer.add_sliding_window),
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
        ("logit_scale", writer.add_logit_scale),
        ("logits_scaling", writer.add_logit_scale),
        ("mscale_all_dim", writer.add_rope_scaling_yarn_log_mul),
        ("llama_4_scaling_beta", writer.add_attn_temperature_scale),
        ("embedding_multiplier", writer.add_embedding_scale),
        ("attention_multiplier", writer.add_attention_scale),
        ("residual_multiplier", writer.add_residual_scale),
        ("clip_qkv", writer.add_clamp_kqv),
        ("use_parallel_residual", writer.add_parallel_residual),
        ("num_experts", writer.add_expert_count),
        ("num_local_experts", writer.add_expert_count),
        ("moe_intermediate_size", writer.add_expert_feed_forward_length),
        ("shared_expert_intermediate_size", writer.add_expert_shared_feed_forward_length),
    ):
        if (value := config.get(key, rope.get(key))) is not None:
            add(value)
    if "num_experts" in config or "num_local_experts" in config:
        writer.add_expert_used_count(config.get("num_experts_per_tok", 1 if family == "llama4_text" else 2))
    if family in ("gpt_oss", "llama4_text"):
        writer.add_expert_feed_forward_length(config["intermediate_size"])
    if family == "llama4_text":
        writer.add_interleave_moe_layer_step(config.get("interleave_moe_layer_step", 1))
    if family in ("olmo3", "exaone4"):
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
    if family.startswith("lfm2"):
        _add_short_convolutions(writer, config)
    if family.startswith("qwen3_5"):
        _add_linear_attention(writer, config)
    _add_rope(writer, config)


def _add_short_convolutions(writer: gguf.GGUFWriter, config: Config) -> None:
    """`LFM2Model.set_gguf_parameters` and `LFM2MoeModel.set_gguf_parameters`."""
    writer.add_rope_freq_base(1e6)
    writer.add_shortconv_l_cache(config.get("conv_L_cache", 3))
    layers, attending = range(config["num_hidden_layers"]), config.get("full_attn_idxs")
    kinds = config.get("layer_types") or ["full_attention" if i in attending else "conv" for i in layers]
    writer.add_head_count_kv([config["num_key_value_heads"] if kind == "full_attention" else 0 for kind in kinds])
    if config["model_type"] == "lfm2":
        multiple = config["block_multiple_of"]
        writer.add_feed_forward_length(multiple * math.ceil(int(2 * config["intermediate_size"] / 3) / multiple))
    else:
        writer.add_leading_dense_block_count(config["num_dense_layers"])
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def _add_linear_attention(writer: gguf.GGUFWriter, config: Config) -> None:
    """`Qwen3NextModel.set_gguf_parameters`, and the layer that predicts a further token (`_Qwen35MtpMixin`)."""
    heads = config["linear_num_value_heads"]
    writer.add_ssm_conv_kernel(config.get("linear_conv_kernel_dim", 4))
    writer.add_ssm_state_size(config["linear_key_head_dim"])
    writer.add_ssm_group_count(config["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(heads)
    writer.add_ssm_inner_size(config["linear_value_head_dim"] * heads)
    writer.add_full_attention_interval(config.get("full_attention_interval", 4))
    writer.add_rope_dimension_sections([1, 0, 0, 0])
    layers = config["num_hidden_layers"]
    writer.add_block_count(layers + 1)
    writer.add_nextn_predict_layers(1)
    for name in ("nextn.eh_proj", "attn_q", "ffn_up"):
        add_tensor(writer, f"blk.{layers}.{name}.weight", np.ones((4, 8), np.float32), KINDS.F32)


def tile_values(tensor: Array, config: Config, axis: int, first: int) -> Array:
    """The value heads along an axis, which begin at an entry: those that share a key head lie side by side, and lie
    then as far apart as there are key heads (`_LinearAttentionVReorderBase`)."""
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    width = (tensor.shape[axis] - first) // values
    order = list(range(first))
    for turn in range(values // keys):
        for key in range(keys):
            start = first + (key * (values // keys) + turn) * width
            order += range(start, start + width)
    return np.take(tensor, order, axis)


def linear_attention(module: str, tensor: Array, config: Config) -> Array:
    """A tensor of a layer with the gated delta rule."""
    if module == "norm.weight":
        return tensor
    if module == "A_log":
        tensor = -np.exp(tensor)
    if module == "conv1d.weight":
        tensor = tensor.squeeze(1)
    fused = module in ("in_proj_qkv.weight", "conv1d.weight")
    first = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"] if fused else 0
    return tile_values(tensor, config, 1 if module == "out_proj.weight" else 0, first)


def join_heads(tensor: Array, heads: int, kv_heads: int) -> Array:
    """Rows of queries, keys and values that lie with their key head, as all queries, all keys and all values
    (`FalconModel.modify_tensors`; GPT-NeoX has as many key heads as heads)."""
    width, group = len(tensor) // (heads + 2 * kv_heads), heads // kv_heads
    block = (group + 2) * width

    def rows(first: int, count: int) -> list[int]:
        return [head * block + first * width + i for head in range(kv_heads) for i in range(count * width)]

    return tensor[[*rows(0, group), *rows(group, 1), *rows(group + 1, 1)]]


def _convert(name: str, tensor: Array, config: Config, architecture: str) -> Array:
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    of = {"q_proj": heads, "k_proj": kv_heads}
    module = name.split(".")[-2]
    if architecture in PERMUTED and module in of:
        return permute(tensor, of[module])
    if ".linear_attn." in name:
        return linear_attention(name.split(".linear_attn.")[1], tensor, config)
    if ".conv.conv." in name:
        return tensor.squeeze(1)
    if architecture in SHIFTED and name.endswith("norm.weight"):
        return tensor + 1
    if module == "query_key_value":
        return join_heads(tensor, heads, kv_heads if architecture == "falcon" else heads)
    if architecture == "gpt2" and tensor.ndim == 2 and module in ("c_attn", "c_proj", "c_fc"):
        return tensor.T
    if module == "shared_expert_gate":
        return tensor[0]
    return tensor


def _experts(tensors: dict[str, Array], alternating: bool) -> dict[str, Array]:
    """The tensors with all experts of a layer in one, under the names that the conversion gives them."""
    joined: dict[str, Array] = {}
    for name, tensor in tensors.items():
        found = re.search(r"\.experts\.(\d+)\.", name)
        if found:  # Qwen's, OLMoE's and Mixtral's: a tensor for each
            names = [name.replace(found[0], f".experts.{e}.") for e in range(len(tensors))]
            joined[name.replace(found[0], ".experts.")] = np.stack([tensors[one] for one in names if one in tensors])
            continue
        for fused in re.findall(r"\.experts\.(gate_up_proj|down_proj)", name):  # others: [experts, inputs, outputs]
            stem, suffix = name.split(f".{fused}")[0], ".bias" if name.endswith("_bias") else ".weight"
            turned = tensor if suffix == ".bias" else tensor.swapaxes(1, 2)
            half = turned.shape[1] // 2
            first, second = (slice(0, None, 2), slice(1, None, 2)) if alternating else (slice(half), slice(half, None))
            parts = {"gate_proj": turned[:, first], "up_proj": turned[:, second]}
            parts = parts if fused == "gate_up_proj" else {"down_proj": turned}
            joined |= {f"{stem}.{module}{suffix}": part for module, part in parts.items()}
            break
        else:
            joined[f"{name}.weight" if name.endswith(".sinks") else name] = tensor
    return joined


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
    config |= {ALIASES[key]: value for key, value in config.items() if key in ALIASES and value is not None}
    architecture = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, architecture, **arguments)
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[architecture], config["num_hidden_layers"])
    _add_settings(writer, config)
    add(writer)
    for name, tensor in _experts(load_file(directory / "model.safetensors"), architecture == "gpt-oss").items():
        known = name.replace(".dt_bias", ".dt_proj.bias").replace(".expert_bias", ".expert_bias.bias")
        known = known.removeprefix("model.") if ".feed_forward.experts.w" in name else known
        own = names.get_name(known, try_suffixes=(".weight", ".bias"))
        if own is None:  # a mask that the first checkpoints hold
            continue
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
