"""Where a checkpoint's tensors are, and which arrays of the parameter tree they hold.

`TensorSource` is what a file format has to offer: names and shapes without reading anything, and one tensor at a time.
`stored_tensors` is a family's table for one configuration: what each tensor is called, how it is shaped, and into which
leaves of the tree it is split.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rlae_jax import files, records
from rlae_jax.errors import InputError, grouped_error
from rlae_jax.files import check_fetched
from rlae_jax.models import hugging_face
from rlae_jax.models.config import GatedDelta, ModelConfig
from rlae_jax.models.families import Family
from rlae_jax.models.families.wrappers import text_names
from rlae_jax.models.quantise import KINDS, Quantised
from rlae_jax.models.transformer import Params, abstract_params, linears, mixture_linears

EIGHT_BIT_FLOATS: dict[str, Any] = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}
PACKED = "packed"


class Header(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors names it: "F32", "BF16", "F8_E4M3", "I32", ...; PACKED: it is read as `Packed`


class Packed(NamedTuple):
    """The weight of a linear layer as a quantised checkpoint holds it: (values - zero) * scale."""

    values: np.ndarray  # [outputs, inputs], int8 ("int4": -8 to 7) or float8_e4m3fn
    scale: np.ndarray  # float32 [outputs, groups]: 1, or inputs / group of them along the inputs
    zero: np.ndarray | None  # the same; None: 0
    kind: Literal["int8", "int4", "fp8"]

    def weights(self) -> np.ndarray:
        """What it stands for, float32 [outputs, inputs]."""
        each = self.values.shape[-1] // self.scale.shape[-1]
        weights = self.values.astype(np.float32)
        if self.zero is not None:
            weights -= np.repeat(self.zero, each, axis=-1)
        weights *= np.repeat(self.scale, each, axis=-1)
        return weights


class TensorSource(Protocol):
    """A checkpoint's tensors under their Hugging Face names and in Hugging Face's layout, [outputs, inputs]."""

    @property
    def headers(self) -> Mapping[str, Header]:
        """Of every tensor, without reading it."""

    def read(self, name: str) -> np.ndarray | Packed:
        """One tensor."""


class Safetensors:
    """The tensors of `name`.safetensors, or of its shards.

    Raises:
      InputError: no such files, only pickled ones, shards that are not there, files that are corrupt.
    """

    def __init__(self, directory: Path, name: str = "model"):
        self._files = tensor_files(directory, name)
        self.headers: dict[str, Header] = {}
        for path in sorted(set(self._files.values())):
            self.headers |= {key: of for key, of in tensor_headers(path).items() if self._files.get(key) == path}

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        return read_tensor(self._files[name], name)


class LanguageModel:
    """Of a multimodal checkpoint's tensors the language model's, under the names of a checkpoint of its own."""

    def __init__(self, tensors: TensorSource):
        self._tensors, self._names = tensors, text_names(tensors.headers)
        self.headers = {name: tensors.headers[theirs] for name, theirs in self._names.items()}

    def read(self, name: str) -> np.ndarray | Packed:
        """One tensor."""
        return self._tensors.read(self._names[name])


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One checkpoint tensor and the leaves of the parameter tree that it holds."""

    key: str
    paths: tuple[tuple[Any, ...], ...]  # several: a fused tensor, split along its outputs
    shapes: tuple[tuple[int, ...], ...]  # of the leaves; of an expert's tensor, of its slices of them
    kind: Literal["kernel", "bias", "plain"] = "plain"  # of a linear layer, or stored as it is
    inputs: int = 0  # leading axes of a kernel that are inputs
    inputs_first: bool = False  # a kernel stored as [inputs, outputs]
    groups: int = 0  # of a fused tensor that holds all parts of one key head after another; 0: part after part
    interleaved: bool = False  # a fused tensor whose outputs alternate between the parts
    stacked: bool = False  # of all experts, which are the first axis of tensor and leaves
    expert: int | None = None  # whose slice of the leaves this is

    def _parts(self) -> list[tuple[int, ...]]:
        """The leaves' shapes as [inputs, outputs...], without the axis of experts."""
        shapes = [shape[1:] if self.stacked else shape for shape in self.shapes]
        return [(math.prod(shape[: self.inputs]), *shape[self.inputs :]) for shape in shapes]

    @property
    def input_size(self) -> int:
        """Of a kernel."""
        return self._parts()[0][0]

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is stored."""
        if self.kind == "plain":
            return self.shapes[0]
        parts = self._parts()
        lead = self.shapes[0][:1] if self.stacked else ()
        outputs = sum(math.prod(part[1:]) for part in parts)
        if self.kind == "bias":
            return (*lead, outputs)
        return (*lead, parts[0][0], outputs) if self.inputs_first else (*lead, outputs, parts[0][0])

    def split(self, tensor: np.ndarray) -> list[np.ndarray]:
        """The leaves that the stored tensor holds."""
        if self.kind == "plain":
            return [tensor]
        parts = self._parts()
        rows = tensor[..., None, :] if self.kind == "bias" else tensor if self.inputs_first else tensor.swapaxes(-1, -2)
        if self.groups:
            edges = np.cumsum([math.prod(part[1:]) // self.groups for part in parts])[:-1]
            split = np.split(rows.reshape(rows.shape[0], self.groups, -1), edges, axis=2)
        elif self.interleaved:
            split = [rows[..., i :: len(parts)] for i in range(len(parts))]
        else:
            edges = np.cumsum([math.prod(part[1:]) for part in parts])[:-1]
            split = np.split(rows, edges, axis=-1)
        return [part.reshape(shape) for part, shape in zip(split, self.shapes, strict=True)]

    @property
    def packed_shape(self) -> tuple[int, ...]:
        """As it is packed, where it is: always [outputs, inputs]."""
        return dataclasses.replace(self, inputs_first=False).shape

    def split_packed(self, packed: Packed) -> list[Any]:
        """The kernels that a quantised weight holds, or the table with a scale per row: a table in groups of its
        columns is dequantised."""
        groups = packed.scale.shape[-1]
        if self.kind == "plain":
            if groups > 1:
                return [packed.weights()]
            return [Quantised(_of_kind(packed.values, packed.kind), packed.scale, packed.zero)]
        own = dataclasses.replace(self, inputs_first=False)
        experts = self.shapes[0][:1] if self.stacked else ()
        shapes = [shape[len(experts) + self.inputs :] for shape in self.shapes]  # of the outputs
        lead = (*experts, groups, 1) if groups > 1 else (*experts, *(1,) * self.inputs)
        per_group = dataclasses.replace(own, shapes=tuple((*experts, groups, *shape) for shape in shapes), inputs=1)
        split = [
            [None] * len(shapes) if part is None else per_group.split(part) for part in (packed.scale, packed.zero)
        ]
        kernels = []
        for values, scale, zero, shape in zip(own.split(packed.values), *split, shapes, strict=True):
            values = values.reshape(*experts, groups, -1, *shape) if groups > 1 else values
            scale, zero = (None if part is None else part.reshape(*lead, *shape) for part in (scale, zero))
            kernels.append(Quantised(_of_kind(values, packed.kind), scale, zero))
        return kernels

    def join(self, leaves: list[np.ndarray]) -> np.ndarray:
        """The stored tensor that holds the leaves."""
        if self.kind == "plain":
            return leaves[0]
        lead = self.shapes[0][:1] if self.stacked else ()
        parts = [leaf.reshape(*lead, *shape) for leaf, shape in zip(leaves, self._parts(), strict=True)]
        tensor: np.ndarray
        if self.groups:
            grouped = [part.reshape(part.shape[0], self.groups, -1) for part in parts]
            tensor = np.concatenate(grouped, axis=2).reshape(parts[0].shape[0], -1)
        elif self.interleaved:
            tensor = np.stack(parts, axis=-1).reshape(*parts[0].shape[:-1], -1)
        else:
            flat = [part.reshape(*lead, shape[0], -1) for part, shape in zip(parts, self._parts(), strict=True)]
            tensor = np.concatenate(flat, axis=-1)
        if self.kind == "bias":
            return tensor.reshape(*lead, -1)
        return tensor if self.inputs_first else tensor.swapaxes(-1, -2)


def _of_kind(values: np.ndarray, kind: str) -> np.ndarray:
    return values.astype(KINDS[kind]) if kind == "int4" else values


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


def put_leaf(tree: Params, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def modules(family: Family, config: ModelConfig) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(the family's name of a module, the same with its layer's number, our dotted paths) of every module that the
    model has; where each expert has one, its number is still {e}."""
    table = family.modules(config) if callable(family.modules) else family.modules
    tree = abstract_params(config)
    for name, ours in table.items():
        ours = (ours,) if isinstance(ours, str) else ours
        stack = config.encoder if ours[0].startswith("encoder.") and config.encoder else config
        for i in range(stack.layers if "{i}" in name + ours[0] else 1):
            paths = tuple(path.format(i=i) for path in ours)
            if get_leaf(tree, split_path(paths[0])) is not None:
                yield name, name.replace("{i}", str(i)), paths


