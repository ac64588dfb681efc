"""The claims of RLAE's abstract on the embedded tasks: what was measured, its interval, and a verdict as it comes out.

    python -m benchmarks.claims_rlae [--quick] [--json PATH] [--out DIR]

For every seed the specialists are trained anew, and on every task an agent with PPO and one with MAPPO; all baselines
are tuned on the training prompts with at least as many answers as an agent saw. Test prompts are read once.

- R1: each agent against every baseline on every task. That dynamic weights help is said only where an agent beats both
  `router` (the same agent, one action per answer) and `schedule` (the best weights per span index).
- R2: both kinds of agent work.
- R3: agents answer tasks that they were not trained on; the reference is the static weights tuned on the new task.
  Told apart: the same members and another task (each of `CIRCLE` is left out in turn, agents are trained on all
  others), which is what the abstract means; and other members, which is more: agents of one task on every other one,
  and a set agent, which knows no member by its place, trained on tasks of `CIRCLE`.
- R4: milliseconds per answer and time to equal score, against other ways to weight.

In `twins` (one member three times) and `dominant` (one member best everywhere) no dynamic weights can help: gains there
would show that something is wrong with the study. Everything goes into DIR, a piece at a time: after an interruption
the same command goes on. Models are small, and two processes on one core each do twice the work of one on two; only the
times of R4 are taken alone, on all cores.
"""

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import rlae_jax as rj
from benchmarks import common, study
from benchmarks.study import CLAIM_COLUMNS, all_of, claim, claim_cells, sign_verdict
from rlae_jax import files, records, report, specialists, statistics
from rlae_jax.config import ALGORITHMS, AgentConfig, PPOConfig
from rlae_jax.errors import InputError
from rlae_jax.evaluation import (
    Method,
    baseline_methods,
    evaluate,
    join_results,
    leave_one_out,
    searches,
    transfer_matrix,
)
from rlae_jax.evaluation.results import read_results
from rlae_jax.evaluation.transfer import TransferResults
from rlae_jax.ppo.train import train_seeds
from rlae_jax.runs.metrics import read_metrics
from rlae_jax.tasks import get_task
from rlae_jax.tasks.embedded import CIRCLE

GAIN = ("skills", "overlap", "skills3", "mixed", "noisy")
CONTROLS = ("twins", "dominant")
AGENTS = {f"rlae_{name}": name for name in ALGORITHMS}
FIXED = ("uniform", "static")
DYNAMIC = ("router", "schedule")
# Who is to carry over to other tasks of the same members, by name; the last one also to other members.
CARRIERS = {"rlae_ppo": AgentConfig(), "rlae_ppo_set": AgentConfig.of_set()}
SET = "rlae_ppo_set"
BASE = CIRCLE[0]  # of which the others are variants
LIGHT = ("gate", "perplexity", "consistency", "topk")  # what the abstract's latency is compared with
BOUND = 0.02  # of a difference in a control
SPANS = 4  # of the longest task, so that agents fit all of them
PROMPTS = 256  # per PPO iteration

HISTORY = (
    'Tasks and specialists are those of the commit "Specialists: recipes frozen", made before this study; nothing in '
    'them was changed since; those of the circle of "Specialists: recipes of the circle\'s members frozen", made '
    "before any agent was trained on them. How long agents train was chosen on dev prompts of seeds 0 and 1."
)

