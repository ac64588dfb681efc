"""The range of every number that a user sets: stated once, where the setting is declared.

    learning_rate: LearningRate              a setting or an option: LearningRate is Annotated[float, Range]
      ├─ --help shows it                     --learning-rate 0<FLOAT<=1000
      ├─ check(settings)                     InputError: learning_rate is nan; expected a number above 0 ...
      └─ check_options(command, options)     InputError: --learning-rate nan: expected a number above 0 ...

A number is within its range, finite, and whole where its range is of whole numbers; True is no number. Whole numbers
are at most 2^31 - 1 unless their range says more: programs count in 32 bits.
"""

import dataclasses
import functools
import operator
import os
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

from tyro.constructors import PrimitiveConstructorSpec

from rlae_jax.errors import InputError, shortened

MOST = 2**31 - 1  # of whole numbers
LAST_SEED = 2**32 - 1
LARGEST = 1e30  # of others: float32 still holds their products with what they meet


class Range(PrimitiveConstructorSpec[Any]):
    """What a number may be; in an annotation it is also how a command line reads and shows it.

    Args:
      kind: int or float.
      low, high: the least and the largest value.
      above, below: whether these themselves are too small, or too large.
      unit: what help calls the number, instead of INT or FLOAT.
    """

    def __init__(
        self, kind: type, low: float, high: float, *, above: bool = False, below: bool = False, unit: str | None = None
    ):
        self.__dict__.update(kind=kind, low=low, high=high, above=above, below=below)  # of a frozen class
        super().__init__(
            nargs=1,
            metavar=self._shown(unit or kind.__name__.upper()),
            instance_from_str=lambda texts: self.parse(texts[0]),
            is_instance=lambda value: isinstance(value, kind | int),
            str_from_instance=lambda value: [str(value)],
        )

    if typing.TYPE_CHECKING:
        kind: type
        low: float
        high: float
        above: bool
        below: bool

    def _shown(self, name: str) -> str:
        """As help has it: INT>=1, 0<=FLOAT<1."""
        if self.high not in (MOST, LARGEST):
            return f"{self.low:.10g}{'<' if self.above else '<='}{name}{'<' if self.below else '<='}{self.high:.10g}"
        return name if self.low == -LARGEST else f"{name}{'>' if self.above else '>='}{self.low:.10g}"

    @property
    def says(self) -> str:
        """As messages have it: "a whole number of at least 1"."""
        what = "a whole number" if self.kind is int else "a finite number" if self.low == -LARGEST else "a number"
        low = "" if self.low == -LARGEST else f" {'above' if self.above else 'of at least'} {self.low:.10g}"
        if self.high in (MOST, LARGEST):
            return what + low
        if not (self.above or self.below):
            return f"{what} from {self.low:.10g} to {self.high:.10g}"
        return f"{what}{low} and {'below' if self.below else 'at most'} {self.high:.10g}"

    def parse(self, text: str) -> Any:
        """The number that a text is; or the text, which fits no range and is told as what does not."""
        try:
            return self.kind(text)
        except (ValueError, OverflowError):
            return text

    def fits(self, value: Any) -> bool:
        """Whether a value is such a number: of Python's, of numpy's, or an array without axes."""
        if isinstance(value, bool | str | bytes) or type(value).__name__.startswith("bool"):
            return False
        if _is_traced(value):
            return True
        try:
            given = operator.index(value) if self.kind is int else float(value)
        except (TypeError, ValueError, OverflowError):
            return False
        reaches = given > self.low if self.above else given >= self.low
        return reaches and (given < self.high if self.below else given <= self.high)

    def instead_of(self, value: Any) -> str:
        """What is expected instead of a value that does not fit."""
        unsaid = self.high in (MOST, LARGEST) and isinstance(value, int | float) and value > self.high
        return f"expected {self.says}" + (f" and at most {self.high:.10g}" if unsaid else "")


def _is_traced(value: Any) -> bool:
    """Whether a value is known only when the program runs that JAX is about to make."""
    jax = sys.modules.get("jax")  # which reading a command line does not wait for
    return jax is not None and isinstance(value, jax.core.Tracer)


def _fields(settings: Any) -> dict[str, Any]:
    return {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}


def whole(low: int, high: int = MOST) -> Range:
    """A whole number from `low` to `high`."""
    return Range(int, low, high)


def number(
    low: float = -LARGEST, high: float = LARGEST, *, above: bool = False, below: bool = False, unit: str | None = None
) -> Range:
    """A number from `low` to `high`; with `above` and `below` without these themselves."""
    return Range(float, low, high, above=above, below=below, unit=unit)


