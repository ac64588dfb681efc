"""Options that several commands of EMORL have."""

from typing import Annotated, Literal

from tyro.conf import arg

Names = Annotated[tuple[str, ...], arg(metavar="NAME [NAME ...]")]
Mode = Literal["hidden", "probs", "loglinear", "params"]
