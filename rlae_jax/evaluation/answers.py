"""Answers of methods to the same prompts, with their scores under every objective and the time that decoding took.

In: methods, examples, a scoring, a way to decode. Out: `Answers`. Prompts are answered in batches of one size; the
first call of a size compiles and is not timed, and what several methods share is written once.
"""

import dataclasses
import itertools
import string
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rlae_jax.evaluation.methods import AnyMethod, Method, Pick, Shuffled, policy_of
from rlae_jax.evaluation.policies import replay
from rlae_jax.tasks import Examples, RewardPool, Task

ROWS = 256  # prompts per call


class Decoding(NamedTuple):
    """How answers are decoded.

    Attributes:
      temperature: 0 is greedy.
      seed: prompt i draws from key(seed + i). None: row b of a batch draws from fold_in(key(0), b).
      rows: prompts per call.
    """

    temperature: float = 0.0
    seed: int | None = None
    rows: int = ROWS


GREEDY = Decoding()


class Scoring(NamedTuple):
    """What answers are measured by.

    Attributes:
      objectives: their names, M of them. An answer's reward is the mean of its scores.
      start: begins to score texts, which may go on beside other work; calling what it returns waits for Float[N, M].
    """

    objectives: tuple[str, ...]
    start: Callable[[Examples, Sequence[str]], Callable[[], Float[np.ndarray, "N M"]]]


def score_by_reward(pool: RewardPool) -> Scoring:
    """A task's reward as the only objective."""

    def start(examples: Examples, texts: Sequence[str]) -> Callable[[], Float[np.ndarray, "N 1"]]:
        scores = pool.share(examples.prompts, texts, examples.references)
        return lambda: scores()[:, None]

    return Scoring(("reward",), start)


class Batch(NamedTuple):
    """Answers to some prompts."""

    texts: list[str]
    finish_reasons: list[str]
    weights: list[Float[np.ndarray, "P K"]]  # of each row's own spans
    tokens: int


@dataclasses.dataclass(frozen=True)
class Answers:
    """A method's answers to all prompts."""

    texts: list[str]
    finish_reasons: list[str]
    weights: list[Float[np.ndarray, "P K"]]  # of each row's own spans; of picked answers who was picked, [1, K]
    scores: Float[np.ndarray, "N M"]
    seconds: float  # of decoding, compilation left out; of a task by likelihood, of reading and compilation
    tokens: int

    @property
    def rewards(self) -> Float[np.ndarray, " N"]:
        """The objectives' mean."""
        means: Float[np.ndarray, " N"] = self.scores.mean(axis=1)
        return means


