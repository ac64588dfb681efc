"""Answers in the API's form: from the pieces that the engine gives to choices, whole or as the chunks of a stream.

    Piece, Piece, ... ─ Choice.gain ─► {"index", "text" | "delta" | "message", "logprobs", "finish_reason", "rlae"}

Under `rlae` (where the request has such an object) a choice tells who wrote what:

    spans   [{"span", "start", "weights"}]   of the spans that begin in what is told: its number, its first token's, and
                                             Float[K], the weights that were in force in it
    tokens  [{"text", "span", "logprob", "member_logprobs"}]   with attribution: the texts are what the answer's text is
                                             made of; Float[K] under each member, null where it cannot write the token
"""

import codecs
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlae_jax.errors import InputError
from rlae_jax.serving.api import Call
from rlae_jax.serving.engine import Engine
from rlae_jax.serving.requests import Piece

LEAST = -9999.0  # what the API has for a log-probability of minus infinity

TokenText = Callable[[int], bytes]


class Scored(NamedTuple):
    """A prompt's tokens and how likely each was after those before it, as `echo` tells it."""

    tokens: list[int]
    scores: list[float | None]  # log p under the fused distribution; None of what nothing comes before
    top: list[dict[int, float] | None]  # the most likely tokens at each place


# Of a choice with the finish_reason "error", beside which others of the answer may be whole.
NOT_FINITE = "a prediction was not finite (NaN or infinite): the answer ends before it"


def joined(pieces: Sequence[Piece]) -> Piece:
    """Pieces of one sample, one after another, as one."""
    if len(pieces) == 1:
        return pieces[0]

    def rows(arrays: Sequence[np.ndarray | None]) -> np.ndarray | None:
        there = [array for array in arrays if array is not None]
        return np.concatenate(there) if there else None

    weights = rows([piece.weights for piece in pieces])
    assert weights is not None
    tops = [piece.top for piece in pieces if piece.top is not None]
    return Piece(
        sample=pieces[0].sample,
        text="".join(piece.text for piece in pieces),
        tokens=[token for piece in pieces for token in piece.tokens],
        weights=weights,
        scores=rows([piece.scores for piece in pieces]),
        member_scores=rows([piece.member_scores for piece in pieces]),
        top=[one for top in tops for one in top] if tops else None,
        finish_reason=pieces[-1].finish_reason,
    )


def nothing(sample: int, members: int, reason: str | None) -> Piece:
    """A piece without a token."""
    empty = np.zeros((0, members), np.float32)
    return Piece(sample, "", [], empty, np.zeros(0, np.float32), empty, None, reason)


def shown_token(raw: bytes) -> str:
    """A token as the API names it: its text, or its bytes where they are a part of a character."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def token_text(engine: Engine) -> TokenText:
    """What gives a token's bytes: the engine, or the tokenizer where its tokens stand for none (WordPiece).

    Raises:
      InputError: the members have no tokenizer.
    """
    tokenizer = engine.ensemble.tokenizer
    try:
        engine.token_text(0)
    except InputError:
        return lambda token: str(tokenizer.decode([token])).encode()
    return engine.token_text


class TextOfTokens:
    """What each token adds to a text, as the text grows. Joined the parts are the text: a token that ends within a
    character adds nothing, and the one that completes it adds the character."""

    def __init__(self, bytes_of: TokenText):
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")

    def split(self, tokens: Sequence[int], text: str) -> list[str]:
        """The parts of the tokens' text; what no token stands for goes to the last."""
        parts, rest = [], text
        for token in tokens:
            own = self._decoder.decode(self._bytes_of(token))
            if not rest.startswith(own):  # a text begins without its first token's space; a stop string cuts a token
                own = rest if own.startswith(rest) else own.lstrip(" ")
            parts.append(own if rest.startswith(own) else "")  # special tokens are not shown
            rest = rest[len(parts[-1]) :]
        if parts:
            parts[-1] += rest
        return parts