def fused_heads(family: Family, config: ModelConfig, name: str, path: str) -> int:
    """The number of heads, one after another, whose parts a fused module holds; 0: it holds part after part."""
    if name not in family.fused_by_head:
        return 0
    if ".recurrence." in path:
        assert isinstance(config.recurrent, GatedDelta)
        return config.recurrent.key_heads
    return config.heads if config.attention_gate else config.kv_heads  # queries and their gate, or with keys and values


def stored_tensors(family: Family, config: ModelConfig) -> tuple[StoredTensor, ...]:
    """Every tensor of a model's checkpoint, one after another where experts have one each."""
    tree, specs = abstract_params(config), linears(config) | mixture_linears(config)
    found = []
    for name, key, paths in modules(family, config):
        first = get_leaf(tree, split_path(paths[0]))
        bare = name in family.unsuffixed
        if not isinstance(first, dict):
            found.append(StoredTensor(key if bare else f"{key}.weight", (split_path(paths[0]),), (first.shape,)))
            continue
        linear = specs.get(paths[0])
        of_experts = linear is not None and len(first["kernel"].shape) > len(linear.shape)
        for leaf in first:
            leaf_paths = tuple((*split_path(path), leaf) for path in paths)
            suffix = ("_bias" if bare else ".bias") if leaf == "bias" else "" if bare else ".weight"
            shapes = tuple(get_leaf(tree, path).shape for path in leaf_paths)
            tensor = StoredTensor(
                f"{key}{suffix}",
                leaf_paths,
                shapes,
                kind=leaf if linear and leaf in ("kernel", "bias") else "plain",
                inputs=linear.inputs if linear and leaf == "kernel" else 0,
                inputs_first=name in family.inputs_first,
                groups=fused_heads(family, config, name, paths[0]),
                interleaved=name in family.interleaved,
                stacked=of_experts and "{e}" not in key,
            )
            if not of_experts or tensor.stacked:
                found.append(tensor)
                continue
            slices = tuple(shape[1:] for shape in shapes)
            found += [
                dataclasses.replace(tensor, key=tensor.key.replace("{e}", str(e)), shapes=slices, expert=e)
                for e in range(shapes[0][0])
            ]
    return tuple(found)


