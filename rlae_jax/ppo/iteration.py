"""One PPO iteration as pure functions: rollout in the decoding loop, reward, advantages, updates.

    prompts --rollout--> Rollout --score--> [B] --learn--> LearnerState, metrics

`iterate` is all of it as one program, for tasks whose reward the device can compute from tokens; where the reward is a
Python function of text, `rollout_for_text` and `learn_from_text` are the programs on its two sides. All three train E
agents of different seeds side by side: their prompts are rows of one batch, since a `vmap` over the decoding loop would
turn its slice updates into scatters, and their updates are a `vmap`.

With several tasks an agent's rows are the tasks' one after another, `PPOConfig.task_prompts` of each. An answer's
reward becomes (reward - mean) / standard deviation, both over the answers to its task in this iteration, so that a task
counts by its share of the prompts and not by how far its rewards are apart; where all of a task's are alike they are 0.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Integer, Key

from rlae_jax.compilation import jit
from rlae_jax.config import PPOConfig
from rlae_jax.fusion.decode import decode_batch, params_places
from rlae_jax.fusion.policy import Dims, Distribution, Observation, Policy, hide
from rlae_jax.fusion.prompts import Prompts, row_keys
from rlae_jax.fusion.queued import decode_queued
from rlae_jax.fusion.spec import DecodeSpec
from rlae_jax.ppo.agent import MAPPOAgent, PPOAgent, SetAgent
from rlae_jax.ppo.objective import (
    PPOLoss,
    masked_gae,
    masked_mean,
    normalise,
    normalise_parts,
    ppo_loss,
    terminal_rewards,
)
from rlae_jax.schedules import learning_rate
from rlae_jax.sharding import (
    BLOCKS,
    WHOLE,
    bring_together,
    by_rows,
    constrain,
    gather_rows,
    groups,
    join_blocks,
    own_share,
    split_blocks,
    sum_over_rows,
)


class LearnerState(NamedTuple):
    """Everything that an iteration changes."""

    params: Any
    optimiser: optax.OptState
    iteration: Integer[Array, ""]  # iterations done


class Rollout(NamedTuple):
    """One batch of answers and the decisions behind them, the samples of a prompt one after another."""

    observation: Observation  # leaves [B, P, ...]
    action: Float[Array, "B P A"]
    weights: Float[Array, "B P K"]
    log_prob: Float[Array, "B P *N"]  # of each agent, where several act
    value: Float[Array, "B P"]
    mask: Bool[Array, "B P"]  # True where a decision was really taken
    tokens: Int[Array, "B N"]
    steps: Int[Array, " B"]
    ended: Bool[Array, " B"]


@dataclasses.dataclass(frozen=True)
class AgentsInBlocks:
    """E agents as one policy: rows come in E blocks, and block e is agent e's. Parameters have a leading E axis."""

    policy: Policy
    agents: int

    @property
    def reads(self) -> tuple[str, ...]:
        return self.policy.reads

    @property
    def span_lengths(self) -> tuple[int, ...]:
        return getattr(self.policy, "span_lengths", ())

    def init(self, key: Key[Array, ""], dims: Dims) -> Any:
        """E agents, for the shapes."""
        return jax.vmap(lambda k: self.policy.init(k, dims))(jax.random.split(key, self.agents))

    def apply(self, params: Any, observation: Observation) -> tuple[Distribution, Float[Array, " EB"]]:
        """Each block under its own agent."""
        return join_blocks(jax.vmap(self.policy.apply)(params, split_blocks(observation, self.agents)))

    def hide(self, observation: Observation, keys: Key[Array, " EB"]) -> Observation:
        """As the agents do, which do it alike."""
        return hide(self.policy, observation, keys)

    def slice_rows(self, params: Any, start: Array | int, n: int, total: int) -> tuple["AgentsInBlocks", Any]:
        """The agent whose rows they are."""
        if n * self.agents > total:
            raise ValueError(f"{n} of {total} rows belong to more than one of {self.agents} agents")
        agent = start * self.agents // total
        take = functools.partial(jax.lax.dynamic_index_in_dim, index=agent, keepdims=True)
        return AgentsInBlocks(self.policy, 1), jax.tree.map(take, params)


class _Samples(NamedTuple):
    """What the losses read of a rollout, each leaf [P * B, ...] once flattened."""

    observation: Observation
    action: Float[Array, "M A"]
    log_prob: Float[Array, " M *N"]
    value: Float[Array, " M"]
    mask: Bool[Array, " M"]
    advantage: Float[Array, " M"]
    target: Float[Array, " M"]


class Batch(NamedTuple):
    """Prompts, whose keys come with the iteration, and their reference tokens."""

    prompts: Prompts
    references: Int[Array | np.ndarray, "B R"]
    reference_lengths: Int[Array | np.ndarray, " B"]


