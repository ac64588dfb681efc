"""Every compiled program lowers for cpu, cuda and tpu, from any machine."""

import dataclasses

import jax
import jax.export
import jax.numpy as jnp
import pytest

import rlae_jax as rj
from rlae_jax.config import AgentConfig, MAPPOConfig, PPOConfig
from rlae_jax.fusion.decode import decode_spans, prefill
from rlae_jax.fusion.policy import Confidence, Dims, Draw, Fixed
from rlae_jax.fusion.prompts import prompts_from_arrays
from rlae_jax.ppo import iteration as ppo
from rlae_jax.ppo.agent import PPOAgent
from tests.helpers.recurrent import FIELDS
from tests.helpers.tokenizers import byte_level, sentencepiece

PLATFORMS = ("cpu", "cuda", "tpu")


def assert_lowers(function, *args):
    shapes = jax.eval_shape(lambda *args: args, *args)
    exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(*shapes)
    assert exported.platforms == PLATFORMS
    return exported


@pytest.fixture(scope="module")
def ensemble(make_lm):
    return rj.Ensemble([make_lm(0), make_lm(1, width=12, layers=1, heads=2, kv_heads=1, head_width=6)], end_ids=(4,))


def inputs(ensemble, batch=4, width=8):
    ids = jnp.ones((batch, width), jnp.int32)
    return ensemble.params, ids, jnp.ones_like(ids), jax.random.key(0)


SAMPLED = {"temperature": 0.7, "top_k": 5, "top_p": 0.9}


@pytest.mark.parametrize(
    ("policy", "fusion", "options"),
    [
        pytest.param(Fixed(), "linear", {}, marks=pytest.mark.device),
        (Fixed(), "loglinear", SAMPLED),
        (Confidence(), "loglinear", {}),
        (Confidence(), "linear", SAMPLED),
    ],
    ids=["fixed-greedy", "fixed-sampled", "confidence-greedy", "confidence-sampled"],
)
def test_prefill_and_decode(ensemble, policy, fusion, options):
    spec = rj.Ensemble(ensemble.members, fusion, end_ids=(4,)).spec(max_new_tokens=6, policy=policy, **options)
    params, ids, mask, key = inputs(ensemble)
    policy_params = policy.init(key, Dims(ensemble.widths, spec.spans))
    if isinstance(policy, Fixed):
        policy_params = jnp.tile(policy_params, (len(ids), 1))
    exported = assert_lowers(lambda *args: rj.decode(*args, spec).tokens, params, ids, mask, policy_params, key)
    assert exported.out_avals[0].shape == (4, 6)

    prompts = prompts_from_arrays(ids, mask, 6, key)
    state = jax.eval_shape(lambda *args: prefill(*args, spec), params, prompts)
    assert_lowers(lambda *args: prefill(*args, spec).caches, params, prompts)
    assert_lowers(lambda *args: decode_spans(*args, spec).tokens, params, state, policy_params)


@pytest.fixture(scope="module")
def mixed(make_lm):
    """A byte-level tokenizer and a SentencePiece-like one."""
    tokenizers = [byte_level([b" the", b"th"], ["</s>"]), sentencepiece(["▁the", "é"])]
    members = []
    for seed, tokenizer in enumerate(tokenizers):
        end = (tokenizer.eos_token_id,)
        members.append(make_lm(seed, layers=1, vocab=len(tokenizer) + seed, tokenizer=tokenizer, end_ids=end))
    return members


@pytest.mark.parametrize(
    ("policy", "fusion", "options"),
    [
        (Fixed(), "linear", SAMPLED | {"min_p": 0.1, "repetition_penalty": 1.2, "scores": True}),
        (Fixed(), "topk:3", {}),
        (Draw(), "linear", {"temperature": 1.0}),
    ],
    ids=["linear-sampled", "topk-greedy", "draw"],
)
def test_members_with_different_tokenizers(mixed, policy, fusion, options):
    ensemble = rj.Ensemble(mixed, fusion)
    assert ensemble.union is not None
    lower_mixed(ensemble, policy, options)


def test_members_with_states(make_lm):
    """In lockstep, and at their own pace."""
    pair = rj.Ensemble([make_lm(0, **fields) for fields in FIELDS.values()], end_ids=(4,))
    params, ids, mask, key = inputs(pair)
    spec = pair.spec(max_new_tokens=6)
    assert_lowers(lambda *args: rj.decode(*args, spec).tokens, params, ids, mask, jnp.full((4, 2), 0.5), key)
    spec = pair.spec(max_new_tokens=6, policy=Draw(), sample_weights=True, temperature=1.0)
    rows = ((ids,) * 2, (mask,) * 2, jnp.full((4, 2), 0.5), key)
    assert_lowers(lambda *args: rj.decode(*args).tokens, params, *rows, spec)


