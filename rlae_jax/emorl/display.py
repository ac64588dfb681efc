"""What people see of a run while it is made and afterwards: progress of its training and searches, its tables."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rlae_jax import hosts, records, report
from rlae_jax.emorl.run import Run
from rlae_jax.emorl.scorers import Objective
from rlae_jax.emorl.search import SearchConfig, most_points
from rlae_jax.emorl.train import OBJECTIVES, TRAINING_FILE, Progress, Training


def with_values(values: Mapping[str, float]) -> str:
    """Names with their scores, or weights, in one line."""
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())


@contextlib.contextmanager
def training_progress(adapters: int, steps: int) -> Iterator[Callable[[Progress], None]]:
    """Shows how far so many adapters are. Yields what `train_adapters` takes as `on_progress`."""
    description = f"training {adapters} {'adapter' if adapters == 1 else 'adapters'}"
    with report.progress(description, steps, "steps") as update:
        yield lambda progress: update(max(progress.steps.values()), with_values(progress.scores))


@contextlib.contextmanager
def search_progress(mode: str, config: SearchConfig, adapters: int) -> Iterator[Callable[[int], None]]:
    """Shows how far a search is. Yields what `search` takes as `on_points`."""
    with report.progress(f"search, {mode}", most_points(config, adapters), "points") as update:
        yield lambda decoded: update(decoded, "")


def show_training(run: Run) -> None:
    """What every adapter took."""
    paths = {name: run.directory / OBJECTIVES / name / TRAINING_FILE for name in run.targets()}
    report.say(f"adapters in {report.quoted(run.directory)}:")
    taken = {name: records.plain(records.read(path, Training)) for name, path in paths.items()}
    report.console.print(report.adapters_table(taken))


def show_problems(objectives: Sequence[Objective]) -> None:
    """What went wrong with functions of one's own, and that they printed; of every process."""
    told = hosts.gather([str(objective.problems) for objective in objectives if objective.problems])
    for line in dict.fromkeys(line for own in told for line in own):
        report.say(line)


def show_results(results: Mapping[str, Any]) -> None:
    """The tables of an evaluation."""
    objectives, sampled = results["objectives"], results["sampled"]
    prompts = next(iter(results["methods"].values()))["n"]
    greedy_title = f"{results['task']}, {results['split']} split, {prompts} prompts, greedy answers"
    sampled_title = f"the same, sampled at temperature {sampled['temperature']:g}"
    report.console.print(report.objectives_table(results["methods"], objectives, greedy_title))
    report.console.print(report.objectives_table(sampled["methods"], objectives, sampled_title))
