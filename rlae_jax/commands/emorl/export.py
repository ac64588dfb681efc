"""`rlae-jax emorl export`."""

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from rlae_jax.commands.emorl.options import Mode, Names
from rlae_jax.ranges import Share


def export(
    *,
    run: Path,
    out: Path,
    mode: Mode = "params",
    weights: Annotated[tuple[Share, ...] | None, arg(metavar="W [W ...]")] = None,
    adapters: Names = (),
) -> None:
    """Write adapters in PEFT's format, their weights in weights.json, and the fused model as a Hugging Face directory.

    OUT/model is the base under the weighted sum of the adapters' parameters (mode params), which is one model. The
    other modes read all adapters while they write: for them OUT/model is left out.

    Args:
        run: a directory that `emorl train` made.
        out: a new directory.
        mode: whose searched weights are taken: RUN/search/MODE.
        weights: others, one per adapter, in [0, 1].
        adapters: of the run, in the order of the weights. Default: those of the search, or all of one objective.
    """
    from rlae_jax import files, report
    from rlae_jax.emorl.export import export_run
    from rlae_jax.emorl.run import Run

    files.require_place(out)
    paths = export_run(Run(run), out, mode, weights, adapters)
    without = "" if mode == "params" else f"; no model, since mode {mode} reads all adapters while it writes"
    report.say(f"wrote {', '.join(map(report.quoted, paths))}{without}")