Results = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is done.

    Attributes:
      iterations: of PPO per task.
      prompts, transfer_prompts: of the test split, in the tables and in the transfer matrices.
      circle: tasks that are left out in turn.
      carry_iterations: of PPO for agents that are to carry over.
      quick: specialists take half the steps, and searches a quarter of the prompts.
    """

    seeds: int
    iterations: Mapping[str, int]
    prompts: int
    transfer_prompts: int
    rounds: int
    circle: tuple[str, ...]
    carry_iterations: int
    quick: bool = False


FULL = Plan(
    seeds=5,
    iterations=dict.fromkeys((*GAIN, *CONTROLS), 60) | {"skills3": 120},
    prompts=1_024,
    transfer_prompts=512,
    rounds=21,
    circle=CIRCLE,
    carry_iterations=120,
)
QUICK = Plan(
    seeds=1,
    iterations={"skills3": 30, "noisy": 30, "twins": 10, "dominant": 10},
    prompts=256,
    transfer_prompts=128,
    rounds=5,
    circle=("circle", "circle_held", "circle_digits"),
    carry_iterations=20,
    quick=True,
)


def settings(plan: Plan, task: str, seed: int, algorithm: str) -> PPOConfig:
    """The same for all tasks but for how long; chosen on dev."""
    return ALGORITHMS[algorithm](
        iterations=plan.iterations[task],
        prompts=PROMPTS,
        eval_every=20,
        seed=seed,
        agent=AgentConfig(max_spans=SPANS),
    )


# --- pieces of work; each leaves files behind, and is done if they exist ---


def members_of(out: Path, plan: Plan, task: str, seed: int) -> rj.Ensemble:
    names = specialists.POOL[task]
    paths = specialists.build_pool(out / "specialists", seed, names, plan.quick)
    return rj.Ensemble([rj.load(paths[name]) for name in names])


def cell(out: Path, task: str, seed: int) -> Path:
    """Where the agents and results of a task and seed lie."""
    return out / "cells" / task / f"seed-{seed}"


def train_specialist(out: Path, plan: Plan, name: str, seed: int) -> None:
    specialists.build_pool(out / "specialists", seed, [name], plan.quick)


def run_cell(out: Path, plan: Plan, name: str, seed: int) -> None:
    """Trains both agents, tunes all baselines, and answers the test prompts."""
    if plan.quick:
        searches.SEARCH_PROMPTS = 256
    directory = cell(out, name, seed)
    if (directory / "results.json").is_file():
        return
    members, task = members_of(out, plan, name, seed), get_task(name)
    agents = {}
    for agent, algorithm in AGENTS.items():
        config = settings(plan, name, seed, algorithm)
        (policy,) = train_seeds(members, task, config, directory / algorithm, resume=True)
        agents[agent] = [Method(members, policy)]
    config = settings(plan, name, seed, "ppo")
    baselines = baseline_methods(members, task, ["all"], agents=agents, config=config, runs=directory)
    evaluate({**baselines, **agents}, task, "test", limit=plan.prompts, out=directory)


def transfer_path(out: Path, column: str, seed: int) -> Path:
    return out / "transfer" / column / f"seed-{seed}.json"


def run_transfer(out: Path, plan: Plan, column: str, seed: int) -> None:
    """Scores the agents of all tasks on one."""
    path = transfer_path(out, column, seed)
    if path.is_file():
        return
    pools, tasks = {column: members_of(out, plan, column, seed)}, {column: get_task(column)}
    matrices = {}
    for agent, algorithm in AGENTS.items():
        agents = {row: rj.load_policy(cell(out, row, seed) / algorithm) for row in plan.iterations}
        matrices[agent] = transfer_matrix(agents, pools, tasks, limit=plan.transfer_prompts)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, matrices)


def same_members(out: Path, agent: str, seed: int) -> Path:
    """Where agents lie that were trained on all tasks of the circle but one, for each of them."""
    return out / "same-members" / agent / f"seed-{seed}"


def run_same_members(out: Path, plan: Plan, agent: str, seed: int) -> None:
    """Leaves every task of the circle out in turn."""
    if plan.quick:
        searches.SEARCH_PROMPTS = 256
    network = dataclasses.replace(CARRIERS[agent], max_spans=SPANS)
    config = PPOConfig(iterations=plan.carry_iterations, prompts=PROMPTS, eval_every=20, seed=seed, agent=network)
    tasks = [get_task(name) for name in plan.circle]
    leave_one_out(
        *(members_of(out, plan, BASE, seed), tasks, config, same_members(out, agent, seed)),
        limit=plan.transfer_prompts,
        resume=True,
    )


def new_members(out: Path, task: str, seed: int) -> Path:
    """Where the set agent's answers with members lie that it has never seen."""
    return out / "new-members" / task / f"seed-{seed}"


def run_new_members(out: Path, plan: Plan, name: str, seed: int) -> None:
    """The set agent of the circle's members, trained on the variants of its first task, with another task's members."""
    directory = new_members(out, name, seed)
    if (directory / "results.json").is_file():
        return
    members, task = members_of(out, plan, name, seed), get_task(name)
    policy = rj.load_policy(same_members(out, SET, seed) / "runs" / f"without-{BASE}")
    methods: dict[str, Any] = {"uniform": Method(members, None, task.span_length), SET: [Method(members, policy)]}
    evaluate(methods, task, "test", limit=plan.transfer_prompts, out=directory)


