"""Advantages and losses of PPO on the span MDP: pure functions over [P, B] arrays with a mask of real decisions."""

from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


def terminal_rewards(score: Float[Array, " B"], mask: Bool[Array, "P B"]) -> Float[Array, "P B"]:
    """Each row's score at its last real span, zero elsewhere."""
    chex.assert_shape(score, mask.shape[1:])
    following = jnp.concatenate([mask[1:], jnp.zeros_like(mask[:1])])
    return jnp.where(mask & ~following, score[None], 0.0)


def masked_gae(
    rewards: Float[Array, "P B"],
    values: Float[Array, "P B"],
    mask: Bool[Array, "P B"],
    discount: float | Array,
    gae_lambda: float | Array,
) -> tuple[Float[Array, "P B"], Float[Array, "P B"]]:
    """Generalised advantages and value targets (Schulman et al., 2016, eq. 16), zero where the mask is False.

        delta_p = r_p + gamma V_(p+1) - V_p,    A_p = delta_p + gamma lambda A_(p+1)

    V and A after a row's last real span are 0: the answer is finished, and nothing after it may leak in.
    """
    chex.assert_equal_shape([rewards, values, mask])

    def backwards(carry: tuple[Array, Array], span: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        next_value, next_advantage = carry
        reward, value, real = span
        advantage = reward + discount * next_value - value + discount * gae_lambda * next_advantage
        advantage = jnp.where(real, advantage, 0.0)
        return (jnp.where(real, value, 0.0), advantage), advantage

    zeros = jnp.zeros(values.shape[1:])
    _, advantages = jax.lax.scan(backwards, (zeros, zeros), (rewards, values, mask), reverse=True)
    return advantages, jnp.where(mask, advantages + values, 0.0)


def masked_mean(x: Array, mask: Array) -> Float[Array, ""]:
    """Mean over the places where the mask is True; 0 if there is none."""
    return jnp.sum(jnp.where(mask, x, 0.0)) / jnp.maximum(jnp.sum(mask), 1).astype(jnp.float32)


def normalise(x: Array, mask: Array) -> Array:
    """Zero mean and unit variance over the masked places."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return jnp.where(mask, (x - mean) * jax.lax.rsqrt(variance + 1e-8), 0.0)


def normalise_parts(x: Float[Array, " B"], sizes: Sequence[int]) -> Float[Array, " B"]:
    """As `normalise`, each of some parts that follow one another for itself; a part that is all alike becomes 0."""
    which = np.repeat(np.arange(len(sizes)), sizes)
    return jnp.sum(jnp.stack([normalise(x, jnp.asarray(which == t)) for t in range(len(sizes))]), axis=0)


class PPOLoss(NamedTuple):
    """The loss and its parts, each a mean over the real decisions of a minibatch."""

    total: Float[Array, ""]
    policy: Float[Array, ""]
    value: Float[Array, ""]
    entropy: Float[Array, ""]
    approx_kl: Float[Array, ""]  # mean of (ratio - 1) - log ratio, an estimate of KL(old || new)
    clip_fraction: Float[Array, ""]


def ppo_loss(
    log_prob: Array,
    old_log_prob: Array,
    advantage: Array,
    value: Array,
    old_value: Array,
    target: Array,
    entropy: Array,
    mask: Array,
    *,
    clip: float,
    value_clip: float,
    value_weight: float,
    entropy_weight: float,
) -> PPOLoss:
    """Clipped surrogate and clipped value loss with an entropy bonus (Schulman et al., 2017, eq. 7 and 9).

        policy = -E[min(r A, clip(r, 1 - eps, 1 + eps) A)],    r = exp(log_prob - old_log_prob)
        value  = 1/2 E[max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2)]
        total  = policy + value_weight * value - entropy_weight * E[entropy]

    All arrays have one shape; only places where the mask is True count. Log-probabilities may have a further axis, over
    agents: each has its own ratio and its own clip, the advantage is the team's, and the surrogate is the mean over
    agents (MAPPO, Yu et al., 2022, arXiv 2103.01955, eq. 1 of its appendix).
    """
    chex.assert_equal_shape([advantage, value, old_value, target, entropy, mask])
    chex.assert_equal_shape([log_prob, old_log_prob])
    per_agent = (..., *[None] * (log_prob.ndim - mask.ndim))
    log_ratio = jnp.where(mask[per_agent], log_prob - old_log_prob, 0.0)
    ratio = jnp.exp(log_ratio)
    advantage = advantage[per_agent]
    surrogate = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage)
    estimated_kl, clipped = ratio - 1 - log_ratio, jnp.abs(ratio - 1) > clip
    if log_prob.ndim > mask.ndim:
        surrogate, clipped = jnp.mean(surrogate, axis=-1), jnp.mean(clipped, axis=-1)
        estimated_kl = jnp.sum(estimated_kl, axis=-1)  # of the joint action
    clipped_value = old_value + jnp.clip(value - old_value, -value_clip, value_clip)
    value_error = jnp.maximum((value - target) ** 2, (clipped_value - target) ** 2)
    policy_loss = -masked_mean(surrogate, mask)
    value_loss = 0.5 * masked_mean(value_error, mask)
    mean_entropy = masked_mean(entropy, mask)
    return PPOLoss(
        total=policy_loss + value_weight * value_loss - entropy_weight * mean_entropy,
        policy=policy_loss,
        value=value_loss,
        entropy=mean_entropy,
        approx_kl=masked_mean(estimated_kl, mask),
        clip_fraction=masked_mean(clipped.astype(jnp.float32), mask),
    )
