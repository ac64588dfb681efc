"""What all commands that train share: whose a run's directory is, which examples a step reads, how a run is stopped."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from rlae_jax import files
from rlae_jax.errors import InputError, grouped_error

CONFIG_FILE = "config.json"


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


def claim_directory(out: Path, wanted: dict[str, Any], *, resume: bool) -> None:
    """Makes sure that a run directory is new, or that it belongs to this very run and may be resumed.

    A resumed run may be longer than it was.

    Raises:
      InputError: the directory holds another run, holds this run but `resume` is False, or cannot be made.
    """
    path = out / CONFIG_FILE
    files.require_writable_parent(out)
    if path.is_file():
        kinds = [raw.get("command", "train") for raw in (wanted, files.read_json(path))]
        if kinds[0] != kinds[1]:
            raise InputError(
                f"{out} holds what the command {kinds[1]} made; choose another directory for this {kinds[0]}"
            )
        findings = [
            ("settings differ", difference)
            for difference in _differences(_plain(wanted), files.read_json(path))
            if not difference.startswith(("settings.iterations ", "settings.steps "))
        ]
        if findings:
            raise grouped_error(
                f"{out} belongs to a run with another configuration", findings, "choose another directory for this run"
            )
        if not resume:
            raise InputError(f"{out} holds this run already; resume it (--resume, resume=True) or choose another name")
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


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C into a request that is answered between iterations; a second one interrupts at once."""
    requested = False

    def request(signum: int, frame: Any) -> None:
        nonlocal requested
        if requested:
            raise KeyboardInterrupt
        requested = True
        sys.stderr.write("\nstopping after this iteration; once more stops at once\n")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = signal.signal(signal.SIGINT, request)
    try:
        yield lambda: requested
    finally:
        signal.signal(signal.SIGINT, previous)
