"""Next-token training of a small language model: what makes the embedded specialists.

In: sequences Int[R, T] and the places that are predicted Bool[R, T]; for an encoder-decoder also what its encoder
reads. Out: parameters. All steps of a report interval are one compiled scan; batches are drawn on the device from the
seed.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from rlae_jax import ranges
from rlae_jax.compilation import jit
from rlae_jax.models import transformer
from rlae_jax.models.config import ModelConfig
from rlae_jax.ranges import Count, CountOr0, LearningRate, Positive, PositiveOr0
from rlae_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """AdamW with a warm-up and a cosine decay to zero."""

    steps: Count = 1_000
    batch: Count = 256
    learning_rate: LearningRate = 3e-3
    warmup: CountOr0 = 50
    weight_decay: PositiveOr0 = 0.01
    gradient_norm: Positive = 1.0
    report_every: Count = 50
    remat: bool = False  # compute activations again for the gradient: less memory, a third more time

    def __post_init__(self) -> None:
        ranges.check(self)


class Source(NamedTuple):
    """What an encoder reads, a row per sequence."""

    ids: Int[Array, "R S"]
    mask: Int[Array, "R S"]


def next_token_loss(
    config: ModelConfig,
    params: transformer.Params,
    ids_bt: Int[Array, "B T"],
    predicted_bt: Bool[Array, "B T"],
    source: Source | None = None,
    *,
    remat: bool = False,
) -> Float[Array, ""]:
    """Mean of -log p(ids[t] | ids[<t], source) over the places where `predicted` is True.

    Args:
      source: for an encoder-decoder, whose sequences begin with its start token.
    """
    model = transformer.Model(config, params)
    before = ids_bt[:, :-1]
    if source is None:
        hidden, _ = model.forward(before, jnp.ones_like(before), remat=remat)
    else:
        hidden, _ = model.forward(source.ids, source.mask, decoder_ids=before, remat=remat)
    log_probs = model.target_log_probs(hidden, ids_bt[:, 1:])
    predicted = predicted_bt[:, 1:]
    return -jnp.sum(log_probs * predicted.astype(jnp.float32)) / jnp.sum(predicted).astype(jnp.float32)


def _optimiser(train: PretrainConfig) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, train.learning_rate, train.warmup, train.steps)
    return optax.chain(
        optax.clip_by_global_norm(train.gradient_norm), optax.adamw(schedule, weight_decay=train.weight_decay)
    )


def _shared(
    config: ModelConfig, train: PretrainConfig, params: transformer.Params, optimiser_state: optax.OptState
) -> tuple[transformer.Params, optax.OptState]:
    """On a mesh, parameters and what the optimiser keeps of them in parts over all devices."""
    axes = transformer.logical_axes(config)

    def pin(leaf: Array, names: tuple[str, ...]) -> Array:
        return constrain(leaf, *names, fsdp=True)

    pinned = jax.tree.map(pin, params, axes)
    state = optax.tree.map_params(_optimiser(train), pin, optimiser_state, axes)
    return pinned, state


@functools.partial(jit, static_argnums=(0, 1), donate_argnums=2)
def _begin(
    config: ModelConfig, train: PretrainConfig, params: transformer.Params
) -> tuple[transformer.Params, optax.OptState]:
    """Parameters and a fresh state of the optimiser."""
    return _shared(config, train, params, _optimiser(train).init(params))


@functools.partial(jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def _run_steps(
    config: ModelConfig,
    train: PretrainConfig,
    params: transformer.Params,
    optimiser_state: optax.OptState,
    ids: Int[Array, "R T"],
    predicted: Bool[Array, "R T"],
    source: Source | None,
    keys: Array,
) -> tuple[transformer.Params, optax.OptState, Float[Array, ""]]:
    def step(
        carry: tuple[transformer.Params, optax.OptState], key: Array
    ) -> tuple[tuple[transformer.Params, optax.OptState], Array]:
        params, optimiser_state = carry
        rows = jax.random.randint(key, (train.batch,), 0, ids.shape[0])
        taken = jax.tree.map(lambda leaf: constrain(leaf[rows], "batch"), (ids, predicted, source))
        loss, gradients = jax.value_and_grad(functools.partial(next_token_loss, config, remat=train.remat))(
            params, **dict(zip(("ids_bt", "predicted_bt", "source"), taken, strict=True))
        )
        updates, optimiser_state = _optimiser(train).update(gradients, optimiser_state, params)
        return _shared(config, train, optax.apply_updates(params, updates), optimiser_state), loss

    (params, optimiser_state), losses = jax.lax.scan(step, (params, optimiser_state), keys)
    return params, optimiser_state, jnp.mean(losses)


def pretrain(
    config: ModelConfig,
    ids: Int[Array | np.ndarray, "R T"],
    predicted: Bool[Array | np.ndarray, "R T"],
    train: PretrainConfig,
    *,
    seed: int,
    params: transformer.Params | None = None,
    source: Source | None = None,
    on_progress: Callable[[int, float], None] = lambda step, loss: None,
) -> transformer.Params:
    """The same seed gives the same parameters on the same machine.

    Args:
      params: where training starts; they are left as they are. None means random ones.
      source: what an encoder-decoder's encoder reads.
      on_progress: called with the number of steps done and their mean loss, every `report_every` steps.
    """
    init_key, data_key = jax.random.split(jax.random.key(seed))
    # Copies, as each step takes the memory of what it is given.
    params = transformer.init_params(config, init_key) if params is None else jax.tree.map(jnp.copy, params)
    params, optimiser_state = _begin(config, train, params)
    ids, predicted, source = jax.tree.map(jnp.asarray, (ids, predicted, source))
    for start in range(0, train.steps, train.report_every):
        end = min(start + train.report_every, train.steps)
        keys = jax.vmap(functools.partial(jax.random.fold_in, data_key))(jnp.arange(start, end))
        params, optimiser_state, loss = _run_steps(config, train, params, optimiser_state, ids, predicted, source, keys)
        on_progress(end, float(loss))
    return params
