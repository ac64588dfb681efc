"""GGUF files: every architecture against the directory that it was made from, every quantisation against its arithmetic
and the gguf package, and what is said about files that cannot be read."""

import dataclasses
import json
import re
import struct
import sys
from pathlib import Path

import chex
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import rlae_jax as rj
from rlae_jax.errors import InputError
from rlae_jax.models import checkpoint_files
from rlae_jax.models.rope import frequencies
from tests.data import hf
from tests.helpers.tolerance import on_device

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
from rlae_jax.models import gguf_files  # noqa: E402
from tests.helpers import gguf_files as writing  # noqa: E402

KINDS = writing.KINDS


def of_a_head(config):
    """A file leaves out by what Gemma divides queries: it follows from the width of a head."""
    return {"query_pre_attn_scalar": config["head_dim"]}


def untruncated(config):
    return {"rope_parameters": {key: value for key, value in config["rope_parameters"].items() if key != "truncate"}}


def sixth_is_global(config):
    """The layout of layers and the local base of all published models, which files do not name."""
    return of_a_head(config) | {"sliding_window_pattern": 6, "rope_local_base_freq": 10_000.0}


def one_base(config):
    """A file has one base for both kinds of layers."""
    local = {"rope_type": "default", "rope_theta": 300.0}
    both = {"full_attention": config["rope_scaling"] | {"rope_theta": 300.0}, "sliding_attention": local}
    return {"rope_scaling": None, "rope_parameters": both}


def layers(number, **fields):
    return lambda config: {"num_hidden_layers": number, **fields}


LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
# (family, case): what of the case no file can say, put right.
CASES = {
    ("llama", "grouped"): None,
    ("llama", "llama3"): lambda config: {"head_dim": 16, "rope_theta": 1000.0},
    ("llama", "linear"): None,
    ("llama", "yarn"): untruncated,
    ("llama", "biases"): None,
    ("mistral", "no_window"): None,
    ("ministral3", "growing"): None,
    ("qwen2", "unused_window"): None,
    ("qwen3", "wide_heads"): None,
    ("qwen3", "yarn"): None,
    ("gemma", "gelu"): None,
    ("gemma2", "caps"): of_a_head,
    ("gemma2", "default_caps"): of_a_head,
    ("gemma3_text", "pattern"): sixth_is_global,
    ("gemma3_text", "default_bases"): sixth_is_global,
    ("phi3", "window"): None,
    ("phi3", "short"): None,
    ("phi3", "long"): None,
    ("olmo2", "grouped"): None,
    ("olmo2", "multi_query"): None,
    ("olmo2", "tied"): None,
    ("olmo3", "stretched"): one_base,
    ("mixtral", "one_expert"): None,
    ("qwen2_moe", "shared"): None,
    ("qwen3_moe", "wide_heads"): None,
    ("olmoe", "grouped"): None,
    ("gpt_oss", "clamped"): lambda config: {"swiglu_limit": 7.0},
    ("llama4", "chunks"): lambda config: {"attention_chunk_size": 8192, "floor_scale": 8192},
    ("lfm2", "mixed"): None,
    ("lfm2_moe", "mixed"): None,
    ("qwen3_5", "published"): None,
    ("qwen3_5_moe", "published"): None,
    ("smollm3", "windows"): layers(4, use_sliding_window=False, sliding_window=None, no_rope_layer_interval=4),
    ("granite", "multipliers"): None,
    ("arcee", "squares"): None,
    ("olmo", "clipped"): None,
    ("seed_oss", "biases"): None,
    ("ernie4_5", "pairs"): None,
    ("glm4", "half"): None,
    ("exaone4", "windows"): layers(4, layer_types=LAYER_TYPES),
    ("cohere", "norms"): lambda config: {"rope_theta": 500.0},
    ("cohere2", "windows"): layers(5, sliding_window_pattern=4),
    ("stablelm", "parallel"): None,
    ("nemotron", "half"): None,
    ("phi", "norms"): lambda config: {"qk_layernorm": False, "hidden_act": "gelu_new"},
    ("falcon", "groups"): None,
    ("starcoder2", "window"): lambda config: {"sliding_window": None},
    ("gpt2", "bare"): None,
    ("gpt_neox", "parallel"): None,
    ("gpt_neox", "serial"): None,
}
CASES = {(family, case): change for (family, case), change in CASES.items() if family in hf.FAMILIES}
FIRST = dict(reversed(CASES))


