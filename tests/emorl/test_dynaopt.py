"""DynaOpt's bandits: against a trace worked out by hand, and what each of its two versions is paid for."""

import math

import numpy as np
import pytest

from rlae_jax.emorl.dynaopt import GAMMA, DynaOpt, Exp3

NAMES = ("one", "two", "three")


def history(n, seed=0):
    rng = np.random.default_rng(seed)
    return [dict(zip(NAMES, rng.random(3).tolist(), strict=True)) for _ in range(n)]


class TestExp3:
    def test_a_trace_by_hand(self):
        """Two arms, gamma 1/2: p = w / (2 sum w) + 1/4, and w of the arm grows by exp(reward / (4 p))."""
        start = Exp3.create(2, gamma=0.5)
        assert start.probabilities.tolist() == [0.5, 0.5]
        first = start.paid(0, 1.0)
        np.testing.assert_allclose(first.weights, [1.6487213, 1.0], rtol=1e-6)  # exp(1 / 2)
        np.testing.assert_allclose(first.probabilities, [0.5612297, 0.4387703], rtol=1e-6)
        second = first.paid(1, 0.2)
        np.testing.assert_allclose(second.weights, [1.6487213, 1.1207022], rtol=1e-6)  # exp(0.05 / 0.4387703)
        np.testing.assert_allclose(second.probabilities, [0.5476651, 0.4523349], rtol=1e-6)
        assert second.paid(1, 0.0) == second
        assert start.weights == (1.0, 1.0)

    @pytest.mark.parametrize("arms", [2, 3, 5])
    def test_probabilities_keep_a_floor(self, arms):
        rng = np.random.default_rng(arms)
        bandit = Exp3.create(arms)
        assert bandit.gamma == GAMMA == 0.07
        for _ in range(200):
            bandit = bandit.paid(int(rng.integers(arms - 1)), float(rng.random()))
            p = bandit.probabilities
            assert p.sum() == pytest.approx(1)
            assert p.min() >= GAMMA / arms
        assert p[-1] < p[:-1].min()  # never paid

    def test_what_is_drawn_seldom_is_paid_more(self):
        """The estimate of a reward is the reward over the probability: of the rarer arm it counts for more."""
        bandit = Exp3.create(2, gamma=0.5).paid(0, 3.0)
        grown = [math.log(bandit.paid(arm, 1.0).weights[arm] / bandit.weights[arm]) for arm in (0, 1)]
        assert grown[1] > grown[0]
        np.testing.assert_allclose(np.array(grown) * bandit.probabilities, 0.25)


def replay(rows, seed, reference, steps):
    found = DynaOpt(NAMES, seed, reference)
    for i, scores in enumerate(rows):
        for _ in range(steps if i else 0):
            found.step()
        found.validated(scores)
    return found


@pytest.mark.parametrize("reference", [True, False])
class TestBoth:
    def test_the_history_is_the_state(self, reference):
        """Whoever goes on from a replayed history goes on as who was there."""
        rows = history(12)
        live = DynaOpt(NAMES, 7, reference)
        for i, scores in enumerate(rows):
            for _ in range(4 if i else 0):
                live.step()
            live.validated(scores)
            again = replay(rows[: i + 1], 7, reference, 4)
            assert again.arm == live.arm
            np.testing.assert_array_equal(again.weights, live.weights)
        arms = {replay(rows[:n], seed, reference, 4).arm for n in range(1, 12) for seed in range(3)}
        assert arms == {0, 1, 2, 3}

    def test_weights_begin_equal_and_sum_to_one(self, reference):
        np.testing.assert_allclose(DynaOpt(NAMES, 0, reference).weights, 1 / 3)
        for n in range(1, 12):
            weights = replay(history(n), 3, reference, 5).weights
            assert weights.sum() == pytest.approx(1)
            assert np.all(weights > 0)


class TestReference:
    def test_its_inner_bandit_is_paid_for_every_step(self):
        """Each step pays 1 to the arm that the outer bandit holds, however bad the scores are."""
        found = DynaOpt(NAMES, 1, reference=True)
        inner = Exp3.create(3)
        paid = 0
        for i in range(30):
            for _ in range(4):
                if found.arm < 3:
                    inner = inner.paid(found.arm, 1.0)
                    paid += 1
                found.step()
            expected = np.array(inner.weights) / sum(inner.weights)
            np.testing.assert_allclose(found.weights, expected)
            found.validated(dict.fromkeys(NAMES, -float(i)))
            np.testing.assert_allclose(found.weights, expected)  # a validation pays it nothing
        assert 0 < paid < 120

    def test_its_outer_bandit_is_paid_the_plain_improvement(self):
        found, outer = DynaOpt(NAMES, 2, reference=True), Exp3.create(4)
        before = None
        for scores in history(9, seed=4):
            means = [np.mean(list(own.values())) for own in (scores, before or scores)]
            outer = outer.paid(found.arm, means[0] - means[1])
            found.validated(scores)
            before = scores
            np.testing.assert_allclose(found._outer.weights, outer.weights)


class TestRepaired:
    def test_steps_alone_change_nothing(self):
        found = DynaOpt(NAMES, 1)
        found.validated(dict.fromkeys(NAMES, 0.1))
        before = found.weights
        for _ in range(50):
            found.step()
        np.testing.assert_array_equal(found.weights, before)

    @pytest.mark.parametrize("seed", range(4))
    def test_an_arm_that_helped_is_raised_more_than_one_that_harmed(self, seed):
        """Whenever the first arm is held the scores rise a little, with the second they fall, with others they stay."""
        found, level = DynaOpt(NAMES, seed), 0.5
        for _ in range(250):
            level += {0: 0.02, 1: -0.02}.get(found.arm, 0.0)
            found.validated(dict.fromkeys(NAMES, level))
        helped, harmed, idle = found.weights
        assert helped > idle > harmed
        assert found._outer.probabilities[0] == found._outer.probabilities.max()

    def test_what_it_is_paid_is_the_improvement_on_the_scale_of_those_so_far(self):
        found, inner = DynaOpt(NAMES, 5), Exp3.create(3)
        improvements, before = [], None
        for scores in history(14, seed=9):
            mean = float(np.mean(list(scores.values())))
            improvements.append(0.0 if before is None else mean - before)
            before = mean
            low, high = min(improvements), max(improvements)
            if found.arm < 3:
                inner = inner.paid(found.arm, (improvements[-1] - low) / (high - low) if high > low else 0.5)
            found.validated(scores)
            np.testing.assert_allclose(found.weights, np.array(inner.weights) / sum(inner.weights), rtol=1e-9)
