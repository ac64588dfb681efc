"""One PPO iteration: rollouts, rewards from tokens, updates that agree with what was recorded, and learning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax.config import AgentConfig, PPOConfig
from rlae_jax.fusion.codec import decode_texts
from rlae_jax.fusion.policy import Dims, Observation
from rlae_jax.fusion.prompts import pad_rows, prompts_from_arrays
from rlae_jax.ppo import iteration as ppo
from rlae_jax.ppo.agent import PPOAgent
from rlae_jax.tasks.rewards import exact_match
from tests.helpers import toys
from tests.helpers.tolerance import on_device

B, N = 12, 9
SEEDS = np.array([5], np.uint32)
AGENT = PPOAgent(AgentConfig(projection=6, span_embedding=4, ffn_width=16))
CONFIG = PPOConfig(epochs=2, minibatches=3, prompts=B, agent=AGENT.config)
# The agent's own products have the backend's default precision: TF32 on a GPU, one pass of bfloat16 on a TPU.
AGENT_TOLERANCE = 1e-2


@pytest.fixture(scope="module")
def pair(make_lm):
    narrow = make_lm(3, sharpness=3.0, width=12, layers=1, heads=2, kv_heads=1, head_width=6)
    return rj.Ensemble([make_lm(2, sharpness=3.0, layers=1), narrow], end_ids=(7, 18, 2))


@pytest.fixture(scope="module")
def spec(pair):
    return pair.spec(policy=AGENT, span_length=2, max_new_tokens=N, temperature=1.0, sample_weights=True, record=True)


@pytest.fixture(scope="module")
def fresh(spec):
    """fresh() -> a learner's first state, alone in its axis; the programs take their argument's buffers."""
    return lambda: ppo.init_learners(np.array([3], np.uint32), AGENT, spec.dims, CONFIG)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return pad_rows([rng.integers(0, 23, rng.integers(2, 9)).tolist() for _ in range(B)], 8)


def make_batch(prompts, references=None):
    references = [[0]] * B if references is None else references
    padded = np.zeros((B, max(map(len, references)) or 1), np.int32)
    for b, row in enumerate(references):
        padded[b, : len(row)] = row
    return ppo.Batch(prompts_from_arrays(*prompts, N), padded, np.array([len(row) for row in references], np.int32))


@pytest.fixture(scope="module")
def experience(pair, spec, fresh, prompts):
    return ppo.rollout_for_text(fresh().params, pair.params, make_batch(prompts), SEEDS, np.int32(0), spec, CONFIG)


def written(experience, b):
    return np.asarray(experience.tokens)[b, : int(experience.steps[b]) - int(experience.ended[b])].tolist()


class TestRollout:
    def test_shapes(self, experience, pair, spec):
        p = spec.spans
        assert p == 5
        assert [h.shape for h in experience.observation.hidden] == [(B, p, width) for width in pair.widths]
        assert experience.observation.stats.shape == (B, p, 2, 4)
        assert experience.action.shape == (B, p, 2)
        assert {x.shape for x in (experience.log_prob, experience.value, experience.mask)} == {(B, p)}
        assert experience.tokens.shape == (B, N)

    def test_the_mask_marks_the_decisions_that_were_taken(self, experience):
        steps = np.asarray(experience.steps)
        np.testing.assert_array_equal(experience.mask, np.arange(5)[None] * 2 < steps[:, None])
        assert len(set(steps.tolist())) >= 3  # rows of several lengths, or this module proves little
        assert 0 < np.mean(np.asarray(experience.ended)) < 1 or np.all(experience.ended)

    def test_weights_are_drawn_anew_for_each_row_and_span(self, experience):
        weights = np.asarray(experience.action)[np.asarray(experience.mask)]
        np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=1e-5)
        assert len(np.unique(weights[:, 0])) == len(weights)

    @pytest.mark.device
    def test_recorded_decisions_are_those_of_the_policy(self, experience, fresh):
        """The ratio of the first minibatch is 1: nothing is lost or shifted between rollout and update."""
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), experience)
        distribution, value = jax.jit(AGENT.apply)(jax.tree.map(lambda leaf: leaf[0], fresh().params), flat.observation)
        mask = np.asarray(flat.mask)
        assert mask.sum() > B
        log_prob = distribution.log_prob(flat.action)
        np.testing.assert_allclose(log_prob[mask], flat.log_prob[mask], atol=on_device(1e-5, AGENT_TOLERANCE))
        np.testing.assert_allclose(value[mask], flat.value[mask], atol=on_device(1e-6, AGENT_TOLERANCE))

    def test_the_seed_and_the_iteration_decide(self, pair, spec, fresh, prompts, experience):
        def weights(seed, iteration):
            again = ppo.rollout_for_text(
                *(fresh().params, pair.params, make_batch(prompts)),
                *(np.array([seed], np.uint32), np.int32(iteration), spec, CONFIG),
            )
            return np.asarray(again.action[:, 0])

        first = np.asarray(experience.action[:, 0])
        np.testing.assert_array_equal(weights(5, 0), first)
        assert np.all(weights(6, 0) != first)
        assert np.all(weights(5, 1) != first)

    def test_keys_of_iterations_and_purposes_differ(self):
        drawn = {
            str(jax.random.key_data(key).tolist())
            for seed in (0, 1)
            for i in range(4)
            for key in ppo.iteration_keys(jnp.uint32(seed), jnp.int32(i))
        }
        assert len(drawn) == 16


class TestExactTokens:
    def score(self, tokens, steps, ended, references):
        experience = ppo.Rollout(*[None] * 6, *map(jnp.asarray, (tokens, steps, ended)))
        width = max(map(len, references))
        padded = np.array([[*row, *[0] * (width - len(row))] for row in references], np.int32)
        batch = ppo.Batch(None, padded, np.array([len(row) for row in references]))
        return ppo.exact_tokens(experience, batch).tolist()

    def test_by_hand(self):
        cases = [  # tokens, steps, ended by an end token (9), reference, score
            ([1, 2, 9, 0], 3, True, [1, 2], 1.0),
            ([1, 3, 9, 0], 3, True, [1, 2], 0.0),
            ([1, 2, 9, 0], 3, True, [1, 2, 3], 0.0),  # too short
            ([1, 2, 3, 9], 4, True, [1, 2], 0.0),  # too long
            ([1, 2, 3, 4], 4, False, [1, 2, 3, 4], 0.0),  # cut off by the length
            ([1, 2, 3, 9], 4, True, [1, 2, 3], 1.0),
            ([9, 0, 0, 0], 1, True, [], 1.0),
            ([0, 0, 9, 0], 3, True, [0], 0.0),  # id 0 is a token like any other
            ([0, 9, 0, 0], 2, True, [0], 1.0),
            ([1, 2, 3, 9], 4, True, [1, 2, 3, 9, 5, 6], 0.0),  # longer than any answer can be
        ]
        tokens, steps, ended, references, expected = zip(*cases, strict=True)
        assert self.score(tokens, steps, ended, references) == list(expected)

    def test_the_text_gives_the_same_score(self, make_tokenizer):
        tokenizer = make_tokenizer(toys.CHARACTERS)
        rng = np.random.default_rng(0)
        answers = [rng.integers(0, 3, rng.integers(1, 4)).tolist() for _ in range(300)]
        references = [row if rng.random() < 0.3 else rng.integers(0, 3, rng.integers(1, 4)).tolist() for row in answers]
        tokens = np.array([[*row, toys.END, *[0] * (3 - len(row))] for row in answers])
        steps = np.array([len(row) + 1 for row in answers])
        scores = self.score(tokens, steps, np.ones(300, bool), references)
        texts = decode_texts(tokenizer, [[0]] * 300, answers)
        expected = [exact_match(t, r) for t, r in zip(texts, tokenizer.batch_decode(references), strict=True)]
        assert scores == expected
        assert 0.2 < np.mean(scores) < 0.8


class TestUpdates:
    @pytest.mark.slow
    @pytest.mark.device
    def test_the_whole_program_equals_its_two_halves(self, pair, spec, fresh, prompts, experience):
        references = [written(experience, b) if b % 2 else [1, 1] for b in range(B)]
        batch = make_batch(prompts, references)
        whole, metrics = ppo.iterate(fresh(), pair.params, batch, SEEDS, spec, CONFIG)
        scores = jax.jit(ppo.exact_tokens)(experience, batch)
        assert 0 < np.mean(scores) < 1
        halves, other = ppo.learn_from_text(fresh(), experience, np.asarray(scores), SEEDS, spec, CONFIG)
        assert int(whole.iteration[0]) == int(halves.iteration[0]) == 1
        # Adam takes a whole step, whatever the size of a gradient that rounding decides.
        rtol, atol = on_device(1e-5, AGENT_TOLERANCE), on_device(1e-6, 2 * 6 * CONFIG.learning_rate)
        for one, two in zip(jax.tree.leaves(whole), jax.tree.leaves(halves), strict=True):
            np.testing.assert_allclose(one, two, rtol=rtol, atol=atol)
        rtol, atol = on_device(1e-4, 10 * AGENT_TOLERANCE), on_device(1e-5, 10 * AGENT_TOLERANCE)
        for name, value in metrics.items():
            np.testing.assert_allclose(value, other[name], rtol=rtol, atol=atol, err_msg=name)
        np.testing.assert_allclose(metrics["reward"], np.mean(scores))
        np.testing.assert_allclose(metrics["steps"], np.mean(experience.steps))
        before = jax.tree.leaves(fresh().params)
        for one, two in zip(jax.tree.leaves(whole.params), before, strict=True):
            assert np.any(np.asarray(one != two))

    @pytest.mark.device
    def test_a_first_and_only_minibatch_sees_the_policy_that_acted(self, spec, fresh, experience):
        config = PPOConfig(epochs=1, minibatches=1, agent=AGENT.config)
        scores = np.arange(B, dtype=np.float32) / B
        _, metrics = ppo.learn_from_text(fresh(), experience, scores, SEEDS, spec, config)
        assert abs(float(metrics["approx_kl"][0])) < on_device(1e-6, AGENT_TOLERANCE**2)
        assert float(metrics["clip_fraction"][0]) == 0
        np.testing.assert_allclose(
            metrics["policy_loss"], 0.0, atol=on_device(1e-5, AGENT_TOLERANCE)
        )  # the advantages' mean
        assert np.isfinite(list(metrics.values())).all()

    def test_what_lies_after_a_rows_end_does_not_matter(self, spec, fresh, experience):
        scores = np.arange(B, dtype=np.float32) / B
        expected, _ = ppo.learn_from_text(fresh(), experience, scores, SEEDS, spec, CONFIG)
        mask = np.asarray(experience.mask)

        def spoil(leaf):
            return jnp.where(mask.reshape(*mask.shape, *[1] * (leaf.ndim - 2)), leaf, jnp.asarray(3, leaf.dtype))

        spoilt = experience._replace(
            observation=jax.tree.map(spoil, experience.observation),
            action=spoil(experience.action),
            weights=spoil(experience.weights),
            log_prob=spoil(experience.log_prob),
            value=spoil(experience.value),
        )
        found, _ = ppo.learn_from_text(fresh(), spoilt, scores, SEEDS, spec, CONFIG)
        for one, two in zip(jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.device
def test_ppo_solves_two_arms_that_the_hidden_state_tells_apart():
    """The reward is the weight of the arm that member 0's hidden state names; no language model is involved."""
    rows, width = 128, 4
    agent = PPOAgent(AgentConfig(reads=("hidden",), projection=4, ffn_width=16))
    dims = Dims((width, width), 1)
    config = PPOConfig(epochs=4, minibatches=2, learning_rate=1e-2, agent=agent.config)
    spec = rj.DecodeSpec(members=(), policy=agent)

    @jax.jit
    def step(state, key):
        arm_key, row_key, learn_key = jax.random.split(key, 3)
        arm = jax.random.bernoulli(arm_key, shape=(rows,)).astype(jnp.int32)
        named = jnp.where(arm[:, None] == 1, jnp.ones(width), jnp.array([1.0, -1.0, 1.0, -1.0]))
        observation = Observation((named, jnp.ones((rows, width))), (), ())
        distribution, value = agent.apply(state.params, observation)
        weights = distribution.sample(jax.random.split(row_key, rows))
        score = jnp.take_along_axis(weights, arm[:, None], axis=1)[:, 0]
        experience = ppo.Rollout(
            jax.tree.map(lambda leaf: leaf[:, None], observation),
            weights[:, None],
            weights[:, None],
            distribution.log_prob(weights)[:, None],
            value[:, None],
            jnp.ones((rows, 1), bool),
            jnp.zeros((rows, 1), jnp.int32),
            jnp.ones(rows, jnp.int32),
            jnp.ones(rows, bool),
        )
        mode = jnp.take_along_axis(distribution.mode(), arm[:, None], axis=1)
        return ppo.learn(state, experience, score, learn_key, spec, config)[0], jnp.mean(mode)

    state = ppo.init_learner(jax.random.key(0), agent, dims, config)
    means = []
    for i in range(50):
        state, mean = step(state, jax.random.key(i))
        means.append(float(mean))
    assert means[0] == pytest.approx(0.5, abs=0.05)
    assert means[-1] > 0.95
