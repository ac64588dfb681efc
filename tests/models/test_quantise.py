"""Quantised kernels against the weights that they stand for, multiplied the plain way."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax import hlo
from rlae_jax.models import checkpoint_files, quantise, transformer
from rlae_jax.models.quantise import Quantised, is_quantised
from rlae_jax.models.stored import Packed, StoredTensor, stored_tensors
from tests.data import hf
from tests.helpers.adapters import random_adapter

CASES = [
    ("btd,dnh->btnh", (96, 3, 8), (2, 3)),
    ("btnh,nhd->btd", (3, 32, 40), (2, 3)),
    ("btd,df->btf", (96, 7), (1, 1)),
    ("btd,df->btf", (64, 7), (4, 5)),
    ("...d,dv->...v", (64, 11), (1,)),
]
# (kind, inputs of a group, zero points); 0: a scale per output channel
HELD = [("int8", 0, False), ("int8", 32, True), ("int4", 0, True), ("int4", 32, False), ("int4", 32, True)]
HELD += [("fp8", 0, False), ("fp8", 32, False)]


@pytest.fixture
def rng():
    return np.random.default_rng()


@pytest.fixture
def checkpoint(make_lm, tmp_path):
    make_lm(0, vocab=40, width=64, heads=4, kv_heads=2, head_width=16, ffn_width=96).save(tmp_path / "m")
    return tmp_path / "m"


def weights_slowly(kernel: Quantised, shape: tuple[int, ...]) -> np.ndarray:
    """Element by element."""
    values, scale = (np.asarray(part).astype(np.float32) for part in (kernel.values, kernel.scale))
    zero = np.zeros_like(scale) if kernel.zero is None else np.asarray(kernel.zero)
    out = np.empty(values.shape, np.float32)
    for place in np.ndindex(*values.shape):
        own = tuple(i if size > 1 else 0 for i, size in zip(place, scale.shape, strict=True))
        out[place] = (values[place] - zero[own]) * scale[own]
    return out.reshape(shape)


def evenly_slowly(grouped: np.ndarray) -> np.ndarray:
    """The nearest of sixteen numbers that lie evenly from the least to the largest of each group, [G, g, ...]."""
    out = np.empty_like(grouped)
    for place in np.ndindex(grouped.shape[0], *grouped.shape[2:]):
        own = (place[0], slice(None), *place[1:])
        numbers = np.linspace(grouped[own].min(), grouped[own].max(), 16)
        out[own] = numbers[np.argmin(np.abs(grouped[own][:, None] - numbers), axis=1)]
    return out


@pytest.mark.parametrize(("kind", "group", "zero"), HELD)
@pytest.mark.parametrize(("einsum", "shape", "batch"), CASES)
def test_products_are_those_of_the_weights(einsum, shape, batch, kind, group, zero, rng, monkeypatch):
    monkeypatch.setattr(quantise, "_BLOCK", dict.fromkeys(quantise._BLOCK, 300))  # several blocks and a rest
    inputs = sum(letter not in einsum.split("->")[1] for letter in einsum.split(",")[1].split("->")[0])
    kernel, x = (rng.standard_normal(s).astype(np.float32) for s in (shape, (*batch, *shape[:inputs])))
    held = quantise.quantise_kernel(kernel, kind=kind, inputs=inputs, group=group)
    errors = weights_slowly(held, shape) - kernel
    if kind == "int4":
        grouped = kernel.reshape(-1, group or np.prod(shape[:inputs]), *shape[inputs:])
        assert np.mean(errors**2) <= np.mean((evenly_slowly(grouped) - grouped) ** 2) * (1 + 1e-5)
    else:
        step = {"int8": 0.5 / 127, "fp8": 2.0**-4}[kind]  # at most half a step of the largest
        assert np.max(np.abs(errors)) <= step * np.max(np.abs(kernel)) * (1 + 1e-5)
    if zero:
        held = dataclasses.replace(held, zero=rng.integers(-3, 4, held.scale.shape).astype(np.float32))
    weights = weights_slowly(held, shape)
    np.testing.assert_array_equal(quantise.dequantised(held, shape, np.float32), weights)

    def product(x):
        return quantise.product(einsum, x, held, "highest", shape)

    expected = np.einsum(einsum, x.astype(np.float64), weights)
    scale = np.max(np.abs(expected))
    np.testing.assert_allclose(product(x), expected, atol=2e-6 * scale)
    back = rng.standard_normal(expected.shape).astype(np.float32)
    operands, out = einsum.split("->")
    transposed_product = np.einsum(f"{out},{operands.split(',')[1]}->{operands.split(',')[0]}", back, weights)
    gradient = jax.grad(lambda x: jnp.sum(product(x) * back))(x)
    np.testing.assert_allclose(gradient, transposed_product, atol=2e-6 * np.max(np.abs(transposed_product)))
    layout = quantise._Layout.of(einsum, shape)
    for spread in (False, True):  # an accelerator's way, without a mesh and with one
        for transposed, operand, wanted in ((False, x, expected), (True, back, transposed_product)):
            out = quantise._fused(layout, "highest", transposed, jnp.asarray(operand), held, spread=spread)
            np.testing.assert_allclose(out, wanted, atol=2e-6 * np.max(np.abs(wanted)))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("rows", [1, 5])
def test_a_table_is_looked_up_and_is_a_head(kind, rows, rng, monkeypatch):
    monkeypatch.setattr(quantise, "_BLOCK", dict.fromkeys(quantise._BLOCK, 300))
    table, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((51, 64), (rows, 64)))
    held = quantise.quantise_table(table, kind=kind)
    weights = weights_slowly(held, table.shape)
    ids = rng.integers(0, 51, (2, 3))
    np.testing.assert_array_equal(quantise.rows(held, ids, jnp.float32), weights[ids])
    logits = quantise.product("...d,vd->...v", x, held, "highest")
    np.testing.assert_allclose(logits, x @ weights.T, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("zero", [False, True])
def test_a_stored_quantised_weight_becomes_the_layers_kernels(groups, zero, rng):
    """A fused tensor of two layers of two heads."""
    tensor = StoredTensor("qk.weight", (("q",), ("k",)), ((96, 2, 4), (96, 1, 4)), "kernel", 1)
    values = rng.integers(-8, 8, (12, 96)).astype(np.int8)
    scale = rng.uniform(0.5, 2, (12, groups)).astype(np.float32)
    offset = rng.integers(-8, 8, (12, groups)).astype(np.float32) if zero else None
    weights = np.empty((12, 96), np.float32)
    for o, i in np.ndindex(12, 96):
        g = i * groups // 96
        weights[o, i] = (values[o, i] - (0 if offset is None else offset[o, g])) * scale[o, g]
    kernels = tensor.split_packed(Packed(values, scale, offset, "int4"))
    for kernel, plain, shape in zip(kernels, tensor.split(weights), tensor.shapes, strict=True):
        assert kernel.kind == "int4"
        np.testing.assert_allclose(quantise.dequantised(kernel, shape, np.float32), plain, rtol=1e-6)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("kind", quantise.KINDS)
def test_a_quantised_model_is_the_model_of_its_weights(checkpoint, tmp_path, kind, head):
    lm = rj.load(checkpoint, quantise=kind, quantise_head=head)
    assert is_quantised(lm.params["layers"][0]["ffn"]["up"]["kernel"])
    assert is_quantised(lm.params["embedding"]) == head
    lm.save(tmp_path / "again")  # writes the weights that the model stands for
    plain = rj.load(tmp_path / "again")
    ids = np.random.default_rng().integers(0, lm.config.vocab, (3, 9))
    np.testing.assert_allclose(lm.logits(ids), plain.logits(ids), atol=2e-5 * np.max(np.abs(plain.logits(ids))))
    tokens = [rj.Ensemble([m]).generate(prompt_ids=ids, max_new_tokens=8, ignore_eos=True).tokens for m in (lm, plain)]
    assert tokens[0] == tokens[1]
    assert lm.fingerprint() != plain.fingerprint()
    assert rj.load(checkpoint, quantise=kind, quantise_head=head).fingerprint() == lm.fingerprint()


@pytest.mark.parametrize(("family", "kind"), [("qwen3_5", "int4"), pytest.param("lfm2", "fp8", marks=pytest.mark.rare)])
def test_layers_with_a_state(tmp_path, family, kind):
    """Their linear maps are quantised, those to a number per head too; convolutions and what heads have are not. A
    cache in 8 bits keeps states as they are."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "linear_num_key_heads": 1, "linear_num_value_heads": 2}
    sizes |= {"num_hidden_layers": 2, "full_attention_interval": 2, "full_attn_idxs": [1]}
    sizes |= {"linear_key_head_dim": 8, "linear_value_head_dim": 16, "block_auto_adjust_ff_dim": False}
    config = hf.read_stored(family, next(iter(hf.FAMILIES[family].cases))).config | sizes
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = checkpoint_files.read_source(tmp_path)
    made = checkpoint_files.read_config(source, tmp_path, dtype="float32", precision=None, tensors=False)
    tensors = {tensor.key: tensor.shape for tensor in stored_tensors(source.family, made)}
    hf.write_checkpoint(tmp_path / "m", config, tensors, 0)

    lm = rj.load(tmp_path / "m", quantise=kind, kv_dtype="int8")
    own = lm.params["layers"][0]["recurrence"]
    held = {name: is_quantised(part.get("kernel")) if isinstance(part, dict) else False for name, part in own.items()}
    plain = {"convolution", "log_rate", "decay_bias", "head_norm"}
    assert held == {name: name not in plain for name in own}
    ids = np.random.default_rng().integers(0, made.vocab, (3, 9))
    layers = transformer.Model(lm.config, lm.params).read_prompt(ids, np.ones_like(ids)).layers
    exact = {leaf.dtype for i in made.recurrent_layers for leaf in jax.tree.leaves(layers[i])}
    assert exact == {jnp.dtype(jnp.float32)}
    assert layers[1].keys.dtype == jnp.int8
    lm.save(tmp_path / "again")
    whole = rj.load(tmp_path / "again", kv_dtype="int8")
    expected = np.asarray(whole.logits(ids))
    np.testing.assert_allclose(lm.logits(ids), expected, atol=2e-5 * np.max(np.abs(expected)))
    tokens = [rj.Ensemble([m]).generate(prompt_ids=ids, max_new_tokens=4, ignore_eos=True).tokens for m in (lm, whole)]
    assert tokens[0] == tokens[1]


