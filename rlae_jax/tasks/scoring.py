"""Rewards of many texts: cheap ones at once, slow ones in processes that may be killed.

`RewardPool` takes prompts, texts and references and gives one number per text. A reward that raises, hangs, ends its
process or gives something else than a number in [0, 1] scores 0; `problems` keeps what happened. Results do not depend
on where a reward runs or on the number of processes, as long as it is a function of its arguments and no limit of time
or memory comes into play.
"""

import collections
import contextlib
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from rlae_jax import hosts
from rlae_jax.errors import SHOWN_PER_KIND, InputError
from rlae_jax.tasks.reward_worker import Reference, UnusableReward, checked
from rlae_jax.tasks.rewards import BatchReward, NamedReward, Reward
from rlae_jax.worker_script import described
from rlae_jax.workers import Limits, Lost, Outcome, Printed

_Told = Callable[[Sequence[str], Sequence[Outcome]], None]
_SHOWN_CHARACTERS = 60


class Problems:
    """What went wrong with a reward, or an objective: how often, and the first few cases.

    Args:
      of: what it is, as messages begin.

    Attributes:
      counts: how often each thing happened.
      shown: (prompt, what happened) of the first five.
      printed: what workers printed meanwhile.
    """

    def __init__(self, of: str = "the reward") -> None:
        self._of = of
        self.counts: collections.Counter[str] = collections.Counter()
        self.shown: list[tuple[str, str]] = []
        self.printed = Printed()

    def add(self, prompt: str, problem: str) -> None:
        # Messages of exceptions differ from text to text; their type does not.
        self.counts[problem.split(":")[0]] += 1
        if len(self.shown) < SHOWN_PER_KIND:
            self.shown.append((prompt, problem))

    def __len__(self) -> int:
        return self.counts.total() + bool(self.printed.size)

    def __str__(self) -> str:
        """At most eight lines, or nothing where nothing went wrong."""
        failed = self._failed() if self.counts else []
        return "\n".join([*failed, f"{self._of}: {self.printed}"] if self.printed.size else failed)

    def _failed(self) -> list[str]:
        kinds = [f"{n} {kind}" for kind, n in self.counts.most_common(SHOWN_PER_KIND)]
        more = ", ..." if len(self.counts) > SHOWN_PER_KIND else ""
        lines = [f"{self._of} failed for {self.counts.total()} answers, which score 0: {', '.join(kinds)}{more}"]
        for prompt, problem in self.shown:
            short = " ".join(prompt.split())
            # Few-shot prompts begin alike; the question is at the end.
            short = short if len(short) <= _SHOWN_CHARACTERS else "..." + short[-_SHOWN_CHARACTERS:]
            lines.append(f"  {short!r}: {problem}")
        return lines


