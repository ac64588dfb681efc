"""Hugging Face directories to and from parameter trees.

In: a directory with `config.json` and `model.safetensors` (or shards with an index). Out: a `ModelConfig` and a nested
dictionary of arrays, each tensor read, transformed and placed on the device alone. `write_model` is the inverse.
Everything that can be known from the files' headers is checked before the first tensor is read.

Which tensor goes where is a family's table (`families/`); what this file does is the same for all. Only safetensors are
read: pickled weights can run code.
"""

import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rlae_jax import sharding
from rlae_jax.errors import InputError, grouped_error
from rlae_jax.files import read_json
from rlae_jax.models.config import ModelConfig
from rlae_jax.models.families import FAMILIES, Family, made_family
from rlae_jax.models.families.base import settings
from rlae_jax.models.rope import frequencies
from rlae_jax.models.transformer import Params, abstract_params, linears, logical_axes

DTYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
_STORED_DTYPES = ("F64", "F32", "F16", "BF16")
PRECISIONS = (None, "default", "high", "highest")
SHARD_BYTES = 5_000_000_000
START = 16  # entries of an array by which a model is known again


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """Where a model came from: what `write_model` needs to write it back."""

    family: Family
    config: Mapping[str, Any]  # config.json as it was
    generation: Mapping[str, Any]  # generation_config.json as it was


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One checkpoint tensor and the leaves of the parameter tree that it holds."""

    key: str
    paths: tuple[tuple[Any, ...], ...]  # several: a fused tensor, split along its outputs
    shapes: tuple[tuple[int, ...], ...]  # of the leaves
    kind: Literal["kernel", "bias", "plain"] = "plain"  # of a linear layer, or stored as it is
    inputs: int = 0  # leading axes of a kernel that are inputs
    inputs_first: bool = False  # a kernel stored as [inputs, outputs]
    by_head: bool = False  # a fused tensor that holds the parts of one head after another

    def _parts(self) -> list[tuple[int, ...]]:
        """The leaves' shapes as [inputs, outputs...]."""
        return [(math.prod(shape[: self.inputs]), *shape[self.inputs :]) for shape in self.shapes]

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is stored."""
        if self.kind == "plain":
            return self.shapes[0]
        parts = self._parts()
        outputs = sum(math.prod(part[1:]) for part in parts)
        if self.kind == "bias":
            return (outputs,)
        return (parts[0][0], outputs) if self.inputs_first else (outputs, parts[0][0])

    def split(self, tensor: np.ndarray) -> list[np.ndarray]:
        """The leaves that the stored tensor holds."""
        if self.kind == "plain":
            return [tensor]
        parts = self._parts()
        rows = tensor.reshape(1, -1) if self.kind == "bias" else tensor if self.inputs_first else tensor.T
        if self.by_head:
            heads, width = parts[0][1:]
            split = list(np.moveaxis(rows.reshape(rows.shape[0], heads, len(parts), width), 2, 0))
        else:
            edges = np.cumsum([math.prod(part[1:]) for part in parts])[:-1]
            split = np.split(rows, edges, axis=1)
        return [part.reshape(shape) for part, shape in zip(split, self.shapes, strict=True)]

    def join(self, leaves: list[np.ndarray]) -> np.ndarray:
        """The stored tensor that holds the leaves."""
        if self.kind == "plain":
            return leaves[0]
        parts = [leaf.reshape(shape) for leaf, shape in zip(leaves, self._parts(), strict=True)]
        tensor: np.ndarray
        if self.by_head:
            tensor = np.stack(parts, axis=2).reshape(parts[0].shape[0], -1)
        else:
            tensor = np.concatenate([part.reshape(part.shape[0], -1) for part in parts], axis=1)
        if self.kind == "bias":
            return tensor.reshape(-1)
        return tensor if self.inputs_first else tensor.T


def split_path(path: str) -> tuple[Any, ...]:
    """("layers", 0, "attention") of "layers.0.attention": keys of the parameter tree."""
    return tuple(int(name) if name.isdigit() else name for name in path.split("."))


def get_leaf(tree: Params, path: tuple[Any, ...]) -> Any:
    """What stands at a path of the tree, or None."""
    for key in path:
        if not isinstance(tree, dict) or key not in tree:
            return None
        tree = tree[key]
    return tree


def _put(tree: Params, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def modules(family: Family, config: ModelConfig) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(the family's name of a module, the same with its layer's number, our dotted paths) of every module that the
    model has."""
    table = family.modules(config) if callable(family.modules) else family.modules
    tree = abstract_params(config)
    for name, ours in table.items():
        ours = (ours,) if isinstance(ours, str) else ours
        stack = config.encoder if ours[0].startswith("encoder.") and config.encoder else config
        for i in range(stack.layers if "{i}" in name + ours[0] else 1):
            paths = tuple(path.format(i=i) for path in ours)
            if get_leaf(tree, split_path(paths[0])) is not None:
                yield name, name.format(i=i), paths


