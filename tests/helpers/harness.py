"""lm-evaluation-harness on two small tasks whose data lie in `tests/data/lm_eval`."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).parents[1] / "data" / "lm_eval"
TASKS = ("animals", "ways")


def copy_tasks(directory: Path) -> Path:
    """The tasks where their files name their data."""
    shutil.copytree(DATA, directory)
    for path in directory.glob("*.yaml"):
        path.write_text(path.read_text().replace("DIRECTORY", str(directory)))
    return directory


def run(lm: Any, tasks: Path, **options: Any) -> dict[str, Any]:
    """The harness's results on both."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = lm_eval.simple_evaluate(lm, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, **options)
    assert found is not None
    return found


def asked_and_told(results: dict[str, Any], task: str) -> tuple[list[str], list[list[str]], list[str], np.ndarray]:
    """The prompts of a task, their options, the letters of those that are right, and the log-probability of each."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    prompts = [sample["arguments"][0][0] for sample in samples]
    options = [[text for _, text in sample["arguments"]] for sample in samples]
    told = np.array([[response[0][0] for response in sample["resps"]] for sample in samples], float)
    return prompts, options, ["ABCD"[int(sample["target"])] for sample in samples], told
