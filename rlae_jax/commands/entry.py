"""What `rlae-jax` starts: signals are answered from the beginning, and only then is anything large imported."""

from rlae_jax import signals


def main() -> None:
    """`rlae-jax`."""
    signals.end_at_once()
    from rlae_jax.commands.main import main as run

    run()
