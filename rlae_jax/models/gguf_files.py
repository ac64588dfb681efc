"""GGUF files, llama.cpp's format, read as Hugging Face checkpoints.

In: a .gguf file, or all parts of one that is split. Out: what its metadata say in the words of config.json, which the
families read as they do any other, and its tensors under their Hugging Face names and in their layout, each read from a
mapping of its own and dequantised alone. `gguf_tokenizer` makes the tokenizer.

Types, their arithmetic and the names of tensors are those of the `gguf` package, which the conversion to GGUF uses too;
what the conversion does to tensors is undone here (llama.cpp, conversion/*.py: `modify_tensors`). The header is read
here: the package's reader keeps several arrays for every string, which takes 9 s for Gemma 3's vocabulary where this
takes half a second, and all that it says of a file that was cut is that some array has no such shape.
"""

import dataclasses
import functools
import math
import mmap
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from rlae_jax.errors import InputError
from rlae_jax.models.families import FAMILIES
from rlae_jax.models.stored import Header

SUFFIX = ".gguf"
INSTALL = "pip install 'rlae-jax[gguf]'"
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
_VERSIONS = (2, 3)
_PLAIN = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_ROWS = (
    512  # of a quantised tensor that are dequantised at a time: what lies between bytes and numbers stays in a cache
)

Metadata = Mapping[str, Any]


def _import_gguf() -> Any:
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


def _parts(path: Path) -> list[Path]:
    """All files of the model that one of them belongs to."""
    part = _PART.fullmatch(path.name)
    if part is None:
        return [path]
    base, count = part[1], int(part[3])
    paths = [path.with_name(f"{base}-{i + 1:05d}-of-{count:05d}{SUFFIX}") for i in range(count)]
    absent = [file.name for file in paths if not file.is_file()]
    if absent:
        listed = ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else "")
        raise InputError(f"{path}: {len(absent)} of the {count} parts are not beside it: {listed}")
    return paths


# The types of values (the format's description in llama.cpp, ggml/include/gguf.h).
_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9


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
        (cursor.string(), cursor.array("<u8", cursor.integer("<u4")), cursor.integer("<u4"), cursor.integer())
        for _ in range(tensors)
    ]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise InputError(f"{path}: general.alignment is {alignment!r}; it must be a whole number and at least 1")
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
    if inputs % per_block:
        raise InputError(f"{path}: {name} has {inputs} inputs, which blocks of {per_block} ({kind}) do not divide")
    return Extent(path, offset, math.prod(shape) // per_block * block_bytes, kind, shape)


def _type(number: int, path: Path, name: str) -> tuple[str, tuple[int, int]]:
    """A type's name, and how many entries and bytes a block of it has."""
    gguf = _import_gguf()
    try:
        kind = gguf.GGMLQuantizationType(number)
        sizes = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError) as error:
        raise InputError(f"{path}: {name} is of the type {number}, which this gguf package does not know") from error
    if kind.name not in _PLAIN and not _can_dequantise(kind, sizes[1]):
        raise InputError(f"{path}: {name} is of the type {kind.name}, which the gguf package cannot dequantise")
    return str(kind.name), sizes


@functools.cache
def _can_dequantise(kind: Any, block_bytes: int) -> bool:
    try:
        _import_gguf().dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def read_extent(extent: Extent) -> np.ndarray:
    """A tensor's numbers, float32 if they were quantised. Its bytes are mapped for it alone: pages of a mapping that
    were read stay resident."""
    raw = np.memmap(extent.path, np.uint8, "r", extent.offset, (extent.bytes,))
    if extent.kind in _PLAIN:
        # Copied, or the mapping would live as long as the tensor.
        plain: np.ndarray = np.array(raw).view(_PLAIN[extent.kind])
        return plain.reshape(extent.shape)
    gguf = _import_gguf()
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

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """What config.json would say.

        Raises:
          InputError: an architecture that is not supported, settings that are missing or of another kind.
        """
        return _config(self)

    @property
    def generation(self) -> dict[str, Any]:
        """What generation_config.json would say."""
        ids = {"bos_token_id": self._token("bos"), "pad_token_id": self._token("padding"), "eos_token_id": self._ends()}
        return {name: value for name, value in ids.items() if value not in (None, [])}

    def _token(self, name: str) -> int | None:
        value = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return value if isinstance(value, int) else None

    def _ends(self) -> list[int]:
        """What ends a text (eos), a turn (eot) and a message (eom); where a chat template ends turns with a token that
        is none of them, that token too, which older files do not name."""
        ends = [id for name in ("eos", "eot", "eom") if (id := self._token(name)) is not None]
        template = self.metadata.get("tokenizer.chat_template")
        if isinstance(template, str) and self._token("eot") is None:
            tokens = self.metadata.get("tokenizer.ggml.tokens", [])
            ends += [tokens.index(end) for end in _TURN_ENDS if end in template and end in tokens]
        return list(dict.fromkeys(ends))


