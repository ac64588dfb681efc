"""Writes tests/data/reference: what transformers computes from tiny checkpoints, so that the tests need no torch.

Run it where torch is installed: `python -m tests.data.make_reference [family ...]`. For each family of `tests.data.hf`
there is `<family>.json`, how to write each case's checkpoint, and `<family>.npz`, its inputs and what `refer` gives for
them, under names `case.what`.
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.data import hf


def make_case(family: str, name: str) -> tuple[hf.Stored, dict[str, np.ndarray]]:
    """A stored case with the first seed whose texts are decided clearly and are not one token over and over."""
    kind, case = hf.FAMILIES[family].kind, hf.FAMILIES[family].cases[name]
    for seed in range(300):
        with tempfile.TemporaryDirectory() as directory:
            model, stored = hf.build(family, case, seed, Path(directory) / "checkpoint")
            inputs = hf.make_inputs(seed, kind, stored.config, stored.token_types)
            reference = hf.refer(model, kind, inputs)
        if "logits" in reference and reference["logits"].std() < 0.1:
            continue
        if kind != "encoder":
            texts = [len(set(row)) for row in reference["tokens"].tolist()]
            if reference.pop("gaps").min() < 3e-4 or min(texts) < 2 or sum(texts) < 12:
                continue
            reference["tokens"] = reference["tokens"].astype(np.int8)
        return stored, {key: value.astype(np.int8) for key, value in inputs.items()} | reference
    raise AssertionError(f"{family} {name}: no seed gives a usable reference")


def main(families: Sequence[str]) -> None:
    for family in families or hf.FAMILIES:
        cases, arrays = {}, {}
        for name in hf.FAMILIES[family].cases:
            stored, values = make_case(family, name)
            cases[name] = dataclasses.asdict(stored)
            arrays |= {f"{name}.{what}": value for what, value in values.items()}
            print(f"{family} {name}: seed {stored.seed}", flush=True)
        # One line per case: most of it is names of tensors.
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(case)}" for name, case in cases.items())
        (hf.REFERENCE / f"{family}.json").write_text(f"{{\n{lines}\n}}\n")
        np.savez_compressed(hf.REFERENCE / f"{family}.npz", **arrays)
    size = sum(path.stat().st_size for path in hf.REFERENCE.rglob("*") if path.is_file())
    print(f"{size / 1000:.0f} kB in {hf.REFERENCE}")


if __name__ == "__main__":
    main(sys.argv[1:])
