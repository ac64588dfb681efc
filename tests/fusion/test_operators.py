"""Fusion operators against plain sums over probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rlae_jax.fusion.operators import Candidates, Proxy, get_operator, linear, loglinear
from tests.helpers import reference
from tests.helpers.tolerance import on_device

pytestmark = pytest.mark.device

B, K, V = 3, 4, 11
OPERATORS = {"linear": linear, "loglinear": loglinear}


def random_inputs(seed, spread=3.0):
    rng = np.random.default_rng(seed)
    log_probs = tuple(
        jax.nn.log_softmax(jnp.asarray(rng.normal(0, spread, (B, V)), jnp.float32), axis=-1) for _ in range(K)
    )
    return log_probs, rng.dirichlet(np.ones(K), B).astype(np.float32)


def normalised(fused):
    return np.asarray(jax.nn.log_softmax(fused, axis=-1))


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("seed", range(3))
def test_operators_equal_the_plain_sum(name, seed):
    log_probs, weights = random_inputs(seed)
    fused = normalised(OPERATORS[name](log_probs, jnp.asarray(weights)))
    for b in range(B):
        rows = [np.asarray(log_p[b], np.float64) for log_p in log_probs]
        expected = reference.log_softmax(reference.FUSIONS[name](rows, weights[b]))
        np.testing.assert_allclose(fused[b], expected, rtol=0, atol=on_device(2e-5, 2e-4))


def test_by_hand():
    log_probs = (jnp.log(jnp.array([[0.5, 0.25, 0.25]])), jnp.log(jnp.array([[0.1, 0.8, 0.1]])))
    weights = jnp.array([[0.75, 0.25]])
    np.testing.assert_allclose(jnp.exp(linear(log_probs, weights)), [[0.4, 0.3875, 0.2125]], rtol=on_device(1e-6, 2e-5))
    powers = np.array([0.5**0.75 * 0.1**0.25, 0.25**0.75 * 0.8**0.25, 0.25**0.75 * 0.1**0.25])
    np.testing.assert_allclose(
        np.exp(normalised(loglinear(log_probs, weights))), [powers / powers.sum()], rtol=on_device(1e-5, 2e-4)
    )


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("member", range(K))
def test_one_hot_weights_return_the_member_bit_for_bit(name, member):
    """Also where others find a token impossible."""
    log_probs, _ = random_inputs(7)
    impossible = jnp.where(jnp.arange(V) % 3 == 0, -jnp.inf, log_probs[0])
    log_probs = (log_probs[1], impossible, log_probs[2], log_probs[3])
    weights = jnp.tile(jax.nn.one_hot(member, K), (B, 1))
    np.testing.assert_array_equal(OPERATORS[name](log_probs, weights), log_probs[member])


@pytest.mark.parametrize("name", OPERATORS)
def test_impossible_tokens_give_no_nan(name):
    """A token that one member excludes stays possible under `linear` and not under `loglinear`."""
    one = jnp.log(jnp.array([[0.5, 0.5, 0.0, 0.0]]))
    other = jnp.log(jnp.array([[0.5, 0.0, 0.5, 0.0]]))
    fused = OPERATORS[name]((one, other), jnp.array([[0.5, 0.5]]))
    expected = [True, True, True, False] if name == "linear" else [True, False, False, False]
    np.testing.assert_array_equal(np.isfinite(fused[0]), expected)
    assert not np.any(np.isnan(fused))


def test_linear_keeps_the_order_of_tokens_improbable_to_every_member():
    """exp(-200) is 0 in float32; a sum over probabilities could not tell these tokens apart."""
    log_p = jnp.array([[0.0, -200.0, -210.0, -205.0]])
    fused = linear((log_p, log_p - 1.0), jnp.array([[0.3, 0.7]]))
    np.testing.assert_array_equal(np.argsort(-fused[0]), [0, 1, 3, 2])


@settings(max_examples=25)
@given(hnp.arrays(np.float32, (2, 5), elements=st.floats(-30, 30, width=32)), st.floats(0, 1, width=32))
def test_the_order_of_members_does_not_matter_and_linear_stays_between_them(scores, weight):
    log_probs = [jax.nn.log_softmax(jnp.asarray(row)[None], axis=-1) for row in scores]
    weights = jnp.array([[weight, 1 - weight]], jnp.float32)
    for operator in OPERATORS.values():
        swapped = operator(tuple(log_probs[::-1]), weights[:, ::-1])
        np.testing.assert_allclose(
            operator(tuple(log_probs), weights), swapped, rtol=on_device(1e-5, 2e-4), atol=on_device(1e-5, 2e-4)
        )
    fused = np.asarray(linear(tuple(log_probs), weights))
    stacked = np.stack(log_probs)
    assert np.all(fused <= stacked.max(axis=0) + 1e-4)
    assert np.all(fused >= stacked.min(axis=0) - 1e-4)


@pytest.mark.parametrize("primary", [None, 1])
@pytest.mark.parametrize("seed", range(3))
def test_candidates_equal_the_plain_sum(primary, seed):
    """Also where a member reads some of them through another token's probability."""
    log_probs, weights = random_inputs(seed)
    weights[0] = [0.5, 0.0, 0.5, 0.0]
    rng = np.random.default_rng(seed)
    first = rng.integers(0, V, (K, V))
    own = tuple(jnp.where(jnp.asarray(first[m] % 4 == 0), -jnp.inf, log_p) for m, log_p in enumerate(log_probs))
    read = tuple(
        jnp.where(jnp.isfinite(mine), mine, log_p[:, first[m]])
        for m, (mine, log_p) in enumerate(zip(own, log_probs, strict=True))
    )
    fused = np.asarray(Candidates(3, primary)(own, jnp.asarray(weights), read))
    for b in range(B):
        named = set()
        for m in range(K):
            if m == primary or (primary is None and weights[b, m] > 0):
                named |= set(np.argsort(-np.asarray(own[m][b]))[:3].tolist())
        total = np.zeros(V)
        for m in range(K):
            p = np.zeros(V)
            p[list(named)] = np.exp(np.asarray(read[m][b], np.float64))[list(named)]
            total += weights[b, m] * p / p.sum()
        np.testing.assert_allclose(np.exp(fused[b]), total, rtol=0, atol=on_device(1e-5, 2e-4))