def make_policy(config: PPOConfig) -> Policy:
    """The agent, or the agents, that a configuration trains."""
    several = config.algorithm == "mappo"
    if config.agent.network == "set":
        return SetAgent(config.agent, several)
    return (MAPPOAgent if several else PPOAgent)(config.agent)


def make_optimiser(config: PPOConfig) -> optax.GradientTransformation:
    """Adam behind a clip of the global gradient norm."""
    return optax.chain(
        optax.clip_by_global_norm(config.gradient_norm), optax.scale_by_adam(eps=1e-5), optax.scale(-1.0)
    )


def step_size(config: PPOConfig, iteration: Integer[Array, ""]) -> Float[Array, ""]:
    """The learning rate of an iteration."""
    schedule = learning_rate(config.schedule, config.learning_rate, config.warmup, config.iterations)
    return jnp.asarray(schedule(iteration), jnp.float32)


def init_learner(key: Key[Array, ""], policy: Policy, dims: Dims, config: PPOConfig) -> LearnerState:
    """A fresh agent for members of these widths and answers of this many spans."""
    params = policy.init(key, dims)
    return LearnerState(params, make_optimiser(config).init(params), jnp.int32(0))


def init_learners(
    seeds: Integer[Array | np.ndarray, " E"], policy: Policy, dims: Dims, config: PPOConfig
) -> LearnerState:
    """One per seed, leaves [E, ...]."""
    return jax.vmap(lambda seed: init_learner(jax.random.key(seed), policy, dims, config))(jnp.asarray(seeds))


def rollout(
    params: tuple[Any, ...],
    policy_params: Any,
    prompts: Prompts,
    spec: DecodeSpec,
    samples: int = 1,
    slots: int | None = None,
) -> Rollout:
    """Decodes a batch with weights drawn from the policy, recording every decision; `samples` answers to each prompt,
    which share its prefill. `slots` of them are written at a time, by default all."""
    if slots is None:
        answers = decode_batch(params, prompts, policy_params, spec, samples)
    else:
        answers = decode_queued(params, prompts, policy_params, spec, slots, samples)
    spans = answers.trajectory
    assert spans.observation is not None
    return Rollout(
        observation=spans.observation,
        action=spans.action,
        weights=spans.weights,
        log_prob=spans.log_prob,
        value=spans.value,
        mask=answers.span_mask(),
        tokens=answers.tokens,
        steps=answers.steps,
        ended=answers.ended,
    )


def exact_tokens(experience: Rollout, batch: Batch) -> Float[Array, " B"]:
    """1.0 where the answer is exactly the reference's tokens and then an end token."""
    samples = len(experience.tokens) // len(batch.references)
    batch = batch._replace(
        references=jnp.repeat(batch.references, samples, axis=0),
        reference_lengths=jnp.repeat(batch.reference_lengths, samples),
    )
    n, r = experience.tokens.shape[1], batch.references.shape[1]
    width = max(n, r)
    places = jnp.arange(width)[None]
    written = jnp.pad(experience.tokens, ((0, 0), (0, width - n)))
    expected = jnp.pad(batch.references, ((0, 0), (0, width - r)))
    same = (written == expected) | (places >= batch.reference_lengths[:, None])
    right_length = experience.ended & (experience.steps - 1 == batch.reference_lengths)
    return (jnp.all(same, axis=1) & right_length).astype(jnp.float32)


def shaped_reward(
    score: Float[Array, " B"], experience: Rollout, spec: DecodeSpec, config: PPOConfig
) -> Float[Array, " B"]:
    """score - member_cost (mean number of members in use - 1) - length_cost steps / max_new_tokens."""
    in_use = jnp.sum(experience.weights > 0.05, axis=-1)
    further = jnp.sum(jnp.where(experience.mask, in_use - 1, 0), axis=1) / jnp.maximum(experience.mask.sum(axis=1), 1)
    steps = experience.steps.astype(jnp.float32)
    return score - config.member_cost * further - config.length_cost * steps / spec.max_new_tokens


