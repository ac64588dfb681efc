"""Tokenizers from the metadata of GGUF files, without torch and without a download.

In: the `tokenizer.*` metadata. Out: a fast tokenizer of transformers.

transformers has a reading of its own (`AutoTokenizer.from_pretrained(gguf_file=...)`), which does not serve: it imports
torch, splits as GPT-2 does wherever it does not know what `pre` says (SmolLM2 then has other ids for the spaces before
a digit), and takes 17 s for Gemma 3's vocabulary where this takes 3. What ids a text has is defined by llama.cpp
(src/llama-vocab.cpp), which follows the models' own tokenizers; so does this.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from rlae_jax.errors import InputError
from rlae_jax.models.tokenizer import fast_tokenizer, told

_MARKER = "▁"  # SentencePiece's space
_LONGEST = 1024  # characters of a token, whose ways to be made of two others are all tried
_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6  # types of tokens

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + _WORDS % r"\p{N}{1,3}"
_QWEN2 = _CONTRACTIONS + _WORDS % r"\p{N}"
_QWEN35 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
    r"|%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Splitting(NamedTuple):
    """What a byte-level tokenizer does before its merges."""

    patterns: tuple[str, ...]  # one after another, each on the pieces that those before it left
    whole: bool = False  # a piece that is a token is that token, whatever the merges say
    begins: bool = False  # a text begins with bos unless the file says otherwise
    composed: bool = False  # the text is brought to NFC, which llama.cpp leaves out and the models' own tokenizers do


_PLAIN, _DIGITS = Splitting((_GPT2,)), Splitting((r"\p{N}", _GPT2))
_LIKE_LLAMA3, _LIKE_QWEN2 = Splitting((_LLAMA3,), whole=True, begins=True), Splitting((_QWEN2,))
_LIKE_GPT4O = Splitting((_CASED % (f"{_CONTRACTIONS}?", f"{_CONTRACTIONS}?", r"\p{N}{1,3}"),))
# What `tokenizer.ggml.pre` may say. `default` is what the oldest files mean, which say nothing.
SPLITTINGS: dict[str, Splitting] = {
    "default": Splitting((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "falcon": Splitting((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "jais", "trillion", "exaone4", "granite-docling", "gigachat"), _PLAIN),
    **dict.fromkeys(("a.x-4.0", "mellum", "modern-bert"), _PLAIN),
    "olmo": _PLAIN._replace(composed=True),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"), _LIKE_LLAMA3),
    "midm-2.0": _LIKE_LLAMA3,
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), Splitting((_LLAMA3,))),
    "qwen2": _LIKE_QWEN2._replace(composed=True),
    **dict.fromkeys(("deepseek-r1-qwen", "stablelm2", "hunyuan", "solar-open", "megrez", "grok-2"), _LIKE_QWEN2),
    "qwen35": Splitting((_QWEN35,), composed=True),
    "tekken": Splitting((_CASED % ("", "", r"\p{N}"),), whole=True, begins=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), _LIKE_GPT4O),
}


class _Vocabulary(NamedTuple):
    """The `tokenizer.ggml` metadata that every kind has."""

    path: Path
    metadata: Mapping[str, Any]
    tokens: list[str]
    types: np.ndarray

    def get(self, name: str, default: Any = None) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{name}", default)

    def error(self, text: str) -> InputError:
        return InputError(f"{self.path}: its tokenizer cannot be read: {text}")

    def listed(self, name: str, kind: type) -> Any:
        found = self.get(name)
        if not isinstance(found, kind):
            raise self.error(f"tokenizer.ggml.{name} is {'missing' if found is None else 'no list of its kind'}")
        return found

    def ids(self, *types: int) -> list[int]:
        return np.flatnonzero(np.isin(self.types, types)).tolist()

    def token(self, name: str, default: int | None = None) -> str | None:
        """The token that has a part to play, by its metadata."""
        i = self.get(f"{name}_token_id", default)
        if i is None:
            return None
        if not isinstance(i, int) or not 0 <= i < len(self.tokens):
            raise self.error(f"{name}_token_id is {i!r}, and there are {len(self.tokens)} tokens")
        return self.tokens[i]

    def table(self) -> dict[str, int]:
        """Ids by token, without what only fills the vocabulary up to the size of the embedding."""
        used = [(token, i) for i, token in enumerate(self.tokens) if token != f"[PAD{i}]"]
        table = dict(used)
        if len(table) < len(used):
            raise self.error(f"{len(used) - len(table)} tokens are there twice")
        return table


def read_tokenizer(metadata: Mapping[str, Any], path: Path) -> Any:
    """The transformers tokenizer of a GGUF file; None for a file without one.

    Args:
      path: the file, for messages.

    Raises:
      InputError: a kind of tokenizer or a splitting that is not supported, lists that are missing or do not fit
        together.
    """
    kind = metadata.get("tokenizer.ggml.model", "none")
    if not isinstance(kind, str) or kind in ("none", "no_vocab"):
        return None
    if kind not in _KINDS:
        raise InputError(
            f"{path}: the tokenizer {kind} (tokenizer.ggml.model) is not supported; supported: {', '.join(_KINDS)}"
        )
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens[:1]):
        raise InputError(f"{path}: its tokenizer cannot be read: tokenizer.ggml.tokens is missing")
    types = metadata.get("tokenizer.ggml.token_type", np.full(len(tokens), _NORMAL))
    if not isinstance(types, np.ndarray) or len(types) != len(tokens):
        raise InputError(f"{path}: its tokenizer cannot be read: token_type has not one entry for each token")
    vocabulary = _Vocabulary(path, metadata, tokens, types)
    with told(path, "its tokenizer cannot be read"):
        return _made(vocabulary, kind)


def _made(vocabulary: _Vocabulary, kind: str) -> Any:
    """The tokenizer of a kind."""
    backend, begins = _KINDS[kind](vocabulary)
    parts = {name: vocabulary.token(key) for name, key in _PARTS.items()}
    if kind == "llama":
        parts = {"bos_token": vocabulary.token("bos", 1), "eos_token": vocabulary.token("eos", 2)} | {
            name: token for name, token in parts.items() if token is not None
        }
    begin = parts["bos_token"] if vocabulary.get("add_bos_token", begins) else None
    end = parts["eos_token"] if vocabulary.get("add_eos_token", False) else None
    if begin is not None or end is not None:
        around = [token for token in (begin, "$A", end) if token is not None]
        special = [(token, vocabulary.tokens.index(token)) for token in (begin, end) if token is not None]
        pair = [*around, *(token if token != "$A" else "$B" for token in around)]
        backend.post_processor = processors.TemplateProcessing(single=around, pair=pair, special_tokens=special)
    fast = fast_tokenizer(backend, **{name: token for name, token in parts.items() if token is not None})
    template = vocabulary.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        fast.chat_template = template
    return fast


_PARTS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def _byte_level(vocabulary: _Vocabulary) -> tuple[Tokenizer, bool]:
    """GPT-2's kind: merges of bytes, which are written as characters. Also whether texts begin with bos."""
    pre = vocabulary.get("pre", "default")
    if not isinstance(pre, str) or pre not in SPLITTINGS:
        raise InputError(
            f"{vocabulary.path}: the splitting {pre} of its byte-level tokenizer (tokenizer.ggml.pre) is not "
            f"supported; supported: {', '.join(SPLITTINGS)}"
        )
    splitting = SPLITTINGS[pre]
    merges = [tuple(merge.split(" ", 1)) for merge in vocabulary.listed("merges", list)]
    backend = Tokenizer(models.BPE(vocabulary.table(), merges, ignore_merges=splitting.whole))
    if splitting.composed:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splitting.patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    _add_tokens(backend, vocabulary, vocabulary.ids(_CONTROL), vocabulary.ids(_USER_DEFINED))
    return backend, splitting.begins


