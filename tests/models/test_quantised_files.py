"""Quantised checkpoints: each format against its own arithmetic written out slowly, and what is said of bad ones."""

import dataclasses
import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import rlae_jax as rj
from rlae_jax.errors import InputError
from rlae_jax.models import quantise
from rlae_jax.models.quantised_files import QuantisedFiles, Settings, presented, read_settings, unpack
from rlae_jax.models.stored import EIGHT_BIT_FLOATS, Packed, Safetensors, StoredTensor
from tests.helpers import quantised as q

MODULE = "model.layers.0.mlp.up_proj"


def present(parts, settings, tmp_path, module=MODULE, **others):
    tensors = q.Held(q.named(module, parts) | others)
    return QuantisedFiles(tensors, Settings(tmp_path / "config.json", settings["quant_method"], settings))


# maker, reader, outputs, inputs, options, kind, groups
PACKED = {
    "gptq": (q.make_gptq, q.read_gptq, 24, 96, {}, "int4", 3),
    "gptq of version 2": (q.make_gptq, q.read_gptq, 24, 96, {"form": "gptq_v2", "lowest_zero": 0}, "int4", 3),
    "gptq of odd sizes": (q.make_gptq, q.read_gptq, 13, 48, {"group": 16}, "int4", 3),
    "gptq, 8 bits": (q.make_gptq, q.read_gptq, 12, 64, {"bits": 8}, "int8", 2),
    "gptq, 2 bits": (q.make_gptq, q.read_gptq, 32, 64, {"bits": 2}, "int4", 2),
    "gptq, 3 bits": (q.make_gptq, q.read_gptq, 32, 64, {"bits": 3}, "int4", 2),
    "gptq without groups": (q.make_gptq, q.read_gptq, 24, 56, {"group": -1}, "int4", 1),
    "gptq, groups that do not divide": (q.make_gptq, q.read_gptq, 8, 80, {"group": 32}, "int4", 5),
    "awq": (q.make_awq, q.read_awq, 24, 96, {}, "int4", 3),
    "fp8 in blocks": (q.make_fp8, q.read_fp8, 13, 96, {"block": (8, 32)}, "fp8", 3),
    "fp8 in blocks, the last smaller": (q.make_fp8, q.read_fp8, 13, 80, {"block": (8, 32)}, "fp8", 5),
    "fp8 per output": (q.make_fp8, q.read_fp8, 13, 21, {"per_output": True}, "fp8", 1),
    "fp8 per tensor": (q.make_fp8, q.read_fp8, 13, 21, {}, "fp8", 1),
    "pack-quantized": (q.make_packed, q.read_packed, 13, 96, {}, "int4", 3),
    "pack-quantized with zeros": (q.make_packed, q.read_packed, 13, 96, {"symmetric": False}, "int4", 3),
    "pack-quantized per output": (q.make_packed, q.read_packed, 13, 45, {"group": None}, "int4", 1),
    "pack-quantized, 8 bits": (q.make_packed, q.read_packed, 13, 64, {"bits": 8}, "int8", 2),
    "pack-quantized, 6 bits": (q.make_packed, q.read_packed, 13, 64, {"bits": 6, "symmetric": False}, "int8", 2),
    "pack-quantized, 3 bits": (q.make_packed, q.read_packed, 7, 75, {"bits": 3, "group": 25}, "int4", 3),
    "int-quantized": (q.make_int8, q.read_stored_one_by_one, 13, 21, {}, "int8", 1),
    "int-quantized with zeros": (q.make_int8, q.read_stored_one_by_one, 13, 21, {"symmetric": False}, "int8", 1),
    "float-quantized": (q.make_float, q.read_stored_one_by_one, 13, 21, {}, "fp8", 1),
    "float-quantized in blocks": (q.make_float, q.read_stored_one_by_one, 13, 64, {"block": (8, 32)}, "fp8", 2),
    "mxfp4-pack-quantized": (q.make_float4, q.read_float4, 13, 96, {}, "int8", 3),
    "nvfp4-pack-quantized": (q.make_float4, q.read_float4, 13, 96, {"nvidia": True}, "int8", 6),
    "modelopt": (q.make_modelopt, q.read_modelopt, 13, 96, {}, "int8", 6),
}


