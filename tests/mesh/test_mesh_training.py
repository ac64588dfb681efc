"""Training on a mesh is training on one device: the same rollouts, and updates within 1e-5."""

import warnings

import jax
import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax import sharding
from rlae_jax.config import AgentConfig, MAPPOConfig, PPOConfig
from rlae_jax.emorl import fine_tune
from rlae_jax.emorl.fine_tune import EMORLConfig
from rlae_jax.emorl.fused import Fused
from rlae_jax.fusion.policy import Dims
from rlae_jax.fusion.prompts import pad_rows, prompts_from_arrays
from rlae_jax.models import LoraConfig
from rlae_jax.ppo import iteration as ppo
from tests.helpers.adapters import random_adapter

N = 6


def on(mesh, lm):
    if mesh is None:
        return lm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lm.on_mesh(mesh)


def difference(one, other):
    """The largest between two trees."""
    pairs = zip(jax.tree.leaves(jax.device_get(one)), jax.tree.leaves(jax.device_get(other)), strict=True)
    return max(float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)))) for a, b in pairs)


@pytest.fixture(scope="module")
def pair(make_wide):
    return make_wide(2, sharpness=2.0, end_ids=(4,)), make_wide(3, layers=1, sharpness=2.0, end_ids=(4,))


def _dims(members):
    return Dims(tuple(lm.config.hidden_width for lm in members), N // 2)


AGENT = AgentConfig(projection=6, span_embedding=4, ffn_width=16)
SET = AgentConfig.of_set(projection=6, span_embedding=4, ffn_width=16)
# A minibatch of 11 samples is divided by no mesh.
CASES = {
    "ppo": (PPOConfig(epochs=2, minibatches=2, prompts=8, samples=2, agent=AGENT, learning_rate=3e-3), [5]),
    "engine": (PPOConfig(epochs=2, minibatches=2, prompts=8, agent=AGENT, engine=True, slots=4), [5, 6]),
    "set": (PPOConfig(epochs=1, minibatches=2, prompts=8, agent=SET, learning_rate=3e-3), [5]),
    "mappo-two-seeds": (MAPPOConfig(epochs=1, minibatches=4, prompts=8, agent=AGENT, accumulate=2), [5, 6]),
}


@pytest.mark.parametrize(
    "case", ["ppo", "mappo-two-seeds", *(pytest.param(c, marks=pytest.mark.rare) for c in ("engine", "set"))]
)
def test_an_agent_learns_the_same(pair, mesh, case):
    """An iteration as one program, and one around a reward in Python."""
    config, seeds = CASES[case]
    seeds = np.array(seeds, np.uint32)
    rng = np.random.default_rng(0)
    rows = 8 * len(seeds)
    ids, mask = pad_rows([rng.integers(5, 24, rng.integers(2, 8)).tolist() for _ in range(rows)], 8)
    references = rng.integers(5, 24, (rows, 1)).astype(np.int32)
    host = jax.tree.map(np.asarray, ppo.Batch(prompts_from_arrays(ids, mask, N), references, np.ones(rows, np.int32)))
    policy = ppo.make_policy(config)

    def train(where):
        ensemble = rj.Ensemble([on(where, lm) for lm in pair])
        spec = ensemble.spec(
            policy=policy, span_length=2, max_new_tokens=N, temperature=1.0, sample_weights=True, record=True
        )
        state = sharding.whole(ppo.init_learners(seeds, policy, spec.dims, config), where)
        batch = sharding.place_rows(host, where)
        with sharding.use(where):
            if case != "mappo-two-seeds":
                state, metrics = ppo.iterate(state, ensemble.params, batch, seeds, spec, config)
            else:
                rollout = ppo.rollout_for_text(state.params, ensemble.params, batch, seeds, np.int32(1), spec, config)
                scores = (np.asarray(rollout.tokens) % 3 == 0).mean(axis=1, dtype=np.float32)
                state, metrics = ppo.learn_from_text(state, rollout, scores, seeds, spec, config)
        assert where is None or all(leaf.is_fully_replicated for leaf in jax.tree.leaves(state))
        return state, metrics

    learnt, wanted = train(mesh), train(None)
    assert difference(learnt, wanted) < 1e-5
    assert difference(wanted[0].params, ppo.init_learners(seeds, policy, _dims(pair), config).params) > 1e-3


@pytest.mark.parametrize("algorithm", ["scst", pytest.param("ppo", marks=pytest.mark.rare)])
def test_adapters_learn_the_same(make_wide, mesh, algorithm):
    lm = make_wide(0, layers=1, sharpness=3.0, end_ids=(4, 6))
    m, b, k = 3, 8, 2
    small = LoraConfig(rank=2, dropout=0.2)
    config = EMORLConfig(algorithm=algorithm, lora=small, batch=b, samples=k, max_new_tokens=N, learning_rate=1e-3)
    seeds = np.arange(m, dtype=np.uint32)
    rng = np.random.default_rng(1)
    ids, mask = pad_rows([rng.integers(0, 23, rng.integers(2, 8)).tolist() for _ in range(m * b)], 8)
    host = jax.tree.map(np.asarray, prompts_from_arrays(ids, mask, N))

    def train(where):
        base = on(where, lm)
        spec = rj.Ensemble([base.with_adapters([rj.init_adapter(base, config.lora)])]).spec(
            max_new_tokens=N, temperature=1.0
        )
        state = fine_tune.join([fine_tune.begin(base.config, config, int(seed)) for seed in seeds])
        state = sharding.whole(state, where)
        prompts = sharding.place_rows(host, where)
        with sharding.use(where):
            for _ in range(2):
                samples = fine_tune.sample(base.params, state, prompts, seeds, spec, config)
                rewards = (np.asarray(samples.tokens) % 5 == 0).mean(axis=1, dtype=np.float32).reshape(m, -1)
                state, metrics = fine_tune.update(
                    base.params, state, prompts, samples, rewards, seeds, base.config, config
                )
        return np.asarray(samples.tokens), state, metrics

    (tokens, *learnt), (expected, *wanted) = train(mesh), train(None)
    np.testing.assert_array_equal(tokens, expected)
    assert difference(learnt, wanted) < 1e-5


@pytest.mark.parametrize("mode", ["hidden", "params"])
def test_points_of_a_search_answer_the_same(make_wide, mesh, mode):
    """Three prompts, which no mesh divides; some members have no say at some points."""
    lm = make_wide(0, layers=1, sharpness=3.0, end_ids=(6, 18))
    adapters = [random_adapter(lm, m, rank=2) for m in range(3)]
    points = np.array([[0.2, 0.9, 0.4], [1.0, 0.0, 0.3], [0.0, 0.7, 0.1], [1.0, 1.0, 0.0], [0.5, 0.0, 0.0]])

    def answer(where):
        decoder = Fused(on(where, lm), adapters, mode).prepare([[3, 1, 4], [9], [2, 6, 5]], max_new_tokens=N)
        return decoder.decode(points)

    got, want = answer(mesh), answer(None)
    for name in ("tokens", "steps", "ended"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
