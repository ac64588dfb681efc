"""A server in a thread, around an engine that needs no model: for tests of what happens between sockets and the engine.

The fake engine has `Engine`'s interface. A prompt is its UTF-8 bytes; the answer to it is the letters after its last
byte, in order, so that everybody can tell what is right.
"""

import contextlib
import threading
import time
from types import SimpleNamespace

import numpy as np

from rlae_jax.errors import InputError
from rlae_jax.fusion.operators import linear
from rlae_jax.serving.api import Catalogue
from rlae_jax.serving.app import make_app
from rlae_jax.serving.requests import Busy, Failed, Piece, Stats
from rlae_jax.serving.server import Server, listen

MEMBERS = ("left", "right")
SPAN = 4
AGENT = "agent"


def answer(prompt, n, sample=0):
    """What the fake engine writes."""
    start = prompt_bytes(prompt)[-1] + 1 + sample
    return "".join(chr(97 + (start + i) % 26) for i in range(n))


def prompt_bytes(prompt):
    if isinstance(prompt, str):
        return prompt.encode()
    if isinstance(prompt[0], dict):
        return "\n".join(message["content"] for message in prompt).encode()
    return bytes(prompt)


def score(token):
    """log p of a token wherever it stands, and under each member."""
    return -(token % 7) / 8, [-(token % 5) / 4, -(token % 3) / 2 if token % 11 else -np.inf]


class FakeTicket:
    def __init__(self, engine, request):
        self.engine, self.request = engine, request
        self.prompt_tokens = len(prompt_bytes(request.prompt))
        self.written, self.ended = 0, threading.Event()
        self.cancelled, self.failed = False, False
        self.calls, self.pieces, self.lock = [], [], threading.Lock()

    def cancel(self):
        self.cancelled = True
        self.engine.wake()

    def listen(self, call):
        with self.lock:
            for piece in self.pieces:
                call(piece)
            if self.ended.is_set():
                call(None)
            self.calls.append(call)

    def result(self, timeout=None):
        if self.failed:
            raise Failed("the device is on fire")

    def tell(self, piece):
        with self.lock:
            self.pieces.append(piece)
            for call in self.calls:
                call(piece)

    def step(self):
        """One more token of every sample; False after the last."""
        request, options = self.request, self.request.options
        if self.cancelled or "fail" in str(request.prompt):
            self.failed = not self.cancelled
            self.end("cancelled" if self.cancelled else None)
            return False
        last = self.written + 1 == options.max_new_tokens
        for sample in range(options.samples):
            token = ord(answer(request.prompt, self.written + 1, sample)[-1])
            fused, members = score(token)
            self.tell(
                Piece(
                    sample,
                    chr(token),
                    [token],
                    np.array([weights_at(request.weights, self.written)], np.float32),
                    np.array([fused], np.float32) if options.scores else None,
                    np.array([members], np.float32) if options.scores else None,
                    [{token + i: fused - i for i in range(request.top)}] if request.top else None,
                    "length" if last else None,
                )
            )
        self.written += 1
        if last:
            self.end(None)
        return not last

    def end(self, reason):
        if reason is not None:
            empty = np.zeros((0, len(MEMBERS)), np.float32)
            for sample in range(self.request.options.samples):
                self.tell(Piece(sample, "", [], empty, None, None, None, reason))
        with self.lock:
            self.ended.set()
            for call in self.calls:
                call(None)


def weights_at(weights, step):
    """In force at a step: the agent changes its mind from span to span."""
    if weights is None:
        return [0.5, 0.5]
    if weights == AGENT:
        return [0.25, 0.75] if step // SPAN % 2 else [0.75, 0.25]
    return np.asarray(weights) / np.sum(weights)


