"""Ablations: a training run for every combination of settings, one table of their scores, one picture per setting.

    runs/x/config.json    what all cells have in common: decides whether a directory belongs to an ablation
          cells/NAME/     each cell is a run directory of its own; NAME is such as span_length=4,algo=mappo
          results.json    of every cell its scores per seed, their mean and interval, or why it failed
          table.md, FIELD.png

In: an ensemble, a task, settings, and several values of some of them. A cell that fails is reported and the next one
runs; a finished one is not run again.
"""

import dataclasses
import difflib
import itertools
import math
import os
import re
import time
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.markup
import rich.table

from rlae_jax import files, ranges, records, report
from rlae_jax.config import ALGORITHMS, NETWORKS, PPOConfig
from rlae_jax.errors import InputError, Interrupted, OutputError, grouped_error
from rlae_jax.evaluation import Method, evaluate
from rlae_jax.evaluation.results import RESULTS_FILE, read_results
from rlae_jax.fusion.ensemble import Ensemble
from rlae_jax.fusion.policy import BoundPolicy
from rlae_jax.ppo.train import Setup, setup, train_seeds
from rlae_jax.ranges import Count
from rlae_jax.runs import lock
from rlae_jax.runs.directory import claim_directory
from rlae_jax.statistics import t_interval
from rlae_jax.tasks import Task

# What stands for several fields at once: the algorithm is the settings' class, and an encoder goes with what is read.
ALGORITHM, ENCODER = "algo", "encoder"
ENCODERS: dict[str, tuple[str, ...]] = {
    "hidden": ("hidden", "stats", "span"),
    "text": ("text", "stats", "span"),
    "both": ("hidden", "text", "stats", "span"),
    "none": ("stats", "span"),
}
MOST_CELLS = 1_000
NOTHING = "none"  # how a command line writes None and ()
_EXPECTED = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a word"}


class AblationRun(Setup, kw_only=True, tag_field="command", tag="ablate"):
    """The content of config.json: what all cells have in common.

    Attributes:
      base: the settings that are not varied. Not called settings, of which a resumed run may have other iterations:
        cells are compared, so all have the same.
    """

    base: PPOConfig


@dataclasses.dataclass(frozen=True)
class Cell:
    """One combination of values."""

    settings: dict[str, Any]  # varied name -> value
    config: PPOConfig | None  # None where the combination is none
    error: str | None = None

    @property
    def name(self) -> str:
        """What its directory is called."""
        return re.sub(r"[^\w.+=,-]", "_", describe(self.settings))


def describe(settings: Mapping[str, Any]) -> str:
    """Settings as a command line has them: span_length=4,agent.reads=hidden+stats."""
    return ",".join(f"{name}={as_text(value)}" for name, value in settings.items())


