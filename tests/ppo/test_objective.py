"""Advantages and losses against rlax, numbers worked out by hand, and a plain loop over each row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax
from hypothesis import given
from hypothesis import strategies as st

from rlae_jax.ppo.objective import masked_gae, masked_mean, normalise, ppo_loss, terminal_rewards
from tests.helpers.tolerance import on_device

SETTINGS = {"clip": 0.2, "value_clip": 0.5, "value_weight": 0.5, "entropy_weight": 0.01}


def prefix_mask(lengths, p):
    """[P, B], True in the first `lengths[b]` places of column b."""
    return np.arange(p)[:, None] < np.asarray(lengths)[None]


def row_by_row(rewards, values, lengths, discount, gae_lambda):
    """The definition: A_p = sum_l (discount lambda)^l delta_(p+l) over the row's own spans."""
    advantages = np.zeros_like(rewards)
    for b, n in enumerate(lengths):
        following = np.append(values[1:n, b], 0.0)
        deltas = rewards[:n, b] + discount * following - values[:n, b]
        for p in range(n):
            advantages[p, b] = np.sum((discount * gae_lambda) ** np.arange(n - p) * deltas[p:])
    return advantages


class TestTerminalRewards:
    def test_the_score_stands_at_each_rows_last_span(self):
        mask = prefix_mask([3, 1, 2], 3)
        rewards = terminal_rewards(jnp.array([5.0, 7.0, -2.0]), jnp.asarray(mask))
        np.testing.assert_array_equal(rewards, [[0, 7, 0], [0, 0, -2], [5, 0, 0]])

    def test_a_row_without_a_decision_gets_none(self):
        rewards = terminal_rewards(jnp.array([1.0, 1.0]), jnp.asarray(prefix_mask([0, 2], 2)))
        np.testing.assert_array_equal(rewards, [[0, 0], [0, 1]])


