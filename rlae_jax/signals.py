"""Ctrl-C and SIGTERM, at any moment.

While a command is being imported nothing is to be kept, and it ends at once (`end_at_once`). Then they are exceptions
(`as_exceptions`), so that whatever is half done is taken back on the way out; what must not be taken back, as it takes
longer than the rest, is done first (`delayed`). Training is asked to stop, and does so after an iteration
(`stop_requests`). Python hears of a signal between two of its own instructions: a program that is being compiled or
running is ended first, which takes seconds.

Imported before everything else, so that it needs nothing but the standard library.
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from rlae_jax.errors import Interrupted, Preempted

STOPPED, RUN_AGAIN = 130, 75  # exit statuses: by Ctrl-C; by SIGTERM, for schedulers that start such a command again

Handler = Callable[[int, FrameType | None], None]


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""

    def __str__(self) -> str:
        return "stopped by SIGTERM"


@contextlib.contextmanager
def _handled(handlers: dict[int, Handler]) -> Iterator[None]:
    """Answers signals in this way meanwhile. Only a main thread hears them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous: dict[int, Any] = {}
    try:
        for number, handler in handlers.items():
            previous[number] = signal.signal(number, handler)
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def end_at_once() -> None:
    """From now on a signal ends the process, with a line and a status; while Python itself ends, it does nothing."""

    def end(number: int, frame: FrameType | None) -> None:
        line, status = (b"stopped by SIGTERM\n", RUN_AGAIN) if number == signal.SIGTERM else (b"stopped\n", STOPPED)
        with contextlib.suppress(OSError):
            os.write(2, line)
        os._exit(status)

    answered = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    for number in answered:
        signal.signal(number, end)
    # Registered first, so called last. Python would give signals back to the system, which kills.
    atexit.register(lambda: [signal.signal(number, signal.SIG_IGN) for number in answered])


@contextlib.contextmanager
def as_exceptions() -> Iterator[None]:
    """Meanwhile Ctrl-C raises `KeyboardInterrupt`, as always, and SIGTERM `Terminated`, once: whoever sends it to a
    process and its group means one."""
    terminated = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    def terminate(number: int, frame: FrameType | None) -> None:
        nonlocal terminated
        if not terminated:
            terminated = True
            raise Terminated

    def unraisable(told: "sys.UnraisableHookArgs") -> None:
        """What was raised where Python cannot raise anything (a destructor) comes again, elsewhere."""
        nonlocal terminated
        if not isinstance(told.exc_value, KeyboardInterrupt):
            before(told)
            return
        terminated = False
        number = signal.SIGTERM if isinstance(told.exc_value, Terminated) else signal.SIGINT
        threading.Timer(0.01, os.kill, (os.getpid(), number)).start()

    before, sys.unraisablehook = sys.unraisablehook, unraisable
    try:
        with _handled({signal.SIGINT: interrupt, signal.SIGTERM: terminate}):
            yield
    finally:
        sys.unraisablehook = before


@contextlib.contextmanager
def delayed() -> Iterator[None]:
    """Signals that come meanwhile are heard at the end."""
    came: list[int] = []
    with _handled(dict.fromkeys((signal.SIGINT, signal.SIGTERM), lambda number, frame: came.append(number))):
        yield
    for number in dict.fromkeys(came):
        signal.raise_signal(number)


# Asked between iterations, by all processes at the same ones: what to raise after saving, if one is to stop.
StopRequested = Callable[[], type[Interrupted] | None]


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequested]:
    """Turns Ctrl-C, SIGTERM and preemption notices into requests that are answered between iterations, by all processes
    after the same one. A second Ctrl-C interrupts at once."""
    from rlae_jax import hosts

    interrupted = preempted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True
        sys.stderr.write("\nstopping after this iteration; once more stops at once\n")

    def preempt(number: int, frame: FrameType | None) -> None:
        nonlocal preempted
        if not preempted:
            sys.stderr.write("\nSIGTERM: stopping after this iteration\n")
        preempted = True

    def requested() -> type[Interrupted] | None:
        told = hosts.gather([interrupted, preempted])
        if hosts.preempted() or any(of_host[1] for of_host in told):
            return Preempted
        return Interrupted if any(of_host[0] for of_host in told) else None

    with _handled({signal.SIGINT: interrupt, signal.SIGTERM: preempt}):
        yield requested
