"""What EMORL compares on held-out prompts: the base, single adapters, adapters taught everything, fusions, agents.

In: a run's directory. Out: methods for `rlae_jax.evaluation`, and results.json and predictions.jsonl as every
evaluation of the package has them, with the score of each objective; greedy answers and sampled ones are two tables,
never one.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from rlae_jax import records, report
from rlae_jax.emorl.agent import objectives_task
from rlae_jax.emorl.display import show_problems
from rlae_jax.emorl.fused import MODES, Fused
from rlae_jax.emorl.run import AGENT, Run
from rlae_jax.emorl.scorers import Objective
from rlae_jax.emorl.search import read_found
from rlae_jax.emorl.train import OBJECTIVES, TRAINING_FILE, Training
from rlae_jax.evaluation.answers import Answers, Decoding, Scoring
from rlae_jax.evaluation.engine import answer_methods
from rlae_jax.evaluation.methods import Method
from rlae_jax.evaluation.results import (
    SCHEMA,
    differences,
    method_row,
    pairs_with,
    predictions,
    rewards_of,
    write_results,
)
from rlae_jax.fusion.ensemble import Ensemble
from rlae_jax.fusion.weights import Weights
from rlae_jax.models import LM, Adapter
from rlae_jax.ppo.train import load_policy, read_run
from rlae_jax.runs import lock
from rlae_jax.runs.directory import CONFIG_FILE
from rlae_jax.tasks import Examples
from rlae_jax.tasks.prompts import PromptSet

_ROWS = 128  # prompts answered at once; each may be a row of every adapter
# What a line of predictions.jsonl tells.
_KEYS = ("method", "decoding", "index", "prompt", "text", "reward", "scores", "weights")


def adapted(base: LM, adapters: Sequence[Adapter]) -> dict[str, Method]:
    """The base and every adapter alone, all through one program."""
    ensemble = Ensemble([base.with_adapters(adapters)])
    one_hot = np.eye(len(adapters), dtype=np.float32)
    methods = {"base": Method(ensemble, adapters=np.zeros(len(adapters), np.float32))}
    return methods | {
        adapter.name: Method(ensemble, adapters=weights) for adapter, weights in zip(adapters, one_hot, strict=True)
    }


def fusion(fused: Fused, weights: Weights, record: Mapping[str, Any] | None = None) -> Method:
    """Fused adapters under fixed weights, or under an agent.

    Args:
      record: what goes into the method's entry of results.json.
    """
    record = {} if record is None else record
    if fused.mode == "params":
        return Method(fused.ensemble, record=record, adapters=np.asarray(weights))
    return Method(fused.ensemble, weights, record=record)


def score_by_objectives(objectives: Sequence[Objective]) -> Scoring:
    """The scores of an answer to its prompt under each objective."""

    def start(examples: Examples, texts: Sequence[str]) -> Callable[[], Float[np.ndarray, "N M"]]:
        scores = np.stack([objective.share(examples.prompts, texts) for objective in objectives], axis=1)
        return lambda: scores

    return Scoring(tuple(objective.name for objective in objectives), start)


@lock.writes("out")
def evaluate(
    methods: Mapping[str, Method],
    prompts: Sequence[str],
    objectives: Sequence[Objective],
    *,
    task: str,
    split: str,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    compare: str = "hidden",
    out: Path | None = None,
) -> dict[str, Any]:
    """Scores every method greedily and at a temperature, on the same prompts with the same seeds.

    Args:
      compare: the method that all others are compared with, if it is among them.
      out: a directory for results.json and predictions.jsonl.

    Returns the content of results.json: `methods` and `differences` of greedy answers, and `sampled` with the same of
    sampled ones.
    """
    began = time.perf_counter()
    asked = objectives_task(PromptSet(task, {split: tuple(prompts)}), objectives, max_new_tokens=max_new_tokens)
    examples, scoring = asked.split(split), score_by_objectives(objectives)
    ways = {"greedy": Decoding(0.0, seed, _ROWS), "sampled": Decoding(temperature, seed, _ROWS)}
    answers = answer_methods(methods, asked, examples, scoring, ways)

    def tables(seeds: Mapping[str, list[Answers]]) -> dict[str, Any]:
        rewards = {name: rewards_of(own) for name, own in seeds.items()}
        rows = {
            name: method_row([method], seeds[name], scoring.objectives, tokens=True) for name, method in methods.items()
        }
        return {"methods": rows, "differences": differences(rewards, pairs_with(compare, list(rewards)))}

    results = {
        "schema": SCHEMA,
        "task": task,
        "split": split,
        "objectives": list(scoring.objectives),
        **tables(answers["greedy"]),
        "sampled": {"temperature": temperature, **tables(answers["sampled"])},
        "seconds": {"evaluation": time.perf_counter() - began},
        "environment": report.environment(),
    }
    if out is not None:
        lines = [
            line
            for way, by_method in answers.items()
            for name, (own,) in by_method.items()
            for line in predictions(name, 0, way, examples, own, scoring.objectives, _KEYS)
        ]
        write_results(out, results, lines)
    return results


def run_methods(run: Run) -> dict[str, Method]:
    """Everything that a run has: the base, adapters alone, equal weights, every fusion that was searched, the agent."""
    singles = run.singles()
    adapters = {name: run.adapter(name) for name in run.targets()}
    methods = {}
    for name, method in adapted(run.base, list(adapters.values())).items():
        training = run.directory / OBJECTIVES / name / TRAINING_FILE
        record = {"data_points": records.read(training, Training).data_points} if name in adapters else {}
        methods[f"single:{name}" if name in singles else name] = dataclasses.replace(method, record=record)
    trained = sum(methods[f"single:{name}"].record["data_points"] for name in singles)
    equal = Fused(run.base, [adapters[name] for name in singles])
    methods["equal"] = fusion(equal, [1.0] * len(singles), {"data_points": trained})
    for mode in MODES:
        if (searched := _searched(run, mode, singles, trained)) is not None:
            methods[mode] = searched
    if (agent := run.search_directory(AGENT) / CONFIG_FILE).is_file():
        members = [member.name for member in read_run(agent.parent).members]
        fused = Fused(run.base, [run.adapter(name) for name in members])
        methods["rlae_ppo"] = fusion(fused, load_policy(agent.parent))
    return methods


def _searched(run: Run, mode: str, singles: Sequence[str], trained: int) -> Method | None:
    """The fusion of a mode under the weights that its search chose, if there was one. Tells which adapters it lacks.

    Args:
      trained: data points that the adapters took.
    """
    search = read_found(run.search_directory(mode), run.targets())
    if search is None:
        return None
    weights = search.weights
    if others := ", ".join(name for name in singles if name not in weights):
        report.console.print(
            f"{mode}: its weights were searched for {', '.join(weights)} alone, without {others}; search again",
            highlight=False,
            soft_wrap=True,
        )
    fused = Fused(run.base, [run.adapter(name) for name in weights], mode)
    record = {"weights": weights, "data_points": trained + search.answers}
    return fusion(fused, list(weights.values()), record)


@lock.writes("out")
def evaluate_run(
    run: Run, split: str, limit: int | None, temperature: float, seed: int, out: Path | None
) -> dict[str, Any]:
    """Evaluates everything that a run has. Returns the content of results.json.

    Raises:
      InputError: an unknown or empty split; what `Run.objectives` raises.
    """
    objectives = run.objectives(run.singles())  # first: what the user has to confirm is asked before any work
    methods = run_methods(run)
    results = evaluate(
        methods,
        run.prompts.split(split)[:limit],
        objectives,
        task=run.prompts.name,
        split=split,
        max_new_tokens=run.config.settings.max_new_tokens,
        temperature=temperature,
        seed=seed,
        out=out,
    )
    show_problems(objectives)
    return results