def as_text(value: Any) -> str:
    """A value as `parse_value` reads it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "+".join(map(as_text, value)) or NOTHING
    return NOTHING if value is None else str(value)


def variable_fields(config: Any) -> dict[str, Any]:
    """What can be varied: dotted name -> type."""
    kinds = typing.get_type_hints(type(config))
    types_by_name: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            types_by_name |= {f"{field.name}.{inner}": kind for inner, kind in variable_fields(value).items()}
        else:
            types_by_name[field.name] = kinds[field.name]
    return types_by_name | ({ALGORITHM: str, ENCODER: str} if isinstance(config, PPOConfig) else {})


def require_known(names: Iterable[str], config: PPOConfig) -> None:
    """Raises an `InputError` with the nearest names if there is no such field."""
    known = list(variable_fields(config))

    def likeness(name: str, other: str) -> float:
        ends = (other, other.rpartition(".")[2])
        return max(difflib.SequenceMatcher(None, name.rpartition(".")[2][:100], end).ratio() for end in ends)

    for name in names:
        if name not in known:
            nearest = sorted(known, key=lambda other, name=name: -likeness(name, other))[:3]  # type: ignore[misc]
            raise InputError(f"no setting is called {name!r}; the nearest are {', '.join(nearest)}")


def parse_value(name: str, text: str, kind: Any) -> Any:
    """A value from a command line.

    Args:
      kind: its type, from `variable_fields`. Parts of a tuple are joined with +; "none" is None or no part.

    Raises:
      InputError: it is no such value.
    """
    options = typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
    if text == NOTHING and type(None) in options:
        return None
    (kind,) = (option for option in options if option is not type(None))
    if typing.get_origin(kind) is tuple:
        parts = [] if text == NOTHING else text.split("+")
        return tuple(parse_value(name, part, typing.get_args(kind)[0]) for part in parts)
    try:
        value = {"true": True, "false": False}[text] if kind is bool else kind(text)
    except (KeyError, ValueError):
        value = None
    if value is None or value == "" or (kind is float and not math.isfinite(value)):
        also = f" or {NOTHING}" if type(None) in options else ""
        raise InputError(f"{name}={text}: expected {_EXPECTED[kind]}{also}")
    return value


def _assignments(texts: Sequence[str], config: PPOConfig) -> dict[str, str]:
    """FIELD=TEXT as name -> text."""
    pairs = [text.partition("=") for text in texts]
    for (name, sign, _), text in zip(pairs, texts, strict=True):
        if not name or not sign:
            raise InputError(f"{text!r}: expected FIELD=VALUE, such as span_length=4")
    names = [name for name, _, _ in pairs]
    require_known(names, config)
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(f"{twice[0]} is given twice; give all its values at once, such as {twice[0]}=V1,V2")
    return {name: text for name, _, text in pairs}


def parse_vary(texts: Sequence[str], config: PPOConfig) -> dict[str, list[Any]]:
    """FIELD=V1,V2,... as name -> values.

    Raises:
      InputError: an unknown field, a value that is not of its type.
    """
    kinds = variable_fields(config)
    return {
        name: [parse_value(name, value, kinds[name]) for value in text.split(",")]
        for name, text in _assignments(texts, config).items()
    }


def parse_settings(texts: Sequence[str], config: PPOConfig) -> dict[str, Any]:
    """FIELD=VALUE as name -> value; raises as `parse_vary`."""
    kinds = variable_fields(config)
    return {name: parse_value(name, text, kinds[name]) for name, text in _assignments(texts, config).items()}


def configured(base: PPOConfig, changes: Mapping[str, Any]) -> PPOConfig:
    """The settings with some of them changed, all at once, since some are only allowed together.

    Args:
      changes: dotted name -> value; also `algo` (ppo, mappo) and `encoder` (a key of `ENCODERS`, where text and both
        may name one, as text:DIR; else it is the base's). With `agent.network` comes what belongs to that network
        (`NETWORKS`), as far as the base has what belongs to its own.

    Raises:
      InputError: an unknown name, values that do not go together.
    """
    require_known(changes, base)
    changes = dict(changes)
    algorithm = changes.pop(ALGORITHM, base.algorithm)
    if algorithm not in ALGORITHMS:
        raise InputError(f"{ALGORITHM} must be one of {', '.join(ALGORITHMS)}, not {algorithm!r}")
    if ENCODER in changes:
        kind, _, directory = changes.pop(ENCODER).partition(":")
        if kind not in ENCODERS:
            raise InputError(f"{ENCODER} must be one of {', '.join(ENCODERS)}, not {kind!r}")
        reads = ENCODERS[kind]
        chosen = {"agent.reads": reads, "agent.encoder": (directory or base.agent.encoder) if "text" in reads else None}
        both = [name for name in chosen if name in changes]
        if both:
            raise InputError(f"{ENCODER} sets {both[0]}; vary one of the two")
        changes |= chosen
    for name, value in NETWORKS.get(changes.get("agent.network", ""), {}).items():
        if getattr(base.agent, name) == NETWORKS[base.agent.network][name]:
            changes.setdefault(f"agent.{name}", value)
    config: PPOConfig = _with_changes(base, changes, ALGORITHMS[algorithm])
    return config


def _with_changes(config: Any, changes: Mapping[str, Any], kind: Callable[..., Any]) -> Any:
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for part in {name.partition(".")[0] for name in changes if "." in name}:
        inner = {name.partition(".")[2]: value for name, value in changes.items() if name.startswith(f"{part}.")}
        values[part] = _with_changes(values[part], inner, type(values[part]))
    return kind(**values | {name: value for name, value in changes.items() if "." not in name})


def make_cells(base: PPOConfig, vary: Mapping[str, Sequence[Any]]) -> list[Cell]:
    """Every combination of the values, the last name's fastest.

    Raises:
      InputError: nothing to vary, an unknown name, a value that comes twice; no combination is possible.
    """
    require_known(vary, base)
    if not vary:
        raise InputError("nothing to vary: give at least one field with values, such as --vary span_length=2,4,8")
    for name, values in vary.items():
        texts = [as_text(value) for value in values]
        if not texts or len(set(texts)) < len(texts):
            raise InputError(f"{name} needs one or more different values, not {','.join(texts) or 'none'}")
    count = math.prod(map(len, vary.values()))
    if count > MOST_CELLS:
        raise InputError(
            f"{count:,} combinations, of which {MOST_CELLS:,} can be trained; give fewer values of some field"
        )
    cells = []
    for values in itertools.product(*vary.values()):
        settings = dict(zip(vary, values, strict=True))
        try:
            cells.append(Cell(settings, configured(base, settings)))
        except InputError as error:
            cells.append(Cell(settings, None, _reason(error)))
    if all(cell.config is None for cell in cells):
        raise _all_failed([(cell.name, cell.error or "") for cell in cells])
    return cells


def _reason(error: Exception) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}".rstrip(": ")


def _all_failed(reasons: Sequence[tuple[str, str]]) -> InputError:
    return grouped_error("every cell failed", [("cells", f"{name}: {reason}") for name, reason in reasons])


def interval_over_seeds(scores: Sequence[float]) -> tuple[float, float]:
    """`t_interval` of the mean over two or more seeds, bounded, as rewards are, by 0 and 1."""
    low, high = t_interval(scores)
    return max(low, 0.0), min(high, 1.0)


@lock.writes("out")
def ablate(
    ensemble: Ensemble,
    task: Task,
    base: PPOConfig,
    vary: Mapping[str, Sequence[Any]],
    out: str | os.PathLike[str] = "runs/ablate",
    *,
    split: str = "dev",
    limit: Count | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Trains and scores agents under every combination of some settings; returns the content of results.json.

    Each cell trains `base.seeds` agents side by side and answers the split's prompts greedily with each of them.

    Args:
      base: the settings that are not varied.
      vary: dotted name of a field -> values, e.g. {"span_length": [2, 4], "agent.reads": [("stats",), ("hidden",)]};
        see `configured` for `algo` and `encoder`.
      out: the ablation's directory.
      split, limit: which prompts are answered; make choices on dev.
      resume: go on with the ablation in `out` (or begin it); finished cells are kept, failed ones tried again.

    Raises:
      InputError: settings that no cell can have, a directory of something else; every cell failed.
      Interrupted: Ctrl-C while a cell was trained; `resume=True` goes on from there.
    """
    ranges.check_arguments(ablate, limit=limit)
    out = Path(out)
    if task.by_likelihood:
        raise InputError(f"an ablation scores written answers; give {task.name} a reward of texts, not likelihood")
    cells = make_cells(base, vary)
    examples = task.split(split)
    n = len(examples if limit is None else examples.take(limit))
    span_length, max_new_tokens = base.span_length or task.span_length, base.max_new_tokens or task.max_new_tokens
    spec = ensemble.spec(span_length=span_length, max_new_tokens=max_new_tokens)
    base = dataclasses.replace(
        base, span_length=span_length, max_new_tokens=max_new_tokens, eval_prompts=base.dev_prompts
    )
    shared = AblationRun(**setup(ensemble, [task], base, spec), base=base)
    claim_directory(out, shared, resume=resume)
    for cell in (cell for cell in cells if cell.error is not None):
        report.say(f"{cell.name} cannot run: {cell.error}")

    results: dict[str, Any] = {
        "schema": 1,
        "task": task.name,
        "split": split,
        "n": n,
        "seeds": [base.seed + e for e in range(base.seeds)],
        "vary": {name: list(values) for name, values in vary.items()},
        "base": records.plain(base),
        "cells": [],
        "seconds": {},
        "environment": report.environment(),
    }
    began = time.perf_counter()
    seconds_per_cell: list[float] = []
    for i, cell in enumerate(cells):
        record, seconds = _train_or_reuse(cell, ensemble, task, split, n, out, f"cell {i + 1} of {len(cells)}")
        results["cells"].append(record)
        seconds_per_cell += [] if seconds is None else [seconds]
        if cell.config is not None:
            _print_cell(record, sum(later.config is not None for later in cells[i + 1 :]), seconds_per_cell)
        results["seconds"] = {"total": time.perf_counter() - began}
        _write(out, results)
    if all(record["error"] is not None for record in results["cells"]):
        raise _all_failed([(record["name"], record["error"]) for record in results["cells"]])
    return results


def _train_or_reuse(
    cell: Cell, ensemble: Ensemble, task: Task, split: str, n: int, out: Path, place: str
) -> tuple[dict[str, Any], float | None]:
    """A cell's record in results.json, and how long it took if it was run now."""
    directory = out / "cells" / cell.name
    record: dict[str, Any] = {
        "name": cell.name,
        "directory": f"cells/{cell.name}",
        "settings": cell.settings,
        "score": None,
        "ci95": None,
        "per_seed": [],
        "seconds": 0.0,
        "error": cell.error,
    }
    if cell.config is None:
        return record, None
    finished = _finished(directory, split, n)
    if finished is not None:
        return record | _scores(finished), None
    began = time.perf_counter()
    try:
        record |= _scores(_run(cell, ensemble, task, split, n, directory, place))
    except (Interrupted, OutputError):  # the others could not be written either
        raise
    except Exception as error:  # whatever went wrong here, other cells may well run
        record |= {"error": _reason(error), "seconds": time.perf_counter() - began}
    return record, time.perf_counter() - began


def _run(cell: Cell, ensemble: Ensemble, task: Task, split: str, n: int, directory: Path, place: str) -> dict[str, Any]:
    """Trains a cell's agents, or takes up where an earlier call stopped, and scores them as a run's results.json."""
    began = time.perf_counter()
    config = cell.config
    assert config is not None
    with report.training_progress(f"{place}, {cell.name}", config.iterations) as display:
        policies: list[BoundPolicy] = train_seeds(ensemble, task, config, directory, resume=True, on_progress=display)
    if config.max_new_tokens is not None:
        task = dataclasses.replace(task, max_new_tokens=config.max_new_tokens)
    seeds = [Method(ensemble, policy) for policy in policies]
    results = evaluate({config.method: seeds}, task, split, out=directory, limit=n)
    results["seconds"]["total"] = time.perf_counter() - began
    files.write_json(directory / "results.json", results)
    return results


def _finished(directory: Path, split: str, n: int) -> dict[str, Any] | None:
    """The results.json of a cell that was scored on these prompts.

    Raises:
      InputError: it is not of its shape, or has several methods.
    """
    path = directory / RESULTS_FILE
    if not path.is_file():
        return None
    results = read_results(directory)
    if len(results.methods) != 1:
        raise InputError(f"{path}: methods has {len(results.methods)} entries; expected a cell's agent alone")
    same = results.split == split and all(method["n"] == n for method in results.methods.values())
    # `evaluate` writes first, and the total comes last.
    done: dict[str, Any] = records.plain(results)
    return done if same and "total" in results.seconds else None


def _scores(results: Mapping[str, Any]) -> dict[str, Any]:
    """A cell's part in the ablation's results.json, from its own."""
    (method,) = results["methods"].values()
    scores = method["per_seed"]
    return {
        "score": method["score"],
        "ci95": list(interval_over_seeds(scores)) if len(scores) > 1 else method["ci95"],
        "per_seed": scores,
        "seconds": results["seconds"]["total"],
    }


def _print_cell(record: Mapping[str, Any], left: int, seconds_per_cell: Sequence[float]) -> None:
    """A line for a cell that is done with, and how long the others will take."""
    if record["error"] is not None:
        line = f"{record['name']} failed: {record['error']}"
    else:
        low, high = record["ci95"]
        line = f"{record['name']}: {record['score']:.3f} ({low:.3f} to {high:.3f}), {record['seconds']:.0f} s"
    if left and seconds_per_cell:
        line += f"; {left} more to run, about {np.mean(seconds_per_cell) * left / 60:.0f} min"
    report.say(line)


def _rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The table: its head and a row per cell."""
    rows = []
    for cell in results["cells"]:
        score, interval = "failed", ""
        if cell["error"] is None:
            score, interval = f"{cell['score']:.3f}", "{:.3f} to {:.3f}".format(*cell["ci95"])
        rows.append([*map(as_text, cell["settings"].values()), score, interval, f"{cell['seconds']:.0f}"])
    return [*results["vary"], "score", "95% interval", "seconds"], rows


def _notes(results: Mapping[str, Any]) -> list[str]:
    """What a reader of the table has to know: what it shows, and why cells failed."""
    seeds = len(results["seeds"])
    of_what = f"mean of {seeds} seeds, interval over the seeds" if seeds > 1 else "one seed, interval over the prompts"
    failed = [f"{cell['name']} failed: {cell['error']}" for cell in results["cells"] if cell["error"] is not None]
    return [f"{results['task']}, {results['n']} prompts of {results['split']}; {of_what} (95%).", *failed]


def table(results: Mapping[str, Any]) -> rich.table.Table:
    """The cells of a results.json, in order."""
    table = rich.table.Table(caption="\n".join(map(rich.markup.escape, _notes(results))), caption_justify="left")
    head, rows = _rows(results)
    for column in head:
        table.add_column(column, justify="left" if column in results["vary"] else "right")
    best = max((cell["score"] for cell in results["cells"] if cell["error"] is None), default=None)
    for cell, row in zip(results["cells"], rows, strict=True):
        table.add_row(*row, style="bold" if cell["error"] is None and cell["score"] == best else None)
    return table


def _markdown(results: Mapping[str, Any]) -> str:
    table = report.markdown_table(*_rows(results), left=len(results["vary"]))
    return "\n".join([table, "", *(f"- {note}" for note in _notes(results)), ""])


def lines_over(results: Mapping[str, Any], field: str) -> dict[str, list[tuple[float, float, float] | None]]:
    """What a field's picture shows: a line per combination of the other fields, with (score, low, high) for each of the
    field's values, or None where the cell failed. Of more lines than can be told apart, their mean and range."""
    values = results["vary"][field]
    lines: dict[str, list[tuple[float, float, float] | None]] = {}
    for cell in results["cells"]:
        others = describe({name: value for name, value in cell["settings"].items() if name != field})
        line = lines.setdefault(others, [None] * len(values))
        if cell["error"] is None:
            line[values.index(cell["settings"][field])] = (cell["score"], *cell["ci95"])
    if len(lines) <= len(report.COLOURS):
        return lines
    known = [[point[0] for point in column if point] for column in zip(*lines.values(), strict=True)]
    summary = [(float(np.mean(scores)), min(scores), max(scores)) if scores else None for scores in known]
    return {f"mean of {len(lines)} settings, lowest to highest": summary}


def _write(out: Path, results: Mapping[str, Any]) -> None:
    """Everything that is known so far."""
    files.write_json(out / "results.json", results)
    files.write_text(out / "table.md", _markdown(results))
    for field, values in results["vary"].items():
        report.scores_over(
            out / f"{field}.png",
            [as_text(value) for value in values],
            lines_over(results, field),
            field,
            f"{results['task']}, {results['split']}",
        )