def _sentencepiece(vocabulary: _Vocabulary) -> tuple[Tokenizer, bool]:
    """Llama's and Gemma's kind: merges of characters, the most frequent first, and bytes where a character is no token.

    The file has a score for every token and no merges: whichever two neighbours make the token with the highest score
    are merged first (Kudo and Richardson, 2018). So a token's ways to be made of two others are merges, ranked by its
    score.
    """
    prefixed = bool(vocabulary.get("add_space_prefix", True))
    tokens = list(vocabulary.tokens)
    spaces = []
    if not prefixed:
        # Runs of spaces, tokens of their own, are written as they come in a text; elsewhere as SentencePiece has them.
        spaces = [i for i in vocabulary.ids(_USER_DEFINED) if not tokens[i].strip(" ")]
        for i in spaces:
            tokens[i] = _MARKER * len(tokens[i])
    vocabulary = vocabulary._replace(tokens=tokens)
    unknown = vocabulary.token("unknown", 0)
    # Fallback to bytes is spelled in their tokens, and there is none without all of them.
    fallback = len(vocabulary.ids(_BYTE)) == 256
    scores = vocabulary.listed("scores", np.ndarray)
    if len(scores) != len(tokens):
        raise vocabulary.error(f"{len(scores)} scores for {len(tokens)} tokens")
    merges = _merges(tokens, scores, vocabulary.ids(_NORMAL))
    backend = Tokenizer(
        models.BPE(vocabulary.table(), merges, unk_token=unknown, byte_fallback=fallback, fuse_unk=True)
    )
    replaced = normalizers.Replace(" ", _MARKER)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_MARKER), replaced]) if prefixed else replaced
    steps = [decoders.Replace(_MARKER, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)
    others = sorted(set(vocabulary.ids(_USER_DEFINED)) - set(spaces))
    _add_tokens(backend, vocabulary, vocabulary.ids(_CONTROL), others, spaces)
    return backend, True


def _merges(tokens: Sequence[str], scores: np.ndarray, ids: Sequence[int]) -> list[tuple[str, str]]:
    """All ways in which one of the tokens is made of two others, those of the highest score first."""
    known = {tokens[i] for i in ids}
    if longest := max((len(token) for token in known if len(token) > _LONGEST), default=0):
        raise InputError(f"a token has {longest} characters; {_LONGEST} are the most that are merged")
    ranked = (tokens[i] for i in sorted(ids, key=lambda i: -scores[i]))
    return [
        (token[:cut], token[cut:])
        for token in ranked
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]


def _add_tokens(
    backend: Tokenizer, vocabulary: _Vocabulary, control: Sequence[int], own: Sequence[int], spaces: Sequence[int] = ()
) -> None:
    """What is found in a text before anything is merged. Only control tokens are special: decoding may leave them out.

    Args:
      spaces: tokens that are found in the normalised text.
    """
    backend.add_special_tokens([AddedToken(vocabulary.tokens[i], normalized=False, special=True) for i in control])
    backend.add_tokens([AddedToken(vocabulary.tokens[i], normalized=False, special=False) for i in own])
    backend.add_tokens([AddedToken(vocabulary.tokens[i], normalized=True, special=False) for i in spaces])


_KINDS = {"gpt2": _byte_level, "llama": _sentencepiece}
