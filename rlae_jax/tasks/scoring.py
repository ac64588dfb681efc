"""Rewards of many texts: cheap ones at once, slow ones in processes that may be killed.

`RewardPool` takes prompts, texts and references and gives one number per text. A reward that raises, hangs, ends its
process or gives something else than a number in [0, 1] scores 0; `problems` keeps what happened. Results do not depend
on where a reward runs or on the number of processes, as long as it is a function of its arguments and no time limit
comes into play.
"""

import collections
import json
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType

import numpy as np
from jaxtyping import Float

from rlae_jax import hosts
from rlae_jax.errors import SHOWN_PER_KIND, InputError
from rlae_jax.tasks import reward_worker
from rlae_jax.tasks.reward_worker import Reference, attempt
from rlae_jax.tasks.rewards import BatchReward, NamedReward, Reward

# Importing the user's module may take long, and is not the fault of the first text.
_START_SECONDS = 120.0
_MOST_WORKERS = 8
_SHOWN_CHARACTERS = 60


class Problems:
    """What went wrong with rewards: how often, and the first few cases.

    Attributes:
      counts: how often each thing happened.
      shown: (prompt, what happened) of the first five.
    """

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.shown: list[tuple[str, str]] = []

    def add(self, prompt: str, problem: str) -> None:
        # Messages of exceptions differ from text to text; their type does not.
        self.counts[problem.split(":")[0]] += 1
        if len(self.shown) < SHOWN_PER_KIND:
            self.shown.append((prompt, problem))

    def __len__(self) -> int:
        return self.counts.total()

    def __str__(self) -> str:
        """At most seven lines, or nothing where nothing went wrong."""
        if not self.counts:
            return ""
        kinds = [f"{n} {kind}" for kind, n in self.counts.most_common(SHOWN_PER_KIND)]
        more = ", ..." if len(self.counts) > SHOWN_PER_KIND else ""
        lines = [f"the reward failed for {len(self)} answers, which score 0: {', '.join(kinds)}{more}"]
        for prompt, problem in self.shown:
            short = " ".join(prompt.split())
            # Few-shot prompts begin alike; the question is at the end.
            short = short if len(short) <= _SHOWN_CHARACTERS else "..." + short[-_SHOWN_CHARACTERS:]
            lines.append(f"  {short!r}: {problem}")
        return "\n".join(lines)


class Pending:
    """Scores that may still be on their way."""

    def __init__(self, prompts: Sequence[str], problems: Problems) -> None:
        self._prompts = list(prompts)
        self._outcomes: list[tuple[float, str]] = [(0.0, "")] * len(prompts)
        self._problems: Problems | None = problems
        self._missing = len(prompts)
        self._error: Exception | None = None
        self._change = threading.Condition()

    def set(self, index: int, outcome: tuple[float, str]) -> None:
        with self._change:
            self._outcomes[index] = outcome
            self._missing -= 1
            self._change.notify_all()

    def fail(self, error: Exception) -> None:
        with self._change:
            self._error = error
            self._change.notify_all()

    def result(self) -> Float[np.ndarray, " B"]:
        """The scores, float32, in the order of the texts; waits for them.

        Raises:
          InputError: the reward cannot be loaded in another process.
          RuntimeError: the pool was closed before all was scored.
        """
        with self._change:
            self._change.wait_for(lambda: not self._missing or self._error is not None)
        if self._missing and self._error is not None:
            raise self._error
        # Told here rather than as they come in, so that their order is that of the texts.
        if self._problems is not None:
            for prompt, (_, problem) in zip(self._prompts, self._outcomes, strict=True):
                if problem:
                    self._problems.add(prompt, problem)
            self._problems = None
        return np.array([score for score, _ in self._outcomes], np.float32)


