"""Policies that need no training: their weights by hand and in the loop, and what drawing members samples from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import rlae_jax as rj
from rlae_jax.fusion.policy import (
    Bayes,
    BoundPolicy,
    Consistency,
    Dims,
    Draw,
    Gate,
    Observation,
    OneHot,
    Online,
    Perplexity,
    Selective,
    SoFar,
)
from rlae_jax.fusion.prompts import pad_rows
from tests.helpers import reference
from tests.helpers.reference import log_softmax

PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7], [11, 22, 0]]
N = 6


@pytest.fixture(scope="module")
def pair(make_lm):
    """Of unequal sharpness, so that one is surer than the other; near-ties are avoided by both."""
    narrow = make_lm(1, sharpness=3.0, width=12, layers=1, heads=2, kv_heads=1, head_width=6)
    return rj.Ensemble([make_lm(0, layers=1), narrow], end_ids=(6, 18))


def write(ensemble, policy, rows=PROMPTS, **options):
    ids, mask = pad_rows(rows, 8)
    return ensemble.generate(prompt_ids=ids, prompt_mask=mask, weights=policy, **{"max_new_tokens": N} | options)


def observe(**parts):
    return Observation(**{"hidden": (), "stats": (), "span": ()} | parts)


def softmax(scores):
    return np.exp(log_softmax(np.asarray(scores, np.float64)))


def prompt_scores(members, prompt):
    """Each member's mean log-probability of a prompt after its first token."""
    return [np.asarray(lm.log_probs(np.array([prompt])), np.float64)[0].mean() for lm in members]


class TestPerplexity:
    @pytest.mark.parametrize("temperature", [1.0, 0.3])
    def test_weights_follow_how_well_a_prompt_is_predicted(self, pair, temperature):
        out = write(pair, Perplexity(temperature), max_new_tokens=5, ignore_eos=True)
        assert out.weights.shape == (len(PROMPTS), 2, 2)
        for prompt, used in zip(PROMPTS, out.weights, strict=True):
            # A single token says nothing about who predicts better.
            scores = [0.0, 0.0] if len(prompt) == 1 else prompt_scores(pair.members, prompt)
            np.testing.assert_allclose(used, np.tile(softmax(np.array(scores) / temperature), (2, 1)), atol=1e-5)
        assert np.ptp(out.weights[:, 0, 0]) > 0.05

    def test_it_goes_by_name(self, pair):
        named, given = (
            write(pair, policy, max_new_tokens=5, ignore_eos=True) for policy in ("perplexity", Perplexity())
        )
        assert named.tokens == given.tokens
        np.testing.assert_array_equal(named.weights, given.weights)

    def test_an_encoder_decoder_has_none(self, stored_checkpoint, raises_input_error):
        lm = rj.load(stored_checkpoint("tied", "t5"))
        raises_input_error(lambda: rj.Ensemble([lm]).generate(prompt_ids=[[3]], weights="perplexity"), "Perplexity")


