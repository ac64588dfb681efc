"""What a tokenizer's ids stand for: the bytes of every token, of byte-level and of SentencePiece-like tokenizers.

A fast tokenizer of transformers goes in, a list of byte strings by id comes out; control tokens stand for none.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool
from tokenizers import Tokenizer, models

from rlae_jax.errors import InputError

MARKER = "▁"  # U+2581, SentencePiece's space
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@functools.cache
def byte_alphabet() -> dict[int, int]:
    """GPT-2's characters for bytes: printable bytes stand for themselves, the others for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {256 + i: byte for i, byte in enumerate(others)}


def nodes(part: Any) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, sequences unfolded."""
    if isinstance(part, dict):
        yield part
        for value in part.values():
            for child in value if isinstance(value, list) else ():
                yield from nodes(child)


def parts_of(backend: Tokenizer) -> dict[str, Any]:
    """The tokenizer's JSON without its vocabulary, which takes a long time to parse."""
    frame = Tokenizer(models.BPE())
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if getattr(backend, part) is not None:
            setattr(frame, part, getattr(backend, part))
    state: dict[str, Any] = json.loads(frame.to_str())
    return state


def is_byte_level(parts: dict[str, Any]) -> bool | None:
    """True for byte-level tokens, False for SentencePiece's, None for neither. The decoder has the first word."""
    for part in ("decoder", "pre_tokenizer", "normalizer"):
        for node in nodes(parts[part]):
            if node["type"] == "ByteLevel":
                return True
            replaces = node["type"] == "Replace" and MARKER in (node["content"], *node["pattern"].values())
            if replaces or (node["type"] == "Metaspace" and node["replacement"] == MARKER):
                return False
    return None


def backend_of(tokenizer: Any, name: str) -> Tokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise InputError(
            f"{name}: {'no tokenizer' if tokenizer is None else type(tokenizer).__name__ + ' is no fast tokenizer'}; a "
            "union vocabulary needs one that the tokenizers library can read (tokenizer.json)"
        )
    return backend


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """What a tokenizer's ids stand for."""

    pieces: list[bytes | None]  # None: control or unused
    used: Bool[np.ndarray, " V"]
    fallback: frozenset[int]  # the ids of byte tokens like <0x41>


def read_tokens(tokenizer: Any, name: str, size: int | None = None) -> Tokens:
    """The tokens below `size`, the rows of a model's embedding; None takes all.

    Raises:
      InputError: see `token_bytes`.
    """
    backend = backend_of(tokenizer, name)
    model = backend.model
    parts = parts_of(backend)
    byte_level = is_byte_level(parts)
    affixes = [getattr(model, affix, None) for affix in ("continuing_subword_prefix", "end_of_word_suffix")]
    if byte_level is None or any(affixes) or isinstance(model, models.WordPiece):
        raise InputError(
            f"{name}: its tokenizer ({type(model).__name__}) is neither byte-level nor SentencePiece-like, so that its "
            "tokens stand for no bytes; a union vocabulary cannot hold it"
        )
    byte_fallback = getattr(model, "byte_fallback", False) or any(
        node["type"] == "ByteFallback" for node in nodes(parts["decoder"])
    )
    added = {i: token for i, token in tokenizer.added_tokens_decoder.items() if size is None or i < size}
    vocab = {token: i for token, i in backend.get_vocab(with_added_tokens=False).items() if i not in added}
    vocab = {token: i for token, i in vocab.items() if size is None or i < size}
    tokens = max((*vocab.values(), *added), default=-1) + 1
    used = np.zeros(tokens, bool)
    used[list(vocab.values())] = True
    used[list(added)] = True
    pieces: list[bytes | None] = [None] * tokens
    fallback = set()
    if byte_level:
        alphabet = byte_alphabet()
        strange = set().union(*vocab) - set(map(chr, alphabet))
        if strange:
            token = next(token for token in vocab if strange.intersection(token))
            raise InputError(
                f"{name}: the token {token!r} (id {vocab[token]}) has characters outside the byte-level alphabet, so "
                "that it stands for no bytes"
            )
        for token, i in vocab.items():
            pieces[i] = token.translate(alphabet).encode("latin-1")
    else:
        for token, i in vocab.items():
            byte = _BYTE_TOKEN.fullmatch(token) if byte_fallback else None
            if byte:
                fallback.add(i)
            pieces[i] = bytes.fromhex(byte[1]) if byte else token.replace(MARKER, " ").encode()
    for i, token in added.items():
        if not token.special:
            # SentencePiece's decoders read the marker in these too; byte-level ones leave them as they are.
            pieces[i] = (token.content if byte_level else token.content.replace(MARKER, " ")).encode()
    return Tokens(pieces, used, frozenset(fallback))


def token_bytes(tokenizer: Any, name: str) -> list[bytes | None]:
    """The bytes that each id, from 0 to the largest, stands for; None for control tokens and unused ids.

    Args:
      tokenizer: a fast tokenizer of transformers, byte-level or SentencePiece-like.
      name: what messages call it.

    Raises:
      InputError: another kind of tokenizer, or a token that stands for no bytes.
    """
    return read_tokens(tokenizer, name).pieces
