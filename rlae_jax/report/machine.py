"""Versions and hardware: what a run's results were made with."""

import platform
import sys
from pathlib import Path
from typing import Any

from rlae_jax.version import __version__


def environment() -> dict[str, Any]:
    """Versions and hardware, for a run's results."""
    import jax

    devices = jax.devices()
    return {
        "rlae_jax": __version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "backend": devices[0].platform,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "command": " ".join(Path(argument).name if i == 0 else argument for i, argument in enumerate(sys.argv)),
    }
