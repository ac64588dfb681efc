"""LoRA adapters to and from PEFT's files: `adapter_config.json` and `adapter_model.safetensors`.

In and out: an `Adapter` over our dotted paths. PEFT names layers as transformers does and stores A as [R, inputs], B as
[outputs, R]; the family's table of names says which of our layers each is. A fused checkpoint module (GPT-2's c_attn)
is several layers here: reading gives each of them the same A and its rows of B; writing puts different A's into one
block-diagonal pair of higher rank, which computes the same.
"""

import dataclasses
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from rlae_jax.errors import InputError, grouped_error
from rlae_jax.files import read_json
from rlae_jax.models.checkpoint_files import StoredTensor, modules, read_tensor, tensor_shapes
from rlae_jax.models.config import ModelConfig
from rlae_jax.models.families import FAMILIES, Family
from rlae_jax.models.lora import Adapter, Factors, LoraConfig
from rlae_jax.models.transformer import linears

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_FACTOR = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(\.\w+)?\.weight$")


@dataclasses.dataclass(frozen=True)
class _Module:
    """A checkpoint module that adapters can change: its name, our layers, and how its outputs hold theirs."""

    key: str
    paths: tuple[str, ...]
    inputs: tuple[int, ...]
    outputs: tuple[tuple[int, ...], ...]  # of each layer
    by_head: bool

    def stored_b(self, rank: int) -> StoredTensor:
        """B as PEFT stores it, [outputs, R]: a kernel whose input is the rank."""
        shapes = tuple((rank, *shape) for shape in self.outputs)
        return StoredTensor(self.key, tuple((path,) for path in self.paths), shapes, "kernel", 1, by_head=self.by_head)


def _modules(family: Family | None, config: ModelConfig) -> dict[str, _Module]:
    family = family or FAMILIES["llama"]
    specs = linears(config)
    found = {}
    for name, key, paths in modules(family, config):
        if paths[0] in specs:
            spec = specs[paths[0]]
            outputs = tuple(specs[path].shape[spec.inputs :] for path in paths)
            found[key] = _Module(key, paths, spec.shape[: spec.inputs], outputs, name in family.fused_by_head)
    return found


def read_settings(directory: Path) -> dict[str, Any]:
    """adapter_config.json.

    Raises:
      InputError: missing, unreadable, or of a kind that is not supported.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise InputError(f"{directory}: no {CONFIG}; expected a directory that PEFT wrote")
    raw = read_json(path)
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{path}: peft_type {kind} is not supported; supported: LORA")
    unsupported = {
        "use_dora": raw.get("use_dora"),
        "bias": None if raw.get("bias", "none") == "none" else raw["bias"],
        "lora_bias": raw.get("lora_bias"),
        "modules_to_save": raw.get("modules_to_save"),
        "trainable_token_indices": raw.get("trainable_token_indices"),
        "layer_replication": raw.get("layer_replication"),
    }
    found = [f"{key} = {value}" for key, value in unsupported.items() if value]
    if found:
        raise InputError(f"{path}: {', '.join(found)} is not supported; supported: plain and rank-stabilised LoRA")
    if not isinstance(raw.get("r"), int) or raw["r"] < 1 or not isinstance(raw.get("lora_alpha"), int | float):
        raise InputError(
            f"{path}: r must be a whole number >= 1 and lora_alpha a number, not {raw.get('r')} and "
            f"{raw.get('lora_alpha')}"
        )
    return raw


def read_adapter(directory: Path, family: Family | None, config: ModelConfig) -> Adapter:
    """The adapter in a directory, for a base model of this family and configuration.

    Raises:
      InputError: settings or files that cannot be used; tensors that do not fit the base model.
    """
    raw = read_settings(directory)
    path = directory / TENSORS
    if not path.is_file():
        pickled = " (adapter_model.bin is a pickle, which is never read)" if list(directory.glob("*.bin")) else ""
        raise InputError(f"{directory}: no {TENSORS}{pickled}")
    known = _modules(family, config)
    prefix = (family or FAMILIES["llama"]).prefix
    shapes = tensor_shapes(path)
    pairs: dict[str, dict[str, str]] = {}
    findings = []
    for key, shape in shapes.items():
        match = _FACTOR.match(key)
        name = match["module"] if match else key
        name = name if name in known else prefix + name  # trained on the bare model
        if match is None or name not in known:
            findings.append(("unknown", key))
            continue
        module, side = known[name], match["side"]
        size = math.prod(module.inputs) if side == "A" else sum(math.prod(shape) for shape in module.outputs)
        held = shape[1] if side == "A" else shape[0]
        if held != size or len(shape) != 2:
            findings.append(("mis-shaped", f"{key} is {list(shape)}, the base has {size}"))
        pairs.setdefault(name, {})[side] = key
    findings += [("without its other factor", name) for name, pair in pairs.items() if len(pair) == 1]
    findings += [
        ("of unequal rank", name)
        for name, pair in pairs.items()
        if len(pair) == 2 and shapes[pair["A"]][0] != shapes[pair["B"]][1]
    ]
    if findings or not pairs:
        base = raw.get("base_model_name_or_path")
        raise grouped_error(
            f"{path}: the adapter does not fit this base model" + (f"; it was made for {base}" if base else ""),
            findings or [("tensors", "none")],
        )

    stabilised = bool(raw.get("use_rslora"))
    alpha = float(raw["lora_alpha"]) * (math.sqrt(raw["r"]) if stabilised else 1.0)
    lora = LoraConfig(rank=raw["r"], alpha=alpha, dropout=float(raw.get("lora_dropout") or 0.0), targets=())
    params: Factors = {}
    for name, pair in pairs.items():
        module = known[name]
        a, b = (read_tensor(path, pair[side]).astype(np.float32) for side in "AB")
        rank = a.shape[0]
        own_alpha = _pattern(raw.get("alpha_pattern") or {}, name, raw["lora_alpha"])
        own_scale = own_alpha / (math.sqrt(rank) if stabilised else rank)
        if not math.isclose(own_scale, lora.scale):
            b = b * np.float32(own_scale / lora.scale)  # one scale per adapter; what differs goes into B
        for our_path, part in zip(module.paths, module.stored_b(rank).split(b), strict=True):
            params[our_path] = {"a": jnp.asarray(a.T.reshape(*module.inputs, rank)), "b": jnp.asarray(part)}
    return Adapter(dataclasses.replace(lora, targets=tuple(sorted(params))), params, directory.resolve().name)


def _pattern(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that matches a module's name, as PEFT matches them."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def write_adapter(directory: Path, adapter: Adapter, family: Family | None, config: ModelConfig, *, base: str) -> None:
    """Writes the adapter's directory, which appears under its name only when it is complete.

    Raises:
      InputError: the directory exists already; the adapter changes layers that the base model does not have.
    """
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
        "fan_in_fan_out": bool(family and family.inputs_first),
        "rank_pattern": own,
        "alpha_pattern": {key: adapter.config.scale * rank for key, rank in own.items()},
        "inference_mode": True,
    }
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        save_file(tensors, partial / TENSORS, metadata={"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
