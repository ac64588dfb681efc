"""What two runs of one command left, compared byte by byte but for what is declared here: how long things took, where
they ran, and the names and times that Orbax gives a checkpoint's files, of which the arrays count."""

import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

# Keys whose values are measured, not computed.
MEASURED = re.compile(r"digest|(.*_)?seconds|seconds_.*|ms_per_(token|answer)|environment")
# Of adapters a checkpoint is a means alone, and how many learned together says only how long that took.
MEANS = {"adapters", "checkpoints"}
PARTIAL = re.compile(r"\..*\.partial.*|tmp.*|.*\.orbax-checkpoint-tmp.*|rlae_jax-.*")


def content(directory: Path) -> dict[str, Any]:
    """Everything below a directory: name -> what has to be the same."""
    found: dict[str, Any] = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if "/checkpoints/" in f"/{name}":
            continue
        if path.name == "checkpoints":
            if (path.parent / "curve.png").exists() or (path.parent / "results.json").exists():
                found[name] = _checkpoint(path)
        elif path.is_file():
            found[name] = _file(path)
    return found


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> Iterator[str]:
    """What is not the same, a line each."""
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours:
            yield f"{name} is missing"
        elif name not in theirs:
            yield f"{name} should not be there"
        elif ours[name] != theirs[name]:
            yield f"{name} differs{_where(ours[name], theirs[name])}"


def leftovers(directory: Path) -> list[str]:
    """Temporary files below a directory."""
    return [str(path) for path in sorted(directory.rglob("*")) if PARTIAL.fullmatch(path.name)]


def _where(ours: Any, theirs: Any) -> str:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return f" in {', '.join(sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)))[:300]}"
    if isinstance(ours, str) and isinstance(theirs, str):
        place = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        start = max(place - 60, 0)
        return f": {ours[start : place + 40]!r} in place of {theirs[start : place + 40]!r}"
    return ""


def _file(path: Path) -> Any:
    data = path.read_bytes()
    if path.suffix == ".json":
        return json.dumps(_unmeasured(json.loads(data)))
    if path.suffix == ".jsonl":
        return "\n".join(json.dumps(_unmeasured(json.loads(line))) for line in data.splitlines())
    if path.suffix == ".md":  # a table whose last column is seconds
        return re.sub(r"\| *\d+ *\|$", "|", data.decode(), flags=re.MULTILINE)
    return data


def _unmeasured(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _unmeasured(item)
            for key, item in value.items()
            if not (MEASURED.fullmatch(key) or (key == "adapters" and isinstance(item, int)))
        }
    return [_unmeasured(item) for item in value] if isinstance(value, list) else value


def _checkpoint(path: Path) -> dict[str, bytes]:
    """Every array of the newest checkpoint. The one before, for which it would be exchanged if it were damaged, is of
    whatever iteration the run was stopped at."""
    arrays = {}
    newest = max((step for step in path.iterdir() if (step / "default").is_dir()), key=lambda step: int(step.name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # nothing says on which devices
        restored = ocp.PyTreeCheckpointer().restore(newest / "default")
    for place, leaf in _leaves(restored):
        value = np.asarray(leaf)
        arrays[f"{newest.name}{place}"] = f"{value.dtype}{value.shape}".encode() + value.tobytes()
    return arrays


def _leaves(tree: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, item in tree.items():
            yield from _leaves(item, f"{place}.{key}")
    elif isinstance(tree, list | tuple):
        for i, item in enumerate(tree):
            yield from _leaves(item, f"{place}.{i}")
    elif tree is not None:
        yield place, tree
