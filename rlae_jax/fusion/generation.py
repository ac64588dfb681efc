"""What `Ensemble.generate` returns, and how it is read off answers: ids into text, cuts at stop strings."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from rlae_jax.errors import InputError
from rlae_jax.fusion.codec import Codec
from rlae_jax.fusion.programs import Job
from rlae_jax.fusion.prompts import Row
from rlae_jax.fusion.state import Answers, DecodeState


@dataclasses.dataclass(eq=False)
class Continuation:
    """What goes on from where an answer ended; going on uses its state up."""

    job: Job
    state: DecodeState
    used: bool = False


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `Ensemble.generate` returns, one entry per prompt."""

    decoded: list[str] | None  # None without a tokenizer; read `texts`
    tokens: list[list[int]]  # the first member's ids, end token excluded
    weights: Float[np.ndarray, "B P K"]  # used in each span; NaN after a row's end
    # "stop" | "length" | "error": a prediction was not finite (NaN or infinite); what was written before it is there.
    finish_reasons: list[str]
    steps: list[int]  # fused steps, the one that chose the end token included
    chosen: list[list[int]]  # what each step chose, ids or entries of the union, end token excluded
    spans: Int[np.ndarray, "B T"]  # the span that each step was in; -1 after a row's end
    # With `scores=True`, the chosen tokens' log-probabilities under the fused distribution and under each member (of a
    # token that a member lacks, through the first token of its spelling, -inf if there is none); NaN after a row's end.
    scores: Float[np.ndarray, "B T"] | None = None
    member_scores: Float[np.ndarray, "B T K"] | None = None
    # With `keep=True`, for `Ensemble.extend`.
    continuation: Continuation | None = dataclasses.field(default=None, repr=False)

    @property
    def texts(self) -> list[str]:
        """Each prompt's answer: prompt + text is what decoding the whole sequence gives, without a last character of
        which the length left only the first bytes.

        Raises:
          InputError: the members have no tokenizer.
        """
        if self.decoded is None:
            raise InputError("the members have no tokenizer, so there are no texts; read tokens")
        return self.decoded


def read_answers(codec: Codec, job: Job, answers: Answers, *, settled: bool = False) -> Generation:
    """Answers on the host as a user reads them.

    Args:
      settled: of rows that go on, the part of the text alone that further tokens cannot change.
    """
    rows = [row for row in job.rows for _ in range(job.samples)]
    lengths = answers.steps - answers.ended
    chosen = [tokens[:n].tolist() for tokens, n in zip(answers.tokens, lengths, strict=True)]
    reasons = [
        "error" if failed else "stop" if ended else "length"
        for failed, ended in zip(answers.failed, answers.ended, strict=True)
    ]
    texts = None
    if codec.members[0].tokenizer is not None:
        texts = codec.decode(rows, chosen)
        for b, text in enumerate(texts):
            going = settled and not answers.done[b]
            texts[b], chosen[b], reasons[b] = read_row(codec, rows[b], chosen[b], text, reasons[b], job.stop, going)
    scores = member_scores = None
    if answers.scores is not None:
        written = np.arange(job.spec.max_new_tokens) < answers.steps[:, None]
        scores = np.where(written, answers.scores.fused, np.nan)
        member_scores = np.where(written[..., None], answers.scores.members, np.nan)
    return Generation(
        decoded=texts,
        tokens=codec.first_member_ids(chosen),
        weights=np.where(answers.span_mask()[..., None], answers.trajectory.weights, np.nan),
        finish_reasons=reasons,
        steps=answers.steps.tolist(),
        chosen=chosen,
        spans=_spans(job, answers),
        scores=scores,
        member_scores=member_scores,
    )


def _spans(job: Job, answers: Answers) -> Int[np.ndarray, "B T"]:
    """The span that each step was in; -1 after a row's end."""
    steps = np.arange(job.spec.max_new_tokens)
    spans = np.broadcast_to(steps // job.spec.span_length, (len(answers.steps), len(steps)))
    if answers.trajectory.length is not None:  # rows whose policy chose how long they are
        ends = np.where(answers.span_mask(), answers.trajectory.length, 0).cumsum(axis=1)
        spans = np.stack([np.searchsorted(row, steps, side="right") for row in ends])
    return np.where(steps < answers.steps[:, None], spans, -1)


def read_row(
    codec: Codec, prompt: Row, tokens: list[int], text: str, reason: str, stop: Sequence[str], going: bool
) -> tuple[str, list[int], str]:
    """One answer's text, tokens and the reason of its end, cut at the first stop string.

    Args:
      text: of all the tokens.
      reason: why they end.
      going: whether more may come; then the text is the part that this cannot change.
    """
    stopped = _stopped(codec, prompt, tokens, text, stop)
    if stopped is not None:
        return stopped, fewest_tokens(codec, prompt, tokens, stopped), "stop"
    if going:
        return _settled(codec, prompt, tokens, text, stop), tokens, reason
    return text if reason == "stop" else text.rstrip("\ufffd"), tokens, reason  # others may have cut a character


def fewest_tokens(codec: Codec, prompt: Row, tokens: list[int], text: str, least: int = 0) -> list[int]:
    """The fewest tokens, at least so many, whose text holds `text`."""
    for n in range(least, len(tokens)):
        if codec.decode([prompt], [tokens[:n]])[0].startswith(text):
            return tokens[:n]
    return tokens


def _stopped(codec: Codec, prompt: Row, tokens: list[int], text: str, stop: Sequence[str]) -> str | None:
    """The text before the first stop string; None without one. A stop string may have special tokens in it, or be a
    part of one, though the text shows none."""
    whole = _with_special(codec, prompt, tokens, text) if stop else text
    cuts = [whole.index(one) for one in stop if one in whole]
    return _shown(codec, prompt, tokens, whole, text, min(cuts)) if cuts else None


def _settled(codec: Codec, prompt: Row, tokens: list[int], text: str, stop: Sequence[str]) -> str:
    """The part of a text that further tokens cannot change: without the bytes of an unfinished character and without
    what may be the beginning of a stop string."""
    whole = _with_special(codec, prompt, tokens, text) if stop else text
    kept = whole.rstrip("\ufffd")
    held = max((n for s in stop for n in range(1, len(s)) if kept.endswith(s[:n])), default=0)
    return _shown(codec, prompt, tokens, whole, text, len(kept) - held)


def _with_special(codec: Codec, prompt: Row, tokens: list[int], text: str) -> str:
    """A text with its special tokens."""
    return codec.decode([prompt], [tokens], special=True)[0] if codec.special_tokens.keys() & tokens else text


def _shown(codec: Codec, prompt: Row, tokens: list[int], whole: str, text: str, length: int) -> str:
    """What the text shows of the first `length` characters of the whole one, which has the special tokens, too."""
    if whole is text:
        return text[:length]
    for n in range(len(tokens) + 1):
        start = codec.decode([prompt], [tokens[:n]], special=True)[0]
        if start.startswith(whole[:length]):
            break
    shown = codec.decode([prompt], [tokens[:n]])[0]
    beyond = 0 if n and tokens[n - 1] in codec.special_tokens else len(start) - length
    return shown[: len(shown) - beyond]
