"""The transfer matrix: agents on tasks that they were not trained on."""

from collections.abc import Mapping, Sequence
from typing import Any

from rlae_jax.errors import InputError
from rlae_jax.evaluation.engine import evaluate
from rlae_jax.evaluation.methods import AnyMethod, Method
from rlae_jax.fusion.ensemble import Ensemble
from rlae_jax.fusion.policy import BoundPolicy
from rlae_jax.tasks import Task


def transfer_matrix(
    agents: Mapping[str, BoundPolicy | Sequence[BoundPolicy]],
    pools: Mapping[str, Ensemble | Sequence[Ensemble]],
    tasks: Mapping[str, Task],
    split: str = "test",
    *,
    limit: int | None = None,
) -> dict[str, Any]:
    """Scores of agents on tasks that they were not trained on, each with the members of the task that it is tested on.

    Args:
      agents: by the name of the task that they were trained on; several are seeds.
      pools: by the name of the task; with several, seed s of an agent is tested on pool s.
      tasks: the columns.

    Returns {"split", "rows", "columns", "scores", "ci95", "per_seed"}; the last three are [row][column].

    Raises:
      InputError: a task without a pool, seeds that do not match, members of other widths than an agent's, unless it is
        a set agent.
    """
    missing = [name for name in tasks if name not in pools]
    if missing:
        raise InputError(f"no members for tasks {', '.join(missing)}; there are some for {', '.join(pools)}")
    columns: dict[str, Any] = {}
    for name, task in tasks.items():
        methods: dict[str, list[AnyMethod]] = {}
        for row, agent in agents.items():
            policies = [agent] if isinstance(agent, BoundPolicy) else list(agent)
            pool = pools[name]
            members = [pool] * len(policies) if isinstance(pool, Ensemble) else list(pool)
            if len(members) != len(policies):
                raise InputError(f"{len(policies)} agents of {row} for {len(members)} sets of members of {name}")
            methods[row] = [Method(m, policy) for m, policy in zip(members, policies, strict=True)]
        columns[name] = evaluate(methods, task, split, limit=limit)["methods"]

    def cells(key: str) -> list[list[Any]]:
        return [[columns[column][row][key] for column in columns] for row in agents]

    return {
        "split": split,
        "rows": list(agents),
        "columns": list(columns),
        "scores": cells("score"),
        "ci95": cells("ci95"),
        "per_seed": cells("per_seed"),
    }