@pytest.mark.parametrize("name", PACKED)
def test_a_layer_stands_for_what_its_format_says(name, tmp_path):
    make, read, outputs, inputs, options, kind, groups = PACKED[name]
    parts, settings = make(np.random.default_rng(len(name)), outputs, inputs, **options)
    files = present(parts, settings, tmp_path)
    assert list(files.headers) == [f"{MODULE}.weight"]
    assert files.headers[f"{MODULE}.weight"].shape == (outputs, inputs)
    packed = files.read(f"{MODULE}.weight")
    assert isinstance(packed, Packed)
    assert packed.kind == kind
    assert packed.values.shape == (outputs, inputs)
    assert packed.values.dtype == {"fp8": ml_dtypes.float8_e4m3fn}.get(kind, np.int8)
    assert packed.scale.shape == (outputs, groups)
    assert packed.scale.dtype == np.float32
    if kind == "int4":
        assert set(np.unique(packed.values)) <= set(range(-8, 8))
    np.testing.assert_array_max_ulp(packed.weights(), read(parts, settings), 2)


def test_experts_of_gpt_oss(tmp_path):
    parts, settings = q.make_mxfp4(np.random.default_rng(0), 3, 10, 64)
    files = present(parts, settings, tmp_path, "model.layers.0.mlp.experts.gate_up_proj")
    (name,) = files.headers
    assert name == "model.layers.0.mlp.experts.gate_up_proj"
    packed = files.read(name)
    assert packed.kind == "int8"
    np.testing.assert_array_equal(packed.weights(), q.read_mxfp4(parts, settings))


