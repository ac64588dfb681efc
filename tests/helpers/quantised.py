"""Layers as other tools' quantisation stores them, of random numbers, and what they stand for, worked out slowly.

A maker gives (the layer's tensors by the ends of their names, the settings). A reader gives the weight that the tensors
stand for, [outputs, inputs], one entry after another by the format's own arithmetic, from the stored bits alone.
"""

import itertools
import json

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from rlae_jax.models.stored import Header

DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "int8": "I8",
    "uint8": "U8",
    "int32": "I32",
    "int64": "I64",
}
AWQ_PLACES = [0, 2, 4, 6, 1, 3, 5, 7]


class Held:
    """A `TensorSource` of arrays."""

    def __init__(self, arrays):
        self.arrays = arrays
        self.headers = {name: Header(array.shape, DTYPES[array.dtype.name]) for name, array in arrays.items()}

    def read(self, name):
        return self.arrays[name]


def named(module, parts):
    return {module + suffix: array for suffix, array in parts.items()}


def pack(integers, bits):
    """Rows of integers as 32-bit words: each row one long number, its first integer lowest."""
    rows = []
    for row in integers.tolist():
        number = sum(value << (bits * i) for i, value in enumerate(row))
        words = -(-len(row) * bits // 32)
        rows.append(np.frombuffer(number.to_bytes(4 * words, "little"), "<i4"))
    return np.stack(rows)


def field(words, i, bits):
    """Integer i of a row of words."""
    return int.from_bytes(np.ascontiguousarray(words).tobytes(), "little") >> (bits * i) & ((1 << bits) - 1)


def some_scales(rng, *shape):
    return rng.uniform(0.01, 0.03, shape)


def make_gptq(rng, outputs, inputs, *, bits=4, group=32, form="gptq", shuffled=False, lowest_zero=1):
    size = inputs if group < 0 else group
    group_of = np.arange(inputs) // size
    if shuffled:
        group_of = rng.permutation(group_of)
    groups = int(group_of.max()) + 1
    values = rng.integers(0, 1 << bits, (outputs, inputs))
    zeros = rng.integers(lowest_zero, 1 << bits, (groups, outputs))
    stored_zeros = pack(zeros, bits)
    if form == "gptq":
        ones = pack(np.ones((1, outputs), int), bits)
        stored_zeros = (stored_zeros.view(np.uint32) - ones.view(np.uint32)).view(np.int32)
        if 32 % bits:
            stored_zeros = pack(zeros - 1, bits)
    parts = {
        ".qweight": np.ascontiguousarray(pack(values, bits).T),
        ".qzeros": stored_zeros,
        ".scales": some_scales(rng, groups, outputs).astype(np.float16),
        ".g_idx": group_of.astype(np.int32),
    }
    settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": shuffled, "sym": False}
    return parts, settings | {"checkpoint_format": form}


def read_gptq(parts, settings):
    bits = settings["bits"]
    inputs, outputs = parts[".g_idx"].size, parts[".scales"].shape[1]
    weight = np.empty((outputs, inputs), np.float32)
    for o, i in itertools.product(range(outputs), range(inputs)):
        g = parts[".g_idx"][i]
        value = field(parts[".qweight"][:, o], i, bits)
        zero = field(parts[".qzeros"][g], o, bits) + (settings["checkpoint_format"] == "gptq")
        weight[o, i] = np.float32(parts[".scales"][g, o]) * np.float32(value - zero)
    return weight


def make_awq(rng, outputs, inputs, *, group=32):
    def packed(integers):
        """Rows [n, outputs], each eight of them in AWQ's order."""
        return pack(integers.reshape(len(integers), -1, 8)[..., AWQ_PLACES].reshape(len(integers), -1), 4)

    parts = {
        ".qweight": packed(rng.integers(0, 16, (inputs, outputs))),
        ".qzeros": packed(rng.integers(0, 16, (inputs // group, outputs))),
        ".scales": some_scales(rng, inputs // group, outputs).astype(np.float16),
    }
    return parts, {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}


def read_awq(parts, settings):
    inputs, outputs = len(parts[".qweight"]), parts[".scales"].shape[1]
    weight = np.empty((outputs, inputs), np.float32)
    for o, i in itertools.product(range(outputs), range(inputs)):
        g, place = i // settings["group_size"], 8 * (o // 8) + AWQ_PLACES.index(o % 8)
        value, zero = field(parts[".qweight"][i], place, 4), field(parts[".qzeros"][g], place, 4)
        weight[o, i] = np.float32(parts[".scales"][g, o]) * np.float32(value - zero)
    return weight


def make_fp8(rng, outputs, inputs, *, block=None, per_output=False):
    """In blocks of [outputs, inputs], with one scale for each output, or with one for all."""
    parts = {".weight": (rng.standard_normal((outputs, inputs)) * 20).astype(ml_dtypes.float8_e4m3fn)}
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block and list(block)}
    if block:
        grid = (-(-outputs // block[0]), -(-inputs // block[1]))
        return parts | {".weight_scale_inv": some_scales(rng, *grid).astype(np.float32)}, settings
    if per_output:
        settings = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
        extra = {".input_scale_ub": np.ones(1, np.float32)}
        return parts | extra | {".weight_scale": some_scales(rng, outputs, 1).astype(np.float32)}, settings
    extra = {".input_scale": np.ones((), np.float32), ".weight_scale": np.array(some_scales(rng), np.float32)}
    return parts | extra, settings | {"activation_scheme": "static"}


def read_fp8(parts, settings):
    weight = parts[".weight"].astype(np.float32)
    scale = parts.get(".weight_scale_inv", parts.get(".weight_scale"))
    for o, i in np.ndindex(weight.shape):
        high, wide = settings.get("weight_block_size") or (1, weight.shape[1])
        at = () if scale.ndim == 0 else (o // high, i // wide)
        weight[o, i] *= scale[at]
    return weight


def scheme(form, **weights):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "format": form}
    fields = {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed"}
    return fields | {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}


def make_packed(rng, outputs, inputs, *, bits=4, group=32, symmetric=True, g_idx=None):
    """compressed-tensors' pack-quantized; per output where `group` is None."""
    middle, groups = 1 << (bits - 1), inputs // (group or inputs)
    parts = {
        ".weight_packed": pack(rng.integers(0, 1 << bits, (outputs, inputs)), bits),
        ".weight_scale": some_scales(rng, outputs, groups).astype(ml_dtypes.bfloat16),
        ".weight_shape": np.array([outputs, inputs], np.int64),
    }
    if not symmetric:
        zeros = rng.integers(-middle, middle, (groups, outputs)) + middle
        parts[".weight_zero_point"] = np.ascontiguousarray(pack(zeros, bits).T)
    if g_idx is not None:
        parts[".weight_g_idx"] = g_idx.astype(np.int32)
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel", "group_size": None}
    return parts, scheme("pack-quantized", num_bits=bits, type="int", symmetric=symmetric, **strategy)


def read_packed(parts, settings):
    weights = settings["config_groups"]["group_0"]["weights"]
    bits = weights["num_bits"]
    outputs, inputs = parts[".weight_shape"].tolist()
    weight = np.empty((outputs, inputs), np.float32)
    for o, i in itertools.product(range(outputs), range(inputs)):
        g = i // (weights["group_size"] or inputs)
        if ".weight_g_idx" in parts:
            g = parts[".weight_g_idx"][i]
        zero = 0
        if ".weight_zero_point" in parts:
            zero = field(parts[".weight_zero_point"][:, g], o, bits) - (1 << (bits - 1))
        value = field(parts[".weight_packed"][o], i, bits) - (1 << (bits - 1))
        weight[o, i] = np.float32(value - zero) * np.float32(parts[".weight_scale"][o, g])
    return weight


def make_int8(rng, outputs, inputs, *, symmetric=True):
    """compressed-tensors' int-quantized: one scale, and perhaps a zero, for each output."""
    parts = {
        ".weight": rng.integers(-128, 128, (outputs, inputs)).astype(np.int8),
        ".weight_scale": some_scales(rng, outputs, 1).astype(ml_dtypes.bfloat16),
    }
    if not symmetric:
        parts[".weight_zero_point"] = rng.integers(-128, 128, (outputs, 1)).astype(np.int8)
    return parts, scheme("int-quantized", num_bits=8, type="int", symmetric=symmetric, strategy="channel")


def make_float(rng, outputs, inputs, *, block=None):
    """compressed-tensors' float-quantized: in blocks, or with one scale for all."""
    parts, _ = make_fp8(rng, outputs, inputs, block=block)
    if block:
        parts[".weight_scale"] = parts.pop(".weight_scale_inv")
    strategy = {"strategy": "block", "block_structure": list(block)} if block else {"strategy": "tensor"}
    return parts, scheme("float-quantized", num_bits=8, type="float", symmetric=True, **strategy)


def read_stored_one_by_one(parts, settings):
    weights = settings["config_groups"]["group_0"]["weights"]
    weight = parts[".weight"].astype(np.float32)
    high, wide = weights.get("block_structure") or (1, weight.shape[1])
    for o, i in np.ndindex(weight.shape):
        at = () if parts[".weight_scale"].ndim == 0 else (o // high, i // wide)
        zero = np.float32(parts[".weight_zero_point"][at]) if ".weight_zero_point" in parts else 0
        weight[o, i] = (weight[o, i] - zero) * np.float32(parts[".weight_scale"][at])
    return weight


def e2m1(bits):
    """A sign, two bits of exponent, one of mantissa."""
    sign, exponent, mantissa = bits >> 3, bits >> 1 & 3, bits & 1
    size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1)
    return -size if sign else size


def make_float4(rng, outputs, inputs, *, nvidia=False):
    """compressed-tensors' MXFP4 (groups of 32, powers of two) and NVFP4 (groups of 16, and a scale of all)."""
    group = 16 if nvidia else 32
    parts = {".weight_packed": rng.integers(0, 256, (outputs, inputs // 2)).astype(np.uint8)}
    if nvidia:
        parts[".weight_scale"] = rng.uniform(1, 100, (outputs, inputs // group)).astype(ml_dtypes.float8_e4m3fn)
        parts[".weight_global_scale"] = np.array([2048], np.float32)
    else:
        parts[".weight_scale"] = rng.integers(118, 124, (outputs, inputs // group)).astype(np.uint8)
    form = "nvfp4-pack-quantized" if nvidia else "mxfp4-pack-quantized"
    return parts, scheme(form, num_bits=4, type="float", symmetric=True, strategy="group", group_size=group)


def read_float4(parts, settings):
    group = settings["config_groups"]["group_0"]["weights"]["group_size"]
    outputs, width = parts[".weight_packed"].shape
    weight = np.empty((outputs, width * 2), np.float32)
    for o, i in np.ndindex(weight.shape):
        scale = parts[".weight_scale"][o, i // group]
        if ".weight_global_scale" in parts:
            scale = np.float32(scale) / parts[".weight_global_scale"][0]
        else:
            scale = np.float32(2.0 ** (int(scale) - 127))
        weight[o, i] = np.float32(e2m1(parts[".weight_packed"][o, i // 2] >> (4 * (i % 2)) & 15)) * scale
    return weight


def make_modelopt(rng, outputs, inputs):
    """NVFP4 of NVIDIA's ModelOpt: the same numbers under other names, the scale of all as its inverse."""
    parts, _ = make_float4(rng, outputs, inputs, nvidia=True)
    extra = {
        ".weight_scale_2": np.float32(1) / parts[".weight_global_scale"][0],
        ".input_scale": np.ones((), np.float32),
    }
    parts = {".weight": parts[".weight_packed"], ".weight_scale": parts[".weight_scale"]}
    parts |= {suffix: np.asarray(array) for suffix, array in extra.items()}
    return parts, {"quant_method": "modelopt", "quant_algo": "NVFP4"}


def read_modelopt(parts, settings):
    outputs, width = parts[".weight"].shape
    weight = np.empty((outputs, width * 2), np.float32)
    for o, i in np.ndindex(weight.shape):
        scale = np.float32(parts[".weight_scale"][o, i // 16]) * parts[".weight_scale_2"]
        weight[o, i] = np.float32(e2m1(parts[".weight"][o, i // 2] >> (4 * (i % 2)) & 15)) * scale
    return weight


def make_mxfp4(rng, experts, outputs, inputs):
    """gpt-oss' experts."""
    parts = {
        "_blocks": rng.integers(0, 256, (experts, outputs, inputs // 32, 16)).astype(np.uint8),
        "_scales": rng.integers(118, 124, (experts, outputs, inputs // 32)).astype(np.uint8),
    }
    return parts, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


def read_mxfp4(parts, settings):
    """[experts, outputs, inputs]."""
    experts, outputs, groups, _ = parts["_blocks"].shape
    weight = np.empty((experts, outputs, groups * 32), np.float32)
    for e, o, i in np.ndindex(weight.shape):
        byte = parts["_blocks"][e, o, i // 32, i % 32 // 2]
        weight[e, o, i] = e2m1(byte >> (4 * (i % 2)) & 15) * 2.0 ** (int(parts["_scales"][e, o, i // 32]) - 127)
    return weight


LAYERS = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (96, 64),
    "mlp.up_proj": (96, 64),
    "mlp.down_proj": (64, 96),
}  # [outputs, inputs] of the linear layers of a small Llama


def write_llama(directory, make, *, layers=1, experts=0, file_of_settings=None, **options):
    """A small Llama, or Mixtral of some experts, whose linear layers `make` has quantised. Norms, embedding, head and
    router are as they are.

    Args:
      file_of_settings: a file beside config.json for the quantisation's settings; None: in config.json.

    Returns:
      The settings, and every layer's tensors by its name.
    """
    rng = np.random.default_rng(0)
    made, settings = {}, {}
    shapes = dict(LAYERS)
    for name, theirs in {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}.items() if experts else ():
        shape = shapes.pop(f"mlp.{name}")
        shapes |= {f"block_sparse_moe.experts.{e}.{theirs}": shape for e in range(experts)}
    for i, (name, shape) in itertools.product(range(layers), shapes.items()):
        made[f"model.layers.{i}.{name}"], settings = make(rng, *shape, **options)
    plain = {
        "model.embed_tokens.weight": rng.standard_normal((50, 64)) / 8,
        "lm_head.weight": rng.normal(size=(50, 64)),
    }
    plain["model.norm.weight"] = rng.uniform(0.5, 1.5, 64)
    for i, name in itertools.product(range(layers), ("input_layernorm", "post_attention_layernorm")):
        plain[f"model.layers.{i}.{name}.weight"] = rng.uniform(0.5, 1.5, 64)
        if experts:
            plain[f"model.layers.{i}.block_sparse_moe.gate.weight"] = rng.standard_normal((experts, 64))
    arrays = {name: array.astype(np.float32) for name, array in plain.items()}
    for name, parts in made.items():
        arrays |= named(name, parts)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 50,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    if experts:
        config |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": experts}
    directory.mkdir()
    if file_of_settings is None:
        config["quantization_config"] = settings
    else:
        (directory / file_of_settings).write_text(json.dumps(settings))
    (directory / "config.json").write_text(json.dumps(config))
    save_file(arrays, directory / "model.safetensors", metadata={"format": "pt"})
    return settings, made


def write_gpt_oss(directory, plain_directory):
    """A small gpt-oss with MXFP4 experts, and the same with the weights that they stand for."""
    rng = np.random.default_rng(0)
    inside = "model.layers.0"
    shapes = {"model.embed_tokens.weight": (50, 64), "lm_head.weight": (50, 64), f"{inside}.self_attn.sinks": (4,)}
    for name, (outputs, inputs) in {"q": (64, 64), "k": (32, 64), "v": (32, 64), "o": (64, 64)}.items():
        shapes[f"{inside}.self_attn.{name}_proj.weight"] = (outputs, inputs)
        shapes[f"{inside}.self_attn.{name}_proj.bias"] = (outputs,)
    shapes |= {f"{inside}.mlp.router.weight": (3, 64), f"{inside}.mlp.router.bias": (3,)}
    shapes |= {f"{inside}.mlp.experts.gate_up_proj_bias": (3, 64), f"{inside}.mlp.experts.down_proj_bias": (3, 64)}
    arrays = {name: rng.standard_normal(shape) / 8 for name, shape in shapes.items()}
    for name in ("model.norm", f"{inside}.input_layernorm", f"{inside}.post_attention_layernorm"):
        arrays[f"{name}.weight"] = rng.uniform(0.5, 1.5, 64)
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    config = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "vocab_size": 50,
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 128,
        "sliding_window": 16,
    }
    quantised, plain = dict(arrays), dict(arrays)
    for name, (outputs, inputs) in {"gate_up_proj": (64, 64), "down_proj": (64, 32)}.items():
        parts, settings = make_mxfp4(rng, 3, outputs, inputs)
        quantised |= named(f"{inside}.mlp.experts.{name}", parts)
        plain[f"{inside}.mlp.experts.{name}"] = np.swapaxes(read_mxfp4(parts, settings), 1, 2)
    for path, tensors, fields in (
        (directory, quantised, {"quantization_config": settings}),
        (plain_directory, plain, {}),
    ):
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config | fields))
        save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, path / "model.safetensors")
