"""Hugging Face directories to and from parameter trees.

In: a directory with `config.json` and `model.safetensors` (or shards with an index). Out: a `ModelConfig` and a nested
dictionary of arrays, each tensor read, transformed and placed on the device alone. `write_model` is the inverse.
Everything that can be known from the files' headers is checked before the first tensor is read.

Only safetensors are read: pickled weights can run code.
"""

import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rlae_jax.errors import InputError, grouped_error
from rlae_jax.files import read_json
from rlae_jax.models.config import ModelConfig
from rlae_jax.models.transformer import Params, abstract_params

ARCHITECTURES = ("LlamaForCausalLM",)
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class TensorRule:
    """Where one checkpoint tensor lives in the parameter tree.

    A Hugging Face linear weight is [outputs, inputs]; our kernel is [inputs..., outputs...] with `input_axes` leading
    axes. `input_axes` 0 means the tensor is stored as it is.
    """

    name: str  # checkpoint key, {i} for the layer's number
    path: tuple[str, ...]  # below the layer if the name has {i}
    input_axes: int = 0


LLAMA_RULES = (
    TensorRule("model.embed_tokens.weight", ("embedding",)),
    TensorRule("model.layers.{i}.input_layernorm.weight", ("attention_norm", "scale")),
    TensorRule("model.layers.{i}.self_attn.q_proj.weight", ("attention", "q", "kernel"), 1),
    TensorRule("model.layers.{i}.self_attn.k_proj.weight", ("attention", "k", "kernel"), 1),
    TensorRule("model.layers.{i}.self_attn.v_proj.weight", ("attention", "v", "kernel"), 1),
    TensorRule("model.layers.{i}.self_attn.o_proj.weight", ("attention", "o", "kernel"), 2),
    TensorRule("model.layers.{i}.post_attention_layernorm.weight", ("ffn_norm", "scale")),
    TensorRule("model.layers.{i}.mlp.gate_proj.weight", ("ffn", "gate", "kernel"), 1),
    TensorRule("model.layers.{i}.mlp.up_proj.weight", ("ffn", "up", "kernel"), 1),
    TensorRule("model.layers.{i}.mlp.down_proj.weight", ("ffn", "down", "kernel"), 1),
    TensorRule("model.norm.weight", ("norm", "scale")),
    TensorRule("lm_head.weight", ("head", "kernel"), 1),
)
# Buffers that old checkpoints carry and no computation needs.
IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")


def _tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[Any, ...], TensorRule]]:
    """(checkpoint key, path in the parameter tree, rule) of every tensor of a model."""
    for rule in LLAMA_RULES:
        if rule.path[0] == "head" and config.tied_head:
            continue
        if "{i}" not in rule.name:
            yield rule.name, rule.path, rule
            continue
        for i in range(config.layers):
            yield rule.name.format(i=i), ("layers", i, *rule.path), rule


