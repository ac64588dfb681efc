"""LoRA adapters to and from PEFT's files: `adapter_config.json` and `adapter_model.safetensors`.

In and out: an `Adapter` over our dotted paths. PEFT names layers as transformers does and stores A as [R, inputs], B as
[outputs, R]; the family's table of names says which of our layers each is. A fused checkpoint module (GPT-2's c_attn)
is several layers here: reading gives each of them the same A and its rows of B; writing puts different A's into one
block-diagonal pair of higher rank, which computes the same and is taken apart again when it is read.
"""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from rlae_jax import digests, files, hosts, records
from rlae_jax.errors import InputError, grouped_error
from rlae_jax.files import read_json
from rlae_jax.models import finite, hugging_face
from rlae_jax.models.config import ModelConfig
from rlae_jax.models.families import Family, made_family
from rlae_jax.models.lora import Adapter, Factors, LoraConfig
from rlae_jax.models.stored import (
    StoredTensor,
    fused_heads,
    get_leaf,
    modules,
    read_tensor,
    stored_tensors,
    tensor_headers,
    write_tensors,
)
from rlae_jax.models.transformer import Params, linears

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_FACTOR = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(\.\w+)?\.weight$")
_BASE = re.compile(r"^base_model\.model\.(?P<module>.+?)(\.base_layer)?\.weight$")
# PEFT goes by the names of modules in memory. Every head is this one now, GPT-NeoX's too, whose checkpoints and older
# adapters have the other name.
_HEAD, _OLD_HEAD = "lm_head", "embed_out"
# Settings of PEFT's that change what is computed; any value but None, False or nothing is one too many.
_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
)
# These begin by changing the base: what was trained belongs to that one and not to the one in the checkpoint.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclasses.dataclass(frozen=True)
class _Module:
    """A checkpoint module that adapters can change: its name, our layers, and how its outputs hold theirs."""

    key: str
    paths: tuple[str, ...]
    inputs: tuple[int, ...]
    outputs: tuple[tuple[int, ...], ...]  # of each layer
    groups: int

    def stored_b(self, rank: int) -> StoredTensor:
        """B as PEFT stores it, [outputs, R]: a kernel whose input is the rank."""
        shapes = tuple((rank, *shape) for shape in self.outputs)
        return StoredTensor(self.key, tuple((path,) for path in self.paths), shapes, "kernel", 1, groups=self.groups)


def _modules(family: Family | None, config: ModelConfig) -> dict[str, _Module]:
    family = family or made_family(config)
    specs = linears(config)
    found = {}
    for name, key, paths in modules(family, config):
        if paths[0] in specs:
            spec = specs[paths[0]]
            outputs = tuple(specs[path].shape[spec.inputs :] for path in paths)
            key = _HEAD if paths == ("head",) else key
            found[key] = _Module(
                key, paths, spec.shape[: spec.inputs], outputs, fused_heads(family, config, name, paths[0])
            )
    return found


def read_settings(directory: Path) -> dict[str, Any]:
    """adapter_config.json.

    Raises:
      InputError: missing, unreadable, or of a kind that is not supported; a directory that is not what was written.
    """
    digests.check(directory)
    path = directory / CONFIG
    if not path.is_file():
        raise InputError(f"{directory}: no {CONFIG}; expected a directory that PEFT wrote")
    raw = read_json(path)
    checked = records.check(raw, hugging_face.Adapter, path)
    kind = checked.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{path}: peft_type {kind} is not supported; supported: LORA")
    unsupported = {name: raw.get(name) for name in _UNSUPPORTED}
    unsupported["bias"] = None if checked.get("bias") in (None, "none") else checked["bias"]
    begun = raw.get("init_lora_weights")
    unsupported["init_lora_weights"] = begun if str(begun).lower().startswith(_CHANGED_BASE) else None
    found = [f"{key} = {value}" for key, value in unsupported.items() if value]
    if found:
        raise InputError(f"{path}: {', '.join(found)} is not supported; supported: plain and rank-stabilised LoRA")
    for key in ("r", "lora_alpha"):
        if not checked.get(key):
            raise InputError(f"{path}: the key {key} is {'0' if key in checked else 'missing'}")
    return raw


def require_whole(directory: Path) -> dict[str, Any]:
    """`read_settings`, and the tensors are there, too.

    Raises:
      InputError: what `read_settings` raises; no tensors.
    """
    raw = read_settings(directory)
    path = directory / TENSORS
    if not path.is_file():
        pickled = " (adapter_model.bin is a pickle, which is never read)" if list(directory.glob("*.bin")) else ""
        raise InputError(f"{directory}: no {TENSORS}{pickled}; the adapter is incomplete")
    return raw


