"""A span-level RLAE agent over fused adapters: weights for every span in place of one vector for all.

In: adapters of one base, prompts, objectives. Out: a policy for `Ensemble.generate`. Its reward is the mean of the
objectives, its observation what the adapters' last hidden states are; everything else is `rlae_jax.ppo`'s.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlae_jax import report
from rlae_jax.config import PPOConfig
from rlae_jax.emorl.fused import Fused
from rlae_jax.emorl.run import Run
from rlae_jax.emorl.scorers import Objective
from rlae_jax.errors import InputError
from rlae_jax.fusion.policy import BoundPolicy
from rlae_jax.ppo.train import TrainProgress, train
from rlae_jax.tasks import Examples, Task
from rlae_jax.tasks.prompts import PromptSet


@dataclasses.dataclass(frozen=True)
class MeanScore:
    """A reward: the objectives' mean. The reference of an answer is its prompt."""

    objectives: tuple[Objective, ...]

    def __call__(self, text: str, reference: Any) -> float:
        """One text's reward."""
        return float(self.many([text], [reference])[0])

    def many(self, texts: Sequence[str], references: Sequence[Any]) -> Any:
        """Many texts' rewards, of which models read batches."""
        scores = [(one(references, texts) - one.low) / (one.high - one.low) for one in self.objectives]
        return np.mean(scores, axis=0)


def objectives_task(
    prompts: PromptSet, objectives: Sequence[Objective], *, max_new_tokens: int, span_length: int = 4
) -> Task:
    """The prompts as a task whose reward is the objectives' mean."""
    splits = {split: Examples(list(rows), list(rows)) for split, rows in prompts.splits.items()}
    reward = MeanScore(tuple(objectives))
    return Task(prompts.name, splits, reward, max_new_tokens=max_new_tokens, span_length=span_length)


def train_agent(
    fused: Fused,
    prompts: PromptSet,
    objectives: Sequence[Objective],
    config: PPOConfig,
    out: str | os.PathLike[str],
    *,
    max_new_tokens: int,
    span_length: int,
    resume: bool = False,
    on_progress: Callable[[TrainProgress], None] = lambda progress: None,
) -> BoundPolicy:
    """Trains an agent that weighs the adapters anew for every span.

    Raises:
      InputError: mode params, whose weights are part of what reads the prompt; what `train` raises.
    """
    if fused.mode == "params":
        raise InputError(
            "an agent sets weights while an answer is written: mode hidden, probs or loglinear, not params"
        )
    task = objectives_task(prompts, objectives, max_new_tokens=max_new_tokens, span_length=span_length)
    return train(fused.ensemble, task, config, out, resume=resume, on_progress=on_progress)


def train_run_agent(
    run: Run,
    fused: Fused,
    objectives: Sequence[Objective],
    out: str | os.PathLike[str],
    *,
    iterations: int,
    span_length: int,
    seed: int,
    resume: bool = False,
) -> BoundPolicy:
    """`train_agent` on a run's prompts, with small rollouts, and with its progress shown.

    Raises:
      InputError: what `train_agent` raises.
    """
    config = PPOConfig(iterations=iterations, prompts=128, eval_prompts=64, seed=seed)
    with report.training_progress("training an agent", iterations) as display:
        return train_agent(
            *(fused, run.prompts, objectives, config, out),
            max_new_tokens=run.config.settings.max_new_tokens,
            span_length=span_length,
            resume=resume,
            on_progress=display,
        )
