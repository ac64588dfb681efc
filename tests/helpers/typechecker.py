"""How annotations are checked while tests run (see `tests`): by beartype, shapes by jaxtyping."""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep673Exception

# An int is a float, as for mypy.
_CHECK = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its annotations checked.

    Not those with `Self`, which beartype knows of whole classes alone, and not what dataclasses make: settings tell by
    themselves what is wrong with their values, and are tested for it.
    """
    if function.__code__.co_filename == "<string>":
        return function
    try:
        return _CHECK(function)
    except BeartypeDecorHintPep673Exception:
        return function
