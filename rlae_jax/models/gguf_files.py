"""GGUF files, llama.cpp's format: metadata, and tensors that are dequantised one at a time.

In: a .gguf file, or all parts of one that is split. Out: a `GgufFile`, of which only the headers have been read, and
with `read_extent` one tensor. What model it is, `gguf_models` says, and `gguf_tokenizer` makes its tokenizer.

Types and their arithmetic are the `gguf` package's. The header is read here: the package's reader keeps several arrays
for every string, which takes 9 s for Gemma 3's vocabulary where this takes 0.1 s, and all that it says of a file that
was cut is that some array has no such shape.
"""

import dataclasses
import functools
import math
import mmap
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from rlae_jax.errors import InputError
from rlae_jax.files import check_fetched

SUFFIX = ".gguf"
INSTALL = "pip install 'rlae-jax[gguf]'"
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
_VERSIONS = (2, 3)
PLAIN = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_ROWS = (
    512  # of a quantised tensor that are dequantised at a time: what lies between bytes and numbers stays in a cache
)

Metadata = Mapping[str, Any]


def import_gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise InputError(f"GGUF files are read with the gguf package, which is not installed: {INSTALL}") from error
    return gguf


class Extent(NamedTuple):
    """Where a tensor lies."""

    path: Path
    offset: int
    bytes: int
    kind: str  # gguf.GGMLQuantizationType's name
    shape: tuple[int, ...]  # [outputs, inputs]


def find(path: Path) -> Path | None:
    """The GGUF file that a path means, the first part of a split one; None where it means something else.

    A directory means the one model that it holds, if it holds no safetensors.

    Raises:
      InputError: a directory with several.
    """
    if not path.is_dir():
        return path if path.suffix == SUFFIX and path.is_file() else None
    # A vision tower lies beside its language model as mmproj-*.gguf.
    names = sorted(file.name for file in path.glob(f"*{SUFFIX}") if not file.name.startswith("mmproj"))
    if not names or any(path.glob("*.safetensors")):
        return None
    models = {name if (part := _PART.fullmatch(name)) is None else part[1]: name for name in reversed(names)}
    if len(models) > 1:
        listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise InputError(f"{path} holds {len(models)} GGUF models ({listed}); name the file to load")
    return path / next(iter(models.values()))


def stem(path: Path) -> str:
    """What a model is called after its file."""
    part = _PART.fullmatch(path.name)
    return path.stem if part is None else part[1]


def part_names(name: str) -> list[str]:
    """The names of all files of the model that a file belongs to."""
    part = _PART.fullmatch(name)
    if part is None:
        return [name]
    base, count = part[1], int(part[3])
    return [f"{base}-{i + 1:05d}-of-{count:05d}{SUFFIX}" for i in range(count)]


def parts(path: Path) -> list[Path]:
    """All files of the model that one of them belongs to."""
    paths = [path.with_name(name) for name in part_names(path.name)]
    absent = [file.name for file in paths if not file.is_file()]
    if absent:
        listed = ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else "")
        raise InputError(f"{path}: {len(absent)} of the {len(paths)} parts are not beside it: {listed}")
    return paths


# The types of values (the format's description in llama.cpp, ggml/include/gguf.h).
_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
_MOST_AXES = 4


class _Cursor:
    """Values of a file, one after another."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise self.cut()
        self.at += count
        return self.data[self.at - count : self.at]

    def cut(self) -> InputError:
        return InputError(f"{self.path}: the file ends within its header, after {len(self.data)} bytes; it was cut")

    def array(self, dtype: str, count: int) -> np.ndarray:
        return np.frombuffer(self.take(np.dtype(dtype).itemsize * count), dtype)

    def integer(self, dtype: str = "<u8") -> int:
        return int(self.array(dtype, 1)[0])

    def axes(self) -> int:
        """How many axes a tensor has."""
        axes = self.integer("<u4")
        if axes > _MOST_AXES:
            raise InputError(f"{self.path}: a tensor of {axes} axes; the format has at most {_MOST_AXES}")
        return axes

    def string(self) -> str:
        return self._decode(self.take(self.integer()))

    def strings(self, count: int) -> list[str]:
        """A vocabulary has some 100,000: one loop without a call."""
        data, at, size, found = self.data, self.at, len(self.data), []
        unpack = struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                start = at + 8
                at = start + unpack(data, at)[0]
                found.append(data[start:at].decode())
                if at > size:
                    raise self.cut()
        except struct.error as error:
            raise self.cut() from error
        except UnicodeDecodeError as error:
            raise self._no_text(error) from error
        self.at = at
        return found

    def value(self) -> Any:
        """A Python value; numbers in a row are an array."""
        kind = self.integer("<u4")
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            kind, count = self.integer("<u4"), self.integer()
            if kind == _STRING:
                return self.strings(count)
            return self.array(self._scalar(kind), count)
        value = self.array(self._scalar(kind), 1)[0]
        # 1e-6, as config.json had it, and not 9.999999974752427e-07: the same float32.
        return float(str(value)) if value.dtype == np.float32 else value.item()

    def _scalar(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise InputError(f"{self.path}: a value in its metadata is of the unknown type {kind}; the file is corrupt")
        return _SCALARS[kind]

    def _decode(self, text: bytes) -> str:
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise self._no_text(error) from error

    def _no_text(self, error: UnicodeDecodeError) -> InputError:
        return InputError(f"{self.path}: a string in its header is no UTF-8 ({error}); the file is corrupt")


def _read_part(path: Path) -> tuple[dict[str, Any], dict[str, Extent]]:
    """The metadata and the tensors of one file."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read_header(_Cursor(path, data))
    except (OSError, ValueError) as error:  # mmap raises ValueError for an empty file
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read as a GGUF file ({error})") from error


