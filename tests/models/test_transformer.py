"""The transformer's own properties, and decoding with a cache against the whole sequence at once.

That it computes what transformers computes is tested in test_families.py.
"""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax.models import layers, load, rope, transformer
from rlae_jax.models.cache import Cache, LayerCache, _write_at_once, extend_cache, visible, write_chunk
from rlae_jax.models.config import Experts, LayerInputs, QueryGrowth, Rope, Wide
from rlae_jax.models.pretrain import PretrainConfig, Source, next_token_loss, pretrain
from tests.helpers.tolerance import on_device

CHUNKS = {
    **{"local_layers": (0,), "window": 3, "chunked": True, "rope": Rope(interleaved=True), "unrotated_layers": (1,)},
    **{"query_key_norm": "unit", "norm_rotated": True, "query_growth": QueryGrowth(0.5, 3, offset=1, unrotated=True)},
    "experts": Experts(number=5, active=2, width=8, layers=(1,), scaled_inputs=True, shared_width=12),
    "layers": 2,
}
EXPERTS = {"experts": Experts(number=5, active=2, width=8, layers=(1,)), "layers": 2, "attention_sinks": True}


def test_hidden_is_what_the_output_head_reads(make_lm):
    lm = make_lm(1)
    ids = np.arange(10).reshape(2, 5)
    hidden = lm.hidden(ids)
    assert hidden.shape == (2, 5, lm.config.width)
    expected = np.asarray(hidden, np.float64) @ np.asarray(lm.params["head"]["kernel"], np.float64)
    np.testing.assert_allclose(lm.logits(ids), expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(lm.apply(lm.params, jnp.asarray(ids), jnp.ones_like(ids)), lm.logits(ids))


@pytest.mark.device
def test_a_token_sees_neither_later_tokens_nor_padding(make_lm):
    lm = make_lm(2)
    ids = np.arange(12).reshape(2, 6)
    before = np.asarray(lm.logits(ids))
    changed = ids.copy()
    changed[:, 4:] = 20
    np.testing.assert_array_equal(np.asarray(lm.logits(changed))[:, :4], before[:, :4])
    assert np.abs(np.asarray(lm.logits(changed))[:, 4:] - before[:, 4:]).max() > 0.1

    mask = np.ones((2, 6), int)
    mask[:, :2] = 0
    garbage = ids.copy()
    garbage[:, :2] = 22
    padded = np.asarray(lm.logits(ids, mask))[:, 2:]
    np.testing.assert_array_equal(np.asarray(lm.logits(garbage, mask))[:, 2:], padded)
    np.testing.assert_allclose(padded, lm.logits(ids[:, 2:]), rtol=0, atol=on_device(1e-5, 2e-4))


@pytest.mark.parametrize(
    ("batch", "fields"),
    [
        (3, {}),
        (5, {"tied_head": True, "heads": 6, "kv_heads": 3, "head_width": 6, "layers": 1}),
        (3, {"local_layers": (1,), "window": 3, "layers": 3}),
        (2, {"local_layers": (0, 1), "window": 7}),
        (4, EXPERTS),
        (3, CHUNKS),
    ],
    ids=["grouped", "tied", "window", "long-window", "experts", "chunks"],
)
@pytest.mark.device
def test_decoding_with_a_cache_equals_the_whole_sequence(make_lm, batch, fields):
    lm = make_lm(4, **fields)
    t, total = 5, 9
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(0, lm.config.vocab, (batch, total)))
    starts = jnp.asarray(np.concatenate([[0], rng.integers(0, t, batch - 1)]))
    mask = (jnp.arange(total)[None] >= starts[:, None]).astype(int)
    whole = np.asarray(lm.hidden(ids, mask))

    model = transformer.Model(lm.config, lm.params)
    hidden, keys_values = jax.jit(transformer.Model.forward)(model, ids[:, :t], mask[:, :t])
    real = np.asarray(mask[:, :t]).astype(bool)
    np.testing.assert_allclose(np.asarray(hidden)[real], whole[:, :t][real], rtol=0, atol=on_device(1e-5, 2e-4))
    cache = extend_cache(keys_values, lm.config, total + 3)

    @jax.jit
    def step(model, ids, positions, cache, slot):
        return model.decode_step(ids, positions, cache, slot, visible(cache, lm.config, starts, slot))

    for slot in range(t, total):
        hidden, cache = step(model, ids[:, slot], slot - starts, cache, jnp.int32(slot))
        np.testing.assert_allclose(hidden, whole[:, slot], rtol=0, atol=on_device(1e-5, 2e-4))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tied_head": True, "heads": 6, "kv_heads": 3, "head_width": 6, "layers": 1},
        {"local_layers": (0,), "window": 3, "attention_cap": 2.0},
        {"local_layers": (0, 1), "window": 1},
        {"parallel_branches": True, "rope": None, "learned_positions": 40, "layers": 2},
        {
            **{"parallel_branches": True, "shared_norm": True, "norm": "layer", "norm_bias": False},
            **{"query_key_norm": "heads", "rope": Rope(interleaved=True), "unrotated_layers": (0,)},
            "query_growth": QueryGrowth(rate=0.5, step=3),
        },
        {
            **{"layers": 4, "local_layers": (0, 2), "window": 3, "local_rope": Rope(100.0)},
            "wide": Wide(head_width=6, kv_heads=1, keys_are_values=True),
            **{"reading_layers": 2, "reading_ffn_width": 20, "query_key_norm": "head", "value_norm": True},
            **{"layer_inputs": LayerInputs(rows=23, width=4), "layer_scale": True},
        },
        EXPERTS,
        CHUNKS,
    ],
    ids=["grouped", "tied", "window", "own-token-alone", "parallel", "unrotated", "reading", "experts", "chunks"],
)
@pytest.mark.device
def test_chunks_of_unequal_length_equal_the_whole_sequence(make_lm, fields):
    """Rows take 0 to W tokens at a time; what lies beyond a row's count is garbage and changes nothing."""
    lm = make_lm(4, **fields)
    batch, t, total, w = 3, 4, 24, 3
    rng = np.random.default_rng(0)
    ids = rng.integers(0, lm.config.vocab, (batch, total))
    starts = np.array([0, 2, 1])
    mask = (np.arange(total) >= starts[:, None]).astype(int)
    whole = np.asarray(lm.hidden(ids, mask))
    model = transformer.Model(lm.config, lm.params)
    cache = jax.jit(transformer.Model.forward)(model, ids[:, :t], mask[:, :t])[1]
    cache = extend_cache(cache, lm.config, total + w, w)

    @jax.jit
    def chunk(model, ids, positions, count, cache, filled):
        behind = visible(cache, lm.config, jnp.asarray(starts), filled - 1)
        return model.decode_chunk(ids, positions, count, cache, behind, filled)

    write = jax.jit(write_chunk)
    filled = np.full(batch, t)
    while np.any(filled < total):
        count = np.minimum(rng.integers(0, w + 1, batch), total - filled)
        places = filled[:, None] + np.arange(w)
        chosen = np.take_along_axis(np.pad(ids, ((0, 0), (0, w))), places, axis=1)
        chosen = np.where(np.arange(w) < count[:, None], chosen, 7)
        positions = filled[:, None] - starts[:, None] + np.arange(w)
        hidden, new = chunk(model, chosen, positions, count, cache, jnp.asarray(filled))
        cache = write(cache, new, filled)
        filled = filled + count
        for b in np.flatnonzero(count):
            np.testing.assert_allclose(hidden[b], whole[b, filled[b] - 1], rtol=0, atol=on_device(1e-5, 2e-4))


