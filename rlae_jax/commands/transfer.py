"""`rlae-jax transfer`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, UseAppendAction, arg

from rlae_jax.commands.options import AgentOptions, Dtype, ModelOptions, TasksOptions
from rlae_jax.ranges import Count
from rlae_jax.runs import lock


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferModels(ModelOptions):
    """Which models, and how they are fused."""

    fusion: Literal["linear", "loglinear"] = "linear"
    """linear = mean of probabilities, loglinear = weighted mean of log-probabilities."""
    dtype: Dtype = "float32"
    """of the members' parameters."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferOptions(AgentOptions):
    """How all agents are trained."""

    prompts: Count | None = None
    """prompts per rollout, of all its tasks together. Default: the preset's."""
    seeds: Count = 1
    """agents per run, of seeds SEED, SEED + 1, ..., trained side by side."""


@lock.writes("out")
def transfer(
    *,
    model: Annotated[TransferModels, OmitArgPrefixes],
    out: Path,
    task: Annotated[TasksOptions, OmitArgPrefixes],
    settings: Annotated[
        tuple[tuple[str, ...], ...], UseAppendAction, arg(name="set", metavar="FIELD=VALUE [...]")
    ] = (),
    training: Annotated[TransferOptions, OmitArgPrefixes],
    split: Literal["train", "dev", "test"] = "test",
    limit: Count | None = None,
    resume: bool = False,
) -> None:
    """See whether agents carry over: leave each of some tasks out in turn, train on all others, and test on it.

    All tasks are answered by the same models. On each of them the agents that were trained on the others are compared
    with the fixed weights that are best on it (searched on its own training prompts), with equal weights, and with
    agents that were trained on it alone. An example: --task skills overlap noisy trains on two and tests on the third,
    three times. Of N tasks that is 2 N training runs. Ctrl-C saves and says how to go on.

    Args:
        model: which models, and how they are fused.
        out: the directory of all of it: results.json, table.md, transfer.png (who was trained on what, tested on what),
            a training run each in runs/, an evaluation of each task in tasks/.
        task: two or more, as --task A B C.
        settings: a setting of all runs with its value, such as span_length=4 or agent.projection=16; any of a run's
            config.json.
        training: how all agents are trained.
        split: which prompts are scored. Choices are made on dev; read test once.
        limit: only the first so many prompts of the split.
        resume: go on with what is in OUT. Runs and evaluations that are done are kept.
    """
    from rlae_jax import files, report
    from rlae_jax.ablate import configured, parse_settings
    from rlae_jax.evaluation.transfer import leave_one_out, left_out_table

    files.require_place(out)
    base = training.config()
    base = configured(base, parse_settings([text for texts in settings for text in texts], base))
    asked = task.load_all()
    ensemble = model.load()
    asked = [task.select(one, ensemble) for one in asked]
    results = leave_one_out(ensemble, asked, base, out, split=split, limit=limit, resume=resume)
    report.console.print(left_out_table(results))
    report.say(f"in {report.quoted(out)}: table.md, results.json, transfer.png")
