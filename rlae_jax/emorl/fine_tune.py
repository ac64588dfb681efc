"""Fine-tuning of M adapters of one base at once, each for an objective of its own: sampling and updates as programs.

The adapters are a stack with a leading M axis; a batch has M blocks of rows, and block m is adapter m's. The base is
read once for all blocks, and one gradient of the blocks' summed losses is every adapter's own, since no row reads two
adapters. What belongs to an adapter (factors, optimiser, seed, step) does not depend on which others are in the stack.

    prompts [M, B, T] ──sample──► tokens [M*B*k, N] ──texts, scorers (host)──► rewards [M, B*k] ──update──► stack
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Integer, Key

from rlae_jax import ranges
from rlae_jax.compilation import jit
from rlae_jax.config import SCHEDULES
from rlae_jax.emorl import losses
from rlae_jax.emorl.scorers import COMBINATIONS
from rlae_jax.errors import InputError
from rlae_jax.fusion.decode import decode_batch
from rlae_jax.fusion.prompts import Prompts, row_keys
from rlae_jax.fusion.spec import DecodeSpec
from rlae_jax.models import LoraConfig, ModelConfig, lora, transformer
from rlae_jax.ranges import Count, CountOr0, LearningRate, Passes, Positive, PositiveOr0, Seed, Share, Temperature
from rlae_jax.schedules import learning_rate
from rlae_jax.sharding import (
    BLOCKS,
    WHOLE,
    bring_together,
    by_rows,
    constrain,
    groups,
    join_blocks,
    mean_over_rows,
    own_share,
    split_blocks,
)

ALGORITHMS = ("scst", "grpo", "ppo")
_PUBLISHED = LoraConfig(rank=8, alpha=32.0, dropout=0.05)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EMORLConfig:
    """How adapters are fine-tuned. The defaults are EMORL's published figures where it gives any.

    Attributes:
      algorithm: "scst": self-critical sequence training. "grpo": advantages in units of their group's spread and a
        clipped ratio. "ppo": a value head, advantages over tokens and a clipped ratio.
      steps: of training at most, in whole rounds of `validate_every`, after each of which there is a validation.
      batch, samples: prompts per step, and answers to each.
      accumulate: parts into which a step's prompts are cut for their gradients, which are summed: less memory, the same
        step.
      epochs: updates from one batch of samples (grpo, ppo).
      combination: how a reward is made of several objectives, of `scorers.COMBINATIONS`.
      kl_weight: of the penalty that keeps an adapter near the base.
      window, threshold: an adapter has converged when the standard deviation of its last `window` validation scores is
        below `threshold` times their mean.
    """

    algorithm: str = "scst"
    lora: LoraConfig = _PUBLISHED
    steps: Count = 1_000
    batch: Count = 16
    samples: Count = 3
    accumulate: Count = 1
    epochs: Passes = 1
    combination: str = "sum"
    learning_rate: LearningRate = 1e-4
    schedule: str = "constant"
    warmup: CountOr0 = 0
    weight_decay: PositiveOr0 = 0.0
    gradient_norm: Positive = 2.0
    kl_weight: PositiveOr0 = 0.05
    clip: Positive = 0.2
    gae_lambda: Share = 0.95
    value_weight: PositiveOr0 = 0.5
    temperature: Temperature = 1.0
    max_new_tokens: Count = 64
    validate_every: Count = 8
    validation_prompts: Count = 32
    window: Count = 20
    threshold: PositiveOr0 = 0.015
    seed: Seed = 0

    def __post_init__(self) -> None:
        ranges.check(self)
        if self.algorithm not in ALGORITHMS:
            raise InputError(f"algorithm must be one of {', '.join(ALGORITHMS)}, not {self.algorithm!r}")
        if self.samples < 2 and self.algorithm != "ppo":
            raise InputError(f"{self.algorithm} compares the samples of a prompt: it needs at least 2, not 1")
        if self.batch % self.accumulate:
            raise InputError(f"accumulate must divide batch ({self.batch}), not {self.accumulate}")
        if self.combination not in COMBINATIONS:
            raise InputError(f"combination must be one of {', '.join(COMBINATIONS)}, not {self.combination!r}")
        if self.schedule not in SCHEDULES:
            raise InputError(f"schedule must be one of {', '.join(SCHEDULES)}, not {self.schedule!r}")


class TrainingState(NamedTuple):
    """What training changes. Every leaf has a leading M axis."""

    factors: lora.Factors
    value: Float[Array, "M D"]  # the value head of ppo
    optimiser: Any
    step: Int[Array, " M"]  # steps done


class Samples(NamedTuple):
    """Samples: of block m the B prompts, of each prompt its k samples."""

    tokens: Int[Array, "R N"]
    mask: Bool[Array, "R N"]  # True up to the end token, which counts
    ended: Bool[Array, " R"]


def _optimiser(config: EMORLConfig) -> optax.GradientTransformation:
    rate = learning_rate(config.schedule, config.learning_rate, config.warmup, config.steps)
    return optax.chain(
        optax.clip_by_global_norm(config.gradient_norm),
        optax.scale_by_adam(),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(rate),
    )


def begin(model: ModelConfig, config: EMORLConfig, seed: int) -> TrainingState:
    """A fresh adapter, alone in its axis. The same seed gives the same one."""
    factors = lora.init(config.lora, transformer.linears(model), jax.random.key(seed))
    value = jnp.zeros(model.hidden_width)
    state = TrainingState(factors, value, _optimiser(config).init((factors, value)), jnp.int32(0))
    alone: TrainingState = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], state)
    return alone


def join(states: list[TrainingState]) -> TrainingState:
    """Several adapters as one stack."""
    joined: TrainingState = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *states)
    return joined


def take(state: TrainingState, m: int) -> TrainingState:
    """Adapter m, alone in its axis."""
    taken: TrainingState = jax.tree.map(lambda leaf: leaf[m : m + 1], state)
    return taken


def _stack(factors: lora.Factors, config: EMORLConfig, members: int) -> lora.Stack:
    return lora.Stack(factors, jnp.full((members,), config.lora.scale, jnp.float32))


def _one_hot_blocks(members: int, rows: int) -> Float[Array, "R M"]:
    """Block m's rows use adapter m."""
    return jnp.repeat(jnp.eye(members), rows // members, axis=0)


def step_keys(seeds: Integer[Array, " M"], steps: Int[Array, " M"], purpose: int) -> Key[Array, " M"]:
    """Functions of an adapter's seed and step alone, so that a resumed run draws what an uninterrupted one does."""

    def one(seed: Array, step: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), purpose)

    return jax.vmap(one)(seeds, steps)


