"""`Engine`: requests that come at any time, answered together by one ensemble (continuous batching).

One thread of its own drives the device. Between two looks at what was written, a few steps apart, it ends rows and
gives their slots to waiting requests, reads a bounded part of new prompts, and starts the next steps; while these run
it turns what came before into text. Requests are checked and tokenised in the thread that submits them.

    submit ─► queue ─► read_chunk ... ─► admit ─► advance, advance, ... ─► Piece, Piece, ... ─► the caller's thread
"""

import collections
import contextlib
import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rlae_jax import compilation, ranges
from rlae_jax.errors import InputError
from rlae_jax.fusion import slots as programs
from rlae_jax.fusion.ensemble import Ensemble
from rlae_jax.fusion.state import Answers, DecodeState
from rlae_jax.fusion.weights import Weights
from rlae_jax.models.cache import Cache
from rlae_jax.ranges import Bytes, Context, Count
from rlae_jax.serving.intake import Intake
from rlae_jax.serving.prompts import PromptReader, Reading
from rlae_jax.serving.requests import Busy, Checked, Request, Sample, Stats, Ticket

_log = logging.getLogger(__name__)

# Steps between two looks: as many as take about so long, so that what the host does in between is little beside them,
# and what it has to wait for, too.
_LOOK_SECONDS = 0.02
_LEAST_STEPS, _MOST_STEPS = 4, 32
# Slots of the smallest caches, and looks after which they get fewer, where fewer would have done.
_FEWEST_SLOTS, _PATIENCE = 128, 4


@dataclasses.dataclass(eq=False)
class _Waiting:
    """A request of which the prompt is not read, or some samples have no slot yet."""

    ticket: Ticket
    reading: Reading | None = None
    admitted: int = 0  # samples

    @property
    def wanted(self) -> int:
        """Samples without a slot."""
        return self.ticket.request.options.samples - self.admitted


@dataclasses.dataclass(eq=False)
class _Flight:
    """Some steps that the device makes."""

    occupants: list[Sample | None]  # of the rows
    answers: Answers
    started: float
    written: list[tuple[int, Sample]] = dataclasses.field(default_factory=list)  # rows, and for whom

    def land(self) -> None:
        """Waits for the end, and fetches what somebody waits for."""
        self.answers = jax.device_get(_looked_at(self.answers, self.occupants))
        pairs = enumerate(self.occupants)
        self.written = [(row, one) for row, one in pairs if one is not None and not (one.over or one.written)]