_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<turn|>", "<|endofturn|>", "[|endofturn|]")


def open_gguf(path: Path) -> GgufFile:
    """Reads the headers of a GGUF file, of a split one those of all its parts.

    Raises:
      InputError: no such file, no GGUF file, one that was cut, of another version, big-endian, with tensors of an
        unknown type or without one of its parts; the gguf package is not installed.
    """
    _import_gguf()
    metadata: dict[str, Any] = {}
    extents: dict[str, Extent] = {}
    paths = _parts(path)
    for part in paths:
        pairs, tensors = _read_part(part)
        twice = sorted(extents.keys() & tensors.keys())
        if twice:
            raise InputError(f"{part}: it has a second tensor called {twice[0]}; the parts do not belong together")
        metadata = metadata or pairs
        extents |= tensors
    count = metadata.get("split.count", 1)
    if len(paths) != (count or 1):
        raise InputError(
            f"{path}: one of {count} parts; name them as llama.cpp does, {stem(path)}-00001-of-{count:05d}{SUFFIX}"
        )
    expected = metadata.get("split.tensors.count", len(extents))
    if expected != len(extents):
        raise InputError(f"{path}: its parts have {len(extents)} tensors together, and should have {expected}")
    return GgufFile(path, metadata, extents)


class Keys(NamedTuple):
    """A file's settings, without the architecture's name before each."""

    path: Path
    architecture: str
    metadata: Metadata
    extents: Mapping[str, Extent]

    def get(self, key: str, default: Any = None) -> Any:
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, np.ndarray):
            value = value.tolist()
            # Some files give every layer its own, even where all are alike.
            return value[0] if value and value == [value[0]] * len(value) else value
        return value

    def number(self, key: str, default: Any = None) -> Any:
        """A number that the model cannot do without."""
        value = self.get(key, default)
        if isinstance(value, list):
            raise InputError(f"{self.path}: {self.architecture}.{key} differs from layer to layer: not supported")
        if isinstance(value, bool) or not isinstance(value, int | float):
            found = "is missing" if value is None else f"is {value!r}, no number"
            raise InputError(f"{self.path}: {self.architecture}.{key} {found}")
        return value

    def tensor(self, name: str) -> np.ndarray:
        return read_extent(self.extents[name])

    def some(self, **names: str) -> dict[str, Any]:
        """The settings under config.json's names that the file has."""
        return {name: value for name, key in names.items() if (value := self.get(key)) is not None}

    @property
    def layers(self) -> int:
        return int(self.number("block_count"))

    @property
    def head_width(self) -> int:
        width = self.number("embedding_length") // self.number("attention.head_count")
        return int(self.number("attention.key_length", width))


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures: how its settings are called in config.json, and what the conversion did to its
    tensors."""

    model_type: str
    read: Callable[[Keys], dict[str, Any]] = lambda keys: {}  # what is not as in Llama
    permuted: bool = False  # rows of queries and keys, a pair of rotated entries beside one another
    norm_offset: float = 0.0  # added to the scales of norms


def _settings(keys: Keys) -> dict[str, Any]:
    """What nearly all architectures have under the same names, as Llama's config.json has it."""
    heads = keys.number("attention.head_count")
    return {
        "vocab_size": keys.extents["token_embd.weight"].shape[0],
        "hidden_size": keys.number("embedding_length"),
        "num_hidden_layers": keys.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.number("attention.head_count_kv", heads),
        "head_dim": keys.head_width,
        "max_position_embeddings": keys.number("context_length"),
        "tie_word_embeddings": "output.weight" not in keys.extents,
        "rope_parameters": _rope(keys),
        **keys.some(
            intermediate_size="feed_forward_length",
            rms_norm_eps="attention.layer_norm_rms_epsilon",
            layer_norm_eps="attention.layer_norm_epsilon",
        ),
    }


