"""Hugging Face directories to and from parameter trees.

In: a directory with `config.json`, and a `TensorSource` (`stored.py`). Out: a `ModelConfig` and a nested dictionary of
arrays, each tensor read, transformed and placed on the device alone. `write_model` is the inverse. Everything that can
be known from the files' headers is checked before the first tensor is read.

Which tensor goes where is a family's table (`families/`); what this file does is the same for all. Pickled weights are
never read: they can run code.
"""

import dataclasses
import functools
import math
import re
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jax.sharding import Mesh

from rlae_jax import digests, files, hosts, records, sharding
from rlae_jax.compilation import jit
from rlae_jax.errors import InputError, grouped_error
from rlae_jax.files import read_json
from rlae_jax.models import finite, gguf_files, gguf_models, hugging_face, quantised_files
from rlae_jax.models.config import Experts, GatedDelta, ModelConfig, ShortConvolution
from rlae_jax.models.families import FAMILIES, REASONS, Family, made_family, nearest, wrappers
from rlae_jax.models.families.base import settings
from rlae_jax.models.quantise import (
    GROUPS,
    HEAD,
    Quantisation,
    Quantised,
    dequantised,
    quantise_leaf,
)
from rlae_jax.models.quantise import logical_axes as quantised_axes
from rlae_jax.models.rope import frequencies
from rlae_jax.models.stored import (
    PACKED,
    LanguageModel,
    Packed,
    Safetensors,
    StoredTensor,
    TensorSource,
    get_leaf,
    put_leaf,
    stored_tensors,
    tensor_files,
    write_tensors,
)
from rlae_jax.models.transformer import Params, logical_axes

DTYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
_STORED_DTYPES = ("F64", "F32", "F16", "BF16")
PRECISIONS = (None, "default", "high", "highest")
SHARD_BYTES = 5_000_000_000
_READERS = 2  # tensors that are read at a time
_ENTRIES_PER_BYTE = 8  # of a quantised tensor, at most
START = 16  # entries of an array by which a model is known again


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """Where a model came from: what `write_model` needs to write it back."""

    family: Family
    config: Mapping[str, Any]  # config.json as it was
    generation: Mapping[str, Any]  # generation_config.json as it was
    wrapped: bool = False  # in a multimodal model, beside what is not read; `config` is the language model's


def disk_bytes(directory: Path) -> int:
    """The size of the files that hold a checkpoint's weights."""
    path = gguf_files.find(directory)
    files = set(tensor_files(directory).values()) if path is None else gguf_files.parts(path)
    return sum(file.stat().st_size for file in files)


def read_source(directory: Path) -> Source:
    """What a Hugging Face directory, or a GGUF file, says of its model.

    Raises:
      InputError: no such directory, no readable config.json, a family that is not supported, a quantisation that is
        not read, or a model whose code would have to be downloaded; whatever is wrong with a GGUF file.
    """
    path = gguf_files.find(directory)
    if path is not None:
        file = gguf_files.open_gguf(path)
        fields = gguf_models.read_config(file)
        return Source(FAMILIES[fields["model_type"]], fields, gguf_models.read_generation(file))
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise InputError(f"{directory} {what}; expected a Hugging Face directory with config.json and safetensors")
    digests.check(directory, ".json")  # now, since not all who read this read the tensors
    path = directory / "config.json"
    if not path.is_file():
        raise InputError(f"{path}: missing; expected a Hugging Face directory with config.json and safetensors")
    raw = read_json(path)
    records.check(raw, hugging_face.Identity, path)
    if "architectures" not in raw and {"schema", "digest"} <= raw.keys():
        raise InputError(f"{directory} is a run, not a model; name its members as models, and the run as --policy")
    names = raw.get("architectures") or [raw.get("model_type") or "unnamed"]
    by_architecture = {name: family for family in FAMILIES.values() for name in family.architectures}
    # Some encoders' repositories name no architecture (DeBERTa v3's); then the model_type decides.
    family = by_architecture.get(names[0]) or FAMILIES.get(names[0])
    whole = _language_model(raw, names, path)
    if whole is not None:
        family, raw = whole
    if family is None or (raw.get("model_type") or family.model_type) != family.model_type:
        if raw.get("auto_map"):
            raise InputError(
                f"{path}: {names[0]} needs code from its own repository, which is never run; supported families: "
                f"{', '.join(FAMILIES)}"
            )
        asked = str(raw.get("model_type"))
        reason = f": {REASONS[asked]}" if asked in REASONS else ""
        raise InputError(
            f"{path}: architecture {names[0]} is not supported (model_type {asked}){reason}; nearest: "
            f"{', '.join(nearest(names[0], asked)) or 'none'}; supported: {', '.join(by_architecture)}"
        )
    quantised_files.read_settings(directory, raw)  # a method that is not read is told at once
    generation = directory / "generation_config.json"
    beside = read_json(generation) if generation.is_file() else {}
    records.check(beside, hugging_face.Generation, generation)
    return Source(family, raw, beside, wrapped=whole is not None)