def run_all(out: Path, plan: Plan) -> None:
    """Everything that takes long."""
    seeds = range(plan.seeds)
    # The longest first, and neighbours with different programs, so that processes do not compile the same ones at once.
    longest = [task for task in ("mixed", "skills3") if task in plan.iterations]
    others = [task for task in plan.iterations if task not in longest]
    tasks = [(task, s) for s in seeds for task in longest] + [(task, s) for task in others for s in seeds]
    recipes = sorted({name for task in (*plan.iterations, BASE) for name in specialists.POOL[task]})
    phases: list[tuple[str, Any, list[tuple[str, int]]]] = [
        ("specialists", train_specialist, [(name, s) for s in seeds for name in recipes]),
        ("agents and baselines", run_cell, tasks),
        ("transfer to other members", run_transfer, tasks),
        ("transfer to other tasks", run_same_members, [(agent, s) for s in seeds for agent in CARRIERS]),
        ("the set agent with other members", run_new_members, tasks),
    ]
    study.run_phases(
        out / "workers.log", [(title, piece, [(out, plan, *own) for own in pieces]) for title, piece, pieces in phases]
    )


# --- what was measured ---


class Column(records.Record):
    """What `transfer_matrix` gives for one column."""

    split: str
    rows: list[str]
    columns: list[str]
    scores: list[tuple[records.Finite]]
    ci95: list[Any]
    per_seed: list[Any]


def read_column(path: Path, names: Sequence[str]) -> dict[str, Column]:
    """A task's column of every agent's transfer matrix.

    Raises:
      InputError: it is not of the shape, or lacks rows.
    """
    columns = records.read(path, dict[str, Column])
    for agent in AGENTS:
        rows = columns[agent].rows if agent in columns else []
        if sorted(rows) != sorted(names) or len(rows) != len(columns[agent].scores):
            raise InputError(f"{path}: {agent} has no score of each of {', '.join(names)}")
    return columns


def merge_transfer(out: Path, plan: Plan, agent: str) -> dict[str, Any]:
    """The whole matrix with every seed's scores, [row][column][seed]."""
    names = list(plan.iterations)
    parts = {(c, s): read_column(transfer_path(out, c, s), names)[agent] for c in names for s in range(plan.seeds)}
    per_seed = [
        [[parts[c, s].scores[parts[c, s].rows.index(r)][0] for s in range(plan.seeds)] for c in names] for r in names
    ]
    scores = np.mean(per_seed, axis=2).tolist()
    return {"rows": names, "columns": names, "scores": scores, "per_seed": per_seed}


def difference(results: Results, a: str, b: str) -> dict[str, Any]:
    """The row of `a` against `b`."""
    (row,) = [row for row in results["differences"] if (row["a"], row["b"]) == (a, b)]
    return dict(row)


def better(row: Mapping[str, Any]) -> str:
    """The verdict on "a is better than b"."""
    if row["difference"] > 0 and row["p_holm"] < 0.05:
        return "holds"
    return "fails" if row["ci95"][1] <= 0 else "undecided"


def baselines_of(results: Results) -> list[str]:
    return [name for name, row in results["methods"].items() if name not in AGENTS and not row.get("reference")]


def best_baseline(results: Results) -> str:
    """The one with the highest score on the test prompts themselves, which is hard on the agents."""
    return max(baselines_of(results), key=lambda name: results["methods"][name]["score"])


def score_claims(tables: Mapping[str, Results]) -> list[dict[str, Any]]:
    """R1 and R2, on the tasks in which weights matter; and on those in which no dynamic weights can help, that none
    do."""
    gain = {task: results for task, results in tables.items() if task in GAIN}
    controls = {task: results for task, results in tables.items() if task in CONTROLS}
    claims = []
    for agent in AGENTS:
        claims += [*best_claims(gain, agent), *dynamic_claims(gain, agent), *control_claims(controls, agent)]
    return [*claims, *(works_claim(gain, agent) for agent in AGENTS), *algorithm_claims(gain)]


