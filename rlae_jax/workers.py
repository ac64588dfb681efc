"""Functions of one's own, and of ours that may not come back, called in processes that may be killed.

    calls ─JSON─► guard ─► worker (imports "module:function" or "file.py:function") ─► outcomes, in the calls' order

`Worker` is one such process, `Pool` several with one queue. Nothing is imported here: the processes run
`worker_script.py` with the standard library alone. A call that raises, hangs, ends its process, uses too much memory or
starts too many processes has a problem for an outcome, and the worker is replaced. What is printed never mixes with our
own output. Workers end with this process, however that ends. The limits are against accidents: what is called may still
read and write the user's files.

To call a function of ours under limits, put it into a module that imports the standard library alone (and what else the
function needs), give its file as the source, and values of JSON as arguments:

    worker = Worker(f"{Path(__file__).with_name('templates.py')}:render", limits=Limits(seconds=5.0))
    text, problem = worker.call(template, messages)
"""

import contextlib
import dataclasses
import json
import math
import os
import queue
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlae_jax import worker_script
from rlae_jax.errors import InputError

MEMORY_VARIABLE = "RLAE_JAX_WORKER_GB"
_MOST_WORKERS = 8
_GRACE_SECONDS = 15.0  # until a guard that should have answered counts as lost
_LONGEST_BATCH = 64
_BATCH_SECONDS = 0.01  # a message's calls should take about as long: few messages, and none that others wait for


