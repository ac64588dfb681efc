"""`rlae-jax lm-eval`."""

from pathlib import Path
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, arg

from rlae_jax.commands.options import ModelOptions
from rlae_jax.errors import InputError, one_line
from rlae_jax.ranges import Count, CountOr0, Weight
from rlae_jax.runs import lock


@lock.writes("out", beside=True)
def lm_eval(
    *,
    model: Annotated[ModelOptions, OmitArgPrefixes],
    tasks: Annotated[tuple[str, ...], arg(metavar="TASK [TASK ...]")],
    weights: Annotated[tuple[Weight, ...] | None, arg(metavar="W [W ...]")] = None,
    policy: Annotated[str | None, arg(metavar="RUN|NAME")] = None,
    include_path: Path | None = None,
    num_fewshot: CountOr0 | None = None,
    limit: Count | None = None,
    batch_size: Count = 32,
    apply_chat_template: bool = False,
    out: Path | None = None,
) -> None:
    """Evaluate models that write together on tasks of lm-evaluation-harness, which are taken as they are.

    Needs the package lm-eval: pip install 'rlae-jax[eval]'. From other programs the same model is `--model rlae_jax`,
    once rlae_jax.lm_eval is imported.

    Args:
        model: which models, and how they are fused.
        tasks: names of the harness's tasks or groups, or patterns such as mmlu_*.
        weights: one per model, e.g. 1 2 (scaled to sum to 1). Default: equal weights.
        policy: a run directory whose trained agent sets the weights; or the name of a policy that needs no training.
        include_path: a directory with tasks of your own.
        num_fewshot: examples before each question. Default: the tasks'.
        limit: only the first so many questions of each task.
        batch_size: prompts that are answered together; scoring makes its own batches.
        apply_chat_template: prompts go through the models' chat template.
        out: a file for the results, JSON.
    """
    try:
        import lm_eval as harness
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError as error:
        raise InputError(f"this needs lm-eval ({error}): pip install 'rlae-jax[eval]'") from None
    from rlae_jax import files, report
    from rlae_jax.lm_eval import EnsembleLM

    if weights is not None and policy is not None:
        raise InputError("give either --weights or --policy")
    if include_path is not None and not include_path.is_dir():
        raise InputError(f"--include-path {include_path}: no such directory")
    if out is not None:
        files.require_place(out, "file")

    class Tasks(TaskManager):  # type: ignore[misc]  # the harness has no annotations that are checked
        """A task whose own files or packages are at fault is the user's to mend."""

        def load(self, *given: Any, **options: Any) -> Any:
            try:
                return super().load(*given, **options)
            except OSError:
                raise
            except Exception as error:  # tasks of others raise anything
                raise InputError(f"the tasks {', '.join(tasks)} cannot be made: {one_line(error)}") from None

    manager = Tasks(include_path=None if include_path is None else str(include_path))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown or not tasks:
        raise InputError(f"unknown tasks: {', '.join(unknown)}; lm-eval ls tasks lists them" if tasks else "no tasks")
    with report.waiting(f"loading {', '.join(model.models)}"):
        lm = EnsembleLM(model.load(), weights=weights, policy=policy, batch_size=batch_size)
    try:
        results: dict[str, Any] = harness.simple_evaluate(
            lm,
            tasks=manager.match_tasks(list(tasks)),
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=apply_chat_template,
            log_samples=False,
        )
    except OSError as error:  # also what the Hub's and datasets' libraries raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(
            f"the data of {', '.join(tasks)} cannot be read: {reason} (data come from the Hub or its cache; "
            "--include-path takes tasks with files of your own)"
        ) from None
    print(make_table(results))
    if "groups" in results:
        print(make_table(results, "groups"))
    if out is not None:
        kept = ("results", "groups", "n-shot", "n-samples", "versions", "higher_is_better")
        found = {name: results[name] for name in kept if name in results}
        told = {"members": [one.name for one in lm.ensemble.members], "fusion": model.fusion, "weights": weights}
        files.write_json(out, {"schema": 1, "command": "lm-eval", **told, "policy": policy, **found})
