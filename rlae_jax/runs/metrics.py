"""The metrics of a run: one JSON object per line of `metrics.jsonl`, each with the iteration that it belongs to.

They may also go elsewhere: to TensorBoard (RUN/tensorboard) and to Weights & Biases (project rlae_jax), each of which
needs a package of its own, imported only then.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypedDict, runtime_checkable

from rlae_jax import files, hosts, records
from rlae_jax.errors import InputError

FILE_NAME = "metrics.jsonl"
WANDB_RUN_FILE = "wandb-run.json"


class Line(TypedDict):
    """What every line has. Beside it there are numbers under any names, lists of them, and numbers by name."""

    iteration: records.Count


_Values = dict[str, bool | int | float | list[float] | dict[str, float]]


class WandbRun(records.Record, kw_only=True):
    """The content of wandb-run.json: as which run of Weights & Biases this one goes on."""

    schema: records.Schema = 1
    id: str


def read_metrics(directory: Path, shape: Any = Line) -> list[dict[str, Any]]:
    """All complete lines, none where there is no file; a last line that a killed process left unfinished is dropped.

    Args:
      shape: a `TypedDict` of what is used of a line.

    Raises:
      InputError: the file cannot be read, or a line of it is something else.
    """
    path = directory / FILE_NAME
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = records.read_lines(path, _Values, growing=True)
    for i, row in enumerate(rows, 1):
        records.check(row, shape, f"{path}:{i}")
    return rows


@runtime_checkable
class Sink(Protocol):
    """Where metrics go besides the file."""

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, module: ModuleType, directory: Path, iteration: int):
        # What an interrupted run wrote after its last checkpoint is hidden.
        self._writer = module.SummaryWriter(str(directory / "tensorboard"), purge_step=iteration + 1)

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, iteration)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, module: ModuleType, directory: Path, iteration: int):
        del iteration  # the server leaves out steps that it has; a resumed run repeats them with the same values
        known, config = directory / WANDB_RUN_FILE, directory / "config.json"
        self._run = module.init(
            project="rlae_jax",
            name=directory.name,
            dir=str(directory),
            id=records.read(known, WandbRun).id if known.is_file() else None,
            resume="allow",
            config=files.read_json(config) if config.is_file() else None,
        )
        files.write_json(known, records.plain(WandbRun(id=self._run.id)))

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=iteration)

    def close(self) -> None:
        self._run.finish()


# name -> (module that it needs, what to make of it)
SINKS: dict[str, tuple[str, Callable[[ModuleType, Path, int], Sink]]] = {
    "tensorboard": ("tensorboardX", _TensorBoard),
    "wandb": ("wandb", _Wandb),
}


def load_sinks(names: Iterable[str]) -> dict[str, ModuleType]:
    """The modules of sinks. Call it before long work.

    Raises:
      InputError: an unknown name, a package that is not installed.
    """
    modules = {}
    for name in names:
        if name not in SINKS:
            raise InputError(f"metrics cannot go to {name!r}; known: {', '.join(SINKS)}")
        module = SINKS[name][0]
        try:
            modules[name] = importlib.import_module(module)
        except ImportError as error:
            raise InputError(
                f"{name} needs the package {module} ({error}); install it with: pip install 'rlae_jax[log]'"
            ) from error
    return modules


def scalars_of(values: Mapping[str, Any]) -> dict[str, float]:
    """Each number under its name, and of a list each item as name/0, name/1, ..., of numbers by name as name/NAME."""
    scalars: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, list | tuple):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            scalars |= {f"{name}/{part}": float(item) for part, item in value.items()}
        else:
            scalars[name] = float(value)
    return scalars


class MetricsLog:
    """Appends to a run's metrics. Opening it for iteration i forgets what an interrupted run wrote after i. Of several
    processes the first one writes.

    Args:
      sinks: names of `SINKS` to which every line goes as well.

    Raises:
      InputError: a sink cannot be used; the file is untouched then.
    """

    def __init__(self, directory: Path, iteration: int, sinks: Iterable[str] = ()):
        modules = load_sinks(sinks)
        self._file: files.GrowingFile | None = None
        self._sinks: list[Sink] = []
        if not hosts.is_first():
            return
        kept = [row for row in read_metrics(directory) if row["iteration"] <= iteration]
        files.write_json_lines(directory / FILE_NAME, kept)
        self._file = files.GrowingFile(directory / FILE_NAME)
        self._sinks = [SINKS[name][1](module, directory, iteration) for name, module in modules.items()]

    def write(self, iteration: int, values: Mapping[str, Any]) -> None:
        """One line, on disk when this returns."""
        if self._file is None:
            return
        self._file.write(files.json_line({"iteration": iteration, **values}))
        for sink in self._sinks:
            sink.write(iteration, scalars_of(values))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        for sink in self._sinks:
            sink.close()
