"""Keys and values in 8 bits: bounds of what that changes, and the same tokens as with numbers that were rounded so.

The slow side keeps float32 arrays of numbers that went through 8 bits and back, so that all products are plain ones.
"""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax.fusion.decode import decode_spans, prefill
from rlae_jax.fusion.prompts import prompts_from_arrays
from rlae_jax.models import attention
from rlae_jax.models.cache import LayerCache, as_numbers, cache_bytes
from tests.helpers.adapters import EVERY_LAYER, random_adapter
from tests.helpers.tokenizers import byte_level, sentencepiece

PROMPTS = np.random.default_rng(0).integers(0, 23, (3, 9))
MASK = np.arange(9) >= np.array([0, 7, 4])[:, None]
N = 20
LARGEST = {"int8": 127.0, "fp8": 448.0}


def through_8_bits(x: jax.Array, kind: str) -> jax.Array:
    """[B, G, H, S]: over each head's entries, the largest becomes the largest number of the kind."""
    scale = jnp.max(jnp.abs(x), axis=2, keepdims=True) / LARGEST[kind]
    scaled = x / jnp.where(scale == 0, 1.0, scale)
    return scale * (jnp.round(scaled) if kind == "int8" else scaled.astype(jnp.float8_e4m3fn).astype(jnp.float32))


@pytest.fixture(params=["int8", "fp8"])
def kind(request):
    return request.param


@pytest.fixture
def slow(monkeypatch, kind):
    """slow(lm) -> a model without kv_dtype whose keys and values are rounded as they are stored."""

    def make(lm):
        rounded = lambda k, v, config: LayerCache(through_8_bits(k, kind), through_8_bits(v, kind))  # noqa: E731
        monkeypatch.setattr(LayerCache, "hold", rounded)
        context = lm.config.context + list(LARGEST).index(kind) + 1  # no program is shared
        return dataclasses.replace(lm, config=dataclasses.replace(lm.config, context=context))

    return make


def quantised(lm, kind):
    return dataclasses.replace(lm, config=dataclasses.replace(lm.config, kv_dtype=kind))


def write(ensemble, **options):
    return ensemble.generate(prompt_ids=PROMPTS, prompt_mask=MASK, max_new_tokens=N, scores=True, **options)


def assert_same(one, other):
    """Later steps differ by what a number that lies between two of 8 bits makes, where its last bit decides."""
    assert one.tokens == other.tokens
    for ours, theirs in zip(one.scores, other.scores, strict=True):
        np.testing.assert_allclose(ours[:1], theirs[:1], rtol=0, atol=2e-5)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_stored(make_lm, kind, dtype):
    """Within half a step of int8, within 2^-4 of each number of fp8 (or half its least step); zeros stay zeros."""
    config = quantised(make_lm(0, dtype=dtype), kind).config
    x = np.random.default_rng(1).normal(size=(2, 3, 4, 5)).astype(np.float32)
    x[0, 0, :, 0] = 0
    x = np.asarray(jnp.asarray(x, dtype), np.float32)
    held = LayerCache.hold(jnp.asarray(x, dtype), jnp.asarray(2 * x, dtype), config)
    assert held.keys.dtype.itemsize == held.values.dtype.itemsize == 1
    scale = np.asarray(held.key_scale)
    keys = np.asarray(as_numbers(held.keys, jnp.float32))
    restored = keys * scale[:, :, None]
    step = scale[:, :, None] * np.ones_like(x)
    bound = step / 2 if kind == "int8" else np.maximum(np.abs(x) * 2.0**-4, step * 2.0**-10)
    assert np.all(np.abs(restored - x) <= bound * 1.0001)
    np.testing.assert_allclose(scale, np.abs(x).max(axis=2) / LARGEST[kind], rtol=1e-6)
    assert not restored[0, 0, :, 0].any()
    np.testing.assert_array_equal(held.values, held.keys)
    reference = x / np.where(step == 0, 1, step)
    reference = np.round(reference) if kind == "int8" else reference.astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(keys, np.asarray(reference, np.float32))