def cases():
    for family, case in CASES:
        marks = [] if FIRST[family] == case or family in ("llama", "phi3") else pytest.mark.rare
        yield pytest.param(family, case, id=f"{family}-{case}", marks=marks)


def shapes_for(tensors, config):
    """A case's tensors for as many layers, and for heads as wide, as the configuration says."""
    number = config.get("num_hidden_layers") or config["n_layer"]
    shapes = {name: list(shape) for name, shape in tensors.items()}
    if {int(i) for name in tensors for i in re.findall(r"\b(?:layers|h)\.(\d+)\.", name)} != set(range(number)):
        shapes = {}
        for i in range(number):
            found = {name: shape for name, shape in tensors.items() if not re.search(r"\.[1-9]\d*\.", name)}
            shapes |= {re.sub(r"\b(layers|h)\.0\.", rf"\1.{i}.", name): list(shape) for name, shape in found.items()}
        shapes |= {name: shape for name, shape in tensors.items() if name in shapes or ".experts." in name}
    heads = {"q_proj": config.get("num_attention_heads"), "k_proj": config.get("num_key_value_heads")}
    heads["v_proj"] = heads["k_proj"]
    for name in list(shapes):
        module, shape = name.split(".")[-2], shapes[name]
        if module in ("q_layernorm", "k_layernorm"):
            del shapes[name]
        elif config.get("head_dim") and module in heads:
            shapes[name] = [heads[module] * config["head_dim"], *shape[1:]]
        elif config.get("head_dim") and module == "o_proj" and len(shape) == 2:
            shapes[name] = [shape[0], heads["q_proj"] * config["head_dim"]]
    return shapes


def write_case(directory: Path, family: str, case: str) -> hf.Stored:
    """The directory of a stored case, as far as a GGUF file can say the same."""
    stored = hf.read_stored(family, case)
    change = CASES[family, case]
    config = stored.config | (change(stored.config) if change else {})
    hf.write_checkpoint(
        directory, config, shapes_for(stored.tensors, config) if change else stored.tensors, stored.seed
    )
    return stored


def frequencies_of(config):
    """Rotary positions as numbers: there are several ways to describe the same."""
    ropes = (config.rope, config.local_rope if config.local_layers else None)
    return [None if rope is None else frequencies(rope, config.head_width) for rope in ropes]


# What a file without a tokenizer does not say, and what is compared as numbers.
ELSEWHERE = ("bos_id", "pad_id", "end_ids", "rope", "local_rope")


@pytest.mark.parametrize(("family", "case"), cases())
def test_a_file_is_the_directory_that_it_was_made_from(family, case, tmp_path):
    stored = write_case(tmp_path / "made", family, case)
    path = writing.write(tmp_path / "model.gguf", tmp_path / "made")
    expected, actual = rj.load(tmp_path / "made", **stored.load), rj.load(path, **stored.load)
    for field in dataclasses.fields(expected.config):
        if field.name not in ELSEWHERE:
            assert getattr(actual.config, field.name) == getattr(expected.config, field.name), field.name
    chex.assert_trees_all_close(frequencies_of(actual.config), frequencies_of(expected.config), rtol=1e-6)
    chex.assert_trees_all_close(actual.params, expected.params, atol=3e-7)  # a norm's scale, plus 1 and minus 1


