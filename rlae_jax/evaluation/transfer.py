"""Agents on tasks that they were not trained on: a matrix of trained ones, and leave-one-out over tasks.

runs/x/config.json      what all runs have in common: decides whether a directory belongs to a transfer
      runs/NAME/        a training run each: only-TASK, and without-TASK on all others
      tasks/TASK/       the evaluation of all agents, of equal and of static weights on a task
      results.json      the matrix, and every task that was left out against its own static weights
      table.md, transfer.png
"""

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.table

from rlae_jax import files, ranges, records, report
from rlae_jax.config import PPOConfig
from rlae_jax.errors import InputError
from rlae_jax.evaluation.baselines import baseline_methods
from rlae_jax.evaluation.engine import evaluate
from rlae_jax.evaluation.methods import AnyMethod, Method
from rlae_jax.evaluation.policies import span_count
from rlae_jax.evaluation.results import RESULTS_FILE, Results, read_results
from rlae_jax.fusion.ensemble import Ensemble
from rlae_jax.fusion.policy import BoundPolicy
from rlae_jax.ppo.train import Setup, require_together, setup, train_seeds
from rlae_jax.ranges import Count
from rlae_jax.runs import lock
from rlae_jax.runs.directory import claim_directory
from rlae_jax.statistics import holm
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


FIXED = ("uniform", "static")
_OTHERS = "_others"  # of an agent's name on the task that it was not trained on


class TransferRun(Setup, kw_only=True, tag_field="command", tag="transfer"):
    """The content of config.json: what all runs have in common.

    Attributes:
      base: the settings of all of them. Not called settings, of which a resumed run may have other iterations.
    """

    base: PPOConfig


class Comparison(records.Record, kw_only=True):
    """The agents that were trained on the others, less another method, on a task.

    Attributes:
      p_holm: corrected for all tasks.
    """

    difference: records.Finite
    ci95: tuple[records.Finite, records.Finite]
    p: records.Share
    p_holm: records.Share


class LeftOut(records.Record, kw_only=True):
    """A task that agents were not trained on: scores of equal weights, of its own static ones, of agents that were
    trained on it alone, and of those that were trained on all others."""

    task: str
    uniform: records.Finite
    static: records.Finite
    alone: records.Finite
    others: records.Finite
    above_static: Comparison
    above_uniform: Comparison


class TransferResults(records.Record, kw_only=True):
    """The content of results.json.

    Attributes:
      n: prompts of each task.
      rows: "uniform", "static" (each task's own), "only TASK", "all but TASK".
      scores, ci95, per_seed: [row][column]; a row without seeds has one.
    """

    schema: records.Schema = 1
    method: str
    split: str
    n: list[records.Positive]
    rows: list[str]
    columns: list[str]
    scores: list[list[records.Finite]]
    ci95: list[list[tuple[records.Finite, records.Finite]]]
    per_seed: list[list[list[records.Finite]]]
    left_out: list[LeftOut]
    base: PPOConfig
    seconds: dict[str, records.Seconds]
    environment: dict[str, Any]


@lock.writes("out")
def leave_one_out(
    ensemble: Ensemble,
    tasks: Sequence[Task],
    config: PPOConfig | None = None,
    out: str | os.PathLike[str] = "runs/transfer",
    *,
    split: str = "test",
    limit: Count | None = None,
    resume: bool = False,
) -> TransferResults:
    """For each of some tasks of one ensemble trains agents on all others, and on the task alone, and scores them there.

    The reference is what a user would do without agents: the static weights that are tuned on the task itself, on at
    least as many answers as an agent sees in training. All agents answer all tasks.

    Args:
      tasks: two or more. Where there are two, who was trained on the others was trained on one alone.
      config: of all runs; on several tasks each has an equal share.
      out: the directory of all of it.
      split, limit: which prompts are answered; make choices on dev.
      resume: go on with what is in `out` (or begin it).

    Raises:
      InputError: fewer than two tasks, some that do not go together, a directory of something else.
      Interrupted: Ctrl-C while agents were trained; `resume=True` goes on from there.
    """
    ranges.check_arguments(leave_one_out, limit=limit)
    out, config = Path(out), PPOConfig() if config is None else config
    if len(tasks) < 2:
        raise InputError("to leave one task out needs two or more; give them as --task A B C")
    if config.shares:
        raise InputError("tasks have equal shares where each is left out in turn; leave shares out")
    require_together(tasks, config.span_length)
    if config.max_new_tokens is not None:
        tasks = [dataclasses.replace(task, max_new_tokens=config.max_new_tokens) for task in tasks]
    config = _for_all(config, tasks)
    longest, length = max(task.max_new_tokens for task in tasks), config.span_length
    assert length is not None
    spec = ensemble.spec(span_length=length, max_new_tokens=longest)
    claim_directory(out, TransferRun(**setup(ensemble, tasks, config, spec), base=config), resume=resume)
    began = time.perf_counter()
    agents = _train(ensemble, tasks, config, out / "runs")
    columns = [
        _answer(ensemble, task, tasks, config, agents, split, limit, out / "tasks" / task.name) for task in tasks
    ]
    results = _results(tasks, columns, list(agents), config, split)
    results.seconds = {"total": time.perf_counter() - began}
    files.write_json(out / RESULTS_FILE, records.plain(results))
    files.write_text(out / "table.md", report.markdown_table(*_rows(results), left=1) + "\n")
    framed = [(results.rows.index(_row(_others_of(task, tasks))), c) for c, task in enumerate(tasks)]
    title = f"{results.method}, {split}; framed: not trained on"
    report.transfer_map(out / "transfer.png", records.plain(results), title, framed)
    return results