def test_int8_takes_a_quarter_of_the_memory(checkpoint):
    def size(lm):
        return sum(quantise.weight_bytes(leaf) for leaf in jax.tree.leaves(lm.params["layers"]))

    full = size(rj.load(checkpoint))
    assert size(rj.load(checkpoint, quantise="int8")) < 0.3 * full
    assert size(rj.load(checkpoint, quantise="int4")) < 0.2 * full


def test_adapters_stay_beside_a_quantised_base(checkpoint, raises_input_error):
    lm = rj.load(checkpoint, quantise="int8")
    adapters = [random_adapter(lm, seed=i) for i in range(2)]
    ids = np.random.default_rng().integers(0, lm.config.vocab, (2, 7))
    both = lm.with_adapters(adapters).logits(ids, adapters=[0, 1])
    for i in range(2):
        alone = lm.with_adapters(adapters[i : i + 1]).logits(ids[i : i + 1])
        np.testing.assert_allclose(both[i], alone[0], atol=1e-4)
    raises_input_error(lambda: lm.with_adapter(adapters[0]), "quantised", "with_adapters")


def test_what_cannot_be_quantised_is_told(make_lm, checkpoint, tmp_path, raises_input_error):
    raises_input_error(lambda: rj.load(checkpoint, quantise="int8", adapter="a"), "beside", "with_adapters")
    raises_input_error(lambda: rj.load(checkpoint, quantise="int3"), "int3", "int8, int4, fp8")
    raises_input_error(lambda: rj.load(checkpoint, quantise="int4", quantise_group=48), "48", "32, 64, 128")
    make_lm(0, width=64, ffn_width=50).save(tmp_path / "odd")
    raises_input_error(lambda: rj.load(tmp_path / "odd", quantise="int4"), "down_proj", "50 inputs", "32, 64, 128")


