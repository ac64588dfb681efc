"""`rlae-jax specialists`."""

import shlex
from pathlib import Path
from typing import Literal

from rlae_jax.ranges import Seed


def specialists(
    *,
    task: Literal["skills", "overlap", "skills3", "mixed", "noisy", "twins", "dominant", "circle"],
    out: Path = Path("runs/specialists"),
    seed: Seed = 0,
    quick: bool = False,
) -> None:
    """Train the three small models that an embedded task is for, in about a minute on two CPU cores.

    Models that are in OUT already are not trained again; tasks share some.

    Args:
        task: skills = each prompt asks for operations of different members; overlap = who is right depends on the
            digits; skills3 = three operations, spans end in the middle of them; mixed = as skills3, members with
            different tokenizers; noisy = one member is surely wrong on odd first digits; twins, dominant = no dynamic
            weights can help; circle = six tasks for the same members, to train on some and test on others.
        out: a directory for the models.
        seed: of everything random.
        quick: half as many steps.
    """
    from rlae_jax import report
    from rlae_jax.specialists import POOL, build_pool
    from rlae_jax.tasks.embedded import CIRCLE

    paths = build_pool(out, seed, POOL[task], quick)
    members, run = shlex.join(str(paths[name]) for name in POOL[task]), f"runs/{task}"
    if task == "circle":
        options = f"--task {' '.join(CIRCLE)} --models {members} --prompts 256 --iterations 60 --out {run}"
        report.say(
            f"Train agents on all tasks but one, for each of them, and test them there:\n  rlae-jax transfer {options}"
        )
        return
    report.say(
        f"Train an agent for them, and compare it with every baseline:\n"
        f"  rlae-jax train --task {task} --models {members} --prompts 256 --iterations 60 --out {run}\n"
        f"  rlae-jax evaluate --task {task} --models {members} --policy {run} --methods all --out {run}-test"
    )
