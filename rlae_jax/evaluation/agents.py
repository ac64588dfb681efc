"""Trained agents as methods: from the directories of their runs, and the router, which is trained to be compared."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rlae_jax import report
from rlae_jax.config import PPOConfig
from rlae_jax.evaluation.methods import Method
from rlae_jax.evaluation.policies import span_count
from rlae_jax.fusion.ensemble import Ensemble
from rlae_jax.fusion.policy import BoundPolicy
from rlae_jax.ppo.given import with_room_for_options
from rlae_jax.ppo.train import check_members, load_policy, read_run, train_seeds
from rlae_jax.runs.metrics import read_metrics
from rlae_jax.tasks import Task


def load_agents(ensemble: Ensemble, task: Task, runs: Sequence[Path]) -> dict[str, list[Method]]:
    """The agents of run directories by name, such as `rlae_ppo` or `rlae_mappo_set`. Several runs of one algorithm and
    kind of network, and the agents that a run trained side by side, are its seeds.

    Raises:
      InputError: not a run directory, or an agent for shorter answers than the task's, or of other members that takes
        only those.
    """
    agents: dict[str, list[Method]] = {}
    task = with_room_for_options(ensemble, task)
    for run in runs:
        config = read_run(run).settings
        for policy in [load_policy(run, seed=config.seed + e) for e in range(config.seeds)]:
            spans = 1 if task.reads_texts else span_count(task, policy.span_length)
            ensemble.bind(policy, 1, spans)  # tells now what does not fit
            agents.setdefault(config.method, []).append(Method(ensemble, policy))
        check_members(run, ensemble)
    return agents


def train_router(ensemble: Ensemble, task: Task, config: PPOConfig | None, out: Path) -> list[BoundPolicy]:
    """The same agent with the same training, but one action for the whole answer. Goes on with the run in `out`."""
    config = PPOConfig() if config is None else config
    agent = dataclasses.replace(config.agent, span_lengths=())
    longest = task.max_new_tokens
    config = dataclasses.replace(config, agent=agent, span_length=longest, max_new_tokens=longest, shares=())
    with report.training_progress("training router", config.iterations) as display:
        return train_seeds(ensemble, task, config, out, resume=True, on_progress=display)


def router_config(runs: Sequence[Path]) -> PPOConfig | None:
    """The settings of a router that is to be compared with these runs' agents: the first kind's, PPO's if it is
    among them, with as many seeds as there are agents of it, and as many iterations as were done at most. None where
    there are no runs."""
    configs = sorted((read_run(run).settings for run in runs), key=lambda config: config.algorithm != "ppo")
    if not configs:
        return None
    done = max((row["iteration"] for run in runs for row in read_metrics(Path(run))), default=configs[0].iterations)
    seeds = sum(config.seeds for config in configs if config.method == configs[0].method)
    return dataclasses.replace(configs[0], seeds=seeds, iterations=done)