def tensor_files(directory: Path, name: str = "model") -> dict[str, Path]:
    """Tensor name -> the file that holds it, of `name`.safetensors or its shards.

    Raises:
      InputError: no such files, only pickled ones, shards that are not there, files that are corrupt.
    """
    index, single = directory / f"{name}.safetensors.index.json", directory / f"{name}.safetensors"
    if index.is_file():
        weight_map = records.read(index, hugging_face.Index)["weight_map"]
        paths = {file: files.inside(directory, file, index) for file in set(weight_map.values())}
        absent = sorted(file for file, path in paths.items() if not path.is_file())
        if absent:
            raise grouped_error(
                f"{directory}: the index names files that are not there", [("files", file) for file in absent]
            )
        return {key: paths[file] for key, file in weight_map.items()}
    if not single.is_file():
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
        if pickled:
            raise InputError(
                f"{directory}: only pickled weights ({', '.join(pickled[:5])}); pickles can run code and are never "
                f"read. Save the model with safe_serialization=True to get {name}.safetensors"
            )
        raise InputError(f"{directory}: no {name}.safetensors and no {name}.safetensors.index.json")
    return dict.fromkeys(tensor_headers(single), single)


def open_tensors(path: Path) -> Any:
    """A safetensors file.

    Raises:
      InputError: it is truncated or corrupt, or was not fetched by git.
    """
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        check_fetched(path)
        raise InputError(f"{path}: truncated or corrupt safetensors file ({error})") from error


def tensor_headers(path: Path) -> dict[str, Header]:
    """Shape and dtype of every tensor in a file, from its header."""
    reader = open_tensors(path)
    slices = {key: reader.get_slice(key) for key in list(reader.keys())}
    return {key: Header(tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}


def read_tensor(path: Path, key: str) -> np.ndarray:
    """One tensor. The file is opened for it alone: pages of an open mapping that were read stay resident."""
    reader = open_tensors(path)
    try:
        if reader.get_slice(key).get_dtype() in EIGHT_BIT_FLOATS:
            return _read_eight_bit_floats(path, key)
        tensor: np.ndarray = reader.get_tensor(key)
        return tensor
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot read {key} ({error})") from error


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """A safetensors file of contiguous arrays. To be called within `files.making`: it is not written at once.

    Raises:
      OutputError: it cannot be written.
    """
    with files.library_write(path, sum(array.nbytes for array in tensors.values())):
        save_file(dict(tensors), path, metadata={"format": "pt"})


def _read_eight_bit_floats(path: Path, key: str) -> np.ndarray:
    """A tensor of a dtype that safetensors has no numpy array for. The header, whose length the first 8 bytes are,
    says where it lies after the header."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))[key]
        file.seek(8 + length + header["data_offsets"][0])
        stored = np.fromfile(file, EIGHT_BIT_FLOATS[header["dtype"]], math.prod(header["shape"]))
    return stored.reshape(header["shape"])