@pytest.mark.parametrize("maker", ["gptq", "pack-quantized"])
def test_inputs_out_of_order_are_dequantised_with_a_line(maker, tmp_path):
    rng = np.random.default_rng(1)
    if maker == "gptq":
        parts, settings = q.make_gptq(rng, 16, 64, shuffled=True)
        expected = q.read_gptq(parts, settings)
    else:
        parts, settings = q.make_packed(rng, 16, 64, g_idx=rng.permutation(np.arange(64) // 32))
        expected = q.read_packed(parts, settings)
    files = present(parts, settings, tmp_path)
    with pytest.warns(UserWarning, match=r"inputs out of order \(desc_act\) \(model.layers.0.mlp.up_proj.weight"):
        weight = files.read(f"{MODULE}.weight")
    again = files.read(f"{MODULE}.weight")  # says nothing, or this test would fail
    np.testing.assert_array_equal(again, weight)
    assert weight.dtype == np.float32
    np.testing.assert_array_max_ulp(weight, expected, 2)


def test_orders_that_are_none(tmp_path):
    """compressed-tensors writes -1 where it has no order; GPTQ's order may say only what the groups say."""
    parts, settings = q.make_packed(np.random.default_rng(1), 16, 64, g_idx=np.full(64, -1))
    assert isinstance(present(parts, settings, tmp_path).read(f"{MODULE}.weight"), Packed)
    parts, settings = q.make_gptq(np.random.default_rng(1), 16, 64)
    expected = present(parts, settings, tmp_path).read(f"{MODULE}.weight").weights()
    del parts[".g_idx"]
    np.testing.assert_array_equal(present(parts, settings, tmp_path).read(f"{MODULE}.weight").weights(), expected)


def test_small_groups_and_other_floats_are_dequantised(tmp_path):
    rng = np.random.default_rng(2)
    parts, settings = q.make_fp8(rng, 13, 20, block=(4, 8))
    with pytest.warns(UserWarning, match=r"fp8 with groups of 8 for 20 inputs .*dequantised"):
        weight = present(parts, settings, tmp_path).read(f"{MODULE}.weight")
    np.testing.assert_array_max_ulp(weight, q.read_fp8(parts, settings), 2)
    parts[".weight"] = parts[".weight"].astype(ml_dtypes.float8_e5m2)
    with pytest.warns(UserWarning, match="fp8 with values of F8_E5M2 .*dequantised"):
        weight = present(parts, settings, tmp_path).read(f"{MODULE}.weight")
    np.testing.assert_array_max_ulp(weight, q.read_fp8(parts, settings), 2)


def test_zeros_of_nothing_borrow_and_carry(tmp_path):
    """Version 1 of GPTQ subtracts one from a word's zeros at once, so that a zero of 0 borrows from its neighbour."""
    rng = np.random.default_rng(3)
    parts, settings = q.make_gptq(rng, 16, 64, lowest_zero=0, form="gptq_v2")
    expected = q.read_gptq(parts, settings)
    parts[".qzeros"] = (parts[".qzeros"].view(np.uint32) - np.uint32(0x11111111)).view(np.int32)
    packed = present(parts, settings | {"checkpoint_format": "gptq"}, tmp_path).read(f"{MODULE}.weight")
    np.testing.assert_array_max_ulp(packed.weights(), expected, 2)


def test_zeros_in_the_middle_are_left_out(tmp_path):
    parts, settings = q.make_gptq(np.random.default_rng(3), 16, 64, form="gptq_v2")
    parts[".qzeros"] = q.pack(np.full((2, 16), 8), 4)
    assert present(parts, settings | {"sym": True}, tmp_path).read(f"{MODULE}.weight").zero is None


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("axis", [0, 1])
def test_unpacking(bits, axis):
    integers = np.random.default_rng(bits).integers(0, 1 << bits, (5, 37))
    words = q.pack(integers, bits)
    unpacked = unpack(words if axis else np.ascontiguousarray(words.T), bits, 37, axis)
    np.testing.assert_array_equal(unpacked if axis else unpacked.T, integers)


def test_what_is_not_of_the_weights_is_passed_by_or_left_out(tmp_path):
    rng = np.random.default_rng(4)
    parts, settings = q.make_fp8(rng, 16, 32, block=(16, 32))
    others = {
        "model.norm.weight": np.ones(32, np.float32),
        "model.layers.0.self_attn.k_scale": np.ones((), np.float32),
        "model.layers.0.self_attn.k_proj.output_scale": np.ones((), np.float32),
        f"{MODULE}.input_scale": np.ones((), np.float32),
        f"{MODULE}.bias": np.ones(16, np.float32),
    }
    files = present(parts, settings, tmp_path, **others)
    assert sorted(files.headers) == [f"{MODULE}.bias", f"{MODULE}.weight", "model.norm.weight"]
    np.testing.assert_array_equal(files.read("model.norm.weight"), others["model.norm.weight"])
    assert files.told == "fp8, 1 layers of 8 bits"


def test_scales_beside_a_weight_that_is_not_quantised(tmp_path):
    parts, settings = q.make_float(np.random.default_rng(5), 8, 16)
    parts[".weight"] = parts[".weight"].astype(np.float32)
    files = present(parts, settings, tmp_path)
    assert list(files.headers) == [f"{MODULE}.weight"]
    np.testing.assert_array_equal(files.read(f"{MODULE}.weight"), parts[".weight"])


def test_groups_of_settings_by_name_before_kind(tmp_path):
    rng = np.random.default_rng(6)
    parts, settings = q.make_packed(rng, 8, 64)
    eight, of_eight = q.make_packed(rng, 8, 64, bits=8)
    group = of_eight["config_groups"]["group_0"] | {"targets": [r"re:.*down_proj$"]}
    settings["config_groups"]["group_1"] = group
    others = q.named("model.layers.0.mlp.down_proj", eight)
    files = present(parts, settings, tmp_path, **others)
    assert files.read(f"{MODULE}.weight").kind == "int4"
    np.testing.assert_array_equal(
        files.read("model.layers.0.mlp.down_proj.weight").weights(), q.read_packed(eight, of_eight)
    )
    assert files.told == ("compressed-tensors, 1 layers of 4 bits in groups of 32, 1 layers of 8 bits in groups of 32")


def test_settings_of_some_layers_in_gptqmodel(tmp_path):
    rng = np.random.default_rng(7)
    parts, settings = q.make_gptq(rng, 16, 64, bits=8, group=16)
    expected = present(parts, settings, tmp_path).read(f"{MODULE}.weight").weights()
    changed = {"-:.*down_proj": {}, r"+:.*\.up_proj": {"bits": 8, "group_size": 16}}
    files = present(parts, settings | {"bits": 4, "group_size": 32, "dynamic": changed}, tmp_path)
    np.testing.assert_array_equal(files.read(f"{MODULE}.weight").weights(), expected)


def spoil(parts, suffix, array=None):
    parts = dict(parts)
    if array is None:
        del parts[suffix]
    else:
        parts[suffix] = array
    return parts


@pytest.mark.parametrize(
    ("make", "suffix", "array", "told"),
    [
        (q.make_gptq, ".scales", np.ones((3, 24), np.float16), "scales is [3, 24], expected [2, 24]"),
        (q.make_gptq, ".qzeros", None, "1 missing: model.layers.0.mlp.up_proj.qzeros"),
        (q.make_gptq, ".qweight", np.ones((8, 24), np.float32), "qweight is F32, expected I32"),
        (q.make_gptq, ".qweight", np.ones((9, 24), np.int32), "qweight is [9, 24], expected [8, 24]"),
        (q.make_awq, ".scales", np.ones((5, 24), np.float16), "scales is [5, 24], expected [2, 24]"),
        (q.make_awq, ".scales", None, "1 missing: model.layers.0.mlp.up_proj.scales"),
        (q.make_packed, ".weight_scale", np.ones((24, 3), np.float32), "weight_scale is [24, 3], expected [24, 2]"),
        (q.make_packed, ".weight_scale", None, "missing: model.layers.0.mlp.up_proj.weight_scale"),
        (q.make_int8, ".weight_scale", np.ones((7, 1), np.float32), "weight_scale is [7, 1], expected [24, 1] or [24]"),
        (q.make_int8, ".weight", None, "missing: model.layers.0.mlp.up_proj.weight"),
    ],
)
def test_tensors_that_do_not_fit_the_settings(make, suffix, array, told, tmp_path):
    parts, settings = make(np.random.default_rng(8), 24, 64)
    with pytest.raises(InputError, match=re.escape(told)) as raised:
        present(spoil(parts, suffix, array), settings, tmp_path)
    assert f"{tmp_path}: the tensors do not fit the settings of {settings['quant_method']}" in str(raised.value)
    assert ", 0]" not in str(raised.value)


def test_a_group_that_is_not_there(tmp_path):
    parts, settings = q.make_gptq(np.random.default_rng(9), 16, 64)
    parts[".g_idx"][5] = 2
    with pytest.raises(InputError, match=r"up_proj.g_idx names group 2, but the layer has scales of 2 groups"):
        present(parts, settings, tmp_path).read(f"{MODULE}.weight")


@pytest.mark.parametrize(
    ("make", "changed", "told"),
    [
        (q.make_gptq, {"bits": 5}, "bits must be one of 2, 3, 4, 8, not 5"),
        (q.make_gptq, {"bits": None}, "bits must be one of 2, 3, 4, 8, not None"),
        (q.make_gptq, {"group_size": "many"}, "group_size must be a whole number other than 0, not 'many'"),
        (q.make_gptq, {"checkpoint_format": "marlin"}, "GPTQ's form marlin is not supported; supported: gptq, gptq_v2"),
        (q.make_awq, {"version": "GEMV"}, "AWQ's form gemv is not supported; supported: gemm"),
        (q.make_packed, {"config_groups": {}}, "config_groups has no settings for the weights of model.layers.0"),
        (q.make_packed, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights (sparse-24-bitmask)"),
        (q.make_packed, {"transform_config": {"config_groups": {"u": {}}}}, "rotation of activations"),
        (q.make_fp8, {"weight_block_size": 3}, "weight_block_size must be two whole numbers, not 3"),
    ],
)
def test_settings_that_are_not_read(make, changed, told, tmp_path):
    parts, settings = make(np.random.default_rng(10), 16, 64)
    with pytest.raises(InputError, match=re.escape(told)) as raised:
        present(parts, settings | changed, tmp_path)
    assert str(tmp_path / "config.json") in str(raised.value)


def test_where_settings_are(tmp_path):
    assert read_settings(tmp_path, {}) is None
    assert read_settings(tmp_path, {"quantization_config": {"quant_method": "awq", "bits": 4}}).method == "awq"
    assert read_settings(tmp_path, {"text_config": {"quantization_config": {"quant_method": "fp8"}}}).method == "fp8"
    compressed = read_settings(tmp_path, {"compression_config": {"config_groups": {}}})
    assert compressed.method == "compressed-tensors"
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}')
    old = read_settings(tmp_path, {})
    assert old == Settings(tmp_path / "quantize_config.json", "gptq", {"bits": 4, "group_size": 128})
    (tmp_path / "quantize_config.json").unlink()
    (tmp_path / "quant_config.json").write_text('{"w_bit": 4, "q_group_size": 128, "version": "GEMM"}')
    assert read_settings(tmp_path, {}).method == "awq"
    (tmp_path / "quant_config.json").rename(tmp_path / "hf_quant_config.json")
    assert read_settings(tmp_path, {}).method == "modelopt"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes are not supported; load the model that"),
        ({"load_in_8bit": True}, "bitsandbytes are not supported; load the model that"),
        ({"quant_method": "aqlm"}, "quantised by aqlm are not supported; supported: gptq, awq, compressed-tensors"),
        ({"bits": 4}, "quantised by an unnamed method are not supported"),
        ([1], "quantization_config must be a JSON object, not [1]"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"W4A16": ["Linear"]}},
            "quantization_config: config_groups.W4A16 is a list",
        ),
    ],
)
def test_methods_that_are_not_read(fields, told, tmp_path):
    with pytest.raises(InputError, match=re.escape(told)):
        read_settings(tmp_path, {"quantization_config": fields})