def _get(tree: Params, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _put(tree: Params, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _stored_shape(shape: tuple[int, ...], rule: TensorRule) -> tuple[int, ...]:
    if not rule.input_axes:
        return shape
    return math.prod(shape[rule.input_axes :]), math.prod(shape[: rule.input_axes])


def read_config(directory: Path, *, dtype: str, precision: str | None) -> ModelConfig:
    """The `ModelConfig` of a Hugging Face directory.

    Raises:
      InputError: no such directory, no readable config.json, an architecture or a setting that is not supported.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not supported; use one of {', '.join(DTYPES)}")
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise InputError(f"{directory} {what}; expected a Hugging Face directory with config.json and safetensors")
    path = directory / "config.json"
    if not path.is_file():
        raise InputError(f"{path}: missing; expected a Hugging Face directory with config.json and safetensors")
    raw = read_json(path)
    names = raw.get("architectures") or [raw.get("model_type", "unnamed")]
    if names[0] not in ARCHITECTURES:
        raise InputError(f"{path}: architecture {names[0]} is not supported; supported: {', '.join(ARCHITECTURES)}")

    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{path}: a field has an unusable value (rope parameters {rope!r} are no JSON object)")
    kind = rope.get("rope_type", rope.get("type", "default"))
    unsupported = {
        "rope_type": kind if kind != "default" else None,
        "hidden_act": raw.get("hidden_act", "silu") if raw.get("hidden_act", "silu") != "silu" else None,
        "attention_bias": raw.get("attention_bias") or None,
        "mlp_bias": raw.get("mlp_bias") or None,
        "quantization_config": "present" if raw.get("quantization_config") else None,
    }
    if any(unsupported.values()):
        found = ", ".join(f"{key} = {value}" for key, value in unsupported.items() if value)
        raise InputError(
            f"{path}: {found} is not supported; supported: default rope, silu, no biases, unquantised weights"
        )
    generation = directory / "generation_config.json"
    ends = raw.get("eos_token_id")
    if generation.is_file():
        ends = read_json(generation).get("eos_token_id", ends)
    try:
        heads = int(raw["num_attention_heads"])
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        config = ModelConfig(
            vocab=int(raw["vocab_size"]),
            width=int(raw["hidden_size"]),
            layers=int(raw["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_width=int(raw.get("head_dim") or raw["hidden_size"] // max(heads, 1)),
            ffn_width=int(raw["intermediate_size"]),
            norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope_base=float(rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0),
            tied_head=bool(raw.get("tie_word_embeddings", False)),
            context=int(raw.get("max_position_embeddings", 2048)),
            bos_id=raw.get("bos_token_id"),
            end_ids=tuple(int(end) for end in ends),
            dtype=dtype,
            precision=precision,
        )
    except KeyError as error:
        raise InputError(f"{path}: the field {error} is missing") from error
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: a field has an unusable value ({error})") from error
    sizes = ("vocab", "width", "layers", "heads", "kv_heads", "head_width", "ffn_width", "context")
    if any(getattr(config, size) < 1 for size in sizes):
        found = ", ".join(f"{size} = {getattr(config, size)}" for size in sizes if getattr(config, size) < 1)
        raise InputError(f"{path}: every size must be at least 1, not {found}")
    if config.heads % config.kv_heads or config.head_width % 2:
        raise InputError(f"{path}: needs num_key_value_heads to divide num_attention_heads, and an even head_dim")
    return config


def _shards(directory: Path) -> dict[str, Path]:
    """Checkpoint key -> the file that holds it."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise InputError(f"{index}: weight_map is missing or no JSON object of tensor and file names")
        absent = sorted({name for name in weight_map.values() if not (directory / name).is_file()})
        if absent:
            raise grouped_error(
                f"{directory}: the index names files that are not there", [("files", a) for a in absent]
            )
        return {key: directory / name for key, name in weight_map.items()}
    if not single.is_file():
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
        if pickled:
            raise InputError(
                f"{directory}: only pickled weights ({', '.join(pickled[:5])}); pickles can run code and are never "
                "read. Save the model with safe_serialization=True to get model.safetensors"
            )
        raise InputError(f"{directory}: no model.safetensors and no model.safetensors.index.json")
    return dict.fromkeys(_open(single).keys(), single)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: truncated or corrupt safetensors file ({error})") from error


def read_params(directory: Path, config: ModelConfig) -> Params:
    """Reads every tensor of the model, one at a time, in `config.dtype`, onto the default device.

    Raises:
      InputError: pickled weights only, corrupt files, tensors missing, unexpected or of another shape.
    """
    files = _shards(directory)
    readers = {path: _open(path) for path in sorted(set(files.values()))}
    held = {path: set(reader.keys()) for path, reader in readers.items()}
    abstract = abstract_params(config)
    wanted = list(_tensors(config))

    # A tied checkpoint may carry the head a second time.
    unexpected = set(files) - {key for key, _, _ in wanted} - ({"lm_head.weight"} if config.tied_head else set())
    findings = [("unexpected", key) for key in sorted(unexpected) if not IGNORED.search(key)]
    for key, path, rule in wanted:
        if key not in files or key not in held[files[key]]:
            findings.append(("missing", key))
            continue
        stored = tuple(readers[files[key]].get_slice(key).get_shape())
        expected = _stored_shape(_get(abstract, path).shape, rule)
        if stored != expected:
            findings.append(("mis-shaped", f"{key} is {list(stored)}, expected {list(expected)}"))
    if findings:
        raise grouped_error(
            f"{directory}: the tensors do not fit config.json", findings, "config.json and weights must belong together"
        )

    params: Params = {}
    dtype = ml_dtypes.bfloat16 if config.dtype == "bfloat16" else np.dtype(config.dtype)
    for key, path, rule in wanted:
        try:
            tensor = readers[files[key]].get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{files[key]}: cannot read {key} ({error})") from error
        if rule.input_axes:
            tensor = tensor.T.reshape(_get(abstract, path).shape)
        # Waiting for each tensor keeps one host copy alive at a time instead of the whole checkpoint.
        _put(params, path, jax.block_until_ready(jax.device_put(np.ascontiguousarray(tensor, dtype=dtype))))
    return params


def write_model(directory: Path, config: ModelConfig, params: Params, tokenizer: Any = None) -> None:
    """Writes config.json, generation_config.json, model.safetensors and the tokenizer's files.

    The directory appears under its name only when it is complete.

    Raises:
      InputError: the directory exists already.
    """
    if directory.exists():
        raise InputError(f"{directory} exists already; choose another name or remove it")
    tensors = {}
    for key, path, rule in _tensors(config):
        array = np.asarray(_get(params, path))
        if rule.input_axes:
            array = array.reshape(_stored_shape(array.shape, rule)[::-1]).T
        tensors[key] = np.ascontiguousarray(array)
    ends = config.end_ids[0] if len(config.end_ids) == 1 else list(config.end_ids) or None
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.ffn_width,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "tie_word_embeddings": config.tied_head,
        "max_position_embeddings": config.context,
        "bos_token_id": config.bos_id,
        "eos_token_id": ends,
        "torch_dtype": config.dtype,
    }
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    (partial / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    (partial / "generation_config.json").write_text(
        json.dumps({"bos_token_id": config.bos_id, "eos_token_id": ends}, indent=2) + "\n", encoding="utf-8"
    )
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    partial.rename(directory)