def test_drawn_members_with_one_tokenizer(ensemble):
    lower_mixed(ensemble, Draw(), {"temperature": 1.0})


def lower_mixed(ensemble, policy, options):
    """Prefill, the loop up to a step, both in one; the tables of a union vocabulary are data."""
    drawn = isinstance(policy, Draw)
    spec = ensemble.spec(max_new_tokens=6, span_length=2, policy=policy, sample_weights=drawn, **options)
    ids = tuple(jnp.ones((4, width), jnp.int32) for width in (8, 8 if ensemble.union is None else 12))
    mask = jax.tree.map(jnp.ones_like, ids)
    params, key, weights = ensemble.params, jax.random.key(0), jnp.full((4, 2), 0.5)
    whole = assert_lowers(lambda *args: rj.decode(*args).tokens, params, ids, mask, weights, key, spec)
    assert whole.out_avals[0].shape == (4, 6)
    prompts = prompts_from_arrays(ids, mask, 6, key)
    state = jax.eval_shape(prefill, params, prompts, spec)
    assert_lowers(lambda *args: prefill(*args).caches, params, prompts, spec)
    assert_lowers(lambda *args: decode_spans(*args).tokens, params, state, weights, spec, jnp.int32(3))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scoring(make_lm, dtype):
    lm = make_lm(0, dtype=dtype)
    params, ids = lm.params, jnp.ones((2, 5), jnp.int32)
    exported = assert_lowers(lm.apply, params, ids, jnp.ones_like(ids))
    assert exported.out_avals[0].shape == (2, 5, lm.config.vocab)


def test_an_iteration_with_a_set_agent(ensemble):
    reads = ("hidden", "stats", "agreement", "span", "prompt")
    config = MAPPOConfig(agent=AgentConfig.of_set(reads=reads, projection=4, span_embedding=4, ffn_width=8))
    policy = ppo.make_policy(config)
    spec = ensemble.spec(policy=policy, span_length=2, max_new_tokens=4, sample_weights=True, record=True)
    params, ids, mask, _ = inputs(ensemble)
    seed = jnp.zeros(2, jnp.uint32)
    state = ppo.init_learners(seed, policy, spec.dims, config)
    batch = ppo.Batch(prompts_from_arrays(ids, mask, 4), jnp.ones((4, 3), jnp.int32), jnp.full(4, 3))
    assert_lowers(lambda *args: ppo.iterate(*args, spec, config), state, params, batch, seed)


def test_ppo_programs(ensemble):
    """The iteration as one program, and the two on either side of a reward in Python."""
    agent = PPOAgent(AgentConfig(projection=4, span_embedding=4, ffn_width=8))
    config = PPOConfig(epochs=2, minibatches=2, agent=agent.config)
    spec = ensemble.spec(policy=agent, span_length=2, max_new_tokens=4, sample_weights=True, record=True)
    params, ids, mask, _ = inputs(ensemble)
    seed, iteration = jnp.zeros(2, jnp.uint32), jnp.int32(0)  # two agents of two prompts
    state = ppo.init_learners(seed, agent, spec.dims, config)
    batch = ppo.Batch(prompts_from_arrays(ids, mask, 4), jnp.ones((4, 3), jnp.int32), jnp.full(4, 3))
    assert_lowers(lambda *args: ppo.iterate(*args, spec, config), state, params, batch, seed)

    def roll(*args):
        return ppo.rollout_for_text(*args, spec, config)

    assert_lowers(roll, state.params, params, batch, seed, iteration)
    queued = dataclasses.replace(config, engine=True, slots=1)
    rows = state.params, params, batch, seed, iteration
    assert_lowers(lambda *args: ppo.rollout_for_text(*args, spec, queued), *rows)
    experience = jax.eval_shape(roll, state.params, params, batch, seed, iteration)
    exported = assert_lowers(
        lambda *args: ppo.learn_from_text(*args, spec, config), state, experience, jnp.ones(4), seed
    )
    # The state that comes out fits the next iteration.
    before = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)]
    assert [(leaf.shape, leaf.dtype) for leaf in exported.out_avals][: len(before)] == before


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_quantised_members(make_lm, tmp_path, kind):
    make_lm(0, width=64, heads=4, head_width=16, ffn_width=96).save(tmp_path / "m")
    ensemble = rj.Ensemble([rj.load(tmp_path / "m", quantise=kind, quantise_head=True)], end_ids=(4,))
    params, ids, mask, key = inputs(ensemble)
    spec = ensemble.spec(max_new_tokens=6)
    policy_params = jnp.ones((len(ids), 1))
    assert_lowers(lambda *args: rj.decode(*args, spec).tokens, params, ids, mask, policy_params, key)
