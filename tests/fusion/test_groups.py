"""A batch that is decoded in groups of rows: the same answers as all at once."""

import jax
import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax.config import AgentConfig, PPOConfig
from rlae_jax.evaluation.policies import Replay
from rlae_jax.fusion import decode as decoding
from rlae_jax.fusion.policy import BoundPolicy, Dims, slice_rows
from rlae_jax.fusion.prompts import Prompts, pad_rows, prompts_from_arrays
from rlae_jax.ppo import iteration as ppo
from rlae_jax.ppo.agent import PPOAgent
from tests.helpers.tokenizers import byte_level

ROWS, N, L = 12, 7, 2
AGENT = PPOAgent(AgentConfig(projection=6, span_embedding=4, ffn_width=16))
LETTERS = "abcdefghij"


@pytest.fixture(autouse=True)
def _fresh_programs():
    """Programs do not know that the number of groups was patched."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture
def both(monkeypatch):
    """both(call) -> its result with all rows at once, and with four groups."""

    def run(call):
        asked = []
        results = []
        for groups in (1, 4):
            monkeypatch.setattr(decoding, "_row_groups", lambda *args, groups=groups: asked.append(groups) or groups)
            jax.clear_caches()
            results.append(call())
        assert set(asked) == {1, 4}
        return results

    return run


@pytest.fixture
def pair(make_lm):
    narrow = make_lm(3, sharpness=3.0, width=12, layers=1, heads=2, kv_heads=1, head_width=6)
    return rj.Ensemble([make_lm(2, sharpness=3.0, layers=1), narrow], end_ids=(7, 18, 2))


@pytest.fixture
def prompts():
    rng = np.random.default_rng(0)
    return pad_rows([rng.integers(0, 23, rng.integers(2, 9)).tolist() for _ in range(ROWS)], 8)


def assert_same(one, other):
    """Ids and counts exactly, figures to rounding."""
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape
        if a.dtype.kind == "f":
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
        else:
            np.testing.assert_array_equal(a, b)


def test_weights_limits_and_scores_belong_to_rows(both, pair, prompts):
    weights = np.random.default_rng(1).dirichlet(np.ones(2), ROWS).astype(np.float32)
    ids, mask = prompts

    def generate():
        return pair.generate(
            prompt_ids=ids,
            prompt_mask=mask,
            weights=weights,
            samples=2,
            temperature=1.0,
            scores=True,
            seed=4,
            max_new_tokens=[1 + i % N for i in range(ROWS)],
        )

    one, other = both(generate)
    assert one.tokens == other.tokens
    assert one.finish_reasons == other.finish_reasons
    assert_same(
        (one.weights, one.scores, one.member_scores, one.steps),
        (other.weights, other.scores, other.member_scores, other.steps),
    )


def test_replayed_weights_and_an_agents_belong_to_rows(both, pair, prompts):
    ids, mask = prompts
    dims = Dims(pair.widths, -(-N // L))
    of_rows = np.random.default_rng(2).dirichlet(np.ones(2), (ROWS, dims.spans)).astype(np.float32)
    agent = AGENT.init(jax.random.key(1), dims)
    for policy in (BoundPolicy(Replay(), of_rows, dims, L), BoundPolicy(AGENT, agent, dims, L, sample=True)):
        one, other = both(
            lambda policy=policy: pair.generate(
                prompt_ids=ids, prompt_mask=mask, weights=policy, max_new_tokens=N, ignore_eos=True
            )
        )
        assert one.tokens == other.tokens
        assert_same(one.weights, other.weights)


@pytest.mark.parametrize("agents", [1, 2])
def test_rollouts_of_agents_side_by_side(both, pair, prompts, agents):
    config = PPOConfig(prompts=ROWS // agents, samples=2, agent=AGENT.config, seeds=agents)
    spec = pair.spec(policy=AGENT, span_length=L, max_new_tokens=N, temperature=1.0, sample_weights=True, record=True)
    seeds = np.arange(agents, dtype=np.uint32)
    batch = ppo.Batch(prompts_from_arrays(*prompts, N), np.zeros((ROWS, 1), np.int32), np.ones(ROWS, np.int32))
    state = ppo.init_learners(seeds, AGENT, spec.dims, config)
    one, other = both(lambda: ppo.rollout_for_text(state.params, pair.params, batch, seeds, np.int32(0), spec, config))
    mask = np.asarray(one.mask)
    assert mask.shape == (2 * ROWS, spec.spans)
    assert_same((one.tokens, one.steps, one.ended, one.mask), (other.tokens, other.steps, other.ended, other.mask))
    recorded = [(r.observation, r.action, r.weights, r.log_prob, r.value) for r in (one, other)]
    taken = [jax.tree.map(lambda leaf: np.asarray(leaf)[mask], part) for part in recorded]
    assert_same(*taken)


@pytest.mark.rare
def test_different_tokenizers(both, make_lm):
    tokenizers = [byte_level([]), byte_level([b"ab", b"cd", b"abc"])]
    for tokenizer in tokenizers:
        tokenizer.add_special_tokens({"eos_token": "<end>"})
    members = [
        make_lm(k, vocab=len(t), tokenizer=t, name=f"m{k}", end_ids=(len(t) - 1,), layers=1, sharpness=3.0)
        for k, t in enumerate(tokenizers)
    ]
    ensemble = rj.Ensemble(members)
    weights = np.random.default_rng(1).dirichlet(np.ones(2), ROWS).astype(np.float32)
    texts = [(LETTERS[i % 10] + LETTERS[: 1 + i % 4]) for i in range(ROWS)]
    one, other = both(lambda: ensemble.generate(texts, weights, max_new_tokens=N, temperature=1.0))
    assert one.texts == other.texts


class TestHowMany:
    def groups(self, pair, rows, params=None, samples=1, agents=1):
        policy = AGENT if agents == 1 else ppo.AgentsInBlocks(AGENT, agents)
        spec = pair.spec(policy=policy, max_new_tokens=32)
        shape = jax.ShapeDtypeStruct((rows, 32), np.int32)
        flag = jax.ShapeDtypeStruct((rows,), bool)
        batch = Prompts((shape,), (shape,), None, flag, flag)
        return decoding._row_groups(pair.params if params is None else params, batch, spec, samples)

    def test_as_many_as_bring_keys_and_values_into_the_cache(self, pair, monkeypatch):
        weights = sum(leaf.size * 4 for leaf in jax.tree.leaves(pair.params))
        of_row = sum(2 * lm.config.layers * lm.config.kv_heads * lm.config.head_width * 64 * 4 for lm in pair.members)
        monkeypatch.setattr(decoding, "_CACHED_BYTES", weights + 64 * of_row)
        assert [self.groups(pair, rows) for rows in (32, 64, 96, 128, 256)] == [1, 1, 2, 2, 4]
        assert self.groups(pair, 128, samples=2) == 4
        assert self.groups(pair, 192, agents=3) == 3
        assert self.groups(pair, 384, agents=3) == 6
        monkeypatch.setattr(decoding, "_CACHED_BYTES", weights + 16 * of_row)
        assert self.groups(pair, 256) == 1  # groups would be too small
        monkeypatch.setattr(decoding, "_CACHED_BYTES", weights - 1)
        assert self.groups(pair, 256) == 1  # weights that are read anew for every group

    def test_not_on_an_accelerator_and_not_with_adapters(self, pair, monkeypatch):
        monkeypatch.setattr(decoding, "_CACHED_BYTES", 10**5)
        monkeypatch.setattr(decoding, "_LEAST_ROWS", 1)
        assert self.groups(pair, 4096) > 1
        assert self.groups(pair, 4096, params=(pair.params[0], ())) == 1
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
        assert self.groups(pair, 4096) == 1


def test_a_policy_says_which_of_its_parameters_are_of_which_rows():
    params = {"a": np.arange(6.0).reshape(3, 2)}
    policy, own = slice_rows(ppo.AgentsInBlocks(AGENT, 3), params, 8, 4, 12)
    assert policy == ppo.AgentsInBlocks(AGENT, 1)
    np.testing.assert_array_equal(own["a"], [[4, 5]])
    with pytest.raises(ValueError, match="more than one"):
        slice_rows(ppo.AgentsInBlocks(AGENT, 3), params, 0, 6, 12)
    assert slice_rows(AGENT, params, 0, 4, 12) == (AGENT, params)
    weights = np.arange(8.0).reshape(4, 2)
    np.testing.assert_array_equal(slice_rows(rj.fusion.policy.Fixed(), weights, 1, 2, 4)[1], weights[1:3])
