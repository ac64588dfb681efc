"""Calls of the program in the text of examples."""

import functools
import re
import shlex
from collections.abc import Iterator

import tyro

from rlae_jax.commands.main import COMMANDS, EMORL_COMMANDS


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
