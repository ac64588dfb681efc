"""Prompts, references and rewards. Knows nothing of models."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

from rlae_jax.errors import InputError
from rlae_jax.tasks import datasets as datasets
from rlae_jax.tasks import embedded
from rlae_jax.tasks import skills as skills
from rlae_jax.tasks.base import Examples as Examples
from rlae_jax.tasks.base import Task as Task
from rlae_jax.tasks.base import joined as joined
from rlae_jax.tasks.jsonl import jsonl as jsonl
from rlae_jax.tasks.rewards import LIKELIHOOD as LIKELIHOOD
from rlae_jax.tasks.rewards import get_reward as get_reward
from rlae_jax.tasks.scoring import RewardPool as RewardPool
from rlae_jax.tasks.scoring import RewardPools as RewardPools

TASKS: dict[str, Callable[..., Task]] = {
    "skills": skills.skills,
    **{name: functools.partial(embedded.embedded, name) for name in embedded.FORMS},
    **{name: functools.partial(datasets.load, name) for name in datasets.BENCHMARKS},
}


def get_task(name: str, **options: Any) -> Task:
    """An embedded task or a benchmark by its name.

    Args:
      options: those of `datasets.load` for a benchmark: data_dir, subset, shots, template, chat, reward, limit. Every
        task has the reward "likelihood", see `Task.by_likelihood`.

    Raises:
      InputError: an unknown name, or an option that the task does not have; what `datasets.load` raises.
    """
    if name not in TASKS:
        raise InputError(f"task {name!r} is unknown; use one of {', '.join(TASKS)}, or a JSON lines or CSV file")
    by_likelihood = options.get("reward") == LIKELIHOOD and name not in datasets.BENCHMARKS
    if by_likelihood:
        del options["reward"]
    known = inspect.signature(TASKS[name]).parameters
    if foreign := [option for option in options if option not in known]:
        has = f"its options are {', '.join(known)}" if known else "it comes with everything, also its reward"
        raise InputError(f"task {name} has no option {foreign[0]!r}; {has}")
    task = TASKS[name](**options)
    return dataclasses.replace(task, by_likelihood=True) if by_likelihood else task