def learn(
    state: LearnerState,
    experience: Rollout,
    score: Float[Array, " B"],
    key: Key[Array, ""],
    spec: DecodeSpec,
    config: PPOConfig,
) -> tuple[LearnerState, dict[str, Array]]:
    """`config.epochs` passes of clipped updates over one rollout; every decision is one sample."""
    rewards_b = shaped_reward(score, experience, spec, config)
    of_tasks = [n * config.samples for n in config.task_prompts]
    if len(of_tasks) > 1:
        rewards_b = normalise_parts(rewards_b, of_tasks)
    # Time first from here on, as the recursion of the advantages wants it.
    decisions = experience.observation, experience.action, experience.log_prob, experience.value, experience.mask
    observation, action, log_prob, value, mask = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), decisions)
    rewards = terminal_rewards(rewards_b, mask)
    advantages, targets = masked_gae(rewards, value, mask, config.discount, config.gae_lambda)
    samples = _Samples(observation, action, log_prob, value, mask, normalise(advantages, mask), targets)
    p, b = mask.shape
    flat = jax.tree.map(lambda leaf: leaf.reshape(p * b, *leaf.shape[2:]), samples)
    optimiser = make_optimiser(config)
    rate = step_size(config, state.iteration)

    def loss_of(params: Any, taken: _Samples) -> tuple[Array, PPOLoss]:
        distribution, value = spec.policy.apply(params, taken.observation)
        loss = ppo_loss(
            distribution.log_prob(taken.action),
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

    def gradients_of(params: Any, rows: Int[Array, " M"]) -> tuple[Any, PPOLoss]:
        """The minibatch's, as the sum over its parts of what each has a share in."""

        def part(place: Int[Array, " M"]) -> tuple[Any, PPOLoss]:
            # Beyond the minibatch's end lies what fills up the shares of a mesh's groups of devices.
            taken = jax.tree.map(lambda leaf: leaf[rows[jnp.minimum(place, len(rows) - 1)]], flat)
            taken = taken._replace(mask=taken.mask & (place < len(rows)))
            real = jnp.sum(taken.mask).astype(jnp.float32)
            weighted: tuple[Any, PPOLoss] = jax.tree.map(
                lambda leaf: leaf * real, jax.grad(loss_of, has_aux=True)(params, taken)
            )
            return weighted

        total = jnp.maximum(jnp.sum(flat.mask[rows]), 1).astype(jnp.float32)
        shares = groups() * accumulate
        places = own_share(jnp.arange(-(-len(rows) // shares) * shares))
        sums = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), jax.lax.map(part, places.reshape(accumulate, -1)))
        sums = sum_over_rows(sums)
        means: tuple[Any, PPOLoss] = jax.tree.map(lambda leaf: leaf / total, sums)
        return means

    def update(carry: tuple[Any, Any, Array], rows: Int[Array, " M"]) -> tuple[tuple[Any, Any, Array], Any]:
        params, optimiser_state, stopped = carry
        gradients, loss = gradients_of(params, rows)
        updates, new_optimiser_state = optimiser.update(gradients, optimiser_state, params)
        new_params = jax.tree.map(lambda leaf, change: leaf + rate * change, params, updates)
        if config.target_kl is not None:
            stopped = stopped | (loss.approx_kl > config.target_kl)
            old, new = (params, optimiser_state), (new_params, new_optimiser_state)
            new_params, new_optimiser_state = jax.tree.map(lambda x, y: jnp.where(stopped, x, y), old, new)
        return (new_params, new_optimiser_state, stopped), (loss, stopped)

    # The last few samples of an epoch's shuffle are left out where the minibatches do not divide them.
    minibatches = min(config.minibatches, p * b)
    size = p * b // minibatches
    accumulate = min(config.accumulate, size)
    size -= size % accumulate
    orders = jax.vmap(lambda k: jax.random.permutation(k, p * b))(jax.random.split(key, config.epochs))
    rows = orders[:, : minibatches * size].reshape(config.epochs * minibatches, size)
    start = (state.params, state.optimiser, jnp.zeros((), bool))
    (params, optimiser_state, _), (losses, stopped) = jax.lax.scan(update, start, rows)

    losses = jax.tree.map(jnp.mean, losses)
    metrics = {
        "reward": jnp.mean(score),
        "policy_loss": losses.policy,
        "value_loss": losses.value,
        "entropy": losses.entropy,
        "approx_kl": losses.approx_kl,
        "clip_fraction": losses.clip_fraction,
        "updates": jnp.sum(~stopped),
        "learning_rate": rate,
        "value": masked_mean(value, mask),
        "steps": jnp.mean(experience.steps.astype(jnp.float32)),
        "spans": jnp.mean(jnp.sum(mask, axis=0).astype(jnp.float32)),
        "ended": jnp.mean(experience.ended.astype(jnp.float32)),
    }
    if len(of_tasks) > 1:
        metrics["reward_of_tasks"] = jnp.stack([jnp.mean(own) for own in jnp.split(score, np.cumsum(of_tasks)[:-1])])
    return LearnerState(params, optimiser_state, state.iteration + 1), metrics


def iteration_keys(seed: Integer[Array, ""], iteration: Integer[Array, ""]) -> tuple[Key[Array, ""], Key[Array, ""]]:
    """(for the rollout, for the updates): functions of the seed and the iteration's number alone, so that a resumed run
    draws what the interrupted one would have drawn."""
    key = jax.random.fold_in(jax.random.key(seed), iteration)
    return jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)


def _rollout_all(
    policy_params: Any,
    params: tuple[Any, ...],
    batch: Batch,
    seeds: Array,
    iteration: Array,
    spec: DecodeSpec,
    config: PPOConfig,
) -> Rollout:
    """All agents' rollouts, leaves [E, B, ...]."""
    e = len(seeds)
    rows = len(batch.references) // e
    keys = jax.vmap(lambda seed: row_keys(iteration_keys(seed, iteration)[0], rows))(seeds)
    prompts = split_blocks(bring_together(batch.prompts._replace(keys=keys.reshape(-1)), e), e)
    spec = dataclasses.replace(spec, policy=AgentsInBlocks(spec.policy, e))

    def run(policy_params: Any, params: tuple[Any, ...], prompts: Prompts, spec: DecodeSpec) -> Rollout:
        slots = None if config.engine_slots is None else e * -(-config.engine_slots // groups())
        return split_blocks(rollout(params, policy_params, join_blocks(prompts), spec, config.samples, slots), e)

    # On a mesh every group of devices has rows of all agents.
    places = (WHOLE, params_places(params, spec), BLOCKS, WHOLE)
    experience: Rollout = by_rows(run, places, BLOCKS)(policy_params, params, prompts, spec)
    return experience


def learn_all(
    states: LearnerState, experience: Rollout, score: Array, seeds: Array, spec: DecodeSpec, config: PPOConfig
) -> tuple[LearnerState, dict[str, Array]]:
    """Every agent's updates from its own rollout, leaves [E, B, ...], and scores [E, B]."""

    def update(
        states: LearnerState, experience: Rollout, score: Array, seeds: Array, spec: DecodeSpec
    ) -> tuple[LearnerState, dict[str, Array]]:
        # On a mesh every device gets all samples once, P * B * (sum of D + ...) numbers: a minibatch is drawn from all.
        experience, score = gather_rows((experience, score), axis=1)
        keys = jax.vmap(lambda seed, iteration: iteration_keys(seed, iteration)[1])(seeds, states.iteration)
        return jax.vmap(functools.partial(learn, spec=spec, config=config))(states, experience, score, keys)

    places = (WHOLE, BLOCKS, BLOCKS, WHOLE, WHOLE)
    learnt = by_rows(update, places, WHOLE)(states, experience, score, seeds, spec)
    # On a mesh every device holds the agents, which are small.
    whole: tuple[LearnerState, dict[str, Array]] = jax.tree.map(constrain, learnt)
    return whole


@functools.partial(jit, static_argnames="config", donate_argnames="states")
def iterate(
    states: LearnerState,
    params: tuple[Any, ...],
    batch: Batch,
    seeds: Integer[Array, " E"],
    spec: DecodeSpec,
    config: PPOConfig,
) -> tuple[LearnerState, dict[str, Array]]:
    """Rollout, reward, advantages and updates as one XLA program.

    Args:
      states: leaves [E, ...].
      batch: E blocks of prompts, one after another.
      spec: whose policy is one agent's.

    Returns:
      The new states, and metrics [E].
    """
    experience = _rollout_all(states.params, params, batch, seeds, states.iteration[0], spec, config)
    e = len(seeds)
    wanted = Batch._make((None, *bring_together((batch.references, batch.reference_lengths), e)))
    scores = jax.vmap(exact_tokens)(experience, split_blocks(wanted, e))
    return learn_all(states, experience, scores, seeds, spec, config)


@functools.partial(jit, static_argnames="config")
def rollout_for_text(
    policy_params: Any,
    params: tuple[Any, ...],
    batch: Batch,
    seeds: Integer[Array, " E"],
    iteration: Integer[Array, ""],
    spec: DecodeSpec,
    config: PPOConfig,
) -> Rollout:
    """The first half of an iteration whose reward is a Python function of text."""
    experience = join_blocks(_rollout_all(policy_params, params, batch, seeds, iteration, spec, config))
    pinned: Rollout = jax.tree.map(lambda leaf: constrain(leaf, "batch"), experience)
    return pinned


@functools.partial(jit, static_argnames="config", donate_argnames="states")
def learn_from_text(
    states: LearnerState,
    experience: Rollout,
    score: Float[Array, " EB"],
    seeds: Integer[Array, " E"],
    spec: DecodeSpec,
    config: PPOConfig,
) -> tuple[LearnerState, dict[str, Array]]:
    """The second half."""
    e = len(seeds)
    return learn_all(states, split_blocks(experience, e), score.reshape(e, -1), seeds, spec, config)