@pytest.mark.parametrize("rows", [2, 17])
@pytest.mark.device
def test_chunks_are_written_at_each_rows_own_slot(make_lm, rows):
    cache = Cache((LayerCache(jnp.zeros((rows, 1, 2, 9)), jnp.zeros((rows, 1, 2, 9))),), 9)
    new = (LayerCache(jnp.ones((rows, 1, 2, 3)), 2 * jnp.ones((rows, 1, 2, 3))),)
    slots = np.arange(rows) % 7
    expected = np.zeros((rows, 1, 2, 9))
    for b, slot in enumerate(slots):
        expected[b, ..., slot : slot + 3] = 1
    here = write_chunk(cache, new, jnp.asarray(slots)).layers
    elsewhere = _write_at_once(9, cache.layers, new, jnp.asarray(slots))
    for ((keys, values, *_),) in (here, elsewhere):
        np.testing.assert_array_equal(keys, expected)
        np.testing.assert_array_equal(values, 2 * expected)


def test_positions_count_the_tokens_before():
    mask = jnp.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 1, 0, 1]])
    positions = np.asarray(transformer.positions(mask))
    np.testing.assert_array_equal(positions[0, 2:], [0, 1, 2])
    np.testing.assert_array_equal(positions[1, :3], [0, 1, 2])
    np.testing.assert_array_equal(positions[2, [0, 2, 4]], [0, 1, 2])


