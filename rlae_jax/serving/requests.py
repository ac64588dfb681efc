"""What an engine is asked, and what comes back: requests, pieces of answers, tickets."""

import collections
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
from jaxtyping import Float

from rlae_jax import ranges
from rlae_jax.errors import one_line
from rlae_jax.fusion.codec import Codec
from rlae_jax.fusion.generation import Generation, fewest_tokens, read_row
from rlae_jax.fusion.prompts import Row
from rlae_jax.fusion.reading import Text
from rlae_jax.fusion.sampling import SamplingOptions
from rlae_jax.fusion.state import Answers, RowOptions
from rlae_jax.ranges import Seconds

TOP = 20  # likeliest tokens of a step that can be asked for


class Busy(Exception):
    """The queue is full: try again later."""


class Failed(Exception):
    """The engine could not finish a request, for no fault of its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked."""

    prompt: str | Sequence[int] | Sequence[Mapping[str, Any]]
    """Text, ids (where the members have one tokenizer), or a chat's messages ({"role": ..., "content": ...})."""
    weights: Sequence[float] | str | None = None
    """For all of the answer [K], or the name of one of the engine's policies. Default: the engine's."""
    options: SamplingOptions = dataclasses.field(default_factory=SamplingOptions)
    """How it is answered; `scores` also tells log-probabilities."""
    top: Annotated[int, ranges.whole(0, TOP)] = 0
    """With `scores`, tell so many of the likeliest tokens of every step, at most 20."""
    timeout: Seconds | None = None
    """Seconds after which the answer ends with what is written."""


class Piece(NamedTuple):
    """What one sample of a request gained."""

    sample: int
    text: str  # that further tokens cannot change; joined, pieces are `Ensemble.generate`'s text
    tokens: list[int]  # ids, or entries of the union, of about this text
    weights: Float[np.ndarray, "n K"]  # in force at each of them
    scores: Float[np.ndarray, " n"] | None  # under the fused distribution
    member_scores: Float[np.ndarray, "n K"] | None
    top: list[dict[int, float]] | None  # of each token, the likeliest ones in its place
    finish_reason: str | None  # with the last piece: "stop", "length", "error", "timeout" or "cancelled"


class Stats(NamedTuple):
    """What an engine did so far, and what it has at hand."""

    waiting: int  # requests of which no prompt is read yet
    slots_in_use: int
    requests: int  # taken in
    finished: dict[str, int]  # samples by the reason of their end
    prompt_tokens: int  # of the first member, those that were known included
    cached_tokens: int  # that were known
    prefix_hits: int
    prefix_misses: int
    tokens: int  # written
    steps: int  # of all rows together
    looks: int  # at what was written, a few steps apart
    compiles: int  # programs since `warm_up`
    weights: Float[np.ndarray, " K"]  # the mean over all tokens


class Checked(NamedTuple):
    """A request in the terms of the engine's programs."""

    row: Row
    ids: tuple[Sequence[int], ...]  # by member, or one list of all
    options: RowOptions  # of one row
    weights: Float[np.ndarray, "1 K"]  # where it follows no policy
    limit: int
    room: int  # with a union, the tokens that each member may write
    seed: int
    stop: tuple[str, ...]
    stop_ids: frozenset[int]
    text: Text | None  # the prompt in an encoder's ids

    @property
    def span_length(self) -> int:
        return int(self.options.span_length[0])

    @property
    def policy(self) -> int:
        """Its number; -1 without one."""
        return int(self.options.policy[0])