class TestAdvantages:
    @pytest.mark.parametrize(("discount", "gae_lambda"), [(1.0, 0.95), (0.99, 0.95), (0.9, 0.0), (1.0, 1.0)])
    @pytest.mark.device
    def test_rlax_agrees_on_rows_of_full_length(self, discount, gae_lambda):
        rng = np.random.default_rng(0)
        rewards, values = rng.normal(size=(2, 6, 5)).astype(np.float32)
        advantages, targets = masked_gae(
            jnp.asarray(rewards), jnp.asarray(values), jnp.ones((6, 5), bool), discount, gae_lambda
        )
        for b in range(5):
            expected = rlax.truncated_generalized_advantage_estimation(
                jnp.asarray(rewards[:, b]),
                jnp.full(6, discount),
                gae_lambda,
                jnp.append(jnp.asarray(values[:, b]), 0.0),
            )
            np.testing.assert_allclose(advantages[:, b], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(targets, advantages + values, rtol=1e-6)

    def test_numbers_by_hand(self):
        """discount 0.5, lambda 0.5; column 0 has three spans, column 1 one, column 2 two."""
        values = jnp.array([[1.0, 2.0, 4.0], [2.0, 99.0, 1.0], [3.0, 99.0, 99.0]])
        rewards = jnp.array([[0.0, 5.0, 0.0], [0.0, 99.0, 3.0], [4.0, 99.0, 99.0]])
        advantages, targets = masked_gae(rewards, values, jnp.asarray(prefix_mask([3, 1, 2], 3)), 0.5, 0.5)
        # Column 0: deltas 0 + 1 - 1 = 0, 0 + 1.5 - 2 = -0.5, 4 - 3 = 1; A = -0.0625, -0.25, 1.
        # Column 1: 5 - 2. Column 2: deltas 0 + 0.5 - 4 = -3.5, 3 - 1 = 2; A = -3, 2.
        np.testing.assert_allclose(advantages, [[-0.0625, 3, -3], [-0.25, 0, 2], [1, 0, 0]])
        np.testing.assert_allclose(targets, [[0.9375, 5, 1], [1.75, 0, 3], [4, 0, 0]])

    @given(
        lengths=st.lists(st.integers(0, 4), min_size=5, max_size=5),
        padding=st.floats(-1e6, 1e6, width=32),
        discount=st.floats(0, 1),
        gae_lambda=st.floats(0, 1),
        seed=st.integers(0, 1000),
    )
    def test_nothing_after_a_rows_end_leaks_in(self, lengths, padding, discount, gae_lambda, seed):
        mask = prefix_mask(lengths, 4)
        rewards, values = np.random.default_rng(seed).normal(size=(2, 4, 5))
        rewards, values = (np.where(mask, x, padding).astype(np.float32) for x in (rewards, values))
        advantages, targets = GAE(rewards, values, mask, discount, gae_lambda)
        expected = row_by_row(rewards.astype(np.float64), values.astype(np.float64), lengths, discount, gae_lambda)
        np.testing.assert_allclose(advantages, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(targets, np.where(mask, expected + values, 0), rtol=1e-4, atol=1e-5)

    def test_not_even_numbers_that_are_not_finite(self):
        mask = jnp.asarray(prefix_mask([1, 2], 2))
        values = jnp.array([[1.0, 1.0], [jnp.nan, 1.0]])
        advantages, targets = masked_gae(jnp.array([[1.0, 0.0], [jnp.inf, 1.0]]), values, mask, 1.0, 1.0)
        np.testing.assert_allclose(advantages, [[0, 0], [0, 0]])
        np.testing.assert_allclose(targets, [[1, 1], [0, 1]])


GAE = jax.jit(masked_gae)


class TestNormalise:
    def test_zero_mean_and_unit_variance_over_the_masked_places(self):
        mask = prefix_mask([4, 1, 3], 4)
        x = np.random.default_rng(0).normal(3.0, 5.0, (4, 3)).astype(np.float32)
        normal = np.asarray(normalise(jnp.asarray(np.where(mask, x, 1e6)), jnp.asarray(mask)))
        expected = (x - x[mask].mean()) / x[mask].std()
        np.testing.assert_allclose(normal, np.where(mask, expected, 0), rtol=1e-4, atol=1e-5)

    def test_equal_values_become_zero(self):
        np.testing.assert_allclose(normalise(jnp.full((2, 2), 7.0), jnp.ones((2, 2), bool)), 0.0, atol=1e-6)

    def test_masked_mean(self):
        assert masked_mean(jnp.array([1.0, jnp.nan, 3.0]), jnp.array([True, False, True])) == 2.0
        assert masked_mean(jnp.array([1.0, 3.0]), jnp.array([False, False])) == 0.0


class TestLoss:
    def samples(self, n=64):
        rng = np.random.default_rng(1)
        names = ("log_prob", "old_log_prob", "advantage", "value", "old_value", "target", "entropy")
        return {name: jnp.asarray(rng.normal(0, 0.4, n), jnp.float32) for name in names}

    def test_rlax_agrees_on_the_policy_loss(self):
        data = self.samples()
        loss = ppo_loss(**data, mask=jnp.ones(64, bool), **SETTINGS)
        ratios = jnp.exp(data["log_prob"] - data["old_log_prob"])
        expected = rlax.clipped_surrogate_pg_loss(ratios, data["advantage"], SETTINGS["clip"])
        np.testing.assert_allclose(loss.policy, expected, rtol=1e-5)
        assert 0.2 < float(loss.clip_fraction) < 0.9

    @pytest.mark.device
    def test_rlax_agrees_on_its_gradient(self):
        data = self.samples()

        def ours(log_prob):
            return ppo_loss(**{**data, "log_prob": log_prob}, mask=jnp.ones(64, bool), **SETTINGS).policy

        def theirs(log_prob):
            ratios = jnp.exp(log_prob - data["old_log_prob"])
            return rlax.clipped_surrogate_pg_loss(ratios, data["advantage"], SETTINGS["clip"])

        np.testing.assert_allclose(
            jax.grad(ours)(data["log_prob"]), jax.grad(theirs)(data["log_prob"]), rtol=on_device(1e-5, 2e-4), atol=1e-7
        )

    def test_every_part_by_hand(self):
        ratio = np.array([1.5, 0.5, 1.1, 1.5])
        advantage = np.array([2.0, 2.0, -1.0, -1.0])
        # min(r A, clip(r) A): 1.2 * 2; 0.5 * 2; -1.1; -1.5 (the clip never hides a loss).
        policy = -np.mean([2.4, 1.0, -1.1, -1.5])
        value, old_value, target = np.array([[1.0, 3.0, 0.2, -1.0], [1.2, 1.0, 0.0, 0.0], [0.0, 4.0, 1.0, -1.0]])
        # V_old + clip(V - V_old, -0.5, 0.5) = 1.0, 1.5, 0.2, -0.5; the larger error counts: 1, 2.5^2, 0.8^2, 0.5^2.
        value_loss = 0.5 * np.mean([1.0, 6.25, 0.64, 0.25])
        entropy = np.array([0.1, -0.2, 0.3, 1.0])
        loss = ppo_loss(
            *map(jnp.asarray, (np.log(ratio), np.zeros(4), advantage, value, old_value, target, entropy)),
            jnp.ones(4, bool),
            **SETTINGS,
        )
        np.testing.assert_allclose(loss.policy, policy, rtol=1e-5)
        np.testing.assert_allclose(loss.value, value_loss, rtol=1e-5)
        np.testing.assert_allclose(loss.entropy, 0.3, rtol=1e-5)
        np.testing.assert_allclose(loss.approx_kl, np.mean(ratio - 1 - np.log(ratio)), rtol=1e-5)
        np.testing.assert_allclose(loss.clip_fraction, 3 / 4)
        np.testing.assert_allclose(loss.total, policy + 0.5 * value_loss - 0.01 * 0.3, rtol=1e-5)

    def test_equal_policies_have_no_divergence(self):
        data = self.samples()
        loss = ppo_loss(**{**data, "log_prob": data["old_log_prob"]}, mask=jnp.ones(64, bool), **SETTINGS)
        assert loss.approx_kl == 0
        assert loss.clip_fraction == 0
        np.testing.assert_allclose(loss.policy, -jnp.mean(data["advantage"]), rtol=1e-5)

    @given(padding=st.floats(-1e6, 1e6, width=32), seed=st.integers(0, 100))
    def test_masked_places_count_neither_in_the_loss_nor_in_its_gradient(self, padding, seed):
        mask = np.random.default_rng(seed).permutation(64) < 38
        data = self.samples()
        part = {name: x[mask] for name, x in data.items()}
        filled = {name: jnp.where(mask, x, padding) for name, x in data.items()}
        expected = ppo_loss(**part, mask=jnp.ones(mask.sum(), bool), **SETTINGS)
        for ours, theirs in zip(ppo_loss(**filled, mask=jnp.asarray(mask), **SETTINGS), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
        gradient = GRADIENT(filled, jnp.asarray(mask))
        for name, slopes in gradient.items():
            assert np.all(np.isfinite(slopes)), name
            assert np.all(np.asarray(slopes)[~mask] == 0), name


GRADIENT = jax.jit(jax.grad(lambda data, mask: ppo_loss(**data, mask=mask, **SETTINGS).total))
