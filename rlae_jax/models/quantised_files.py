"""Quantised checkpoints of other tools, presented as the plain checkpoints that they stand for.

In: the settings (`quantization_config` of config.json, or the file beside it that older checkpoints have) and the
tensors as they are stored: integers packed into words, scales, zero points, groups of inputs. Out: a `TensorSource` in
which every linear layer has its `weight` again: `Packed` where products read such a form, else dequantised. Everything
else passes through, but for the scales of activations and caches, which weights alone do not need.

A format is a function from a layer's stored tensors to values, scales and zeros, for one equation:

    weight[o, i] = (values[o, i] - zero[o, g]) * scale[o, g],    g = group_of[i]
"""

import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlae_jax import records
from rlae_jax.errors import InputError, grouped_error
from rlae_jax.files import read_json
from rlae_jax.models import hugging_face
from rlae_jax.models.quantise import Kind
from rlae_jax.models.stored import PACKED, Header, Packed, TensorSource

KINDS: dict[str, Kind] = {"I8": "int8", "F8_E4M3": "fp8"}  # of values that are stored one by one, by their dtype
SMALLEST_GROUP = 16  # inputs that share a scale; with fewer, scales would weigh as much as what they scale
WORD = 32  # bits
# Files beside config.json that hold the settings of older checkpoints, and whose they are.
OLDER_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output, of eight, that each four bits of a word belong to, lowest bits first
# Twice the values of e2m1, the four-bit float of MXFP4 and NVFP4 (OCP Microscaling Formats 1.0, section 5.3.3): whole
# numbers, so that int8 with half the scale holds them exactly.
TWICE_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
# Of activations and caches. A layer here computes with the activations that it gets.
NOT_OF_WEIGHTS = re.compile(r"(^|\.)(input|output|activation|[qkv]|kv|prob)_(scale|scale_ub|global_scale|zero_point)$")
# What a name ends in where a tool has packed a layer, and the tool.
MARKS = {
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_inv": "fp8 in blocks",
    "_blocks": "MXFP4",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
}


class Settings(NamedTuple):
    """How a checkpoint's weights are quantised, as it says itself."""

    path: Path  # the file that says so
    method: str
    fields: Mapping[str, Any]


def read_settings(directory: Path, config: Mapping[str, Any]) -> Settings | None:
    """The settings of a directory's quantisation; None: it says nothing of any.

    Args:
      config: its config.json.

    Raises:
      InputError: a method that is not read, or settings that are no JSON object.
    """
    path = directory / "config.json"
    text_config = config.get("text_config")
    of_text: Mapping[str, Any] = text_config if isinstance(text_config, dict) else {}
    fields = config.get("quantization_config") or of_text.get("quantization_config") or config.get("compression_config")
    method = None
    for name, of_file in OLDER_FILES.items():
        if not fields and (directory / name).is_file():
            path, method = directory / name, of_file
            fields = read_json(path)
    if not fields:
        return None
    if not isinstance(fields, dict):
        raise InputError(f"{path}: quantization_config must be a JSON object, not {fields!r}")
    inner = fields.get("quantization_config")
    fields = fields | (inner if isinstance(inner, dict) else {})
    where = path if path.name in OLDER_FILES else f"{path}: quantization_config"
    records.check(fields, hugging_face.Method, where)
    if fields.get("load_in_4bit") or fields.get("load_in_8bit"):
        method = "bitsandbytes"
    method = fields.get("quant_method") or (method or ("compressed-tensors" if "config_groups" in fields else None))
    if method == "bitsandbytes":
        raise InputError(
            f"{path}: weights quantised by bitsandbytes are not supported; load the model that they were made of with "
            "quantise='int8' or quantise='int4'"
        )
    if method not in METHODS:
        raise InputError(
            f"{path}: weights quantised by {method or 'an unnamed method'} are not supported; supported: "
            f"{', '.join(METHODS)}"
        )
    records.check(fields, hugging_face.Quantised, where)
    return Settings(path, method, fields)