@pytest.mark.parametrize(
    "fields",
    [
        {"local_layers": (0,), "window": 20, "attention_cap": 3.0},
        pytest.param({"heads": 12, "kv_heads": 1}, marks=pytest.mark.rare),
    ],
    ids=["window", "many-queries"],
)
def test_tokens_are_those_of_rounded_numbers(make_lm, kind, slow, fields, monkeypatch):
    """Also where a block of slots is smaller than the cache and does not divide it; and near the exact cache's."""
    monkeypatch.setattr(attention, "_BLOCK", 1)  # blocks of 16 slots of 29
    lm = make_lm(0, layers=2, **fields)
    exact = write(rj.Ensemble([lm], end_ids=()))
    out = write(rj.Ensemble([quantised(lm, kind)], end_ids=()))
    assert 0 < abs(out.scores[0][0] - exact.scores[0][0]) <= {"int8": 0.02, "fp8": 0.1}[kind]
    assert_same(out, write(rj.Ensemble([slow(lm)], end_ids=())))


@pytest.mark.parametrize("kind", ["int8", pytest.param("fp8", marks=pytest.mark.rare)], indirect=True)
def test_adapters_samples_and_going_on(make_lm, slow, kind):
    lm = make_lm(0, layers=1, sharpness=2.0)
    adapters = [random_adapter(lm, seed, rank=2, alpha=1.0, targets=EVERY_LAYER) for seed in (1, 2)]
    options = {"samples": 2, "temperature": 1.0}
    ensemble = rj.Ensemble.from_adapters(quantised(lm, kind), adapters, end_ids=())
    out = write(ensemble, **options)
    rows = {"prompt_ids": PROMPTS, "prompt_mask": MASK, "scores": True} | options
    part = ensemble.generate(max_new_tokens=5, keep=True, **rows)
    assert_same(ensemble.extend(part, N - 5), out)
    assert_same(out, write(rj.Ensemble.from_adapters(slow(lm), adapters, end_ids=()), **options))


@pytest.mark.parametrize("kind", ["int8", pytest.param("fp8", marks=pytest.mark.rare)], indirect=True)
def test_members_with_different_tokenizers(make_lm, slow, kind):
    tokenizers = byte_level([b" the", b"th"], ["</s>"]), sentencepiece(["▁the", "é"])
    fields = {"window": 5, "local_layers": (0,)}, {}
    pair = [
        make_lm(k, tokenizer=tokenizer, vocab=len(tokenizer), end_ids=(tokenizer.eos_token_id,), layers=1, **own)
        for k, (tokenizer, own) in enumerate(zip(tokenizers, fields, strict=True))
    ]
    options = {"weights": [0.5, 0.5], "max_new_tokens": 30, "scores": True}
    texts = ["the é", "ab", "x"]
    out = rj.Ensemble([quantised(lm, kind) for lm in pair]).generate(texts, **options)
    assert_same(out, rj.Ensemble([slow(lm) for lm in pair]).generate(texts, **options))


def test_memory(make_lm, kind):
    """The loop holds no converted copy of the cache, which takes what `cache_bytes` says."""
    lm = quantised(make_lm(0, layers=1, head_width=64), kind)
    ensemble = rj.Ensemble([lm], end_ids=())
    t, n, batch = 3000, 1000, 8
    spec, ids = ensemble.spec(max_new_tokens=n), np.ones((batch, t), np.int32)
    prompts = prompts_from_arrays(ids, ids, n, jax.random.key(0))
    state = jax.eval_shape(lambda: prefill(ensemble.params, prompts, spec))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.caches))
    assert held == batch * cache_bytes(lm.config, t + n) == batch * (t + n) * 2 * 2 * (64 + 4)
    compiled = jax.jit(decode_spans, donate_argnums=1).lower(ensemble.params, state, np.ones((1, 1)), spec).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= held
    assert memory.temp_size_in_bytes <= 0.75 * held  # a converted copy of keys or values alone is twice as large


def test_loading(stored_checkpoint, raises_input_error):
    directory = stored_checkpoint("grouped")
    assert rj.load(directory, kv_dtype="int8").config.kv_dtype == "int8"
    raises_input_error(lambda: rj.load(directory, kv_dtype="int4"), "kv_dtype 'int4'", "int8 or fp8")
    t5 = stored_checkpoint("untied", "t5")
    raises_input_error(lambda: rj.load(t5, kv_dtype="fp8"), "fp8 is for decoders")