class Engine:
    """Answers requests as they come, each as `Ensemble.generate` alone would.

    Args:
      slots: R, answers that are written at a time.
      context: the longest prompt and answer together, in tokens; by default what the members were made for, at most
        2,048. Memory grows with slots * context.
      policies: what requests may name as their weights: trained policies, or those of `Ensemble.generate`.
      default: the weights of a request without any: None (uniform), [K], or a name of `policies`.
      chunk: tokens of prompts that are read between two looks at what is being written.
      prefix_bytes: for prompts that were read, for others that begin alike.
      queue: requests that wait at most, beside those for which there are free rows.

    Raises:
      InputError: members or policies that cannot be served this way.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        *,
        slots: Count = 8,
        context: Context | None = None,
        policies: Mapping[str, Weights] | None = None,
        default: Sequence[float] | str | None = None,
        chunk: Count = 256,
        prefix_bytes: Bytes = 256 * 2**20,
        queue: Count = 256,
    ):
        ranges.check_arguments(
            Engine.__init__, slots=slots, context=context, chunk=chunk, prefix_bytes=prefix_bytes, queue=queue
        )
        if context is not None and context > ensemble.context:
            raise InputError(f"context is {context}; the members have {ensemble.context} tokens at most")
        context = min(ensemble.context, 2048) if context is None else context
        ensemble.require_memory(slots, context, "give fewer slots, or a shorter context")
        if ensemble.mesh is not None:
            raise InputError("an engine runs on one device; load its members without a mesh")
        if any(lm.config.encoder is not None for lm in ensemble.members):
            raise InputError("an engine serves decoders; encoder-decoders are not served yet")
        if any(len(lm.adapters) > 1 for lm in ensemble.members):
            raise InputError("a member has several adapters: give each as a member of its own (from_adapters)")
        self.ensemble = ensemble
        self.slots = slots
        self.context = context
        self._intake = Intake(ensemble, context, policies or {}, default)
        self.policies = tuple(self._intake.policies)
        self._spec = self._intake.spec(_MOST_STEPS)
        self._params = ensemble.params
        configs = [lm.config for lm in ensemble.members]
        passes = [(configs[0], len(configs))] if ensemble.shared is not None else [(config, 1) for config in configs]
        self._prompts = PromptReader(passes, self._params, context, chunk, prefix_bytes)
        self._chunk, self._limit = chunk, queue
        self._changed = threading.Condition()  # guards the queue, the counts and the flag
        self._queue: collections.deque[_Waiting] = collections.deque()
        self._counts: collections.Counter[str] = collections.Counter()
        self._finished: collections.Counter[str] = collections.Counter()
        self._weights = np.zeros(len(configs))
        self._closing = False
        self._compiled = _compilations()
        # The engine's thread's own.
        self._reading: list[_Waiting] = []
        self._rows: list[Sample | None] = [None] * slots
        self._state: DecodeState | None = None
        self._sizes = [context] if self._intake.ragged else _cache_sizes(context)
        self._size = self._sizes[0]  # slots of the state's caches
        self._larger = 0  # looks for which they have been more than needed
        self._flying: collections.deque[_Flight] = collections.deque()
        self._landed = 0.0
        self._step_seconds = _LOOK_SECONDS / _LEAST_STEPS
        self._turn = 0
        self._thread = threading.Thread(target=self._run, name="rlae-jax engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def warm_up(self, told: Callable[[int, int], None] | None = None) -> None:
        """Compiles everything, so that no request waits for it.

        Args:
          told: is called with how many of how many sizes of caches are done.
        """
        with compilation.kept_for(self):
            self._warm_up(told)
        self._compiled = _compilations()

    def _warm_up(self, told: Callable[[int, int], None] | None) -> None:
        read = [(self._prompts.warm_up(size), size) for size in self._prompts.sizes]
        for i, slots in enumerate(self._sizes):
            state = self._empty_state(slots)
            for other in self._sizes[max(i - 1, 0) : i + 2]:
                if other != slots:
                    programs.resize(state, self._spec, other)
            for of_prompt in read:
                state = self._admit(state, of_prompt, self._intake.stand_in(1), 0, 0, False)
            jax.block_until_ready(self._advance(state, np.zeros(self.slots, bool), _LEAST_STEPS))
            if told is not None:
                told(i + 1, len(self._sizes))

    @property
    def compiles(self) -> int:
        """Programs that were compiled in this process since `warm_up`, or since the engine was made."""
        return _compilations() - self._compiled

    def stats(self) -> Stats:
        """See `Stats`."""
        with self._changed:
            counts = self._counts
            return Stats(
                waiting=len(self._queue),
                slots_in_use=sum(row is not None for row in self._rows),
                requests=counts["requests"],
                finished=dict(self._finished),
                prompt_tokens=counts["prompt_tokens"],
                cached_tokens=counts["cached_tokens"],
                prefix_hits=counts["prefix_hits"],
                prefix_misses=counts["prefix_misses"],
                tokens=counts["tokens"],
                steps=counts["steps"],
                looks=counts["looks"],
                compiles=self.compiles,
                weights=(self._weights / max(counts["tokens"], 1)).astype(np.float32),
            )

    def token_text(self, token: int) -> bytes:
        """The bytes that an id, or an entry of the union, stands for; of special ones their names."""
        piece = self._token_bytes[token] if token < len(self._token_bytes) else None
        return self.ensemble.codec.special_tokens.get(token, "").encode() if piece is None else piece

    @functools.cached_property
    def _token_bytes(self) -> Sequence[bytes | None]:
        return self.ensemble.codec.pieces()

    def submit(self, request: Request) -> Ticket:
        """Takes a request in, at once; from any thread.

        Raises:
          InputError: what cannot be answered, and why.
          Busy: too many wait already, or the engine is closing.
        """
        ticket = Ticket(request, self._intake.check(request), self.ensemble.codec, self._wake)
        with self._changed:
            if self._closing:
                raise Busy("the engine is closing")
            free = sum(row is None for row in self._rows) - sum(one.wanted for one in self._reading)
            if len(self._queue) >= self._limit + max(free, 0):  # for whom there is a row, does not wait long
                raise Busy(f"{self._limit} requests are waiting already")
            self._counts["requests"] += 1
            self._queue.append(_Waiting(ticket))
            self._changed.notify_all()
        return ticket

    def weights_of(self, request: Request) -> Weights:
        """A request's weights, or the policy that it follows, as `Ensemble.generate` takes them.

        Raises:
          InputError: a policy that is not served, unusable weights.
        """
        return self._intake.weights_of(request)

    def room(self, request: Request) -> int:
        """The longest answer for which the context has room beside a request's prompt, and for which its policy was
        trained; at least 1.

        Raises:
          InputError: a prompt that cannot be read.
        """
        return self._intake.room(request)

    def longest(self, request: Request) -> int:
        """The longest answer for which a request's policy was trained; without such a bound the context."""
        return self._intake.longest(request)

    def close(self, wait: bool = True) -> None:
        """Refuses further requests and ends.

        Args:
          wait: for what is taken in already; else it is cancelled.
        """
        with self._changed:
            self._closing = True
            if not wait:
                waiting = [one.ticket for one in (*self._queue, *self._reading)]
                for ticket in (*waiting, *(row.ticket for row in self._rows if row is not None)):
                    ticket.cancelled = True
            self._changed.notify_all()
        self._thread.join()
        compilation.release(self)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # From here on in the engine's thread.

    def _run(self) -> None:
        with compilation.kept_for(self):
            self._serve()

    def _serve(self) -> None:
        landed: _Flight | None = None
        while True:
            with self._changed:
                if not (landed or self._flying or self._reading or any(self._rows)):
                    self._changed.wait_for(lambda: self._queue or self._closing)
                    if self._closing and not self._queue:
                        return
            try:
                landed = self._look(landed)
            except Exception as error:  # whatever the device says: what is at hand is lost, the engine is not
                _log.exception("the engine lost what was running")
                landed = None
                self._lose(error)

    def _look(self, landed: _Flight | None) -> _Flight | None:
        """Ends, reads, admits, starts the next steps, tells what those before have written, and waits for what is
        under way.

        Where all rows are in use and nobody waits for one, the next steps are started before those under way are looked
        at, so that the device never waits for the host.
        """
        self._expire()
        self._read_prompts()
        self._admit_ready()
        deep = 1 if self._reading or self._queue or not all(self._rows) else 2
        started = len(self._flying) < deep and self._start()
        if landed is not None:
            self._tell(landed)
        if not self._flying or (started and len(self._flying) < deep):
            return None
        flight = self._flying.popleft()
        flight.land()
        for row, sample in flight.written:
            if flight.answers.done[row]:
                sample.written = True
                if self._rows[row] is sample:
                    self._rows[row] = None
        steps = max([1, *(int(flight.answers.steps[row]) for row, _ in flight.written)])
        now = time.perf_counter()
        self._step_seconds += 0.2 * ((now - max(flight.started, self._landed)) / steps - self._step_seconds)
        self._landed = now
        with self._changed:
            self._counts.update(steps=steps, looks=1)
        return flight

    def _start(self) -> bool:
        """Starts the next steps, if there is somebody to write for."""
        occupants = [None if sample is None or not sample.left else sample for sample in self._rows]
        going = np.array([sample is not None for sample in occupants])
        if not going.any():
            return False
        samples = [sample for sample in occupants if sample is not None]
        steps = self._next_steps(samples)
        self._fit(max(sample.length for sample in samples) + steps)
        started = time.perf_counter()
        self._state, answers = self._advance(self._live_state(), going, steps)
        self._flying.append(_Flight(occupants, answers, started))
        for sample in samples:
            sample.begun += min(steps, sample.left)
        return True

    def _empty_state(self, slots: int) -> DecodeState:
        row = self._intake.prompts(self._intake.stand_in(1), 1)
        rows = jax.tree.map(lambda leaf: np.repeat(leaf, self.slots, axis=0), row)
        keys = jax.vmap(jax.random.key)(np.zeros(self.slots, np.uint32))
        rows = rows._replace(keys=keys, active=np.zeros(self.slots, bool))
        state: DecodeState = programs.empty_state(self._params, rows, self._spec, self.slots, slots)
        return state

    def _live_state(self) -> DecodeState:
        if self._state is None:
            self._state = self._empty_state(self._size)
        return self._state

    def _fit(self, slots: int) -> None:
        """Gives the caches as many slots as the longest text needs, since a step reads all of them: more at once, fewer
        after a while."""
        slots = min(slots, self.context)
        smallest = next(i for i, size in enumerate(self._sizes) if size >= slots)
        i = self._sizes.index(self._size)
        self._larger = self._larger + 1 if smallest < i else 0
        if self._larger >= _PATIENCE:
            self._larger, smallest = 0, i - 1
        elif smallest < i:
            return
        while i != smallest:
            i += 1 if i < smallest else -1
            if self._state is not None:
                self._state = programs.resize(self._state, self._spec, self._sizes[i])
        self._size = self._sizes[i]

    def _next_steps(self, samples: Sequence[Sample]) -> int:
        steps = int(np.clip(_LOOK_SECONDS / max(self._step_seconds, 1e-6), _LEAST_STEPS, _MOST_STEPS))
        if self._reading or self._queue:  # somebody waits for a row that ends, but a look costs some steps, too
            steps = min([steps, *(sample.left for sample in samples if sample.left >= 2 * _LEAST_STEPS)])
        return steps

    def _advance(self, state: DecodeState, going: np.ndarray, steps: int) -> tuple[DecodeState, Answers]:
        found: tuple[DecodeState, Answers] = programs.advance(
            self._params, state, self._intake.policy_params, going, np.int32(steps), self._spec
        )
        return found

    def _expire(self) -> None:
        """Ends what was cancelled or has run out of time."""
        now = time.monotonic()
        for sample in self._rows:
            if sample is not None and (why := sample.ticket.why_over(now)):
                self._tell_one(sample, why)
        with self._changed:
            over = [(one, why) for one in (*self._queue, *self._reading) if (why := one.ticket.why_over(now))]
            for one, _ in over:
                (self._reading if one in self._reading else self._queue).remove(one)
        for one, why in over:
            for number in range(one.admitted, one.admitted + one.wanted):
                self._tell_one(Sample(one.ticket, number), why)

    def _read_prompts(self) -> None:
        """Takes in waiting requests and reads a bounded part of their prompts."""
        budget = self._chunk
        while budget > 0:
            self._take_in()
            unread = [one for one in self._reading if one.reading is not None and one.reading.left > 0]
            if not unread:
                return
            # In turn the first one and the one that is read soonest, so that neither waits for ever.
            self._turn += 1
            one = unread[0] if self._turn % 2 else min(unread, key=lambda one: one.reading.left)  # type: ignore[union-attr]
            assert one.reading is not None
            budget -= self._prompts.read(one.reading)

    def _take_in(self) -> None:
        """Begins to read prompts of waiting requests: for free slots, and one more, so that it is read when one is."""
        free = sum(row is None for row in self._rows)
        wanted = sum(one.wanted for one in self._reading)
        while wanted < max(free, 1):
            with self._changed:
                if not self._queue:
                    return
                one = self._queue.popleft()
                self._reading.append(one)
            one.reading = self._prompts.start(one.ticket.checked.ids)
            wanted += one.wanted
            with self._changed:
                self._counts.update(prompt_tokens=one.ticket.prompt_tokens, cached_tokens=one.reading.known)
                self._counts["prefix_hits" if one.reading.known else "prefix_misses"] += 1

    def _admit_ready(self) -> None:
        """Gives free rows to prompts that are read."""
        free = [row for row, sample in enumerate(self._rows) if sample is None]
        for one in list(self._reading):
            if not free or one.reading is None or one.reading.left > 0:
                continue
            read, several = self._prompts.finish(one.reading), one.ticket.request.options.samples > 1
            while free and one.wanted:
                row = free.pop(0)
                sample = Sample(one.ticket, one.admitted)
                if sample.length > self._size:
                    self._fit(sample.length)
                state = self._live_state()
                self._state = self._admit(state, read, one.ticket.checked, row, sample.number, several)
                self._rows[row] = sample
                one.admitted += 1
            if not one.wanted:
                with self._changed:
                    self._reading.remove(one)

    def _admit(
        self,
        state: DecodeState,
        read: tuple[tuple[Cache, ...], int],
        checked: Checked,
        row: int,
        sample: int,
        several: bool,
    ) -> DecodeState:
        caches, size = read
        admitted: DecodeState = programs.admit(
            self._params,
            state,
            caches,
            self._intake.prompts(checked, size),
            np.int32(row),
            np.uint32(checked.seed),
            np.int32(sample),
            np.bool_(several),
            checked.options,
            checked.weights,
            np.int32(checked.room),
            self._spec,
        )
        return admitted

    def _tell(self, flight: _Flight) -> None:
        """Turns what some steps wrote into text, and tells it."""
        answers = flight.answers
        for row, sample in flight.written:
            if sample.over:
                continue
            n = sample.take_in(answers, row)
            with self._changed:
                self._counts["tokens"] += n
                self._weights += sample.weights_at(sample.steps - n, sample.steps).sum(axis=0)
            reason = "error" if answers.failed[row] else "stop" if answers.ended[row] else "length"
            self._tell_one(sample, reason if answers.done[row] else None)

    def _tell_one(self, sample: Sample, reason: str | None) -> None:
        """Tells what a sample gained, and whether it is over, which a stop string may say, too."""
        with self._intake.tokenising:
            piece = sample.gain(self.ensemble.codec, reason)
        if sample.over:
            self._rows = [None if other is sample else other for other in self._rows]
            with self._changed:
                self._finished[sample.reason] += 1
        if piece is not None:
            sample.ticket.tell(piece, sample)

    def _lose(self, error: BaseException) -> None:
        """After an error: who waits for what was running is told, and the state begins anew."""
        tickets = [row.ticket for row in self._rows if row is not None]
        with self._changed:
            tickets += [one.ticket for one in self._reading]
            self._reading.clear()
        self._rows = [None] * self.slots
        self._flying.clear()
        self._state = None
        self._prompts.forget()
        for ticket in tickets:
            with contextlib.suppress(Exception):  # of a listener
                ticket.fail(error)


