"""Choosing tokens: argmax, top-k and top-p against their definitions, draws against their distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from rlae_jax.fusion.operators import get_operator
from rlae_jax.fusion.sampling import RowSampling, Sampling, SamplingOptions, argmax, choose_token, truncate
from tests.helpers import reference
from tests.helpers.tolerance import on_device

pytestmark = pytest.mark.device

# One shape, so that every example runs the same compiled program.
SHAPE = (4, 9)
WITH_TIES = hnp.arrays(np.float32, SHAPE, elements=st.sampled_from([-np.inf, -2.0, -1.0, 0.0, 0.5, 3.0]))
DISTINCT = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed).normal(0, 2, SHAPE).astype("f4"))
FEW = settings(max_examples=60)

jitted_argmax = jax.jit(argmax)
jitted_truncate = jax.jit(truncate)


def sampling_of(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    return Sampling.create(SamplingOptions(**options, repetition_penalty=repetition_penalty))


@FEW
@given(WITH_TIES)
def test_argmax_is_the_first_index_of_the_maximum(scores):
    token, score = jitted_argmax(scores)
    np.testing.assert_array_equal(token, np.argmax(scores, axis=-1))
    np.testing.assert_array_equal(score, np.max(scores, axis=-1))


def test_argmax_stays_in_range_where_nothing_equals_the_maximum():
    assert int(argmax(jnp.full((1, 5), jnp.nan)).token[0]) < 5


@FEW
@given(DISTINCT, st.sampled_from([1, 2, 5, 8, 9, 20]))
def test_top_k_keeps_the_k_largest(scores, k):
    kept = np.isfinite(jitted_truncate(scores, sampling_of(1.0, top_k=k)))
    for row, keep in zip(scores, kept, strict=True):
        assert set(np.flatnonzero(keep)) == set(np.argsort(-row)[:k])


@FEW
@given(WITH_TIES)
def test_top_k_keeps_ties_with_the_kth(scores):
    kept = np.isfinite(jitted_truncate(scores, sampling_of(1.0, top_k=3)))
    for row, keep in zip(scores, kept, strict=True):
        threshold = np.sort(row)[-3]
        np.testing.assert_array_equal(keep, (row >= threshold) & np.isfinite(row))


@FEW
@given(DISTINCT, st.floats(0.01, 0.999))
def test_top_p_keeps_the_fewest_likeliest_that_reach_p(scores, p):
    out = np.asarray(jitted_truncate(scores, sampling_of(1.0, top_p=p)))
    for row, after in zip(scores, out, strict=True):
        probs = np.exp(reference.log_softmax(row.astype(np.float64)))
        order = np.argsort(-probs)
        kept = np.isfinite(after)
        n = kept.sum()
        assert set(order[:n]) == set(np.flatnonzero(kept))
        cumulated = np.cumsum(probs[order])
        assert cumulated[n - 1] >= p - 1e-5
        assert n == 1 or cumulated[n - 2] < p + 1e-5
        np.testing.assert_array_equal(after[kept], row[kept])


@FEW
@given(DISTINCT, st.sampled_from([2, 4, 6]), st.floats(0.1, 0.95))
def test_top_k_comes_before_top_p(scores, k, p):
    out = np.asarray(jitted_truncate(scores, sampling_of(1.0, top_k=k, top_p=p)))
    for row, after in zip(scores, out, strict=True):
        probs = np.exp(reference.log_softmax(np.sort(row.astype(np.float64))[::-1][:k]))
        if np.abs(np.cumsum(probs) - p).min() > 1e-5:  # on the very edge rounding decides
            np.testing.assert_array_equal(after, reference.truncate(row, k, p))


@FEW
@given(DISTINCT, st.floats(0.001, 1.0))
def test_min_p_keeps_what_is_likely_enough(scores, p):
    out = np.asarray(jitted_truncate(scores, sampling_of(1.0, min_p=p)))
    for row, after in zip(scores, out, strict=True):
        ratio = np.exp(row.astype(np.float64) - row.max())
        clear = np.abs(ratio - p) > 1e-5  # on the very edge rounding decides
        np.testing.assert_array_equal(np.isfinite(after)[clear], (ratio >= p)[clear])
        np.testing.assert_array_equal(after[np.isfinite(after)], row[np.isfinite(after)])
        assert np.isfinite(after[np.argmax(row)])


@FEW
@given(DISTINCT, st.sampled_from([0, 3, 6]), st.floats(0.3, 0.95), st.floats(0.01, 0.9))
def test_min_p_comes_last(scores, k, top_p, min_p):
    out = np.asarray(jitted_truncate(scores, sampling_of(1.0, top_k=k, top_p=top_p, min_p=min_p)))
    for row, after in zip(scores, out, strict=True):
        descending = np.sort(row.astype(np.float64))[::-1]
        probs = np.exp(reference.log_softmax(descending[: k or None]))
        ratio = np.exp(descending - descending[0])
        if np.abs(np.cumsum(probs) - top_p).min() > 1e-5 and np.abs(ratio - min_p).min() > 1e-5:
            np.testing.assert_array_equal(after, reference.truncate(row, k, top_p, min_p))


def test_the_penalty_multiplies_what_was_seen():
    log_probs = jnp.asarray(reference.log_softmax(np.random.default_rng(0).normal(size=7)), jnp.float32)[None]
    seen = np.array([[True, False, False, True, False, True, False]])
    for factor in (0.5, 1.3):
        out = sampling_of(repetition_penalty=factor).penalise(log_probs, jnp.asarray(seen))
        np.testing.assert_allclose(out, np.where(seen, log_probs * factor, log_probs), rtol=on_device(1e-6, 2e-5))
        assert np.all((np.asarray(out) < np.asarray(log_probs))[seen] == (factor > 1))
    assert sampling_of(repetition_penalty=1.0).penalise(log_probs, None) is log_probs


def test_no_limits_change_nothing():
    scores = jnp.asarray(np.random.default_rng(0).normal(size=SHAPE), jnp.float32)
    np.testing.assert_array_equal(truncate(scores, sampling_of(1.0)), scores)
    np.testing.assert_array_equal(truncate(scores, sampling_of(1.0, top_k=9, top_p=1.0)), scores)


def draws(fused, sampling, n, seed=0):
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(n))
    return np.asarray(choose_token(jnp.tile(fused, (n, 1)), keys, jnp.int32(5), sampling).token)


@pytest.mark.parametrize("fusion", ["linear", "loglinear"])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.6, 0, 1.0, 0.0),
        (1.7, 5, 1.0, 0.0),
        (1.0, 6, 0.9, 0.0),
        (1.3, 0, 0.7, 0.0),
        (1.5, 0, 1.0, 0.2),
        (1.5, 6, 0.95, 0.1),
    ],
)
def test_frequencies_match_the_fused_distribution(fusion, temperature, top_k, top_p, min_p):
    rng = np.random.default_rng(3)
    log_probs = [reference.log_softmax(rng.normal(0, 1.0, 8)) for _ in range(2)]
    weights = np.array([0.3, 0.7])
    fused = reference.FUSIONS[fusion](log_probs, weights)
    expected = np.exp(reference.log_softmax(reference.truncate(fused / temperature, top_k, top_p, min_p)))

    n = 4000
    members = tuple(jnp.asarray(log_p, jnp.float32)[None] for log_p in log_probs)
    ours = get_operator(fusion, 2)(members, jnp.asarray(weights, jnp.float32)[None])
    counts = np.bincount(draws(ours, sampling_of(temperature, top_k, top_p, min_p), n), minlength=8)
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    assert possible.sum() > 1
    # The seed is fixed: this passes always or never, and a wrong distribution fails by orders of magnitude.
    assert stats.chisquare(counts[possible], expected[possible] * n).pvalue > 1e-3


def test_a_draw_depends_on_the_rows_key_and_the_step_alone():
    rng = np.random.default_rng(1)
    fused = jnp.asarray(rng.normal(size=(5, 30)), jnp.float32)
    keys = jax.random.split(jax.random.key(1), 5)
    sampling = sampling_of(2.0)
    whole = [np.asarray(choose_token(fused, keys, jnp.int32(step), sampling).token) for step in range(8)]
    for b in range(5):
        row = fused[b : b + 1], keys[b : b + 1]
        alone = [int(choose_token(*row, jnp.int32(step), sampling).token[0]) for step in range(8)]
        assert alone == [tokens[b] for tokens in whole]
        assert len(set(alone)) > 1


def test_rows_with_numbers_of_their_own_choose_as_each_alone():
    """Also at steps of their own, and where no row asks for a limit, or all are greedy."""
    every = [(0.0, 0, 1.0, 0.0), (1.3, 0, 1.0, 0.0), (0.7, 4, 1.0, 0.0), (1.0, 0, 0.8, 0.0), (2.0, 6, 0.9, 0.05)]
    choose = jax.jit(choose_token)
    for chosen in (every, every[:2], every[:1]):
        rng = np.random.default_rng(len(chosen))
        rows = [chosen[i] for i in rng.integers(len(chosen), size=40)]
        fused = jnp.asarray(rng.normal(0, 2, (40, 9)), jnp.float32)
        keys, steps = jax.random.split(jax.random.key(4), 40), jnp.asarray(rng.integers(0, 99, 40), jnp.int32)
        temperature, top_k, top_p, min_p = (jnp.asarray(column) for column in zip(*rows, strict=True))
        own = RowSampling(temperature, top_k, top_p, min_p, jnp.ones((40,)))
        found = np.asarray(choose(fused, keys, steps, own).token)
        for b, numbers in enumerate(rows):
            alone = choose_token(fused[b : b + 1], keys[b : b + 1], steps[b], sampling_of(*numbers))
            assert int(alone.token[0]) == found[b]


def test_greedy_ignores_the_limits():
    greedy = sampling_of(0.0, top_k=3, top_p=0.2, min_p=0.5)
    assert greedy == sampling_of()
    fused = jnp.asarray([[0.0, 2.0, 1.0]])
    assert int(choose_token(fused, jax.random.split(jax.random.key(0), 1), jnp.int32(0), greedy).token[0]) == 1


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"temperature": -0.1}, ("temperature", "-0.1")),
        ({"temperature": float("nan")}, ("temperature", "nan")),
        ({"temperature": float("inf")}, ("temperature", "inf")),
        ({"temperature": 1.0, "top_k": -1}, ("top_k", "-1")),
        ({"temperature": 1.0, "top_p": 0.0}, ("top_p", "0.0", "above 0 and at most 1")),
        ({"temperature": 1.0, "top_p": 1.5}, ("top_p", "1.5")),
        ({"temperature": 1.0, "top_p": float("nan")}, ("top_p", "nan")),
        ({"top_p": -1.0}, ("top_p", "-1.0")),
        ({"temperature": 1.0, "min_p": -0.1}, ("min_p", "-0.1", "from 0 to 1")),
        ({"temperature": 1.0, "min_p": 1.1}, ("min_p", "1.1")),
        ({"min_p": float("nan")}, ("min_p", "nan")),
        ({"repetition_penalty": 0.0}, ("repetition_penalty", "0.0", "above 0")),
        ({"repetition_penalty": -1.2}, ("repetition_penalty", "-1.2")),
        ({"repetition_penalty": float("inf")}, ("repetition_penalty", "inf")),
        ({"repetition_penalty": float("nan")}, ("repetition_penalty", "nan")),
    ],
    ids=str,
)
def test_unusable_options(raises_input_error, options, parts):
    raises_input_error(lambda: sampling_of(**options), *parts)
