"""Evaluation: every method on the same prompts, with intervals and tests; results.json and predictions.jsonl.

In: methods, examples, a scoring, ways to decode. Out: all answers (`answer_methods`), from which an evaluation makes
its tables. `evaluate` is that of a task: greedy answers, scored by its reward, or texts by their likelihood.
"""

import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlae_jax import ranges, report
from rlae_jax.evaluation.answers import GREEDY, Answerer, Answers, Decoding, Scoring, score_by_reward
from rlae_jax.evaluation.methods import Methods, seeds_of
from rlae_jax.evaluation.results import SCHEMA, compare_agents, method_row, predictions, rewards_of, write_results
from rlae_jax.evaluation.texts import evaluate_texts
from rlae_jax.ranges import Count
from rlae_jax.runs import lock
from rlae_jax.tasks import Examples, RewardPool, Task

# What a line of predictions.jsonl tells.
KEYS = ("method", "seed", "index", "prompt", "reference", "text", "reward", "finish_reason", "weights")


def answer_methods(
    methods: Methods, task: Task, examples: Examples, scoring: Scoring, ways: Mapping[str, Decoding]
) -> dict[str, dict[str, list[Answers]]]:
    """What every method answers, in every way of decoding: way -> method -> a list entry per seed."""
    answers: dict[str, dict[str, list[Answers]]] = {way: {} for way in ways}
    total = len(ways) * sum(len(seeds_of(method)) for method in methods.values()) * len(examples)
    done = 0
    with report.progress("evaluation", total, "answers") as update:
        for way, decoding in ways.items():
            answerer = Answerer(task, examples, scoring, decoding)
            for name, method in methods.items():
                note = name if len(ways) == 1 else f"{name}, {way}"
                answers[way][name] = []
                for one in seeds_of(method):
                    answers[way][name].append(
                        answerer.answers(one, functools.partial(_update_from, update, done, note))
                    )
                    done += len(examples)
    return answers


def _update_from(update: report.Update, before: int, note: str, done: int) -> None:
    update(before + done, note)


@lock.writes("out")
def evaluate(
    methods: Methods,
    task: Task,
    split: str = "test",
    *,
    out: Path | None = None,
    limit: Count | None = None,
) -> dict[str, Any]:
    """Runs every method on the same prompts and returns (and, with `out`, writes) the content of results.json.

    Agents, whose names begin with `rlae_`, are compared with each other method; without agents all are compared with
    `uniform`. All p-values of a table are corrected together.

    Args:
      methods: name -> method, in the order of the table. A list holds the seeds of a method, each of which may have its
        own ensemble; seed s of one is compared with seed s of another (see `statistics.paired_difference`).
      out: a run directory; `results.json` and `predictions.jsonl` are written into it.
      limit: only the split's first prompts.

    Raises:
      InputError: an unknown or empty split, prompts that do not fit.
    """
    ranges.check_arguments(evaluate, limit=limit)
    examples = task.split(split)
    if limit is not None:
        examples = examples.take(limit)
    if task.reads_texts:
        return evaluate_texts({task.cut: methods}, task, split, out=out, limit=limit)
    began = time.perf_counter()
    with RewardPool(task.reward) as pool:
        scoring = score_by_reward(pool)
        answers = answer_methods(methods, task, examples, scoring, {"greedy": GREEDY})["greedy"]
    if pool.problems:
        report.console.print(str(pool.problems), highlight=False, markup=False)
    table = {name: method_row(seeds_of(method), answers[name], scoring.objectives) for name, method in methods.items()}
    results = {
        "schema": SCHEMA,
        "task": task.name,
        "split": split,
        "methods": table,
        "differences": compare_agents({name: rewards_of(seeds) for name, seeds in answers.items()}, table),
        "seconds": {"evaluation": time.perf_counter() - began},
        "environment": report.environment(),
    }
    if out is not None:
        lines = [
            line
            for name, seeds in answers.items()
            for seed, own in enumerate(seeds)
            for line in predictions(name, seed, "greedy", examples, own, scoring.objectives, KEYS)
        ]
        write_results(out, results, lines)
    return results