def stored_tensors(family: Family, config: ModelConfig) -> tuple[StoredTensor, ...]:
    """Every tensor of a model's checkpoint."""
    tree, specs = abstract_params(config), linears(config)
    found = []
    for name, key, paths in modules(family, config):
        first = get_leaf(tree, split_path(paths[0]))
        if not isinstance(first, dict):
            found.append(StoredTensor(f"{key}.weight", (split_path(paths[0]),), (first.shape,)))
            continue
        linear = specs.get(paths[0])
        for leaf in first:
            leaf_paths = tuple((*split_path(path), leaf) for path in paths)
            found.append(
                StoredTensor(
                    f"{key}.bias" if leaf == "bias" else f"{key}.weight",
                    leaf_paths,
                    tuple(get_leaf(tree, path).shape for path in leaf_paths),
                    kind=leaf if linear and leaf in ("kernel", "bias") else "plain",
                    inputs=linear.inputs if linear and leaf == "kernel" else 0,
                    inputs_first=name in family.inputs_first,
                    by_head=name in family.fused_by_head,
                )
            )
    return tuple(found)


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def read_source(directory: Path) -> Source:
    """What a Hugging Face directory says of its model.

    Raises:
      InputError: no such directory, no readable config.json, a family that is not supported, a quantised checkpoint, or
        one whose code would have to be downloaded.
    """
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise InputError(f"{directory} {what}; expected a Hugging Face directory with config.json and safetensors")
    path = directory / "config.json"
    if not path.is_file():
        raise InputError(f"{path}: missing; expected a Hugging Face directory with config.json and safetensors")
    raw = read_json(path)
    names = raw.get("architectures") or [raw.get("model_type", "unnamed")]
    by_architecture = {name: family for family in FAMILIES.values() for name in family.architectures}
    # Some encoders' repositories name no architecture (DeBERTa v3's); then the model_type decides.
    family = by_architecture.get(names[0]) or FAMILIES.get(names[0]) if isinstance(names, list) else None
    if family is None or raw.get("model_type", family.model_type) != family.model_type:
        if raw.get("auto_map"):
            raise InputError(
                f"{path}: {names[0]} needs code from its own repository, which is never run; supported families: "
                f"{', '.join(FAMILIES)}"
            )
        raise InputError(
            f"{path}: architecture {names[0]} is not supported (model_type {raw.get('model_type')}); supported: "
            f"{', '.join(by_architecture)}"
        )
    quantised = raw.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "unnamed") if isinstance(quantised, dict) else quantised
        raise InputError(
            f"{path}: quantised weights (quantization_config, {method}) are not supported; "
            f"supported: {', '.join(DTYPES)}"
        )
    return Source(family, raw, _read_optional(directory / "generation_config.json"))


def _fields(source: Source, path: Path, context: int | None) -> dict[str, Any]:
    """The family's reading of config.json."""
    try:
        return source.family.read(settings(source.family, source.config, context))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except AttributeError as error:
        raise InputError(f"{path}: the field {error.name} is missing") from error
    except KeyError as error:
        raise InputError(f"{path}: the field {error} is missing") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{path}: a field has an unusable value ({error})") from error


def read_config(
    source: Source,
    directory: Path,
    *,
    dtype: str,
    precision: str | None,
    context: int | None = None,
    tensors: bool = True,
) -> ModelConfig:
    """The `ModelConfig` of a directory's model.

    Args:
      tensors: False where there need not be any: a family whose tensors tell whether its head is tied is then taken at
        its configuration's word.

    Raises:
      InputError: a setting that is missing, unusable or not supported.
    """
    config = _config(source, directory / "config.json", dtype, precision, context)
    if tensors and source.family.head_decides_tie and "lm_head.weight" not in tensor_files(directory):
        config = dataclasses.replace(config, tied_head=True)
    return config