class Ticket:
    """A submitted request: iterate over its pieces, or wait for its result."""

    def __init__(self, request: Request, checked: Checked, codec: Codec, wake: Callable[[], None]):
        self.request = request
        self.checked = checked
        self.prompt_tokens = len(checked.ids[0])
        self.deadline = None if request.timeout is None else time.monotonic() + request.timeout
        self.cancelled = False
        self._codec = codec
        self._wake = wake
        self._pieces: list[Piece] = []
        self._over: dict[int, Sample] = {}
        self._error: BaseException | None = None
        self._listeners: list[Callable[[Piece | None], None]] = []
        self._changed = threading.Condition()

    @property
    def done(self) -> bool:
        """Whether every sample has ended."""
        return len(self._over) == self.request.options.samples or self._error is not None

    def cancel(self) -> None:
        """Gives the answer up. What is written so far stays; its slots are free within a look."""
        self.cancelled = True
        self._wake()

    def why_over(self, now: float) -> str | None:
        """The reason, if it is to end whatever is written."""
        if self.cancelled:
            return "cancelled"
        return "timeout" if self.deadline is not None and now >= self.deadline else None

    def listen(self, call: Callable[[Piece | None], None]) -> None:
        """Has every piece told, from the first on, and None after the last, mostly in the engine's thread: `call` must
        not wait."""
        with self._changed:
            for piece in self._pieces:
                call(piece)
            if self.done:
                call(None)
            self._listeners.append(call)

    def __iter__(self) -> Iterator[Piece]:
        """Pieces as they come.

        Raises:
          Failed: the engine could not go on.
        """
        for i in itertools.count():
            with self._changed:
                while len(self._pieces) <= i and not self.done:
                    self._changed.wait()
                if len(self._pieces) <= i:
                    if self._error is not None:
                        raise Failed(f"the answer could not be finished: {one_line(self._error)}") from self._error
                    return
                piece = self._pieces[i]
            yield piece

    def result(self, timeout: float | None = None) -> Generation:
        """The whole answer, a row per sample, as `Ensemble.generate` gives it.

        Raises:
          Failed: the engine could not go on.
          TimeoutError: it is not finished after so many seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"not finished after {timeout} s")
        collections.deque(self, maxlen=0)  # raises what went wrong
        options = self.request.options
        samples = [self._over[i] for i in range(options.samples)]
        n, k, longest = options.samples, len(self._codec.members), options.max_new_tokens
        most = -(-longest // self.checked.span_length)
        decided = [one.weights_of_spans() for one in samples]
        weights = np.full((n, max(most, *map(len, decided)), k), np.nan, np.float32)
        scores = np.full((n, longest), np.nan, np.float32)
        member_scores = np.full((n, longest, k), np.nan, np.float32)
        spans = np.full((n, longest), -1)
        for i, one in enumerate(samples):
            weights[i, : len(decided[i])] = decided[i]
            spans[i, : one.steps] = one.spans_at(0, one.steps)
            scores[i, : len(one.scores)] = one.scores
            member_scores[i, : len(one.scores)] = np.reshape(one.member_scores, (-1, k))
        chosen = [one.tokens[: one.told] for one in samples]
        return Generation(
            decoded=[one.text for one in samples] if self._codec.members[0].tokenizer is not None else None,
            tokens=self._codec.first_member_ids(chosen),
            chosen=chosen,
            weights=weights,
            finish_reasons=[one.reason for one in samples],
            steps=[one.steps for one in samples],
            spans=spans,
            scores=scores if options.scores else None,
            member_scores=member_scores if options.scores else None,
        )

    def tell(self, piece: Piece, sample: "Sample") -> None:
        """A sample gained something, or is over."""
        with self._changed:
            self._pieces.append(piece)
            if sample.over:
                self._over[sample.number] = sample
            for call in self._listeners:
                call(piece)
            self._end()

    def fail(self, error: BaseException) -> None:
        """It cannot be finished."""
        with self._changed:
            if not self.done:
                self._error = error
                self._end()

    def _end(self) -> None:
        if self.done:
            for call in self._listeners:
                call(None)
        self._changed.notify_all()


@dataclasses.dataclass(eq=False)
class Sample:
    """An answer that is being written."""

    ticket: Ticket
    number: int
    begun: int = 0  # steps that the device was told to make
    written: bool = False  # to its end, as the device says
    steps: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)
    # Of a policy: weights, and the steps for which they hold.
    decisions: list[np.ndarray] = dataclasses.field(default_factory=list)
    lengths: list[int] = dataclasses.field(default_factory=list)
    scores: list[float] = dataclasses.field(default_factory=list)
    member_scores: list[np.ndarray] = dataclasses.field(default_factory=list)
    top: list[dict[int, float]] = dataclasses.field(default_factory=list)
    text: str = ""  # that was told
    told: int = 0  # tokens that were told
    reason: str = ""  # of its end

    @property
    def over(self) -> bool:
        return bool(self.reason)

    @property
    def length(self) -> int:
        """Tokens of the prompt and of the answer, as far as it is begun."""
        return max(map(len, self.ticket.checked.ids)) + self.begun

    @property
    def left(self) -> int:
        """Steps that may yet begin."""
        return self.ticket.checked.limit - self.begun

    def take_in(self, answers: Answers, row: int) -> int:
        """What some steps wrote in its row; returns how many it was."""
        checked, request = self.ticket.checked, self.ticket.request
        n = int(answers.steps[row])
        self.steps += n
        self.tokens += answers.tokens[row, : n - bool(answers.ended[row])].tolist()
        if checked.policy >= 0:
            taken, lengths = int(answers.decisions[row]), answers.trajectory.length
            assert lengths is not None
            self.decisions += list(answers.trajectory.weights[row, :taken])
            self.lengths += lengths[row, :taken].tolist()
        if request.options.scores and answers.scores is not None:
            self.scores += answers.scores.fused[row, :n].tolist()
            self.member_scores += list(answers.scores.members[row, :n])
            if request.top and answers.scores.top is not None:
                tokens, log_probs = (part[row, :n, : request.top].tolist() for part in answers.scores.top)
                self.top += [dict(zip(*pair, strict=True)) for pair in zip(tokens, log_probs, strict=True)]
        return n

    def gain(self, codec: Codec, reason: str | None) -> Piece | None:
        """What is new and will not change any more; None if nothing is.

        Args:
          reason: if it is over.
        """
        checked, tokens = self.ticket.checked, self.tokens
        special = next((n for n, token in enumerate(tokens) if token in checked.stop_ids), None)
        if special is not None:
            tokens, reason = tokens[:special], "stop"
        text, kept = "", len(tokens)
        if codec.members[0].tokenizer is not None:
            whole = codec.decode([checked.row], [tokens])[0]
            cut = "stop" if reason == "stop" else "length"  # the others, too, may have cut a character
            text, whole_tokens, why = read_row(codec, checked.row, tokens, whole, cut, checked.stop, reason is None)
            kept = len(whole_tokens)
            if why == "stop":
                reason = "stop"
            elif reason is None and checked.stop:
                kept = len(fewest_tokens(codec, checked.row, tokens, text, self.told))
        start, kept = self.told, max(kept, self.told)
        gained = text[len(self.text) :]
        if not (gained or kept > start or reason):
            return None
        self.text, self.told, self.reason = text, kept, reason or ""
        members = np.reshape(np.asarray(self.member_scores[start:kept], np.float32), (-1, checked.weights.shape[1]))
        return Piece(
            sample=self.number,
            text=gained,
            tokens=tokens[start:kept],
            weights=self.weights_at(start, kept),
            scores=np.asarray(self.scores[start:kept], np.float32) if self.ticket.request.options.scores else None,
            member_scores=members if self.ticket.request.options.scores else None,
            top=self.top[start:kept] if self.ticket.request.top else None,
            finish_reason=reason,
        )

    def spans_at(self, start: int, stop: int) -> np.ndarray:
        """[n]: the decisions that were in force at some steps."""
        checked, steps = self.ticket.checked, np.arange(start, stop)
        if checked.policy < 0:
            return steps // checked.span_length
        found: np.ndarray = np.searchsorted(np.cumsum(self.lengths), steps, side="right")
        return found

    def weights_at(self, start: int, stop: int) -> np.ndarray:
        """[n, K]: those in force at some steps."""
        checked = self.ticket.checked
        if checked.policy < 0 or start == stop:
            return np.broadcast_to(checked.weights, (stop - start, checked.weights.shape[1]))
        decided: np.ndarray = np.asarray(self.decisions, np.float32)[self.spans_at(start, stop)]
        return decided

    def weights_of_spans(self) -> np.ndarray:
        """[P, K]: all of them."""
        checked = self.ticket.checked
        if checked.policy < 0:
            return np.repeat(checked.weights, -(-self.steps // checked.span_length), axis=0)
        return np.reshape(np.asarray(self.decisions, np.float32), (-1, checked.weights.shape[1]))
