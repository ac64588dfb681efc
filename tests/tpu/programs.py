"""Every program of the package with arguments that are shapes, small enough to compile in seconds and large enough that
what matters on a TPU shows: caches that its vector memory cannot hold."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from rlae_jax import sharding
from rlae_jax.config import MAPPOConfig, PPOConfig
from rlae_jax.emorl import fine_tune, fused
from rlae_jax.models import LoraConfig, ModelConfig, pretrain, transformer
from rlae_jax.planning.workload import Workload, place_params, place_rows, place_whole

MODEL = ModelConfig(
    vocab=8192, width=512, layers=1, heads=8, kv_heads=4, head_width=64, ffn_width=2048, dtype="bfloat16", context=4096
)
TRAINED = dataclasses.replace(MODEL, vocab=1024, width=256, ffn_width=512)  # gradients take long to compile
BATCH, PROMPT, NEW = 32, 1024, 1024
LOCKSTEP = Workload(members=(MODEL, MODEL), batch=BATCH, prompt=PROMPT, new=NEW)
UNION = dataclasses.replace(LOCKSTEP, union=12_000)
SHARED = dataclasses.replace(LOCKSTEP, members=(MODEL,), adapters=2)
TRAINING = dataclasses.replace(LOCKSTEP, train=PPOConfig(prompts=BATCH))
TEAM = dataclasses.replace(LOCKSTEP, train=MAPPOConfig(prompts=BATCH))
POINTS = 4
FINE_TUNE = fine_tune.EMORLConfig(batch=8, samples=2, max_new_tokens=64, lora=LoraConfig(rank=8, alpha=32.0))
ADAPTERS, TEXT = 2, 64
PRETRAIN = pretrain.PretrainConfig(batch=16, steps=100)


def device_bytes(tree: Any) -> int:
    """Of the arrays as one device holds them."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def cache_bytes(workload: Workload, mesh: Mesh) -> int:
    """Of all caches on one device."""
    return sum(shape.nbytes for shape in workload.cache_shapes(mesh))


def lower_points(mesh: Mesh) -> jax.stages.Lowered:
    """EMORL's search: prompts that were read once, under several weightings of the adapters."""
    workload = dataclasses.replace(SHARED, batch=BATCH // POINTS)
    points = place_whole(jax.ShapeDtypeStruct((POINTS, ADAPTERS), jnp.float32), mesh)
    args = workload.params(mesh), workload.state(mesh), points, None, place_whole(workload.spec(), mesh)
    with sharding.use(mesh):
        return fused._answer.lower(*args, 1)


def fine_tune_state() -> Any:
    """A stack of adapters in training, as shapes."""
    return jax.eval_shape(
        lambda: fine_tune.join([fine_tune.begin(TRAINED, FINE_TUNE, seed) for seed in range(ADAPTERS)])
    )


def lower_fine_tune(mesh: Mesh) -> jax.stages.Lowered:
    """One step of every adapter of the stack from the samples of its own block."""
    per_block, n = FINE_TUNE.batch * FINE_TUNE.samples, FINE_TUNE.max_new_tokens
    texts = Workload(members=(TRAINED,), batch=ADAPTERS * FINE_TUNE.batch, prompt=TEXT, new=n)
    rows = ADAPTERS * per_block
    samples = fine_tune.Samples(
        jax.ShapeDtypeStruct((rows, n), jnp.int32),
        jax.ShapeDtypeStruct((rows, n), bool),
        jax.ShapeDtypeStruct((rows,), bool),
    )
    rewards = jax.ShapeDtypeStruct((ADAPTERS, per_block), jnp.float32)
    seeds = jax.ShapeDtypeStruct((ADAPTERS,), jnp.uint32)
    state = place_whole(fine_tune_state(), mesh)
    args = place_params(TRAINED, mesh), state, texts.prompts(mesh, keys=False), place_rows(samples, mesh)
    # JAX's own attention mixes float32 and bfloat16 in its gradient.
    with sharding.use(mesh), jax.numpy_dtype_promotion("standard"):
        return fine_tune.update.lower(*args, *place_whole((rewards, seeds), mesh), TRAINED, FINE_TUNE)


def pretrain_state(mesh: Mesh) -> tuple[Any, Any]:
    """Parameters and what the optimiser keeps of them, in parts over all devices."""
    optimiser, axes = pretrain._optimiser(PRETRAIN), transformer.logical_axes(TRAINED)

    def place(leaf: Any, names: tuple[str, ...]) -> Any:
        spec = sharding.partition(names, leaf.shape, mesh, fsdp=True)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    kept = jax.eval_shape(optimiser.init, place_params(TRAINED, None))
    whole = functools.partial(place_whole, mesh=mesh)
    state = optax.tree.map_params(optimiser, place, kept, axes, transform_non_params=whole)
    return place_params(TRAINED, mesh, fsdp=True), state


def lower_pretrain(mesh: Mesh) -> jax.stages.Lowered:
    """Two steps of next-token training."""
    texts = jax.ShapeDtypeStruct((256, 128), jnp.int32), jax.ShapeDtypeStruct((256, 128), bool)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
    args = *pretrain_state(mesh), *place_whole(texts, mesh), None, place_whole(keys, mesh)
    # JAX's own attention mixes float32 and bfloat16 in its gradient.
    with sharding.use(mesh), jax.numpy_dtype_promotion("standard"):
        return pretrain._run_steps.lower(TRAINED, PRETRAIN, *args)