def _config(source: Source, path: Path, dtype: str, precision: str | None, context: int | None = None) -> ModelConfig:
    """What config.json alone says."""
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not supported; use one of {', '.join(DTYPES)}")
    if precision not in PRECISIONS:
        known = ", ".join(map(str, PRECISIONS))
        raise InputError(f"precision {precision!r} is not supported; use one of {known}")
    fields = _fields(source, path, context)
    of_text = {**source.config, **source.generation}
    ends = of_text.get("eos_token_id")
    if fields.get("encoder") is not None:
        fields["encoder"] = dataclasses.replace(fields["encoder"], dtype=dtype, precision=precision)
    try:
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        config = ModelConfig(
            **{
                **fields,
                "context": fields["context"] if context is None else context,
                "bos_id": of_text.get("bos_token_id"),
                "pad_id": of_text.get("pad_token_id", fields.get("pad_id")),
                "end_ids": tuple(int(end) for end in ends),
                "dtype": dtype,
                "precision": precision,
            }
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: a field has an unusable value ({error})") from error
    _check_sizes(config, path)
    if context is not None and config.learned_positions and context > fields["context"]:
        raise InputError(f"context {context} is more than the {fields['context']} positions that {path} has")
    return config


def _check_sizes(config: ModelConfig, path: Path) -> None:
    sizes = ("vocab", "width", "layers", "heads", "kv_heads", "head_width", "ffn_width", "context")
    wrong = [f"{size} = {getattr(config, size)}" for size in sizes if not _is_size(getattr(config, size))]
    if wrong:
        raise InputError(f"{path}: every size must be a whole number and at least 1, not {', '.join(wrong)}")
    if config.heads % config.kv_heads:
        raise InputError(
            f"{path}: num_key_value_heads ({config.kv_heads}) must divide num_attention_heads ({config.heads})"
        )
    for rope in (config.rope, config.local_rope):
        if rope is None:
            continue
        if int(config.head_width * rope.fraction) % 2:
            raise InputError(f"{path}: rotary positions need an even number of a head's {config.head_width} entries")
        try:
            frequencies(rope, config.head_width)
        except KeyError as error:
            raise InputError(f"{path}: rope_type {rope.kind} lacks {error}") from error
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}: unusable numbers for rope_type {rope.kind} ({error})") from error


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and value >= 1


def tensor_files(directory: Path, name: str = "model") -> dict[str, Path]:
    """Tensor name -> the file that holds it, of `name`.safetensors or its shards.

    Raises:
      InputError: no such files, only pickled ones, shards that are not there, files that are corrupt.
    """
    index, single = directory / f"{name}.safetensors.index.json", directory / f"{name}.safetensors"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise InputError(f"{index}: weight_map is missing or no JSON object of tensor and file names")
        absent = sorted({file for file in weight_map.values() if not (directory / file).is_file()})
        if absent:
            raise grouped_error(
                f"{directory}: the index names files that are not there", [("files", file) for file in absent]
            )
        return {key: directory / file for key, file in weight_map.items()}
    if not single.is_file():
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
        if pickled:
            raise InputError(
                f"{directory}: only pickled weights ({', '.join(pickled[:5])}); pickles can run code and are never "
                f"read. Save the model with safe_serialization=True to get {name}.safetensors"
            )
        raise InputError(f"{directory}: no {name}.safetensors and no {name}.safetensors.index.json")
    return dict.fromkeys(tensor_shapes(single), single)


def open_tensors(path: Path) -> Any:
    """A safetensors file.

    Raises:
      InputError: it is truncated or corrupt.
    """
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: truncated or corrupt safetensors file ({error})") from error


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in a file, from its header."""
    reader = open_tensors(path)
    return {key: tuple(reader.get_slice(key).get_shape()) for key in list(reader.keys())}


def tensor_dtypes(path: Path) -> dict[str, str]:
    """The dtype of every tensor in a file, as safetensors names it, from its header."""
    reader = open_tensors(path)
    return {key: reader.get_slice(key).get_dtype() for key in list(reader.keys())}


def read_tensor(path: Path, key: str) -> np.ndarray:
    """One tensor. The file is opened for it alone: pages of an open mapping that were read stay resident."""
    try:
        tensor: np.ndarray = open_tensors(path).get_tensor(key)
        return tensor
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot read {key} ({error})") from error


def _modern(key: str) -> str:
    """Names of the first BERT checkpoints."""
    return re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", key))


class Tensors(NamedTuple):
    """What was read of a model's tensors."""

    params: Params
    starts: bytes  # of every array its first entries, by which a model is known again


