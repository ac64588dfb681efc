"""What layers with a state compute, against a loop over tokens in float64; whole texts against their pieces."""

import dataclasses

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import rlae_jax as rj
from rlae_jax.models import recurrent
from rlae_jax.models.cache import state_bytes, zero_state
from rlae_jax.models.transformer import Model
from tests.data import hf
from tests.helpers.recurrent import FIELDS, delta_rule_slowly, recurrent_lm

PLATFORMS = ("cpu", "cuda", "tpu")
B, G, N, K, V = 2, 2, 4, 4, 6


@pytest.fixture
def rng():
    return np.random.default_rng()


def unit(x):
    return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True))


def draw(rng, t, strongest=1.0):
    """Inputs of the rule: keys of length 1, decays from none to `strongest`, strengths in (0, 1); a memory."""
    q, k = (unit(rng.normal(size=(B, t, G, K))) for _ in range(2))
    decay = -strongest * rng.uniform(size=(B, t, N)) * (rng.uniform(size=(B, t, N)) < 0.8)
    strength = rng.uniform(size=(B, t, N))
    parts = (q, k, rng.normal(size=(B, t, N, V)), decay, strength, rng.normal(size=(B, N, K, V)))
    return [np.asarray(part, np.float32) for part in parts]


def assert_near(actual, expected, tolerance=2e-5):
    assert actual.shape == expected.shape
    if expected.size:
        np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * max(np.abs(expected).max(), 1.0))


@pytest.mark.parametrize("t", [0, 1, 63, 64, 65, 130])
def test_the_rule_in_chunks_is_the_loop(rng, t):
    rule = jax.jit(recurrent.delta_rule, static_argnums=6)
    for strongest in (0.0, 0.1, 3.0, 200.0):
        inputs = draw(rng, t, strongest)
        for actual, expected in zip(rule(*inputs, "highest"), delta_rule_slowly(*inputs), strict=True):
            assert_near(actual, expected, 5e-5)


def test_keys_that_repeat(rng):
    """The equations of a chunk are at their worst where all its keys are one, each token replacing the last."""
    q, k, v, decay, strength, memory = draw(rng, 100, 0.0)
    inputs = (q, np.broadcast_to(k[:, :1], k.shape), v, decay, np.ones_like(strength), memory)
    rule = jax.jit(recurrent.delta_rule, static_argnums=6)
    for actual, expected in zip(rule(*inputs, "highest"), delta_rule_slowly(*inputs), strict=True):
        assert_near(actual, expected)


def test_a_step_is_the_loop(rng):
    for strongest in (0.0, 3.0, 200.0):
        inputs = draw(rng, 1, strongest)
        for actual, expected in zip(recurrent.delta_step(*inputs, "highest"), delta_rule_slowly(*inputs), strict=True):
            assert_near(actual, expected)


def test_gradients_are_the_loops(rng):
    """Along a direction of every input: what the loop's differences say."""
    inputs = draw(rng, 70)
    weights = [rng.normal(size=part.shape) for part in delta_rule_slowly(*inputs)]

    def loss(*inputs):
        parts = zip(recurrent.delta_rule(*inputs, "highest"), weights, strict=True)
        return sum(jnp.sum(part * jnp.asarray(weight, jnp.float32)) for part, weight in parts)

    def slowly(inputs):
        return sum(np.sum(p * w) for p, w in zip(delta_rule_slowly(*inputs), weights, strict=True))

    gradients = jax.jit(jax.grad(loss, argnums=tuple(range(6))))(*inputs)
    for i, gradient in enumerate(gradients):
        assert np.all(np.isfinite(gradient))
        direction, wide = unit(rng.normal(size=inputs[i].shape)), [np.asarray(x, np.float64) for x in inputs]
        ends = [slowly([*wide[:i], wide[i] + h * direction, *wide[i + 1 :]]) for h in (1e-4, -1e-4)]
        scale = np.sqrt(np.sum(np.square(gradient))) + 1
        assert abs(np.sum(gradient * direction) - (ends[0] - ends[1]) / 2e-4) <= 1e-4 * scale, i


def test_gradients_are_finite_where_everything_is_forgotten(rng):
    inputs = draw(rng, 70, 2000.0)
    gradient = jax.grad(lambda *x: jnp.sum(recurrent.delta_rule(*x, "highest")[0]), argnums=tuple(range(6)))
    gradients = jax.jit(gradient)(*inputs)
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)