Count = Annotated[int, whole(1)]
CountOr0 = Annotated[int, whole(0)]
Passes = Annotated[int, whole(1, 10_000)]  # over the same data
Width = Annotated[int, whole(1, 2**16)]  # of a layer
Levels = Annotated[int, whole(1, 100)]  # of halving: floats have no more
Spans = Annotated[int, whole(0, 2**17)]
Seed = Annotated[int, whole(0, LAST_SEED)]
Number = Annotated[float, number()]
Positive = Annotated[float, number(0, above=True)]
PositiveOr0 = Annotated[float, number(0)]
LearningRate = Annotated[float, number(0, 1e3, above=True)]
LearningRateOr0 = Annotated[float, number(0, 1e3)]
Temperature = Annotated[float, number(0, 1e6)]
Factor = Annotated[float, number(-1e6, 1e6)]
Scale = Annotated[float, number(1e-6, 1e6)]  # that something is divided by
Share = Annotated[float, number(0, 1)]
ShareAbove0 = Annotated[float, number(0, 1, above=True)]
ShareBelow1 = Annotated[float, number(0, 1, below=True)]
Weight = Annotated[float, number(0, 1e6, unit="W")]
GiB = Annotated[float, number(0, 1e9, above=True, unit="GIB")]
Bandwidth = Annotated[float, number(0, 1e9, above=True, unit="GB/S")]
Flops = Annotated[float, number(0, 1e9, above=True, unit="TFLOP/S")]
Context = Annotated[int, whole(2)]  # tokens: a prompt's and an answer's
Bytes = Annotated[int, whole(0, 2**50)]
MiB = Annotated[int, whole(0, 2**30)]
Port = Annotated[int, whole(0, 65535)]
PeerPort = Annotated[int, whole(1, 65535)]
WholeSeconds = Annotated[int, whole(0, 10**6)]
Minutes = Annotated[float, number(0, 1e7)]
Seconds = Annotated[float, number(0, 1e7, above=True)]


def ranges_in(hint: Any) -> Iterator[Range]:
    """The ranges in an annotation, of all numbers that it allows."""
    if typing.get_origin(hint) is Annotated:
        own = [one for one in hint.__metadata__ if isinstance(one, Range)]
        yield from own or ranges_in(hint.__origin__)
    elif typing.get_origin(hint) in (typing.Union, types.UnionType, tuple, list):
        for inner in typing.get_args(hint):
            yield from ranges_in(inner)


@functools.cache
def ranges_of(declaration: Any) -> dict[str, tuple[Range, ...]]:
    """The ranges of a dataclass's fields, or of a function's parameters, by their names."""
    hints = typing.get_type_hints(declaration, include_extras=True)
    return {name: tuple(ranges_in(hint)) for name, hint in hints.items()}


def _misfits(values: Mapping[str, Any], declaration: Any) -> Iterator[tuple[str, Any, Range]]:
    """Name, value and range of every number outside its range; dataclasses are looked into."""
    known = ranges_of(declaration)
    for name, value in values.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from _misfits(_fields(value), type(value))
        elif value is not None:
            for within in known.get(name, ()):
                given = value if isinstance(value, tuple | list) else [value]
                yield from ((name, one, within) for one in given if not within.fits(one))


def check(settings: Any) -> None:
    """Raises an `InputError` for a number of a dataclass that is outside its range."""
    for name, value, within in _misfits(_fields(settings), type(settings)):
        raise InputError(f"{name} is {value!r}; {within.instead_of(value)}")


def check_arguments(function: Callable[..., Any], **arguments: Any) -> None:
    """Raises an `InputError` for an argument of a function that is outside its range."""
    for name, value, within in _misfits(arguments, function):
        raise InputError(f"{name} is {value!r}; {within.instead_of(value)}")


def check_options(command: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raises an `InputError` for an option of a command that is outside its range."""
    for name, value, within in _misfits(options, command):
        raise InputError(f"--{name.replace('_', '-')} {_short(value)}: {within.instead_of(value)}")


def read(text: str, hint: Any, where: str) -> Any:
    """A number from a text.

    Args:
      hint: the annotation with its range.

    Raises:
      InputError: it is none, or outside the range; the message begins with `where` and the text.
    """
    (within,) = ranges_in(hint)
    value = within.parse(text)
    if not within.fits(value):
        raise InputError(f"{where}{_short(text)}: {within.instead_of(value)}")
    return value


def _short(value: Any) -> str:
    """A value as a message shows it."""
    return shortened(str(value), 40)


def from_environment(variable: str, hint: Any, default: Any) -> Any:
    """The number that an environment variable holds, or the default where it is not set.

    Raises:
      InputError: it holds something else.
    """
    text = os.environ.get(variable)
    return default if not text else read(text, hint, f"{variable}=")
