"""Tokenizers made on the spot, of the two kinds that a union vocabulary holds."""

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlae_jax.fusion.vocabulary.tokens import byte_alphabet

BYTE_CHARACTERS = {byte: chr(code) for code, byte in byte_alphabet().items()}


def byte_level(words: Sequence[bytes], added: Sequence[AddedToken] = (), lacking: bytes = b"") -> Any:
    """The bytes but for `lacking`, then `words`, then added tokens, the last "</s>"."""
    characters = [BYTE_CHARACTERS[byte] for byte in range(256) if byte not in lacking]
    tokens = dict.fromkeys([*characters, *("".join(BYTE_CHARACTERS[byte] for byte in word) for word in words)])
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def sentencepiece(words: Sequence[str], byte_fallback: bool = True) -> Any:
    """<unk>, <s>, </s>, the byte tokens, then `words`, "▁" for a space."""
    fallback = [f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else []
    tokens = dict.fromkeys(["<unk>", "<s>", "</s>", *fallback, *words])
    model = models.BPE(
        {token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=byte_fallback, fuse_unk=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([steps[0], decoders.ByteFallback(), steps[1]] if byte_fallback else steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