def kind_held(settings: Settings) -> Kind:
    """The form in which most kernels of such a checkpoint are held, as `plan` counts them: floats of four bits are int8
    here, and integers of fewer than four int4."""
    fields, method = settings.fields, settings.method
    groups = fields.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
    weights = first.get("weights") if isinstance(first, Mapping) else None
    of_file = fields.get("quantization")  # in hf_quant_config.json
    algorithm = (of_file if isinstance(of_file, Mapping) else fields).get("quant_algo")
    if method in ("gptq", "awq"):
        is_float, bits = False, fields.get("bits", 4)
    elif isinstance(weights, Mapping):
        is_float, bits = weights.get("type") == "float", weights.get("num_bits")
    else:
        is_float, bits = True, 4 if "fp4" in f"{method} {algorithm}".lower() else 8
    if isinstance(bits, int) and bits <= 4:
        return "int8" if is_float else "int4"
    return "fp8" if is_float else "int8"


def presented(tensors: TensorSource, directory: Path, config: Mapping[str, Any]) -> TensorSource:
    """A directory's tensors as those of a plain checkpoint, whether they are quantised or not.

    Args:
      config: its config.json.

    Raises:
      InputError: what `read_settings` and `QuantisedFiles` raise; tensors that some tool has packed, and no settings
        that say how.
    """
    settings = read_settings(directory, config)
    if settings is not None:
        return QuantisedFiles(tensors, settings)
    for name in tensors.headers:
        tool = next((tool for mark, tool in MARKS.items() if name.endswith(mark)), None)
        if tool is not None:
            raise InputError(
                f"{directory}: {name} is packed by {tool}, but config.json has no quantization_config and there is no "
                f"{next(iter(OLDER_FILES))}; both the bits and the groups are written there"
            )
    return tensors