def test_rotation_by_hand():
    """Head width 2 has one frequency, 1: position p turns (1, 0) by p radians."""
    angles = layers.rotary_angles(jnp.array([[0, 1, 5]]), rope.frequencies(Rope(), head_width=2)[0])
    turned = layers.rotate(jnp.tile(jnp.array([1.0, 0.0]), (1, 3, 1, 1)), angles)[0, :, 0]
    expected = [[np.cos(p), np.sin(p)] for p in (0, 1, 5)]
    np.testing.assert_allclose(turned, expected, rtol=0, atol=1e-6)


def test_neighbouring_pairs_rotate_as_halves_do():
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 10))
    angles = layers.rotary_angles(jnp.arange(10).reshape(2, 5), rope.frequencies(Rope(), head_width=8)[0])
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7, 8, 9])  # firsts, seconds, and what is not rotated
    halves = layers.rotate(x[..., order], angles)
    np.testing.assert_array_equal(layers.rotate(x, angles, interleaved=True)[..., order], halves)


@pytest.mark.device
def test_bfloat16_computes_close_to_float32(stored_checkpoint):
    """Norms, rotary angles and softmax stay float32, so that only products round."""
    lm = load(stored_checkpoint("grouped"))
    half = load(stored_checkpoint("grouped"), dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {jnp.dtype(jnp.bfloat16)}
    ids = np.arange(20).reshape(2, 10)
    logits, half_logits = np.asarray(lm.logits(ids)), half.logits(ids)
    assert half_logits.dtype == jnp.float32
    assert half.hidden(ids).dtype == jnp.bfloat16
    error = np.abs(np.asarray(half_logits) - logits).max() / np.abs(logits).max()
    assert 1e-5 < error < 0.05


def test_init_params_fill_the_abstract_tree_and_depend_on_the_key(make_lm):
    config = make_lm(0, layers=1).config
    abstract = transformer.abstract_params(config)
    params, other = (transformer.init_params(config, jax.random.key(seed)) for seed in (0, 1))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, abstract)
    kernel = np.asarray(params["layers"][0]["attention"]["q"]["kernel"])
    assert abs(kernel.std() * config.width**0.5 - 1) < 0.2
    assert np.abs(kernel - np.asarray(other["layers"][0]["attention"]["q"]["kernel"])).max() > 0.1


@pytest.mark.device
def test_gradients_are_finite_with_padding(make_lm):
    lm = make_lm(5, layers=1)
    ids, mask = jnp.arange(10).reshape(2, 5), jnp.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])

    def loss(params):
        return jnp.sum(jnp.where(mask[..., None] > 0, lm.apply(params, ids, mask), 0.0) ** 2)

    grads = jax.jit(jax.grad(loss))(lm.params)
    chex.assert_tree_all_finite(grads)
    assert float(jnp.abs(grads["layers"][0]["attention"]["q"]["kernel"]).max()) > 0