def best_claims(tables: Mapping[str, Results], agent: str) -> list[dict[str, Any]]:
    """R1: an agent against the best baseline of each task, and against every one on every task."""
    claims, verdicts = [], []
    for task, results in tables.items():
        best = best_baseline(results)
        row = difference(results, agent, best)
        verdicts.append(better(row))
        name = f"R1 {agent} above the best baseline, {task}"
        said = f"{results['methods'][agent]['score']:.3f} against {best} {results['methods'][best]['score']:.3f}"
        claims.append(claim(name, said, row["difference"], row["ci95"], verdicts[-1]))
    said = f"{verdicts.count('holds')} of {len(verdicts)} tasks"
    return [*claims, claim(f"R1 {agent} above every baseline on every task", said, None, None, all_of(verdicts))]


def dynamic_claims(tables: Mapping[str, Results], agent: str) -> list[dict[str, Any]]:
    """R1: what is dynamic about an agent's weights."""
    claims = []
    for task, results in tables.items():
        rows = [difference(results, agent, other) for other in DYNAMIC]
        least = min(rows, key=lambda row: row["difference"])
        name = f"R1 dynamic weights help {agent}, {task}"
        said = f"above {' and '.join(DYNAMIC)}, the smaller difference"
        verdict = all_of([better(row) for row in rows])
        claims.append(claim(name, said, least["difference"], least["ci95"], verdict))
    return claims


def control_claims(tables: Mapping[str, Results], agent: str) -> list[dict[str, Any]]:
    """That an agent gains nothing where there is nothing to gain."""
    claims = []
    for task, results in tables.items():
        row = difference(results, agent, "static")
        low, high = row["ci95"]
        verdict = "holds" if low >= -BOUND and high <= BOUND else "fails" if low > BOUND else "undecided"
        said = f"difference to static within {BOUND}"
        claims.append(claim(f"control: no gain for {agent}, {task}", said, row["difference"], row["ci95"], verdict))
    return claims


def works_claim(tables: Mapping[str, Results], agent: str) -> dict[str, Any]:
    """R2: an agent against fixed weights on all tasks."""
    rows = [difference(results, agent, other) for results in tables.values() for other in FIXED]
    least = min(rows, key=lambda row: row["difference"])
    said = f"above {' and '.join(FIXED)} on {', '.join(tables)}, the smallest difference"
    verdict = all_of([better(row) for row in rows])
    return claim(f"R2 {agent} works", said, least["difference"], least["ci95"], verdict)


def algorithm_claims(tables: Mapping[str, Results]) -> list[dict[str, Any]]:
    """R2: one kind of agent against the other."""
    claims = []
    for task, results in tables.items():
        row = difference(results, "rlae_ppo", "rlae_mappo")
        verdict = "no difference shown" if row["p_holm"] >= 0.05 else "PPO" if row["difference"] > 0 else "MAPPO"
        claims.append(claim(f"R2 which is better, {task}", "PPO minus MAPPO", row["difference"], row["ci95"], verdict))
    return claims


def transfer_claims(tables: Mapping[str, Results], matrices: Mapping[str, Any]) -> list[dict[str, Any]]:
    """R3. A gain is what an agent is above the static weights that were tuned on the task that it answers."""
    claims = []
    for agent, matrix in matrices.items():
        names = [name for name in matrix["columns"] if name not in CONTROLS]
        places = [matrix["columns"].index(name) for name in names]
        scores = np.array(matrix["per_seed"])[np.ix_(places, places)]
        static = np.array([tables[name]["methods"]["static"]["per_seed"] for name in names])
        gains = scores - static[None]
        elsewhere = ~np.eye(len(names), dtype=bool)
        own, other = (np.mean(gains[where], axis=0) for where in (~elsewhere, elsewhere))
        interval = statistics.t_interval(other) if len(other) > 1 else (float(other[0]),) * 2
        said = (
            f"mean gain over the new task's static weights; {other.mean() / own.mean():.0%} of the gain at home kept; "
            f"{int(np.sum(gains[elsewhere].mean(axis=1) > 0))} of {int(elsewhere.sum())} cells above"
        )
        claims.append(
            claim(f"R3 {agent} with other members", said, float(other.mean()), interval, sign_verdict(interval))
        )
    return claims


