"""What a run gives to others: its adapters in PEFT's format, their weights, and one fused model."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlae_jax import files, records
from rlae_jax.emorl.fused import Fused
from rlae_jax.emorl.run import Run
from rlae_jax.emorl.search import SEARCH_FILE, read_found
from rlae_jax.errors import InputError
from rlae_jax.models import LM, lora
from rlae_jax.runs import lock

WEIGHTS_FILE = "weights.json"


@lock.writes("out", beside=True)
def export_run(
    run: Run, out: Path, mode: str = "params", weights: Sequence[float] | None = None, adapters: Sequence[str] = ()
) -> list[Path]:
    """Writes OUT/adapters/NAME, OUT/weights.json and, of mode params, OUT/model. Returns what was written.

    Args:
      weights: in [0, 1], one per adapter; by default those that the search of this mode found.

    Raises:
      InputError: OUT exists, no such search, another number of weights than adapters, all weights 0.
    """
    if out.exists():
        raise InputError(f"{out} exists already; choose another name or remove it")
    chosen = _chosen(run, mode, weights, adapters)
    names, values = list(chosen), list(chosen.values())
    loaded = [run.adapter(name) for name in names]
    fused = Fused(run.base, loaded, mode)
    fused.check([values])
    if not any(values):
        raise InputError("all weights are 0: nothing but the base would be left")
    with files.making(out) as partial:
        for name in names:
            with files.library_write(out):
                shutil.copytree(run.adapter_directory(name), files.inside(partial / "adapters", name))
        files.write_json(
            partial / WEIGHTS_FILE,
            {"schema": 1, "mode": mode, "weights": chosen, "base": records.plain(run.config.base)},
        )
        if mode == "params":
            merged = lora.merge(run.base.params, lora.stack(loaded), values)
            LM(run.base.config, merged, run.base.tokenizer, source=run.base.source).save(partial / "model")
    return sorted(out.iterdir())


def _chosen(run: Run, mode: str, weights: Sequence[float] | None, adapters: Sequence[str]) -> dict[str, Any]:
    """Adapter -> weight."""
    path = run.search_directory(mode) / SEARCH_FILE
    found = read_found(path.parent, run.targets())
    searched = None if found is None else found.weights
    if weights is None:
        if searched is None:
            raise InputError(
                f"{path} is not there: run emorl search --run {run.directory} --mode {mode}, or give --weights"
            )
        return dict(searched)
    names = list(adapters) or list(searched or run.singles())
    if len(names) != len(weights):
        raise InputError(f"{len(weights)} weights for {len(names)} adapters ({', '.join(names)})")
    chosen = dict(zip(names, map(float, weights), strict=True))
    if outside := [f"{name} {weight:g}" for name, weight in chosen.items() if not 0 <= weight <= 1]:
        raise InputError(f"each adapter's weight lies in [0, 1], not {', '.join(outside)}")
    return chosen
