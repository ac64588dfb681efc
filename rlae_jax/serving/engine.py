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
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from rlae_jax.errors import InputError, one_line
from rlae_jax.fusion.ensemble import Ensemble
from rlae_jax.fusion.generation import Generation, fewest_tokens, read_row
from rlae_jax.fusion.operators import Hidden
from rlae_jax.fusion.policy import BoundPolicy, Dims, Policy
from rlae_jax.fusion.prompts import Prompts, Row, check_seeds
from rlae_jax.fusion.reading import Text, TextReader, read_prompts
from rlae_jax.fusion.sampling import RowSampling, SamplingOptions
from rlae_jax.fusion.state import Answers, RowOptions
from rlae_jax.fusion.weights import Weights, bind_weights, named_policy, normalise_weights, span_length_of
from rlae_jax.models.cache import Cache
from rlae_jax.serving import programs
from rlae_jax.serving.menu import Menu
from rlae_jax.serving.prefix import PrefixCache

_log = logging.getLogger(__name__)

# Steps between two looks: as many as take about so long, so that what the host does in between is little beside them,
# and what it has to wait for, too.
_LOOK_SECONDS = 0.02
_LEAST_STEPS, _MOST_STEPS = 4, 32
# The smallest cache that a prompt is read into, and how much larger the next ones are; tokens of the smaller one of the
# two programs that read.
_SMALLEST_PROMPT, _PROMPT_GROWTH = 128, 8
_NARROW = 32
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
    top: int = 0
    """With `scores`, tell so many of the likeliest tokens of every step, at most 20."""
    timeout: float | None = None
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
    finish_reason: str | None  # with the last piece: "stop", "length", "timeout" or "cancelled"


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