class FakeEngine:
    """See the module's text. `allowed` limits the steps that it goes, so that tests say when; None is no limit."""

    def __init__(self, *, slots=4, queue=8, context=512, allowed=None):
        self.slots, self.limit, self.context, self.allowed = slots, queue, context, allowed
        self.policies = (AGENT,)
        self.ensemble = SimpleNamespace(
            members=[
                SimpleNamespace(name=n, tokenizer=SimpleNamespace(chat_template="{{ messages }}")) for n in MEMBERS
            ],
            tokenizer=None,
            fusion=linear,
            union=None,
            split_text=lambda text: (list(text.encode()[:1]), list(text.encode()[1:])),
            score_tokens=self.score_tokens,
        )
        self.changed = threading.Condition()
        self.waiting, self.running, self.tickets = [], [], []
        self.closing = False
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def submit(self, request):
        length, longest = len(prompt_bytes(request.prompt)), request.options.max_new_tokens
        if not length:
            raise InputError("prompts without a single token")
        if length + longest > self.context:
            raise InputError(f"too long: the context is {self.context} tokens, and max_new_tokens {longest}")
        with self.changed:
            if len(self.waiting) >= self.limit:
                raise Busy(f"{self.limit} requests are waiting already")
            ticket = FakeTicket(self, request)
            self.waiting.append(ticket)
            self.tickets.append(ticket)
            self.changed.notify_all()
        return ticket

    def weights_of(self, request):
        return None if request.weights == AGENT else request.weights

    def longest(self, request):
        return 64 if request.weights == AGENT else self.context

    def room(self, request):
        return max(self.context - len(prompt_bytes(request.prompt)), 1)

    def token_text(self, token):
        return bytes([token])

    def score_tokens(self, rows, tokens, weights=None, span_length=None, *, top=0):
        found = []
        for row in tokens:
            fused = np.array([score(token)[0] for token in row], np.float32)
            best = np.array([[token + i for i in range(top)] for token in row], np.int32).reshape(len(row), top)
            scores = fused[:, None] - np.arange(top, dtype=np.float32)
            found.append(SimpleNamespace(fused=fused, top_tokens=best, top=scores))
        return found

    def stats(self):
        with self.changed:
            known = {
                "waiting": len(self.waiting),
                "slots_in_use": len(self.running),
                "finished": {"length": sum(ticket.ended.is_set() for ticket in self.tickets)},
                "prompt_tokens": sum(ticket.prompt_tokens for ticket in self.tickets),
                "prefix_hits": 1,
                "tokens": sum(ticket.written for ticket in self.tickets),
                "weights": np.array([0.5, 0.5], np.float32),
            }
            return Stats(**dict.fromkeys(Stats._fields, 0) | known)

    def allow(self, steps):
        with self.changed:
            self.allowed += steps
            self.changed.notify_all()

    def wake(self):
        with self.changed:
            self.changed.notify_all()

    def run(self):
        while True:
            with self.changed:
                self.changed.wait_for(self.can_go)
                if self.closing:
                    return
                while self.waiting and len(self.running) < self.slots:
                    self.running.append(self.waiting.pop(0))
                going = [t for t in self.running if self.allowed != 0 or t.cancelled]
                if self.allowed:
                    self.allowed -= 1
            over = [ticket for ticket in going if not ticket.step()]
            with self.changed:
                self.running = [ticket for ticket in self.running if ticket not in over]

    def can_go(self):
        there = self.running or self.waiting
        free = self.waiting and len(self.running) < self.slots
        return self.closing or free or any(t.cancelled for t in self.running) or (there and self.allowed != 0)

    def close(self, wait=True):
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        self.thread.join()


def make_catalogue(engine):
    return Catalogue.create(engine, name="both", fusion="linear", policies={AGENT: None}, created=1)


@contextlib.contextmanager
def serving(engine, catalogue=None, **options):
    """A server around an engine -> (its address, the server, its thread)."""
    bound, ready = listen("127.0.0.1", 0), threading.Event()
    server = Server(make_app(engine, catalogue or make_catalogue(engine), **options), ready.set)
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    try:
        assert ready.wait(30)
        yield f"http://127.0.0.1:{bound.getsockname()[1]}", server, thread
    finally:
        server.should_exit = server.force_exit = True
        thread.join(30)
        engine.close()
    assert not thread.is_alive()


def eventually(condition, seconds=10):
    """Waits for what other threads do."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
