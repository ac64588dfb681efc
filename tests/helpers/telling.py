"""Failures that say which of many cases they are of."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def telling(where: str) -> Iterator[None]:
    """Whatever is raised inside, an assertion or not, says for which configuration."""
    try:
        yield
    except Exception as error:
        error.add_note(where)
        raise
