"""The examples of launching: their syntax, and that the program accepts every command line in them."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.helpers.command_lines import command_lines, parse

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
LAUNCH = sorted(path for path in (EXAMPLES / "launch").iterdir() if path.suffix in (".sh", ".yaml"))
SCRIPTS = [path for path in (*LAUNCH, *EXAMPLES.glob("*.sh")) if path.suffix == ".sh"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_shell(path):
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize("path", [path for path in LAUNCH if path.suffix == ".yaml"], ids=lambda path: path.name)
def test_yaml(path):
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_lines_are_found_and_read():
    text = """
    # rlae-jax no --line
    x ssh --command "pip install 'rlae-jax[tpu]' && ~/.local/bin/rlae-jax train --out $RUN \\
        --task skills"
    rlae-jax emorl train --to "$(echo "$IPS" | head -n 1):8476" --n "$N"; echo done
    """
    assert list(command_lines(text)) == [
        ["train", "--out", "1", "--task", "skills"],
        ["emorl", "train", "--to", "1:8476", "--n", "1"],
    ]


@pytest.mark.parametrize("path", [*LAUNCH, *EXAMPLES.glob("*.sh")], ids=lambda path: path.name)
def test_the_program_accepts_every_line(path):
    lines = list(command_lines(path.read_text()))
    assert lines
    for arguments in lines:
        parse(arguments)


def test_every_file_is_in_the_table():
    table = (EXAMPLES / "launch" / "README.md").read_text()
    assert {path.name for path in LAUNCH} == set(re.findall(r"\]\((\w+\.(?:sh|yaml))\)", table))


def test_a_mistake_is_found(capsys):
    with pytest.raises(SystemExit):
        parse(["train", "--models", "a", "--out", "x", "--no-such-option", "1"])
    assert "no-such-option" in capsys.readouterr().err