def read_adapter(
    directory: Path,
    name: str,
    family: Family | None,
    config: ModelConfig,
    base: Params,
    *,
    check_finite: bool = True,
) -> Adapter:
    """The adapter in a directory, for a base model of this family, configuration and parameters.

    Raises:
      InputError: settings or files that cannot be used; tensors that do not fit the base model; values that are not
        finite, if that is to be checked.
    """
    raw = require_whole(directory)
    path = directory / TENSORS
    family = family or made_family(config)
    known = _modules(family, config)
    pairs, findings = _pairs(path, raw, known, family.prefix, _base_tensors(family, config), base)
    if findings or not pairs:
        made_for = raw.get("base_model_name_or_path")
        raise grouped_error(
            f"{path}: the adapter does not fit this base model" + (f"; it was made for {made_for}" if made_for else ""),
            findings or [("factors", "none")],
        )

    stabilised = bool(raw.get("use_rslora"))
    alpha = float(raw["lora_alpha"]) * (math.sqrt(raw["r"]) if stabilised else 1.0)
    lora = LoraConfig(rank=raw["r"], alpha=alpha, dropout=float(raw.get("lora_dropout") or 0.0), targets=())
    params: Factors = {}
    wrong = []
    for pair in pairs.values():
        module = known[pair.module]
        stored = {pair.keys[side]: read_tensor(path, pair.keys[side]) for side in "AB"}
        told = (finite.told(key, array, np.float32) for key, array in stored.items())
        wrong += [finding for finding in told if finding is not None]
        a, b = (array.astype(np.float32) for array in stored.values())
        rank = a.shape[0]
        own_alpha = _pattern(directory, raw, "alpha_pattern", pair.name, raw["lora_alpha"])
        own_scale = own_alpha / (math.sqrt(rank) if stabilised else rank)
        if not math.isclose(own_scale, lora.scale):
            b = b * np.float32(own_scale / lora.scale)  # one scale per adapter; what differs goes into B
        parts = module.stored_b(rank).split(b)
        for our_path, part, own in zip(module.paths, parts, _own_ranks(parts), strict=True):
            if own.any():
                own_a = a[own].T.reshape(*module.inputs, own.sum())
                params[our_path] = {"a": jnp.asarray(own_a), "b": jnp.asarray(part[own])}
    if check_finite and wrong:
        raise finite.refusal(path, wrong)
    return Adapter(dataclasses.replace(lora, targets=tuple(sorted(params))), params, name)


@dataclasses.dataclass(frozen=True)
class _Pair:
    """A module's two factors in a file."""

    module: str  # as the checkpoint of the whole model has it
    name: str  # as this file has it, without the prefix where the bare model was trained
    keys: dict[str, str]  # "A" or "B" -> key


def _pairs(
    path: Path,
    raw: dict[str, Any],
    known: dict[str, _Module],
    prefix: str,
    tensors: dict[str, StoredTensor],
    base: Params,
) -> tuple[dict[str, _Pair], list[tuple[str, str]]]:
    """The pairs of factors in a file, by module, and what is wrong with it, as `grouped_error` takes it."""
    shapes = {key: header.shape for key, header in tensor_headers(path).items()}
    pairs: dict[str, _Pair] = {}
    findings = []
    for key, shape in shapes.items():
        match = _FACTOR.match(key)
        if match is None:
            kept = _BASE.match(key)
            names = [kept["module"], prefix + kept["module"]] if kept else []
            tensor = next((tensors[f"{name}.weight"] for name in names if f"{name}.weight" in tensors), None)
            if ".lora_embedding_" in key:
                findings.append(("on the embedding, where LoRA is not supported", key))
            elif tensor is None:
                findings.append(("unknown", key))
            elif shape != tensor.shape or not _same(read_tensor(path, key), tensor, base):
                findings.append(("changed from the base, which is not supported", key))
            continue
        name = match["module"].replace("_orig_mod.", "")
        name = _HEAD if name == _OLD_HEAD else name
        whole = name if name in known else prefix + name  # trained on the bare model
        if whole not in known:
            # A head that is tied is the embedding's table.
            tensor = tensors.get(f"{name}.weight") or tensors.get(f"{whole}.weight")
            of_experts = tensor is not None and (tensor.stacked or tensor.expert is not None)
            kind = "on a tied head" if name == _HEAD else "on experts" if of_experts else None
            findings.append((f"{kind}, where LoRA is not supported" if kind else "unknown", key))
            continue
        module, side = known[whole], match["side"]
        size = math.prod(module.inputs) if side == "A" else sum(math.prod(shape) for shape in module.outputs)
        if len(shape) != 2 or shape[1 if side == "A" else 0] != size:
            findings.append(("mis-shaped", f"{key} is {list(shape)}, the base has {size}"))
        elif whole in pairs and side in pairs[whole].keys:
            findings.append(("given twice", key))
        pairs.setdefault(whole, _Pair(whole, name, {})).keys[side] = key
    for name, pair in pairs.items():
        held = [shapes[key] for _, key in sorted(pair.keys.items())]
        if len(held) == 1:
            findings.append(("without its other factor", name))
        elif held[0][:1] != held[1][1:]:
            findings.append(("of unequal rank", name))
        elif held[0][0] != (rank := _pattern(path.parent, raw, "rank_pattern", pair.name, raw["r"])):
            findings.append(("of another rank than adapter_config.json says", f"{name} has {held[0][0]}, not {rank}"))
    return pairs, findings