def _memory() -> int:
    """Bytes that a worker may use: 2 GB, or what the variable says.

    Raises:
      InputError: the variable is no number above 0.
    """
    text = os.environ.get(MEMORY_VARIABLE) or "2"
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = 0.0
    if not 0 < gigabytes < math.inf:
        raise InputError(f"{MEMORY_VARIABLE} is {text!r}; expected a number of gigabytes above 0")
    return int(gigabytes * 1e9)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one worker may use.

    Attributes:
      seconds: of one call.
      start_seconds: of starting and importing.
      memory: bytes of the worker and what it starts; by default 2 GB, or what RLAE_JAX_WORKER_GB says.
      processes: the worker and what it starts, at one time.
      answer: bytes of one call's result as JSON.
    """

    seconds: float = 10.0
    start_seconds: float = 120.0
    memory: int = dataclasses.field(default_factory=_memory)
    processes: int = dataclasses.field(default_factory=lambda: 64 + 2 * (os.cpu_count() or 1))
    answer: int = 64 << 20


class Outcome(NamedTuple):
    """What a call gave, or why it gave nothing: then `problem` is a line, and `value` None."""

    value: Any
    problem: str


class Printed(NamedTuple):
    """What workers printed: how many bytes, and how they begin."""

    size: int = 0
    beginning: str = ""

    def __str__(self) -> str:
        """One line, or nothing."""
        if not self.size:
            return ""
        first = next((line for line in map(str.strip, self.beginning.splitlines()) if line), "")
        shown = "".join(c if c.isprintable() else "?" for c in first[:80])
        return f"it printed {self.size} bytes, which are not kept; they begin: {shown!r}"


class Lost(InputError):
    """The function cannot be loaded, so that nothing can be called."""


class Worker:
    """A process that calls one function; calls may come from any thread, one at a time.

    Args:
      source: "module:function" or "file.py:function". Arguments and result are values of JSON.
      wrapper: as `source`, a function of ours in a module of its own: it is called with the function and the arguments
        in the function's place. An exception whose `says_itself` is true is told in its own words.
      limits: see `Limits`.

    Attributes:
      printed: what the function printed so far.
    """

    def __init__(self, source: str, wrapper: str = "", limits: Limits | None = None) -> None:
        self.source, self.wrapper, self.limits = source, wrapper, limits or Limits()
        self.printed = Printed()
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._end: weakref.finalize[Any, Any] | None = None
        self._closed = False

    def start(self) -> None:
        """Starts the process, unless it is there, and waits until the function is imported.

        Raises:
          Lost: it cannot be; the message says why, in a line that the caller says what for.
        """
        with self._lock:
            self._start()

    def call(self, *arguments: Any) -> Outcome:
        """What the function gives for these arguments.

        Raises:
          Lost: it cannot be imported.
        """
        return self.call_many([arguments])[0]

    def call_many(self, calls: Sequence[Sequence[Any]]) -> list[Outcome]:
        """As `call`, several in one message, one after another, each with the whole limit of time.

        Raises:
          Lost: it cannot be imported, now or any more.
        """
        return self.call_encoded([json.dumps(list(call)).encode() for call in calls])

    def call_encoded(self, calls: Sequence[bytes]) -> list[Outcome]:
        """`call_many` of lists of arguments that are JSON already."""
        with self._lock:
            try:
                return self._exchange(calls)
            except (EOFError, OSError):
                self._forget()
            if len(calls) == 1:
                return [Outcome(None, "closed" if self._closed else "ended the process that watches it")]
        return [outcome for call in calls for outcome in self.call_encoded([call])]

    def close(self) -> None:
        """Ends the process and what it started, whatever they do. May be called from another thread, and again."""
        self._closed = True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # whoever waits for an answer sees the end
        with self._lock:
            self._forget()

    def _exchange(self, calls: Sequence[bytes]) -> list[Outcome]:
        self._start()
        assert self._socket is not None
        self._send(str(len(calls)).encode(), *calls)
        # A worker may have to be started again for each of the calls.
        answer = self._receive(len(calls) * (self.limits.seconds + self.limits.start_seconds))
        self.printed = Printed(*answer["printed"])
        outcomes = [Outcome(*outcome) for outcome in answer["outcomes"]]
        if answer["fault"]:
            self._forget()
            raise Lost(answer["fault"])
        return outcomes

    def _start(self) -> None:
        if self._socket is not None:
            return
        if self._closed:
            raise EOFError
        ours, theirs = socket.socketpair()
        try:
            # A fresh interpreter, not a fork: this process runs JAX, whose threads a fork would not copy. -P keeps the
            # script's directory off the path, -u shows what is printed before the process is killed. A session of its
            # own: Ctrl-C is not for the worker.
            process = subprocess.Popen(
                [sys.executable, "-u", "-P", worker_script.__file__, str(theirs.fileno()), str(os.getpid())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            raise Lost(f"no process can be started ({error})") from None
        finally:
            theirs.close()
        self._socket = ours
        self._end = weakref.finalize(self, _end, process, ours)
        path = [str(Path(part).absolute()) for part in sys.path]
        # A console script's path lacks the directory that it was started in, where the user's own modules are.
        path += [here] if (here := os.getcwd()) not in path else []
        start = {"path": path, "source": self.source, "wrapper": self.wrapper, **dataclasses.asdict(self.limits)}
        try:
            if self._closed:  # by another thread, which saw no process yet
                raise EOFError
            self._send(json.dumps(start).encode())
            fault = self._receive(self.limits.start_seconds)["fault"]
        except (EOFError, OSError):
            fault = "the process that should import it ended"
        if fault:
            self._forget()
            raise Lost(fault)

    def _send(self, *frames: bytes) -> None:
        assert self._socket is not None
        self._socket.settimeout(_GRACE_SECONDS)
        self._socket.sendall(b"".join(map(worker_script.frame, frames)))

    def _receive(self, seconds: float) -> Any:
        end = time.monotonic() + seconds + _GRACE_SECONDS
        return json.loads(self._read(int.from_bytes(self._read(4, end), "big"), end))

    def _read(self, size: int, end: float) -> bytes:
        assert self._socket is not None
        content = bytearray()
        while len(content) < size:
            self._socket.settimeout(max(end - time.monotonic(), 0.001))
            part = self._socket.recv(min(size - len(content), 1 << 20))
            if not part:
                raise EOFError
            content += part
        return bytes(content)

    def _forget(self) -> None:
        self._socket = None
        if self._end is not None:
            self._end()
            self._end = None


def _end(process: "subprocess.Popen[bytes]", ours: socket.socket) -> None:
    """The guard ends with its frames, after all that it has to end."""
    with contextlib.suppress(OSError):
        ours.shutdown(socket.SHUT_RDWR)  # also where a fork of this process still has it open
    ours.close()
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Pending:
    """Outcomes that may still be on their way."""

    def __init__(self, n: int) -> None:
        self._outcomes: list[Outcome] = [Outcome(None, "")] * n
        self._missing = n
        self._error: Exception | None = None
        self._change = threading.Condition()

    def set(self, index: int, outcome: Outcome) -> None:
        """One of them has come."""
        with self._change:
            self._outcomes[index] = outcome
            self._missing -= 1
            self._change.notify_all()

    def fail(self, error: Exception) -> None:
        """Those that are missing will not come."""
        with self._change:
            self._error = error
            self._change.notify_all()

    @property
    def is_done(self) -> bool:
        return not self._missing

    def result(self) -> list[Outcome]:
        """All outcomes, in the calls' order; waits for them.

        Raises:
          Lost: the function cannot be imported any more.
          RuntimeError: the pool was closed before.
        """
        with self._change:
            self._change.wait_for(lambda: not self._missing or self._error is not None)
        if self._missing and self._error is not None:
            raise self._error
        return self._outcomes


class Pool:
    """Several workers with one queue. Batches may be handed in before earlier ones are asked for.

    Args:
      source, wrapper, limits: see `Worker`.
      n: workers; by default as many as there are cores, at most 8.

    The first batch starts the workers, if `start` did not before; they end with `close`, or with this object.
    """

    def __init__(self, source: str, wrapper: str = "", limits: Limits | None = None, n: int | None = None) -> None:
        count = n or min(os.cpu_count() or 1, _MOST_WORKERS)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lanes = [_Lane(Worker(source, wrapper, limits), self._jobs, count) for _ in range(count)]
        self._pending: list[Pending] = []
        self._end = weakref.finalize(self, _end_lanes, self._lanes, self._jobs)

    @property
    def printed(self) -> Printed:
        """What the workers printed so far, the first that did beginning."""
        each = [lane.worker.printed for lane in self._lanes if lane.worker.printed.size]
        return Printed(sum(one.size for one in each), each[0].beginning) if each else Printed()

    def start(self) -> None:
        """Starts all workers, unless they are there, and does not wait for them."""
        for lane in self._lanes:
            if lane.ident is None:
                lane.start()

    def close(self) -> None:
        """Ends all workers, whatever they do; what is still pending fails."""
        self._end()
        for pending in self._pending:
            pending.fail(RuntimeError("the workers were closed before all was done"))

    def submit(self, calls: Sequence[Sequence[Any]]) -> Pending:
        """Begins to make these calls.

        Raises:
          RuntimeError: the pool is closed.
        """
        if not self._end.alive:
            raise RuntimeError("the workers are closed, and take no calls")
        self.start()
        pending = Pending(len(calls))
        for index, call in enumerate(calls):
            self._jobs.put((pending, index, json.dumps(list(call)).encode()))
        self._pending = [one for one in self._pending if not one.is_done] + [pending]
        return pending


# Whose outcome, which of them, and the arguments.
_Job = tuple[Pending, int, bytes]


class _Lane(threading.Thread):
    """A thread that keeps one worker busy."""

    def __init__(self, worker: Worker, jobs: "queue.SimpleQueue[_Job | None]", lanes: int) -> None:
        # A daemon: a pool that nobody closed must not keep the program from ending.
        super().__init__(name="worker", daemon=True)
        self.worker, self._jobs, self._lanes = worker, jobs, lanes
        self.stopped = False

    def run(self) -> None:
        fault: Lost | None = None
        try:
            self.worker.start()
        except (Lost, EOFError) as error:
            fault = error if isinstance(error, Lost) else None
        size = 1
        while (first := self._jobs.get()) is not None and not self.stopped:
            batch = [first]
            while len(batch) < min(size, self._jobs.qsize() // self._lanes + 1):
                try:
                    following = self._jobs.get_nowait()
                except queue.Empty:
                    break
                if following is None:
                    self._jobs.put(None)
                    break
                batch.append(following)
            began = time.monotonic()
            try:
                if fault is not None:
                    raise fault
                outcomes = self.worker.call_encoded([arguments for _, _, arguments in batch])
            except Exception as error:  # whoever waits must not wait for ever
                fault = error if isinstance(error, Lost) else None
                for pending, _, _ in batch:
                    pending.fail(error)
                continue
            if self.stopped:
                break
            for (pending, index, _), outcome in zip(batch, outcomes, strict=True):
                pending.set(index, outcome)
            size = min(2 * size, _LONGEST_BATCH) if time.monotonic() - began < _BATCH_SECONDS else max(size // 2, 1)


def _end_lanes(lanes: Sequence[_Lane], jobs: "queue.SimpleQueue[_Job | None]") -> None:
    for lane in lanes:
        lane.stopped = True
        jobs.put(None)
    for lane in lanes:
        lane.worker.close()
        if lane.is_alive():
            lane.join()


def check(source: str) -> None:
    """Imports the function in a process that ends at once.

    Raises:
      Lost: it cannot be imported, with what is wrong in a line.
    """
    worker = Worker(source)
    try:
        worker.start()
    finally:
        worker.close()