@pytest.mark.parametrize("dtype", EIGHT_BIT_FLOATS.values())
def test_eight_bit_floats_are_read_from_files(dtype, tmp_path):
    arrays = {name: np.random.default_rng(0).uniform(0.1, 9, (3, 5)).astype(dtype) for name in "abc"}
    save_file(arrays, tmp_path / "model.safetensors")
    tensors = Safetensors(tmp_path)
    assert tensors.headers["b"] == q.Held(arrays).headers["b"]
    stored = tensors.read("b")
    assert stored.dtype == dtype
    np.testing.assert_array_equal(stored.view(np.uint8), arrays["b"].view(np.uint8))


def test_packed_tensors_without_settings(tmp_path):
    tensors = q.Held({"model.norm.weight": np.ones(3, np.float32)})
    assert presented(tensors, tmp_path, {}) is tensors
    tensors = q.Held({"model.norm.weight": np.ones(3, np.float32), "a.qweight": np.ones((1, 1), np.int32)})
    with pytest.raises(InputError, match=r"a.qweight is packed by GPTQ or AWQ, but config.json has no"):
        presented(tensors, tmp_path, {})


def test_gpt_oss_as_transformers_reads_it(tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    parts, settings = q.make_mxfp4(np.random.default_rng(11), 3, 10, 64)
    theirs = convert_moe_packed_tensors(
        torch.tensor(parts["_blocks"]), torch.tensor(parts["_scales"]), dtype=torch.float32
    )
    packed = present(parts, settings, tmp_path, "experts.down_proj").read("experts.down_proj")
    np.testing.assert_array_equal(np.swapaxes(packed.weights(), 1, 2), theirs.numpy())


def test_fp8_in_blocks_as_transformers_reads_it(tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    parts, settings = q.make_fp8(np.random.default_rng(12), 48, 96, block=(16, 32))
    values = torch.tensor(parts[".weight"].view(np.uint8)).view(torch.float8_e4m3fn)
    scales = torch.tensor(parts[".weight_scale_inv"])
    theirs = Fp8Dequantize(None).convert({"weight": values, "weight_scale_inv": scales})["weight"]
    packed = present(parts, settings, tmp_path).read(f"{MODULE}.weight")
    np.testing.assert_array_equal(packed.weights(), theirs.numpy())


@pytest.mark.parametrize(
    "name",
    [
        "pack-quantized",
        "pack-quantized with zeros",
        "pack-quantized per output",
        "pack-quantized, 6 bits",
        "pack-quantized, 3 bits",
        "int-quantized with zeros",
        "float-quantized in blocks",
        "mxfp4-pack-quantized",
        "nvfp4-pack-quantized",
    ],
)
def test_as_compressed_tensors_reads_it(name, tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    make, _, outputs, inputs, options, _, _ = PACKED[name]
    parts, settings = make(np.random.default_rng(len(name)), outputs, inputs, **options)

    def tensor(array):
        if array.dtype == ml_dtypes.float8_e4m3fn:
            return torch.tensor(array.view(np.uint8)).view(torch.float8_e4m3fn)
        return torch.tensor(array.astype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array)

    group = settings["config_groups"]["group_0"]
    if name.startswith("mxfp4"):
        group["weights"]["scale_dtype"] = "torch.uint8"
    stored = {suffix[1:]: tensor(array) for suffix, array in parts.items()}
    theirs = BaseCompressor.get_value_from_registry(group["format"]).decompress(stored, QuantizationScheme(**group))
    ours = present(parts, settings, tmp_path).read(f"{MODULE}.weight").weights()
    np.testing.assert_allclose(ours, theirs["weight"].to(torch.float32).numpy(), rtol=1e-6, atol=0)


def write_plain(directory, quantised, settings, made):
    """The same model with the weights that the quantised layers stand for, float32."""
    directory.mkdir()
    stored = Safetensors(quantised)
    of_layers = tuple(f"{module}." for module in made)
    arrays = {name: stored.read(name) for name in stored.headers if not name.startswith(of_layers)}
    for module, parts in made.items():
        arrays[f"{module}.weight"] = READERS[settings["quant_method"]](parts, settings)
    config = json.loads((quantised / "config.json").read_text())
    config.pop("quantization_config", None)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(arrays, directory / "model.safetensors")


READERS = {
    "gptq": q.read_gptq,
    "awq": q.read_awq,
    "fp8": q.read_fp8,
    "fbgemm_fp8": q.read_fp8,
    "compressed-tensors": lambda parts, settings: {
        "pack-quantized": q.read_packed,
        "nvfp4-pack-quantized": q.read_float4,
    }.get(settings["format"], q.read_stored_one_by_one)(parts, settings),
}
WHOLE = {
    "gptq": (q.make_gptq, {}, "int4"),
    "gptq, 8 bits": (q.make_gptq, {"bits": 8}, "int8"),
    "awq": (q.make_awq, {}, "int4"),
    "fp8 in blocks": (q.make_fp8, {"block": (32, 32)}, "fp8"),
    "fp8 per output": (q.make_fp8, {"per_output": True}, "fp8"),
    "pack-quantized": (q.make_packed, {"symmetric": False}, "int4"),
    "int-quantized": (q.make_int8, {}, "int8"),
    "nvfp4-pack-quantized": (q.make_float4, {"nvidia": True}, "int8"),
}


RARE = ("gptq, 8 bits", "fp8 per output", "nvfp4-pack-quantized")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.rare] * (n in RARE)) for n in WHOLE])
def test_a_model_computes_with_the_weights_that_are_meant(name, tmp_path):
    make, options, kind = WHOLE[name]
    settings, made = q.write_llama(tmp_path / "quantised", make, **options)
    write_plain(tmp_path / "plain", tmp_path / "quantised", settings, made)
    lm, plain = rj.load(tmp_path / "quantised"), rj.load(tmp_path / "plain")
    assert lm.params["layers"][0]["ffn"]["down"]["kernel"].kind == kind
    assert list(quantise.forms(lm.params).values()) == [len(q.LAYERS)]
    ids = np.random.default_rng(1).integers(0, 50, (2, 9))
    expected = plain.logits(ids)
    np.testing.assert_allclose(lm.logits(ids), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["gptq", pytest.param("fp8 in blocks", marks=pytest.mark.rare)])
