"""What all commands that train share: whose a run's directory is, which examples a step reads."""

import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int

from rlae_jax import files, hosts, records, sharding
from rlae_jax.errors import InputError, grouped_error, shortened

CONFIG_FILE = "config.json"
_SECONDS_TO_APPEAR = 60.0
# What a resumed run may change: how long it is, where it is, how its answers are written, what its members are called.
_SETTINGS = ("iterations", "steps", "engine", "slots", "levels", "beams", "budget")
MAY_DIFFER = (*(f"settings.{name} " for name in _SETTINGS), "mesh", "processes ", "checkpoints ", "members.name ")


class RunConfig(records.Record, kw_only=True):
    """The content of a run's config.json, by which it is known again. A command's own class is tagged with its name
    under `command`; runs of `train` have none."""

    schema: records.Schema = 1


class OnDevices(RunConfig, kw_only=True):
    """Of a run whose configuration also says where it ran, on which its result does not depend.

    Attributes:
      mesh: of `sharding.describe`.
    """

    mesh: dict[str, records.Positive] | None = None
    processes: records.Positive = 1


C = TypeVar("C", bound=RunConfig)


def read_config(directory: Path, shape: type[C]) -> C:
    """The configuration of a run.

    Args:
      shape: its command's class.

    Raises:
      InputError: there is none, it is another command's, or it is not of the shape.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise InputError(f"{directory} is not a run directory: it has no {CONFIG_FILE}")
    there = files.read_json(path)
    if (maker := _command(there)) != (wanted := command_of(shape)):
        what = "a training run" if wanted == "train" else f"a run of {wanted}"
        but = f", but of {maker}" if "command" in there else ""
        raise InputError(f"{path}: not the configuration of {what}; {directory} is no run of {wanted}{but}")
    return records.check(there, shape, path)


def made_by(directory: Path) -> str:
    """The command whose configuration a directory holds.

    Raises:
      InputError: it cannot be read.
    """
    return _command(files.read_json(directory / CONFIG_FILE))


def command_of(shape: type[RunConfig]) -> str:
    """The command whose runs a class describes."""
    return str(shape.__struct_config__.tag or "train")


def _command(there: dict[str, Any]) -> str:
    maker = there.get("command", "train")
    return maker if isinstance(maker, str) and len(maker) <= 40 else records.shown(maker)


def _differences(ours: Any, theirs: Any, where: str = "") -> Iterator[str]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(ours.keys() | theirs.keys()):
            yield from _differences(ours.get(key), theirs.get(key), f"{where}.{key}" if where else key)
    elif _are_parts(ours) and _are_parts(theirs) and len(ours) == len(theirs):
        for one, other in zip(ours, theirs, strict=True):
            yield from _differences(one, other, where)
    elif ours != theirs:
        yield f"{where} is {_short(theirs)} there and {_short(ours)} here"


def _are_parts(value: Any) -> bool:
    """Whether a value is a list of parts with keys of their own."""
    return isinstance(value, list) and bool(value) and all(isinstance(part, dict) for part in value)


def _short(value: Any) -> str:
    return shortened(repr(value), 60)


def claim_directory(out: Path, wanted: RunConfig, *, resume: bool, shared: bool = True) -> None:
    """Makes sure that a run directory is new, or that it belongs to this very run and may be resumed.

    A resumed run may be longer than it was, and on other devices (`OnDevices`), which a warning says. Of several
    processes the first claims, once they agree on what.

    Args:
      shared: all processes need what the first one writes.

    Raises:
      InputError: the directory holds another run, holds this run but `resume` is False, or cannot be made; its
        configuration is not of its shape; processes that differ, or do not see the same directory.
    """
    hosts.agree(records.plain(wanted))
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
    """The fields of `OnDevices` for a run on this mesh."""
    return {"mesh": mesh, "processes": hosts.count()}


def _on(config: OnDevices) -> str:
    where = "one device" if config.mesh is None else f"the mesh {sharding.as_text(config.mesh)}"
    return where if config.processes == 1 else f"{where} of {config.processes} processes"


def _claim(out: Path, wanted: RunConfig, resume: bool) -> None:
    path = out / CONFIG_FILE
    files.require_place(out)
    if path.is_file():
        raw = files.read_json(path)
        if (maker := _command(raw)) != (ours := command_of(type(wanted))):
            raise InputError(f"{out} holds what the command {maker} made; choose another directory for this {ours}")
        there = records.check(raw, type(wanted), path)
        findings = [
            ("settings differ", difference)
            for difference in _differences(records.plain(wanted), records.plain(there))
            if not difference.startswith(MAY_DIFFER)
        ]
        if findings:
            raise grouped_error(
                f"{out} belongs to a run with another configuration", findings, "choose another directory for this run"
            )
        if not resume:
            raise InputError(f"{out} holds this run already; resume it (--resume, resume=True) or choose another name")
        if isinstance(there, OnDevices) and isinstance(wanted, OnDevices) and _on(there) != _on(wanted):
            warnings.warn(f"{out} was on {_on(there)} and goes on on {_on(wanted)}", stacklevel=4)
    elif out.is_dir() and any(out.glob("*.jsonl")):
        raise InputError(f"{out} holds files of something else and no {CONFIG_FILE}; choose another directory")
    files.write_json(path, records.plain(wanted))


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


def is_late(began: float, now: float, max_minutes: float | None) -> bool:
    """Whether a run is to stop for its time; of several processes the first one's clock counts."""
    if max_minutes is None:
        return False
    late: bool = hosts.gather(now - began > 60 * max_minutes)[0]
    return late
