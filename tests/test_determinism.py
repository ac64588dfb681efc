"""docs/determinism.md names a test in every line, and each is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINES = [line for line in (ROOT / "docs" / "determinism.md").read_text().splitlines() if line.startswith("| ")][2:]


def names_in(path):
    """ "name" and "Class::name" of every test of a file."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{one.name}" for one in node.body if isinstance(one, ast.FunctionDef)}
    return found


def test_there_are_lines():
    assert len(LINES) > 20


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_every_line_is_a_test(line):
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert len(cells) == 4
    assert cells[1]
    assert cells[2] in ("bits", "tokens", "rounding")
    named = re.fullmatch(r"`(tests/[\w/]+\.py)::([\w:]+)`", cells[3])
    assert named, cells[3]
    assert named[2] in names_in(ROOT / named[1])