def answer_batch(
    method: Method,
    task: Task,
    examples: Examples,
    decoding: Decoding = GREEDY,
    start: int = 0,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Batch:
    """One call's answers; of a task by likelihood, the letters of the likeliest options.

    Args:
      start: the first prompt's number, on which its draws depend.
      on_progress: called with the number of prompts that are answered, where that is known before the last is.
    """
    if task.by_likelihood:
        return _likeliest(method, task, examples, on_progress)
    n = len(examples)
    generation = method.ensemble.generate(
        examples.prompts,
        method.weights,
        span_length=method.span_length,
        max_new_tokens=task.max_new_tokens,
        temperature=decoding.temperature,
        seed=0 if decoding.seed is None else list(range(decoding.seed + start, decoding.seed + start + n)),
        stop=task.stop,
        chat=task.chat,
        adapters=None if method.adapters is None else np.tile(method.adapters, (n, 1)),
    )
    weights = [used[~np.isnan(used[:, 0])] for used in generation.weights]
    return Batch(generation.texts, generation.finish_reasons, weights, sum(generation.steps))


def _likeliest(method: Method, task: Task, examples: Examples, on_progress: Callable[[int], None]) -> Batch:
    """The options of the highest log-probability per byte, so that long ones are not at a disadvantage. Such an answer
    counts as one token, and its weights are not kept."""
    assert examples.options is not None
    log_likelihoods = method.ensemble.log_likelihoods(
        *(examples.prompts, examples.options, method.weights, method.span_length),
        chat=task.chat,
        on_progress=on_progress,
    )
    texts = [
        string.ascii_uppercase[np.argmax(row / [len(option.encode()) for option in options])]
        for row, options in zip(log_likelihoods, examples.options, strict=True)
    ]
    none = np.zeros((0, len(method.ensemble.members)), np.float32)
    return Batch(texts, ["likeliest"] * len(texts), [none] * len(texts), len(texts))


class Answerer:
    """Answers of methods to the same prompts, each method's once."""

    def __init__(self, task: Task, examples: Examples, scoring: Scoring, decoding: Decoding = GREEDY) -> None:
        self._task, self._examples, self._scoring, self._decoding = task, examples, scoring, decoding
        self._known: dict[AnyMethod, Answers] = {}

    def answers(self, method: AnyMethod, on_progress: Callable[[int], None] = lambda done: None) -> Answers:
        """A method's answers.

        Args:
          on_progress: called with the number of prompts that were answered.
        """
        if method not in self._known:
            if isinstance(method, Method):
                made = self._written(lambda rows: method, on_progress)
            elif isinstance(method, Shuffled):
                made = self._written(self._shuffled(method.agent), on_progress)
            else:
                made = self._picked(method)
            self._known[method] = made
        on_progress(len(self._examples))
        return self._known[method]

    def _written(self, method_for: Callable[[slice], Method], on_progress: Callable[[int], None]) -> Answers:
        """Answers that an ensemble writes.

        Args:
          method_for: gives the method for a batch of rows.
        """
        examples, size = self._examples, self._decoding.rows
        once = self._task.by_likelihood  # which makes batches of its own, and of which most may be compilation
        size = len(examples) if once else size
        batches: list[Batch] = []
        pending = []
        seconds = 0.0
        compiled: set[int] = set()
        for start in range(0, len(examples), size):
            rows = slice(start, min(start + size, len(examples)))
            method, part = method_for(rows), examples.select(range(rows.start, rows.stop))
            if len(part) not in compiled and not once:
                compiled.add(len(part))
                answer_batch(method, self._task, part, self._decoding, start)
            began = time.perf_counter()
            batch = answer_batch(method, self._task, part, self._decoding, start, on_progress)
            seconds += time.perf_counter() - began
            batches.append(batch)
            pending.append(self._scoring.start(part, batch.texts))
            on_progress(rows.stop)
        return Answers(
            [text for batch in batches for text in batch.texts],
            [reason for batch in batches for reason in batch.finish_reasons],
            [used for batch in batches for used in batch.weights],
            np.concatenate([scores() for scores in pending]),
            seconds,
            sum(batch.tokens for batch in batches),
        )

    def _shuffled(self, agent: Method) -> Callable[[slice], Method]:
        used = self.answers(agent).weights
        spans = max(map(len, used))
        filled = np.stack([np.pad(row, ((0, spans - len(row)), (0, 0)), mode="edge") for row in used])
        filled = filled[np.random.default_rng(0).permutation(len(filled))]
        length = agent.span_length or policy_of(agent).span_length
        return lambda rows: Method(agent.ensemble, replay(agent.ensemble, self._task, filled[rows], length))

    def _picked(self, method: Pick) -> Answers:
        members = [self.answers(one) for one in method.methods]
        votes = (
            np.stack([one.rewards for one in members])
            if method.oracle
            else self._agreement([one.texts for one in members])
        )
        chosen = np.argmax(votes, axis=0)  # the first of the best
        return Answers(
            [members[k].texts[n] for n, k in enumerate(chosen)],
            [members[k].finish_reasons[n] for n, k in enumerate(chosen)],
            [np.eye(len(members))[[k]] for k in chosen],
            np.stack([members[k].scores[n] for n, k in enumerate(chosen)]),
            sum(one.seconds for one in members),
            sum(one.tokens for one in members),
        )

    def _agreement(self, texts: Sequence[Sequence[str]]) -> Int[np.ndarray, "K N"]:
        """How many members' answers say the same as each member's. Two answers are the same if the reward takes the one
        for the other, so that what it takes no notice of makes no difference here either, or if their texts are."""
        stripped = np.array([[text.strip() for text in column] for column in texts])
        same = stripped[:, None] == stripped[None]
        # Another pool: that a reward cannot take an answer as a reference is no problem to be told.
        with RewardPool(self._task.reward) as pool:
            pairs = list(itertools.permutations(range(len(texts)), 2))
            pending = [pool.share(self._examples.prompts, texts[i], texts[j]) for i, j in pairs]
            for (i, j), scores in zip(pairs, pending, strict=True):
                same[i, j] |= scores() == 1
        votes: Int[np.ndarray, "K N"] = (same | same.swapaxes(0, 1)).sum(axis=1)
        return votes
