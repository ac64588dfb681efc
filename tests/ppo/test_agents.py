"""Several agents: each one's own likelihood and ratio against loops, what they draw, span lengths that agents choose,
and agents of several seeds side by side."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

import rlae_jax as rj
from rlae_jax.config import AgentConfig, MAPPOConfig, PPOConfig
from rlae_jax.fusion.policy import Policy
from rlae_jax.fusion.prompts import pad_rows, prompts_from_arrays
from rlae_jax.ppo import iteration as ppo
from rlae_jax.ppo.agent import MAPPOAgent, PPOAgent
from rlae_jax.ppo.dirichlet import Dirichlet
from rlae_jax.ppo.gamma import LogGammas
from rlae_jax.ppo.logistic_normal import LogisticNormal
from rlae_jax.ppo.objective import ppo_loss
from rlae_jax.ppo.span_choice import WithLength
from tests.helpers.agents import DIMS, SMALL, observe, undecided_no_more


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


class TestLogGammas:
    def test_each_likelihood_is_scipys(self):
        rng = np.random.default_rng(0)
        alpha, action = rng.uniform(0.05, 4, (6, 3)), rng.normal(0, 1.5, (6, 3))
        ours = LogGammas(jnp.asarray(alpha, jnp.float32)).log_prob(jnp.asarray(action, jnp.float32))
        np.testing.assert_allclose(ours, stats.loggamma.logpdf(action, alpha), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("alpha", [(0.7, 2.0, 1.3), (3.0, 0.4)])
    def test_their_product_is_the_joint_dirichlet(self, alpha):
        """Change of variables ln g -> (w, ln s), s = sum g: integrated over s the product is Dir(alpha)'s density.
        |d ln g / d (w_1..w_(K-1), ln s)| = 1 / prod w_k."""
        rng = np.random.default_rng(1)
        gammas, alpha = LogGammas(jnp.asarray(alpha, jnp.float32)), np.array(alpha)
        for w in rng.dirichlet(np.ones(len(alpha)), 4):

            def joint(log_s, w=w):
                log_g = jnp.asarray(np.log(w) + log_s, jnp.float32)
                return float(np.exp(np.sum(np.asarray(gammas.log_prob(log_g), np.float64))) / np.prod(w))

            density, _ = integrate.quad(joint, -30, 5, limit=200)
            assert density == pytest.approx(stats.dirichlet.pdf(w / w.sum(), alpha), rel=1e-3)

    def test_weights_are_dirichlet_distributed(self):
        alpha = jnp.tile(jnp.array([0.5, 1.0, 3.0]), (20_000, 1))
        gammas = LogGammas(alpha)
        weights = np.asarray(gammas.to_weights(gammas.sample(keys(20_000))))
        for k in range(3):
            a = float(alpha[0, k])
            assert stats.kstest(weights[:, k], stats.beta(a, 4.5 - a).cdf).pvalue > 1e-3
        np.testing.assert_allclose(gammas.to_weights(gammas.mode())[0], alpha[0] / 4.5, rtol=1e-5)

    def test_tiny_concentrations_stay_finite(self):
        gammas = LogGammas(jnp.full((500, 3), 0.02))
        action = gammas.sample(keys(500))
        assert np.all(np.isfinite(gammas.log_prob(action)))
        weights = np.asarray(gammas.to_weights(action))
        np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
        assert np.all(weights > 0)
        assert np.all(np.isfinite(gammas.entropy()))


def test_logistic_normal_is_scipys_normal():
    rng = np.random.default_rng(0)
    mean, log_std, action = (rng.normal(0, 1, (5, 2)) for _ in range(3))
    ours = LogisticNormal(*(jnp.asarray(x, jnp.float32) for x in (mean, log_std)))
    expected = stats.norm.logpdf(action, mean, np.exp(log_std)).sum(axis=1)
    np.testing.assert_allclose(ours.log_prob(jnp.asarray(action, jnp.float32)), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ours.entropy(), stats.norm.entropy(mean, np.exp(log_std)).sum(axis=1), rtol=1e-4)
    exp = np.exp(np.pad(action, ((0, 0), (0, 1))))
    np.testing.assert_allclose(ours.to_weights(jnp.asarray(action)), exp / exp.sum(1, keepdims=True), rtol=1e-5)
    drawn = LogisticNormal(jnp.tile(ours.mean[:1], (5_000, 1)), jnp.tile(ours.log_std[:1], (5_000, 1)))
    sample = np.asarray(drawn.sample(keys(5_000)))
    for k in range(2):
        assert stats.kstest(sample[:, k], stats.norm(mean[0, k], np.exp(log_std[0, k])).cdf).pvalue > 1e-3


@pytest.mark.parametrize("inner", [Dirichlet, LogGammas])
def test_a_chosen_length_has_its_own_probability(inner):
    of_weights = inner(jnp.array([[1.0, 2.0], [0.5, 0.7]]))
    logits = jnp.array([[0.0, 1.0, -1.0], [2.0, 0.0, 0.0]])
    both = WithLength(of_weights, logits, jnp.tile(jnp.array([2, 4, 8]), (2, 1)))
    action = both.sample(keys(2))
    assert action.shape == (2, 3)
    place = np.asarray(action[:, -1]).astype(int)
    np.testing.assert_array_equal(both.to_length(action), np.array([2, 4, 8])[place])
    of_length = np.log(np.exp(logits) / np.exp(logits).sum(1, keepdims=True))[np.arange(2), place]
    expected = np.asarray(of_weights.log_prob(action[:, :-1]))
    expected = expected + of_length if inner is Dirichlet else np.column_stack([expected, of_length])
    np.testing.assert_allclose(both.log_prob(action), expected, rtol=1e-5)
    np.testing.assert_array_equal(both.to_length(both.mode()), [4, 2])
    many = WithLength(*jax.tree.map(lambda leaf: jnp.repeat(leaf[:1], 9_000, axis=0), tuple(both)))
    counts = np.bincount(np.asarray(many.sample(keys(9_000))[:, -1]).astype(int), minlength=3)
    assert stats.chisquare(counts, 9_000 * np.asarray(jax.nn.softmax(logits[0]), np.float64)).pvalue > 1e-3


class TestMAPPOAgent:
    @pytest.mark.parametrize("share", [False, True])
    def test_an_agent_sees_its_own_member_and_the_critic_sees_all(self, share):
        agent = MAPPOAgent(AgentConfig(share_actors=share, **SMALL))
        assert isinstance(agent, Policy)
        params = undecided_no_more(agent.init(jax.random.key(0), DIMS))
        assert params["actor"]["w1"].ndim == (2 if share else 3)
        before = observe()
        distribution, value = agent.apply(params, before)
        assert (distribution.concentration.shape, value.shape) == ((7, 3), (7,))
        for k in range(3):
            hidden = tuple(
                h + 1.0 * (j == k) * jnp.sign(h) * jnp.arange(h.shape[1], dtype=jnp.float32)[None]
                for j, h in enumerate(before.hidden)
            )
            stats_k = before.stats.at[:, k].add(0.5)
            for changed in (before._replace(hidden=hidden), before._replace(stats=stats_k)):
                other, other_value = agent.apply(params, changed)
                moved = np.any(~np.isclose(other.concentration, distribution.concentration, rtol=1e-4), axis=0)
                assert moved.tolist() == [j == k for j in range(3)]
                assert np.all(other_value != value)
        other, _ = agent.apply(params, before._replace(span=(before.span + 1) % 3))
        assert np.all(~np.isclose(other.concentration, distribution.concentration, rtol=1e-5))

    def test_shared_actors_still_tell_members_apart(self):
        agent = MAPPOAgent(AgentConfig(reads=("stats",), share_actors=True, **SMALL))
        params = undecided_no_more(agent.init(jax.random.key(0), DIMS))
        same = observe()._replace(stats=jnp.ones((7, 3, 4)))
        alpha = np.asarray(agent.apply(params, same)[0].concentration)
        assert len(np.unique(alpha[0].round(4))) == 3

    def test_settings(self, raises_input_error):
        raises_input_error(lambda: MAPPOConfig(agent=AgentConfig(reads=("span",))), "hidden, stats or prompt")
        raises_input_error(lambda: MAPPOConfig(agent=AgentConfig(distribution="logistic_normal")), "Dirichlet")
        raises_input_error(lambda: AgentConfig(distribution="beta"), "logistic_normal")
        raises_input_error(lambda: AgentConfig(span_lengths=(2, 2)), "span_lengths")
        raises_input_error(lambda: PPOConfig(schedule="step"), "constant, linear, cosine")


def test_the_loss_of_several_agents_equals_loops():
    rng = np.random.default_rng(0)
    m, n, clip = 40, 3, 0.2
    old, new = rng.normal(0, 1, (m, n)), rng.normal(0, 1, (m, n))
    new = old + 0.3 * new
    advantage, value, old_value, target, entropy = rng.normal(0, 1, (5, m))
    mask = rng.random(m) < 0.7
    arrays = [jnp.asarray(x, jnp.float32) for x in (new, old, advantage, value, old_value, target, entropy)]
    weights = {"value_clip": 0.2, "value_weight": 0.5, "entropy_weight": 0.01}
    loss = ppo_loss(*arrays, jnp.asarray(mask), clip=clip, **weights)
    surrogate, kl, clipped = [], [], []
    for i in np.flatnonzero(mask):
        for k in range(n):
            ratio = np.exp(new[i, k] - old[i, k])
            bounded = min(max(ratio, 1 - clip), 1 + clip)
            surrogate.append(min(ratio * advantage[i], bounded * advantage[i]))
            kl.append(ratio - 1 - np.log(ratio))
            clipped.append(abs(ratio - 1) > clip)
    assert float(loss.policy) == pytest.approx(-np.mean(surrogate), rel=1e-4)
    assert float(loss.approx_kl) == pytest.approx(n * np.mean(kl), rel=1e-4)  # of the joint action: summed over agents
    assert float(loss.clip_fraction) == pytest.approx(np.mean(clipped), rel=1e-4)
    alone = ppo_loss(*[x[:, 0] if x.ndim == 2 else x for x in arrays], jnp.asarray(mask), clip=clip, **weights)
    one = ppo_loss(*[x[:, :1] if x.ndim == 2 else x for x in arrays], jnp.asarray(mask), clip=clip, **weights)
    np.testing.assert_allclose(alone, one, rtol=1e-6)


B, N = 6, 8
READING = {"projection": 6, "span_embedding": 4, "ffn_width": 16}


@pytest.fixture(scope="module")
def pair(make_lm):
    return rj.Ensemble([make_lm(2, sharpness=3.0, layers=1), make_lm(3, sharpness=3.0, layers=1)], end_ids=(7,))


def make_batch(seeds=1):
    rng = np.random.default_rng(0)
    ids, mask = pad_rows([rng.integers(0, 23, rng.integers(2, 9)).tolist() for _ in range(seeds * B)], 8)
    return ppo.Batch(
        prompts_from_arrays(ids, mask, N), np.zeros((seeds * B, 1), np.int32), np.ones(seeds * B, np.int32)
    )


def make_spec(pair, agent, **options):
    settings = {"span_length": 2, "max_new_tokens": N, "temperature": 1.0, "sample_weights": True, "record": True}
    return pair.spec(policy=agent, **settings | options)


def block(tree, e, axis=0):
    size = jax.tree.leaves(tree)[0].shape[axis]
    return jax.tree.map(lambda leaf: jnp.take(leaf, jnp.arange(e * B, (e + 1) * B), axis=axis), tree) if size else tree


@pytest.mark.parametrize(
    "config",
    [
        MAPPOConfig(epochs=2, minibatches=2, agent=AgentConfig(**READING)),
        pytest.param(
            PPOConfig(epochs=2, minibatches=2, agent=AgentConfig(distribution="logistic_normal", **READING)),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["mappo", "logistic_normal"],
)
def test_seeds_side_by_side_learn_what_each_learns_alone(pair, config):
    seeds = np.array([4, 9], np.uint32)
    spec = make_spec(pair, ppo.make_policy(config))
    batch, iteration = make_batch(2), np.int32(0)
    together = ppo.init_learners(seeds, spec.policy, spec.dims, config)
    experience = ppo.rollout_for_text(together.params, pair.params, batch, seeds, iteration, spec, config)
    scores = np.random.default_rng(1).random(2 * B).astype(np.float32)
    states, metrics = ppo.learn_from_text(together, experience, scores, seeds, spec, config)
    for e in range(2):
        one = seeds[e : e + 1]
        alone = ppo.init_learners(one, spec.policy, spec.dims, config)
        mine = ppo.rollout_for_text(alone.params, pair.params, block(batch, e), one, iteration, spec, config)
        np.testing.assert_array_equal(mine.tokens, experience.tokens[e * B : (e + 1) * B])
        np.testing.assert_allclose(mine.action, experience.action[e * B : (e + 1) * B], rtol=1e-4, atol=1e-5)
        state, own = ppo.learn_from_text(alone, mine, scores[e * B : (e + 1) * B], one, spec, config)
        for ours, expected in zip(jax.tree.leaves(states.params), jax.tree.leaves(state.params), strict=True):
            np.testing.assert_allclose(ours[e], expected[0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(metrics["policy_loss"][e], own["policy_loss"][0], atol=1e-5)


@pytest.mark.parametrize("agent", [pytest.param(PPOAgent, marks=pytest.mark.slow), MAPPOAgent])
def test_an_agent_that_chooses_lengths_holds_its_weights_that_long(pair, agent):
    """Decisions, their first steps and their weights follow from the recorded actions; none is lost or shifted."""
    lengths = (1, 3)
    policy = agent(AgentConfig(span_lengths=lengths, **READING))
    spec = make_spec(pair, policy, scores=True)
    assert spec.spans == N
    params = policy.init(jax.random.key(0), spec.dims)
    batch = make_batch()
    state = rj.decode(pair.params, batch.prompts.ids[0], batch.prompts.mask[0], params, jax.random.key(1), spec)
    spans = state.trajectory
    distribution, value = jax.vmap(lambda observation: policy.apply(params, observation))(spans.observation)
    log_prob = jax.vmap(lambda d, action: d.log_prob(action))(distribution, spans.action)
    held = set()
    for b in range(B):
        taken = int(state.decisions.taken[b])
        first = np.cumsum([0] + [int(n) for n in spans.length[b, :taken]])
        held |= {int(n) for n in spans.length[b, :taken]}
        assert first[-2] < int(state.steps[b]) <= first[-1] or first[-1] >= N
        np.testing.assert_array_equal(spans.observation.span[b, :taken], np.arange(taken))
        np.testing.assert_allclose(spans.log_prob[b, :taken], log_prob[b, :taken], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(spans.value[b, :taken], value[b, :taken], rtol=1e-4, atol=1e-6)
        for p in range(taken):
            used = np.asarray(spans.weights[b, p])
            for step in range(first[p], min(first[p + 1], int(state.steps[b]))):
                mixed = np.log(np.sum(used * np.exp(np.asarray(state.scores.members[b, step], np.float64))))
                assert float(state.scores.fused[b, step]) == pytest.approx(mixed, abs=1e-4)
    assert held == set(lengths)
    np.testing.assert_array_equal(np.asarray(state.span_mask()).sum(axis=1), state.decisions.taken)


@pytest.mark.slow
class TestLearning:
    @pytest.fixture(scope="class")
    def parts(self, pair):
        config = PPOConfig(epochs=2, minibatches=2, agent=AgentConfig(**READING))
        spec = make_spec(pair, ppo.make_policy(config))
        seeds = np.array([1], np.uint32)
        learner = ppo.init_learners(seeds, spec.policy, spec.dims, config)
        rollout = ppo.rollout_for_text(learner.params, pair.params, make_batch(), seeds, np.int32(0), spec, config)
        scores = np.arange(B, dtype=np.float32) / B

        def learn(iteration=0, **changes):
            changed = dataclasses.replace(config, **changes)
            learner = ppo.init_learners(seeds, spec.policy, spec.dims, changed)
            learner = learner._replace(iteration=jnp.array([iteration], jnp.int32))
            return ppo.learn_from_text(learner, rollout, scores, seeds, spec, changed)

        return learn, rollout, scores, spec

    def test_accumulated_gradients_are_the_minibatchs(self, parts):
        learn, *_ = parts
        for one, two in zip(*(jax.tree.leaves(learn(accumulate=n)[0].params) for n in (1, 3)), strict=True):
            np.testing.assert_allclose(one, two, rtol=0, atol=2e-6)

    def test_updates_stop_beyond_the_target(self, parts):
        learn, *_ = parts
        whole, stopped = learn(epochs=6)[1], learn(epochs=6, target_kl=1e-4)[1]
        assert int(whole["updates"][0]) == 12
        assert 0 < int(stopped["updates"][0]) < 12

    def test_the_learning_rate_follows_its_schedule(self, parts):
        learn, *_ = parts
        settings = {"learning_rate": 0.5, "iterations": 12, "warmup": 2}
        rates = {
            schedule: [float(learn(i, schedule=schedule, **settings)[1]["learning_rate"][0]) for i in (0, 1, 2, 7, 12)]
            for schedule in ("constant", "linear", "cosine")
        }
        ramp = [0.5 / 3, 1.0 / 3, 0.5]
        np.testing.assert_allclose(rates["constant"], [*ramp, 0.5, 0.5], rtol=1e-5)
        np.testing.assert_allclose(rates["linear"], [*ramp, 0.25, 0], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(rates["cosine"], [*ramp, 0.25, 0], rtol=1e-5, atol=1e-7)

    def test_shaped_rewards_by_hand(self, parts):
        _, rollout, scores, spec = parts
        config = PPOConfig(member_cost=0.1, length_cost=0.2)
        shaped = ppo.shaped_reward(jnp.asarray(scores), rollout, spec, config)
        for b in range(B):
            used = [int(np.sum(rollout.weights[b, p] > 0.05)) - 1 for p in np.flatnonzero(rollout.mask[b])]
            expected = scores[b] - 0.1 * np.mean(used) - 0.2 * int(rollout.steps[b]) / N
            assert float(shaped[b]) == pytest.approx(expected, abs=1e-6)

    def test_samples_of_a_prompt_are_rows_of_their_own(self, pair, parts):
        *_, spec = parts
        config = PPOConfig(samples=3, agent=AgentConfig(**READING))
        seeds = np.array([1], np.uint32)
        learner = ppo.init_learners(seeds, spec.policy, spec.dims, config)
        rollout = ppo.rollout_for_text(learner.params, pair.params, make_batch(), seeds, np.int32(0), spec, config)
        assert rollout.tokens.shape == (3 * B, N)
        first = rollout.observation.hidden[0][:, 0].reshape(B, 3, -1)
        np.testing.assert_allclose(first[:, 0], first[:, 2], atol=1e-5)  # one prompt
        assert np.all(
            np.any(np.asarray(rollout.action[:, 0]).reshape(B, 3, -1)[:, 0] != rollout.action[2::3, 0], axis=1)
        )
        batch = make_batch()._replace(references=np.asarray(rollout.tokens[::3, :1]))
        assert jax.jit(ppo.exact_tokens)(rollout, batch).shape == (3 * B,)
