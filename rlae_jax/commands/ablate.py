"""`rlae-jax ablate`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, UseAppendAction, arg

from rlae_jax.commands.options import AgentOptions, Dtype, ModelOptions, TaskFlags
from rlae_jax.ranges import Count
from rlae_jax.runs import lock

Assignments = Annotated[tuple[tuple[str, ...], ...], UseAppendAction]  # --vary A --vary B C


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblateModels(ModelOptions):
    """Which models, and how they are fused."""

    fusion: Literal["linear", "loglinear", "hidden"] = "linear"
    """linear = mean of probabilities, loglinear = weighted mean of log-probabilities, hidden = sum of last hidden
    states, for --adapters."""
    dtype: Dtype = "float32"
    """of the members' parameters."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblateOptions(AgentOptions):
    """How all agents are trained."""

    seeds: Count = 3
    """agents per cell, of seeds SEED, SEED + 1, ..., trained side by side. With two or more, intervals are over the
    seeds; with one, over prompts."""


@lock.writes("out")
def ablate(
    *,
    model: Annotated[AblateModels, OmitArgPrefixes],
    out: Path,
    task: TaskFlags,
    vary: Annotated[Assignments, arg(metavar="FIELD=V1,V2,... [...]")] = (),
    settings: Annotated[Assignments, arg(name="set", metavar="FIELD=VALUE [...]")] = (),
    training: Annotated[AblateOptions, OmitArgPrefixes],
    split: Literal["train", "dev", "test"] = "dev",
    limit: Count | None = None,
    resume: bool = False,
) -> None:
    """Train agents under every combination of some settings, and compare their scores.

    Each combination is a training run of its own (a cell). Afterwards there are one table of the scores with 95%
    intervals and one picture per varied setting. A cell that fails is reported and the others still run. Ctrl-C saves
    and says how to go on. An example: --vary span_length=2,4,8 --vary encoder=hidden,none trains six cells.

    Args:
        model: which models, and how they are fused.
        out: the ablation's directory: results.json, table.md, a picture FIELD.png per setting, a run per cell.
        task: what the agents are trained on.
        vary: a setting and its values with commas between them. Any setting of a run's config.json: span_length=2,4,8;
            those of the agent's network as agent.NAME, such as agent.network=joint,set. Parts of one value are joined
            with +, as in agent.reads=hidden+span,stats; none is no value. Also algo=ppo,mappo, and
            encoder=hidden,text:MODEL,both:MODEL,none, what the agent reads: the members' hidden states, a text encoder,
            both, or neither.
        settings: a setting that all cells have, with its value, such as prompts=256.
        training: how all agents are trained.
        split: which prompts are scored. Choices are made on dev; read test once.
        limit: only the first so many prompts of the split.
        resume: go on with the ablation in OUT. Finished cells are kept, failed ones tried again; --vary may have
            further values.
    """
    from rlae_jax import files, report
    from rlae_jax.ablate import ablate, configured, make_cells, parse_settings, parse_vary, table

    files.require_place(out)
    base = training.config()
    base = configured(base, parse_settings([text for texts in settings for text in texts], base))
    values = parse_vary([text for texts in vary for text in texts], base)
    make_cells(base, values)  # tells now, not after reading gigabytes
    asked = task.load()
    ensemble = model.load()
    asked = task.select(asked, ensemble)
    results = ablate(ensemble, asked, base, values, out, split=split, limit=limit, resume=resume)
    report.console.print(table(results))
    pictures = ", ".join(f"{field}.png" for field in values)
    report.say(f"in {report.quoted(out)}: table.md, results.json, {pictures}")