class Pending:
    """Scores that may still be on their way."""

    def __init__(self, prompts: Sequence[str], outcomes: Callable[[], list[Outcome]], told: _Told) -> None:
        self._prompts, self._outcomes, self._told = list(prompts), outcomes, told
        self._scores: Float[np.ndarray, " B"] | None = None

    def result(self) -> Float[np.ndarray, " B"]:
        """The scores, float32, in the order of the texts; waits for them.

        Raises:
          InputError: the reward cannot be loaded in another process.
          RuntimeError: the pool was closed before all was scored.
        """
        if self._scores is None:
            try:
                outcomes = self._outcomes()
            except Lost as error:
                raise InputError(f"the reward cannot be loaded in another process: {error}") from None
            # Told here rather than as they come in, so that their order is that of the texts.
            self._told(self._prompts, outcomes)
            self._scores = np.array([0.0 if problem else value for value, problem in outcomes], np.float32)
        return self._scores


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
        self._open = False
        self._pool = reward.pool(Limits(limit_seconds), workers) if isinstance(reward, NamedReward) else None

    def __enter__(self) -> "RewardPool":
        self._open = True
        if self._pool is not None:
            self._pool.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        if self._pool is not None:
            self._pool.close()

    def submit(self, prompts: Sequence[str], texts: Sequence[str], references: Sequence[Reference]) -> Pending:
        """Begins to score the texts; `result()` of what it returns gives Float[B].

        Raises:
          RuntimeError: outside of the pool's `with` block.
        """
        if not self._open and self._pool is not None:
            raise RuntimeError("a reward pool scores within its `with` block only")
        pairs = list(zip(texts, references, strict=True))
        if self._pool is not None:
            return Pending(prompts, self._pool.submit(pairs).result, self._tell)
        if isinstance(self.reward, BatchReward):
            outcomes = [Outcome(float(score), "") for score in self.reward.many(texts, references)]
        else:
            outcomes = [attempt(lambda *pair: checked(self.reward(*pair)), *pair) for pair in pairs]
        return Pending(prompts, lambda: outcomes, self._tell)

    def _tell(self, prompts: Sequence[str], outcomes: Sequence[Outcome]) -> None:
        for prompt, (_, problem) in zip(prompts, outcomes, strict=True):
            if problem:
                self.problems.add(prompt, problem)
        if self._pool is not None:
            self.problems.printed = self._pool.printed

    def share(
        self, prompts: Sequence[str], texts: Sequence[str], references: Sequence[Reference]
    ) -> Callable[[], Float[np.ndarray, " B"]]:
        """As `submit`, of the same texts on all processes, each of which scores its share. Calling what it returns, on
        all of them in the same order, waits for all scores: what a reward does not decide alike they still share."""
        own = hosts.share(len(texts))
        pending = self.submit(*([column[i] for i in own] for column in (prompts, texts, references)))
        return lambda: hosts.join(pending.result(), own, len(texts))


def attempt(call: Callable[..., float], *arguments: Any) -> Outcome:
    """What a call gives here, without a process of its own, or what happened."""
    try:
        return Outcome(call(*arguments), "")
    except UnusableReward as error:
        return Outcome(None, str(error))
    except Exception as error:
        return Outcome(None, f"raised {described(error)}")


class RewardPools:
    """Scores texts of several tasks, each with its own task's reward; a context manager.

    Args:
      rewards: by the task's name.
    """

    def __init__(self, rewards: Mapping[str, Reward]) -> None:
        self._pools = [RewardPool(reward) for reward in rewards.values()]
        if len(rewards) > 1:
            for name, pool in zip(rewards, self._pools, strict=True):
                pool.problems = Problems(f"the reward of {name}")
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> "RewardPools":
        for pool in self._pools:
            self._opened.enter_context(pool)
        return self

    def __exit__(self, *raised: Any) -> None:
        self._opened.close()

    @property
    def problems(self) -> tuple[int, str]:
        """How much went wrong so far, and what, in a few lines."""
        told = [pool.problems for pool in self._pools]
        return sum(map(len, told)), "\n".join(str(problems) for problems in told if len(problems))

    def submit(
        self,
        which: Int[np.ndarray, " B"],
        prompts: Sequence[str],
        texts: Sequence[str],
        references: Sequence[Reference],
    ) -> Callable[[], Float[np.ndarray, " B"]]:
        """Begins to score texts, text b of task `which[b]`; calling what it returns waits for their scores."""
        places = [np.flatnonzero(which == t).tolist() for t in range(len(self._pools))]
        pending = [
            pool.submit([prompts[i] for i in own], [texts[i] for i in own], [references[i] for i in own])
            for pool, own in zip(self._pools, places, strict=True)
        ]

        def scores() -> Float[np.ndarray, " B"]:
            joined = np.zeros(len(which), np.float32)
            for own, part in zip(places, pending, strict=True):
                joined[own] = part.result()
            return joined

        return scores

    def share(
        self,
        which: Int[np.ndarray, " B"],
        prompts: Sequence[str],
        texts: Sequence[str],
        references: Sequence[Reference],
    ) -> Callable[[], Float[np.ndarray, " B"]]:
        """As `RewardPool.share`, text b of task `which[b]`."""
        own = hosts.share(len(texts))
        pending = self.submit(which[own], *([column[i] for i in own] for column in (prompts, texts, references)))
        return lambda: hosts.join(pending(), own, len(texts))