class TestTargetLogProbs:
    """log p of given targets, some positions at a time."""

    @pytest.fixture(scope="class")
    def case(self, make_lm):
        lm = make_lm(6, layers=1)
        rng = np.random.default_rng(0)
        hidden = jnp.asarray(rng.normal(size=(3, 7, lm.config.width)), jnp.float32)
        return lm, hidden, jnp.asarray(rng.integers(0, lm.config.vocab, (3, 7)))

    def plain(self, lm, params, hidden, targets):
        log_probs = jax.nn.log_softmax(transformer.Model(lm.config, params).logits(hidden))
        return jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]

    # All positions at once, one at a time, and three at a time with a rest.
    @pytest.mark.parametrize("alive", [2**26, 1, 3 * 3 * 23])
    def test_values_and_gradients(self, case, alive):
        lm, hidden, targets = case

        def chunked(params, hidden):
            return transformer.Model(lm.config, params).target_log_probs(hidden, targets, alive=alive)

        expected = self.plain(lm, lm.params, hidden, targets)
        np.testing.assert_allclose(chunked(lm.params, hidden), expected, rtol=0, atol=1e-5)
        weights = jnp.arange(21.0).reshape(3, 7)
        actual, plain = (
            jax.grad(lambda *args, f=f: jnp.sum(weights * f(*args)), argnums=(0, 1))(lm.params, hidden)
            for f in (chunked, lambda params, hidden: self.plain(lm, params, hidden, targets))
        )
        chex.assert_trees_all_close(actual, plain, rtol=0, atol=1e-4)

    def test_neither_values_nor_gradients_hold_all_logits(self, make_lm):
        lm = make_lm(0, vocab=4096, layers=1)
        b, t = 4, 64
        hidden = jnp.zeros((b, t, lm.config.width))
        targets = jnp.zeros((b, t), jnp.int32)

        def memory(alive):
            def loss(params, hidden):
                return jnp.sum(transformer.Model(lm.config, params).target_log_probs(hidden, targets, alive=alive))

            compiled = jax.jit(jax.grad(loss, argnums=1)).lower(lm.params, hidden).compile()
            return compiled.memory_analysis().temp_size_in_bytes

        everything = 4 * b * t * lm.config.vocab
        assert memory(2**26) > everything
        assert memory(4 * b * lm.config.vocab) < everything / 4

    @pytest.mark.device
    def test_log_probs_of_a_text(self, make_lm):
        lm = make_lm(7)
        ids = np.arange(10).reshape(2, 5)
        log_probs = np.asarray(jax.nn.log_softmax(lm.logits(ids)))
        expected = np.take_along_axis(log_probs[:, :-1], ids[:, 1:, None], axis=-1)[..., 0]
        np.testing.assert_allclose(lm.log_probs(ids), expected, rtol=0, atol=on_device(1e-5, 2e-4))


@pytest.mark.rare
def test_rematerialisation_keeps_values_and_gradients_and_fewer_residuals(make_lm):
    """Counted before compilation: XLA for CPUs merges the recomputation with the first computation again."""
    lm = make_lm(8, layers=6, width=32, ffn_width=256)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, lm.config.vocab, (4, 64)))

    def run(remat):
        def loss(params):
            model = transformer.Model(lm.config, params)
            return jnp.mean(model.forward(ids, jnp.ones_like(ids), remat=remat)[0] ** 2)

        value, pull = jax.vjp(loss, lm.params)
        return value, pull(jnp.ones(()))[0], sum(leaf.nbytes for leaf in jax.tree.leaves(pull))

    (value, gradients, kept), (again, gradients_again, recomputed) = run(remat=False), run(remat=True)
    np.testing.assert_allclose(again, value, rtol=1e-6)
    chex.assert_trees_all_close(gradients_again, gradients, rtol=0, atol=1e-5)
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(lm.params))
    assert recomputed - parameters < 0.3 * (kept - parameters)


def test_decoding_never_holds_the_logits_of_a_whole_prompt(make_lm):
    lm = make_lm(0, vocab=97)
    ensemble = rj.Ensemble([lm, lm])
    ids = jnp.ones((3, 29), jnp.int32)
    spec = ensemble.spec(max_new_tokens=4)
    weights = jnp.full((3, 2), 0.5)
    text = jax.jit(lambda *args: rj.decode(*args, spec).tokens).lower(
        ensemble.params, ids, ids, weights, jax.random.key(0)
    )
    shapes = set(re.findall(r"tensor<([0-9x]+)xf32>", text.as_text()))
    assert "3x97" in shapes
    assert not [shape for shape in shapes if {"97", "28"} <= set(shape.split("x"))]


