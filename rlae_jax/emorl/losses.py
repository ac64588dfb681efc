"""Losses that fine-tune a writer on rewards of its own samples.

B rows are the samples of B / k prompts, those of a prompt one after another; T positions are the tokens written, the
end token among them. All losses are means over rows, and want only log-probabilities of the tokens that were written.
"""

from typing import NamedTuple

import chex
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float


def groups(rewards: Float[Array, " B"], samples: int) -> Float[Array, "G k"]:
    """The rewards of each prompt's samples."""
    return rewards.reshape(-1, samples)


def self_critical_advantages(rewards: Float[Array, " B"], samples: int) -> Float[Array, " B"]:
    """Each sample's reward minus the mean of its prompt's samples (EMORL, section 3.2; Rennie et al., 2017)."""
    of_prompt = groups(rewards, samples)
    return (of_prompt - of_prompt.mean(axis=1, keepdims=True)).reshape(-1)


def group_advantages(rewards: Float[Array, " B"], samples: int, epsilon: float = 1e-4) -> Float[Array, " B"]:
    """The same in units of the standard deviation of the prompt's samples (GRPO, Shao et al., 2024)."""
    of_prompt = groups(rewards, samples)
    centred = of_prompt - of_prompt.mean(axis=1, keepdims=True)
    return (centred / (of_prompt.std(axis=1, keepdims=True) + epsilon)).reshape(-1)


def self_critical_loss(
    log_probs: Float[Array, "B T"], mask: Bool[Array, "B T"], advantages: Float[Array, " B"]
) -> Float[Array, ""]:
    """-mean_b A_b sum_t log p(token t of b): REINFORCE with the samples' mean as its baseline. The sum runs over the
    end token, too, so that ending is learnt."""
    of_row = jnp.sum(jnp.where(mask, log_probs, 0.0), axis=1)
    return -jnp.mean(lax.stop_gradient(advantages) * of_row)


class Clipped(NamedTuple):
    """A clipped objective and what it says about the step."""

    loss: Float[Array, ""]
    clip_fraction: Float[Array, ""]
    approx_kl: Float[Array, ""]


def clipped_loss(
    log_probs: Float[Array, "B T"],
    old_log_probs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    advantages: Float[Array, "B T"],
    clip: float = 0.2,
) -> Clipped:
    """PPO's clipped objective over tokens: mean_b of the mean over a row's tokens, as GRPO weighs them."""
    chex.assert_equal_shape([log_probs, old_log_probs, mask, advantages])
    log_ratio = jnp.where(mask, log_probs - lax.stop_gradient(old_log_probs), 0.0)
    ratio = jnp.exp(log_ratio)
    advantages = lax.stop_gradient(advantages)
    gain = jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - clip, 1 + clip) * advantages)
    outside = jnp.abs(ratio - 1) > clip
    return Clipped(
        -_mean_of_rows(gain, mask),
        lax.stop_gradient(_mean_of_rows(outside.astype(jnp.float32), mask)),
        lax.stop_gradient(_mean_of_rows(ratio - 1 - log_ratio, mask)),
    )


def kl_penalty(
    log_probs: Float[Array, "B T"], base_log_probs: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """mean_b sum_t (log p - log p_base)^2 / 2 at tokens that p itself has just drawn.

    Its gradient is, in the mean over samples, that of KL(p || p_base) between whole texts' tokens: the gradient of the
    square is (log p - log p_base) grad log p, and that of KL the mean of the same. (The estimator "k2"; the plain
    difference of the logarithms has a gradient of mean 0, and a number without gradient, as in EMORL's code, none.)
    """
    difference = jnp.where(mask, log_probs - lax.stop_gradient(base_log_probs), 0.0)
    return jnp.mean(jnp.sum(difference**2, axis=1)) / 2


def _mean_of_rows(values: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, ""]:
    counts = jnp.maximum(jnp.sum(mask, axis=1), 1).astype(jnp.float32)
    return jnp.mean(jnp.sum(jnp.where(mask, values, 0.0), axis=1) / counts)


def token_advantages(
    rewards: Float[Array, " B"], values: Float[Array, "B T"], mask: Bool[Array, "B T"], gae_lambda: float
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Generalised advantages over tokens and the value head's targets, where the reward comes with the last token and
    nothing is discounted: A_t = delta_t + lambda A_{t+1} with delta_t = r_t + V_{t+1} - V_t (Schulman et al., 2016)."""
    real = mask.astype(jnp.float32)
    later = jnp.pad(real[:, 1:], ((0, 0), (0, 1)))  # whether there is a next token
    rewarded = (real - later) * rewards[:, None]
    following = jnp.pad(values[:, 1:], ((0, 0), (0, 1))) * later
    deltas = (rewarded + following - values) * real

    def back(advantage: Float[Array, " B"], now: tuple[Array, Array]) -> tuple[Array, Array]:
        delta, goes_on = now
        advantage = delta + gae_lambda * goes_on * advantage
        return advantage, advantage

    _, advantages = lax.scan(back, jnp.zeros_like(rewards), (deltas.T, later.T), reverse=True)
    advantages = lax.stop_gradient(advantages.T)
    return advantages, lax.stop_gradient(advantages + values)


def value_loss(values: Float[Array, "B T"], targets: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, ""]:
    """Half the mean squared error at the tokens that were written."""
    return _mean_of_rows((values - targets) ** 2, mask) / 2
