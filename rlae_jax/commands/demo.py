"""`rlae-jax demo`."""

from pathlib import Path

from rlae_jax.ranges import Seed


def demo(*, seed: Seed = 0, out: Path = Path("runs/demo"), quick: bool = False) -> None:
    """Train two small specialists and an agent that learns when to trust which; compare with every baseline.

    Takes a few minutes on two CPU cores. What is already in OUT for this seed (specialists, agents, also half-trained
    ones) is reused; remove the directory to begin anew.

    Args:
        seed: of the specialists and of the agents.
        out: directory for everything: models, checkpoints, results.json, curve.png, weights.png.
        quick: fewer training steps, to see that everything works; scores are lower.
    """
    from rlae_jax.demo import QUICK, DemoSettings, run_demo

    run_demo(seed, out, QUICK if quick else DemoSettings())
