"""Errors that are the user's to mend, told in a few lines: what is wrong, where, and what would be right."""

import collections
import contextlib
import os
import re
import tempfile
from collections.abc import Iterable

SHOWN_PER_KIND = 5
_LONGEST_LINE = 3_000
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")


class InputError(ValueError):
    """Unusable input. The commands print its message without a traceback and exit with status 2.

    What a file has may be quoted: of a very long line the middle is left out, and control characters are written out.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__("\n".join(map(_readable, str(message).split("\n"))))


def _readable(line: str) -> str:
    line = _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), line)
    if len(line) <= _LONGEST_LINE:
        return line
    return f"{line[: _LONGEST_LINE - 200]} [...] {line[-150:]}"


class OutputError(InputError):
    """A file or directory that cannot be written: what, why, and where room is missing how much."""


def one_line(error: BaseException, limit: int = 200) -> str:
    """What an error of another library says, in one line."""
    return shortened(" ".join(str(error).split()), limit)


def shortened(text: str, limit: int) -> str:
    """The text, or its beginning and three dots: `limit` characters at most."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


class Interrupted(Exception):
    """Training was stopped by Ctrl-C after its state was saved. The commands exit with status 130."""

    what = "stopped"  # as messages begin


class Preempted(Interrupted):
    """Training was stopped from outside (SIGTERM, or the platform wants the machine back) after its state was saved.
    The commands exit with status 75: run again with --resume."""

    what = "preempted"


def grouped_error(headline: str, findings: Iterable[tuple[str, str]], remedy: str = "") -> InputError:
    """An `InputError` that counts findings per kind and shows the first five of each.

    Args:
      headline: what was being read, and where.
      findings: (kind, item) pairs, e.g. ("missing", "model.norm.weight").
      remedy: what would be right.

    When some kind has more than five items, all of them are written to a temporary file that the message names, if
    there is room for one.
    """
    kinds: dict[str, list[str]] = collections.defaultdict(list)
    for kind, item in findings:
        kinds[kind].append(item)
    lines = [headline]
    for kind, items in kinds.items():
        shown = "; ".join(items[:SHOWN_PER_KIND]) + ("; ..." if len(items) > SHOWN_PER_KIND else "")
        lines.append(f"  {len(items)} {kind}: {shown}")
    if any(len(items) > SHOWN_PER_KIND for items in kinds.values()):
        everything = "".join(f"{kind}\t{item}\n" for kind, items in kinds.items() for item in items)
        with contextlib.suppress(OSError):
            lines.append(f"  the full list is in {_temporary_file(everything)}")
    if remedy:
        lines.append(remedy)
    return InputError("\n".join(lines))


def _temporary_file(text: str) -> str:
    """The path of a new file with this text.

    Raises:
      OSError: there is no place for it; nothing is left of it then.
    """
    descriptor, path = tempfile.mkstemp(prefix="rlae_jax-", suffix=".txt")
    try:
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError:
        os.unlink(path)
        raise
    return path