def read_params(directory: Path, source: Source, config: ModelConfig, mesh: Mesh | None = None) -> Tensors:
    """Reads every tensor of the model, one at a time, in `config.dtype`.

    Args:
      mesh: where the tensors go, every part straight to its devices; None: the default device.

    Raises:
      InputError: pickled weights only, corrupt files, tensors missing, unexpected or of another shape.
    """
    family = source.family
    files = tensor_files(directory)
    names = {_modern(key): key for key in files}  # what the table calls a tensor -> what the file calls it
    wanted = stored_tensors(family, config)
    expected = {tensor.key for tensor in wanted}
    if not any(name.startswith(family.prefix) for name in names):  # a checkpoint of the bare model
        names = {name if name in expected else family.prefix + name: key for name, key in names.items()}

    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    for path in sorted(set(files.values())):
        dtypes |= {key: dtype for key, dtype in tensor_dtypes(path).items() if files.get(key) == path}
        shapes |= {key: shape for key, shape in tensor_shapes(path).items() if files.get(key) == path}
    # A tied checkpoint may carry the head a second time.
    ignored = [
        r"\.rotary_emb\.inv_freq$",
        *family.ignored,
        *((r"^(lm_head|embed_out)\.weight$",) if config.tied_head else ()),
    ]
    findings = [
        ("unexpected", name)
        for name in sorted(names.keys() - expected)
        if not any(re.search(pattern, name) for pattern in ignored)
    ]
    for tensor in wanted:
        stored = shapes.get(names.get(tensor.key, ""))
        if stored is None:
            findings.append(("missing", tensor.key))
        elif stored != tensor.shape:
            findings.append(("mis-shaped", f"{tensor.key} is {list(stored)}, expected {list(tensor.shape)}"))
        elif dtypes[names[tensor.key]] not in _STORED_DTYPES:
            findings.append(("quantised or of no known dtype", f"{tensor.key} is {dtypes[names[tensor.key]]}"))
    if findings:
        raise grouped_error(
            f"{directory}: the tensors do not fit config.json", findings, "config.json and weights must belong together"
        )

    dtype = DTYPES[config.dtype]
    params: Params = {}
    starts: Params = {}
    places = {} if mesh is None else sharding.shardings(logical_axes(config), abstract_params(config), mesh)
    for tensor in wanted:
        key = names[tensor.key]
        stored_array = read_tensor(files[key], key)
        for leaf, part in zip(tensor.paths, tensor.split(stored_array), strict=True):
            if mesh is None:
                placed = jax.device_put(np.ascontiguousarray(part, dtype=dtype))
            else:
                placed = sharding.place(part, get_leaf(places, leaf), dtype)
            # Waiting for each tensor keeps one host copy alive at a time instead of the whole checkpoint.
            placed = jax.block_until_ready(placed)  # type: ignore[no-untyped-call,unused-ignore]  # jax gives no types
            _put(params, leaf, placed)
            _put(starts, leaf, np.asarray(part.flat[:START], dtype).tobytes())
    return Tensors(params, b"".join(jax.tree.leaves(starts)))


def made_source(config: ModelConfig) -> Source:
    """The `Source` of a model that was made here and not loaded: Llama's layout, or T5's for an encoder-decoder.

    Raises:
      InputError: the model is made of more than that layout can say.
    """
    family = made_family(config)
    assert family.write is not None
    source = Source(family, family.write(config), {})
    read = _config(source, Path("config.json"), config.dtype, config.precision)
    of_text = {name: getattr(config, name) for name in ("bos_id", "end_ids", "pad_id", "tokens")}
    if source.family.head_decides_tie:
        of_text["tied_head"] = config.tied_head
    if dataclasses.replace(read, **of_text) != config:
        raise InputError("only models loaded from a checkpoint, or of Llama's or T5's architecture, can be saved")
    return source


def write_model(
    directory: Path, config: ModelConfig, params: Params, source: Source | None = None, tokenizer: Any = None
) -> None:
    """Writes config.json, generation_config.json, safetensors and the tokenizer's files.

    The directory appears under its name only when it is complete.

    Raises:
      InputError: the directory exists already; a model made here that is not of Llama's or T5's architecture.
    """
    if directory.exists():
        raise InputError(f"{directory} exists already; choose another name or remove it")
    source = made_source(config) if source is None else source
    ends = config.end_ids[0] if len(config.end_ids) == 1 else list(config.end_ids) or None
    of_text = {"bos_token_id": config.bos_id, "eos_token_id": ends, "pad_token_id": config.pad_id}
    raw = {key: value for key, value in source.config.items() if key != "torch_dtype"}
    raw |= {"architectures": [source.family.architecture(config)], "model_type": source.family.model_type}
    raw |= {"dtype": config.dtype} | of_text
    files = {"config.json": raw}
    if config.has_head:
        files["generation_config.json"] = generation = dict(source.generation) | of_text
    if config.start_id is not None:
        raw["decoder_start_token_id"] = generation["decoder_start_token_id"] = config.start_id
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_tensors(partial, stored_tensors(source.family, config), params)
        for name, content in files.items():
            (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_tensors(directory: Path, tensors: tuple[StoredTensor, ...], params: Params) -> None:
    """One file, or shards with an index, each at most SHARD_BYTES; one shard in memory at a time."""
    shards: list[list[StoredTensor]] = [[]]
    size = total = 0
    for tensor in tensors:
        held = sum(get_leaf(params, path).nbytes for path in tensor.paths)
        if shards[-1] and size + held > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size, total = size + held, total + held
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        name = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        arrays = {t.key: t.join([np.asarray(get_leaf(params, path)) for path in t.paths]) for t in shard}
        save_file(
            {key: np.ascontiguousarray(array) for key, array in arrays.items()},
            directory / name,
            metadata={"format": "pt"},
        )
        weight_map |= dict.fromkeys(arrays, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
