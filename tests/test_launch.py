"""The examples of launching: their syntax, and that the program accepts every command line in them."""

import functools
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import tyro
import yaml

from rlae_jax.commands.main import COMMANDS, EMORL_COMMANDS

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
LAUNCH = sorted(path for path in (EXAMPLES / "launch").iterdir() if path.suffix in (".sh", ".yaml"))
SCRIPTS = [path for path in (*LAUNCH, *EXAMPLES.glob("*.sh")) if path.suffix == ".sh"]


def command_lines(text: str) -> Iterator[list[str]]:
    """The arguments of every `rlae-jax` that a script runs, also of those that it hands on in quotes; what the shell
    would fill in is 1."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    code = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    code = re.sub(r'\$\((?:[^()"]|"[^"]*")*\)|\$\w+', "1", code)
    for found in re.finditer(r"(?<![\w'-])rlae-jax (?=[a-z])", code):
        rest = code[found.end() :]
        if code[: found.start()].count('"') % 2:  # handed on in quotes, which end behind it
            yield shlex.split(rest[: rest.index('"')])
        else:
            yield shlex.split(re.split(r"[\n;&|]", rest, maxsplit=1)[0])


def parse(arguments: list[str]) -> dict[str, object]:
    """What the command would be called with, by its own parser."""
    commands, rest = (EMORL_COMMANDS, arguments[1:]) if arguments[0] == "emorl" else (COMMANDS, arguments)
    command = commands[rest[0]]
    stand_in = functools.wraps(command)(lambda **given: given)
    return tyro.cli(stand_in, args=rest[1:])


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