def _read_header(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, Extent]]:
    path, size = cursor.path, len(cursor.data)
    if size < 4 or cursor.take(4) != b"GGUF":
        check_fetched(path)
        raise InputError(f"{path}: no GGUF file; it does not begin with the letters GGUF")
    version = cursor.integer("<u4")
    if version & 0xFFFF == 0:
        raise InputError(f"{path}: a big-endian GGUF file; only little-endian ones are read")
    if version not in _VERSIONS:
        raise InputError(f"{path}: GGUF version {version} is not supported; supported: 2, 3")
    tensors, pairs = cursor.integer(), cursor.integer()
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = cursor.string()
        metadata[key] = cursor.value()
    described = [
        (cursor.string(), cursor.array("<u8", cursor.axes()), cursor.integer("<u4"), cursor.integer())
        for _ in range(tensors)
    ]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment < 1 << 31:
        raise InputError(
            f"{path}: general.alignment is {alignment!r}; it must be a whole number, at least 1 and below 2^31"
        )
    start = -(-cursor.at // alignment) * alignment
    found: dict[str, Extent] = {}
    for name, dims, kind, offset in described:
        if name in found:
            raise InputError(f"{path}: it has two tensors called {name}; the file is corrupt")
        found[name] = _extent(path, name, tuple(int(size) for size in reversed(dims)), kind, start + offset)
    end = max((extent.offset + extent.bytes for extent in found.values()), default=0)
    if end > size:
        raise InputError(f"{path}: the file ends after {size} of {end} bytes; it was cut")
    return metadata, found


def _extent(path: Path, name: str, shape: tuple[int, ...], number: int, offset: int) -> Extent:
    kind, (per_block, block_bytes) = _type(number, path, name)
    inputs = shape[-1] if shape else 1
    if 0 in shape:
        raise InputError(f"{path}: {name} is {list(shape)}, and so empty")
    if inputs % per_block:
        raise InputError(f"{path}: {name} has {inputs} inputs, which blocks of {per_block} ({kind}) do not divide")
    return Extent(path, offset, math.prod(shape) // per_block * block_bytes, kind, shape)


def _type(number: int, path: Path, name: str) -> tuple[str, tuple[int, int]]:
    """A type's name, and how many entries and bytes a block of it has."""
    gguf = import_gguf()
    try:
        kind = gguf.GGMLQuantizationType(number)
        sizes = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError) as error:
        raise InputError(f"{path}: {name} is of the type {number}, which this gguf package does not know") from error
    if kind.name not in PLAIN and not _can_dequantise(kind, sizes[1]):
        raise InputError(f"{path}: {name} is of the type {kind.name}, which the gguf package cannot dequantise")
    return str(kind.name), sizes


@functools.cache
def _can_dequantise(kind: Any, block_bytes: int) -> bool:
    try:
        import_gguf().dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def read_extent(extent: Extent) -> np.ndarray:
    """A tensor's numbers, float32 if they were quantised. Its bytes are mapped for it alone: pages of a mapping that
    were read stay resident."""
    try:
        raw = np.memmap(extent.path, np.uint8, "r", extent.offset, (extent.bytes,))
    except (OSError, ValueError) as error:
        raise InputError(f"{extent.path}: a tensor cannot be read ({error})") from error
    if extent.kind in PLAIN:
        # Copied, or the mapping would live as long as the tensor.
        plain: np.ndarray = np.array(raw).view(PLAIN[extent.kind])
        return plain.reshape(extent.shape)
    gguf = import_gguf()
    kind = gguf.GGMLQuantizationType[extent.kind]
    rows = math.prod(extent.shape[:-1])
    blocks = np.asarray(raw).reshape(rows, -1)
    values = np.empty((rows, extent.shape[-1]), np.float32)
    for row in range(0, rows, _ROWS):
        values[row : row + _ROWS] = gguf.dequantize(blocks[row : row + _ROWS], kind)
    return values.reshape(extent.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class GgufFile:
    """A GGUF model of which the headers have been read."""

    path: Path  # the file, or the part that was named
    metadata: Metadata
    extents: Mapping[str, Extent]  # by llama.cpp's names


def open_gguf(path: Path) -> GgufFile:
    """Reads the headers of a GGUF file, of a split one those of all its parts.

    Raises:
      InputError: no such file, no GGUF file, one that was cut, of another version, big-endian, with tensors of an
        unknown type or without one of its parts; the gguf package is not installed.
    """
    import_gguf()
    metadata: dict[str, Any] = {}
    extents: dict[str, Extent] = {}
    paths = parts(path)
    for part in paths:
        pairs, tensors = _read_part(part)
        twice = sorted(extents.keys() & tensors.keys())
        if twice:
            raise InputError(f"{part}: it has a second tensor called {twice[0]}; the parts do not belong together")
        metadata = metadata or pairs
        extents |= tensors
    count = metadata.get("split.count", 1)
    if not isinstance(count, int) or len(paths) != (count or 1):
        raise InputError(
            f"{path}: one of {count} parts; name them as llama.cpp does, {stem(path)}-00001-of-{count!s:0>5}{SUFFIX}"
        )
    expected = metadata.get("split.tensors.count", len(extents))
    if expected != len(extents):
        raise InputError(f"{path}: its parts have {len(extents)} tensors together, and should have {expected}")
    return GgufFile(path, metadata, extents)