def unpack(words: np.ndarray, bits: int, count: int, axis: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """The unsigned integers of `bits` bits that lie in 32-bit words without gaps, the first in the lowest bits.

    Args:
      words: [rows, words] packed along axis 1, or [words, columns] along axis 0.
      count: how many integers there are along that axis.
      order: of the integers of one word, where each of them belongs; None: in their own order.

    Returns:
      uint8, the shape of `words` with `count` along the axis.
    """
    common = math.gcd(bits, WORD)
    period, span = WORD // common, bits // common  # as many integers fill as many words exactly
    periods = -(-count // period)
    along = words.view(np.uint32) if axis else words.view(np.uint32).T
    if along.shape[1] < periods * span:
        along = np.pad(along, ((0, 0), (0, periods * span - along.shape[1])))
    whole = np.empty((along.shape[0], periods * period) if axis else (periods * period, along.shape[0]), np.uint8)
    target = whole if axis else whole.T
    for i in range(period):
        first, shift = divmod(i * bits, WORD)
        part = along[:, first::span] >> np.uint32(shift)
        if shift + bits > WORD:
            part |= along[:, first + 1 :: span] << np.uint32(WORD - shift)
        place = i if order is None else order[i]
        np.bitwise_and(part.astype(np.uint8), np.uint8((1 << bits) - 1), out=target[:, place::period])
    return whole[:, :count] if axis else whole[:count]


class _Values(NamedTuple):
    """A layer's numbers by the equation above; more axes may lead, of experts."""

    values: np.ndarray  # [outputs, inputs]
    scale: np.ndarray  # float32 [outputs, groups]
    zero: np.ndarray | None  # float32 [outputs, groups]
    group_of: np.ndarray  # of each input its group


class _Layer(NamedTuple):
    """One linear layer of a quantised checkpoint."""

    shape: tuple[int, ...]  # of its weight
    kind: Kind | None  # the form that holds its values; None: there is none
    bits: int  # of a value as it is stored
    group: int  # inputs that share a scale
    unpack: Callable[[], _Values]


class _Parts:
    """The tensors of one layer as they are stored: their names have the same beginning."""

    def __init__(self, tensors: TensorSource, prefix: str, findings: list[tuple[str, str]]):
        self._tensors, self.module, self._findings = tensors, prefix, findings
        self.used: set[str] = set()

    def has(self, suffix: str) -> bool:
        """Whether there is such a tensor; the layer has taken it then."""
        name = self.module + suffix
        if name in self._tensors.headers:
            self.used.add(name)
        return name in self.used

    def dtype(self, suffix: str) -> str:
        return self._tensors.headers[self.module + suffix].dtype if self.has(suffix) else "none"

    def shape(self, suffix: str, axes: int | None = None) -> tuple[int, ...]:
        """A tensor's shape; zeros stand for one that is missing or has another number of axes, which is noted."""
        if not self.has(suffix):
            self._findings.append(("missing", self.module + suffix))
            return (0,) * (axes or 0)
        shape = self._tensors.headers[self.module + suffix].shape
        if axes is not None and len(shape) != axes:
            self._findings.append(("mis-shaped", f"{self.module}{suffix} is {list(shape)}, expected {axes} axes"))
            return (0,) * axes
        return shape

    def words(self, suffix: str) -> tuple[int, ...]:
        """The shape [.., ..] of 32-bit words that integers are packed into."""
        if self.has(suffix) and self.dtype(suffix) not in ("I32", "U32"):
            self._findings.append(("of another dtype", f"{self.module}{suffix} is {self.dtype(suffix)}, expected I32"))
        return self.shape(suffix, 2)

    def expect(self, suffix: str, *shapes: tuple[int, ...], optional: bool = False) -> None:
        """Notes a tensor that is missing or has none of the shapes (of which one with a 0 follows from another tensor
        that was noted)."""
        if optional and not self.has(suffix):
            return
        shape = self.shape(suffix)
        if self.has(suffix) and shape not in shapes and not any(0 in one for one in shapes):
            known = " or ".join(str(list(shape)) for shape in shapes)
            self._findings.append(("mis-shaped", f"{self.module}{suffix} is {list(shape)}, expected {known}"))

    def read(self, suffix: str) -> np.ndarray:
        stored = self._tensors.read(self.module + suffix)
        assert isinstance(stored, np.ndarray)
        return stored

    def scale(self, suffix: str) -> np.ndarray:
        """Scales as float32. Bytes are e8m0, powers of two: 2^(byte - 127)."""
        stored = self.read(suffix)
        if stored.dtype == np.uint8:
            return np.ldexp(np.float32(1), stored.astype(np.int32) - 127)
        return stored.astype(np.float32)

    def groups(self, suffix: str, inputs: int, group: int, groups: int) -> np.ndarray:
        """Of each input its group: as it is stored, or runs of `group`."""
        if not self.has(suffix):
            return np.arange(inputs) // group
        stored = self.read(suffix)
        if stored.min() < 0:  # compressed-tensors: none was set
            return np.arange(inputs) // group
        if stored.max() >= groups:
            raise InputError(
                f"{self.module}{suffix} names group {stored.max()}, but the layer has scales of {groups} groups"
            )
        return stored


def _centred(unsigned: np.ndarray, zero: np.ndarray | None, bits: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Unsigned values and zeros [outputs, groups] as signed ones, whose middle is 0."""
    middle = 1 << (bits - 1)
    values = (unsigned - np.uint8(middle)).view(np.int8)
    return values, None if zero is None else zero.astype(np.float32) - middle


def _whole(fields: Mapping[str, Any], *names: str, default: int | None = None, among: tuple[int, ...] = ()) -> int:
    """A whole number of the settings under the first of its names that is there."""
    value = next((fields[name] for name in names if fields.get(name) is not None), default)
    if isinstance(value, bool) or not isinstance(value, int) or (among and value not in among) or value == 0:
        wanted = f"one of {', '.join(map(str, among))}" if among else "a whole number other than 0"
        raise InputError(f"{names[0]} must be {wanted}, not {value!r}")
    return value


def _gptq(parts: _Parts, fields: Mapping[str, Any]) -> _Layer:
    """GPTQ's layout, of AutoGPTQ and GPTQModel. Values are packed along the inputs, zeros along the outputs.

    Version 1 stores each zero less one, version 2 (`checkpoint_format` "gptq_v2") as it is. With `desc_act` inputs of a
    group need not be neighbours.
    """
    form = str(fields.get("checkpoint_format") or fields.get("format") or "gptq").lower()
    if form not in ("gptq", "gptq_v2") or fields.get("is_marlin_format"):
        raise InputError(
            f"GPTQ's form {form if form != 'gptq' else 'marlin'} is not supported; supported: gptq, gptq_v2"
        )
    for pattern, changed in (fields.get("dynamic") or {}).items():  # settings of some layers, by GPTQModel
        if not pattern.startswith("-:") and hugging_face.matches(pattern.removeprefix("+:"), parts.module, "dynamic"):
            fields = {**fields, **changed}
            break
    bits = _whole(fields, "bits", among=(2, 3, 4, 8))
    words, outputs = parts.words(".qweight")
    inputs = parts.shape(".g_idx", 1)[0] if parts.has(".g_idx") else words * WORD // bits
    group = _whole(fields, "group_size", default=-1)
    group = inputs if group < 0 else group
    groups = -(-inputs // max(group, 1))
    parts.expect(".qweight", (-(-inputs * bits // WORD), outputs))
    parts.expect(".scales", (groups, outputs))
    parts.expect(".qzeros", (groups, -(-outputs * bits // WORD)))

    def read() -> _Values:
        packed_zeros = parts.read(".qzeros").view(np.uint32)
        if form == "gptq" and WORD % bits == 0:  # words as a whole, as they were made: a borrow comes back as a carry
            packed_zeros = packed_zeros + np.uint32(sum(1 << i for i in range(0, WORD, bits)))
        zeros = unpack(np.ascontiguousarray(packed_zeros.T), bits, outputs, 0)
        if form == "gptq" and WORD % bits:
            zeros = (zeros + np.uint8(1)) & np.uint8((1 << bits) - 1)
        unsigned = unpack(np.ascontiguousarray(parts.read(".qweight").T), bits, inputs, 1)
        values, zero = _centred(unsigned, zeros, bits)
        if zero is not None and fields.get("sym") and not zero.any():
            zero = None
        scale = np.ascontiguousarray(parts.scale(".scales").T)
        return _Values(values, scale, zero, parts.groups(".g_idx", inputs, group, groups))

    return _Layer((outputs, inputs), "int4" if bits <= 4 else "int8", bits, group, read)


def _awq(parts: _Parts, fields: Mapping[str, Any]) -> _Layer:
    """AutoAWQ's GEMM layout: values and zeros are packed along the outputs, eight of them in an order of its own."""
    form = str(fields.get("version") or fields.get("format") or "gemm").lower()
    if form != "gemm":
        raise InputError(f"AWQ's form {form} is not supported; supported: gemm")
    bits = _whole(fields, "bits", "w_bit", default=4, among=(4,))
    inputs, words = parts.words(".qweight")
    outputs = parts.shape(".scales", 2)[1]
    group = _whole(fields, "group_size", "q_group_size", default=128)
    group = inputs if group < 0 else group
    groups = -(-inputs // max(group, 1))
    parts.expect(".qweight", (inputs, -(-outputs * bits // WORD)))
    parts.expect(".scales", (groups, outputs))
    parts.expect(".qzeros", (groups, words), optional=not fields.get("zero_point", True))

    def read() -> _Values:
        unsigned = unpack(np.ascontiguousarray(parts.read(".qweight").T), bits, outputs, 0, AWQ_ORDER)
        zeros = None
        if parts.has(".qzeros"):
            zeros = unpack(np.ascontiguousarray(parts.read(".qzeros").T), bits, outputs, 0, AWQ_ORDER)
        values, zero = _centred(unsigned, zeros, bits)
        return _Values(values, np.ascontiguousarray(parts.scale(".scales").T), zero, np.arange(inputs) // group)

    return _Layer((outputs, inputs), "int4", bits, group, read)


def _scaled(parts: _Parts, suffix: str, block: tuple[int, int] | None) -> _Layer | None:
    """Values that are stored one by one, with one scale, one for each output or one for each block of the weight.

    Args:
      suffix: of the scales.
      block: [outputs, inputs] that share a scale, if blocks do; the last of either may be smaller.
    """
    dtype, shape, has_zeros = parts.dtype(".weight"), parts.shape(suffix), parts.has(".weight_zero_point")
    if dtype in ("F16", "F32", "BF16"):
        return None  # calibrated and not quantised yet
    outputs, inputs = parts.shape(".weight", 2)
    if math.prod(shape) == 1:
        block = (outputs, inputs)
    elif block is None or shape in ((outputs,), (outputs, 1)):
        block = (1, inputs)
    high, wide = max(block[0], 1), max(block[1], 1)
    grid = (-(-outputs // high), -(-inputs // wide))
    shapes = (grid, (outputs,)) if grid == (outputs, 1) else (grid, (1,), ()) if grid == (1, 1) else (grid,)
    parts.expect(suffix, *shapes)
    parts.expect(".weight_zero_point", *shapes, optional=True)

    def spread(stored: np.ndarray) -> np.ndarray:
        return np.repeat(stored.reshape(grid), high, axis=0)[:outputs]

    def read() -> _Values:
        values = parts.read(".weight")
        zero = spread(parts.read(".weight_zero_point").astype(np.float32)) if has_zeros else None
        return _Values(
            values if dtype in KINDS else values.astype(np.float32),
            spread(parts.scale(suffix)),
            zero,
            np.arange(inputs) // wide,
        )

    return _Layer((outputs, inputs), KINDS.get(dtype), 8, wide, read)


def _pair(value: Any, name: str) -> tuple[int, int]:
    """Two sizes, also written as "128x128"."""
    sizes = value.split("x") if isinstance(value, str) else value
    try:
        high, wide = map(int, sizes)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must be two whole numbers, not {value!r}") from error
    return high, wide


def _fp8(parts: _Parts, fields: Mapping[str, Any]) -> _Layer | None:
    """e4m3 as DeepSeek and Qwen3 publish it, in blocks with `weight_scale_inv`, or with one scale; fbgemm's with one
    for each output. Despite its name `weight_scale_inv` multiplies."""
    suffix = ".weight_scale_inv" if parts.has(".weight_scale_inv") else ".weight_scale"
    block = fields.get("weight_block_size", (128, 128) if suffix == ".weight_scale_inv" else None)
    return _scaled(parts, suffix, None if block is None else _pair(block, "weight_block_size"))


def _e2m1(stored: np.ndarray) -> np.ndarray:
    """Twice the values of four-bit floats: two in a byte [..., n], the lower bits first, as int8 [..., 2n]."""
    both = np.stack([TWICE_E2M1[np.arange(256) & 15], TWICE_E2M1[np.arange(256) >> 4]], axis=1)
    pairs = np.take(both.view(np.int16)[:, 0], stored)
    return pairs.view(np.int8)


def _mxfp4(parts: _Parts, fields: Mapping[str, Any]) -> _Layer:
    """gpt-oss' experts: blocks [experts, outputs, groups, bytes] of e2m1 and an e8m0 scale for each group."""
    *lead, outputs, groups, width = parts.shape("_blocks", 4)
    parts.expect("_scales", (*lead, outputs, groups))
    inputs = groups * width * 2

    def read() -> _Values:
        values = _e2m1(parts.read("_blocks")).reshape(*lead, outputs, inputs)
        return _Values(values, parts.scale("_scales") / 2, None, np.arange(inputs) // (width * 2))

    return _Layer((*lead, outputs, inputs), "int8", 4, width * 2, read)


def _scheme(fields: Mapping[str, Any], module: str) -> tuple[str, Mapping[str, Any]]:
    """(the layout, the numbers' settings) that compressed-tensors has for a layer: of the group that names it, by
    name or pattern, else of the first that names a kind of layers."""
    by_name, by_kind = [], []
    for group in (fields.get("config_groups") or {}).values():
        for target in group.get("targets") or ["Linear"]:
            if target == module or (
                target.startswith("re:") and hugging_face.matches(target[3:], module, "config_groups")
            ):
                by_name.append(group)
            elif not target.startswith("re:") and "." not in target:
                by_kind.append(group)
    group = next(iter(by_name + by_kind), None)
    if group is None or not isinstance(group.get("weights"), dict):
        raise InputError(f"config_groups has no settings for the weights of {module}")
    return str(group.get("format") or fields.get("format")), group["weights"]


def _compressed(parts: _Parts, fields: Mapping[str, Any]) -> _Layer | None:
    """compressed-tensors: integers packed into words along the inputs, or stored one by one; floats of eight and four
    bits."""
    sparse = (fields.get("sparsity_config") or {}).get("format")
    if sparse not in (None, "dense"):
        raise InputError(f"compressed-tensors: sparse weights ({sparse}) are not supported")
    if (fields.get("transform_config") or {}).get("config_groups"):
        raise InputError(
            "compressed-tensors: weights that need a rotation of activations (transform_config) are not supported"
        )
    form, weights = _scheme(fields, parts.module)
    if form not in COMPRESSED_FORMS:
        raise InputError(
            f"compressed-tensors: the form {form} is not supported; supported: {', '.join(COMPRESSED_FORMS)}"
        )
    strategy = weights.get("strategy")
    block = None
    if strategy == "block":
        block = _pair(weights.get("block_structure"), "block_structure")
    elif weights.get("group_size") and weights["group_size"] > 0:
        block = (1, _whole(weights, "group_size"))
    if not parts.has(".weight_packed"):
        return _scaled(parts, ".weight_scale", block)
    if parts.dtype(".weight_packed") == "U8":
        return _packed_floats(parts, block)
    return _packed_integers(parts, _whole(weights, "num_bits", among=tuple(range(1, 9))), block)


def _packed_integers(parts: _Parts, bits: int, block: tuple[int, int] | None) -> _Layer:
    outputs, words = parts.words(".weight_packed")
    # Only this tensor knows how many of the last word's bits are meant.
    inputs = int(parts.read(".weight_shape")[-1]) if parts.has(".weight_shape") else words * WORD // bits
    group = inputs if block is None else block[1]
    groups = -(-inputs // max(group, 1))
    grid = ((outputs, groups),) if block else ((outputs, 1), (outputs,), (1,), ())
    parts.expect(".weight_packed", (outputs, -(-inputs * bits // WORD)))
    parts.expect(".weight_scale", *grid)
    packed_zeros = parts.dtype(".weight_zero_point") == "I32"
    zero_grid = ((-(-outputs * bits // WORD), groups),) if packed_zeros else grid
    parts.expect(".weight_zero_point", *zero_grid, optional=True)
    parts.expect(".weight_g_idx", (inputs,), optional=True)

    def spread(stored: np.ndarray) -> np.ndarray:
        return np.broadcast_to(stored.reshape(-1, groups), (outputs, groups))

    def read() -> _Values:
        zeros = None
        if packed_zeros:
            zeros = unpack(parts.read(".weight_zero_point"), bits, outputs, 0)
        elif parts.has(".weight_zero_point"):
            zeros = spread(parts.read(".weight_zero_point")).astype(np.float32) + (1 << (bits - 1))
        values, zero = _centred(unpack(parts.read(".weight_packed"), bits, inputs, 1), zeros, bits)
        scale = spread(parts.scale(".weight_scale"))
        return _Values(values, scale, zero, parts.groups(".weight_g_idx", inputs, group, groups))

    return _Layer((outputs, inputs), "int4" if bits <= 4 else "int8", bits, group, read)


def _packed_floats(parts: _Parts, block: tuple[int, int] | None) -> _Layer:
    """MXFP4, and NVFP4, whose scales are divided by one of the whole tensor."""
    return _floats_of_four_bits(
        parts, ".weight_packed", WORD if block is None else block[1], ".weight_global_scale", -1
    )


def _modelopt(parts: _Parts, fields: Mapping[str, Any]) -> _Layer | None:
    """NVIDIA's ModelOpt: e4m3 with one scale, or NVFP4, whose scales are multiplied by one of the whole tensor."""
    if parts.dtype(".weight") == "U8":
        return _floats_of_four_bits(parts, ".weight", 16, ".weight_scale_2", 1)
    return _scaled(parts, ".weight_scale", None)


def _floats_of_four_bits(parts: _Parts, values: str, group: int, of_all: str, power: int) -> _Layer:
    """e2m1 in groups that have a scale each.

    Args:
      values, of_all: what the names of the values and of the whole tensor's scale, where there is one, end in.
      power: of the whole tensor's scale, by which the groups' are multiplied.
    """
    outputs, width = parts.shape(values, 2)
    inputs = width * 2
    parts.expect(".weight_scale", (outputs, -(-inputs // group)))
    parts.expect(of_all, (1,), (), optional=True)

    def read() -> _Values:
        scale = parts.scale(".weight_scale") / 2
        if parts.has(of_all):
            scale = scale * parts.scale(of_all) ** power
        return _Values(_e2m1(parts.read(values)), scale, None, np.arange(inputs) // group)

    return _Layer((outputs, inputs), "int8", 4, group, read)


class _Method(NamedTuple):
    marks: tuple[str, ...]  # what names end in, once or more for every layer
    layer: Callable[[_Parts, Mapping[str, Any]], _Layer | None]
    name: str = ".weight"  # what the layer's own tensor ends in


METHODS = {
    "gptq": _Method((".qweight",), _gptq),
    "awq": _Method((".qweight",), _awq),
    "compressed-tensors": _Method((".weight_packed", ".weight_scale"), _compressed),
    "fp8": _Method((".weight_scale_inv", ".weight_scale"), _fp8),
    "mxfp8": _Method((".weight_scale_inv", ".weight_scale"), _fp8),
    "fbgemm_fp8": _Method((".weight_scale",), _fp8),
    "mxfp4": _Method(("_blocks",), _mxfp4, ""),
    "modelopt": _Method((".weight_scale",), _modelopt),
}
COMPRESSED_FORMS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mxfp4-pack-quantized",
    "nvfp4-pack-quantized",
    "mxfp8-quantized",
)


# What numpy raises for integers that cannot be what they should be: indices, counts.
_UNREADABLE = (TypeError, ValueError, LookupError, ArithmeticError)


class QuantisedFiles:
    """The tensors of a quantised checkpoint under the names, and with the shapes, of the plain one. A `TensorSource`.

    Args:
      tensors: as they are stored.
      settings: how they are to be understood.

    Raises:
      InputError: tensors that are missing or of a shape that the settings do not give; a form that is not read.
    """

    def __init__(self, tensors: TensorSource, settings: Settings):
        self._tensors, self._settings = tensors, settings
        self._told: set[str] = set()
        self._layers: dict[str, _Layer] = {}
        method = METHODS[settings.method]
        findings: list[tuple[str, str]] = []
        taken = {name for name in tensors.headers if NOT_OF_WEIGHTS.search(name)}
        for name in tensors.headers:
            mark = next((mark for mark in method.marks if name.endswith(mark)), None)
            if mark is None or name in taken:
                continue
            parts = _Parts(tensors, name.removesuffix(mark), findings)
            try:
                layer = method.layer(parts, settings.fields)
            except InputError as error:
                raise InputError(f"{settings.path}: {error}") from error
            except _UNREADABLE as error:
                raise InputError(f"{settings.path.parent}: {parts.module} is no quantised layer ({error})") from error
            taken |= parts.used
            if layer is not None:
                self._layers[parts.module + method.name] = layer
            elif parts.has(".weight"):
                taken.discard(parts.module + ".weight")
        if findings:
            findings = list(dict.fromkeys(findings))  # a tensor may be asked for twice
            raise grouped_error(
                f"{settings.path.parent}: the tensors do not fit the settings of {settings.method} in "
                f"{settings.path.name}",
                findings,
            )
        self.headers: dict[str, Header] = {
            name: header for name, header in tensors.headers.items() if name not in taken
        } | {name: Header(layer.shape, PACKED if layer.kind else "F32") for name, layer in self._layers.items()}

    @property
    def told(self) -> str:
        """The quantisation in a few words: "gptq, 196 layers of 4 bits in groups of 128"."""
        forms = Counter((layer.bits, layer.group < layer.shape[-1], layer.group) for layer in self._layers.values())
        what = [
            f"{count} layers of {bits} bits" + (f" in groups of {group}" if grouped else "")
            for (bits, grouped, group), count in forms.items()
        ]
        return ", ".join([self._settings.method, *what])

    def read(self, name: str) -> np.ndarray | Packed:
        layer = self._layers.get(name)
        if layer is None:
            return self._tensors.read(name)
        try:
            values, scale, zero, group_of = layer.unpack()
        except _UNREADABLE as error:
            raise InputError(f"{self._settings.path.parent}: {name} cannot be unpacked ({error})") from error
        # The largest runs of inputs, all of one length, within which the group does not change: smaller than the
        # checkpoint's groups where those do not divide the inputs.
        edges = np.append(np.flatnonzero(np.diff(group_of)) + 1, group_of.size)
        run = int(np.gcd.reduce(edges))
        if layer.kind and (run >= SMALLEST_GROUP or run == group_of.size):
            first = group_of[::run]
            return Packed(values, scale[..., first], None if zero is None else zero[..., first], layer.kind)
        if not layer.kind:
            self._tell(f"values of {self._tensors.headers[name].dtype}", name)
        elif np.any(np.diff(group_of) < 0):
            self._tell("inputs out of order (desc_act)", name)
        else:
            self._tell(f"groups of {layer.group} for {group_of.size} inputs", name)
        weight = values.astype(np.float32)
        if zero is not None:
            weight -= zero[..., group_of]
        weight *= scale[..., group_of]
        return weight

    def _tell(self, what: str, name: str) -> None:
        """One warning for every reason to dequantise."""
        if what not in self._told:
            self._told.add(what)
            warnings.warn(
                f"{self._settings.path.parent}: {self._settings.method} with {what} ({name}, perhaps others): no "
                "product here reads that, so that such weights are dequantised",
                stacklevel=2,
            )
