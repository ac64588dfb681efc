"""Reading and writing Hugging Face directories, and what is said about unusable ones."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import chex
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import rlae_jax as rj
from rlae_jax.emorl import embedded
from rlae_jax.errors import OutputError
from rlae_jax.models import load, rope, stored, transformer
from rlae_jax.models.config import Rope
from rlae_jax.models.families import FAMILIES
from rlae_jax.models.lm import _stated
from tests.data import hf


@pytest.fixture
def checkpoint(stored_checkpoint, tmp_path):
    """A directory of its own, free to be spoilt."""
    return Path(shutil.copytree(stored_checkpoint("grouped"), tmp_path / "checkpoint"))


def edit_config(directory, **fields):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def assert_same_params(actual, expected):
    chex.assert_trees_all_equal_dtypes(actual, expected)
    chex.assert_trees_all_equal(actual, expected)


def test_stories260k_writes_its_story(shared):
    lm = rj.load(shared / "models" / "stories260K")
    out = rj.Ensemble([lm]).generate(["Once upon a time"], max_new_tokens=72)
    expected = (
        ", there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red "
        "ball. She wanted to play with it, but it was too high."
    )
    assert out.texts[0].startswith(expected)
    assert lm.name == "stories260K"
    assert lm.config.end_ids == (2,)


def test_config_fields(stored_checkpoint):
    config = load(stored_checkpoint("grouped")).config
    expected = {
        "vocab": 41,
        "width": 12,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_width": 10,
        "ffn_width": 22,
        "norm_eps": 1e-3,
        "rope": Rope(500.0),
        "tied_head": False,
        "context": 160,
        "bos_id": 1,
        "end_ids": (2,),
        "dtype": "float32",
    }
    assert {name: getattr(config, name) for name in expected} == expected
    assert load(stored_checkpoint("llama3")).config.tied_head


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rope_parameters": {"rope_theta": 5.0}, "rope_theta": 7.0}, 5.0),
        ({"rope_parameters": None, "rope_theta": 7.0}, 7.0),
        ({"rope_parameters": None}, 10_000.0),
    ],
)
def test_rope_base_is_looked_for_in_rope_parameters_first(checkpoint, fields, expected):
    edit_config(checkpoint, **fields)
    assert load(checkpoint).config.rope.base == expected


def test_end_tokens_are_all_that_any_file_names(checkpoint, make_tokenizer):
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    edit_config(checkpoint, eos_token_id=4)
    assert load(checkpoint).config.end_ids == (3, 5, 4)
    edit_config(checkpoint, eos_token_id=[5, 3])
    assert load(checkpoint).config.end_ids == (3, 5)
    make_tokenizer([chr(0x4E00 + i) for i in range(7)]).save_pretrained(checkpoint)
    assert load(checkpoint).config.end_ids == (3, 5, 7)
    (checkpoint / "generation_config.json").unlink()
    edit_config(checkpoint, eos_token_id=7)
    assert load(checkpoint).config.end_ids == (7,)


def test_kernels_are_transposed_tensors(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    attention = load(checkpoint).params["layers"][1]["attention"]
    query = tensors["model.layers.1.self_attn.q_proj.weight"]
    out = tensors["model.layers.1.self_attn.o_proj.weight"]
    np.testing.assert_array_equal(attention["q"]["kernel"][:, 2, 1], query[2 * 10 + 1])
    np.testing.assert_array_equal(attention["o"]["kernel"][2, 1], out[:, 2 * 10 + 1])


def shard(directory, files=3):
    """Splits model.safetensors as `save_pretrained` does for large models."""
    tensors = load_file(directory / "model.safetensors")
    weight_map = {}
    for i in range(files):
        name = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[i::files]}
        save_file(part, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "model.safetensors").unlink()
    return weight_map


def test_sharded_checkpoints_load_the_same(checkpoint):
    whole = load(checkpoint).params
    shard(checkpoint)
    assert_same_params(load(checkpoint).params, whole)


def test_a_tied_checkpoint_may_carry_its_head_and_old_buffers(stored_checkpoint, tmp_path):
    directory = Path(shutil.copytree(stored_checkpoint("llama3"), tmp_path / "tied"))

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)

    edit_tensors(directory, add)
    assert_same_params(load(directory).params, load(stored_checkpoint("llama3")).params)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_what_torch_puts_before_names_is_left_out(checkpoint, prefix):
    """By torch.compile and data parallel training; the former also at inner modules."""
    expected = load(checkpoint).params
    inner = "model.layers.1."

    def change(tensors):
        renamed = {prefix + key.replace(inner, f"{inner}_orig_mod."): tensor for key, tensor in tensors.items()}
        tensors.clear()
        tensors.update(renamed)

    edit_tensors(checkpoint, change)
    assert_same_params(load(checkpoint).params, expected)


def test_bfloat16_loads_round_float32_and_read_bfloat16_files(checkpoint):
    exact = load(checkpoint).params
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf).astype(ml_dtypes.bfloat16), exact)
    assert_same_params(load(checkpoint, dtype="bfloat16").params, rounded)

    edit_tensors(checkpoint, lambda tensors: tensors.update({k: v.astype("bfloat16") for k, v in tensors.items()}))
    assert_same_params(load(checkpoint, dtype="bfloat16").params, rounded)
    assert_same_params(load(checkpoint).params, jax.tree.map(lambda leaf: leaf.astype(np.float32), rounded))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["grouped", "llama3"])
def test_save_and_load_are_inverse(stored_checkpoint, tmp_path, case, dtype):
    lm = load(stored_checkpoint(case), dtype=dtype)
    lm.save(tmp_path / "new" / "saved")
    again = load(tmp_path / "new" / "saved", dtype=dtype)
    assert again.config == lm.config
    assert_same_params(again.params, lm.params)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["saved"]  # no temporary directory is left
    if dtype == "float32":
        directories = stored_checkpoint(case), tmp_path / "new" / "saved"
        original, saved = (load_file(directory / "model.safetensors") for directory in directories)
        assert original.keys() == saved.keys()
        for key, tensor in original.items():
            np.testing.assert_array_equal(saved[key], tensor)


class TestAnEncoderDecoderMadeHere:
    @pytest.fixture(scope="class")
    def made(self):
        rng = np.random.default_rng(0)
        params = jax.tree.map(
            lambda leaf: jax.numpy.asarray(rng.normal(0, 0.2, leaf.shape), leaf.dtype),
            transformer.abstract_params(embedded.MODEL),
        )
        return rj.LM(embedded.MODEL, params, embedded.make_tokenizer(), name="made")

    def test_it_is_loaded_as_what_it_was(self, made, tmp_path):
        made.save(tmp_path / "saved")
        again = load(tmp_path / "saved")
        # How many ids there are is what a tokenizer tells.
        assert again.config == dataclasses.replace(made.config, tokens=made.config.vocab)
        assert_same_params(again.params, made.params)
        assert again.source.family is FAMILIES["t5"]
        text = "i worry about money , exams ."
        assert again.tokenizer(text)["input_ids"] == made.tokenizer(text)["input_ids"]
        rng = np.random.default_rng(1)
        ids, decoder_ids = rng.integers(3, 100, (2, 6)), rng.integers(3, 100, (2, 4))
        mask = np.array([[1] * 6, [0, 0, 1, 1, 1, 1]])
        logits = np.asarray(again.logits(ids, mask, decoder_ids))
        np.testing.assert_array_equal(logits, made.logits(ids, mask, decoder_ids))
        assert np.abs(logits).max() > 0.1
        again.save(tmp_path / "twice")
        assert_same_params(load(tmp_path / "twice").params, made.params)

    def test_its_adapters_are_written_and_read(self, made, tmp_path):
        fresh = rj.init_adapter(made, rj.LoraConfig(rank=2), seed=3)
        rj.save_adapter(fresh, made, tmp_path / "adapter")
        made.save(tmp_path / "made")
        for lm in (made, load(tmp_path / "made")):
            again = rj.load_adapter(tmp_path / "adapter", lm)
            assert again.params.keys() == fresh.params.keys()
            for path, factors in again.params.items():
                np.testing.assert_array_equal(factors["a"], fresh.params[path]["a"])

    def test_a_head_of_its_own(self, made, tmp_path):
        """As T5 1.1 has it: nothing is scaled before it."""
        config = dataclasses.replace(made.config, tied_head=False, head_scale=1.0)
        rng = np.random.default_rng(2)
        head = {"kernel": jax.numpy.asarray(rng.normal(size=(config.width, config.vocab)), "float32")}
        untied = dataclasses.replace(made, config=config, params=made.params | {"head": head})
        untied.save(tmp_path / "saved")
        again = load(tmp_path / "saved")
        assert again.config == dataclasses.replace(config, tokens=config.vocab)
        assert_same_params(again.params, untied.params)

    @pytest.mark.parametrize("change", [{"head_scale": 0.5}, {"norm": "layer"}, {"attention_scale": None}])
    def test_what_its_layout_cannot_say_is_refused(self, made, tmp_path, raises_input_error, change):
        other = dataclasses.replace(made, config=dataclasses.replace(made.config, **change))
        raises_input_error(lambda: other.save(tmp_path / "saved"), "T5")
        assert not any(tmp_path.iterdir())


def test_save_keeps_the_tokenizer_and_several_end_tokens(tmp_path, make_lm, make_tokenizer):
    lm = make_lm(0, vocab=5, end_ids=(4, 2), bos_id=1, tokenizer=make_tokenizer("abcd"))
    lm.save(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.config == dataclasses.replace(lm.config, tokens=5)
    assert again.tokenizer.get_vocab() == lm.tokenizer.get_vocab()
    assert again.tokenizer("dab")["input_ids"] == [3, 0, 1]
    assert again.tokenizer.decode([3, 0, 1]) == "dab"


def test_save_never_overwrites(checkpoint, raises_input_error):
    lm = load(checkpoint)
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    raises_input_error(lambda: lm.save(checkpoint), str(checkpoint), "exists already")
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


def test_tensors_are_streamed_a_few_at_a_time(checkpoint, monkeypatch):
    """Each tensor is on the device before its reader takes the next: the host never holds the whole checkpoint."""
    held, most = [], []
    block, read_tensor = jax.block_until_ready, stored.read_tensor

    def read(*args):
        held.append(args)
        most.append(len(held))
        return read_tensor(*args)

    def wait(*args, **kwargs):
        ready = block(*args, **kwargs)
        held.pop()
        return ready

    monkeypatch.setattr(stored, "read_tensor", read)
    monkeypatch.setattr(jax, "block_until_ready", wait)
    params = load(checkpoint).params
    assert len(most) == len(jax.tree.leaves(params))
    assert not held
    assert max(most) <= 2


def test_a_directory_without_a_tokenizer_says_so_in_text_methods(checkpoint, raises_input_error):
    lm = load(checkpoint)
    assert lm.tokenizer is None
    raises_input_error(lambda: rj.Ensemble([lm]).generate(["text"]), str(checkpoint), "tokenizer.json")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_defaults_are_those_of_transformers(family):
    """What a config.json may leave out means here what it means there."""
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(family.model_type)
    theirs.allow_global_per_layer_attribute_access = True  # Gemma 4 is else not asked about its heads
    # Where transformers works the value out, from these or from other fields, ours says None or has the older name.
    derived = {"num_decoder_layers", "word_embed_proj_dim", "scale_decoder_outputs", "id2label", "num_labels"}
    derived |= {"sliding_window"} if family.model_type.startswith("qwen") else set()
    derived |= {"layer_types", "no_rope_layers", "num_kv_heads", "ffn_hidden_size", "per_layer_config", "head_dim"}
    derived |= {"moe_layers", "global_head_dim", "num_global_key_value_heads"}  # of layers, there
    older = {"rotary_emb_base", "rotary_pct", "rope_local_base_freq", "rope_scaling"}
    older |= {"sliding_window_pattern", "decoder_start_token_id"}
    rope = {"rope_theta", "partial_rotary_factor", "rope_parameters"}
    for name, value in family.defaults.items():
        if name not in derived | older | rope:
            assert (getattr(theirs, name, None) or None) == (value or None), name
    sizes = {"vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size"}
    assert not sizes & family.defaults.keys()
    # What a head's width is, where the others do not decide it.
    heads = family.defaults.get("head_dim") or theirs.hidden_size // theirs.num_attention_heads
    assert (getattr(theirs, "head_dim", None) or heads) == heads
    theirs_rope = getattr(theirs, "rope_parameters", None)
    if theirs_rope and "rotary_emb_base" not in family.defaults:
        named = {"rope_theta", "partial_rotary_factor"} & family.defaults.keys()
        given = {name: family.defaults[name] for name in named}
        ours = {"rope_theta": 10_000.0} | given | (family.defaults.get("rope_parameters") or {})
        ours = ours.get("full_attention", ours)
        theirs_rope = theirs_rope.get("full_attention", theirs_rope)
        assert {name: theirs_rope.get(name) for name in ours} == ours


def test_equal_configurations_share_programs(checkpoint):
    assert load(checkpoint).config == load(checkpoint).config
    assert hash(load(checkpoint).config) == hash(load(checkpoint).config)
    assert load(checkpoint, precision=None).config.precision is None
    assert load(checkpoint).config.precision == "highest"


def test_head_rows_beyond_the_tokenizer_never_win(tmp_path, make_lm, make_tokenizer):
    """As in Qwen2.5, whose head has 387 rows more than its tokenizer."""
    lm = make_lm(1, vocab=12, tokenizer=make_tokenizer("abcdefg"))
    kernel = lm.params["head"]["kernel"]
    lm.params["head"]["kernel"] = kernel.at[:, 8:].set(100 * kernel[:, :4])
    lm.save(tmp_path / "padded")
    padded = load(tmp_path / "padded")
    assert padded.config.usable_vocab == 8
    assert padded.config.end_ids == (7,)  # no file names an end token, the tokenizer does
    assert padded.logits([[0]]).shape == (1, 1, 12)
    assert int(np.argmax(padded.logits([[0]]))) >= 8 or int(np.argmax(padded.logits([[1]]))) >= 8
    for options in ({}, {"temperature": 2.0}):
        out = rj.Ensemble([padded]).generate(["a", "b", "c"], max_new_tokens=20, ignore_eos=True, **options)
        assert max(max(row) for row in out.tokens) < 8


class TestContext:
    def test_it_limits_prompt_and_answer(self, checkpoint, raises_input_error):
        lm = load(checkpoint, context=10)
        ids = np.ones((1, 8), int)
        assert rj.Ensemble([lm]).generate(prompt_ids=ids, max_new_tokens=2).steps == [2]
        raises_input_error(lambda: rj.Ensemble([lm]).generate(prompt_ids=ids, max_new_tokens=3), "context is 10")

    def test_learned_positions_end(self, stored_checkpoint, raises_input_error):
        directory = stored_checkpoint("inner", "gpt2")
        rows = load(directory).config.learned_positions
        raises_input_error(lambda: load(directory, context=rows + 1), f"{rows + 1}", f"{rows} positions")

    def test_dynamic_rope_turns_by_the_length_that_it_is_loaded_for(self, tmp_path, stored_checkpoint):
        """Within the original context as without scaling; beyond it as transformers at that length."""
        directory = shutil.copytree(stored_checkpoint("grouped"), tmp_path / "dynamic")
        plain = load(directory).config
        original, width = plain.context, plain.head_width
        edit_config(directory, rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4})
        within = rope.frequencies(load(directory).config.rope, width)[0]
        np.testing.assert_array_equal(within, rope.frequencies(Rope(1e4), width)[0])
        shorter = load(directory, context=original - 1).config.rope
        np.testing.assert_array_equal(rope.frequencies(shorter, width)[0], within)
        longer = rope.frequencies(load(directory, context=3 * original).config.rope, width)[0]
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        settings = transformers.AutoConfig.from_pretrained(directory)
        compute = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["dynamic"]
        for length, ours in ((original, within), (3 * original, longer)):
            expected = compute(settings, torch.device("cpu"), seq_len=length)[0].numpy()
            np.testing.assert_allclose(ours, expected, rtol=1e-6)

    def test_longrope_is_loaded_for_its_original_length_unless_told(self, stored_checkpoint):
        cases = [hf.read_stored("phi3", case) for case in hf.FAMILIES["phi3"].cases]
        long = next(c for c in cases if "context" in c.load)
        original = (
            long.config.get("original_max_position_embeddings")
            or (long.config["rope_parameters"]["original_max_position_embeddings"])
        )
        case = next(name for name, c in zip(hf.FAMILIES["phi3"].cases, cases, strict=True) if c is long)
        short = load(stored_checkpoint(case, "phi3")).config
        assert short.context == original
        assert short.rope != load(stored_checkpoint(case, "phi3"), context=original + 1).config.rope


def test_a_hub_id_names_the_model(tmp_path, stored_checkpoint, monkeypatch):
    """The snapshot's directory is called after a commit."""
    cache = tmp_path / "models--org--tiny"
    shutil.copytree(stored_checkpoint("grouped"), cache / "snapshots" / ("0" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    lm = load("org/tiny")
    assert lm.name == "tiny"
    assert_same_params(lm.params, load(stored_checkpoint("grouped")).params)


class TestBadDirectories:
    """Every message names the path, what is wrong and what would be right."""

    def test_missing_directory(self, tmp_path, raises_input_error):
        raises_input_error(
            lambda: load(tmp_path / "nowhere"), str(tmp_path / "nowhere"), "does not exist", "Hugging Face directory"
        )

    def test_a_file_instead_of_a_directory(self, checkpoint, raises_input_error):
        path = checkpoint / "model.safetensors"
        raises_input_error(lambda: load(path), str(path), "is a file", "Hugging Face directory")

    def test_missing_config(self, checkpoint, raises_input_error):
        (checkpoint / "config.json").unlink()
        raises_input_error(lambda: load(checkpoint), str(checkpoint / "config.json"), "missing")

    @pytest.mark.parametrize("content", ["{", "[1]", "\udcff"], ids=["cut", "list", "not-utf8"])
    def test_unreadable_config(self, checkpoint, raises_input_error, content):
        (checkpoint / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
        raises_input_error(lambda: load(checkpoint), str(checkpoint / "config.json"), "JSON")

    def test_missing_weights(self, checkpoint, raises_input_error):
        (checkpoint / "model.safetensors").unlink()
        raises_input_error(lambda: load(checkpoint), str(checkpoint), "no model.safetensors", "index.json")

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "model.pth"])
    def test_only_pickled_weights(self, checkpoint, raises_input_error, name):
        (checkpoint / "model.safetensors").rename(checkpoint / name)
        raises_input_error(
            lambda: load(checkpoint), str(checkpoint), "only pickled weights", name, "never read", "safetensors"
        )

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda data: data[:-100],
            lambda data: data[:50],
            lambda data: b"",
            lambda data: b"\xff" * 8 + data[8:],
            lambda data: data[:8] + b"x" + data[9:],
        ],
        ids=["cut-data", "cut-header", "empty", "huge-header", "broken-header"],
    )
    def test_corrupt_safetensors(self, checkpoint, raises_input_error, spoil):
        path = checkpoint / "model.safetensors"
        path.write_bytes(spoil(path.read_bytes()))
        raises_input_error(lambda: load(checkpoint), str(path), "truncated or corrupt")

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
    def test_files_that_git_did_not_fetch(self, checkpoint, make_tokenizer, raises_input_error, name):
        make_tokenizer("abc").save_pretrained(checkpoint)
        (checkpoint / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * '0'}\nsize 99\n")
        message = raises_input_error(
            lambda: load(checkpoint), str(checkpoint / name), "git-LFS pointer", "git lfs pull"
        )
        assert "truncated" not in message

    def test_corrupt_shard(self, checkpoint, raises_input_error):
        path = checkpoint / sorted(shard(checkpoint).values())[-1]
        path.write_bytes(path.read_bytes()[:-1])
        raises_input_error(lambda: load(checkpoint), str(path), "truncated or corrupt")

    def test_missing_shard(self, checkpoint, raises_input_error):
        name = sorted(shard(checkpoint).values())[0]
        (checkpoint / name).unlink()
        raises_input_error(lambda: load(checkpoint), str(checkpoint), "1 files", name)

    def test_index_that_promises_a_tensor_its_file_lacks(self, checkpoint, raises_input_error):
        weight_map = shard(checkpoint)
        names = sorted(set(weight_map.values()))
        key = next(key for key, name in weight_map.items() if name == names[0])
        path = checkpoint / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": weight_map | {key: names[1]}}))
        raises_input_error(lambda: load(checkpoint), str(checkpoint), "1 missing", key)

    @pytest.mark.parametrize("content", ["{", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "{}"])
    def test_unusable_index(self, checkpoint, raises_input_error, content):
        shard(checkpoint)
        (checkpoint / "model.safetensors.index.json").write_text(content)
        raises_input_error(lambda: load(checkpoint), str(checkpoint / "model.safetensors.index.json"))

    def test_missing_unexpected_and_mis_shaped_tensors_in_one_message(self, checkpoint, raises_input_error):
        def spoil(tensors):
            del tensors["model.norm.weight"]
            tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(16, np.float32)
            tensors["lm_head.weight"] = np.zeros((40, 16), np.float32)

        edit_tensors(checkpoint, spoil)
        message = raises_input_error(
            lambda: load(checkpoint),
            str(checkpoint),
            "1 missing: model.norm.weight",
            "1 unexpected: model.layers.0.self_attn.q_proj.bias",
            "1 mis-shaped: lm_head.weight is [40, 16], expected [41, 12]",
        )
        assert "full list" not in message

    def test_integers_are_no_weights(self, checkpoint, raises_input_error):
        tensors = load_file(checkpoint / "model.safetensors")
        key = "model.layers.0.self_attn.q_proj.weight"
        save_file({**tensors, key: np.ones_like(tensors[key], np.int8)}, checkpoint / "model.safetensors")
        raises_input_error(lambda: load(checkpoint), "1 quantised or of no known dtype", f"{key} is I8")

    def test_many_findings_are_counted_and_listed_in_a_file(self, checkpoint, raises_input_error):
        edit_config(checkpoint, num_hidden_layers=4)
        message = raises_input_error(lambda: load(checkpoint), "18 missing", "the full list is in")
        shown = message.split("18 missing: ")[1].splitlines()[0]
        assert shown.count("model.layers.") == 5
        listing = Path(re.search(r"full list is in (\S+)", message)[1])
        listed = listing.read_text().splitlines()
        assert len(listed) == 18
        assert "missing\tmodel.layers.3.mlp.down_proj.weight" in listed

    def test_nothing_is_placed_before_every_check_has_passed(self, checkpoint, monkeypatch):
        edit_tensors(checkpoint, lambda tensors: tensors.pop("lm_head.weight"))
        placed = []
        monkeypatch.setattr(jax, "device_put", lambda *args, **kwargs: placed.append(args))
        with pytest.raises(rj.InputError):
            load(checkpoint)
        assert not placed

    @pytest.mark.parametrize(
        "fields",
        [{"architectures": ["MambaForCausalLM"]}, {"architectures": None, "model_type": "MambaForCausalLM"}],
    )
    def test_unsupported_architecture(self, checkpoint, raises_input_error, fields):
        edit_config(checkpoint, **fields)
        raises_input_error(
            lambda: load(checkpoint),
            str(checkpoint / "config.json"),
            "MambaForCausalLM is not supported",
            "LlamaForCausalLM",
        )

    @pytest.mark.parametrize(
        ("fields", "part"),
        [
            ({"rope_parameters": {"rope_type": "spiral", "factor": 8.0, "rope_theta": 1e4}}, "rope_type spiral"),
            ({"hidden_act": "mish"}, "activation mish"),
            ({"quantization_config": {"bits": 4, "quant_method": "aqlm"}}, "aqlm"),
        ],
    )
    def test_unsupported_settings(self, checkpoint, raises_input_error, fields, part):
        edit_config(checkpoint, **fields)
        raises_input_error(lambda: load(checkpoint), str(checkpoint / "config.json"), part, "supported: ")

    @pytest.mark.parametrize("kind", ["llama3", "linear"])
    def test_rope_scaling_without_its_numbers(self, checkpoint, raises_input_error, kind):
        edit_config(checkpoint, rope_parameters={"rope_type": kind})
        raises_input_error(lambda: load(checkpoint), str(checkpoint / "config.json"), "factor")

    def test_code_from_the_repository_is_refused_by_name(self, checkpoint, raises_input_error):
        edit_config(checkpoint, architectures=["OwnForCausalLM"], model_type="own", auto_map={"AutoModel": "own.Model"})
        raises_input_error(lambda: load(checkpoint), "OwnForCausalLM", "code", "llama")

    def test_a_tokenizer_of_another_model(self, checkpoint, raises_input_error, make_tokenizer):
        make_tokenizer([chr(65 + i) for i in range(50)]).save_pretrained(checkpoint)
        raises_input_error(lambda: load(checkpoint), "ids up to 50", "vocab_size = 41")

    @pytest.mark.parametrize(
        "fields",
        [
            {"hidden_size": None},
            {"hidden_size": "wide"},
            {"num_attention_heads": 0},
            {"num_hidden_layers": -1},
            {"vocab_size": 0},
            {"num_key_value_heads": 3},
            {"head_dim": 5},
            {"rope_parameters": "default"},
            {"eos_token_id": "</s>"},
        ],
        ids=str,
    )
    def test_unusable_values(self, checkpoint, raises_input_error, fields):
        edit_config(checkpoint, **fields)
        raises_input_error(lambda: load(checkpoint), str(checkpoint / "config.json"))

    def test_missing_field(self, checkpoint, raises_input_error):
        path = checkpoint / "config.json"
        raw = json.loads(path.read_text())
        del raw["intermediate_size"]
        path.write_text(json.dumps(raw))
        raises_input_error(lambda: load(checkpoint), str(path), "intermediate_size", "missing")

    def test_unknown_dtype(self, checkpoint, raises_input_error):
        raises_input_error(lambda: load(checkpoint, dtype="float64"), "'float64'", "float32, bfloat16, float16")

    def test_broken_tokenizer(self, checkpoint, raises_input_error):
        (checkpoint / "tokenizer.json").write_text("{}")
        raises_input_error(lambda: load(checkpoint), str(checkpoint), "no readable tokenizer")


