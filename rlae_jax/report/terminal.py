"""The terminal that people look at, and lines for it from which a path or a command can be copied."""

import os
import shlex

import rich.console

console = rich.console.Console()


def say(text: str) -> None:
    """Prints a text as it is: its lines are not wrapped and brackets in it are no markup, so that paths stay whole."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def quoted(path: str | os.PathLike[str]) -> str:
    """A path as a shell reads it: in quotes where it needs them."""
    return shlex.quote(os.fspath(path))