class Choice:
    """One sample's answer, as it grows.

    Args:
      prompt: the text that it begins with, for `echo`, and its tokens where they are told.
    """

    def __init__(self, call: Call, index: int, bytes_of: TokenText, prompt: tuple[str, Scored | None] = ("", None)):
        self.call, self.index, self.bytes_of = call, index, bytes_of
        self.prompt: tuple[str, Scored | None] | None = prompt if call.echo else None  # until it was told
        self.begun = False
        self.tokens = 0  # told so far
        self._characters = 0
        self._spans = 0
        self._weights: np.ndarray | None = None
        self._texts = TextOfTokens(bytes_of)

    def gain(self, piece: Piece, *, chunk: bool) -> dict[str, Any]:
        """The choice with what the piece has; `chunk`: as a part of a stream."""
        text, logprobs = piece.text, None
        split = self.call.attribution or (self.call.logprobs and not self.call.chat)
        parts = self._texts.split(piece.tokens, piece.text) if split else []
        if self.call.logprobs:
            logprobs = self._chat_logprobs(piece) if self.call.chat else self._completion_logprobs(piece, parts)
        if self.prompt is not None:
            text = self.prompt[0] + text
        reason = "length" if piece.finish_reason == "timeout" else piece.finish_reason
        choice: dict[str, Any] = {"index": self.index, "logprobs": logprobs, "finish_reason": reason}
        if reason == "error":
            choice["error"] = {"message": NOT_FINITE, "type": "server_error", "param": None, "code": "not_finite"}
        if not self.call.chat:
            choice["text"] = text
        elif not chunk:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["delta"] = ({} if self.begun else {"role": "assistant"}) | {"content": text}
        if self.call.rlae:
            choice["rlae"] = self._rlae(piece, parts)
        self.prompt, self.begun = None, True
        self.tokens += len(piece.tokens)
        return choice

    def _rlae(self, piece: Piece, parts: Sequence[str]) -> dict[str, Any]:
        spans, tokens = [], []
        for i, weights in enumerate(piece.weights):
            place = self.tokens + i
            length = self.call.span_length
            same = self._weights is not None and np.array_equal(weights, self._weights)
            if not same or (length and place % length == 0):
                spans.append({"span": self._spans, "start": place, "weights": _numbers(weights)})
                self._spans += 1
                self._weights = weights
            if self.call.attribution:
                assert piece.scores is not None
                assert piece.member_scores is not None
                tokens.append(
                    {
                        "text": parts[i],
                        "span": self._spans - 1,
                        "logprob": _number(piece.scores[i]),
                        "member_logprobs": _numbers(piece.member_scores[i]),
                    }
                )
        return {"spans": spans} | ({"tokens": tokens} if self.call.attribution else {})

    def _completion_logprobs(self, piece: Piece, parts: Sequence[str]) -> dict[str, Any]:
        assert piece.scores is not None
        tops: list[dict[int, float] | None] = [None] * len(parts) if piece.top is None else list(piece.top)
        rows: list[tuple[int, float | None, dict[int, float] | None, str]]
        rows = list(zip(piece.tokens, map(float, piece.scores), tops, parts, strict=True))
        text, scored = self.prompt or ("", None)
        if scored is not None:
            texts = TextOfTokens(self.bytes_of).split(scored.tokens, text)
            rows = [*zip(scored.tokens, scored.scores, scored.top, texts, strict=True), *rows]
        told: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, score, top, part in rows:
            shown = shown_token(self.bytes_of(token))
            told["tokens"].append(shown)
            told["token_logprobs"].append(None if score is None else _least(score))
            told["top_logprobs"].append(None if score is None else self._top(token, score, top or {}))
            told["text_offset"].append(self._characters)
            self._characters += len(part)
        return told

    def _top(self, chosen: int, score: float, top: Mapping[int, float]) -> dict[str, float]:
        """The most likely tokens and the chosen one, which has the same number here as where it was chosen; of several
        that read alike the likeliest counts."""
        told: dict[str, float] = {}
        for token, value in {**top, chosen: score}.items():
            shown = shown_token(self.bytes_of(token))
            told[shown] = max(_least(value), told.get(shown, LEAST))
        return told

    def _chat_logprobs(self, piece: Piece) -> dict[str, Any]:
        assert piece.scores is not None

        def told(token: int, score: float) -> dict[str, Any]:
            raw = self.bytes_of(token)
            return {"token": shown_token(raw), "logprob": _least(score), "bytes": list(raw)}

        content = []
        for i, (token, score) in enumerate(zip(piece.tokens, piece.scores, strict=True)):
            top = {} if piece.top is None else piece.top[i]
            content.append(told(token, score) | {"top_logprobs": [told(*pair) for pair in top.items()]})
        return {"content": content, "refusal": None}


def _least(score: float) -> float:
    return float(score) if math.isfinite(score) else LEAST


def _number(value: float) -> float | None:
    """As JSON has it: null where it is none."""
    return float(value) if math.isfinite(value) else None


def _numbers(values: np.ndarray) -> list[float | None]:
    return [_number(value) for value in values]


def envelope(call: Call, name: str, created: int, *, chunk: bool = False) -> dict[str, Any]:
    """What is around the choices."""
    kind = "chat.completion" + (".chunk" if chunk else "") if call.chat else "text_completion"
    return {"id": name, "object": kind, "created": created, "model": call.model.name}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """The API's count of tokens."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}
