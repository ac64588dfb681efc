"""Predictions that are not finite end their row, with a reason of its own, and no other row."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax.commands.generate import _tell_failed
from rlae_jax.fusion import operators
from tests.helpers.tokenizers import byte_level

# A token of which some models cannot make anything but the value; no other prompt has it, and nobody writes it.
BAD = 22


def poisoned(lm, value=np.nan):
    """The model with an embedding that makes its predictions what they should not be, after one token."""
    table = lm.params["embedding"].at[BAD].set(value)
    head = lm.params["head"]["kernel"].at[:, BAD].set(0.0)
    params = lm.params | {"embedding": table, "head": lm.params["head"] | {"kernel": head}}
    return dataclasses.replace(lm, params=params)


PROMPTS = [[3, 4, 5], [3, BAD], [6, 7, 8, 9], [BAD]]


@pytest.fixture(scope="module")
def members(make_lm):
    return [make_lm(k, layers=1) for k in range(3)]


def generate(ensemble, prompts=PROMPTS, **options):
    width = max(map(len, prompts))
    ids = [[0] * (width - len(p)) + p for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return ensemble.generate(prompt_ids=ids, prompt_mask=mask, max_new_tokens=4, **options)


@pytest.mark.parametrize(
    ("fusion", "which"), [("linear", 0), ("loglinear", 1), ("topk:3", 1), ("primary", 0), ("proxy", 2)]
)
def test_of_all_operators(members, fusion, which):
    chosen = members[: 3 if fusion == "proxy" else 2]
    whole = rj.Ensemble(chosen, fusion)
    broken = rj.Ensemble([poisoned(lm) if k == which else lm for k, lm in enumerate(chosen)], fusion)
    found, expected = generate(broken), generate(whole)
    assert found.finish_reasons == ["length", "error", "length", "error"]
    assert found.tokens == [expected.tokens[0], [], expected.tokens[2], []]


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({}, np.inf),
        ({}, -np.inf),
        ({"temperature": 1.0, "top_p": 0.9, "top_k": 5, "seed": 1}, np.nan),
        ({"repetition_penalty": 2.0, "scores": True}, np.nan),
        ({"keep": True}, np.nan),
        ({"weights": "perplexity"}, np.nan),
    ],
)
def test_however_tokens_are_chosen(members, options, value):
    weights = options.get("weights")
    rest = {name: option for name, option in options.items() if name != "weights"}
    ensembles = rj.Ensemble([poisoned(members[0], value), members[1]]), rj.Ensemble(members[:2])
    found, expected = (generate(e, weights=weights, **rest) for e in ensembles)
    assert found.finish_reasons == ["length", "error", "length", "error"]
    assert [found.tokens[b] for b in (0, 2)] == [expected.tokens[b] for b in (0, 2)]


def test_a_member_without_weight_does_not_matter(members):
    ensemble = rj.Ensemble([poisoned(members[0]), members[1]])
    for fusion in ("linear", "loglinear"):
        found = generate(ensemble.with_fusion(fusion), weights=[0, 1])
        assert found.finish_reasons == ["length"] * 4
        assert found.tokens == generate(rj.Ensemble([members[1]])).tokens


def test_what_was_written_before_is_there(members):
    """The token that spoils the rest is written by the model itself."""
    lm = members[0]
    written = generate(rj.Ensemble([lm]), [[3, 4, 5]]).tokens[0]
    spoilt = lm.params["embedding"].at[written[1]].set(jnp.nan)
    broken = dataclasses.replace(lm, params=lm.params | {"embedding": spoilt})
    assert written[1] not in [3, 4, 5, written[0]]
    found = generate(rj.Ensemble([broken]), [[3, 4, 5]])
    assert found.finish_reasons == ["error"]
    assert found.tokens == [written[:2]]
    assert found.steps == [2]


def test_over_a_union(make_lm):
    tokenizers = [byte_level([b" a", b"bc"]), byte_level([b"bc", b"ab"])]
    lms = [make_lm(k, layers=1, tokenizer=t, vocab=len(t), end_ids=(t.eos_token_id,)) for k, t in enumerate(tokenizers)]
    bad = tokenizers[1].encode("z")[-1]
    table = lms[1].params["embedding"].at[bad].set(jnp.nan)
    broken = dataclasses.replace(lms[1], params=lms[1].params | {"embedding": table})
    whole, found = (rj.Ensemble([lms[0], lm]) for lm in (lms[1], broken))
    prompts = ["abc", "az", "cab"]
    expected, found = (e.generate(prompts, max_new_tokens=4) for e in (whole, found))
    assert found.finish_reasons[1] == "error"
    for b in (0, 2):
        if "z" not in expected.texts[b]:
            assert found.texts[b] == expected.texts[b]
            assert found.finish_reasons[b] == expected.finish_reasons[b]


def test_tokens_at_minus_infinity_are_no_failure(members):
    lm = members[0]
    norm = jax.tree.map(lambda leaf: leaf, lm.params)
    masked = dataclasses.replace(lm, config=dataclasses.replace(lm.config, tokens=12), params=norm)
    found = generate(rj.Ensemble([masked, masked]), [[3, 4, 5]], temperature=2.0, top_k=3)
    assert found.finish_reasons == ["length"]
    assert max(found.tokens[0]) < 12


def test_operators_let_through_what_is_no_number():
    nan = jnp.full((1, 4), jnp.nan)
    fine = jax.nn.log_softmax(jnp.arange(4.0))[None]
    half = jnp.array([[0.5, 0.5]])
    for operator in (operators.linear, operators.loglinear, operators.Candidates(2), operators.Candidates(primary=0)):
        for pair in ((nan, fine), (fine, nan), (nan, nan)):
            assert jnp.isnan(jnp.max(operator(pair, half))), operator
    for i in range(3):
        three = tuple(nan if k == i else fine for k in range(3))
        assert jnp.isnan(jnp.max(operators.Proxy(1.0)(three, None)))


def test_the_command_tells(capsys):
    _tell_failed(["stop", "length"])
    assert capsys.readouterr().err == ""
    _tell_failed(["stop", "error", "length"])
    assert "answers 2 of 3 ended early: a prediction was not finite" in capsys.readouterr().err
    with pytest.raises(rj.InputError, match="answers 1, 2 of 2 ended early"):
        _tell_failed(["error", "error"])


def test_scores_of_given_tokens(members, raises_input_error):
    broken, rows, tokens = [poisoned(members[0]), members[1]], [[3, 4], [3, BAD], [5]], [[6, 7], [6], [7]]
    read = rj.Ensemble(broken)
    raises_input_error(lambda: read.score_tokens(rows, tokens), "of 3 texts cannot be scored", "not finite")
    assert all(np.isfinite(one.fused).all() for one in read.score_tokens(rows[::2], tokens[::2]))
    # The decoding loop scores members with keys in 8 bits, row by row.
    eight = [dataclasses.replace(lm, config=dataclasses.replace(lm.config, kv_dtype="int8")) for lm in broken]
    written = rj.Ensemble(eight)
    raises_input_error(lambda: written.score_tokens(rows, tokens), "1 of 3 texts cannot be scored")