def read_same_members(out: Path, plan: Plan) -> dict[str, dict[str, Results]]:
    """Of every agent that is to carry over, every task's results of all seeds."""
    seeds = range(plan.seeds)
    return {
        agent: {
            task: join_results([same_members(out, agent, s) / "tasks" / task for s in seeds]) for task in plan.circle
        }
        for agent in CARRIERS
    }


def carried(tables: Mapping[str, Results], agent: str) -> dict[str, dict[str, Any]]:
    """By task, the agents that were trained on the others against the task's static weights; p corrected for the
    tasks. The first task is left out of this: the others are its variants, so that it is not new to who knows them."""
    rows = {task: difference(results, f"{agent}_others", "static") for task, results in tables.items() if task != BASE}
    corrected = statistics.holm([row["p"] for row in rows.values()])
    return {task: row | {"p_holm": p} for (task, row), p in zip(rows.items(), corrected, strict=True)}


def same_members_claims(tables: Mapping[str, Mapping[str, Results]]) -> list[dict[str, Any]]:
    """R3: other tasks of the same members."""
    claims = []
    for agent, results in tables.items():
        rows = carried(results, agent)
        verdicts = [better(row) for row in rows.values()]
        for (task, row), verdict in zip(rows.items(), verdicts, strict=True):
            methods = results[task]["methods"]
            alone, others = methods[f"only-{task}"]["score"], methods[f"{agent}_others"]["score"]
            said = (
                f"trained on the others {others:.3f}, on it {alone:.3f}; less static {methods['static']['score']:.3f}"
            )
            claims.append(claim(f"R3 {agent} carries over to {task}", said, row["difference"], row["ci95"], verdict))
        least = min(rows.values(), key=lambda row: row["difference"])
        said = f"above static on {verdicts.count('holds')} of {len(rows)} tasks of the same members; the least"
        enough = "holds" if verdicts.count("holds") >= needed(len(rows)) else all_of(verdicts)
        claims.append(claim(f"R3 {agent} carries over", said, least["difference"], least["ci95"], enough))
    return claims


