"""What `rlae-jax` starts: signals are answered from the beginning, and only then is anything large imported."""

import os
import sys
import weakref

from rlae_jax import signals


def main() -> None:
    """`rlae-jax`."""
    signals.end_at_once()
    from rlae_jax.commands.main import main as run

    try:
        run()
    except SystemExit as ended:
        if not isinstance(ended.__context__, KeyboardInterrupt):
            raise
        weakref.finalize._exitfunc()  # type: ignore[attr-defined]  # ends workers, removes what they have
        # Programs may still be running on the device's threads, and crash where Python takes itself down around them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended.code if isinstance(ended.code, int) else signals.STOPPED)