@functools.partial(jit, static_argnames="config")
def sample(
    base: transformer.Params,
    state: TrainingState,
    prompts: Prompts,
    seeds: Integer[Array, " M"],
    spec: DecodeSpec,
    config: EMORLConfig,
) -> Samples:
    """k answers to every prompt of every block, each under the block's adapter.

    Args:
      prompts: M blocks of rows, without keys.
      spec: of an ensemble of the base with one stack (`Ensemble([base.with_adapters(...)])`).
    """
    m = len(seeds)
    keys = jax.vmap(lambda key: row_keys(key, prompts.batch // m))(step_keys(seeds, state.step, 0)).reshape(-1)

    def run(base: transformer.Params, factors: lora.Factors, blocks: Prompts, spec: DecodeSpec) -> Samples:
        own = join_blocks(blocks)
        adapted = lora.Adapted(base, _stack(factors, config, m), _one_hot_blocks(m, own.batch))
        answers = decode_batch((adapted,), own, jnp.ones((1, 1)), spec, config.samples)
        places = jnp.arange(answers.tokens.shape[1])[None]
        return split_blocks(Samples(answers.tokens, places < answers.steps[:, None], answers.ended), m)

    # On a mesh every group of devices has rows of all adapters.
    blocks = split_blocks(bring_together(prompts._replace(keys=keys), m), m)
    samples = join_blocks(by_rows(run, (WHOLE, WHOLE, BLOCKS, WHOLE), BLOCKS)(base, state.factors, blocks, spec))
    pinned: Samples = jax.tree.map(lambda leaf: constrain(leaf, "batch"), samples)
    return pinned


class _Read(NamedTuple):
    log_probs: Float[Array, "R N"]
    hidden: Float[Array, "R N D"]


def read(
    model: ModelConfig,
    base: transformer.Params,
    adapters: lora.Adapters | None,
    ids: Int[Array, "B T"],
    mask: Array,
    tokens: Int[Array, "R N"],
) -> _Read:
    """The log-probability of every written token, and the state that predicts it. Each prompt is that of R / B texts,
    one after another."""
    bound = transformer.Model(model, base, adapters)
    if model.encoder is None:
        ids, mask = (jnp.repeat(x, len(tokens) // len(x), axis=0) for x in (ids, mask))
        real = jnp.concatenate([mask, jnp.ones_like(tokens[:, 1:], mask.dtype)], axis=1)
        text = jnp.concatenate([ids, tokens[:, :-1]], axis=1)
        hidden = bound.forward(text, real)[0][:, ids.shape[1] - 1 :]
    else:
        start = jnp.full_like(tokens[:, :1], model.start_id or 0)
        decoder_ids = jnp.concatenate([start, tokens[:, :-1]], axis=1)
        hidden = bound.forward(ids, mask, decoder_ids=decoder_ids)[0]
    return _Read(bound.target_log_probs(hidden, tokens), hidden)


class _Before(NamedTuple):
    """What is known of the samples before an update."""

    base: Float[Array, "R N"]  # log-probabilities without any adapter
    log_probs: Float[Array, "R N"]
    values: Float[Array, "R N"]


def _loss_of_block(
    new: Float[Array, "R N"],
    values: Float[Array, "R N"],
    before: _Before,
    mask: Bool[Array, "R N"],
    rewards: Float[Array, " R"],
    config: EMORLConfig,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """One adapter's loss of its own samples, and what is worth knowing about it."""
    kl = losses.kl_penalty(new, before.base, mask)
    value_loss = jnp.zeros(())
    if config.algorithm == "scst":
        advantages = losses.self_critical_advantages(rewards, config.samples)
        policy = losses.Clipped(losses.self_critical_loss(new, mask, advantages), jnp.zeros(()), jnp.zeros(()))
    else:
        if config.algorithm == "grpo":
            of_row = losses.group_advantages(rewards, config.samples)
            of_token = jnp.broadcast_to(of_row[:, None], mask.shape)
        else:
            of_token, targets = losses.token_advantages(rewards, before.values, mask, config.gae_lambda)
            value_loss = losses.value_loss(values, targets, mask)
        policy = losses.clipped_loss(new, before.log_probs, mask, of_token, config.clip)
    total = policy.loss + config.kl_weight * kl + config.value_weight * value_loss
    return total, {"policy_loss": policy.loss, "kl": kl, "value_loss": value_loss} | {
        "clip_fraction": policy.clip_fraction,
        "approx_kl": policy.approx_kl,
    }


class _Part(NamedTuple):
    """The samples whose gradient is taken at once, a number of whole prompts of every block."""

    ids: Int[Array, "B T"]
    real: Array  # the prompts' mask
    tokens: Int[Array, "R N"]
    mask: Bool[Array, "R N"]
    rewards: Float[Array, " R"]
    rows: Int[Array, " R"]  # their numbers within their block, for dropout


@functools.partial(jit, static_argnames=("model", "config"), donate_argnames="state")
def update(
    base: transformer.Params,
    state: TrainingState,
    prompts: Prompts,
    samples: Samples,
    rewards: Float[Array, "M R"],
    seeds: Integer[Array, " M"],
    model: ModelConfig,
    config: EMORLConfig,
) -> tuple[TrainingState, dict[str, Float[Array, " M"]]]:
    """One step of every adapter from the samples of its own block."""
    m = len(seeds)
    places = (WHOLE, WHOLE, BLOCKS, BLOCKS, BLOCKS, WHOLE)
    run = functools.partial(_update, model=model, config=config)
    together = bring_together((prompts._replace(keys=None), samples), m)
    blocks = split_blocks(together, m)
    after = by_rows(run, places, WHOLE)(base, state, *blocks, rewards, seeds)
    # On a mesh every device holds the adapters, which are small.
    whole: tuple[TrainingState, dict[str, Array]] = jax.tree.map(constrain, after)
    return whole


def _update(
    base: transformer.Params,
    state: TrainingState,
    prompts: Prompts,
    samples: Samples,
    rewards: Float[Array, "M R"],
    seeds: Integer[Array, " M"],
    *,
    model: ModelConfig,
    config: EMORLConfig,
) -> tuple[TrainingState, dict[str, Float[Array, " M"]]]:
    """`update` of a group of devices, from its rows of every block [M, R, ...]. All losses are means over a block's
    rows, so that the groups' mean is the whole step."""
    m, parts = len(seeds), config.accumulate
    prompts, samples = join_blocks((prompts, samples))
    per_block = len(samples.tokens) // m
    optimiser = _optimiser(config)
    drawn = step_keys(seeds, state.step, 1)

    blocks = functools.partial(split_blocks, n=m)

    def split(x: Array) -> Array:
        """[M * R, ...] -> [parts, M * R / parts, ...], each part with rows of all blocks."""
        cut = x.reshape(m, parts, -1, *x.shape[1:])
        return jnp.swapaxes(cut, 0, 1).reshape(parts, -1, *x.shape[1:])

    rows = jnp.tile(own_share(jnp.arange(per_block * groups())), m)
    part = _Part(prompts.ids[0], prompts.mask[0], samples.tokens, samples.mask, rewards.reshape(-1), rows)
    all_parts = jax.tree.map(split, part)

    def values_of(hidden: Float[Array, "R N D"], value: Float[Array, "M D"]) -> Float[Array, "R N"]:
        # The head learns to read the states; they are not changed for it.
        states = blocks(jax.lax.stop_gradient(hidden).astype(jnp.float32))
        return jnp.einsum("mrnd,md->mrn", states, value).reshape(hidden.shape[:2])

    def before_of(part: _Part) -> _Before:
        # The adapters turned off are the base.
        of_base = jax.lax.stop_gradient(read(model, base, None, part.ids, part.real, part.tokens).log_probs)
        if config.algorithm == "scst":  # which looks at nothing else
            return _Before(of_base, of_base, jnp.zeros_like(of_base))
        used = lora.for_blocks(_stack(state.factors, config, m))
        old = read(model, base, used, part.ids, part.real, part.tokens)
        return jax.lax.stop_gradient(_Before(of_base, old.log_probs, values_of(old.hidden, state.value)))

    def loss(trained: tuple[lora.Factors, Array], part: _Part, before: _Before, key: Any) -> tuple[Array, Any]:
        factors, value = trained
        own = jax.vmap(lambda key, rows: jax.vmap(lambda row: jax.random.fold_in(key, row))(rows))(
            key, blocks(part.rows)
        )
        used = lora.for_blocks(_stack(factors, config, m), dropout=config.lora.dropout, key=own.reshape(-1))
        new = read(model, base, used, part.ids, part.real, part.tokens)
        given = (new.log_probs, values_of(new.hidden, value), before, part.mask, part.rewards)
        totals, metrics = jax.vmap(functools.partial(_loss_of_block, config=config))(*jax.tree.map(blocks, given))
        return jnp.sum(totals), metrics

    def one_update(carry: tuple[Any, Any], epoch: Array) -> tuple[tuple[Any, Any], Any]:
        trained, optimiser_state = carry
        keys = jax.vmap(lambda key: jax.random.fold_in(key, epoch))(drawn)

        def of_part(total: Any, pair: tuple[_Part, _Before]) -> tuple[Any, Any]:
            gradients, metrics = jax.grad(loss, has_aux=True)(trained, *pair, keys)
            return jax.tree.map(lambda sum_, new: sum_ + new / parts, total, gradients), metrics

        gradients, metrics = jax.lax.scan(of_part, jax.tree.map(jnp.zeros_like, trained), (all_parts, before))
        gradients = mean_over_rows(gradients)
        changes, optimiser_state = jax.vmap(optimiser.update)(gradients, optimiser_state, trained)
        return (optax.apply_updates(trained, changes), optimiser_state), metrics

    before = jax.lax.map(before_of, all_parts)
    start = ((state.factors, state.value), state.optimiser)
    (trained, optimiser_state), history = jax.lax.scan(one_update, start, jnp.arange(config.epochs))
    metrics = {name: value.mean(axis=(0, 1)) for name, value in history.items()}
    metrics["reward"] = rewards.mean(axis=1)
    metrics["tokens"] = blocks(samples.mask).sum(axis=(1, 2)) / per_block
    metrics["ended"] = blocks(samples.ended).mean(axis=1)
    return TrainingState(*trained, optimiser_state, state.step + 1), mean_over_rows(metrics)
