"""Weights that are no numbers are named on loading, wherever they stand and however they are held."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import rlae_jax as rj
from rlae_jax import digests
from rlae_jax.commands.options import HeldOptions, ModelOptions
from rlae_jax.models import finite, transformer
from rlae_jax.models.quantise import Quantised
from tests.data import hf
from tests.helpers.adapters import random_adapter

DOWN = "model.layers.1.mlp.down_proj.weight"
SIZES = {"width": 32, "ffn_width": 64, "head_width": 8}


@pytest.fixture
def checkpoint(stored_checkpoint, tmp_path):
    return Path(shutil.copytree(stored_checkpoint("grouped"), tmp_path / "checkpoint"))


def spoil(directory, change, file="model.safetensors"):
    path = directory / file
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    (directory / digests.FILE).unlink(missing_ok=True)


def put(name, value, count=1):
    def change(tensors):
        tensors[name].reshape(-1)[:count] = value

    return change


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_tensor_is_named_with_its_values_counted(checkpoint, value):
    spoil(checkpoint, put(DOWN, value, 12))
    with pytest.raises(rj.InputError) as error:
        rj.load(checkpoint)
    assert f"{checkpoint}: {DOWN}: 12 of 264 values are not finite; " in str(error.value)
    assert "--no-check-finite" in str(error.value)
    assert "\n" not in str(error.value)
    assert not np.isfinite(rj.load(checkpoint, check_finite=False).logits([[1, 2, 3]])).all()


def test_every_tensor_of_a_checkpoint_is_looked_at(checkpoint):
    names = sorted(load_file(checkpoint / "model.safetensors"))
    for name in names:
        whole = load_file(checkpoint / "model.safetensors")
        spoil(checkpoint, lambda tensors, name=name: tensors[name].reshape(-1).__setitem__(-1, np.nan))
        with pytest.raises(rj.InputError, match=rf"{name}: 1 of \d+ values are not finite"):
            rj.load(checkpoint)
        save_file(whole, checkpoint / "model.safetensors", metadata={"format": "pt"})


def test_many_are_counted_and_the_first_are_named(checkpoint):
    spoil(checkpoint, lambda tensors: [tensor.fill(np.nan) for tensor in tensors.values()])
    with pytest.raises(rj.InputError, match=r"(?s)weights are no numbers\n  \d+ not finite: .*; \.\.\.\n.*list is in"):
        rj.load(checkpoint)


def test_what_a_smaller_dtype_cannot_hold(checkpoint):
    spoil(checkpoint, put(DOWN, 1e5, 3))
    for dtype in ("float32", "bfloat16"):
        rj.load(checkpoint, dtype)
    with pytest.raises(rj.InputError, match=rf"{DOWN}: 3 of 264 values are beyond float16; bfloat16 and float32 hold"):
        rj.load(checkpoint, "float16")
    spoil(checkpoint, put(DOWN, np.finfo(np.float32).max))
    with pytest.raises(rj.InputError, match="1 of 264 values are beyond bfloat16"):
        rj.load(checkpoint, "bfloat16")


@pytest.mark.parametrize("quantise", ["int8", "fp8", "int4"])
def test_kernels_that_are_quantised_on_loading(make_lm, tmp_path, quantise):
    make_lm(0, **SIZES).save(tmp_path / "m")
    rj.load(tmp_path / "m", quantise=quantise)
    for value in (np.nan, np.inf):
        spoil(tmp_path / "m", put("model.layers.0.mlp.up_proj.weight", value))
        with pytest.raises(rj.InputError, match=r"layers\.0\.mlp\.up_proj\.weight: 1 of \d+ values are not finite"):
            rj.load(tmp_path / "m", quantise=quantise)


def test_quantised_kernels_and_their_scales():
    whole = Quantised(jnp.ones((4, 3), jnp.int8), jnp.ones((1, 3)), jnp.zeros((1, 3)))
    assert finite.flag(whole)
    for name in ("scale", "zero"):
        assert not finite.flag(dataclasses.replace(whole, **{name: jnp.array([[1.0, jnp.nan, 0.0]])}))
    fp8 = np.ones((4, 3), ml_dtypes.float8_e4m3fn)
    assert finite.flag(Quantised(fp8, whole.scale))
    fp8[1, 1] = np.nan
    assert not finite.flag(Quantised(jnp.asarray(fp8), whole.scale))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_large_finite_numbers_are_finite(dtype):
    largest = jnp.full((300, 500), jnp.finfo(dtype).max, dtype)
    assert finite.flag(largest)
    assert finite.flag(-largest)
    for value in (jnp.inf, -jnp.inf, jnp.nan):
        assert not finite.flag(largest.at[-1, -1].set(value))


def test_stacked_experts_are_named_one_by_one(tmp_path):
    stored = hf.read_stored("mixtral", sorted(hf.FAMILIES["mixtral"].cases)[0])
    hf.write_checkpoint(tmp_path / "m", stored.config, stored.tensors, stored.seed)
    name = next(name for name in sorted(load_file(tmp_path / "m" / "model.safetensors")) if "experts.1." in name)
    spoil(tmp_path / "m", put(name, np.nan))
    with pytest.raises(rj.InputError, match=rf"{name}: 1 of \d+ values are not finite"):
        rj.load(tmp_path / "m")


def test_on_a_mesh(make_lm, tmp_path):
    make_lm(0, vocab=24).save(tmp_path / "m")
    spoil(tmp_path / "m", put("model.layers.0.mlp.up_proj.weight", np.nan))
    with pytest.raises(rj.InputError, match=r"up_proj\.weight: 1 of \d+ values are not finite"):
        rj.load(tmp_path / "m", mesh=rj.make_mesh(4, 2))


def test_encoders(tmp_path):
    stored = hf.read_stored("bert", sorted(hf.FAMILIES["bert"].cases)[0])
    hf.write_checkpoint(tmp_path / "m", stored.config, stored.tensors, stored.seed)
    name = next(key for key in load_file(tmp_path / "m" / "model.safetensors") if "layer.0.output.dense.weight" in key)
    spoil(tmp_path / "m", put(name, np.nan))
    with pytest.raises(rj.InputError, match=rf"{name}: 1 of \d+ values are not finite"):
        rj.load_encoder(tmp_path / "m")
    rj.load_encoder(tmp_path / "m", check_finite=False)


def test_adapters_from_files_and_from_memory(make_lm, tmp_path):
    make_lm(0, **SIZES).save(tmp_path / "m")
    lm = rj.load(tmp_path / "m")
    rj.save_adapter(random_adapter(lm, 0), lm, tmp_path / "a")
    name = next(key for key in load_file(tmp_path / "a" / "adapter_model.safetensors") if "lora_B" in key)
    spoil(tmp_path / "a", put(name, np.inf, 2), "adapter_model.safetensors")
    unchecked = rj.load(tmp_path / "m", check_finite=False)
    for use in (lm.with_adapter, lambda a: lm.with_adapters([a]), lambda a: rj.Ensemble.from_adapters(lm, [a])):
        with pytest.raises(rj.InputError, match=rf"{name}: 2 of \d+ values are not finite"):
            use(tmp_path / "a")
    with pytest.raises(rj.InputError, match="values are not finite"):
        rj.load(tmp_path / "m", adapter=tmp_path / "a")
    in_memory = rj.load_adapter(tmp_path / "a", unchecked)
    with pytest.raises(rj.InputError, match=r"the adapter a: layers\..*\.b is not finite"):
        lm.with_adapter(in_memory)
    unchecked.with_adapters([in_memory])


def test_an_adapter_whose_sum_with_the_base_is_too_large(make_lm, tmp_path):
    make_lm(0, **SIZES).save(tmp_path / "m")
    lm = rj.load(tmp_path / "m", "float16")
    adapter = random_adapter(lm, 0)
    large = jax.tree.map(lambda leaf: leaf * 1e4, adapter.params)
    with pytest.raises(rj.InputError, match="beyond float16 when merged"):
        lm.with_adapter(dataclasses.replace(adapter, params=large))


def test_the_commands_flag(checkpoint):
    assert HeldOptions().check_finite
    spoil(checkpoint, put(DOWN, np.nan))
    options = ModelOptions(models=(str(checkpoint),), held=HeldOptions())
    with pytest.raises(rj.InputError, match="are not finite"):
        options.load()
    dataclasses.replace(options, held=HeldOptions(check_finite=False)).load()


def test_one_program_for_each_shape(make_lm, tmp_path):
    make_lm(0, layers=4).save(tmp_path / "m")
    lm = rj.load(tmp_path / "m")
    before = finite.flag_parts.cache_size()
    rj.load(tmp_path / "m")
    assert finite.flag_parts.cache_size() == before
    shapes = {leaf.shape for leaf in jax.tree.leaves(transformer.abstract_params(lm.config))}
    assert len(shapes) < len(jax.tree.leaves(lm.params)) / 3


def test_training_that_diverged_is_told():
    params = {"a": jnp.ones((3, 2)), "b": jnp.zeros((3,)), "step": jnp.arange(3)}
    finite.check_trained(params, ["x", "y", "z"], "step 3")
    params["b"] = params["b"].at[1].set(jnp.inf)
    with pytest.raises(rj.InputError, match=r"diverged: the parameters of y are not finite after step 3; a smaller"):
        finite.check_trained(params, ["x", "y", "z"], "step 3")
