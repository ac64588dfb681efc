"""Intervals, p-values and rank correlation, against scipy, against values from books, and on simulated studies."""

import numpy as np
import pytest
import scipy.stats

from rlae_jax import statistics


class TestIntervals:
    @pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (5, 10), (1, 20), (81, 263), (1, 1)])
    def test_wilson(self, successes, n):
        expected = scipy.stats.binomtest(successes, n).proportion_ci(method="wilson")
        rewards = (np.arange(n) < successes).astype(float)
        np.testing.assert_allclose(statistics.wilson_interval(rewards), expected, atol=1e-6)
        assert statistics.interval95(rewards) == statistics.wilson_interval(rewards)

    @pytest.mark.parametrize("n", [20, 400])
    def test_the_bootstrap_over_prompts(self, n):
        rewards = np.random.default_rng(n).beta(2.0, 1.0, n)
        expected = scipy.stats.bootstrap((rewards,), np.mean, n_resamples=20_000, method="percentile", rng=0)
        low, high = statistics.bootstrap_interval(rewards, draws=20_000)
        width = expected.confidence_interval.high - expected.confidence_interval.low
        np.testing.assert_allclose((low, high), expected.confidence_interval, atol=0.03 * width)

    def test_it_is_the_same_every_time_however_much_is_in_memory(self, monkeypatch):
        rewards = np.random.default_rng(0).random((3, 50))
        first = statistics.bootstrap_interval(rewards)
        assert statistics.bootstrap_interval(rewards) == first
        assert statistics.bootstrap_interval(rewards, seed=1) != first
        monkeypatch.setattr(statistics, "_CELLS", 4_000)
        np.testing.assert_allclose(statistics.bootstrap_interval(rewards), first, atol=0.01)

    def test_one_seed_is_a_row(self):
        rewards = np.random.default_rng(1).random(30)
        assert statistics.bootstrap_interval(rewards) == statistics.bootstrap_interval(rewards[None])

    def test_seeds_that_agree_add_nothing(self):
        rewards = np.random.default_rng(2).random(200)
        one, three = (statistics.bootstrap_interval(x, draws=20_000) for x in (rewards, np.tile(rewards, (3, 1))))
        np.testing.assert_allclose(three, one, atol=0.004)

    def test_rewards_bound_the_interval_of_a_score(self):
        low, high = statistics.interval95([[1.0, 1.0, 1.0], [0.9, 1.0, 1.0]])
        assert 0 <= low < high <= 1

    @pytest.mark.parametrize(("seeds", "prompts", "spread"), [(1, 60, 0.0), (5, 60, 0.1), (8, 60, 0.02), (5, 200, 0.3)])
    def test_coverage(self, seeds, prompts, spread):
        """Of 500 simulated studies, 95% of the intervals hold the true mean."""
        rng = np.random.default_rng(seeds)
        held = 0
        for _ in range(500):
            of_seed = spread * rng.standard_normal((seeds, 1))
            of_prompt = 0.3 * rng.standard_normal((1, prompts))
            rewards = 0.5 + of_seed + of_prompt + 0.2 * rng.standard_normal((seeds, prompts))
            low, high = statistics.bootstrap_interval(rewards, draws=400)
            held += low <= 0.5 <= high
        assert 0.915 <= held / 500 <= 0.985


class TestStudentsT:
    @pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 10, 29, 100])
    def test_tails_and_quantiles(self, freedom):
        for t in (0.0, 0.3, 1.0, 2.5, 7.0):
            np.testing.assert_allclose(statistics.t_two_sided(t, freedom), 2 * scipy.stats.t.sf(t, freedom), atol=1e-12)
        np.testing.assert_allclose(statistics.t_quantile95(freedom), scipy.stats.t.ppf(0.975, freedom), rtol=1e-9)

    @pytest.mark.parametrize("n", [2, 3, 5, 12])
    def test_one_sample(self, n):
        values = np.random.default_rng(n).normal(0.4, 1.0, n)
        np.testing.assert_allclose(statistics.t_test_p(values), scipy.stats.ttest_1samp(values, 0.0).pvalue, atol=1e-12)

    def test_no_spread(self):
        assert statistics.t_test_p(np.zeros(4)) == 1.0
        assert statistics.t_test_p(np.full(4, 0.25)) == 0.0


