"""Tokenizers of directories, as their files say it, and what the import of transformers says to a user."""

import json
import os
import subprocess
import sys
import warnings

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlae_jax.fusion.vocabulary.tokens import byte_alphabet
from rlae_jax.models.lm import read_tokenizer

CODE = """
import logging
from rlae_jax.models.tokenizer import import_transformers

import_transformers()
logging.getLogger("transformers").warning("a real warning")
logging.getLogger("transformers.modeling").warning("PyTorch was not found here either")
"""


def test_the_advice_to_install_torch_alone_is_left_out():
    # Where CI is set, transformers sends its records to the root logger as well.
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "[transformers] a real warning",
        "[transformers] PyTorch was not found here either",
    ]


@pytest.fixture
def write(tmp_path):
    """write(class, digits apart) -> a directory with a byte-level tokenizer in which "12" and "23" are tokens, too."""

    def make(name=None, apart=True, **config):
        letters = map(chr, byte_alphabet())
        vocab = {token: i for i, token in enumerate([*letters, "12", "23", "</s>"])}
        tokenizer = Tokenizer(models.BPE(vocab, [("1", "2"), ("2", "3")]))
        splits = [pre_tokenizers.Split(Regex(r"\d"), "isolated")] if apart else []
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not apart)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(tmp_path)
        path = tmp_path / "tokenizer_config.json"
        said = json.loads(path.read_text()) | config
        path.write_text(json.dumps(said if name is None else said | {"tokenizer_class": name}))
        return tmp_path

    return make


class TestItsFileHasTheLastWord:
    @pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2Tokenizer"])
    def test_where_the_class_splits_otherwise(self, write, name):
        directory = write(name, chat_template="hi", bos_token="</s>")
        with pytest.warns(UserWarning, match=rf"{directory}: tokenizer_config.json names {name}.*tokenizer.json is"):
            tokenizer = read_tokenizer(directory)
        expected = Tokenizer.from_file(str(directory / "tokenizer.json"))
        for text in ("123", "a 1223 b", "it's 12"):
            assert tokenizer(text)["input_ids"] == expected.encode(text).ids
        assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.chat_template) == ("</s>", "</s>", "hi")

    def test_silently_where_they_agree(self, write):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert type(read_tokenizer(write("GPT2Tokenizer", apart=False))).__name__ == "GPT2Tokenizer"
            assert read_tokenizer(write())("123")["input_ids"] == [16, 17, 18]


class TestChatTemplatesOfTheirOwnFile:
    def test_alone(self, write):
        directory = write()
        assert not read_tokenizer(directory).chat_template
        (directory / "chat_template.json").write_text(json.dumps({"chat_template": "from json"}))
        assert read_tokenizer(directory).chat_template == "from json"
        (directory / "chat_template.jinja").write_text("from jinja")
        assert read_tokenizer(directory).chat_template == "from jinja"

    def test_broken(self, write, raises_input_error):
        directory = write()
        (directory / "chat_template.json").write_text("{")
        raises_input_error(lambda: read_tokenizer(directory), "chat_template.json")