COMPUTING = [
    ("llama", "llama3"),
    ("phi3", "long"),
    ("gemma3_text", "pattern"),
    ("lfm2", "mixed"),
    ("qwen3_5", "published"),
]


@pytest.mark.parametrize(("family", "case"), COMPUTING)
def test_a_file_computes_what_the_directory_does(family, case, tmp_path):
    stored = write_case(tmp_path / "made", family, case)
    path = writing.write(tmp_path / "model.gguf", tmp_path / "made")
    expected, actual = rj.load(tmp_path / "made", **stored.load), rj.load(path, **stored.load)
    ids = np.random.default_rng(7).integers(0, expected.config.vocab, (3, 17))
    np.testing.assert_allclose(actual.logits(ids), expected.logits(ids), atol=on_device(1e-5, 2e-4))


@pytest.mark.parametrize(
    ("family", "case", "key", "value", "said"),
    [
        ("lfm2", "mixed", "lfm2.attention.causal", False, "attention.causal = False is not supported"),
        ("lfm2", "mixed", "lfm2.attention.head_count_kv", [0, 2, 0, 4], "head_count_kv differs from layer to layer"),
        ("qwen3_5", "published", "qwen35.ssm.group_count", 3, "must divide linear_num_value_heads (4)"),
        ("qwen3_5", "published", "qwen35.ssm.state_size", None, "ssm.state_size is missing"),
        ("qwen3_5", "published", "qwen35.attention.recurrent_layers", [False] * 5, "missing"),
    ],
)
def test_settings_of_layers_with_a_state(family, case, key, value, said, tmp_path, raises_input_error):
    def spoil(writer):
        if value is None:
            del writer.kv_data[0][key]
        else:
            {bool: writer.add_bool, int: writer.add_uint32, list: writer.add_array}[type(value)](key, value)

    write_case(tmp_path / "made", family, case)
    writing.write(tmp_path / "model.gguf", tmp_path / "made", add=spoil)
    assert said in raises_input_error(lambda: rj.load(tmp_path / "model.gguf"), "model.gguf")


def test_rates_that_are_no_exponentials(tmp_path, raises_input_error, monkeypatch):
    write_case(tmp_path / "made", "qwen3_5", "published")
    as_they_are = writing.linear_attention
    monkeypatch.setattr(
        writing, "linear_attention", lambda module, *of: of[0] if module == "A_log" else as_they_are(module, *of)
    )
    writing.write(tmp_path / "model.gguf", tmp_path / "made")
    raises_input_error(lambda: rj.load(tmp_path / "model.gguf"), "A_log is stored as -exp of it")


def test_a_saved_file_is_a_directory_that_loads_again(tmp_path):
    write_case(tmp_path / "made", "gemma3_text", "pattern")
    lm = rj.load(writing.write(tmp_path / "model.gguf", tmp_path / "made"))
    assert lm.name == "model"
    lm.save(tmp_path / "saved")
    again = rj.load(tmp_path / "saved")
    ids = np.random.default_rng(7).integers(0, lm.config.vocab, (2, 9))
    np.testing.assert_array_equal(again.logits(ids), lm.logits(ids))
    made, saved = (load_file(tmp_path / name / "model.safetensors") for name in ("made", "saved"))
    assert made.keys() == saved.keys()
    for name, tensor in made.items():
        np.testing.assert_allclose(saved[name], tensor, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("family", "case"), [("llama", "llama3"), ("phi3", "short"), ("gemma3_text", "pattern")])