@pytest.mark.parametrize("member", range(K))
def test_one_hot_weights_choose_the_members_own_best_candidate(member):
    """Nobody else's candidates tie with it through their first tokens."""
    log_probs, _ = random_inputs(5)
    weights = jnp.tile(jax.nn.one_hot(member, K), (B, 1))
    read = tuple(jnp.broadcast_to(jnp.max(log_p, axis=1, keepdims=True), log_p.shape) for log_p in log_probs)
    read = tuple(log_p if m == member else r for m, (log_p, r) in enumerate(zip(log_probs, read, strict=True)))
    fused = Candidates(2)(log_probs, weights, read)
    np.testing.assert_array_equal(jnp.argmax(fused, axis=1), jnp.argmax(log_probs[member], axis=1))
    assert np.all(np.isfinite(fused).sum(axis=1) == 2)


def test_proxy():
    base, expert, anti = (jnp.log(jnp.array([row])) for row in ([0.5, 0.3, 0.2, 0], [0.1, 0.9, 0, 0], [0.4, 0.6, 0, 0]))
    fused = normalised(Proxy(0.5)((base, expert, anti), None))
    expected = np.array([0.5 * (0.1 / 0.4) ** 0.5, 0.3 * (0.9 / 0.6) ** 0.5, 0.2, 0])
    np.testing.assert_allclose(np.exp(fused[0]), expected / expected.sum(), rtol=on_device(1e-5, 2e-4))


def test_get_operator(raises_input_error):
    assert get_operator("linear", 2) is linear
    assert get_operator(loglinear, 2) is loglinear
    assert get_operator("topk:3", 2) == Candidates(3)
    assert get_operator("topk", 2) == Candidates(10)
    assert get_operator("primary:1", 2) == Candidates(primary=1)
    assert get_operator("proxy:-0.5", 3) == Proxy(-0.5)
    raises_input_error(lambda: get_operator("mean", 2), "'mean'", "linear", "loglinear", "topk")
    raises_input_error(lambda: get_operator("linear:2", 2), "'linear:2'")
    raises_input_error(lambda: get_operator("topk:0", 2), "topk:0", "at least 1")
    raises_input_error(lambda: get_operator("topk:many", 2), "topk:many", "whole number")
    raises_input_error(lambda: get_operator("primary:2", 2), "numbered 0 to 1")
    raises_input_error(lambda: get_operator("proxy", 2), "three members")
    raises_input_error(lambda: get_operator("proxy:x", 3), "expected a number")
