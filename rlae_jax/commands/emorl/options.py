"""Options that several commands of EMORL have."""

import dataclasses
from typing import Annotated, Literal

from tyro.conf import arg

Names = Annotated[tuple[str, ...], arg(metavar="NAME [NAME ...]")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeOptions:
    """Which functions of one's own may run. What a directory names runs by itself never."""

    objective: Names = ()
    """your own functions among the run's objectives, named again: module:function or file.py:function."""
    allow_code: bool = False
    """run the functions that the run's directory names."""


Mode = Literal["hidden", "probs", "loglinear", "params"]
