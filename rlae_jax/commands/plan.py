"""`rlae-jax plan`."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from rlae_jax.commands.options import Dtype, Models
from rlae_jax.errors import InputError
from rlae_jax.ranges import Bandwidth, Count, CountOr0, Flops, GiB

if TYPE_CHECKING:
    from rlae_jax.models import ModelConfig
    from rlae_jax.models.quantise import Kind
    from rlae_jax.planning.devices import Device


def plan(
    *,
    models: Models,
    device: str | None = None,
    mesh: Annotated[str, arg(metavar="data=N,model=M")] = "data=1,model=1",
    batch: Count = 1,
    prompt: Count = 512,
    new: Count = 256,
    dtype: Dtype = "bfloat16",
    quantise: Literal["int8", "int4", "fp8"] | None = None,
    kv_dtype: Literal["int8", "fp8"] | None = None,
    union: CountOr0 | None = None,
    adapters: CountOr0 = 0,
    train: bool = False,
    algo: Literal["ppo", "mappo"] = "ppo",
    iterations: Count | None = None,
    span_length: Count = 4,
    memory: GiB | None = None,
    bandwidth: Bandwidth | None = None,
    flops: Flops | None = None,
    compile: bool = False,
    json_output: Annotated[bool, arg(name="json")] = False,
) -> None:
    """Tell whether models fit on devices, and how fast they could be, before anything is rented or loaded.

    Only configurations are read. Memory is worked out for the moments at which most is alive; speeds are what reading
    every byte once, or the products, allow at best. Real programs take longer.

    Args:
        models: Hugging Face directories, GGUF files, Hub ids (weights are not fetched) or config.json files.
        device: v4, v5e, v5p, v6e, A100-40, A100-80, H100, H200, B200, L4 or RTX4090; or give --memory, --bandwidth and
            --flops.
        mesh: how many groups of devices have rows of their own, and how many devices share every model.
        batch: answers written together; with --train the prompts of an iteration.
        prompt: tokens of a prompt.
        new: tokens of an answer.
        dtype: of parameters, keys and values.
        quantise: kernels of linear layers in fewer bits (int4 in groups of 32), heads and embeddings as they are.
        kv_dtype: keys and values in 8 bits. Default: as dtype.
        union: entries of the union vocabulary of models with different tokenizers, as inspect tells; 0 for one
            tokenizer. Default: 0 where all vocabularies are of one size, else the sum of their sizes.
        adapters: so many LoRA adapters of rank 8 of the one model are the members.
        train: also train a weight agent.
        algo: ppo = one agent sets all weights, mappo = one agent per member sets its own.
        iterations: of training. Default: 200.
        span_length: tokens between two decisions.
        memory: of a device, in GiB, instead of a known device's.
        bandwidth: of a device's memory, in 10^9 bytes per second.
        flops: of a device's bfloat16 products, in 10^12 per second.
        compile: ask the TPU compiler as well, for the program itself: seconds to minutes. It needs libtpu, which comes
            with pip install 'rlae-jax[tpu-plan]', and no TPU.
        json_output: print JSON instead of tables.
    """
    from rlae_jax import report, sharding
    from rlae_jax.config import ALGORITHMS
    from rlae_jax.models.lm import hold_cache_in
    from rlae_jax.planning import plan as planning
    from rlae_jax.planning.workload import Workload

    if not models:
        raise InputError("no models: give at least one directory, Hub id or config.json with --models")
    if iterations is not None and not train:
        raise InputError("--iterations are of training: give --train, too")
    if adapters and (len(models) > 1 or union):
        raise InputError("--adapters are of one model with one tokenizer")
    chosen = _device(device, memory, bandwidth, flops)
    if compile and not chosen.clock:
        raise InputError(f"--compile asks the compiler of TPUs; {chosen.name} is none")
    sizes = dict(zip((sharding.DATA, sharding.MODEL), sharding.read_mesh(mesh), strict=True))
    read = [_read(model, dtype) for model in models]
    for member in read:
        _check_quantise(*member, quantise)
    members = tuple(hold_cache_in(config, kv_dtype) for _, config, _ in read)
    vocabs = [config.vocab for config in members]
    config = ALGORITHMS[algo](prompts=batch) if train else None
    workload = Workload(
        members=members,
        batch=batch,
        prompt=prompt,
        new=new,
        span_length=span_length,
        union=(sum(vocabs) if len(set(vocabs)) > 1 else 0) if union is None else union,
        adapters=adapters,
        train=config,
        stored=tuple(stored for _, _, stored in read),
    )
    made = planning.make_plan(
        [name for name, _, _ in read],
        workload,
        sizes,
        chosen,
        quantise=quantise,
        iterations=0 if config is None else iterations or config.iterations,
        compiled=compile,
    )
    if json_output:
        report.say(json.dumps(planning.to_json(made), indent=2))
    else:
        planning.show(made)


def _device(name: str | None, memory: float | None, bandwidth: float | None, flops: float | None) -> "Device":
    """A known device, with what is given changed, or one of given figures.

    Raises:
      InputError: neither a name nor all figures.
    """
    from rlae_jax.planning.devices import DEVICES, Device, find_device

    given = {"memory": memory, "bandwidth": bandwidth, "flops": flops}
    if name is not None:
        changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        return dataclasses.replace(find_device(name), **changes)
    if memory is None or bandwidth is None or flops is None:
        raise InputError(
            f"no device: give --device with one of {', '.join(DEVICES)}, or all of --memory, --bandwidth and --flops"
        )
    return Device(name="device", memory=memory, bandwidth=bandwidth, flops=flops)


def _check_quantise(name: str, config: "ModelConfig", stored: "Kind | None", quantise: "Kind | None") -> None:
    """Raises an `InputError` for what `load` would refuse."""
    from rlae_jax.models.quantise import GROUPS, Quantisation
    from rlae_jax.models.transformer import linears, mixture_linears

    wanted = Quantisation.of(quantise)
    if wanted is None:
        return
    if stored is not None:
        raise InputError(f"{name} is quantised already: plan it without --quantise")
    specs = (linears(config) | mixture_linears(config)).items()
    inputs = {path: math.prod(spec.shape[: spec.inputs]) for path, spec in specs if path != "head"}
    odd = [f"{path} has {n}" for path, n in inputs.items() if wanted.group_of(n) is None]
    if odd:
        raise InputError(f"{name}: int4 needs inputs that groups of {GROUPS[0]} divide, and {odd[0]}; int8 takes any")


def _read(model: str, dtype: str) -> "tuple[str, ModelConfig, Kind | None]":
    """A model's name, configuration and the form of its kernels where they are quantised, from a directory, a Hub id or
    a configuration file.

    Raises:
      InputError: what is no readable configuration of a language model.
    """
    from rlae_jax.models import checkpoint_files, hub, quantised_files

    path = Path(os.path.expanduser(model))
    if os.path.isfile(path) and path.suffix != ".gguf":
        if path.name != "config.json":
            raise InputError(
                f"{model} is a file; expected a directory, a Hub id, a GGUF file or one called config.json"
            )
        directory, name = path.parent, path.resolve().parent.name
    else:
        directory = hub.resolve(model, weights=False)
        name = Path(model).name
    source = checkpoint_files.read_source(directory)
    config = checkpoint_files.read_config(source, directory, dtype=dtype, precision="highest", tensors=False)
    if not config.has_head:
        raise InputError(f"{directory} is an encoder ({source.family.model_type}); a plan is for language models")
    settings = quantised_files.read_settings(directory, source.config) if directory.is_dir() else None
    return name, config, None if settings is None else quantised_files.kind_held(settings)
