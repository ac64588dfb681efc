"""What all commands that train share: whose a run's directory is, which examples a step reads, how a run is stopped."""

import contextlib
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from rlae_jax import files, hosts, sharding
from rlae_jax.errors import InputError, Interrupted, Preempted, grouped_error

CONFIG_FILE = "config.json"
_SECONDS_TO_APPEAR = 60.0
# What a resumed run may change: how long it is, where it is, and how its answers are written.
_SETTINGS = ("iterations", "steps", "engine", "slots")
MAY_DIFFER = (*(f"settings.{name} " for name in _SETTINGS), "mesh", "processes ", "checkpoints ")


def _plain(value: Any) -> Any:
    """The value as JSON gives it back: tuples become lists."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _differences(ours: Any, theirs: Any, where: str = "") -> Iterator[str]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(ours.keys() | theirs.keys()):
            yield from _differences(ours.get(key), theirs.get(key), f"{where}.{key}" if where else key)
    elif ours != theirs:
        yield f"{where} is {_short(theirs)} there and {_short(ours)} here"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def claim_directory(out: Path, wanted: dict[str, Any], *, resume: bool, shared: bool = True) -> None:
    """Makes sure that a run directory is new, or that it belongs to this very run and may be resumed.

    A resumed run may be longer than it was, and on other devices (`devices`), which a warning says. Of several
    processes the first claims, once they agree on what.

    Args:
      shared: all processes need what the first one writes.

    Raises:
      InputError: the directory holds another run, holds this run but `resume` is False, or cannot be made; processes
        that differ, or do not see the same directory.
    """
    hosts.agree(wanted)
    hosts.first(lambda: _claim(out, wanted, resume))
    blind = [i for i, sees in enumerate(hosts.gather(not shared or _appears(out / CONFIG_FILE))) if not sees]
    if blind:
        raise InputError(
            f"{out} is not one directory for all processes: {CONFIG_FILE} does not appear where process {blind[0]} "
            "runs; give one on a file system that they share"
        )


def _appears(path: Path) -> bool:
    """Whether a file that another host wrote is there: file systems may take a while to show it."""
    late = time.monotonic() + _SECONDS_TO_APPEAR
    while not path.is_file():
        if time.monotonic() > late:
            return False
        time.sleep(0.1)
    return True


def devices(mesh: dict[str, int] | None) -> dict[str, Any]:
    """What a run's configuration says of devices, on which its result does not depend.

    Args:
      mesh: of `sharding.describe`.
    """
    return {"mesh": mesh, "processes": hosts.count()}


def _on(config: dict[str, Any]) -> str:
    mesh, processes = config.get("mesh"), config.get("processes", 1)
    where = "one device" if mesh is None else f"the mesh {sharding.as_text(mesh)}"
    return where if processes == 1 else f"{where} of {processes} processes"


def _claim(out: Path, wanted: dict[str, Any], resume: bool) -> None:
    path = out / CONFIG_FILE
    files.require_writable_parent(out)
    if path.is_file():
        there = files.read_json(path)
        kinds = [raw.get("command", "train") for raw in (wanted, there)]
        if kinds[0] != kinds[1]:
            raise InputError(
                f"{out} holds what the command {kinds[1]} made; choose another directory for this {kinds[0]}"
            )
        findings = [
            ("settings differ", difference)
            for difference in _differences(_plain(wanted), there)
            if not difference.startswith(MAY_DIFFER)
        ]
        if findings:
            raise grouped_error(
                f"{out} belongs to a run with another configuration", findings, "choose another directory for this run"
            )
        if not resume:
            raise InputError(f"{out} holds this run already; resume it (--resume, resume=True) or choose another name")
        if _on(there) != _on(wanted):
            warnings.warn(f"{out} was on {_on(there)} and goes on on {_on(wanted)}", stacklevel=4)
    elif out.is_dir() and any(out.glob("*.jsonl")):
        raise InputError(f"{out} holds files of something else and no {CONFIG_FILE}; choose another directory")
    files.write_json(path, wanted)


def epoch_rows(n: int, batch: int, seed: int, iteration: int) -> Int[np.ndarray, " B"]:
    """Which examples iteration `iteration` reads: passes over all n in a fresh order each, cut into batches. The rows
    of a batch that reaches beyond a pass come from the next one."""
    places = np.arange(iteration * batch, (iteration + 1) * batch)
    rows = np.empty(batch, np.int64)
    for epoch in np.unique(places // n):
        order = np.random.default_rng((seed, int(epoch))).permutation(n)
        here = places // n == epoch
        rows[here] = order[places[here] % n]
    return rows


# Asked between iterations, by all processes at the same ones: what to raise after saving, if one is to stop.
StopRequested = Callable[[], type[Interrupted] | None]


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequested]:
    """Turns Ctrl-C, SIGTERM and preemption notices into requests that are answered between iterations, by all processes
    after the same one. A second Ctrl-C interrupts at once."""
    interrupted = preempted = False

    def interrupt(signum: int, frame: Any) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True
        sys.stderr.write("\nstopping after this iteration; once more stops at once\n")

    def preempt(signum: int, frame: Any) -> None:
        nonlocal preempted
        preempted = True
        sys.stderr.write("\nSIGTERM: stopping after this iteration\n")

    def requested() -> type[Interrupted] | None:
        told = hosts.gather([interrupted, preempted])
        if hosts.preempted() or any(of_host[1] for of_host in told):
            return Preempted
        return Interrupted if any(of_host[0] for of_host in told) else None

    if threading.current_thread() is not threading.main_thread():
        yield requested
        return
    handlers = {signal.SIGINT: interrupt, signal.SIGTERM: preempt}
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def is_late(began: float, now: float, max_minutes: float | None) -> bool:
    """Whether a run is to stop for its time; of several processes the first one's clock counts."""
    if max_minutes is None:
        return False
    late: bool = hosts.gather(now - began > 60 * max_minutes)[0]
    return late
