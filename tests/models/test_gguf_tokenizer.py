"""Tokenizers from GGUF metadata: byte-level ones against the tokenizer that the metadata were made from, those of
SentencePiece against the algorithm written out slowly, and what is said about metadata that do not fit together."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from rlae_jax.models.gguf_files import GgufFile
from rlae_jax.models.gguf_models import read_generation
from rlae_jax.models.gguf_tokenizer import SPLITTINGS, read_tokenizer

PATH = Path("model.gguf")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
TEXT = """It's the 3rd of May, 1987; they're 12,345 words' worth -- naïve café, Straße, 東京は2024年に。
    def f(x):\n\t\treturn x**2 != 10   # "quotes" & <tags>\r\n\r\n  Ünïcödé ñandú Привет мир 👍🏽 हिन्दी I'LL WE'VE """
PIECES = [
    "It's",
    " the",
    "  ",
    "\n\n",
    "\t",
    " 123",
    "4567",
    "é",
    "e\u0301",
    "東京",
    "👍🏽",
    "<|end|>",
    "<x>",
    "'LL",
    " don't",
    "...",
    "¾",
    "हिन्दी",
    "\r\n",
]
texts = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=6)), max_size=8).map("".join)

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split_by(pattern):
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    return pre_tokenizers.Sequence(steps)


# What the models' own tokenizer.json has: normalizer, pre-tokenizer, whether whole pieces go before merges.
ORIGINALS = {
    "gpt-2": (None, pre_tokenizers.ByteLevel(False), False),
    "smollm": (None, pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]), False),
    "llama-bpe": (None, split_by(LLAMA3), True),
    "dbrx": (None, split_by(LLAMA3), False),
    "qwen2": (normalizers.NFC(), split_by(QWEN2), False),
    "olmo": (normalizers.NFC(), pre_tokenizers.ByteLevel(False), False),
}


def byte_level(pre, **metadata):
    """A tokenizer as its maker has it, and the metadata of a GGUF file with it."""
    normalizer, pre_tokenizer, whole = ORIGINALS[pre]
    backend = Tokenizer(models.BPE(ignore_merges=whole))
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    special = ["<|begin|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [TEXT] * 3, trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet)
    )
    backend.add_tokens([AddedToken("<x>", normalized=False)])
    table = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(backend.to_str())["model"]["merges"]
    types = [CONTROL if token in special else USER_DEFINED if token == "<x>" else NORMAL for token, _ in table]
    return backend, {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [token for token, _ in table] + [f"[PAD{len(table)}]"],
        "tokenizer.ggml.token_type": np.array([*types, UNUSED], np.int32),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        **{f"tokenizer.ggml.{name}": value for name, value in metadata.items()},
    }


@pytest.mark.parametrize("pre", ORIGINALS)
def test_byte_level_ids_are_those_of_the_original(pre):
    original, metadata = byte_level(pre, add_bos_token=False)
    tokenizer = read_tokenizer(metadata, PATH)
    assert len(tokenizer) == len(metadata["tokenizer.ggml.tokens"]) - 1  # what only fills up is no token

    @given(texts)
    @settings(max_examples=150)
    def check(text):
        ids = tokenizer(text)["input_ids"]
        assert ids == original.encode(text).ids
        normalizer = ORIGINALS[pre][0]
        assert tokenizer.decode(ids) == (text if normalizer is None else normalizer.normalize_str(text))

    check()


@pytest.mark.parametrize("pre", SPLITTINGS)
def test_every_splitting_leaves_the_text_whole(pre):
    _, metadata = byte_level("gpt-2", add_bos_token=False)
    tokenizer = read_tokenizer(metadata | {"tokenizer.ggml.pre": pre}, PATH)
    text = TEXT if not SPLITTINGS[pre].composed else normalizers.NFC().normalize_str(TEXT)
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == text


def test_what_begins_and_ends_a_text():
    def begin(**metadata):
        tokenizer = read_tokenizer(byte_level(metadata.pop("like", "gpt-2"), **metadata)[1], PATH)
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
        return [i for i in tokenizer("x")["input_ids"] if i < 2]

    assert begin() == []
    assert begin(add_bos_token=True) == [0]
    assert begin(like="llama-bpe") == [0]
    assert begin(like="llama-bpe", add_bos_token=False) == []
    assert begin(add_bos_token=True, add_eos_token=True) == [0, 1]


def test_ends_are_those_of_texts_turns_and_messages():
    _, metadata = byte_level("gpt-2", eot_token_id=7, eom_token_id=9, padding_token_id=1)
    assert read_generation(GgufFile(PATH, metadata, {})) == {
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": [1, 7, 9],
    }
    # Older files do not name what ends a turn; their template does.
    _, metadata = byte_level("gpt-2")
    metadata["tokenizer.ggml.tokens"][50] = "<|im_end|>"
    metadata["tokenizer.chat_template"] = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    assert read_generation(GgufFile(PATH, metadata, {}))["eos_token_id"] == [1, 50]
    tokenizer = read_tokenizer(metadata, PATH)
    chat = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|im_start|>hello<|im_end|>"


