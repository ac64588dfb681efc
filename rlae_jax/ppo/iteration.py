"""One PPO iteration as pure functions: rollout in the decoding loop, reward, advantages, updates.

    prompts --rollout--> Rollout --score--> [B] --learn--> LearnerState, metrics

`iterate` is all of it as one program, for tasks whose reward the device can compute from tokens; where the reward is a
Python function of text, `rollout` and `learn` are the programs on its two sides.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from rlae_jax.config import PPOConfig
from rlae_jax.fusion.decode import DecodeSpec, decode
from rlae_jax.fusion.policy import Dims, Observation, Policy
from rlae_jax.ppo.objective import PPOLoss, masked_gae, masked_mean, normalise, ppo_loss, terminal_rewards


class LearnerState(NamedTuple):
    """Everything that an iteration changes."""

    params: Any
    optimiser: optax.OptState
    iteration: Int[Array, ""]  # iterations done


class Rollout(NamedTuple):
    """One batch of answers and the decisions behind them."""

    observation: Observation  # leaves [P, B, ...]
    weights: Float[Array, "P B K"]
    log_prob: Float[Array, "P B"]
    value: Float[Array, "P B"]
    mask: Bool[Array, "P B"]  # True where a decision was really taken
    tokens: Int[Array, "B N"]
    steps: Int[Array, "B"]
    ended: Bool[Array, "B"]


class _Samples(NamedTuple):
    """What the losses read of a rollout, each leaf [P * B, ...] once flattened."""

    observation: Observation
    weights: Float[Array, "M K"]
    log_prob: Float[Array, "M"]
    value: Float[Array, "M"]
    mask: Bool[Array, "M"]
    advantage: Float[Array, "M"]
    target: Float[Array, "M"]


class Batch(NamedTuple):
    """Prompts and reference tokens of one iteration."""

    ids: Any  # Int[B, T]; with different tokenizers K of them, as `decode` takes them
    mask: Any
    references: Int[Array | np.ndarray, "B R"]
    reference_lengths: Int[Array | np.ndarray, "B"]


def make_optimiser(config: PPOConfig) -> optax.GradientTransformation:
    """Adam behind a clip of the global gradient norm."""
    return optax.chain(optax.clip_by_global_norm(config.gradient_norm), optax.adam(config.learning_rate, eps=1e-5))


def init_learner(key: Key[Array, ""], policy: Policy, dims: Dims, config: PPOConfig) -> LearnerState:
    """A fresh agent for members of these widths and answers of this many spans."""
    params = policy.init(key, dims)
    return LearnerState(params, make_optimiser(config).init(params), jnp.int32(0))


def rollout(
    params: tuple[Any, ...], policy_params: Any, batch: Batch, key: Key[Array, ""], spec: DecodeSpec
) -> Rollout:
    """Decodes a batch with weights drawn from the policy, recording every decision."""
    state = decode(params, batch.ids, batch.mask, policy_params, key, spec)
    spans = state.trajectory
    return Rollout(
        observation=spans.observation,
        weights=spans.weights,
        log_prob=spans.log_prob,
        value=spans.value,
        mask=state.span_mask(spec.span_length),
        tokens=state.tokens,
        steps=state.steps,
        ended=state.ended,
    )


def exact_tokens(experience: Rollout, batch: Batch) -> Float[Array, "B"]:
    """1.0 where the answer is exactly the reference's tokens and then an end token."""
    n, r = experience.tokens.shape[1], batch.references.shape[1]
    width = max(n, r)
    places = jnp.arange(width)
    written = jnp.pad(experience.tokens, ((0, 0), (0, width - n)))
    expected = jnp.pad(batch.references, ((0, 0), (0, width - r)))
    same = (written == expected) | (places >= batch.reference_lengths[:, None])
    right_length = experience.ended & (experience.steps - 1 == batch.reference_lengths)
    return (jnp.all(same, axis=1) & right_length).astype(jnp.float32)