class TestSignFlips:
    @pytest.mark.parametrize(
        ("better", "worse", "same"), [(0, 0, 5), (1, 0, 0), (7, 2, 30), (40, 40, 0), (310, 240, 9), (3000, 2500, 0)]
    )
    def test_of_right_and_wrong_answers_it_is_the_sign_test(self, better, worse, same):
        differences = np.repeat([1.0, -1.0, 0.0], [better, worse, same])
        expected = scipy.stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
        np.testing.assert_allclose(statistics.sign_flip_p(differences), expected, rtol=1e-9)

    @pytest.mark.parametrize("shift", [0.0, 0.3, 0.6])
    def test_of_graded_answers(self, shift):
        differences = np.random.default_rng(7).normal(shift, 0.6, 12)
        exact = scipy.stats.permutation_test(
            (differences,), np.sum, permutation_type="samples", n_resamples=np.inf
        ).pvalue
        error = np.sqrt(exact * (1 - exact) / statistics.FLIPS)
        np.testing.assert_allclose(statistics.sign_flip_p(differences), exact, atol=5 * error + 1e-4)

    def test_half_of_the_flips_of_two_numbers(self):
        # +-1 and +-3: |sum| is 4, 4, 2, 2.
        np.testing.assert_allclose(statistics.sign_flip_p(np.array([1.0, 3.0])), 0.5, atol=0.02)
        np.testing.assert_allclose(statistics.sign_flip_p(np.array([-1.0, 3.0])), 1.0)


class TestDifferences:
    def test_one_seed(self):
        a, b = np.repeat([1.0, 0.0], [15, 5]), np.repeat([1.0, 0.0], [9, 11])
        difference, (low, high), p = statistics.paired_difference(a, b)
        np.testing.assert_allclose(difference, 0.3)
        np.testing.assert_allclose(p, scipy.stats.binomtest(6, 6).pvalue)
        assert 0 < low < 0.3 < high < 0.6
        assert statistics.paired_difference(b, a).difference == -difference

    def test_the_seed_is_the_outer_unit(self):
        """Thousands of prompts cannot make up for seeds of which one is worse."""
        a = np.zeros((3, 3000))
        a[:2, :600] = 1.0
        b = np.zeros((3, 3000))
        b[2, :300] = 1.0
        difference = statistics.paired_difference(a, b)
        by_seed = [0.2, 0.2, -0.1]
        np.testing.assert_allclose(difference.difference, 0.1)
        np.testing.assert_allclose(difference.p, scipy.stats.ttest_1samp(by_seed, 0.0).pvalue)
        assert difference.ci95[0] < 0 < difference.ci95[1]
        assert statistics.sign_flip_p((a - b).mean(axis=0)) < 0.001

    def test_seeds_that_agree_leave_the_prompts(self):
        a, b = np.repeat([1.0, 0.0], [7, 13]), np.repeat([1.0, 0.0], [4, 16])
        p = statistics.paired_difference(np.tile(a, (4, 1)), b).p
        np.testing.assert_allclose(p, scipy.stats.binomtest(3, 3).pvalue)

    def test_how_seeds_are_paired(self):
        rng = np.random.default_rng(0)
        a, b = rng.random((4, 30)), rng.random((2, 30))
        assert statistics.paired_difference(a, b) == statistics.paired_difference(a[:2], b)
        np.testing.assert_allclose(statistics.paired_difference(a, b[0]).difference, a.mean() - b[0].mean())

    def test_of_equal_methods_one_in_twenty_differs(self):
        rng = np.random.default_rng(5)
        small = [
            statistics.paired_difference(
                *(0.1 * rng.standard_normal((4, 1)) + rng.standard_normal((4, 40)) for _ in range(2))
            ).p
            < 0.05
            for _ in range(60)
        ]
        assert np.mean(small) <= 0.15


class TestHolm:
    def test_by_hand(self):
        # Sorted: 4 * 0.005, 3 * 0.01, 2 * 0.03, 0.04 -> not below the one before it.
        np.testing.assert_allclose(statistics.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])

    def test_it_ends_at_one_and_keeps_a_single_value(self):
        assert statistics.holm([0.6, 0.7]) == [1.0, 1.0]
        assert statistics.holm([0.03]) == [0.03]
        assert statistics.holm([]) == []


class TestRankCorrelation:
    @pytest.mark.parametrize(("n", "values"), [(2, 50), (7, 3), (40, 1_000), (200, 5)])
    def test_with_and_without_ties(self, n, values):
        rng = np.random.default_rng(n)
        for _ in range(20):
            x, y = rng.integers(values, size=(2, n)) / values
            if np.ptp(x) and np.ptp(y):
                expected = scipy.stats.spearmanr(x, y).statistic
                np.testing.assert_allclose(statistics.rank_correlation(x, y), expected, atol=1e-12)

    def test_by_hand(self):
        np.testing.assert_allclose(statistics.rank_correlation([1, 2, 9], [0.1, 0.2, 0.3]), 1)
        np.testing.assert_allclose(statistics.rank_correlation([1, 2, 9], [3, 2, -5]), -1)
        # Ranks 1, 2.5, 2.5 and 1, 2, 3.
        np.testing.assert_allclose(statistics.rank_correlation([0, 4, 4], [1, 2, 3]), 1.5 / np.sqrt(1.5 * 2))

    def test_a_side_that_is_constant(self):
        assert np.isnan(statistics.rank_correlation([0.1] * 3, [1, 2, 3]))
        assert np.isnan(statistics.rank_correlation([1, 2, 3], [0.1] * 3))
        assert np.isnan(statistics.rank_correlation([1], [2]))
