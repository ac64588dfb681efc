"""The metrics of a run: one JSON object per line of `metrics.jsonl`, each with the iteration that it belongs to."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlae_jax import files

FILE_NAME = "metrics.jsonl"


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """All complete lines; a last line that a killed process left unfinished is dropped."""
    path = directory / FILE_NAME
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class MetricsLog:
    """Appends to a run's metrics. Opening it for iteration i forgets what an interrupted run wrote after i."""

    def __init__(self, directory: Path, iteration: int):
        kept = [row for row in read_metrics(directory) if row["iteration"] <= iteration]
        files.write_json_lines(directory / FILE_NAME, kept)
        self._file = (directory / FILE_NAME).open("a", encoding="utf-8")

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        """One line, on disk when this returns."""
        self._file.write(json.dumps({"iteration": iteration, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
