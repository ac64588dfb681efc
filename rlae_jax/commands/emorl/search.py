"""`rlae-jax emorl search`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import OmitArgPrefixes

from rlae_jax.commands.emorl.options import CodeOptions, Mode, Names
from rlae_jax.ranges import Count, GiB, Levels, Seed, ShareAbove0, Temperature

if TYPE_CHECKING:
    from rlae_jax.emorl.run import Run
    from rlae_jax.emorl.search import SearchConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How weights are searched."""

    method: Literal["hierarchical", "grid", "random", "halving", "agent"] = "hierarchical"
    """hierarchical = EMORL's grid search, grid = every point of a grid, random = random points, halving = random
    points, most of them on few prompts only, agent = train an agent that sets weights anew for every span of an
    answer."""
    levels: Levels = 5
    """of the hierarchical search."""
    beams: Count = 1
    """boxes that the hierarchical search keeps at each level. 1 = as published; 2 or 3 where scores change by jumps, as
    in mode probs: the best point may lie in a box whose corners are not the best."""
    budget: Count | None = None
    """evaluations at most; for random and halving the number of points (default: 3^M)."""
    step: ShareAbove0 = 0.1
    """of the grid."""
    space: Literal["box", "simplex"] = "box"
    """box = weights in [0, 1] each, as published, simplex = weights that sum to 1."""
    temperature: Temperature = 0.0
    """of decoding; 0 is greedy."""
    samples: Count = 1
    """answers to each prompt, at a temperature above 0."""
    seed: Seed = 0
    """of sampling, of random points, of the agent."""

    def config(self, max_new_tokens: int) -> "SearchConfig":
        """The settings of a search, of any method but agent.

        Raises:
          InputError: values that are out of range, or do not go together.
        """
        from rlae_jax.emorl.search import SearchConfig

        return SearchConfig(**vars(self), max_new_tokens=max_new_tokens)


def search(
    *,
    run: Path,
    code: Annotated[CodeOptions, OmitArgPrefixes],
    mode: Mode = "hidden",
    adapters: Names = (),
    search: Annotated[SearchOptions, OmitArgPrefixes],
    split: str = "dev",
    prompts: Count | None = None,
    iterations: Count = 60,
    span_length: Count = 1,
    memory: GiB = 2.0,
    out: Path | None = None,
    resume: bool = False,
) -> None:
    """Search the weights with which a run's adapters answer best together.

    Args:
        run: a directory that `emorl train` made.
        code: which functions of one's own may run.
        mode: what is fused: hidden = last hidden states, probs = probabilities, loglinear = log-probabilities, params =
            the adapters' own parameters.
        adapters: of the run. Default: all of one objective.
        search: how weights are searched.
        split: whose prompts are answered.
        prompts: how many of them. Default: all.
        iterations: of the agent's training.
        span_length: tokens for which the agent holds its weights.
        memory: for keys and values at once; more points are decoded one batch after another.
        out: Default: RUN/search/MODE, or RUN/search/agent.
        resume: go on with the search in OUT.
    """
    from rlae_jax import files, report
    from rlae_jax.emorl.agent import train_run_agent
    from rlae_jax.emorl.display import search_progress, show_problems, with_values
    from rlae_jax.emorl.fused import Fused
    from rlae_jax.emorl.run import AGENT, Run
    from rlae_jax.emorl.search import require_points
    from rlae_jax.emorl.search import search as search_weights

    trained = Run(run, code.objective, code.allow_code)
    files.require_place(out or run)
    names = list(adapters) or trained.singles()
    objectives = trained.objectives(names)
    config = None
    if search.method != AGENT:  # told before the base is loaded
        config = search.config(trained.config.settings.max_new_tokens)
        require_points(config, len(names))
    fused = Fused(trained.base, [trained.adapter(name) for name in names], mode)
    if config is None:
        where = out or _room(trained, AGENT, names)
        train_run_agent(
            *(trained, fused, objectives, where),
            iterations=iterations,
            span_length=span_length,
            seed=search.seed,
            resume=resume,
        )
        show_problems(objectives)
        report.say(
            f"the agent is in {report.quoted(where)}; compare it with all else: "
            f"rlae-jax emorl evaluate --run {report.quoted(run)}"
        )
        return
    asked = trained.prompts.split(split)[:prompts]
    where = out or _room(trained, mode, names)
    with search_progress(mode, config, len(names)) as on_points:
        result = search_weights(
            *(fused, asked, objectives, config, where), resume=resume, memory=int(memory * 2**30), on_points=on_points
        )
    show_problems(objectives)
    summary = result.summary()
    report.say(
        f"best of {summary.points} points, {summary.evaluations} of them decoded, on {len(asked)} {split} "
        f"prompts: {summary.score:.3f} ({with_values(summary.scores)}) at the weights "
        f"{with_values(summary.weights)}\n"
        f"in {report.quoted(where)}: search.json, points.jsonl, pictures"
    )


def _room(run: "Run", name: str, adapters: Sequence[str]) -> Path:
    from rlae_jax import report

    where, kept = run.room_for_search(name, adapters)
    if kept is not None:
        report.say(f"the earlier search, over other adapters, is now in {report.quoted(kept)}")
    return where