def _language_model(raw: Mapping[str, Any], names: Sequence[str], path: Path) -> tuple[Family, dict[str, Any]] | None:
    """The family and the configuration of the language model in a multimodal model, if this is one.

    Raises:
      InputError: a language model of a family that is not supported.
    """
    if not names[0].endswith("ForConditionalGeneration"):
        return None
    try:
        part = wrappers.language_model(raw)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if part is None:
        return None
    model_type, config = part
    family = FAMILIES.get(model_type)
    if family is None:
        reason = f": {REASONS[model_type]}" if model_type in REASONS else ""
        raise InputError(
            f"{path}: {names[0]} is not supported, since its language model, {model_type}, is not{reason}; nearest: "
            f"{', '.join(nearest(model_type)) or 'none'}"
        )
    warnings.warn(
        f"{path.parent}: the language model ({model_type}) of {names[0]} is loaded; images are not read", stacklevel=2
    )
    return family, {**config, "architectures": [family.architectures[0]]}


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
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
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
    path = gguf_files.find(directory)  # whose settings say of the head what its tensors do
    config = _config(source, path or directory / "config.json", dtype, precision, context)
    if tensors:
        _check_amount(config, source, directory)
    if path is not None or not tensors or not config.has_head:
        return config
    return dataclasses.replace(config, tied_head=_is_tied(config, source, directory))


def _check_amount(config: ModelConfig, source: Source, directory: Path) -> None:
    """What the files could hold at most against what the configuration says, before anything is made of it.

    Raises:
      InputError: more layers, experts or parameters than there are tensors or bytes.
    """
    path = gguf_files.find(directory)
    said = path or directory / "config.json"
    number = len(Safetensors(directory).headers if path is None else gguf_files.open_gguf(path).extents)
    layers = config.layers + (config.encoder.layers if config.encoder is not None else 0)
    experts = config.experts
    modules = source.family.modules if path is None and not source.family.stacked else {}
    of_experts = 0 if experts is None else experts.number * len(experts.layers)
    apart = not callable(modules) and any("{e}" in name for name in modules)
    for what, least in (("layers", layers), ("experts", of_experts if apart else 0)):
        if least > number:
            raise InputError(f"{said} says {least} {what}, and there are {number} tensors: they do not belong together")
    parameters = config.vocab * (config.embedding_width or config.width)
    if experts is not None:
        parameters += of_experts * experts.width * config.width
    held = _ENTRIES_PER_BYTE * disk_bytes(directory)
    if parameters > held:
        raise InputError(
            f"{said} says at least {parameters} parameters, and the files have room for {held}: they do not belong "
            "together"
        )


