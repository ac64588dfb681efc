"""What imports what: no circle among modules, rooms that know only the rooms below them, tests that share by helpers.

Imports inside functions count, as an arrow is an arrow whenever it is followed; those for type checkers do not.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Every room of the package and the rooms that its modules may import, as in ARCHITECTURE.md. A room is a folder or a
# file directly under rlae_jax; the package itself ("") is its public API, for commands and users alone.
LEAVES = {
    "caches",
    "digests",
    "compilation",
    "errors",
    "files",
    "hlo",
    "hosts",
    "memory",
    "ranges",
    "records",
    "schedules",
    "sharding",
    "signals",
    "statistics",
    "version",
    "worker_script",
    "workers",
}
LOW = LEAVES | {"runs", "report"}
MAY_IMPORT: dict[str, set[str]] = {
    "compilation": set(),
    "version": set(),
    "errors": set(),
    "memory": {"errors"},
    "ranges": {"errors"},
    "schedules": set(),
    "digests": {"errors"},
    "files": {"digests", "errors", "hosts"},
    "records": {"digests", "errors", "files"},
    "caches": {"errors", "files"},
    "worker_script": set(),
    "workers": {"errors", "worker_script"},
    "hosts": {"errors", "ranges"},
    "hlo": set(),
    "sharding": {"errors", "ranges"},
    "signals": {"errors", "hosts"},
    "statistics": {"errors"},
    "models": LEAVES,
    "tasks": LEAVES,
    "runs": LEAVES,
    "report": LEAVES | {"runs"},
    "fusion": LEAVES | {"models"},
    "config": {"errors", "fusion", "ranges"},
    "specialists": LOW | {"models", "tasks"},
    "inspect_members": LOW | {"models", "fusion"},
    "ppo": LOW | {"config", "models", "fusion", "tasks"},
    "evaluation": LOW | {"config", "models", "fusion", "tasks", "ppo"},
    "serving": LOW | {"config", "models", "fusion", "ppo"},
    "planning": LOW | {"config", "models", "fusion", "ppo"},
    "ablate": LOW | {"config", "models", "fusion", "tasks", "ppo", "evaluation"},
    "emorl": LOW | {"config", "models", "fusion", "tasks", "ppo", "evaluation"},
    "demo": LOW | {"config", "models", "fusion", "tasks", "ppo", "evaluation", "specialists"},
    "lm_eval": LOW | {"config", "models", "fusion", "ppo"},
    "": {"config", "errors", "fusion", "models", "ppo", "serving", "sharding", "version"},
}
MAY_IMPORT["commands"] = set(MAY_IMPORT)
MAY_IMPORT["__main__"] = {"commands"}


def is_for_type_checkers(node: ast.AST) -> TypeGuard[ast.If]:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def import_statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The node's and those below it, functions included, but for what only type checkers see."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node
    for child in node.orelse if is_for_type_checkers(node) else ast.iter_child_nodes(node):
        yield from import_statements(child)


def import_graph(package: str, root: Path = ROOT) -> dict[str, set[str]]:
    """Every module of the package and the modules of the package that it imports.

    A package's `__init__` is the module that has the package's name. `from a import b` leads to `a.b` where that is a
    module, and otherwise to `a`.
    """
    paths = {}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph = {}
    for module, path in paths.items():
        names: list[str] = []
        for statement in import_statements(ast.parse(path.read_text())):
            if isinstance(statement, ast.Import):
                names += [alias.name for alias in statement.names]
            else:
                assert statement.level == 0, f"{path}: a relative import"
                inside = [f"{statement.module}.{alias.name}" for alias in statement.names]
                names += [name if name in paths else str(statement.module) for name in inside]
        graph[module] = {name for name in names if name in paths}
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of some circle, in order; [] if there is none."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module not in done:
            for other in sorted(graph[module]):
                if round_trip := walk(other, [*path, module]):
                    return round_trip
            done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := walk(module, []))), [])


def room(module: str) -> str:
    return module.partition(".")[2].partition(".")[0]


@pytest.fixture(scope="module")
def package() -> dict[str, set[str]]:
    return import_graph("rlae_jax")


def test_no_module_imports_itself_in_the_end(package: dict[str, set[str]]) -> None:
    assert circle(package) == []


def test_rooms_know_only_the_rooms_below_them(package: dict[str, set[str]]) -> None:
    wrong = [
        f"{module} -> {other}"
        for module, others in package.items()
        for other in sorted(others)
        if room(module) != room(other) and room(other) not in MAY_IMPORT.get(room(module), set())
    ]
    assert not wrong, "\n".join(wrong)


def test_every_room_has_its_place(package: dict[str, set[str]]) -> None:
    assert {room(module) for module in package} == set(MAY_IMPORT)


def test_the_places_leave_no_way_back() -> None:
    """Otherwise the order itself would allow a circle."""
    assert circle({name: others - {name} for name, others in MAY_IMPORT.items()}) == []


def test_test_files_import_from_helpers_and_not_from_each_other() -> None:
    wrong = [
        f"{module} -> {other}"
        for module, others in import_graph("tests").items()
        for other in sorted(others)
        if other.rpartition(".")[2].startswith(("test_", "conftest"))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import p.b", {"p.b"}),
        ("from p import b, name", {"p.b", "p"}),
        ("from p.b import name", {"p.b"}),
        ("def f():\n  if x:\n    from p.b import name", {"p.b"}),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  import p.b\nelse:\n  import p.c", {"p.c"}),
        ("import os, json", set()),
    ],
)
def test_how_imports_are_read(tmp_path: Path, text: str, expected: set[str]) -> None:
    (tmp_path / "p").mkdir()
    for name in ("__init__", "b", "c"):
        (tmp_path / "p" / f"{name}.py").touch()
    (tmp_path / "p" / "a.py").write_text(text)
    assert import_graph("p", tmp_path)["p.a"] == expected


def test_how_circles_are_told() -> None:
    assert circle({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": {"b"}}) == ["b", "c", "d"]