def test_the_rules_lower(rng):
    for rule, t in ((recurrent.delta_rule, 70), (recurrent.delta_step, 1)):
        program = jax.jit(jax.grad(lambda *x, rule=rule: jnp.sum(rule(*x, "highest")[0]), argnums=(0, 5)))
        assert jax.export.export(program, platforms=PLATFORMS)(*draw(rng, t)).platforms == PLATFORMS


def layer_of(lm):
    """layer(x, taken, state) -> (out, state), of the first recurrent layer."""
    graph = nnx.split(nnx.eval_shape(lambda: recurrent.make_recurrence(lm.config, nnx.Rngs(0))))[0]
    module = nnx.merge(graph, lm.params["layers"][0]["recurrence"])
    run = jax.jit(module)
    return lambda x, taken, state=None: run(jnp.asarray(x, jnp.float32), taken, state)


@pytest.mark.parametrize("kind", FIELDS)
def test_a_text_in_pieces_is_the_text(make_lm, rng, kind):
    """A prompt padded on the left, a step, a chunk of which rows take some, none or all; filling is garbage."""
    layer = layer_of(recurrent_lm(make_lm, kind))
    x = rng.normal(size=(3, 11, 16))
    whole, after = layer(x, None)
    counts, fed, outs, state = [(2, 0, 4), (1, 1, 1), (2, 0, 5)], np.zeros(3, int), [[], [], []], None
    for piece, own in enumerate(counts):
        width = 1 if piece == 1 else 5
        given, taken = rng.normal(size=(3, width, 16)), np.zeros((3, width), bool)
        places = [np.arange(width - n, width) if piece == 0 else np.arange(n) for n in own]
        for b, place in enumerate(places):
            given[b, place], taken[b, place] = x[b, fed[b] : fed[b] + len(place)], True
        before = state
        out, state = layer(given, None if piece == 1 else jnp.asarray(taken), state)
        for b, place in enumerate(places):
            outs[b] += list(np.asarray(out)[b, place])
            if not len(place) and before is not None:  # exactly what it was
                jax.tree.map(lambda old, new, b=b: np.testing.assert_array_equal(old[b], new[b]), before, state)
        fed += own
    for b in range(3):
        assert_near(np.array(outs[b]), np.asarray(whole)[b, : fed[b]])
    assert fed.tolist() == [5, 1, 10]
    last = layer(x[2:, :10], None)[1]
    jax.tree.map(lambda mine, theirs: assert_near(mine[2:], theirs), state, last)
    assert jax.tree.structure(after) == jax.tree.structure(zero_state(recurrent_lm(make_lm, kind).config, 3))


@pytest.mark.parametrize("kind", FIELDS)
def test_bytes_of_states(make_lm, kind):
    """They are as `state_bytes` says, and do not grow with the text."""
    lm = recurrent_lm(make_lm, kind, dtype="bfloat16")
    for t in (1, 9):
        ids = jnp.ones((3, t), jnp.int32)
        layers = jax.eval_shape(lambda ids=ids: Model(lm.config, lm.params).read_prompt(ids, ids).layers)
        kept = [leaf for i in lm.config.recurrent_layers for leaf in jax.tree.leaves(layers[i])]
        assert sum(leaf.size * leaf.dtype.itemsize for leaf in kept) == 3 * state_bytes(lm.config)


@pytest.mark.parametrize("kind", [pytest.param("short", marks=pytest.mark.rare), "delta"])
def test_bfloat16_is_near_float32(make_lm, kind, rng):
    half = recurrent_lm(make_lm, kind, dtype="bfloat16")
    whole = recurrent_lm(make_lm, kind)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), half.params)
    ids = rng.integers(0, 23, (4, 40))
    exact = np.asarray(whole.apply(params, ids, None))
    rounded = np.asarray(half.logits(ids))
    # Of half the tokens: a norm of what is nearly nothing makes much of rounding.
    errors = np.sqrt(np.mean((rounded - exact) ** 2, axis=-1))
    assert np.median(errors) <= 0.05 * np.sqrt(np.mean(exact**2))


def test_biases_of_short_convolutions_equal_transformers(torch, tmp_path, rng):
    """Without padding, into which transformers lets the bias of what projects."""
    case = next(iter(hf.FAMILIES["lfm2"].cases.values()))
    case = dataclasses.replace(case, fields=case.fields | {"conv_bias": True})
    model, _ = hf.build("lfm2", case, 3, tmp_path / "m")
    ids = rng.integers(0, case.fields["vocab_size"], (2, 9))
    expected = hf.compute(model, ids, np.ones_like(ids))["logits"]
    assert_near(np.asarray(rj.load(tmp_path / "m").logits(ids)), expected)