def _for_all(config: PPOConfig, tasks: Sequence[Task]) -> PPOConfig:
    """The settings, for agents that can answer every one of the tasks."""
    length = config.span_length or tasks[0].span_length
    shortest = min((length, *config.agent.span_lengths))
    spans = max(span_count(task, shortest) for task in tasks)
    agent = dataclasses.replace(config.agent, max_spans=max(config.agent.max_spans, spans))
    return dataclasses.replace(
        config, agent=agent, span_length=length, max_new_tokens=None, eval_prompts=config.dev_prompts
    )


def _others_of(task: Task, tasks: Sequence[Task]) -> str:
    """The run on all tasks but one."""
    others = [other for other in tasks if other is not task]
    return f"without-{task.name}" if len(others) > 1 else f"only-{others[0].name}"


def _row(run: str) -> str:
    """What the matrix calls a run."""
    return run.replace("only-", "only ", 1).replace("without-", "all but ", 1)


def _train(ensemble: Ensemble, tasks: Sequence[Task], config: PPOConfig, out: Path) -> dict[str, list[BoundPolicy]]:
    """The agents of all runs; those that are done are read."""
    runs = {f"only-{task.name}": [task] for task in tasks}
    runs |= {_others_of(task, tasks): [other for other in tasks if other is not task] for task in tasks}
    agents = {}
    for i, (name, on) in enumerate(runs.items()):
        with report.training_progress(f"run {i + 1} of {len(runs)}, {name}", config.iterations) as display:
            agents[name] = train_seeds(ensemble, on, config, out / name, resume=True, on_progress=display)
    return agents


def _answer(
    ensemble: Ensemble,
    task: Task,
    tasks: Sequence[Task],
    config: PPOConfig,
    agents: Mapping[str, Sequence[BoundPolicy]],
    split: str,
    limit: int | None,
    out: Path,
) -> Results:
    """What everybody answers on a task, as `evaluate` leaves it; what is there already is read."""
    examples = task.split(split)
    n = len(examples if limit is None else examples.take(limit))
    left_out = _others_of(task, tasks)
    others = f"{config.method}{_OTHERS}"
    names = [*FIXED, others, *(name for name in agents if name != left_out)]
    if (out / RESULTS_FILE).is_file():
        there = read_results(out)
        if there.split == split and list(there.methods) == names and all(r["n"] == n for r in there.methods.values()):
            return there
    methods: dict[str, Any] = dict(baseline_methods(ensemble, task, FIXED, config=config))
    seeds = {others: agents[left_out], **agents}
    methods |= {name: [Method(ensemble, policy) for policy in seeds[name]] for name in names[len(FIXED) :]}
    evaluate(methods, task, split, limit=limit, out=out)
    return read_results(out)


def _results(
    tasks: Sequence[Task], columns: Sequence[Results], runs: Sequence[str], config: PPOConfig, split: str
) -> TransferResults:
    others = f"{config.method}{_OTHERS}"

    def cell(row: str, c: int) -> dict[str, Any]:
        methods = columns[c].methods
        return methods[others if row == _others_of(tasks[c], tasks) else row]

    left_out = []
    against = {name: _comparisons([column.differences for column in columns], others, name) for name in FIXED}
    for c, task in enumerate(tasks):
        methods = columns[c].methods
        left_out.append(
            LeftOut(
                task=task.name,
                uniform=methods["uniform"]["score"],
                static=methods["static"]["score"],
                alone=cell(f"only-{task.name}", c)["score"],
                others=methods[others]["score"],
                above_static=against["static"][c],
                above_uniform=against["uniform"][c],
            )
        )
    rows = [*FIXED, *runs]
    every = range(len(tasks))
    return TransferResults(
        method=config.method,
        split=split,
        n=[columns[c].methods[others]["n"] for c in every],
        rows=[_row(row) for row in rows],
        columns=[task.name for task in tasks],
        scores=[[cell(row, c)["score"] for c in every] for row in rows],
        ci95=[[cell(row, c)["ci95"] for c in every] for row in rows],
        per_seed=[[cell(row, c)["per_seed"] for c in every] for row in rows],
        left_out=left_out,
        base=config,
        seconds={},
        environment=report.environment(),
    )


def _comparisons(differences: Sequence[Sequence[Mapping[str, Any]]], a: str, b: str) -> list[Comparison]:
    """`a` against `b` on every task, from its table of differences; corrected for the tasks."""
    rows = [next(row for row in own if (row["a"], row["b"]) == (a, b)) for own in differences]
    return [
        Comparison(difference=row["difference"], ci95=tuple(row["ci95"]), p=row["p"], p_holm=p)
        for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True)
    ]


def _rows(results: TransferResults) -> tuple[list[str], list[list[str]]]:
    """The table of what was left out: its head and a row per task."""
    head = ["left out", "uniform", "static", "trained on it alone", "on all others", "others - static", "p (Holm)"]
    rows = []
    for one in results.left_out:
        low, high = one.above_static.ci95
        difference = f"{one.above_static.difference:+.3f} ({low:+.3f} to {high:+.3f})"
        scores = [f"{score:.3f}" for score in (one.uniform, one.static, one.alone, one.others)]
        rows.append([one.task, *scores, difference, f"{one.above_static.p_holm:.2g}"])
    return head, rows


def left_out_table(results: TransferResults) -> rich.table.Table:
    """Every task that was left out, for people."""
    head, rows = _rows(results)
    prompts = " or ".join(str(n) for n in sorted(set(results.n)))
    table = rich.table.Table(title=f"{results.method}, {results.split} split, {prompts} prompts")
    for column in head:
        table.add_column(column, justify="left" if column == head[0] else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