def test_an_encoder_decoder_needs_decoder_ids_and_others_none(make_lm, stored_checkpoint, raises_input_error):
    ids = np.ones((1, 3), int)
    raises_input_error(lambda: load(stored_checkpoint("tied", "t5")).logits(ids), "decoder_ids", "give")
    raises_input_error(lambda: make_lm(0).hidden(ids, None, ids), "decoder_ids", "do not give")


@pytest.mark.parametrize("call", ["logits", "hidden", "log_probs", "apply"])
def test_ids_and_masks_of_the_wrong_shape_are_told(make_lm, raises_input_error, call):
    lm = make_lm(0)
    ids = jnp.ones((2, 3), jnp.int32)
    run = functools.partial(lm.apply, lm.params) if call == "apply" else getattr(lm, call)
    for wrong in (ids[0], ids[None], jnp.ones((2, 3)), ids[:0]):
        raises_input_error(lambda wrong=wrong: run(wrong, None), lm.name, "ids must be", "[B, T]", str(wrong.dtype))
    for wrong in (ids[:1], ids[:, :2], ids[0]):
        raises_input_error(lambda wrong=wrong: run(ids, wrong), lm.name, "mask", "[2, 3]", str(list(wrong.shape)))


def test_decoder_ids_of_the_wrong_shape_are_told(stored_checkpoint, raises_input_error):
    lm = load(stored_checkpoint("tied", "t5"))
    ids = np.ones((2, 3), int)
    raises_input_error(lambda: lm.hidden(ids, None, ids[0]), "decoder_ids must be", "[3]")
    raises_input_error(lambda: lm.hidden(ids, None, np.ones((3, 2), int)), "3 rows of decoder_ids", "2 rows")


class TestPretraining:
    """An encoder-decoder learns to write what its encoder reads, backwards."""

    START = 0

    @pytest.fixture(scope="class")
    def lm(self, stored_checkpoint):
        return load(stored_checkpoint("untied", "t5"))

    @pytest.fixture(scope="class")
    def rows(self):
        rng = np.random.default_rng(0)
        lengths = rng.integers(2, 5, 64)
        source, mask = np.zeros((64, 4), int), (np.arange(4) < lengths[:, None]).astype(int)
        ids, predicted = np.full((64, 6), self.START), np.zeros((64, 6), bool)
        for row, n in enumerate(lengths):
            source[row, :n] = rng.integers(2, 10, n)
            ids[row, 1 : n + 2], predicted[row, 1 : n + 2] = [*source[row, :n][::-1], 1], True
        return ids, predicted, Source(jnp.asarray(source), jnp.asarray(mask))

    @pytest.fixture(scope="class")
    def loss(self, lm, rows):
        ids, predicted, _ = rows
        return jax.jit(
            lambda params, source: next_token_loss(lm.config, params, *map(jnp.asarray, (ids, predicted)), source)
        )

    def test_the_loss_by_hand(self, lm, rows, loss):
        ids, predicted, source = rows
        total = 0.0
        for row in range(len(ids)):
            n = int(predicted[row].sum())
            asked = source.ids[row : row + 1, : int(source.mask[row].sum())]  # alone, without padding
            total -= float(np.sum(lm.log_probs(asked, None, ids[row : row + 1, : n + 1])))
        np.testing.assert_allclose(loss(lm.params, source), total / predicted.sum(), rtol=1e-5)

    def test_it_lowers_the_loss(self, lm, rows, loss):
        ids, predicted, source = rows
        train = PretrainConfig(steps=100, batch=32, learning_rate=1e-2, warmup=5, report_every=50)
        told = []
        before = jax.tree.map(np.array, lm.params)
        params = pretrain(
            *(lm.config, ids, predicted, train),
            seed=0,
            params=lm.params,
            source=source,
            on_progress=lambda *progress: told.append(progress),
        )
        first, last = loss(lm.params, source), loss(params, source)
        assert [step for step, _ in told] == [50, 100]
        assert last < told[1][1] < told[0][1] < first
        assert last < 0.5 * first
        assert loss(params, jax.tree.map(lambda leaf: leaf[::-1], source)) > 1.5 * last  # it is the source that tells
        chex.assert_trees_all_equal(lm.params, before)  # where it starts is left as it is