SPACES = [" " * n for n in range(2, 6)]


def sentencepiece(prefixed):
    """Metadata as Llama's (`prefixed`) or Gemma's, whose vocabulary was learned from TEXT."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator([TEXT] * 3, trainers.BpeTrainer(vocab_size=260, limit_alphabet=60))
    learned = [token for token, _ in sorted(backend.get_vocab().items(), key=lambda item: item[1])]
    of_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    own = ["<x>", "\n\n", *(() if prefixed else SPACES)]
    tokens = ["<unk>", "<s>", "</s>", *of_bytes, *own, *learned]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[USER_DEFINED] * len(own), *[NORMAL] * len(learned)]
    scores = [-1000.0] * (3 + 256 + len(own)) + [-float(i) for i in range(len(learned))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.add_space_prefix": prefixed,
    }


def slow_sentencepiece(metadata, text):
    """Tokens of their own are cut out of the text, the longest first; of the rest, whichever two neighbours make the
    token with the highest score are merged, until none make one; what then is no token is bytes."""
    tokens = metadata["tokenizer.ggml.tokens"]
    types, scores = metadata["tokenizer.ggml.token_type"], metadata["tokenizer.ggml.scores"]
    number = {token: i for i, token in enumerate(tokens)}
    own = sorted((tokens[i] for i in range(len(tokens)) if types[i] in (CONTROL, USER_DEFINED)), key=len, reverse=True)
    normal = {token: scores[i] for token, i in number.items() if types[i] == NORMAL}
    ids, rest = [], ""

    def merge(piece):
        if not piece:
            return
        symbols = list((" " + piece if metadata["tokenizer.ggml.add_space_prefix"] else piece).replace(" ", "▁"))
        while True:
            pairs = [(-normal.get(a + b, -np.inf), i) for i, (a, b) in enumerate(itertools.pairwise(symbols))]
            if not pairs or min(pairs)[0] == np.inf:
                break
            at = min(pairs)[1]
            symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
        for symbol in symbols:
            known = symbol in normal
            ids.extend([number[symbol]] if known else [number[f"<0x{byte:02X}>"] for byte in symbol.encode()])

    while text:
        found = next((token for token in own if text.startswith(token)), None)
        if found is None:
            rest, text = rest + text[0], text[1:]
            continue
        merge(rest)
        rest, text = "", text[len(found) :]
        ids.append(number[found])
    merge(rest)
    return ids


@pytest.mark.parametrize("prefixed", [True, False], ids=["llama", "gemma"])
def test_sentencepiece_ids_are_those_of_the_algorithm(prefixed):
    metadata = sentencepiece(prefixed)
    tokenizer = read_tokenizer(metadata, PATH)
    assert tokenizer("")["input_ids"] == [1]

    @given(texts)
    @settings(max_examples=150)
    def check(text):
        text = text.replace("▁", "")  # it is SentencePiece's space
        ids = tokenizer(text)["input_ids"]
        assert ids == [1, *slow_sentencepiece(metadata, text)]
        decoded = tokenizer.decode(ids[1:])
        # Llama's spaces before what stands after a token of its own are not the text's.
        if not prefixed or not any(token in text for token in ("<x>", "\n\n", "<s>", "</s>")):
            assert decoded == text

    check()
    if not prefixed:
        assert "▁▁▁" in tokenizer.get_vocab()
        assert "   " not in tokenizer.get_vocab()


def test_no_tokenizer():
    assert read_tokenizer({}, PATH) is None
    assert read_tokenizer({"tokenizer.ggml.model": "no_vocab"}, PATH) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "bert"}, "the tokenizer bert (tokenizer.ggml.model) is not supported; supported: gpt2, llama"),
        ({"pre": "klingon"}, "the splitting klingon of its byte-level tokenizer (tokenizer.ggml.pre) is not supported"),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
        ({"merges": ["th q"]}, "cannot be read"),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"tokens": ["a", "a"], "token_type": np.ones(2, np.int32)}, "1 tokens are there twice"),
        ({"token_type": np.ones(3, np.int32)}, "token_type has not one entry for each token"),
        ({"eos_token_id": 5000}, "eos_token_id is 5000"),
        ({"model": "llama"}, "tokenizer.ggml.scores is missing"),
        ({"model": "llama", "scores": np.zeros(2, np.float32)}, "2 scores for"),
    ],
)
def test_metadata_that_do_not_fit_together(changes, said, raises_input_error):
    _, metadata = byte_level("gpt-2")
    for name, value in changes.items():
        metadata[f"tokenizer.ggml.{name}"] = value
    metadata = {name: value for name, value in metadata.items() if value is not None}
    message = raises_input_error(lambda: read_tokenizer(metadata, PATH), "model.gguf", said)
    assert len(message.splitlines()) == 1