@pytest.mark.parametrize("rows", [1, 8, 300])
@pytest.mark.parametrize(("kind", "group"), [("int8", 0), ("int8", 32), ("int4", 32), ("fp8", 0)])
def test_no_converted_copy_of_a_kernel_is_made(kind, group, rows):
    """Nothing that the compiled program computes has more numbers than a block, or than the rows."""
    d, f = 1024, 4096
    held = jax.eval_shape(
        lambda kernel: quantise.quantise_kernel(kernel, kind=kind, inputs=1, group=group),
        jax.ShapeDtypeStruct((d, f), jnp.float32),
    )
    x = jax.ShapeDtypeStruct((rows, 1, d), jnp.float32)
    program = jax.jit(lambda x, kernel: quantise.product("btd,df->btf", x, kernel, "highest", (d, f)))
    module = hlo.parse(program.lower(x, held).compile().as_text())
    assert hlo.largest_float(module) <= max(quantise._BLOCK["cpu"], rows * f)


@pytest.mark.parametrize("kind", quantise.KINDS)
def test_a_loop_over_steps_holds_one_converted_block_at_a_time(kind):
    """And not a converted copy of every layer's kernel, made before the loop or before the first product."""
    d, layers = 512, 8
    held = jax.eval_shape(
        lambda kernel: quantise.quantise_kernel(kernel, kind=kind, inputs=1, group=32 if kind == "int4" else 0),
        jax.ShapeDtypeStruct((d, d), jnp.float32),
    )

    def steps(x, kernels):
        def step(_, x):
            for kernel in kernels:
                x = jnp.tanh(quantise.product("btd,df->btf", x, kernel, "highest", (d, d)))
            return x

        return jax.lax.fori_loop(0, 4, step, x)

    program = jax.jit(steps).lower(jax.ShapeDtypeStruct((1, 1, d), jnp.float32), [held] * layers).compile()
    stored = layers * d * d * (1 if kind == "fp8" else 0.5 if kind == "int4" else 0)  # as bytes, see `_pack`
    assert program.memory_analysis().temp_size_in_bytes < stored + 2.5 * 4 * d * d


def test_every_number_of_fp8():
    bits = np.array([b for b in range(256) if b & 127 != 127], np.uint8)  # but NaN
    np.testing.assert_array_equal(quantise._from_e4m3(bits), bits.view(jnp.float8_e4m3fn).astype(np.float32))


@pytest.mark.parametrize("kind", quantise.KINDS)
def test_parameters_in_memory_become_what_is_loaded(checkpoint, kind):
    plain, wanted = rj.load(checkpoint), quantise.Quantisation(kind, head=True)
    made = quantise.quantise_params(plain.params, transformer.linears(plain.config), wanted)
    chex.assert_trees_all_equal(made, rj.load(checkpoint, quantise=kind, quantise_head=True).params)