def _rope(keys: Keys) -> dict[str, Any]:
    """The field `rope_parameters`.

    A file has the factors of Llama 3's and of longrope's pairs as tensors, one for each pair, by which its frequency is
    divided. Both are written as longrope, which is just that.
    """
    context = keys.number("context_length")
    fields = {"rope_theta": float(keys.number("rope.freq_base", 10_000.0)), "rope_type": "default"}
    lists = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
    old = keys.get("rope.scaling.original_context_length", context)
    if "rope_freqs.weight" in keys.extents:
        lists, old = dict.fromkeys(lists, "rope_freqs.weight"), context  # the same at every length
    if all(name in keys.extents for name in lists.values()):
        return fields | {
            "rope_type": "longrope",
            **{name: keys.tensor(own).astype(float).tolist() for name, own in lists.items()},
            "attention_factor": float(keys.get("rope.scaling.attn_factor", 1.0)),
            "original_max_position_embeddings": old,
        }
    kind, factor = keys.get("rope.scaling.type", "none"), keys.get("rope.scaling.factor", keys.get("rope.scale_linear"))
    if kind in ("none", "longrope") or not factor:
        return fields
    return fields | {
        "rope_type": kind,
        "factor": float(factor),
        **keys.some(
            original_max_position_embeddings="rope.scaling.original_context_length",
            attention_factor="rope.scaling.yarn_attn_factor",
            beta_fast="rope.scaling.yarn_beta_fast",
            beta_slow="rope.scaling.yarn_beta_slow",
        ),
    }


def _rotated(keys: Keys) -> dict[str, float]:
    """The share of a head that is rotated."""
    width = keys.head_width
    return {"partial_rotary_factor": keys.number("rope.dimension_count", width) / width}


def _llama(keys: Keys) -> dict[str, Any]:
    return {
        "attention_bias": "blk.0.attn_q.bias" in keys.extents,
        "mlp_bias": "blk.0.ffn_gate.bias" in keys.extents,
    }


def _qwen2(keys: Keys) -> dict[str, Any]:
    return {"use_sliding_window": False}  # the conversion drops it; no published model uses it


def _qwen3(keys: Keys) -> dict[str, Any]:
    return {"use_sliding_window": False, "attention_bias": "blk.0.attn_q.bias" in keys.extents}


def _caps(keys: Keys) -> dict[str, Any]:
    return {
        "attn_logit_softcapping": keys.get("attn_logit_softcapping"),
        "final_logit_softcapping": keys.get("final_logit_softcapping"),
    }


def _query_scale(keys: Keys, of_largest: int) -> dict[str, Any]:
    """The largest Gemma of a generation, known by its layers, divides queries by the root of another number than the
    width of a head, and no file says so (llama.cpp, src/models/gemma2.cpp and gemma3.cpp)."""
    width = keys.number("embedding_length") // keys.number("attention.head_count")
    return {"query_pre_attn_scalar": width if keys.layers == of_largest else keys.head_width}


def _gemma2(keys: Keys) -> dict[str, Any]:
    return _caps(keys) | _query_scale(keys, 46) | keys.some(sliding_window="attention.sliding_window")


def _pattern(keys: Keys, period: int) -> list[str]:
    """The kinds of the layers: by the file's own list, by its period, or every `period`th of them global."""
    given = keys.get("attention.sliding_window_pattern", period)
    if isinstance(given, bool):
        given = [given] * keys.layers
    local = given if isinstance(given, list) else [(i + 1) % given != 0 for i in range(keys.layers)]
    return ["sliding_attention" if is_local else "full_attention" for is_local in local]


def _gemma3(keys: Keys) -> dict[str, Any]:
    window = keys.get("attention.sliding_window")
    local = {"rope_type": "default", "rope_theta": float(keys.get("rope.freq_base_swa", 10_000.0))}
    return {
        **_caps(keys),
        **_query_scale(keys, 62),
        "sliding_window": window,
        "layer_types": _pattern(keys, 6) if window else ["full_attention"] * keys.layers,
        "rope_parameters": {
            "full_attention": _rope(keys) | {"rope_theta": float(keys.get("rope.freq_base", 1_000_000.0))},
            "sliding_attention": local,
        },
    }