def needed(tasks: int) -> int:
    """Of so many tasks, four in five."""
    return -(-4 * tasks // 5)


def new_members_claims(tables: Mapping[str, Results]) -> list[dict[str, Any]]:
    """R3: the set agent with members that it has never seen, against equal weights."""
    claims = []
    for task, results in tables.items():
        row = difference(results, SET, "uniform")
        said = f"{results['methods'][SET]['score']:.3f} less uniform {results['methods']['uniform']['score']:.3f}"
        verdict = "fails" if is_below(row) else "holds"
        name = f"R3 {SET} not below uniform with unseen members, {task}"
        claims.append(claim(name, said, row["difference"], row["ci95"], verdict))
    return claims


def is_below(row: Mapping[str, Any]) -> bool:
    """Whether a difference is below 0 for certain."""
    return bool(row["ci95"][1] < 0)


def mean_matrix(out: Path, plan: Plan, agent: str) -> dict[str, Any]:
    """The mean over the seeds of who was trained on what and tested on what, and which cells were left out."""
    path = [same_members(out, agent, s) / "results.json" for s in range(plan.seeds)]
    parts = [records.read(one, TransferResults) for one in path]
    scores = np.mean([part.scores for part in parts], axis=0).tolist()
    return {"rows": parts[0].rows, "columns": parts[0].columns, "scores": scores}


# --- R4 ---


def time_methods(out: Path, plan: Plan, task_name: str) -> list[dict[str, Any]]:
    """Milliseconds per token and answer of each method on the same members and prompts, alternating in one process."""
    members, task = members_of(out, plan, task_name, 0), get_task(task_name)
    prompts = task.split("test").take(PROMPTS).prompts
    table = read_results(cell(out, task_name, 0)).methods
    length = task.span_length
    methods: dict[str, tuple[rj.Ensemble, Any, int | None]] = {
        "uniform": (members, None, length),
        "gate": (members, "gate", 1),
        "perplexity": (members, "perplexity", length),
        "consistency": (members, "consistency", 1),
        "topk": (members.with_fusion(f"topk:{table['topk']['k']}"), None, length),
        **{
            agent: (members, rj.load_policy(cell(out, task_name, 0) / algorithm), None)
            for agent, algorithm in AGENTS.items()
        },
    }

    def answer(name: str) -> Any:
        ensemble, weights, span_length = methods[name]
        return ensemble.generate(prompts, weights, span_length=span_length, max_new_tokens=task.max_new_tokens)

    tokens = {name: sum(answer(name).steps) for name in methods}
    others = common.OtherLoad()
    timings = common.time_alternating(
        {name: lambda name=name: answer(name) for name in methods},  # type: ignore[misc]
        rounds=plan.rounds,
        budget_seconds=120.0,
    )
    rows = []
    for name, timing in timings.items():
        low, high = timing.quartiles
        to_equal = {
            agent: seconds_to(cell(out, task_name, 0) / algorithm, table[name]["score"])
            for agent, algorithm in AGENTS.items()
        }
        rows.append(
            {
                "kind": "time",
                "task": task_name,
                "method": name,
                "score": table[name]["score"],
                "ms_per_answer": 1e3 * timing.median / len(prompts),
                "ms_per_answer_quartiles": [1e3 * low / len(prompts), 1e3 * high / len(prompts)],
                "ms_per_token": 1e3 * timing.median / tokens[name],
                "ratio_per_token": common.pairwise_ratio(timing, timings["uniform"]) * tokens["uniform"] / tokens[name],
                "ratios_per_answer": {
                    agent: list(np.quantile(np.divide(timings[agent].seconds, timing.seconds), [0.25, 0.5, 0.75]))
                    for agent in AGENTS
                },
                "tuning_seconds": table[name].get("search_seconds"),
                "training_seconds": seconds_to(cell(out, task_name, 0) / AGENTS[name], float("inf"))
                if name in AGENTS
                else None,
                "training_seconds_to_equal_score": to_equal,
                "rounds": len(timing.seconds),
                "cores_used_by_others": others.share(),
            }
        )
    return rows


def seconds_to(run: Path, score: float) -> float | None:
    """Seconds of training until the agent's dev score was this high; None if it never was. Infinity takes all of it."""
    rows = read_metrics(run)
    if score == float("inf"):
        return float(sum(row["seconds"] for row in rows))
    reached = [row["iteration"] for row in rows if row.get("dev", -1.0) >= score]
    return float(sum(row["seconds"] for row in rows if row["iteration"] <= reached[0])) if reached else None


def time_claims(times: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    claims = []
    for agent in AGENTS:
        for row in (row for row in times if row["method"] in LIGHT):
            low, middle, high = row["ratios_per_answer"][agent]
            verdict = "holds" if high < 1 else "fails" if low > 1 else "undecided"
            equal = row["training_seconds_to_equal_score"][agent]
            reached = (
                "never reaches its score" if equal is None else f"reaches its score after {equal:.0f} s of training"
            )
            said = f"time per answer relative to {row['method']} (quartiles); {reached}"
            name = f"R4 {agent} faster than {row['method']}"
            claims.append(claim(name, said, middle, [low, high], verdict, sign=""))
    return claims


# --- checks, tables, page ---


def transfer_checks(same: Mapping[str, Mapping[str, Results]], new: Mapping[str, Results]) -> list[dict[str, Any]]:
    """R3: on how many tasks of the same members an agent is above static weights; on how many of other members the set
    agent is below equal ones."""
    checks = []
    for agent, results in same.items():
        rows = carried(results, agent)
        above = sum(better(row) == "holds" for row in rows.values())
        name = "r3_same_members" + ("_set" if agent == SET else "")
        checks.append(common.check(name, above, ">=", needed(len(rows))))
    below = sum(is_below(difference(results, SET, "uniform")) for results in new.values())
    return [*checks, common.check("r3_new_members", below, "<=", 0)]


def make_checks(tables: Mapping[str, Results], times: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    checks = []
    for agent, algorithm in AGENTS.items():
        for task in ("skills3", "noisy"):
            rows = [difference(tables[task], agent, other) for other in FIXED]
            gain, p = min(row["difference"] for row in rows), max(row["p_holm"] for row in rows)
            checks.append(common.check(f"{algorithm}_{task}_gain", gain, ">=", 0.033))
            checks.append(common.check(f"{algorithm}_{task}_gain_p", p, "<=", 0.01))
    for task in CONTROLS:
        ends = [abs(end) for agent in AGENTS for end in difference(tables[task], agent, "static")["ci95"]]
        checks.append(common.check(f"{task}_bound", max(ends), "<=", BOUND))
    score = {name: row["score"] for name, row in tables["skills3"]["methods"].items()}
    lost = (score["rlae_ppo"] - score["shuffled"]) / (score["rlae_ppo"] - score["static"])
    checks.append(common.check("shuffled_loss", lost, ">=", 0.5))
    ratio = max(row["ratio_per_token"] for row in times if row["method"] in AGENTS)
    checks.append(common.check("ms_ratio", ratio, "<=", 1.25))
    return checks


def score_cells(tables: Mapping[str, Results]) -> list[list[str]]:
    """Method by task: score and interval. Members alone are named by their place, as they differ between tasks."""
    rows: dict[str, dict[str, str]] = {}
    for task, results in tables.items():
        place = 0
        for name, row in results["methods"].items():
            if name.startswith("single:"):
                place += 1
                name = f"member {place} alone"
            low, high = row["ci95"]
            rows.setdefault(name, {})[task] = f"{row['score']:.3f} ({low:.3f} to {high:.3f})"
    return [[name, *(cells.get(task, "") for task in tables)] for name, cells in rows.items()]


def time_cells(times: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    def seconds(value: float | None) -> str:
        return "" if value is None else f"{value:.0f}"

    return [
        (
            row["method"],
            "{:.3f} ({:.3f} to {:.3f})".format(row["ms_per_answer"], *row["ms_per_answer_quartiles"]),
            f"{row['ms_per_token']:.4f}",
            f"{row['ratio_per_token']:.2f}",
            f"{row['score']:.3f}",
            seconds(row["training_seconds"] or row["tuning_seconds"]),
            *(seconds(row["training_seconds_to_equal_score"][agent]) or "never" for agent in AGENTS),
        )
        for row in times
    ]


TIME_COLUMNS = (
    "method",
    "ms per answer (quartiles)",
    "ms per token",
    "against uniform",
    "score",
    "training or tuning, s",
    *(f"{agent} as good after, s" for agent in AGENTS),
)


def write_page(
    out: Path,
    plan: Plan,
    tables: Mapping[str, Results],
    matrices: Mapping[str, Any],
    carriers: Mapping[str, Any],
    times: Sequence[Mapping[str, Any]],
    claims: Sequence[Mapping[str, Any]],
    checks: Sequence[Mapping[str, Any]],
    environment: Mapping[str, Any],
) -> None:
    """`claims.md` and pictures beside it."""
    table = report.markdown_table
    parts = [
        "# The claims of RLAE's abstract, measured",
        f"`python -m benchmarks.claims_rlae{' --quick' if plan.quick else ''}`: {plan.seeds} seeds, {plan.prompts} "
        f"test prompts per task, {environment['cpu']}, {environment['cores']} cores. Iterations of {PROMPTS} prompts: "
        + ", ".join(f"{task} {n}" for task, n in plan.iterations.items())
        + ".",
        HISTORY,
        "## Claims",
        table(CLAIM_COLUMNS, claim_cells(claims), left=2),
        "## Checks",
        table(
            ("check", "value", "required", ""),
            study.check_cells(checks),
        ),
        "## Scores",
        "Mean reward of all seeds with its 95% interval (bootstrap over seeds, then prompts). The oracle is a "
        "reference line: whether any member alone is right.",
        table(("method", *tables), score_cells(tables)),
        *(f"![{task}](scores-{task}.png)" for task in tables),
        "## Every seed",
        *(
            f"{task}\n\n"
            + table(
                ("method", *(f"seed {s}" for s in range(plan.seeds))),
                [(name, *(f"{score:.3f}" for score in row["per_seed"])) for name, row in results["methods"].items()],
            )
            for task, results in tables.items()
        ),
        "## Differences",
        "On the same prompts, paired by seed; p corrected for all rows of a task (Holm).",
        *(
            f"{task}\n\n"
            + table(
                ("a", "b", "a - b", "95% interval", "p (Holm)"),
                [
                    (
                        r["a"],
                        r["b"],
                        f"{r['difference']:+.3f}",
                        f"{r['ci95'][0]:+.3f} to {r['ci95'][1]:+.3f}",
                        f"{r['p_holm']:.2g}",
                    )
                    for r in results["differences"]
                ],
            )
            for task, results in tables.items()
        ),
        "## Transfer to other tasks of the same members",
        "Trained on the row, tested on the column, without retraining; `static` is each task's own. Framed: the task "
        f"was left out of training. Mean of all seeds ({plan.transfer_prompts} prompts).",
    ]
    for agent, matrix in carriers.items():
        framed = [(matrix["rows"].index(f"all but {task}"), c) for c, task in enumerate(matrix["columns"])]
        report.transfer_map(out / f"same-members-{agent}.png", matrix, f"{agent}, the same members", framed)
        parts += [f"{agent}\n\n" + matrix_table(matrix), f"![{agent}](same-members-{agent}.png)"]
    parts += [
        "## Transfer to other members",
        "Trained on the row, tested on the column, without retraining; mean of all seeds "
        f"({plan.transfer_prompts} prompts).",
    ]
    for agent, matrix in matrices.items():
        parts += [f"{agent}\n\n" + matrix_table(matrix), f"![{agent}](transfer-{agent}.png)"]
        report.transfer_map(out / f"transfer-{agent}.png", matrix, f"Transfer of {agent}")
    parts += [
        "## Time",
        f"{times[0]['task']}, {PROMPTS} prompts at once, seed 0, all cores; training and tuning on one core, "
        "compilation included. The last columns: after how many seconds of training the agent's dev score reached this "
        "method's.",
        table(TIME_COLUMNS, time_cells(times)),
    ]
    for task, results in tables.items():
        report.scores_chart(out / f"scores-{task}.png", results)
    files.write_text(out / "claims.md", "\n\n".join(parts) + "\n")


def matrix_table(matrix: Mapping[str, Any]) -> str:
    """A transfer matrix in Markdown."""
    cells = [
        (row, *(f"{score:.3f}" for score in scores))
        for row, scores in zip(matrix["rows"], matrix["scores"], strict=True)
    ]
    return report.markdown_table(("trained on", *matrix["columns"]), cells)


def claim_directory(out: Path, plan: Plan) -> None:
    """Exits if the directory holds a study with other settings."""
    marks = {name: specialists.fingerprint(name, 0, plan.quick) for name in specialists.RECIPES}
    wanted = {
        **dataclasses.asdict(plan),
        "circle": list(plan.circle),
        "specialists": marks,
        "pool": {k: list(v) for k, v in specialists.POOL.items()},
    }
    study.take_directory(out, wanted)


def main() -> None:
    options = common.parse_args(__doc__.splitlines()[0] if __doc__ else "", out=Path("runs/claims_rlae"))
    plan = QUICK if options.quick else FULL
    assert options.out is not None
    out = options.out / "quick" if options.quick else options.out
    environment = common.environment()
    claim_directory(out, plan)
    began = time.perf_counter()
    try:
        run_all(out, plan)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    study.use_compilation_cache(out)
    tables = {task: join_results([cell(out, task, s) for s in range(plan.seeds)]) for task in plan.iterations}
    matrices = {agent: merge_transfer(out, plan, agent) for agent in AGENTS}
    same, carriers = read_same_members(out, plan), {agent: mean_matrix(out, plan, agent) for agent in CARRIERS}
    new = {
        task: join_results([new_members(out, task, s) for s in range(plan.seeds)])
        for task in plan.iterations
        if task in GAIN
    }
    times = time_methods(out, plan, "skills3")
    claims = [
        *score_claims(tables),
        *same_members_claims(same),
        *new_members_claims(new),
        *transfer_claims(tables, matrices),
        *time_claims(times),
    ]
    checks = [*make_checks(tables, times), *transfer_checks(same, new)]
    common.print_table("Scores", ("method", *tables), score_cells(tables))
    common.print_table("Claims", CLAIM_COLUMNS, claim_cells(claims))
    common.print_table("Time", TIME_COLUMNS, time_cells(times))
    write_page(out, plan, tables, matrices, carriers, times, claims, checks, environment)
    rows = [*({"kind": "claim", **c} for c in claims), *times]
    common.finish(rows, checks, environment, options.json_path)
    print(f"{(time.perf_counter() - began) / 60:.1f} minutes; tables and pictures in {out / 'claims.md'}")


if __name__ == "__main__":
    main()