def _base_tensors(family: Family, config: ModelConfig) -> dict[str, StoredTensor]:
    """The base's own tensors. PEFT keeps the embedding and the head beside the factors when it trains either."""
    tensors = {tensor.key: tensor for tensor in stored_tensors(family, config)}
    path = ("embedding",) if config.tied_head else ("head", "kernel")
    head = next(tensor for tensor in tensors.values() if path in tensor.paths)
    return tensors | {f"{name}.weight": head for name in (_HEAD, _OLD_HEAD)}


def _same(kept: np.ndarray, tensor: StoredTensor, base: Params) -> bool:
    """Whether a tensor beside the factors is the base's own, but for rounding to either's dtype."""
    for leaf, part in zip(tensor.paths, tensor.split(kept), strict=True):
        own = np.asarray(get_leaf(base, leaf))
        if not np.array_equal(part.astype(own.dtype), own) and not np.array_equal(part, own.astype(part.dtype)):
            return False
    return True


def _own_ranks(parts: list[np.ndarray]) -> list[np.ndarray]:
    """Which ranks belong to each layer of a fused module, from their B's: not those that other layers alone use."""
    used = np.stack([part.reshape(len(part), -1).any(axis=1) for part in parts])
    return list(used | ~used.any(axis=0))


def _pattern(directory: Path, raw: dict[str, Any], key: str, name: str, default: Any) -> Any:
    """The value of the first pattern that matches a module's name, as PEFT matches them."""
    where, patterns = f"{directory / CONFIG}: {key}", raw.get(key) or {}
    found = (value for one, value in patterns.items() if hugging_face.matches(rf"(.*\.)?({one})$", name, where))
    return next(found, default)


def write_adapter(directory: Path, adapter: Adapter, family: Family | None, config: ModelConfig, *, base: str) -> None:
    """Writes the adapter's directory, which appears under its name only when it is complete. Of several processes the
    first one writes.

    Raises:
      InputError: the directory exists already, or cannot be written; the adapter changes layers that the base model
        does not have.
    """
    if not hosts.is_first():
        return
    if directory.exists():
        raise InputError(f"{directory} exists already; choose another name or remove it")
    known = _modules(family, config)
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    written: set[str] = set()
    for key, module in known.items():
        parts = [adapter.params.get(path) for path in module.paths]
        if not any(parts):
            continue
        written |= {path for path, part in zip(module.paths, parts, strict=True) if part}
        a, b = _join(module, parts)
        ranks[key] = len(a)
        tensors[f"base_model.model.{key}.lora_A.weight"] = a
        tensors[f"base_model.model.{key}.lora_B.weight"] = b
    foreign = sorted(adapter.params.keys() - written)
    if foreign:
        raise grouped_error("the adapter does not fit this base model", [("unknown layers", path) for path in foreign])
    own = {key: rank for key, rank in ranks.items() if rank != adapter.config.rank}
    raw = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if config.encoder is None else "SEQ_2_SEQ_LM",
        "base_model_name_or_path": base,
        "r": adapter.config.rank,
        "lora_alpha": adapter.config.alpha,
        "lora_dropout": adapter.config.dropout,
        "target_modules": _target_modules(set(ranks), set(known)),
        "bias": "none",
        # Of modules: experts, which some families have as tensors without one, take no adapters.
        "fan_in_fan_out": bool(family and set(family.inputs_first) - set(family.unsuffixed)),
        "rank_pattern": own,
        "alpha_pattern": {key: adapter.config.scale * rank for key, rank in own.items()},
        "inference_mode": True,
    }
    with files.making(directory) as partial:
        write_tensors(partial / TENSORS, tensors)
        files.write_json(partial / CONFIG, raw, ours=False)


def _join(module: _Module, parts: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """A [R, inputs] and B [outputs, R] of one module from its layers' factors."""
    size = math.prod(module.inputs)
    downs = [None if part is None else np.asarray(part["a"], np.float32).reshape(size, -1).T for part in parts]
    present = [down for down in downs if down is not None]
    shared = len(present) == len(parts) and all(np.array_equal(down, present[0]) for down in present)
    a = present[0] if shared else np.concatenate(present)
    rank, start = len(a), 0
    blocks = []
    for part, down, shape in zip(parts, downs, module.outputs, strict=True):
        block = np.zeros((rank, *shape), np.float32)
        if part is not None and down is not None:
            block[slice(None) if shared else slice(start, start + len(down))] = np.asarray(part["b"], np.float32)
            start += len(down)
        blocks.append(block)
    return np.ascontiguousarray(a), np.ascontiguousarray(module.stored_b(rank).join(blocks))


def _target_modules(chosen: set[str], known: set[str]) -> list[str]:
    """The last parts of the modules' names where they say it all, else whole names."""
    last = {key.rsplit(".", 1)[-1] for key in chosen}
    same = {key for key in known if key.rsplit(".", 1)[-1] in last}
    return sorted(last if same == chosen else chosen)