def _phi3(keys: Keys) -> dict[str, Any]:
    rope = _rope(keys) | _rotated(keys)
    return {
        "sliding_window": keys.get("attention.sliding_window") or None,
        "rope_parameters": rope,
        "original_max_position_embeddings": rope.get("original_max_position_embeddings", keys.number("context_length")),
    }


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", _llama, permuted=True),
    "qwen2": Architecture("qwen2", _qwen2),
    "qwen3": Architecture("qwen3", _qwen3),
    "gemma2": Architecture("gemma2", _gemma2, norm_offset=1.0),
    "gemma3": Architecture("gemma3_text", _gemma3, norm_offset=1.0),
    "phi3": Architecture("phi3", _phi3),
    "olmo2": Architecture("olmo2"),
}


def _architecture(keys: Keys) -> Architecture:
    found = ARCHITECTURES.get(keys.architecture)
    if found is None or found.model_type not in FAMILIES:
        known = ", ".join(name for name, one in ARCHITECTURES.items() if one.model_type in FAMILIES)
        raise InputError(
            f"{keys.path}: the architecture {keys.architecture} is not supported; of GGUF files supported: {known}"
        )
    return found


def _keys(file: GgufFile) -> Keys:
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise InputError(f"{file.path}: general.architecture, which says what model it is, is missing")
    return Keys(file.path, architecture, file.metadata, file.extents)


def _config(file: GgufFile) -> dict[str, Any]:
    keys = _keys(file)
    architecture = _architecture(keys)
    if "token_embd.weight" not in file.extents:
        raise InputError(f"{file.path}: it has no token_embd.weight, and so no language model")
    family = FAMILIES[architecture.model_type]
    return {
        "architectures": [family.architectures[0]],
        "model_type": family.model_type,
        **_settings(keys),
        **architecture.read(keys),
        **file.generation,
    }


# What is read as settings, and what may stand in a file beside the model's own tensors.
_NO_WEIGHTS = re.compile(r"rope_freqs\.weight|rope_factors_(long|short)\.weight|.*\.attn_rot_embd.*")


class GgufTensors:
    """The tensors of a GGUF model as Hugging Face has them; a `TensorSource`."""

    def __init__(self, file: GgufFile, names: Iterable[str]) -> None:
        """
        Args:
          names: the tensors that the model should have, as Hugging Face calls them. What the file has besides keeps
            the file's name, so that it is told as unexpected.
        """
        keys = _keys(file)
        self._architecture = _architecture(keys)
        self._heads = {"attn_q": keys.number("attention.head_count")}
        self._heads["attn_k"] = keys.number("attention.head_count_kv", self._heads["attn_q"])
        stored = _stored_names(keys)
        self._own = {name: own for name in names if (own := stored(name)) in file.extents}
        others = file.extents.keys() - self._own.values()
        self._own |= {own: own for own in others if not _NO_WEIGHTS.fullmatch(own)}
        self._extents = {name: file.extents[own] for name, own in self._own.items()}
        self.headers: dict[str, Header] = {
            name: Header(extent.shape, extent.kind if extent.kind in _PLAIN else "F32")
            for name, extent in self._extents.items()
        }

    def read(self, name: str) -> np.ndarray:
        """A tensor as Hugging Face stores it."""
        tensor = read_extent(self._extents[name])
        module = self._own[name].split(".")[-2]
        if self._architecture.permuted and module in self._heads:
            # [heads, width / 2, 2] back to [heads, 2, width / 2]: Hugging Face rotates a head's halves.
            pairs = tensor.reshape(self._heads[module], -1, 2, *tensor.shape[1:])
            tensor = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(tensor.shape)
        if self._architecture.norm_offset and name.endswith("norm.weight"):
            tensor = (tensor.astype(np.float32) - np.float32(self._architecture.norm_offset)).astype(tensor.dtype)
        return tensor


def _stored_names(keys: Keys) -> Callable[[str], str]:
    """From Hugging Face's names of tensors to the file's, by the map that the conversion uses."""
    gguf = _import_gguf()
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    if keys.architecture not in numbers:
        raise InputError(
            f"{keys.path}: this gguf package does not know the architecture {keys.architecture}; update it"
        )
    names = gguf.get_tensor_name_map(numbers[keys.architecture], keys.layers)
    return lambda name: names.get_name(name, try_suffixes=(".weight", ".bias")) or name
