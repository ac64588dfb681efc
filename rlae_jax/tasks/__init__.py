"""Prompts, references and rewards. Knows nothing of models."""

from rlae_jax.errors import InputError
from rlae_jax.tasks import skills as skills
from rlae_jax.tasks.base import Examples as Examples
from rlae_jax.tasks.base import Task as Task
from rlae_jax.tasks.jsonl import jsonl as jsonl

TASKS = {"skills": skills.skills}


def get_task(name: str) -> Task:
    """An embedded task by its name.

    Raises:
      InputError: an unknown name.
    """
    if name not in TASKS:
        raise InputError(f"task {name!r} is unknown; use one of {', '.join(TASKS)}, or a JSON lines file")
    return TASKS[name]()