def test_transformers_reads_a_saved_file(family, case, tmp_path, torch):
    stored = write_case(tmp_path / "made", family, case)
    lm = rj.load(writing.write(tmp_path / "model.gguf", tmp_path / "made"), **stored.load)
    lm.save(tmp_path / "saved")
    ids = np.random.default_rng(7).integers(0, lm.config.vocab, (2, 9))
    with torch.no_grad():
        architecture = lm.source.config["architectures"][0]
        expected = hf.from_pretrained(architecture, tmp_path / "saved")(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(lm.logits(ids), expected, atol=2e-5 * abs(expected).max())


def fields_of_all(config):
    """A directory whose tensors have inputs that every kind of block divides."""
    return config | {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 64}


@pytest.fixture
def wide(tmp_path):
    """A llama of width 256, one layer."""
    stored = hf.read_stored("llama", "grouped")
    config = fields_of_all(stored.config) | {"num_hidden_layers": 1}
    sizes = {"embed_tokens": (41, 256), "lm_head": (41, 256), "k_proj": (128, 256), "v_proj": (128, 256)}
    tensors = {
        name: [256] if "norm" in name else list(sizes.get(name.split(".")[-2], (256, 256)))
        for name in stored.tensors
        if ".layers.1." not in name
    }
    hf.write_checkpoint(tmp_path / "wide", config, tensors, stored.seed)
    return tmp_path / "wide"


def bits(block, at, count):
    """`count` bits from bit `at` on of a block of bytes, the lowest first."""
    return sum(((int(block[(at + i) // 8]) >> ((at + i) % 8)) & 1) << i for i in range(count))


def scale(block, at):
    return float(np.frombuffer(block[at : at + 2].tobytes(), "<f2")[0])


def slow_q8_0(block):
    return [scale(block, 0) * struct.unpack("b", block[2 + i : 3 + i])[0] for i in range(32)]


def slow_q4_1(block):
    nibble = [bits(block, 8 * (4 + i % 16) + 4 * (i // 16), 4) for i in range(32)]
    return [scale(block, 0) * value + scale(block, 2) for value in nibble]


def slow_q5_0(block):
    low = [bits(block, 8 * (6 + i % 16) + 4 * (i // 16), 4) for i in range(32)]
    high = [bits(block, 8 * 2 + i, 1) for i in range(32)]
    return [scale(block, 0) * (a + 16 * b - 16) for a, b in zip(low, high, strict=True)]


def slow_q6_k(block):
    """210 bytes: 128 of low nibbles, 64 of high pairs, 16 scales, one float16."""
    values = []
    for i in range(256):
        half, place = divmod(i, 128)
        quarter, j = divmod(place, 32)
        low = bits(block, 8 * (64 * half + 32 * (quarter % 2) + j) + 4 * (quarter // 2), 4)
        high = bits(block, 8 * (128 + 32 * half + j) + 2 * quarter, 2)
        of_sixteen = struct.unpack("b", block[192 + i // 16 : 193 + i // 16])[0]
        values.append(scale(block, 208) * of_sixteen * (low + 16 * high - 32))
    return values


SLOW = {"Q8_0": slow_q8_0, "Q4_1": slow_q4_1, "Q5_0": slow_q5_0, "Q6_K": slow_q6_k}


@pytest.mark.parametrize("kind", [*writing.QUANTISED, "MXFP4", "F32", "F16", "BF16"])
def test_every_type_is_read_as_the_package_and_the_arithmetic_have_it(kind, tmp_path):
    rng = np.random.default_rng(sum(kind.encode()))
    rows, inputs = 700, 512  # more rows than are dequantised at a time
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    if kind in writing.QUANTISED:
        raw = writing.random_blocks(rng, kind, rows, inputs)
    else:
        raw = gguf.quantize(rng.normal(size=(rows, inputs)).astype(np.float32), KINDS[kind])
    writer.add_tensor("x", raw, raw_dtype=KINDS[kind])
    writing.finish(writer)
    extent = gguf_files.open_gguf(tmp_path / "one.gguf").extents["x"]
    values = gguf_files.read_extent(extent)
    assert values.shape == (rows, inputs) == extent.shape
    np.testing.assert_array_equal(values.astype(np.float32), gguf.dequantize(raw, KINDS[kind]))
    if kind in SLOW:
        block_bytes = gguf.GGML_QUANT_SIZES[KINDS[kind]][1]
        for row in (0, 3):
            blocks = raw[row].reshape(-1, block_bytes)
            slow = np.concatenate([SLOW[kind](block) for block in blocks])
            np.testing.assert_allclose(values[row], slow, rtol=1e-5, atol=1e-6)


def test_a_quantised_model_is_its_dequantised_directory(wide, tmp_path):
    def kind(name, tensor):
        return KINDS.Q8_0 if "embed" in name else KINDS.Q4_0 if "_proj" in name else KINDS.BF16

    path = writing.write(tmp_path / "mixed.gguf", wide, kind)
    tensors = load_file(wide / "model.safetensors")
    config = json.loads((wide / "config.json").read_text())
    for name, tensor in tensors.items():
        if tensor.ndim > 1:
            # Rows are permuted before they are quantised, but no block lies in two rows.
            tensors[name] = gguf.dequantize(gguf.quantize(tensor, kind(name, tensor)), kind(name, tensor))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "full" / "model.safetensors")
    ids = np.random.default_rng(3).integers(0, 41, (2, 9))
    expected, actual = rj.load(tmp_path / "full"), rj.load(path)
    np.testing.assert_allclose(actual.logits(ids), expected.logits(ids), atol=on_device(1e-5, 2e-4))
    expected, actual = (rj.load(one, quantise="int8") for one in (tmp_path / "full", path))
    chex.assert_trees_all_equal(actual.params, expected.params)


def test_parts_of_a_split_file_are_one_model(tmp_path):
    write_case(tmp_path / "made", "llama", "grouped")
    whole = writing.write(tmp_path / "whole.gguf", tmp_path / "made")
    (tmp_path / "split").mkdir()
    writing.write(tmp_path / "split" / "tiny", tmp_path / "made", split_max_tensors=7)
    names = sorted(path.name for path in (tmp_path / "split").iterdir())
    assert names[0] == "tiny-00001-of-00003.gguf"
    ids = np.random.default_rng(3).integers(0, 41, (2, 9))
    expected = rj.load(whole).logits(ids)
    for path in (tmp_path / "split", *(tmp_path / "split" / name for name in names)):
        lm = rj.load(path)
        assert lm.name == ("split" if path.is_dir() else "tiny")
        np.testing.assert_array_equal(lm.logits(ids), expected)


@pytest.fixture
def file(tmp_path):
    """A GGUF file of its own, free to be spoilt."""
    write_case(tmp_path / "made", "llama", "grouped")
    return writing.write(tmp_path / "model.gguf", tmp_path / "made")


def test_a_file_that_was_cut(file, tmp_path, raises_input_error):
    whole = file.read_bytes()
    for size in (0, 3, 10, 30, 100, 400, 900, len(whole) - 100):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        message = raises_input_error(lambda: rj.load(tmp_path / "cut.gguf"), "cut.gguf")
        assert len(message.splitlines()) == 1
        assert size < 4 or "was cut" in message


def test_wrong_bytes_in_a_header_are_told_in_a_few_lines(file):
    whole, rng = file.read_bytes(), np.random.default_rng(5)
    header = min(extent.offset for extent in gguf_files.open_gguf(file).extents.values())
    told = []
    for _ in range(100):
        spoilt = bytearray(whole)
        spoilt[rng.integers(4, header)] = rng.choice([0, 255, rng.integers(256)])
        file.write_bytes(spoilt)
        try:
            source = checkpoint_files.read_source(file)
            config = checkpoint_files.read_config(source, file, dtype="float32", precision=None)
            assert checkpoint_files.open_tensors(file, source, config).headers
        except InputError as error:
            told.append(str(error))
    assert len(told) > 30
    assert max(len(message.splitlines()) for message in told) <= 10


def test_no_gguf_file_another_version_and_big_endian(file, tmp_path, raises_input_error):
    whole = file.read_bytes()
    for begin, said in (
        (b"PK\x03\x04" + whole[4:8], "does not begin with the letters GGUF"),
        (b"GGUF" + struct.pack("<I", 1), "GGUF version 1 is not supported; supported: 2, 3"),
        (b"GGUF" + struct.pack("<I", 4), "GGUF version 4 is not supported"),
    ):
        file.write_bytes(begin + whole[8:])
        raises_input_error(lambda: rj.load(file), str(file), said)
    writing.write(tmp_path / "big.gguf", tmp_path / "made", endianess=gguf.GGUFEndian.BIG)
    raises_input_error(lambda: rj.load(tmp_path / "big.gguf"), "big-endian")


def test_a_part_that_is_missing(tmp_path, raises_input_error):
    write_case(tmp_path / "made", "llama", "grouped")
    writing.write(tmp_path / "tiny", tmp_path / "made", split_max_tensors=9)
    (tmp_path / "tiny-00002-of-00003.gguf").rename(tmp_path / "other.gguf")
    for part in (1, 3):
        path = tmp_path / f"tiny-0000{part}-of-00003.gguf"
        raises_input_error(lambda path=path: rj.load(path), "1 of the 3 parts", "tiny-00002-of-00003.gguf")
    raises_input_error(lambda: rj.load(tmp_path / "other.gguf"), "one of 3 parts", "other-00001-of-00003.gguf")


def test_types_and_architectures_that_are_not_known(file, tmp_path, raises_input_error):
    whole = file.read_bytes()
    entry = whole.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 2 * 8
    for number, said in ((222, "of the type 222, which this gguf package does not know"), (24, "of the type I8")):
        file.write_bytes(whole[:entry] + struct.pack("<I", number) + whole[entry + 4 :])
        raises_input_error(lambda: rj.load(file), "token_embd.weight", said)
    writer = gguf.GGUFWriter(tmp_path / "mamba.gguf", "mamba")
    writing.add_tensor(writer, "token_embd.weight", np.zeros((3, 4), np.float32), KINDS.F32)
    writing.finish(writer)
    raises_input_error(lambda: rj.load(tmp_path / "mamba.gguf"), "architecture mamba is not supported", "qwen2")


def test_settings_and_tensors_that_are_missing(file, tmp_path, raises_input_error):
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"llama.embedding_length", b"llama.embedding_lengtg"))
    raises_input_error(lambda: rj.load(file), str(file), "llama.embedding_length is missing")
    count = whole.index(b"llama.attention.head_count") + len("llama.attention.head_count") + 4
    file.write_bytes(whole[:count] + bytes(4) + whole[count + 4 :])
    raises_input_error(lambda: rj.load(file), str(file), "unusable value")
    file.write_bytes(whole.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    raises_input_error(
        lambda: rj.load(file), "1 missing: model.layers.1.mlp.up_proj.weight", "1 unexpected: blk.1.ffn_xx.weight"
    )


def test_a_directory_with_several_files(file, tmp_path, raises_input_error):
    (tmp_path / "two").mkdir()
    for name in ("a.gguf", "b.gguf", "mmproj-a.gguf"):
        (tmp_path / "two" / name).write_bytes(file.read_bytes())
    raises_input_error(lambda: rj.load(tmp_path / "two"), "2 GGUF models (a.gguf, b.gguf)", "name the file")
    (tmp_path / "two" / "b.gguf").unlink()
    assert rj.load(tmp_path / "two").name == "two"


def test_without_the_gguf_package(file, monkeypatch, raises_input_error):
    monkeypatch.setitem(sys.modules, "gguf", None)
    raises_input_error(lambda: rj.load(file), "pip install 'rlae-jax[gguf]'")


def test_a_file_without_a_tokenizer(file, raises_input_error):
    lm = rj.load(file)
    assert lm.tokenizer is None
    raises_input_error(lambda: rj.Ensemble([lm]).generate(["text"]), str(file), "no tokenizer")