class RewardPool:
    """Scores texts with one reward; a context manager.

    A `NamedReward` (math equivalence, the user's functions) runs in `workers` processes, one text at a time each. They
    start with the pool, import what the reward needs and nothing of JAX, and end with it, also where this process is
    killed. Every other reward is a quick function and is called at once, here.

    Args:
      reward: a task's.
      limit_seconds: for one text. A process that takes longer is killed and replaced, and the text scores 0.
      workers: processes; by default as many as there are cores, at most 8.

    Attributes:
      problems: what happened so far to texts whose `result` was asked for.
    """

    def __init__(self, reward: Reward, *, limit_seconds: float = 10.0, workers: int | None = None) -> None:
        if not limit_seconds > 0:
            raise InputError(f"the time limit of a reward must be above 0 seconds, not {limit_seconds}")
        if workers is not None and workers < 1:
            raise InputError(f"a reward needs at least 1 worker, not {workers}")
        self.reward = reward
        self.limit_seconds = limit_seconds
        self.problems = Problems()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed = False
        self._pending: list[Pending] = []
        self._lanes: list[_Lane] = []
        if isinstance(reward, NamedReward):
            n = workers or min(os.cpu_count() or 1, _MOST_WORKERS)
            self._lanes = [_Lane(reward.source, limit_seconds, self._jobs) for _ in range(n)]

    def __enter__(self) -> "RewardPool":
        for lane in self._lanes:
            lane.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        for lane in self._lanes:
            lane.close()
            self._jobs.put(None)
        for lane in self._lanes:
            lane.join()
        for pending in self._pending:
            pending.fail(RuntimeError("the reward pool was closed before all texts were scored"))

    def submit(self, prompts: Sequence[str], texts: Sequence[str], references: Sequence[Reference]) -> Pending:
        """Begins to score the texts; `result()` of what it returns gives Float[B].

        Raises:
          RuntimeError: outside of the pool's `with` block.
        """
        if self._closed or (self._lanes and not self._lanes[0].is_alive()):
            raise RuntimeError("a reward pool scores within its `with` block only")
        pending = Pending(prompts, self.problems)
        if isinstance(self.reward, BatchReward):
            for index, score in enumerate(self.reward.many(texts, references)):
                pending.set(index, (float(score), ""))
            return pending
        for index, (text, reference) in enumerate(zip(texts, references, strict=True)):
            if self._lanes:
                self._jobs.put((pending, index, json.dumps([text, reference]).encode()))
            else:
                pending.set(index, attempt(self.reward, text, reference))
        self._pending = [one for one in self._pending if one._missing] + [pending]
        return pending

    def share(
        self, prompts: Sequence[str], texts: Sequence[str], references: Sequence[Reference]
    ) -> Callable[[], Float[np.ndarray, " B"]]:
        """As `submit`, of the same texts on all processes, each of which scores its share. Calling what it returns, on
        all of them in the same order, waits for all scores: what a reward does not decide alike they still share."""
        own = hosts.share(len(texts))
        pending = self.submit(*([column[i] for i in own] for column in (prompts, texts, references)))
        return lambda: hosts.join(pending.result(), own, len(texts))


# Whose score, which of them, and the message to the worker.
_Job = tuple[Pending, int, bytes]


class _Lane(threading.Thread):
    """A thread with one worker process, which it replaces whenever a text breaks it."""

    def __init__(self, source: str, limit_seconds: float, jobs: "queue.SimpleQueue[_Job | None]") -> None:
        # A daemon: a pool that nobody closed must not keep the program from ending.
        super().__init__(name="reward", daemon=True)
        self._source, self._limit, self._jobs = source, limit_seconds, jobs
        self._lock = threading.Lock()
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._fault = ""

    def run(self) -> None:
        self._start()
        while (job := self._jobs.get()) is not None and not self._closed:
            pending, index, message = job
            if self._process is None and not self._fault:
                self._start()
            if self._fault:
                pending.fail(InputError(f"reward {self._source!r} cannot be loaded in another process: {self._fault}"))
                continue
            outcome = self._score(message)
            if self._closed:
                break
            pending.set(index, outcome)
        self._end()

    def close(self) -> None:
        """Kills the worker, whatever it does; `run` then ends by itself. Called from another thread."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                _kill(self._process)

    def _start(self) -> None:
        ours, theirs = multiprocessing.Pipe()
        try:
            with self._lock:
                if self._closed:
                    return
                # A fresh interpreter, not a fork: this process runs JAX, whose threads a fork would not copy. -P keeps
                # the script's directory off the path, where `datasets` would hide the library. What the user's code
                # prints (-u: also what it prints before it is killed) must not mix with a command's own output. A
                # session of its own: Ctrl-C is not for the worker, and what it has started is killed with it.
                self._process = subprocess.Popen(
                    [sys.executable, "-u", "-P", reward_worker.__file__, str(theirs.fileno())],
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=2,
                    start_new_session=True,
                )
        except OSError as error:
            self._fault = f"no process can be started ({error})"
            ours.close()
            return
        finally:
            theirs.close()
        self._pipe = ours
        path = [str(Path(part).absolute()) for part in sys.path]
        start = {"path": path, "source": self._source, "limit": self._limit}
        fault = "it took too long"
        try:
            ours.send_bytes(json.dumps(start).encode())
            if ours.poll(_START_SECONDS):
                fault = json.loads(ours.recv_bytes())
        except (EOFError, OSError):
            fault = f"the process {self._how_it_ended()}"
        self._fault = fault
        if fault:
            self._end()

    def _score(self, message: bytes) -> tuple[float, str]:
        assert self._pipe is not None
        try:
            self._pipe.send_bytes(message)
            if self._pipe.poll(self._limit):
                score, problem = json.loads(self._pipe.recv_bytes())
                return score, problem
            problem = f"took longer than {self._limit:g} s"
        except (EOFError, OSError):
            problem = f"ended its process ({self._how_it_ended()})"
        self._end()
        return 0.0, problem

    def _how_it_ended(self) -> str:
        assert self._process is not None
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "closed its pipe"
        return f"exit status {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"

    def _end(self) -> None:
        with self._lock:
            process, self._process = self._process, None
            if process is not None:
                _kill(process)
                process.wait()
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Kills a worker and what it has started. Its id is its group's, and stays its own until it is waited for."""
    if process.returncode is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            process.kill()
