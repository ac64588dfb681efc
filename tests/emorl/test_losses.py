"""Losses and their gradients against the formulas written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlae_jax.emorl import losses

B, T, K, V = 6, 5, 3, 4


@pytest.fixture
def sampled():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(B, T, V)).astype(np.float32)
    base = rng.normal(size=(B, T, V)).astype(np.float32)
    tokens = rng.integers(0, V, (B, T))
    mask = np.arange(T) < rng.integers(1, T + 1, B)[:, None]
    return logits, base, tokens, mask, rng.random(B).astype(np.float32)


def chosen(logits, tokens):
    return jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), jnp.asarray(tokens)[..., None], axis=-1)[..., 0]


class TestAdvantages:
    def test_by_hand(self):
        rewards = jnp.array([1.0, 0.0, 0.5, 0.2, 0.2, 0.2])
        np.testing.assert_allclose(losses.self_critical_advantages(rewards, 3), [0.5, -0.5, 0, 0, 0, 0], atol=1e-7)
        found = losses.group_advantages(rewards, 3)
        spread = np.std([1.0, 0.0, 0.5])
        np.testing.assert_allclose(found[:3], np.array([0.5, -0.5, 0.0]) / (spread + 1e-4), rtol=1e-5)
        np.testing.assert_allclose(found[3:], 0, atol=1e-3)


class TestGradients:
    def test_self_critical(self, sampled):
        """sum over a row's tokens of -A (onehot - p) / B."""
        logits, _, tokens, mask, rewards = sampled
        advantages = losses.self_critical_advantages(jnp.asarray(rewards), K)
        loss = lambda z: losses.self_critical_loss(chosen(z, tokens), mask, advantages)  # noqa: E731
        p = np.asarray(jax.nn.softmax(logits, axis=-1))
        one_hot = np.eye(V)[tokens]
        expected = -np.asarray(advantages)[:, None, None] * (one_hot - p) * mask[..., None] / B
        np.testing.assert_allclose(jax.grad(loss)(logits), expected, atol=1e-6)
        by_hand = -np.mean(np.asarray(advantages) * np.sum(np.asarray(chosen(logits, tokens)) * mask, axis=1))
        np.testing.assert_allclose(loss(logits), by_hand, rtol=1e-5)

    def test_clipped(self, sampled):
        logits, old, tokens, mask, rewards = sampled
        advantages = jnp.broadcast_to(losses.group_advantages(jnp.asarray(rewards), K)[:, None], (B, T))

        def loss(z):
            return losses.clipped_loss(chosen(z, tokens), chosen(old, tokens), mask, advantages, 0.2).loss

        def written_out(z):
            total = 0.0
            for b in range(B):
                row = 0.0
                for t in range(T):
                    if mask[b, t]:
                        ratio = jnp.exp(chosen(z, tokens)[b, t] - chosen(old, tokens)[b, t])
                        a = advantages[b, t]
                        row -= jnp.minimum(ratio * a, jnp.clip(ratio, 0.8, 1.2) * a)
                total += row / int(mask[b].sum())
            return total / B

        np.testing.assert_allclose(loss(logits), written_out(logits), rtol=1e-5)
        np.testing.assert_allclose(jax.grad(loss)(logits), jax.grad(written_out)(logits), atol=1e-6)
        same = losses.clipped_loss(chosen(logits, tokens), chosen(logits, tokens), mask, advantages)
        np.testing.assert_allclose((same.clip_fraction, same.approx_kl), 0, atol=1e-7)

    def test_kl_in_the_mean_over_tokens(self):
        """Over all tokens, weighted with their probabilities, the penalty's gradient is that of KL(p || base)."""
        rng = np.random.default_rng(1)
        logits, base = rng.normal(size=(2, V)).astype(np.float32)
        p = jax.nn.softmax(logits)

        def kl(z):
            q = jax.nn.log_softmax(z)
            return jnp.sum(jnp.exp(q) * (q - jax.nn.log_softmax(base)))

        def penalty(z, token):
            one = jnp.asarray([[token]])
            log_p, log_base = (chosen(x[None, None], one) for x in (z, jnp.asarray(base)))
            return losses.kl_penalty(log_p, log_base, jnp.ones((1, 1), bool))

        mean = sum(p[v] * jax.grad(penalty)(jnp.asarray(logits), v) for v in range(V))
        np.testing.assert_allclose(mean, jax.grad(kl)(jnp.asarray(logits)), atol=1e-6)

    def test_kl_is_nothing_at_the_base_and_pulls_back(self, sampled):
        logits, base, tokens, mask, _ = sampled
        penalty = lambda z: losses.kl_penalty(chosen(z, tokens), chosen(base, tokens), mask)  # noqa: E731
        assert penalty(base) == 0
        np.testing.assert_array_equal(jax.grad(penalty)(base), 0)
        before = penalty(logits)
        assert penalty(logits - 0.1 * jax.grad(penalty)(logits)) < before
