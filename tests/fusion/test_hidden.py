"""Fusion of hidden states: against a loop without a cache, against the weighted sum of logits, and its algebra."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax.models import transformer
from tests.helpers.adapters import PROMPTS, N, add_by_hand, random_adapter, write

END_IDS = (6, 18)
TARGETS = ("q", "k", "v", "o", "up", "down")
WEIGHTS = np.array([[0.2, 0.9, 0.4], [1.0, 0.0, 0.3], [0.5, 0.5, 0.5], [0.0, 0.7, 0.1], [1.0, 1.0, 0.0]])


@pytest.fixture(scope="module")
def lm(make_lm):
    return make_lm(0, layers=2, sharpness=3.0, end_ids=END_IDS)


@pytest.fixture(scope="module")
def trio(lm):
    return [random_adapter(lm, m, rank=2, alpha=1.5, targets=TARGETS, name=f"a{m}") for m in range(3)]


@pytest.fixture(scope="module")
def merged(lm, trio):
    return [dataclasses.replace(lm, params=add_by_hand(lm, [adapter], [1.0]), name=adapter.name) for adapter in trio]


@pytest.fixture(scope="module")
def hidden(lm, trio):
    return rj.Ensemble.from_adapters(lm, trio, "hidden")


def reference(lm, members, prompt, weights, head=True):
    """Greedy tokens without a cache: each member reads the whole text again; with `head` their states are summed, and
    without their logits."""
    text, written = list(prompt), []
    for _ in range(N):
        ids = np.array([text])
        if head:
            state = sum(w * np.asarray(member.hidden(ids))[:, -1] for w, member in zip(weights, members, strict=True))
            logits = np.asarray(transformer.Model(lm.config, lm.params).logits(jnp.asarray(state, jnp.float32)))[0]
        else:
            logits = sum(w * np.asarray(member.logits(ids))[0, -1] for w, member in zip(weights, members, strict=True))
        token = int(np.argmax(logits))
        written.append(token)
        text.append(token)
        if token in END_IDS:
            break
    return written


def test_it_writes_what_a_loop_without_a_cache_writes(lm, merged, hidden):
    out = write(hidden, weights=WEIGHTS, scores=True)
    for b, prompt in enumerate(PROMPTS):
        tokens = [*out.tokens[b]]
        expected = reference(lm, merged, prompt, WEIGHTS[b])
        ends = expected[-1] in END_IDS
        assert tokens == expected[: len(expected) - ends]
        assert reference(lm, merged, prompt, WEIGHTS[b], head=False) == expected


@pytest.mark.rare  # T5's adapters and the shared source have tests of their own
def test_of_an_encoder_decoder(t5):
    """The encoder reads the prompt under each adapter; the decoder's states are summed."""
    adapters = [random_adapter(t5, m, rank=2, alpha=1.5, targets=TARGETS) for m in range(2)]
    members = [dataclasses.replace(t5, params=add_by_hand(t5, [adapter], [1.0])) for adapter in adapters]
    weights = np.array([0.8, 0.3])
    out = write(rj.Ensemble.from_adapters(t5, adapters, "hidden"), weights=weights, ignore_eos=True)
    for b, prompt in enumerate(PROMPTS):
        ids, text = np.array([prompt]), [t5.config.start_id or 0]
        for _ in range(N):
            states = [np.asarray(member.hidden(ids, None, np.array([text])))[:, -1] for member in members]
            state = sum(w * h for w, h in zip(weights, states, strict=True)).astype(np.float32)
            text.append(int(np.argmax(transformer.Model(t5.config, t5.params).logits(jnp.asarray(state))[0])))
        assert out.tokens[b] == text[1:]


def test_scores_are_those_of_the_summed_logits(lm, merged, hidden):
    """Token by token: log-probabilities under softmax(sum of weighted logits)."""
    out = write(hidden, weights=WEIGHTS, scores=True)
    for b, prompt in enumerate(PROMPTS):
        text = [*prompt, *out.tokens[b]]
        n = len(out.tokens[b])
        logits = sum(w * np.asarray(m.logits(np.array([text])))[0] for w, m in zip(WEIGHTS[b], merged, strict=True))
        log_probs = jax.nn.log_softmax(logits[len(prompt) - 1 : len(prompt) - 1 + n], axis=-1)
        expected = np.take_along_axis(np.asarray(log_probs), np.array(out.tokens[b], int)[:, None], axis=1)[:, 0]
        np.testing.assert_allclose(np.asarray(out.scores[b])[:n], expected, atol=1e-4)


def test_one_adapter_is_itself_and_size_does_not_matter_greedily(lm, trio, merged, hidden):
    one = write(rj.Ensemble.from_adapters(lm, trio[:1], "hidden"), weights=[1.0])
    assert one.tokens == write(rj.Ensemble([merged[0]])).tokens
    out = write(hidden, weights=WEIGHTS)
    assert write(hidden, weights=0.3 * WEIGHTS).tokens == out.tokens
    np.testing.assert_allclose(np.asarray(out.weights)[0, 0], WEIGHTS[0], rtol=1e-6)  # as they were given
    sampled = [write(hidden, weights=scale * WEIGHTS, temperature=1.0, seed=1).tokens for scale in (1.0, 0.1)]
    assert sampled[0] != sampled[1]  # it is an inverse temperature there


def test_what_it_refuses(lm, trio, merged, hidden, raises_input_error):
    raises_input_error(lambda: rj.Ensemble(merged, "hidden"), "share a head", "from_adapters")
    head = random_adapter(lm, 9, rank=2, alpha=1.0, targets=("head",), name="head")
    raises_input_error(lambda: rj.Ensemble.from_adapters(lm, [trio[0], head], "hidden"), "change it")
    raises_input_error(lambda: write(hidden, weights=[0, 0, 0]), "all zero")
    raises_input_error(lambda: write(hidden, weights=[-1, 0, 1]), "negative")
