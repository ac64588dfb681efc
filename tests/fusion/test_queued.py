"""Answers written by fewer rows than a batch has are those of the batch."""

import dataclasses

import jax
import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax.config import AgentConfig
from rlae_jax.fusion import decode
from rlae_jax.fusion.prompts import make_prompts
from rlae_jax.fusion.queued import decode_queued
from rlae_jax.models.config import Rope
from rlae_jax.ppo.agent import MAPPOAgent, PPOAgent
from tests.helpers.adapters import random_adapter
from tests.helpers.agents import undecided_no_more
from tests.helpers.policies import Reader
from tests.helpers.recurrent import recurrent_lm
from tests.helpers.tokenizers import byte_level, sentencepiece

B, N = 7, 21
SMALL = AgentConfig(projection=6, span_embedding=4, ffn_width=16)
WINDOWS = {"local_layers": (0,), "window": 5, "layers": 2, "local_rope": Rope(100.0)}


def one_tokenizer(make_lm, **fields):
    pair = [make_lm(k, sharpness=3.0, **({"layers": 1} | fields)) for k in (2, 3)]
    rows = [np.random.default_rng(b).integers(0, 23, 1 + 2 * b).tolist() for b in range(B)]
    return rj.Ensemble(pair, end_ids=(7, 18)), rows


def windows(make_lm):
    return one_tokenizer(make_lm, **WINDOWS)


def union(make_lm):
    tokenizers = byte_level([b" the", b" ab", b"x"]), sentencepiece(["▁the", "▁ab", "é", "x"])
    pair = [
        make_lm(k, vocab=len(its), tokenizer=its, end_ids=(its.eos_token_id,), layers=1)
        for k, its in enumerate(tokenizers)
    ]
    ensemble = rj.Ensemble(pair, end_ids=[range(k, len(its), 7) for k, its in enumerate(tokenizers)])
    return ensemble, ensemble.encode(["the ab"[: 1 + b % 6] * (1 + b // 2) for b in range(B)])


def adapters(make_lm):
    base = make_lm(2, sharpness=3.0, layers=1)
    shared = rj.Ensemble.from_adapters(base, [random_adapter(base, seed) for seed in range(2)], end_ids=(7, 18))
    return shared, one_tokenizer(make_lm)[1]


def recurrent(make_lm):
    pair = [recurrent_lm(make_lm, kind, 2 + k) for k, kind in enumerate(("short", "delta"))]
    return rj.Ensemble(pair, end_ids=(7, 18)), one_tokenizer(make_lm)[1]


CHOOSER = dataclasses.replace(SMALL, span_lengths=(2, 5), reads=("hidden", "prompt"))
DRAWN = {"temperature": 1.0}


@pytest.mark.parametrize(
    ("members", "policy", "options", "samples"),
    [
        (windows, PPOAgent(SMALL), {"span_length": 3, "min_new_tokens": 2, **DRAWN}, 3),
        (union, MAPPOAgent(CHOOSER), DRAWN, 2),
        pytest.param(one_tokenizer, PPOAgent(CHOOSER), {}, 1, marks=pytest.mark.rare),
        pytest.param(union, Reader(), {}, 1, marks=pytest.mark.rare),
        pytest.param(adapters, MAPPOAgent(SMALL), {"top_k": 9, "top_p": 0.9, **DRAWN}, 2, marks=pytest.mark.rare),
        pytest.param(recurrent, PPOAgent(SMALL), {"repetition_penalty": 1.3, **DRAWN}, 1, marks=pytest.mark.rare),
    ],
)
def test_answers_are_those_of_a_batch(make_lm, members, policy, options, samples):
    ensemble, rows = members(make_lm)
    spec = ensemble.spec(policy=policy, max_new_tokens=N, sample_weights=True, record=True, **options)
    prompts = make_prompts(rows, 1 if spec.union is None else 2, N, seed=3, batch=B)
    policy_params = policy.init(jax.random.key(1), spec.dims)
    if not isinstance(policy, Reader):
        policy_params = undecided_no_more(policy_params)
    arguments = ensemble.params, prompts, policy_params, spec
    expected = jax.jit(decode.decode_batch, static_argnames="samples")(*arguments, samples=samples)
    found = jax.jit(decode_queued, static_argnames=("rows", "samples"))(*arguments, rows=3, samples=samples)
    for name in ("done", "ended", "steps", "tokens", "decisions"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    assert len(set(expected.steps.tolist())) > 2  # of several lengths
    mask = found.span_mask()
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(*map(jax.tree.leaves, (found.trajectory, expected.trajectory)), strict=True):
        np.testing.assert_allclose(one[mask], other[mask], atol=1e-5, rtol=1e-5)