def learn(
    state: LearnerState,
    experience: Rollout,
    score: Float[Array, "B"],
    key: Key[Array, ""],
    spec: DecodeSpec,
    config: PPOConfig,
) -> tuple[LearnerState, dict[str, Array]]:
    """`config.epochs` passes of clipped updates over one rollout; every decision is one sample."""
    mask = experience.mask
    rewards = terminal_rewards(score, mask)
    advantages, targets = masked_gae(rewards, experience.value, mask, config.discount, config.gae_lambda)
    samples = _Samples(
        experience.observation,
        experience.weights,
        experience.log_prob,
        experience.value,
        mask,
        normalise(advantages, mask),
        targets,
    )
    p, b = mask.shape
    flat = jax.tree.map(lambda leaf: leaf.reshape(p * b, *leaf.shape[2:]), samples)
    optimiser = make_optimiser(config)

    def loss_of(params: Any, taken: _Samples) -> tuple[Array, PPOLoss]:
        distribution, value = spec.policy.apply(params, taken.observation)
        loss = ppo_loss(
            distribution.log_prob(taken.weights),
            taken.log_prob,
            taken.advantage,
            value,
            taken.value,
            taken.target,
            distribution.entropy(),
            taken.mask,
            clip=config.clip,
            value_clip=config.value_clip,
            value_weight=config.value_weight,
            entropy_weight=config.entropy_weight,
        )
        return loss.total, loss

    def update(carry: tuple[Any, Any], rows: Int[Array, "M"]) -> tuple[tuple[Any, Any], Any]:
        params, optimiser_state = carry
        minibatch = jax.tree.map(lambda leaf: leaf[rows], flat)
        gradients, loss = jax.grad(loss_of, has_aux=True)(params, minibatch)
        updates, optimiser_state = optimiser.update(gradients, optimiser_state, params)
        return (optax.apply_updates(params, updates), optimiser_state), loss

    # The last few samples of an epoch's shuffle are left out where the minibatches do not divide them.
    minibatches = min(config.minibatches, p * b)
    size = p * b // minibatches
    orders = jax.vmap(lambda k: jax.random.permutation(k, p * b))(jax.random.split(key, config.epochs))
    rows = orders[:, : minibatches * size].reshape(config.epochs * minibatches, size)
    (params, optimiser_state), losses = jax.lax.scan(update, (state.params, state.optimiser), rows)

    losses = jax.tree.map(jnp.mean, losses)
    metrics = {
        "reward": jnp.mean(score),
        "policy_loss": losses.policy,
        "value_loss": losses.value,
        "entropy": losses.entropy,
        "approx_kl": losses.approx_kl,
        "clip_fraction": losses.clip_fraction,
        "value": masked_mean(experience.value, mask),
        "steps": jnp.mean(experience.steps.astype(jnp.float32)),
        "ended": jnp.mean(experience.ended.astype(jnp.float32)),
    }
    return LearnerState(params, optimiser_state, state.iteration + 1), metrics


def iteration_keys(seed: Int[Array, ""], iteration: Int[Array, ""]) -> tuple[Key[Array, ""], Key[Array, ""]]:
    """(for the rollout, for the updates): functions of the seed and the iteration's number alone, so that a resumed run
    draws what the interrupted one would have drawn."""
    key = jax.random.fold_in(jax.random.key(seed), iteration)
    return jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def iterate(
    state: LearnerState,
    params: tuple[Any, ...],
    batch: Batch,
    seed: Int[Array, ""],
    spec: DecodeSpec,
    config: PPOConfig,
) -> tuple[LearnerState, dict[str, Array]]:
    """Rollout, reward, advantages and updates as one XLA program."""
    rollout_key, learn_key = iteration_keys(seed, state.iteration)
    experience = rollout(params, state.params, batch, rollout_key, spec)
    return learn(state, experience, exact_tokens(experience, batch), learn_key, spec, config)


@jax.jit
def rollout_for_text(
    policy_params: Any, params: tuple[Any, ...], batch: Batch, seed: Int[Array, ""], iteration: Array, spec: DecodeSpec
) -> Rollout:
    """The first half of an iteration whose reward is a Python function of text."""
    return rollout(params, policy_params, batch, iteration_keys(seed, iteration)[0], spec)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def learn_from_text(
    state: LearnerState,
    experience: Rollout,
    score: Float[Array, "B"],
    seed: Int[Array, ""],
    spec: DecodeSpec,
    config: PPOConfig,
) -> tuple[LearnerState, dict[str, Array]]:
    """The second half."""
    return learn(state, experience, score, iteration_keys(seed, state.iteration)[1], spec, config)
