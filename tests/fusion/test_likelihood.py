"""Likelihoods of given continuations against whole forward passes of every member."""

import numpy as np
import pytest
from transformers import AutoTokenizer

import rlae_jax as rj

PROMPTS = ["Once upon a time", "The cat"]
OPTIONS = [[" there was a dog", ",", " she"], [" sat", " on the mat and"]]


@pytest.fixture(scope="module")
def members(shared, make_lm):
    stories = AutoTokenizer.from_pretrained(shared / "models" / "stories260K")
    return [make_lm(k, vocab=520, tokens=512, tokenizer=stories, end_ids=(1,), layers=1) for k in range(2)]


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)


@pytest.mark.parametrize("fusion", ["linear", "loglinear"])
def test_they_are_the_fused_log_probabilities_of_the_tokens(members, fusion):
    ensemble = rj.Ensemble(members, fusion)
    weights = np.array([[0.3, 0.7], [0.9, 0.1]])
    found = ensemble.log_likelihoods(PROMPTS, OPTIONS, weights)
    assert [len(part) for part in found] == [3, 2]
    tokenizer = members[0].tokenizer
    for b, (prompt, options) in enumerate(zip(PROMPTS, OPTIONS, strict=True)):
        before = tokenizer(prompt)["input_ids"]
        for option, value in zip(options, found[b], strict=True):
            ids = tokenizer(prompt + option)["input_ids"]
            assert ids[: len(before)] == before
            each = [log_softmax(np.asarray(lm.logits(np.array([ids])))[0, :, :512]) for lm in members]
            if fusion == "linear":
                fused = np.log(sum(w * np.exp(lp) for w, lp in zip(weights[b], each, strict=True)))
            else:
                fused = log_softmax(sum(w * lp for w, lp in zip(weights[b], each, strict=True)))
            expected = sum(fused[t - 1, ids[t]] for t in range(len(before), len(ids)))
            assert value == pytest.approx(expected, abs=2e-4)


@pytest.mark.slow
def test_of_members_with_different_tokenizers(members, shared, make_lm):
    """With all the weight on one member an option has that member's own likelihood, where it is its own tokens."""
    gpt2 = AutoTokenizer.from_pretrained(shared / "tokenizers" / "gpt2")
    ensemble = rj.Ensemble([members[0], make_lm(5, vocab=50_257, tokenizer=gpt2, name="gpt2", end_ids=(50_256,))])
    found = ensemble.log_likelihoods(PROMPTS, OPTIONS, [1, 0])
    alone = rj.Ensemble([members[0]]).log_likelihoods(PROMPTS, OPTIONS)
    for one, two in zip(found, alone, strict=True):
        np.testing.assert_allclose(one, two, rtol=0.02)  # entries that would break a character have no probability
    assert ensemble.log_likelihoods(PROMPTS[:1], [[" a", " b"]])[0].shape == (2,)


def test_bad_input(members, raises_input_error):
    ensemble = rj.Ensemble(members)
    raises_input_error(lambda: ensemble.log_likelihoods(PROMPTS, OPTIONS[:1]), "2 prompts", "1 lists")
    raises_input_error(lambda: ensemble.log_likelihoods(PROMPTS, [["a"], [""]]), "without a token")
