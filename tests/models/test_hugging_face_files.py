"""Files of others with every value spoilt in turn: each is read, or told in a line that names file and key."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import rlae_jax as rj
from rlae_jax import digests
from rlae_jax.errors import InputError
from rlae_jax.fusion.vocabulary.tokens import byte_alphabet
from rlae_jax.models import checkpoint_files, hugging_face, quantised_files, stored
from rlae_jax.models.families import FAMILIES
from rlae_jax.models.lm import read_tokenizer
from rlae_jax.models.tokenizer import told
from tests.data import hf
from tests.helpers.mutations import check_all, garbage, spoilt
from tests.helpers.quantised import Held


@pytest.fixture
def read_config(tmp_path: Path) -> Any:
    """read_config(): what is said of the model in the directory, without its tensors."""

    def read() -> Any:
        source = checkpoint_files.read_source(tmp_path)
        return checkpoint_files.read_config(source, tmp_path, dtype="float32", precision=None, tensors=False)

    return read


def _configs(every: bool) -> list[dict[str, Any]]:
    """The configurations of all families' cases, or of one of each."""
    cases = [(family, case) for family, of in hf.FAMILIES.items() for case in list(of.cases)[: None if every else 1]]
    return [hf.read_stored(family, case).config for family, case in cases]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("every", "share"),
    [pytest.param(False, 0.03, id="some"), pytest.param(True, 0.3, id="all", marks=pytest.mark.rare)],
)
def test_every_field_of_every_family(tmp_path: Path, read_config: Any, every: bool, share: float) -> None:
    count = well = 0
    for config in _configs(every):
        some, read = check_all(tmp_path / "config.json", spoilt(config, share), read_config)
        count, well = count + some, well + read
    assert count > 1000
    assert count / 20 < well < count / 2  # neither is everything refused nor everything taken