def test_experts_of_a_tensor_each(name, tmp_path):
    make, options, kind = WHOLE[name]
    settings, made = q.write_llama(tmp_path / "quantised", make, experts=3, **options)
    write_plain(tmp_path / "plain", tmp_path / "quantised", settings, made)
    lm, plain = rj.load(tmp_path / "quantised"), rj.load(tmp_path / "plain")
    assert lm.params["layers"][0]["ffn"]["experts"]["down"]["kernel"].kind == kind
    ids = np.random.default_rng(1).integers(0, 50, (2, 9))
    expected = plain.logits(ids)
    np.testing.assert_allclose(lm.logits(ids), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_gpt_oss_computes_with_its_experts(tmp_path):
    q.write_gpt_oss(tmp_path / "quantised", tmp_path / "plain")
    lm, plain = rj.load(tmp_path / "quantised"), rj.load(tmp_path / "plain")
    leaves = jax.tree.leaves(lm.params, is_leaf=quantise.is_quantised)
    assert [leaf.kind for leaf in leaves if quantise.is_quantised(leaf)] == ["int8"] * 3
    ids = np.random.default_rng(1).integers(0, 50, (2, 9))
    expected = plain.logits(ids)
    np.testing.assert_allclose(lm.logits(ids), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "tensor",
    [
        StoredTensor("one", ((),), ((96, 3, 5),), "kernel", inputs=1),
        StoredTensor("two axes of inputs", ((),), ((3, 32, 7),), "kernel", inputs=2),
        StoredTensor("fused", ((), ()), ((96, 5), (96, 7)), "kernel", inputs=1),
        StoredTensor("by head", ((), (), ()), ((96, 4, 2), (96, 2, 2), (96, 2, 2)), "kernel", inputs=1, groups=2),
        StoredTensor("inputs first", ((),), ((96, 5),), "kernel", inputs=1, inputs_first=True),
        StoredTensor("of experts", ((),), ((2, 96, 5),), "kernel", inputs=1, stacked=True),
        StoredTensor(
            "as in gpt-oss",
            ((), ()),
            ((2, 96, 5), (2, 96, 5)),
            "kernel",
            inputs=1,
            inputs_first=True,
            interleaved=True,
            stacked=True,
        ),
        StoredTensor("table", ((),), ((11, 96),)),
    ],
    ids=lambda tensor: tensor.key,
)
@pytest.mark.parametrize("groups", [1, 3])
def test_packed_weights_are_split_as_others_are(tensor, groups):
    rng = np.random.default_rng(groups)
    shape = dataclasses.replace(tensor, inputs_first=False).shape
    values = rng.integers(-8, 8, shape).astype(np.int8)
    scale, zero = rng.uniform(1, 2, (2, *shape[:-1], groups)).astype(np.float32)
    packed = Packed(values, scale, zero, "int8")
    weights = packed.weights().swapaxes(-1, -2) if tensor.inputs_first else packed.weights()
    for kernel, expected in zip(tensor.split_packed(packed), tensor.split(weights), strict=True):
        whole = kernel.weights() if isinstance(kernel, quantise.Quantised) else kernel
        np.testing.assert_allclose(np.asarray(whole).reshape(expected.shape), expected, rtol=1e-6)


def test_inputs_out_of_order_load(tmp_path):
    settings, made = q.write_llama(tmp_path / "quantised", q.make_gptq, shuffled=True)
    write_plain(tmp_path / "plain", tmp_path / "quantised", settings, made)
    with pytest.warns(UserWarning, match=r"gptq with inputs out of order \(desc_act\)"):
        lm = rj.load(tmp_path / "quantised")
    ids = np.random.default_rng(1).integers(0, 50, (2, 9))
    np.testing.assert_allclose(lm.logits(ids), rj.load(tmp_path / "plain").logits(ids), atol=1e-4)


def test_what_was_loaded_is_saved_as_plain_weights(tmp_path):
    q.write_llama(tmp_path / "quantised", q.make_awq)
    lm = rj.load(tmp_path / "quantised")
    lm.save(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    ids = np.random.default_rng(1).integers(0, 50, (2, 9))
    np.testing.assert_allclose(rj.load(tmp_path / "saved").logits(ids), lm.logits(ids), atol=1e-4)


def test_settings_beside_config_json(tmp_path):
    q.write_llama(tmp_path / "old", q.make_gptq, file_of_settings="quantize_config.json")
    assert quantise.forms(rj.load(tmp_path / "old").params) == {"int4 in groups of 32": len(q.LAYERS)}
    (tmp_path / "old" / "quantize_config.json").unlink()
    with pytest.raises(InputError, match=r"qweight is packed by GPTQ or AWQ, but config.json has no"):
        rj.load(tmp_path / "old")


def test_quantised_already(tmp_path):
    q.write_llama(tmp_path / "quantised", q.make_packed)
    with pytest.raises(InputError, match=r"quantised already"):
        rj.load(tmp_path / "quantised", quantise="int8")