def _is_tied(config: ModelConfig, source: Source, directory: Path) -> bool:
    """Whether the head reads the embedding, for which the tensors have the last word, as in transformers: a head that
    differs from the embedding is kept, whatever the configuration says."""
    if not config.tied_head and not source.family.head_decides_tie:
        return False
    tensors, ends = open_tensors(directory, source, config), _ends(source.family, config)
    names = _names(tensors, source.family, ends)
    embedding, head = (names.get(key) for key in ends)
    if source.family.head_decides_tie or head is None or embedding is None:
        return head is None or config.tied_head
    one, other = tensors.read(embedding), tensors.read(head)
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray) and np.array_equal(one, other):
        return True
    warnings.warn(
        f"{directory}: config.json says that the head is the embedding (tie_word_embeddings), but {head} is another "
        "tensor, which is kept",
        stacklevel=2,
    )
    return False


def _ends(family: Family, config: ModelConfig) -> tuple[str, str]:
    """The names of the embedding's and the head's tensors."""
    table = family.modules(config) if callable(family.modules) else family.modules
    names = {ours: name for name, ours in table.items()}
    return f"{names['embedding']}.weight", f"{names['head']}.weight"


def _config(source: Source, path: Path, dtype: str, precision: str | None, context: int | None = None) -> ModelConfig:
    """What config.json alone says."""
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not supported; use one of {', '.join(DTYPES)}")
    if precision not in PRECISIONS:
        known = ", ".join(map(str, PRECISIONS))
        raise InputError(f"precision {precision!r} is not supported; use one of {known}")
    fields = _fields(source, path, context)
    records.check(source.config, hugging_face.Generation, path)
    of_text = {**source.config, **source.generation}
    ends: list[int] = []  # of both files: what one of them leaves out, the model may write all the same
    for said in (source.generation.get("eos_token_id"), source.config.get("eos_token_id")):
        ends += said if isinstance(said, list) else [] if said is None else [said]
    if fields.get("encoder") is not None:
        fields["encoder"] = dataclasses.replace(fields["encoder"], dtype=dtype, precision=precision)
    try:
        config = ModelConfig(
            **{
                **fields,
                "context": fields["context"] if context is None else context,
                "bos_id": of_text.get("bos_token_id"),
                "pad_id": of_text.get("pad_token_id", fields.get("pad_id")),
                "end_ids": tuple(dict.fromkeys(end for end in ends if end >= 0)),
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
    if (experts := config.experts) is not None:
        _check_experts(experts, path)
    if (recurrent := config.recurrent) is not None:
        _check_recurrent(recurrent, path)
    if config.heads % config.kv_heads:
        raise InputError(
            f"{path}: num_key_value_heads ({config.kv_heads}) must divide num_attention_heads ({config.heads})"
        )
    if config.wide is not None:
        _check_sizes(dataclasses.replace(config.of_layer(-1), wide=None, local_rope=None), path)
    for rope in (config.rope if config.wide is None else None, config.local_rope):
        if rope is None:
            continue
        if int(config.head_width * rope.fraction) % 2:
            raise InputError(f"{path}: rotary positions need an even number of a head's {config.head_width} entries")
        try:
            with np.errstate(all="ignore"):
                per_position, scale = frequencies(rope, config.head_width)
        except KeyError as error:
            raise InputError(f"{path}: rope_type {rope.kind} lacks {error}") from error
        except (TypeError, ValueError, ArithmeticError) as error:
            raise InputError(f"{path}: unusable numbers for rope_type {rope.kind} ({error})") from error
        if not (np.isfinite(per_position).all() and math.isfinite(scale)):
            raise InputError(f"{path}: the numbers for rope_type {rope.kind} give frequencies that are not finite")


def _check_experts(experts: Experts, path: Path) -> None:
    sizes = {"experts": experts.number, "experts per token": experts.active, "an expert's width": experts.width}
    wrong = [f"{what} = {size}" for what, size in sizes.items() if not _is_size(size)]
    if wrong:
        raise InputError(f"{path}: every size must be a whole number and at least 1, not {', '.join(wrong)}")
    if experts.active > experts.number:
        raise InputError(f"{path}: a token cannot take {experts.active} of {experts.number} experts")


def _check_recurrent(spec: ShortConvolution | GatedDelta, path: Path) -> None:
    sizes = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    wrong = [f"{size} = {n}" for size, n in sizes.items() if size not in ("layers", "bias") and not _is_size(n)]
    if wrong:
        raise InputError(
            f"{path}: of recurrent layers every size must be a whole number and at least 1, not {', '.join(wrong)}"
        )
    if isinstance(spec, GatedDelta) and spec.heads % spec.key_heads:
        raise InputError(
            f"{path}: linear_num_key_heads ({spec.key_heads}) must divide linear_num_value_heads ({spec.heads})"
        )


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and value >= 1


def _plain(key: str) -> str:
    """A tensor's name without what torch.compile and data parallel training put into it, and for those of the first
    BERT checkpoints what they are called now."""
    key = re.sub(r"(^|\.)_orig_mod\.", r"\1", key).removeprefix("module.")
    return re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", key))


class Tensors(NamedTuple):
    """What was read of a model's tensors."""

    params: Params
    starts: bytes  # of every array its first entries, by which a model is known again


def _names(tensors: TensorSource, family: Family, expected: Collection[str]) -> dict[str, str]:
    """What the family's table calls each tensor -> what the source calls it."""
    names = {_plain(key): key for key in tensors.headers}
    if any(name.startswith(family.prefix) for name in names):
        return names
    # A checkpoint of the bare model.
    return {name if name in expected else family.prefix + name: key for name, key in names.items()}


def _matched(tensors: TensorSource, family: Family, config: ModelConfig, where: Path) -> dict[str, StoredTensor]:
    """What the source calls each tensor of the model, and where it belongs.

    Raises:
      InputError: tensors missing, unexpected, of another shape or of no dtype that weights have.
    """
    headers = tensors.headers
    family = family.as_stored(map(_plain, headers))
    wanted = stored_tensors(family, config)
    expected = {tensor.key for tensor in wanted}
    names = _names(tensors, family, expected)
    if config.has_head and config.tied_head:
        embedding, head = _ends(family, config)
        if embedding not in names and head in names:  # the one tensor of both is stored as the head
            names[embedding] = names.pop(head)
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
        header = headers.get(names.get(tensor.key, ""))
        if header is None:
            findings.append(("missing", tensor.key))
        elif header.shape != (shape := tensor.packed_shape if header.dtype == PACKED else tensor.shape):
            findings.append(("mis-shaped", f"{tensor.key} is {list(header.shape)}, expected {list(shape)}"))
        elif header.dtype not in (*_STORED_DTYPES, PACKED):
            findings.append(("quantised or of no known dtype", f"{tensor.key} is {header.dtype}"))
    if findings:
        said = "config.json" if where.is_dir() else "the metadata"
        raise grouped_error(
            f"{where}: the tensors do not fit {said}", findings, f"{said} and weights must belong together"
        )
    return {names[tensor.key]: tensor for tensor in wanted}


def open_tensors(directory: Path, source: Source, config: ModelConfig) -> TensorSource:
    """The tensors of a Hugging Face directory or a GGUF file.

    Raises:
      InputError: no such files, or unreadable ones; a quantisation that is not read, or that the tensors do not fit.
    """
    path = gguf_files.find(directory)
    if path is None:
        tensors = quantised_files.presented(Safetensors(directory), directory, source.config)
        return LanguageModel(tensors) if source.wrapped else tensors
    names = [tensor.key for tensor in stored_tensors(source.family, config)]
    return gguf_models.GgufTensors(gguf_files.open_gguf(path), names)


class _Leaf(NamedTuple):
    """One array of the parameter tree, or one quantised kernel, placed."""

    path: tuple[Any, ...]
    value: Any
    start: Any  # bytes, in a tree like the value's


def _check_quantisation(
    quantisation: Quantisation, matched: dict[str, StoredTensor], tensors: TensorSource, where: Path
) -> None:
    """Raises an `InputError` for a quantisation that cannot be had."""
    packed = [name for name in matched if tensors.headers[name].dtype == PACKED]
    if packed:
        raise InputError(
            f"{where}: {packed[0]} and {len(packed) - 1} more are quantised already: load it without quantise"
        )
    kernels = [tensor for tensor in matched.values() if tensor.kind == "kernel" and tensor.paths[0] != HEAD]
    odd = [tensor for tensor in kernels if quantisation.group_of(tensor.input_size) is None]
    if odd:
        findings = [("layers", f"{tensor.key} has {tensor.input_size} inputs") for tensor in odd]
        groups = ", ".join(map(str, GROUPS))
        raise grouped_error(
            f"{where}: int4 needs inputs that groups of {groups} divide", findings, "int8 and fp8 take any"
        )


def _quantised(part: np.ndarray, tensor: StoredTensor, path: tuple[Any, ...], wanted: Quantisation | None) -> Any:
    """A leaf, in fewer bits where that is wanted."""
    if wanted is None or tensor.kind == "bias":
        return part
    return quantise_leaf(part, path, tensor.inputs, wanted, stacked=tensor.stacked)


def _start(kernel: Any, dtype: Any) -> Any:
    """The first entries of every array of a leaf. What is quantised keeps its dtypes."""
    if isinstance(kernel, Quantised):
        return jax.tree.map(lambda part: np.asarray(part.reshape(-1)[:START]).tobytes(), kernel)
    return np.asarray(kernel.flat[:START], dtype).tobytes()


def _on_default(kernel: Any, dtype: Any) -> Any:
    """A leaf on the default device."""
    return jax.tree.map(jax.device_put, kernel) if isinstance(kernel, Quantised) else _on_device(kernel, dtype)


def _placed(path: tuple[Any, ...], kernel: Any, names: tuple[str, ...], dtype: Any, mesh: Mesh | None) -> _Leaf:
    """A leaf on its devices."""
    if mesh is None:
        return _Leaf(path, _on_default(kernel, dtype), _start(kernel, dtype))
    where = sharding.shardings(quantised_axes(names, kernel), kernel, mesh)
    place = functools.partial(sharding.place, dtype=None if isinstance(kernel, Quantised) else dtype)
    placed = jax.tree.map(lambda part, to: place(np.asarray(part), to), kernel, where)
    return _Leaf(path, placed, _start(kernel, dtype))


def read_params(
    tensors: TensorSource,
    source: Source,
    config: ModelConfig,
    where: Path,
    mesh: Mesh | None = None,
    quantisation: Quantisation | None = None,
    check_finite: bool = True,
) -> Tensors:
    """Reads every tensor of the model, in `config.dtype`.

    Two threads each read a tensor, turn it and put it on the device, so that a few of them are on the host at a time,
    never the checkpoint.

    Args:
      where: what errors call the checkpoint.
      mesh: where the tensors go, every part straight to its devices; None: the default device.
      quantisation: how kernels are to be held that are not quantised in the checkpoint.
      check_finite: whether weights must be finite numbers in `config.dtype`.

    Raises:
      InputError: corrupt files, tensors missing, unexpected, of another shape or with values that are not finite; a
        quantisation of what is quantised, or in groups that do not divide a layer's inputs.
    """
    matched = _matched(tensors, source.family, config, where)
    dtype = DTYPES[config.dtype]
    axes = logical_axes(config)
    if quantisation is not None:
        _check_quantisation(quantisation, matched, tensors, where)

    def kernels_of(name: str) -> list[Any]:
        tensor, stored = matched[name], tensors.read(name)
        if isinstance(stored, Packed):
            return list(tensor.split_packed(stored))
        if tensor.inputs_first and tensors.headers[name].dtype == PACKED:  # what was packed and has no such form here
            stored = stored.swapaxes(-1, -2)
        with jax.default_device(None if mesh is None else jax.local_devices(backend="cpu")[0]):
            parts = zip(tensor.paths, tensor.split(stored), strict=True)
            return [_quantised(part, tensor, path, quantisation) for path, part in parts]

    def place(names: list[str]) -> list[_Leaf]:
        tensor, first = matched[names[0]], kernels_of(names[0])
        if tensor.expert is None:
            kernels = zip(tensor.paths, first, strict=True)
            return [_placed(path, kernel, get_leaf(axes, path), dtype, mesh) for path, kernel in kernels]
        slices = (first if name == names[0] else kernels_of(name) for name in names)
        if mesh is not None:
            stacked = [jax.tree.map(lambda *parts: np.stack(parts), *each) for each in zip(*slices, strict=True)]
            kernels = zip(tensor.paths, stacked, strict=True)
            return [_placed(path, kernel, get_leaf(axes, path), dtype, mesh) for path, kernel in kernels]
        starts = [_start(kernel, dtype) for kernel in first]
        values = _stacked(([_on_default(kernel, dtype) for kernel in kernels] for kernels in slices), len(names))
        return [_Leaf(*leaf) for leaf in zip(tensor.paths, values, starts, strict=True)]

    def read(names: list[str]) -> list[_Leaf]:
        with np.errstate(over="ignore"):  # what is beyond a dtype is told below
            return place(names)

    # The tensors of a layer's experts are read together, for one array.
    together: dict[Any, list[str]] = {}
    for name, tensor in matched.items():
        together.setdefault(tensor.paths, []).append(name)
    params: Params = {}
    starts: Params = {}
    flags: dict[tuple[Any, ...], Any] = {}
    for leaf in _ahead(read, together.values()):
        put_leaf(params, leaf.path, leaf.value)
        put_leaf(starts, leaf.path, leaf.start)
        if check_finite:
            flags[leaf.path] = finite.flag(leaf.value)
    if wrong := set(finite.not_finite(flags)):
        names = [name for name, tensor in matched.items() if wrong.intersection(tensor.paths)]
        raise finite.refusal(where, [*_not_finite(names, tensors, dtype)])
    return Tensors(params, b"".join(jax.tree.leaves(starts)))


def _not_finite(names: Iterable[str], tensors: TensorSource, dtype: Any) -> Iterator[tuple[str, str]]:
    """What is wrong with the tensors of leaves that are not finite: the file says whether it had such values."""
    for name in names:
        stored = tensors.read(name)
        found = finite.told(name, stored.weights() if isinstance(stored, Packed) else stored, dtype)
        yield found or ("not finite when quantised", name)


def _ahead(read: Callable[[list[str]], list[_Leaf]], groups: Iterable[list[str]]) -> Iterator[_Leaf]:
    """The leaves of all tensors in order, of which _READERS groups are read at a time."""
    with ThreadPoolExecutor(_READERS) as pool:
        waiting: deque[Future[list[_Leaf]]] = deque()
        try:
            for names in groups:
                if len(waiting) == _READERS:
                    yield from waiting.popleft().result()
                waiting.append(pool.submit(read, names))
            while waiting:
                yield from waiting.popleft().result()
        finally:  # after an error nothing further is begun
            for future in waiting:
                future.cancel()


def _on_device(part: np.ndarray, dtype: Any) -> jax.Array:
    """A tensor, possibly turned, on the default device. The runtime turns it while it copies, several times as fast as
    numpy does."""
    # On the host, where the tensor in its old dtype can go at once.
    placed = jax.device_put(part.astype(dtype, copy=False))
    # Until the device has it, the host's copy stays.
    ready: jax.Array = jax.block_until_ready(placed)  # type: ignore[no-untyped-call,unused-ignore]  # jax gives no types
    return ready


def _stacked(slices: Iterable[list[Any]], n: int) -> list[Any]:
    """Leaves of n slices, each of which is put into its place as it comes."""
    leaves: list[Any] = []
    for i, parts in enumerate(slices):
        leaves = leaves or jax.tree.map(lambda part: jnp.zeros((n, *part.shape), part.dtype), parts)
        leaves = jax.tree.map(lambda leaf, part, i=i: _put_slice(leaf, part, i), leaves, parts)
        jax.block_until_ready(leaves)  # type: ignore[no-untyped-call,unused-ignore]
    return leaves


@functools.partial(jit, donate_argnums=0)
def _put_slice(array: jax.Array, part: jax.Array, i: int) -> jax.Array:
    filled: jax.Array = lax.dynamic_update_index_in_dim(array, part, i, axis=0)
    return filled


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

    The directory appears under its name only when it is complete. Of several processes the first one writes.

    Raises:
      InputError: the directory exists already, or cannot be written; a model made here that is not of Llama's or T5's
        architecture.
    """
    if not hosts.is_first():
        return
    if directory.exists():
        raise InputError(f"{directory} exists already; choose another name or remove it")
    source = made_source(config) if source is None else source
    ends = config.end_ids[0] if len(config.end_ids) == 1 else list(config.end_ids) or None
    of_text = {"bos_token_id": config.bos_id, "eos_token_id": ends, "pad_token_id": config.pad_id}
    # What is written is not quantised.
    dropped = ("torch_dtype", "quantization_config", "compression_config")
    raw = {key: value for key, value in source.config.items() if key not in dropped}
    raw |= {"architectures": [source.family.architecture(config)], "model_type": source.family.model_type}
    raw |= {"dtype": config.dtype} | of_text
    if config.has_head and not source.family.head_decides_tie:
        raw["tie_word_embeddings"] = config.tied_head
    documents = {"config.json": raw}
    if config.has_head:
        documents["generation_config.json"] = generation = dict(source.generation) | of_text
    if config.start_id is not None:
        raw["decoder_start_token_id"] = generation["decoder_start_token_id"] = config.start_id
    with files.making(directory) as partial:
        _write_tensors(partial, stored_tensors(source.family, config), params, DTYPES[config.dtype])
        for name, content in documents.items():
            files.write_json(partial / name, content, ours=False)
        if tokenizer is not None:
            with files.library_write(directory):
                tokenizer.save_pretrained(partial)


def _write_tensors(directory: Path, tensors: tuple[StoredTensor, ...], params: Params, dtype: Any) -> None:
    """One file, or shards with an index, each at most SHARD_BYTES; one shard in memory at a time. What is quantised is
    written as the weights that it stands for."""
    shards: list[list[StoredTensor]] = [[]]
    size = total = 0
    for tensor in tensors:
        held = sum(math.prod(shape) for shape in tensor.shapes) * np.dtype(dtype).itemsize
        if shards[-1] and size + held > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size, total = size + held, total + held
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        name = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        arrays = {t.key: t.join(_host_arrays(t, params, dtype)) for t in shard}
        contiguous = {key: np.ascontiguousarray(array) for key, array in arrays.items()}
        write_tensors(directory / name, contiguous)
        weight_map |= dict.fromkeys(arrays, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        files.write_json(directory / "model.safetensors.index.json", index, ours=False)


def _host_arrays(tensor: StoredTensor, params: Params, dtype: Any) -> list[np.ndarray]:
    """What a stored tensor has of its leaves."""
    leaves = [get_leaf(params, path) for path in tensor.paths]
    if tensor.expert is not None:
        leaves = jax.tree.map(lambda leaf: leaf[tensor.expert], leaves)
    shapes = tensor.shapes
    whole = [dequantised(k, s, dtype) if isinstance(k, Quantised) else k for k, s in zip(leaves, shapes, strict=True)]
    return [np.asarray(leaf) for leaf in whole]