STATISTICS = {
    "consistency": (Consistency(), lambda s: softmax(-s[:, 3] / 0.25)),
    "cold-consistency": (Consistency(temperature=0.1), lambda s: softmax(-s[:, 3] / 0.1)),
    "gate": (Gate(), lambda s: [1, 0] if s[0, 1] >= 0.5 else [0.5, 0.5]),
    "gate-of-the-second": (Gate(0.4, member=1), lambda s: [0, 1] if s[1, 1] >= 0.4 else [0.5, 0.5]),
    "selective": (Selective(0.5, member=1), lambda s: [0.5, 0.5] if s[:, 3].mean() >= 0.5 else [0, 1]),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_policies_that_read_statistics(pair, name):
    """Anew at every step, from what the reference says that the members predict."""
    policy, choose = STATISTICS[name]
    out = write(pair, policy, temperature=1.0)
    for b, prompt in enumerate(PROMPTS):
        row = reference.decode_row(
            pair.members,
            prompt,
            jax.random.fold_in(jax.random.key(0), b),
            lambda span, hidden, seen: np.asarray(choose(seen), np.float64),
            span_length=1,
            max_new_tokens=N,
            temperature=1.0,
            end_ids=pair.end_ids,
        )
        assert out.tokens[b] == row.tokens[: len(row.tokens) - row.ended]
        np.testing.assert_allclose(out.weights[b, : out.steps[b]], row.weights, rtol=0, atol=1e-4)
    used = out.weights[..., 0][~np.isnan(out.weights[..., 0])]
    assert np.ptp(used) > 0.1
    if isinstance(policy, Gate | Selective):  # it opens, and it shuts
        assert set(used.tolist()) == {0.5, 1.0 - policy.member}


def test_the_gate_is_shut_at_its_threshold():
    s = np.zeros((3, 3, 4), np.float32)
    s[:, 2, 1] = [0.4, 0.5, 0.6]
    distribution, _ = Gate(0.5, member=2).apply((), observe(stats=jnp.asarray(s)))
    np.testing.assert_allclose(distribution.mode(), [[1 / 3] * 3, [0, 0, 1], [0, 0, 1]], rtol=1e-6)
    np.testing.assert_array_equal(distribution.log_prob(distribution.mode()), 0.0)
    np.testing.assert_array_equal(distribution.entropy(), 0.0)


def test_consistency_of_members_that_agree_is_uniform():
    distribution, _ = Consistency().apply((), observe(stats=jnp.zeros((2, 4, 4))))
    np.testing.assert_allclose(distribution.mode(), 0.25)


def online_weights(log_probs, start, rate, share, length):
    """[P, K], from what each member gave each token [N, K]."""
    weights, before = [np.array(start)], np.array(start)
    for p in range(length, len(log_probs), length):
        gradient = np.zeros(len(start))
        for probs in np.exp(log_probs[p - length : p]):
            gradient += probs / np.sum(before * probs)
        moved = before * np.exp(rate * gradient)
        before = (1 - share) * moved / moved.sum() + share * np.array(start)
        weights.append(before)
    return np.array(weights)


def bayes_weights(log_probs, prior, temperature, length):
    weights = []
    for p in range(0, len(log_probs), length):
        posterior = prior * np.exp(np.sum(log_probs[:p], axis=0) / temperature)
        weights.append(posterior / posterior.sum())
    return np.array(weights)


class TestAccounts:
    """Policies that keep account of what was written."""

    RNG = np.random.default_rng()
    START = RNG.dirichlet([3.0, 3.0])
    RATE, SHARE, TEMPERATURE = RNG.uniform(0.05, 1.0), RNG.uniform(0.01, 0.3), RNG.uniform(0.5, 3.0)

    def check(self, pair, policy, expect, span_length, written):
        start = self.START.astype(np.float32)
        out = written(BoundPolicy(policy, start[None], Dims(pair.widths, 8), span_length))
        for b, prompt in enumerate(PROMPTS[:3]):
            tokens, log_probs = list(out.chosen[b]), []
            for n, token in enumerate(tokens):
                log_probs.append([reference.read(lm, prompt + tokens[:n])[1][token] for lm in pair.members])
            expected = expect(np.array(log_probs), start.astype(np.float64), span_length)
            np.testing.assert_allclose(out.weights[b, : len(expected)], expected, rtol=0, atol=1e-4)
        assert np.nanmax(np.abs(out.weights - start)) > 1e-3  # it moved

    @pytest.mark.parametrize(
        ("kind", "span_length"),
        [
            ("online", 2),
            ("bayes", 1),
            *(pytest.param(*one, marks=pytest.mark.rare) for one in (("online", 1), ("bayes", 2))),
        ],
    )
    def test_their_weights_by_hand(self, pair, kind, span_length):
        policies = {
            "online": (
                Online(self.RATE, self.SHARE),
                lambda log_probs, start, length: online_weights(log_probs, start, self.RATE, self.SHARE, length),
            ),
            "bayes": (
                Bayes(self.TEMPERATURE),
                lambda log_probs, prior, length: bayes_weights(log_probs, prior, self.TEMPERATURE, length),
            ),
        }
        self.check(
            *(pair, *policies[kind], span_length),
            lambda policy: write(pair, policy, temperature=1.0, ignore_eos=True, seed=int(self.RNG.integers(2**31))),
        )

    def test_the_bayesian_mixture_is_the_mean_of_the_members_probabilities(self, pair):
        """Of whole texts, under any prior."""
        tokens = [self.RNG.integers(0, 23, n).tolist() for n in (1, 4, 7, 3)]
        policy = BoundPolicy(Bayes(), self.START.astype(np.float32)[None], Dims(pair.widths, 8), 1)
        for found in pair.score_tokens(PROMPTS, tokens, policy):
            expected = np.log(np.sum(self.START * np.exp(found.members.sum(axis=0, dtype=np.float64))))
            np.testing.assert_allclose(found.fused.sum(dtype=np.float64), expected, rtol=1e-5)

    def losses(self, policy, probs, start):
        """Of each step of one text, whose tokens' probabilities under the members are given."""
        so_far, losses = SoFar.nothing(1, probs.shape[1]), []
        for p in probs:
            weights = policy.apply(jnp.asarray(start)[None], observe(so_far=so_far))[0].weights
            losses.append(-np.log(np.sum(np.asarray(weights, np.float64)[0] * p)))
            so_far = so_far.and_token(jnp.log(jnp.asarray(p))[None], weights, jnp.array(True), jnp.array([True]))
        return np.array(losses)

    def test_regret_of_exponentiated_gradient(self):
        """Against the best fixed weights in hindsight, within the bound of Helmbold et al. (theorem 4.1)."""
        steps, k, least = 60, 3, 0.3
        probs = self.RNG.uniform(least, 1.0, (steps, k)) * [1.0, 0.7, 1.0]
        least *= 0.7
        start = np.full(k, 1 / k, np.float32)
        policy = Online(float(2 * least * np.sqrt(2 * np.log(k) / steps)), 0.0)
        own = self.losses(policy, probs, start).sum()
        grid = [np.array([a, b, 20 - a - b]) / 20 for a in range(21) for b in range(21 - a)]
        best = min(-np.log(probs @ weights).sum() for weights in grid)
        assert own <= best + np.sqrt(2 * steps * np.log(k)) / (2 * least)
        assert own <= -np.log(probs @ start).sum() + 1e-3  # a small step never loses what equal weights have

    def test_a_share_follows_a_change(self):
        """A member that was wrong for long is soon believed again; without a share it is not."""
        good, bad = np.full(30, 0.9), np.full(30, 0.05)
        probs = np.stack([np.append(good, bad), np.append(bad, good)], axis=1)
        start = np.array([0.5, 0.5], np.float32)
        with_share, without = (self.losses(Online(1.0, share), probs, start) for share in (0.05, 0.0))
        assert with_share.sum() < -np.log(probs @ start).sum()  # the best fixed weights, too
        assert with_share[30:35].sum() < without[30:35].sum() / 2
        assert self.losses(Bayes(), probs, start)[30:].sum() > 2 * with_share[30:].sum()

    def test_limits(self):
        """All share, or no rate: the start for ever. Zero weights stay zero."""
        probs = self.RNG.uniform(0.01, 1.0, (5, 2))
        start = self.START.astype(np.float32)
        fixed = -np.log(probs @ start.astype(np.float64))
        for policy in (Online(0.7, 1.0), Online(0.0, 0.2), Bayes(1e6)):
            np.testing.assert_allclose(self.losses(policy, probs, start), fixed, atol=2e-4)
        np.testing.assert_allclose(self.losses(Online(0.7, 0.2), probs, [0.0, 1.0]), -np.log(probs[:, 1]), rtol=1e-5)


class TestOneHot:
    PROBS = np.array([[0.2, 0.5, 0.3], [0.0, 0.9, 0.1], [1.0, 0.0, 0.0]], np.float32)

    def test_frequencies(self):
        n = 3000
        for probs in self.PROBS:
            keys = jax.random.split(jax.random.key(3), n)
            drawn = np.asarray(OneHot(jnp.asarray(probs)[None]).sample(keys))
            assert set(np.unique(drawn)) <= {0.0, 1.0}
            np.testing.assert_array_equal(drawn.sum(axis=1), 1)
            counts, possible = drawn.sum(axis=0), probs > 0
            assert counts[~possible].sum() == 0
            if possible.sum() > 1:
                expected = n * probs[possible].astype(np.float64)
                assert stats.chisquare(counts[possible], expected * (n / expected.sum())).pvalue > 1e-3

    def test_a_row_draws_by_its_own_probabilities_and_key(self):
        keys = jax.random.split(jax.random.key(0), 64)
        rows = jnp.tile(jnp.asarray(self.PROBS), (22, 1))[:64]
        together = np.asarray(OneHot(rows).sample(keys))
        for b in (0, 1, 2, 63):
            alone = OneHot(rows[b : b + 1]).sample(keys[b : b + 1])
            np.testing.assert_array_equal(alone[0], together[b])
        np.testing.assert_array_equal(together[2::3, 0], 1)

    def test_mode_log_prob_and_entropy(self):
        distribution = OneHot(jnp.asarray(self.PROBS))
        np.testing.assert_array_equal(distribution.mode(), np.eye(3)[[1, 1, 0]])
        for k in range(3):
            log_prob = distribution.log_prob(jnp.tile(jnp.eye(3)[k], (3, 1)))
            with np.errstate(divide="ignore"):
                np.testing.assert_allclose(log_prob, np.log(self.PROBS[:, k]), rtol=1e-5)
        np.testing.assert_allclose(distribution.entropy(), [stats.entropy(p) for p in self.PROBS], rtol=1e-5, atol=1e-6)


class TestDraw:
    def test_it_holds_the_weights_as_probabilities(self):
        draw = Draw()
        np.testing.assert_allclose(draw.init(jax.random.key(0), Dims((4, 4, 4), 2)), [[1 / 3] * 3], rtol=1e-6)
        distribution, value = draw.apply(jnp.asarray([[0.2, 0.8]]), observe())
        assert isinstance(distribution, OneHot)
        np.testing.assert_allclose(distribution.probs, [[0.2, 0.8]])
        np.testing.assert_array_equal(value, [0.0])

    def test_drawn_members_sample_from_the_linear_ensemble(self, make_chain_lm):
        """Two tokens of chain models at temperature 1: P(a, b) is the product of the weighted means (ME). Their
        members disagree, so that the other order, a mean of products, is far away."""
        v, start, samples = 4, 0, 4096
        table = np.random.default_rng(2).normal(0, 1.0, (v, v))
        tables = [table, -table]
        ensemble = rj.Ensemble([make_chain_lm(table) for table in tables], end_ids=())
        weights = np.array([0.35, 0.65])
        bound = BoundPolicy(Draw(), np.array([weights], np.float32), Dims(ensemble.widths, 2), 1, sample=True)
        out = ensemble.generate(
            prompt_ids=[[1, start]], weights=bound, temperature=1.0, max_new_tokens=2, samples=samples, seed=1
        )
        probs = [np.exp([log_softmax(row) for row in table]) for table in tables]
        mean = sum(w * p for w, p in zip(weights, probs, strict=True))
        expected = (mean[start][:, None] * mean).ravel()
        wrong = sum(w * (p[start][:, None] * p) for w, p in zip(weights, probs, strict=True)).ravel()
        counts = np.bincount([v * a + b for a, b in out.tokens], minlength=v * v)
        # The seed is fixed: this passes always or never.
        assert stats.chisquare(counts, expected * samples).pvalue > 1e-3
        assert stats.chisquare(counts, wrong * samples).pvalue < 1e-12
        # Each member was drawn as often as its weight says, independently from step to step.
        drawn = out.weights.argmax(axis=-1)
        np.testing.assert_array_equal(out.weights.max(axis=-1), 1.0)
        pairs = np.bincount(2 * drawn[:, 0] + drawn[:, 1], minlength=4)
        assert stats.chisquare(pairs, np.outer(weights, weights).ravel() * samples).pvalue > 1e-3

    @pytest.mark.slow
    def test_a_given_weight_of_one_is_the_member_alone(self, pair):
        for k in range(2):
            probs = np.eye(2, dtype=np.float32)[[k] * len(PROMPTS)]
            bound = BoundPolicy(Draw(), probs, Dims(pair.widths, N), 1, sample=True)
            out = write(pair, bound, temperature=1.0)
            for b, prompt in enumerate(PROMPTS):
                row = reference.decode_row(
                    [pair.members[k]],
                    prompt,
                    jax.random.fold_in(jax.random.key(0), b),
                    lambda *_: np.ones(1),
                    max_new_tokens=N,
                    temperature=1.0,
                    end_ids=pair.end_ids,
                )
                assert out.tokens[b] == row.tokens[: len(row.tokens) - row.ended]