def _cache_sizes(context: int) -> list[int]:
    """Numbers of slots: close together where texts are short, and doubling from there, since each is a program."""
    sizes, size = [], _FEWEST_SLOTS
    while size < context:
        sizes.append(size)
        size += _FEWEST_SLOTS // 2 if size < 4 * _FEWEST_SLOTS else size
    return [*sizes, context]


def _looked_at(answers: Answers, occupants: Sequence[Sample | None]) -> Answers:
    """What somebody waits for: every array that is fetched costs time."""
    tickets = [sample.ticket for sample in occupants if sample is not None]
    trajectory: Any = answers.trajectory if any(ticket.checked.policy >= 0 for ticket in tickets) else None
    scores = answers.scores if any(ticket.request.options.scores for ticket in tickets) else None
    if scores is not None and not any(ticket.request.top for ticket in tickets):
        scores = scores._replace(top=None)
    return answers._replace(trajectory=trajectory, scores=scores)


_counted: collections.Counter[str] = collections.Counter()


def _compilations() -> int:
    """Programs that were compiled in this process since the first call."""
    if not _counted["listening"]:
        _counted["listening"] = 1

        def count(event: str, duration_secs: float, **_: str | int) -> None:
            del duration_secs
            if event == "/jax/core/compile/backend_compile_duration":
                _counted["programs"] += 1

        jax.monitoring.register_event_duration_secs_listener(count)
    return _counted["programs"]
