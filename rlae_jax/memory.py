"""How much memory there is: what would take more is refused before it is begun.

bytes that are needed at least ─require─► nothing, or InputError: what, how much, what there is, what would need less
"""

import os
import shutil
from pathlib import Path

import jax
from jax.sharding import Mesh

from rlae_jax.errors import InputError

_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB", "EB")
# What limits a container's memory, in both versions of control groups.
_CONTROL_GROUP = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def shown(count: float) -> str:
    """Bytes for people: 12.3 GB."""
    power = 0
    while count >= 1000 and power < len(_UNITS) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.3g} {_UNITS[power]}"


def of_host() -> int | None:
    """Bytes that this process may have at most; None where nothing says it."""
    limits = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in _CONTROL_GROUP:
        text = path.read_text().strip() if path.is_file() else ""
        limits += [int(text)] if text.isdecimal() else []
    try:
        import resource
    except ImportError:  # not on Windows
        pass
    else:
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        limits += [limit] if limit != resource.RLIM_INFINITY else []
    return min(limits, default=None)


def of_devices(mesh: Mesh | None = None) -> int | None:
    """Bytes of the mesh's devices together, or of the first device; None where nothing says it."""
    devices = [jax.local_devices()[0]] if mesh is None else list(mesh.devices.flat)
    if devices[0].platform == "cpu":
        host = of_host()
        return None if host is None else host * len({device.process_index for device in devices})
    stats = devices[0].memory_stats() if devices[0].process_index == jax.process_index() else None
    limit = (stats or {}).get("bytes_limit")
    return None if limit is None else int(limit) * len(devices)


def require_disk(needed: int, directory: Path, what: str, remedy: str) -> None:
    """Raises an `InputError` for what a file system has no room for.

    Args:
      needed: bytes, at least.
      directory: into which they go; it need not be there yet.
      what, remedy: as in `require`.
    """
    there = next((path for path in (directory, *directory.absolute().parents) if path.is_dir()), Path("/"))
    free = shutil.disk_usage(there).free
    if needed > free:
        raise InputError(f"{what}: {shown(needed)} on disk, and {there} has {shown(free)} left; {remedy}")


def require(needed: int, what: str, remedy: str, mesh: Mesh | None = None) -> None:
    """Raises an `InputError` for what cannot be had.

    Args:
      needed: bytes, at least.
      what: what needs them.
      remedy: what would need less.
      mesh: of the devices that share it; by default there is one.
    """
    there = of_devices(mesh)
    if there is not None and needed > there:
        raise InputError(f"{what}: at least {shown(needed)} of memory, and there are {shown(there)}; {remedy}")
