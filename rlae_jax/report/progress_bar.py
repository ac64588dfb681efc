"""How far a long piece of work is: a bar on a terminal, plain lines elsewhere.

What comes before the first update is mostly compilation. The display says so, and counts it neither in the rate nor in
the time left.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import rich.progress

from rlae_jax.report import terminal

Update = Callable[[int, str], None]
Clock = Callable[[], float]
# (seconds, function): calls the function after so long, from another thread. Returns how to cancel that.
Timer = Callable[[float, Callable[[], None]], Callable[[], None]]

COMPILING = "compiling"
# What an iteration of training is made of, where its metrics say how long it took ("dev_seconds").
_PHASES = ("rollout", "reward", "update", "dev")
# Without a terminal: a line at most this often, and no word of compilation where work is over, or refused, before that.
_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_OF_SILENCE = 5.0


def _start_timer(seconds: float, call: Callable[[], None]) -> Callable[[], None]:
    timer = threading.Timer(seconds, call)
    timer.daemon = True
    timer.start()
    return timer.cancel


@contextlib.contextmanager
def progress(
    description: str, total: int, unit: str, *, clock: Clock = time.monotonic, start_timer: Timer = _start_timer
) -> Iterator[Update]:
    """Shows how far a long piece of work is, with its rate and the time left.

    Yields `update(done, note)`. On a terminal it is a bar; elsewhere plain lines: one while everything is still being
    compiled, then one every ten seconds, and one at the end.

    Args:
      clock: seconds; only differences count.
      start_timer: what delays the line on compilation.
    """
    pace = _Pace(total, clock)
    if terminal.console.is_terminal:
        with _bar(description, unit, pace) as update:
            yield update
        return
    lines = _Lines(description, unit, pace)
    cancel = start_timer(_SECONDS_OF_SILENCE, lines.compiling)
    try:
        yield lines.update
    finally:
        cancel()


@contextlib.contextmanager
def waiting(what: str, *, start_timer: Timer = _start_timer) -> Iterator[None]:
    """Says at a terminal, on standard error, what a command is at where that takes more than a few seconds."""

    def tell() -> None:
        if sys.stderr.isatty():
            print(f"{what} ...", file=sys.stderr, flush=True)

    cancel = start_timer(_SECONDS_OF_SILENCE, tell)
    try:
        yield
    finally:
        cancel()


class _Pace:
    """Rate and time left, both from the first update on: what came before it was compiled as well as done, or, in a run
    that goes on, done by an earlier call."""

    def __init__(self, total: int, clock: Clock):
        self.total, self.done = total, 0
        self._clock, self._began = clock, clock()
        self._first: tuple[int, float] | None = None  # done, and when

    @property
    def elapsed(self) -> float:
        return max(self._clock() - self._began, 1e-9)

    @property
    def begun(self) -> bool:
        """Whether there was an update of something done."""
        return self._first is not None

    def update(self, done: int) -> None:
        self.done = done
        if done > 0 and self._first is None:
            self._first = done, self._clock()

    @property
    def rate(self) -> float | None:
        """Per second; None where a single update says nothing about it."""
        if self._first is None or self.done <= self._first[0]:
            return None
        return (self.done - self._first[0]) / max(self._clock() - self._first[1], 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """None where the rate is unknown, or nothing is left."""
        return None if self.rate is None or self.done >= self.total else (self.total - self.done) / self.rate


@contextlib.contextmanager
def _bar(description: str, unit: str, pace: _Pace) -> Iterator[Update]:
    with rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=24),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[rate]}"),
        rich.progress.TextColumn("{task.fields[left]}", style="progress.remaining"),
        rich.progress.TextColumn("{task.fields[note]}"),
        console=terminal.console,
    ) as bars:
        bar = bars.add_task(description, total=pace.total, rate="", left="", note=COMPILING)

        def update(done: int, note: str = "") -> None:
            pace.update(done)
            rate, left = pace.rate, pace.seconds_left
            bars.update(
                bar,
                completed=done,
                rate="" if rate is None else f"{rate:.3g} {unit}/s",
                left="" if left is None else f"{int(left) // 60}:{int(left) % 60:02d} left",
                note=note if pace.begun else COMPILING,
            )

        yield update


class _Lines:
    """The plain lines. `compiling` may be called from another thread."""

    def __init__(self, description: str, unit: str, pace: _Pace):
        self._description, self._unit, self._pace = description, unit, pace
        self._printed_at, self._printed = 0.0, -1
        self._lock = threading.Lock()

    def compiling(self) -> None:
        with self._lock:
            if not self._pace.begun:
                print(f"{self._description}: {COMPILING}", flush=True)

    def update(self, done: int, note: str = "") -> None:
        with self._lock:
            self._pace.update(done)
            pace, elapsed = self._pace, self._pace.elapsed
            recent = elapsed - self._printed_at < _SECONDS_BETWEEN_LINES
            if done == self._printed or (done < pace.total and recent):
                return
            self._printed_at, self._printed = elapsed, done
            parts = [f"{done}/{pace.total} {self._unit}"]
            if done >= pace.total:
                rate = pace.rate or done / elapsed
                parts += [f"{rate:.3g} {self._unit}/s", f"{elapsed:.1f} s"]
            elif pace.rate is not None:
                parts += [f"{pace.rate:.3g} {self._unit}/s", f"{pace.seconds_left:.0f} s left"]
            print(f"{self._description}: {', '.join(parts)} {note}".rstrip(), flush=True)


@runtime_checkable
class Iteration(Protocol):
    """What a training loop tells of an iteration that is done."""

    @property
    def iteration(self) -> int: ...
    @property
    def metrics(self) -> Mapping[str, Any]: ...
    @property
    def problems(self) -> str: ...


class TrainingDisplay:
    """Shows the reward of each iteration, the newest score on dev and what each phase took last: what a training loop
    calls as `on_progress`."""

    def __init__(self, update: Update):
        self._update = update
        self._dev = ""
        self._phases: dict[str, float] = {}
        self.last: Iteration | None = None  # of this call; None where all had been done before

        self._said = ""

    def say_problems(self) -> None:
        """What went wrong with rewards, in a few lines, unless that was said already."""
        told = "" if self.last is None else self.last.problems
        if told != self._said:
            terminal.say(told)
        self._said = told

    def __call__(self, iteration: Iteration) -> None:
        if self.last is None and iteration.iteration > 1:
            terminal.say(f"going on from iteration {iteration.iteration - 1}")
        self.last = iteration
        metrics = iteration.metrics
        if not self._said:  # the first ones at once; then they are counted
            self.say_problems()
        if "dev" in metrics:
            of = f" of {metrics['dev_prompts']} prompts" if "dev_prompts" in metrics else ""
            self._dev = f", dev {metrics['dev']:.3f}{of}"
        phases = {name: metrics.get(f"{name}_seconds", self._phases.get(name)) for name in _PHASES}
        self._phases = {name: seconds for name, seconds in phases.items() if seconds is not None}
        costs = ", ".join(f"{name} {seconds:.2g} s" for name, seconds in self._phases.items())
        failed = f", {metrics['failed_rewards']:.0f} rewards failed" if metrics.get("failed_rewards") else ""
        note = f"reward {metrics['reward']:.3f}{self._dev}{failed}"
        self._update(iteration.iteration, f"{note} ({costs})" if costs else note)


@contextlib.contextmanager
def training_progress(description: str, iterations: int) -> Iterator[TrainingDisplay]:
    """`progress` of a training loop. Yields what the loop calls after each iteration. However it ends, what went wrong
    with rewards is said."""
    display = None
    try:
        with progress(description, iterations, "iterations") as update:
            display = TrainingDisplay(update)
            yield display
    finally:
        if display is not None:
            display.say_problems()