@pytest.mark.filterwarnings("ignore")
def test_config_and_generation_that_are_no_json(tmp_path: Path, read_config: Any) -> None:
    config = hf.read_stored("llama", "grouped").config
    count, well = check_all(tmp_path / "config.json", garbage(json.dumps(config)), read_config)
    assert (count > 10, well) == (True, 0)
    (tmp_path / "config.json").write_text(json.dumps(config))
    generation = {"eos_token_id": [1, 2], "bos_token_id": 1, "pad_token_id": 0}
    path = tmp_path / "generation_config.json"
    assert check_all(path, garbage(json.dumps(generation)), read_config)[1] == 0
    assert check_all(path, spoilt(generation), read_config)[1] > 0


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llama", {"architectures": [{}]}, r"architectures\[0\] is an object; expected str"),
        ("llama", {"hidden_size": None}, r"hidden_size is null; expected int"),
        ("llama", {"hidden_size": "12"}, r"hidden_size is a text \('12'\); expected int"),
        ("llama", {"rms_norm_eps": float("nan")}, r"rms_norm_eps is a number \(nan\); expected float > 0.0"),
        ("llama", {"rms_norm_eps": 0}, r"rms_norm_eps is a number \(0\); expected float > 0.0"),
        ("llama", {"num_hidden_layers": 10**8}, r"num_hidden_layers is a number \(100000000\); expected int <= 512"),
        ("llama", {"vocab_size": 10**12}, r"vocab_size is a number"),
        ("llama", {"max_position_embeddings": 10**12}, r"max_position_embeddings is a number"),
        ("llama", {"eos_token_id": {"a": 1}}, r"eos_token_id is an object; expected"),
        ("llama", {"eos_token_id": [1, "2"]}, r"eos_token_id\[1\] is a text"),
        ("llama", {"bos_token_id": [1]}, r"bos_token_id is a list; expected int \| null"),
        ("llama", {"hidden_act": []}, r"hidden_act is a list"),
        ("llama", {"hidden_act": "gelo"}, r"activation gelo is not supported"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": "2"}}, r"rope_scaling\.factor is a text \('2'\)"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, r"rope_type linear lacks 'factor'"),
        ("llama", {"head_dim": None, "num_attention_heads": 5}, r"num_attention_heads \(5\) must divide hidden_size"),
        ("gemma2", {"layer_types": ["full_attention"]}, r"layer_types has 1 entries for \d layers"),
        ("gemma2", {"final_logit_softcapping": 0.0}, r"final_logit_softcapping is a number"),
        ("t5", {"relative_attention_max_distance": 2}, r"relative_attention_max_distance \(2\) must be more than half"),
        ("t5", {"decoder_start_token_id": 10**6}, r"decoder_start_token_id is 1000000"),
        ("gptj", {"rotary_dim": 1000}, r"rotary_dim is 1000"),
        ("gpt_neo", {"attention_types": [[["local"], 9]]}, r"attention_types names 9 layers"),
    ],
)
def test_what_is_wrong_is_told_with_file_and_key(
    tmp_path: Path, read_config: Any, family: str, settings: dict[str, Any], message: str
) -> None:
    config = hf.read_stored(family, next(iter(hf.FAMILIES[family].cases))).config
    (tmp_path / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(InputError, match=rf"config\.json: {message}"):
        read_config()


def test_what_families_read_has_shapes() -> None:
    """Each family's defaults are of the shapes: what it may leave out is what the file may say."""
    for family in FAMILIES.values():
        for name in family.defaults:
            given = {name: family.defaults[name]}
            assert getattr(hugging_face.Fields(given, family.defaults), name) == given[name]


def test_a_slow_or_broken_pattern_is_told() -> None:
    assert hugging_face.matches(r"model\..*", "model.layers", "f")
    for pattern in ("(", "(a|a)*(a|a)*(a|a)*(a|a)*$", "*"):
        with pytest.raises(InputError, match="f: "):
            hugging_face.matches(pattern, "a" * 60 + "b", "f")


@pytest.fixture
def checkpoint(stored_checkpoint: Any, tmp_path: Path) -> Path:
    """A directory of its own, free to be spoilt."""
    return Path(shutil.copytree(stored_checkpoint("grouped"), tmp_path / "checkpoint"))


def _every(path: Path, value: Any, read: Any, share: float = 1.0) -> int:
    """Checks a file with every value spoilt, and as garbage; how often it was read all the same."""
    _, well = check_all(path, spoilt(value, share), read)
    assert check_all(path, garbage(json.dumps(value)), read)[1] == 0
    path.write_text(json.dumps(value))
    read()
    return well


@pytest.mark.filterwarnings("ignore")
def test_weight_indexes(checkpoint: Path) -> None:
    single = checkpoint / "model.safetensors"
    names = list(stored.tensor_headers(single))
    single.rename(checkpoint / "model-1.safetensors")
    index = {"metadata": {"total_size": 3}, "weight_map": dict.fromkeys(names, "model-1.safetensors")}
    read = lambda: stored.Safetensors(checkpoint)  # noqa: E731
    assert _every(checkpoint / "model.safetensors.index.json", index, read) > 0


@pytest.mark.filterwarnings("ignore")
def test_adapters(checkpoint: Path) -> None:
    lm = rj.load(checkpoint)
    rj.save_adapter(rj.init_adapter(lm, rj.LoraConfig(rank=2)), lm, checkpoint / "adapter")
    (checkpoint / "adapter" / digests.FILE).unlink()  # others' adapters have none
    path = checkpoint / "adapter" / "adapter_config.json"
    settings = json.loads(path.read_text()) | {"alpha_pattern": {"q_proj": 3}, "rank_pattern": {"v_proj": 2}}
    assert _every(path, settings | {"use_rslora": True}, lambda: rj.load_adapter(checkpoint / "adapter", lm), 0.3) > 0


SETTINGS = {
    "gptq": {"bits": 4, "group_size": 32, "desc_act": False, "sym": True, "dynamic": {"+:.*up.*": {"bits": 8}}},
    "awq": {"bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    "fp8": {"weight_block_size": [128, 128]},
    "compressed-tensors": {
        "format": "pack-quantized",
        "config_groups": {"0": {"targets": ["Linear", "re:.*"], "weights": {"num_bits": 4, "group_size": 32}}},
        "sparsity_config": {"format": "dense"},
    },
    "modelopt": {"quant_algo": "FP8", "quantization": {"quant_algo": "FP8"}},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", SETTINGS)
def test_settings_of_quantisations(tmp_path: Path, method: str) -> None:
    """The settings of other tools, in config.json and in the file that older checkpoints have."""
    settings: dict[str, Any] = {"quant_method": method, **SETTINGS[method]}
    tensors = Held({f"m.up{mark}": np.ones((8, 32), np.int32) for mark in (".qweight", ".weight_packed", ".weight")})

    def read() -> Any:
        config = json.loads((tmp_path / "config.json").read_text())
        found = quantised_files.read_settings(tmp_path, config)
        if found is not None:
            quantised_files.kind_held(found)
            with contextlib.suppress(InputError):  # no such tensors
                quantised_files.QuantisedFiles(tensors, found)

    check_all(tmp_path / "config.json", spoilt({"quantization_config": settings}), read)
    (tmp_path / "config.json").write_text("{}")
    check_all(tmp_path / "quantize_config.json", spoilt(settings, 0.3), read)


@pytest.fixture
def tokenizer_directory(tmp_path: Path) -> Path:
    """A tokenizer with all that lies beside it."""
    vocab = {token: i for i, token in enumerate([*map(chr, byte_alphabet()), "12", "</s>", "<s>"])}
    backend = Tokenizer(models.BPE(vocab, [("1", "2")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{{ messages }}"
    fast.save_pretrained(tmp_path)
    return tmp_path


TOKEN = {"content": "</s>", "lstrip": False, "rstrip": False, "normalized": False, "special": True}
BESIDE: dict[str, dict[str, Any]] = {
    "tokenizer_config.json": {
        "added_tokens_decoder": {"257": TOKEN},
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", **TOKEN},
        "additional_special_tokens": ["<a>"],
        "model_max_length": 10**30,
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": [{"name": "default", "template": "x"}],
    },
    "special_tokens_map.json": {"bos_token": "<s>", "eos_token": TOKEN, "additional_special_tokens": ["<a>"]},
    "added_tokens.json": {"<a>": 300},
    "chat_template.json": {"chat_template": "x"},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BESIDE)
def test_what_lies_beside_a_tokenizer(tokenizer_directory: Path, name: str) -> None:
    _every(tokenizer_directory / name, BESIDE[name], lambda: read_tokenizer(tokenizer_directory), 0.15)


@pytest.mark.filterwarnings("ignore")
def test_tokenizers(tokenizer_directory: Path) -> None:
    path = tokenizer_directory / "tokenizer.json"
    value = json.loads(path.read_text())
    some = (case for case in spoilt(value, 0.1) if "model.vocab." not in case[0])
    count, well = check_all(path, some, lambda: read_tokenizer(tokenizer_directory))
    assert 0 < well < count
    assert check_all(path, garbage(json.dumps(value)), lambda: read_tokenizer(tokenizer_directory))[1] == 0
    value["added_tokens"][0]["id"] = "7"
    path.write_text(json.dumps(value))
    with pytest.raises(InputError, match=r"tokenizer\.json: added_tokens\[0\]\.id is a text \('7'\); expected int"):
        read_tokenizer(tokenizer_directory)


def test_a_panic_is_told() -> None:
    class Panic(BaseException):
        """As pyo3's PanicException is none of `Exception`."""

    with pytest.raises(InputError, match=r"DIR: no readable tokenizer \(Panic: a b\)"), told("DIR"):
        raise Panic("a\nb")
    with pytest.raises(KeyboardInterrupt), told("DIR"):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"num_hidden_layers": 500}),
        ("llama", {"vocab_size": 10**7, "hidden_size": 10**6, "num_attention_heads": 2}),
        ("t5", {"num_layers": 500}),
        ("mixtral", {"num_local_experts": 60_000}),
        ("gpt_oss", {"num_local_experts": 60_000}),
        ("qwen3_5_moe", {"num_experts": 60_000}),
    ],
)
def test_more_than_the_files_hold_is_refused_at_once(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    case = hf.read_stored(family, next(iter(hf.FAMILIES[family].cases)))
    hf.write_checkpoint(tmp_path, case.config | settings, case.tensors, case.seed)
    with pytest.raises(InputError, match=r"config\.json says .*they do not belong together"):
        rj.load(tmp_path)