class Ticket:
    """A submitted request: iterate over its pieces, or wait for its result."""

    def __init__(self, engine: "Engine", request: Request, prompt_tokens: int, deadline: float | None):
        self.request = request
        self.prompt_tokens = prompt_tokens
        self.submitted = time.monotonic()
        self.deadline = deadline
        self.cancelled = False
        self._engine = engine
        self._pieces: list[Piece] = []
        self._samples: dict[int, _Sample] = {}  # that are over
        self._left = request.options.samples
        self._error: BaseException | None = None
        self._listeners: list[Callable[[Piece | None], None]] = []
        self._changed = threading.Condition()

    @property
    def done(self) -> bool:
        """Whether every sample has ended."""
        return self._left == 0 or self._error is not None

    def cancel(self) -> None:
        """Gives the answer up. What is written so far stays; its slots are free within a look."""
        self.cancelled = True
        self._engine._wake()

    def listen(self, call: Callable[[Piece | None], None]) -> None:
        """Has every piece told, from the first on, and None after the last, in the engine's thread: `call` must not
        wait."""
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
        options, ensemble = self.request.options, self._engine.ensemble
        samples = [self._samples[i] for i in range(options.samples)]
        n, k, longest = options.samples, len(ensemble.members), options.max_new_tokens
        most = -(-longest // self._engine._span_length(self.request))
        weights = np.full((n, max(most, *(len(one.decisions) for one in samples)), k), np.nan, np.float32)
        scores = np.full((n, longest), np.nan, np.float32)
        member_scores = np.full((n, longest, k), np.nan, np.float32)
        spans = np.full((n, longest), -1)
        for i, one in enumerate(samples):
            weights[i, : len(one.decisions)] = np.reshape(one.decisions, (-1, k))
            spans[i, : one.steps] = one.spans_at(0, one.steps)
            scores[i, : len(one.scores)] = one.scores
            member_scores[i, : len(one.scores)] = np.reshape(one.member_scores, (-1, k))
        return Generation(
            decoded=[one.given for one in samples] if ensemble.members[0].tokenizer is not None else None,
            tokens=ensemble.codec.first_member_ids([one.tokens[: one.told] for one in samples]),
            chosen=[one.tokens[: one.told] for one in samples],
            spans=spans,
            weights=weights,
            finish_reasons=[one.reason for one in samples],
            steps=[one.steps for one in samples],
            scores=scores if options.scores else None,
            member_scores=member_scores if options.scores else None,
        )

    def _tell(self, piece: Piece) -> None:
        with self._changed:
            self._pieces.append(piece)
            self._left -= piece.finish_reason is not None
            for call in self._listeners:
                call(piece)
            if self._left == 0:
                for call in self._listeners:
                    call(None)
            self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            if self.done:
                return
            self._error = error
            for call in self._listeners:
                call(None)
            self._changed.notify_all()


class _Checked(NamedTuple):
    """A request in the engine's terms."""

    row: Row
    ids: tuple[Sequence[int], ...]  # by member, or one list of all
    options: RowOptions  # numbers
    weights: np.ndarray  # [1, K]
    limit: int
    room: int
    seed: int
    stop: tuple[str, ...]
    stop_ids: frozenset[int]
    text: Text | None


@dataclasses.dataclass(eq=False)
class _Waiting:
    """A request whose prompt is not read, or not wholly, or that has samples without a slot."""

    ticket: Ticket
    checked: _Checked
    caches: list[Cache] = dataclasses.field(default_factory=list)  # by forward pass
    read: list[int] = dataclasses.field(default_factory=list)  # tokens so far
    admitted: int = 0  # samples

    @property
    def left(self) -> int:
        """Tokens to read, of the member with most."""
        return max(len(ids) - 1 - n for ids, n in zip(self.of_passes, self.read, strict=True))

    @property
    def of_passes(self) -> list[Sequence[int]]:
        ids = self.checked.ids
        return [ids[p % len(ids)] for p in range(len(self.read))]


@dataclasses.dataclass(eq=False)
class _Sample:
    """An answer that is being written."""

    ticket: Ticket
    checked: _Checked
    number: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    given: str = ""  # text that was told
    told: int = 0  # tokens that were told
    steps: int = 0
    begun: int = 0  # steps that the device has made, of which some may not be told yet
    decisions: list[np.ndarray] = dataclasses.field(default_factory=list)  # weights
    lengths: list[int] = dataclasses.field(default_factory=list)  # in steps, for which decisions hold
    scores: list[float] = dataclasses.field(default_factory=list)
    member_scores: list[np.ndarray] = dataclasses.field(default_factory=list)
    top: list[dict[int, float]] = dataclasses.field(default_factory=list)
    reason: str = ""  # of its end

    @property
    def over(self) -> bool:
        return bool(self.reason)

    def spans_at(self, start: int, stop: int) -> np.ndarray:
        """[n]: the decisions that were in force at some steps."""
        found = np.searchsorted(np.cumsum(self.lengths), np.arange(start, stop), side="right")
        return np.minimum(found, max(len(self.lengths) - 1, 0))

    def weights_at(self, start: int, stop: int) -> np.ndarray:
        """[n, K]: those in force at some steps."""
        decided = np.reshape(np.asarray(self.decisions, np.float32), (-1, self.checked.weights.shape[1]))
        return decided[self.spans_at(start, stop)] if len(decided) else decided


class _Written(NamedTuple):
    """What some steps wrote for one sample."""

    sample: _Sample
    row: int
    done: bool
    ended: bool


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
      queue: requests that wait at most.

    Raises:
      InputError: members or policies that cannot be served this way.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        *,
        slots: int = 8,
        context: int | None = None,
        policies: Mapping[str, Weights] | None = None,
        default: Sequence[float] | str | None = None,
        chunk: int = 256,
        prefix_bytes: int = 256 * 2**20,
        queue: int = 256,
    ):
        for name, value in {"slots": slots, "chunk": chunk, "queue": queue}.items():
            if value < 1:
                raise InputError(f"{name} must be at least 1, not {value}")
        if ensemble.mesh is not None:
            raise InputError("an engine runs on one device; load its members without a mesh")
        if any(lm.config.encoder is not None for lm in ensemble.members):
            raise InputError("an engine serves decoders; encoder-decoders are not served yet")
        if any(len(lm.adapters) > 1 for lm in ensemble.members):
            raise InputError("a member has several adapters: give each as a member of its own (from_adapters)")
        self.ensemble = ensemble
        self.slots = slots
        self.context = min(ensemble.context, context or min(ensemble.context, 2048))
        if self.context < 2:
            raise InputError(f"context must be at least 2 tokens, not {self.context}")
        self.policies = {name: named_policy(weights) for name, weights in (policies or {}).items()}
        self.default = default
        self._chunk = min(chunk, self.context)
        self._limit = queue
        self._tokenising = threading.Lock()  # fast tokenizers are not for several threads at a time
        self._setup()
        self._prefix = [PrefixCache(prefix_bytes // len(self._passes)) for _ in self._passes]
        self._changed = threading.Condition()
        self._queue: collections.deque[_Waiting] = collections.deque()
        self._reading: list[_Waiting] = []
        self._rows: list[_Sample | None] = [None] * slots
        self._closing = False
        self._step_seconds = _LOOK_SECONDS / _LEAST_STEPS
        self._turn = 0
        self._counts: collections.Counter[str] = collections.Counter()
        self._finished: collections.Counter[str] = collections.Counter()
        self._weights = np.zeros(len(ensemble.members))
        self._compiled = _compilations()
        self._state: Any = None
        if default is not None:
            self._weights_of(default)
        self._thread = threading.Thread(target=self._run, name="rlae-jax engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What programs are made of.

    def _setup(self) -> None:
        ensemble = self.ensemble
        bound: list[tuple[Policy, Any, bool, int]] = []
        readers: list[tuple[TextReader, BoundPolicy]] = []
        dims = Dims(ensemble.widths, 1)
        for name, weights in self.policies.items():
            if not isinstance(weights, BoundPolicy | Policy):
                raise InputError(
                    f"policy {name!r}: expected a policy or a policy's name; give fixed weights with requests"
                )
            if getattr(weights, "draws_members", False):
                raise InputError(f"policy {name!r} runs a member at a time, which an engine does not")
            length = span_length_of(weights, None)
            of_rows = bind_weights(weights, 1, dims, length, fusion=ensemble.fusion, continues=ensemble.continues)
            if getattr(of_rows.policy, "params_per_row", False):
                raise InputError(f"policy {name!r} has parameters of its own for every row")
            longest = max([length, *getattr(of_rows.policy, "span_lengths", ())])
            bound.append((of_rows.policy, of_rows.params, of_rows.sample, longest))
            if "text" in of_rows.policy.reads:
                assert isinstance(weights, BoundPolicy)
                if weights.encoder is None:
                    raise InputError(f"policy {name!r} reads the text and has no encoder; load it with load_policy")
                readers.append((ensemble.reader(weights.encoder), weights))
        if len({id(reader) for reader, _ in readers}) > 1:
            raise InputError("policies that read the text through different encoders cannot be served together")
        self._numbers = {name: i for i, name in enumerate(self.policies)}
        self._reader = readers[0] if readers else None
        menu = None
        if bound:
            # Of how long spans are only that they are chosen; a row's own number says how long.
            menu = Menu(tuple(b[0] for b in bound), tuple(b[2] for b in bound), max(2, *(b[3] for b in bound)))
        self._policy_params = tuple(b[1] for b in bound)
        codec = ensemble.codec
        self._ragged = codec.own_prompts(True)
        spec = ensemble.spec(
            SamplingOptions(max_new_tokens=_MOST_STEPS, scores=True),
            policy=menu,
            sample_weights=menu is not None,
            reader=self._reader[0] if self._reader else None,
        )
        top = min(TOP, spec.vocab)
        self._spec = dataclasses.replace(spec, top=top, union=codec.tables if self._ragged else None)
        self._params = ensemble.params
        configs = [lm.config for lm in ensemble.members]
        shared = ensemble.shared is not None
        self._passes = [(configs[0], len(configs))] if shared else [(config, 1) for config in configs]
        self._sizes = []
        size = _SMALLEST_PROMPT
        while size < self.context:
            self._sizes.append(size)
            size *= _PROMPT_GROWTH
        self._sizes.append(self.context)

    def _empty_state(self) -> Any:
        prompts = self._prompts([[0]] * len(self._spec.members), 1, None)
        rows = jax.tree.map(lambda leaf: np.repeat(leaf, self.slots, axis=0), prompts)
        keys = jax.vmap(jax.random.key)(np.zeros(self.slots, np.uint32))
        rows = rows._replace(keys=keys, active=np.zeros(self.slots, bool))
        return programs.empty_state(self._params, rows, self._spec, self.slots, self.context)

    def _prompts(self, ids: Sequence[Sequence[int]], width: int, text: Text | None) -> Prompts:
        own = ids if self._ragged else ids[:1]
        padded: list[Any] = [np.zeros((1, width), np.int32) for _ in own]
        mask: list[Any] = [np.zeros((1, width), np.int32) for _ in own]
        active: Any = np.ones(1, bool)
        limits: Any = np.ones(1, np.int32)
        for row, real, tokens in zip(padded, mask, own, strict=True):
            row[0, width - len(tokens) :] = tokens
            real[0, width - len(tokens) :] = 1
        if text is None and self._reader is not None:
            text = self._read_text("")
        return Prompts(tuple(padded), tuple(mask), None, active, limits, text=text)

    def _read_text(self, prompt: str) -> Text:
        assert self._reader is not None
        reader, policy = self._reader
        assert policy.encoder is not None
        return read_prompts([prompt], policy.encoder, reader, policy.text_tokens)

    def _widths(self, size: int) -> tuple[int, ...]:
        """Tokens that one program reads into a prompt's cache of this size."""
        wide = min(self._chunk, size)
        return (_NARROW, wide) if wide > _NARROW else (wide,)

    def _slots(self, size: int) -> int:
        return size + self._widths(size)[-1]  # what a chunk fills lies beyond a prompt's end

    def warm_up(self, told: Callable[[int, int], None] | None = None) -> None:
        """Compiles everything, so that no request waits for it.

        Args:
          told: is called with how many of how many prompts of different sizes it has answered.
        """
        sizes = self._sizes
        for i, size in enumerate(sizes):
            length = min(size, self.context - 1)
            rows = [[0] * length] * len(self._spec.members)
            self._warm(rows, size)
            if told is not None:
                told(i + 1, len(sizes))
        with self._changed:
            self._compiled = _compilations()

    def _warm(self, rows: Sequence[Sequence[int]], size: int) -> None:
        """Every program that a prompt's cache of this size takes part in."""
        caches = []
        for (config, members), params in zip(self._passes, self._params, strict=True):
            cache = programs.empty_prompt(config, members, self._slots(size))
            for width in self._widths(size):
                ids = np.zeros((1, width), np.int32)
                cache = programs.read_chunk(params, cache, ids, np.int32(0), np.int32(1), config, members)
            for larger in self._sizes:
                if larger > size:
                    programs.grow(cache, self._slots(larger))
            caches.append(cache)
        state = self._empty_state()
        checked = self._checked_ids(rows)
        state = self._admit_row(state, caches, checked, 0, 0, size)
        jax.block_until_ready(self._advance(state, np.zeros(self.slots, bool), _LEAST_STEPS))

    def _checked_ids(self, rows: Sequence[Sequence[int]]) -> _Checked:
        request = Request(prompt="", options=SamplingOptions(max_new_tokens=1))
        weights = np.full((1, len(self._spec.members)), 1 / len(self._spec.members), np.float32)
        options = self._row_options(request.options, -1, 1, 0)
        return _Checked(rows[0], tuple(rows), options, weights, 1, 1, 0, (), frozenset(), None)

    @property
    def compiles(self) -> int:
        """Programs that were compiled in this process since `warm_up`, or since the engine was made."""
        return _compilations() - self._compiled

    def stats(self) -> Stats:
        """See `Stats`."""
        with self._changed:
            counts, tokens = self._counts, max(self._counts["tokens"], 1)
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
                weights=(self._weights / tokens).astype(np.float32),
            )

    def token_text(self, token: int) -> bytes:
        """The bytes that an id, or an entry of the union, stands for; of special ones their names."""
        piece = self._pieces[token] if token < len(self._pieces) else None
        return self.ensemble.codec.special_tokens.get(token, "").encode() if piece is None else piece

    @functools.cached_property
    def _pieces(self) -> Sequence[bytes | None]:
        return self.ensemble.codec.pieces()

    # In the thread of who asks.

    def submit(self, request: Request) -> Ticket:
        """Takes a request in, at once.

        Raises:
          InputError: what cannot be answered, and why.
          Busy: too many wait already, or the engine is closing.
        """
        with self._tokenising:
            checked = self._check(request)
        deadline = None if request.timeout is None else time.monotonic() + request.timeout
        ticket = Ticket(self, request, len(checked.ids[0]), deadline)
        with self._changed:
            if self._closing:
                raise Busy("the engine is closing")
            if len(self._queue) >= self._limit:
                raise Busy(f"{self._limit} requests are waiting already")
            self._counts["requests"] += 1
            self._queue.append(_Waiting(ticket, checked))
            self._changed.notify_all()
        return ticket

    def room(self, request: Request) -> int:
        """The longest answer for which the context has room beside a request's prompt, and for which its policy was
        trained; at least 1.

        Raises:
          InputError: a prompt that cannot be read.
        """
        with self._tokenising:
            row, _ = self._encode(request)
        longest = self.context - max(self.ensemble.lengths([row]))
        named = self.default if request.weights is None else request.weights
        policy = self.policies.get(named) if isinstance(named, str) else None
        if isinstance(policy, BoundPolicy) and "span" in policy.policy.reads:
            longest = min(longest, policy.dims.spans * policy.span_length)
        return max(longest, 1)

    def _check(self, request: Request) -> _Checked:
        ensemble, options = self.ensemble, request.options
        options.check()
        stop = ensemble._check_stop(options.stop)
        if request.timeout is not None and not request.timeout > 0:
            raise InputError(f"timeout must be positive, not {request.timeout}")
        if not 0 <= request.top <= TOP:
            raise InputError(f"top must be between 0 and {TOP}, not {request.top}")
        row, text = self._encode(request)
        members = len(ensemble.members)
        ids: tuple[Sequence[int], ...] = (row,) if isinstance(row[0], int | np.integer) else tuple(row)
        if self._ragged and len(ids) == 1:
            ids = ids * members
        longest = max(map(len, ids))
        if longest + options.max_new_tokens > self.context:
            raise InputError(
                f"too long: the context is {self.context} tokens, the prompt has {longest} and max_new_tokens is "
                f"{options.max_new_tokens}"
            )
        policy, weights = self._weights_of(self.default if request.weights is None else request.weights)
        length = self._span_length(request)
        if policy >= 0:
            bound = list(self.policies.values())[policy]
            spans = Dims(ensemble.widths, -(-options.max_new_tokens // length))
            bind_weights(bound, 1, spans, options.span_length, fusion=ensemble.fusion, continues=ensemble.continues)
        room = ensemble.codec.room(options.max_new_tokens) if options.member_tokens is None else options.member_tokens
        special = ensemble.codec.special_tokens if stop else {}
        told = (2 if request.top else 1) if options.scores else 0
        return _Checked(
            row=row,
            ids=ids,
            options=self._row_options(options, policy, length, told),
            weights=weights,
            limit=options.max_new_tokens,
            room=min(room, self.context - longest),
            seed=int(check_seeds(options.seed, 1)),
            stop=stop,
            stop_ids=frozenset(i for i, name in special.items() if name in stop),
            text=self._read_text(text) if self._reader is not None else None,
        )

    def _encode(self, request: Request) -> tuple[Row, str]:
        ensemble, chat = self.ensemble, request.options.chat
        if isinstance(request.prompt, str):
            return ensemble.encode([request.prompt], chat=chat)[0], request.prompt
        prompt: list[Any] = list(request.prompt)
        if not prompt:
            raise InputError("the prompt is empty: give at least one token or message")
        if all(isinstance(part, Mapping) for part in prompt):
            row = ensemble.encode_chat(prompt)
            return row, str(prompt[-1].get("content", ""))
        if not all(isinstance(i, int | np.integer) and not isinstance(i, bool) for i in prompt):
            raise InputError("a prompt is a text, a list of ids or a list of messages")
        if ensemble.union is not None:
            raise InputError("the members have different tokenizers: give the prompt as text")
        ids = [int(i) for i in prompt]
        ensemble.codec.check_ids([ids])
        text = ensemble.tokenizer.decode(ids) if self._reader is not None else ""
        return ids, text

    def _weights_of(self, weights: Sequence[float] | str | None) -> tuple[int, np.ndarray]:
        """The number of a policy, -1 without one, and fixed weights [1, K]."""
        k = len(self.ensemble.members)
        uniform = np.full((1, k), 1 / k, np.float32)
        if weights is None:
            return -1, uniform
        if isinstance(weights, str):
            if weights not in self._numbers:
                known = ", ".join(self._numbers) or "none"
                raise InputError(f"policy {weights!r} is unknown here; known: {known}")
            return self._numbers[weights], uniform
        given = isinstance(self.ensemble.fusion, Hidden)
        return -1, np.asarray(normalise_weights(weights, 1, k, given=given), np.float32)

    def _span_length(self, request: Request) -> int:
        named = self.default if request.weights is None else request.weights
        policy = self.policies[named] if isinstance(named, str) and named in self.policies else None
        return span_length_of(policy, request.options.span_length)

    def _row_options(self, options: SamplingOptions, policy: int, length: int, told: int) -> RowOptions:
        def number(value: Any, dtype: Any = np.int32) -> Any:
            return np.asarray([value], dtype)

        return RowOptions(
            sampling=RowSampling(
                temperature=number(options.temperature, np.float32),
                top_k=number(options.top_k),
                top_p=number(options.top_p, np.float32),
                min_p=number(options.min_p, np.float32),
                repetition_penalty=number(options.repetition_penalty, np.float32),
            ),
            min_new_tokens=number(options.min_new_tokens),
            ignore_eos=number(options.ignore_eos, bool),
            told=number(told),
            span_length=number(length),
            policy=number(policy),
            steps=number(0),
            spans=number(0),
        )

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def close(self, wait: bool = True) -> None:
        """Refuses further requests and ends.

        Args:
          wait: for what is taken in already; else it is cancelled.
        """
        with self._changed:
            self._closing = True
            if not wait:
                running = [row.ticket for row in self._rows if row is not None]
                for ticket in (*running, *(one.ticket for one in (*self._queue, *self._reading))):
                    ticket.cancelled = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # In the engine's thread.

    def _run(self) -> None:
        written: list[_Written] = []
        answers: Answers | None = None
        while True:
            with self._changed:
                idle = not (written or any(self._rows) or self._reading)
                if idle:
                    self._changed.wait_for(lambda: self._queue or self._closing)
                    if self._closing and not self._queue:
                        return
            try:
                written, answers = self._look(written, answers)
            except Exception as error:  # whatever the device says: the requests at hand are lost, the engine is not
                _log.exception("the engine lost what was running")
                written, answers = [], None
                self._lose(error)

    def _look(self, written: list[_Written], answers: Answers | None) -> tuple[list[_Written], Answers | None]:
        """Ends, reads, admits, starts the next steps, tells what the last ones wrote, and waits for the next."""
        self._expire()
        self._read_prompts()
        self._admit_ready()
        going = np.array([row is not None for row in self._rows])
        occupants = list(self._rows)
        started, running = time.perf_counter(), None
        if going.any():
            if self._state is None:
                self._state = self._empty_state()
            steps = self._next_steps()
            self._state, running = self._advance(self._state, going, steps)
        if answers is not None:
            self._tell(written, answers)
        if running is None:
            return [], None
        answers = jax.device_get(running)
        found = []
        for row, sample in enumerate(occupants):
            if sample is None or sample.over:
                continue
            sample.begun += int(answers.steps[row])
            done = bool(answers.done[row])
            found.append(_Written(sample, row, done, bool(answers.ended[row])))
            if done and self._rows[row] is sample:
                self._rows[row] = None
        taken = max(int(answers.steps[going].max()), 1)
        self._step_seconds += 0.2 * ((time.perf_counter() - started) / taken - self._step_seconds)
        with self._changed:
            self._counts["steps"] += taken
            self._counts["looks"] += 1
        return found, answers

    def _next_steps(self) -> int:
        steps = int(np.clip(_LOOK_SECONDS / max(self._step_seconds, 1e-6), _LEAST_STEPS, _MOST_STEPS))
        if self._reading or self._queue:  # somebody waits for the row that ends first
            rows = [row for row in self._rows if row is not None]
            steps = min(steps, max(min(row.checked.limit - row.begun for row in rows), _LEAST_STEPS))
        return steps

    def _advance(self, state: Any, going: np.ndarray, steps: int) -> tuple[Any, Answers]:
        found: tuple[Any, Answers] = programs.advance(
            self._params, state, self._policy_params, going, np.int32(steps), self._spec
        )
        return found

    def _expire(self) -> None:
        """Ends what was cancelled or has run out of time."""
        now = time.monotonic()

        def reason(ticket: Ticket) -> str | None:
            if ticket.cancelled:
                return "cancelled"
            return "timeout" if ticket.deadline is not None and now >= ticket.deadline else None

        for row, sample in enumerate(self._rows):
            if sample is not None and (why := reason(sample.ticket)):
                self._rows[row] = None
                self._finish(sample, why)
        with self._changed:
            waiting = [*self._queue, *self._reading]
        for one in waiting:
            if why := reason(one.ticket):
                with self._changed:
                    if one in self._queue:
                        self._queue.remove(one)
                    if one in self._reading:
                        self._reading.remove(one)
                for i in range(one.admitted, one.ticket.request.options.samples):
                    self._finish(_Sample(one.ticket, one.checked, i), why)

    def _read_prompts(self) -> None:
        """Takes in waiting requests and reads a bounded part of their prompts; all of it while nothing else runs."""
        budget = self._chunk
        while True:
            free = sum(row is None for row in self._rows)
            wanted = sum(one.ticket.request.options.samples - one.admitted for one in self._reading)
            with self._changed:
                # One more than there are slots for, so that it need not be read when one is free.
                while self._queue and wanted < max(free, 1):
                    one = self._queue.popleft()
                    self._reading.append(one)
                    wanted += one.ticket.request.options.samples
            for one in self._reading:
                if not one.caches:
                    self._start_reading(one)
            unread = [one for one in self._reading if one.left > 0]
            if not unread or budget <= 0:
                return
            # In turn the first one and the one that is read soonest, so that neither waits for ever.
            self._turn += 1
            budget -= self._read_part(unread[0] if self._turn % 2 else min(unread, key=lambda one: one.left))
            if not any(self._rows) and any(one.left <= 0 for one in self._reading):
                return  # somebody can begin

    def _start_reading(self, one: _Waiting) -> None:
        ids = one.checked.ids
        one.read = [0] * len(self._passes)
        known = 0
        for p, (config, members) in enumerate(self._passes):
            own = ids[p % len(ids)]
            size = self._size(len(own))
            found = self._prefix[p].find(own[:-1])
            if found is None:
                one.caches.append(programs.empty_prompt(config, members, self._slots(size)))
                continue
            n, cache = found
            if cache.slots < self._slots(size):
                cache = programs.grow(cache, self._slots(size))
            one.caches.append(cache)
            one.read[p] = n
            known = n if p == 0 else known
        with self._changed:
            self._counts["prompt_tokens"] += len(ids[0])
            self._counts["cached_tokens"] += known
            self._counts["prefix_hits" if known else "prefix_misses"] += 1

    def _size(self, tokens: int) -> int:
        return next(size for size in self._sizes if size >= tokens)

    def _size_of(self, cache: Cache) -> int:
        return next(size for size in self._sizes if self._slots(size) == cache.slots)

    def _read_part(self, one: _Waiting) -> int:
        """Reads the next tokens of a prompt, and returns how many."""
        most = 0
        for p, ((config, members), params, ids) in enumerate(
            zip(self._passes, self._params, one.of_passes, strict=True)
        ):
            at, cache = one.read[p], one.caches[p]
            left = len(ids) - 1 - at
            if left <= 0:
                continue
            widths = self._widths(self._size_of(cache))
            width = next((w for w in widths if w >= left), widths[-1])
            count = min(width, left)
            chunk = np.zeros((1, width), np.int32)
            chunk[0, :count] = ids[at : at + count]
            one.caches[p] = programs.read_chunk(params, cache, chunk, np.int32(at), np.int32(count), config, members)
            one.read[p] = at + count
            if at + count == len(ids) - 1 or config.recurrent_layers:
                self._prefix[p].keep(ids[: at + count], one.caches[p])
            most = max(most, width)
        return most

    def _admit_ready(self) -> None:
        """Gives free rows to prompts that are read."""
        free = [row for row, sample in enumerate(self._rows) if sample is None]
        for one in list(self._reading):
            if one.left > 0:
                continue
            samples = one.ticket.request.options.samples
            while free and one.admitted < samples:
                row = free.pop(0)
                if self._state is None:
                    self._state = self._empty_state()
                size = max(map(self._size_of, one.caches))
                caches = [
                    cache if cache.slots == self._slots(size) else programs.grow(cache, self._slots(size))
                    for cache in one.caches
                ]
                self._state = self._admit_row(self._state, caches, one.checked, row, one.admitted, size, samples > 1)
                self._rows[row] = _Sample(one.ticket, one.checked, one.admitted)
                one.admitted += 1
            if one.admitted == samples:
                with self._changed:
                    self._reading.remove(one)

    def _admit_row(
        self,
        state: Any,
        caches: list[Cache],
        checked: _Checked,
        row: int,
        sample: int,
        size: int,
        several: bool = False,
    ) -> Any:
        prompts = self._prompts(checked.ids, max(size, 2), checked.text)
        limits: Any = np.array([checked.limit], np.int32)
        return programs.admit(
            self._params,
            state,
            tuple(caches),
            prompts._replace(limits=limits),
            np.int32(row),
            np.uint32(checked.seed),
            np.int32(sample),
            np.bool_(several),
            checked.options,
            checked.weights,
            np.int32(checked.room),
            self._spec,
        )

    def _tell(self, written: list[_Written], answers: Answers) -> None:
        """Turns what some steps wrote into text, and tells it."""
        for sample, row, done, ended in written:
            if sample.over:
                continue
            self._take_in(sample, row, ended, answers)
            self._tell_one(sample, ("stop" if ended else "length") if done else None)

    def _take_in(self, sample: _Sample, row: int, ended: bool, answers: Answers) -> None:
        n = int(answers.steps[row])
        sample.steps += n
        sample.tokens += answers.tokens[row, : n - ended].tolist()
        checked = sample.checked
        length = int(checked.options.span_length[0])
        if int(checked.options.policy[0]) < 0:
            while len(sample.decisions) * length < sample.steps:
                sample.decisions.append(checked.weights[0])
                sample.lengths.append(length)
        else:
            taken = int(answers.decisions[row])
            sample.decisions += list(answers.trajectory.weights[row, :taken])
            lengths = answers.trajectory.length
            sample.lengths += [length] * taken if lengths is None else lengths[row, :taken].tolist()
        if int(checked.options.told[0]) and answers.scores is not None:
            sample.scores += answers.scores.fused[row, :n].tolist()
            sample.member_scores += list(answers.scores.members[row, :n])
            if int(checked.options.told[0]) > 1 and answers.scores.top is not None:
                top, asked = answers.scores.top, sample.ticket.request.top
                for t in range(n):
                    pairs = zip(
                        top.tokens[row, t, :asked].tolist(), top.log_probs[row, t, :asked].tolist(), strict=True
                    )
                    sample.top.append(dict(pairs))
        with self._changed:
            self._counts["tokens"] += n
            self._weights += sample.weights_at(sample.steps - n, sample.steps).sum(axis=0)

    def _tell_one(self, sample: _Sample, reason: str | None) -> None:
        """Tells what a sample gained, and, with a reason, that it is over."""
        checked, codec = sample.checked, self.ensemble.codec
        tokens, row = sample.tokens, checked.row
        special = next((n for n, token in enumerate(tokens) if token in checked.stop_ids), None)
        if special is not None:
            tokens, reason = tokens[:special], "stop"
        kept, text = len(tokens), ""
        if self.ensemble.members[0].tokenizer is not None:
            with self._tokenising:
                whole = codec.decode([row], [tokens])[0]
                cut = "length" if reason in ("timeout", "cancelled") else reason or ""
                text, cut_tokens, why = read_row(codec, row, tokens, whole, cut, checked.stop, reason is None)
                if why == "stop" and reason != "stop":
                    reason = "stop"
                kept = len(cut_tokens)
                if reason is None and checked.stop:
                    kept = len(fewest_tokens(codec, row, tokens, text, sample.told))
        kept = max(kept, sample.told)
        gained, start = text[len(sample.given) :], sample.told
        if not (gained or kept > start or reason):
            return
        sample.given, sample.told = text, kept
        piece = Piece(
            sample=sample.number,
            text=gained,
            tokens=tokens[start:kept],
            weights=sample.weights_at(start, kept),
            scores=np.asarray(sample.scores[start:kept], np.float32) if sample.scores else None,
            member_scores=np.reshape(
                np.asarray(sample.member_scores[start:kept], np.float32), (kept - start, len(self.ensemble.members))
            )
            if sample.scores
            else None,
            top=sample.top[start:kept] if sample.top else None,
            finish_reason=reason,
        )
        if reason is not None:
            sample.reason = reason
            sample.ticket._samples[sample.number] = sample
            for i, other in enumerate(self._rows):
                if other is sample:
                    self._rows[i] = None
            with self._changed:
                self._finished[reason] += 1
        sample.ticket._tell(piece)

    def _finish(self, sample: _Sample, reason: str) -> None:
        """Ends a sample with what it has."""
        if not sample.over:
            self._tell_one(sample, reason)

    def _lose(self, error: BaseException) -> None:
        """After an error: who waits for what was running is told, and the state begins anew."""
        tickets = [row.ticket for row in self._rows if row is not None]
        with self._changed:
            tickets += [one.ticket for one in self._reading]
            self._reading.clear()
        self._rows = [None] * self.slots
        self._state = None
        for prefix in self._prefix:
            prefix.clear()
        for ticket in tickets:
            with contextlib.suppress(Exception):
                ticket._fail(error)


_counted = collections.Counter[str]()


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