def test_write_model_leaves_nothing_half_written(tmp_path, make_lm, monkeypatch):
    lm = make_lm(0)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(stored, "save_file", fail)
    with pytest.raises(OutputError, match="disk full"):
        lm.save(tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_every_parameter_has_a_tensor_and_every_tensor_a_parameter(make_lm):
    """The table of tensor names covers the tree exactly, tied or not."""
    for tied in (False, True):
        config = dataclasses.replace(make_lm(0).config, tied_head=tied, layers=3)
        tensors = stored.stored_tensors(FAMILIES["llama"], config)
        named = {path for tensor in tensors for path in tensor.paths}
        leaves, _ = jax.tree_util.tree_flatten_with_path(transformer.abstract_params(config))
        assert named == {tuple(key.key for key in path) for path, _ in leaves}


def test_fields_that_come_later_change_no_fingerprint(make_lm):
    """Of a configuration nothing counts that is as its field's default says."""
    stated = _stated(make_lm(0, rope=Rope(base=5e5)).config)
    assert stated[0] == "ModelConfig"
    assert stated[1]["rope"] == ("Rope", {"base": 5e5})
    assert "tied_head" not in stated[1]
    assert make_lm(0).fingerprint() == make_lm(0).fingerprint()
    assert make_lm(0).fingerprint() != make_lm(0, rope=Rope(base=5e5)).fingerprint()
