"""`rlae-jax emorl demo`."""

from pathlib import Path

from rlae_jax.ranges import Seed


def demo(*, seed: Seed = 0, out: Path = Path("runs/emorl-demo"), quick: bool = False) -> None:
    """The whole method in a few minutes on two CPU cores: a small base model, three objectives, a search, a table.

    What is already in OUT for this seed is reused; remove the directory to begin anew.

    Args:
        seed: of everything random.
        out: directory for everything: models, adapters, searches, results.json, pictures.
        quick: fewer training steps, to see that everything works; scores are lower.
    """
    from rlae_jax.emorl.demo import run_demo

    run_demo(seed, out, quick)
