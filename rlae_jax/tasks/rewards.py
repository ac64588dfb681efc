"""Rewards: how good a finished answer is, from its text and a reference. Each returns a number in [0, 1].

A reference may be several strings: any of them counts, and the best score is taken. A reward is a plain function, or a
`NamedReward` where it may be slow or is the user's own; `scoring.RewardPool` runs the latter in processes.
"""

import collections
import contextlib
import dataclasses
import functools
import importlib.util
import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Protocol, runtime_checkable

from rlae_jax import workers
from rlae_jax.errors import InputError
from rlae_jax.tasks import reward_worker
from rlae_jax.tasks.reward_worker import Reference as Reference
from rlae_jax.tasks.reward_worker import UnusableReward, best

Reward = Callable[[str, Reference], float]


@runtime_checkable
class BatchReward(Protocol):
    """A reward that scores many texts at once, such as one that runs a model."""

    def __call__(self, text: str, reference: Reference) -> float: ...

    def many(self, texts: Sequence[str], references: Sequence[Reference]) -> Sequence[float]:
        """The reward of each text."""
        ...


# Called in the function's place in a worker.
_WRAPPER = f"{reward_worker.__file__}:best"


def any_of(score: Callable[[str, str], float]) -> Callable[[str, Reference], float]:
    """The same reward for several references: the best score counts."""

    @functools.wraps(score)
    def reward(text: str, reference: Reference) -> float:
        return best(score, text, reference)

    return reward


@dataclasses.dataclass(frozen=True)
class NamedReward:
    """A reward known by "module:function" or "file.py:function", which worker processes import, and never this one."""

    source: str

    def __call__(self, text: str, reference: Reference) -> float:
        """One score, by a worker of its own; `scoring.RewardPool` is for many.

        Raises:
          UnusableReward: whatever the function did but give a number in [0, 1].
          InputError: it cannot be imported.
        """
        with contextlib.closing(workers.Worker(self.source, _WRAPPER)) as worker:
            value, problem = worker.call(text, reference)
        if problem:
            raise UnusableReward(problem)
        score: float = value
        return score

    def pool(self, limits: workers.Limits, n: int | None) -> workers.Pool:
        """Processes that call it."""
        return workers.Pool(self.source, _WRAPPER, limits, n)


@any_of
def exact_match(text: str, reference: str) -> float:
    """1.0 if the texts are equal but for white space at their ends."""
    return float(text.strip() == reference.strip())


# Signs and separators of other scripts that mean the same; digits of every script are read as they are. Not NFKC, which
# would turn "m²" into "m2".
_SAME = str.maketrans(
    {"\u2212": "-", "\u2013": "-", "\uff0d": "-", "\uff0c": ",", "\u066c": ",", "\uff0e": ".", "\u066b": "."}
)
# How LaTeX sets groups of digits and fractions.
_LATEX = (
    (re.compile(r"(?<=\d)(?:\{,\}|\\,)(?=\d{3}(?!\d))"), ","),
    (re.compile(r"\\[dt]?frac\{\s*([^{}]{1,40}?)\s*\}\{\s*([^{}]{1,40}?)\s*\}"), r"\1/\2"),
)
# A minus after a word, a digit or a bracket is a hyphen or a subtraction. So is a point within a word. Groups of three
# digits have commas between them, or spaces that do not break (U+00A0, U+202F, U+2009). Exponents have at most three
# digits, so that no number fills the memory.
_NUMBER = re.compile(
    r"(?P<minus>(?<![\w)\]}.,])-)?(?:[$€£¥]\s?(?P<inner>-)?)?"
    r"(?P<value>(?:(?<!\d)\d{1,3}(?P<group>[,\u00a0\u202f\u2009])\d{3}(?:(?P=group)\d{3})*(?!\d)|\d+)(?:\.\d+)?"
    r"|(?<![\w.])\.\d+)(?P<exponent>[eE][+-]?\d{1,3}(?!\w))?"
)
# A quotient, and no date, path or version.
_OVER = re.compile(r"\s?/\s?")


def _found(text: str) -> tuple[str, list[tuple[re.Match[str], Decimal]]]:
    """The text as it is searched, and the numbers in it."""
    text = text.translate(_SAME)
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    numbers = []
    for match in _NUMBER.finditer(text):
        digits = re.sub(r"[,\s]", "", match["value"])
        value = Decimal(digits + (match["exponent"] or ""))
        # Not unary minus, which rounds to the context's precision.
        numbers.append((match, value.copy_negate() if match["minus"] or match["inner"] else value))
    return text, numbers


def numbers_in(text: str) -> list[Decimal]:
    """The numbers written in a text, exactly: "1,234.50", "-$3", "$5.", ".5", "8{,}000", "1e3", "−٤٢"."""
    return [number for _, number in _found(text)[1]]


def values_in(text: str) -> list[Fraction]:
    """The values written in a text, exactly: `numbers_in`, with quotients such as "1/2" and "\\frac{1}{2}" as one."""
    text, numbers = _found(text)
    values: list[Fraction] = []
    chain: list[Decimal] = []
    for i, (match, number) in enumerate(numbers):
        chain.append(number)
        following = numbers[i + 1][0].start() if i + 1 < len(numbers) else None
        if following is not None and _OVER.fullmatch(text, match.end(), following):
            continue
        if len(chain) == 2 and chain[1]:
            values.append(Fraction(chain[0]) / Fraction(chain[1]))
        else:
            values += map(Fraction, chain)
        chain = []
    return values


@any_of
def last_number(text: str, reference: str) -> float:
    """1.0 if the last value written equals the reference's last (1,000 = 1000.0, 1/2 = 0.5), as RLAE scores GSM8K."""
    written, expected = values_in(text), values_in(reference)
    return float(bool(written and expected) and written[-1] == expected[-1])


@any_of
def gsm8k(text: str, reference: str) -> float:
    """1.0 if the value after the first "####", or the last one written where there is none, is the reference's.

    The first: a model that goes on with further questions writes further ones.
    """
    _, mark, rest = text.partition("####")
    written = values_in(rest.strip().partition("\n")[0])[:1] if mark else values_in(text)[-1:]
    return float(bool(written) and written == values_in(reference)[-1:])


_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_QUOTES = "‘’´`"


def normalise_squad(text: str) -> str:
    """SQuAD's: lower case, no punctuation, no articles, single spaces. Natural Questions is scored with it."""
    bare = "".join(c for c in unicodedata.normalize("NFD", text).lower() if c not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def normalise_triviaqa(text: str) -> str:
    """TriviaQA's: as SQuAD's, but punctuation and typographic quotes become spaces."""
    bare = "".join(" " if c in string.punctuation or c in _QUOTES else c for c in text.lower())
    return " ".join(_ARTICLES.sub(" ", bare).split())


def _kept(normalise: Callable[[str], str], text: str) -> str:
    """Normalised, unless nothing would be left: "The The" and "?" are answers too, and no match for an empty one."""
    return normalise(text) or text.strip().lower()


@any_of
def squad_match(text: str, reference: str) -> float:
    """1.0 if the texts are equal under `normalise_squad`."""
    return float(_kept(normalise_squad, text) == _kept(normalise_squad, reference))


@any_of
def triviaqa_match(text: str, reference: str) -> float:
    """1.0 if the texts are equal under `normalise_triviaqa`."""
    return float(_kept(normalise_triviaqa, text) == _kept(normalise_triviaqa, reference))


@any_of
def token_f1(text: str, reference: str) -> float:
    """SQuAD's F1: harmonic mean of precision and recall over the normalised words, with their multiplicity."""
    written, expected = (_kept(normalise_squad, one).split() for one in (text, reference))
    common = sum((collections.Counter(written) & collections.Counter(expected)).values())
    return 2 * common / (len(written) + len(expected)) if common else 0.0


# Options are lettered A to H: "I" would be a pronoun.
LETTERS = "ABCDEFGH"
# What may stand before a letter and what must follow one that could be a word. Bounded: a text made of brackets must
# not take for ever.
_OPEN = r"[\s(\[{*\"'$:=-]{0,6}(?:\\boxed\{|\\text\{){0,2}[(\[{*\"']{0,3}"
_CLOSE = r"(?=[)\]}*.,:;!?\"'$]|\s*$|[^\S\n]*\n)"
_CAPITAL, _SMALL = rf"([{LETTERS}])(?!['’]?\w)", rf"([{LETTERS.lower()}]){_CLOSE}"
# As capitals, but "A" only where no word follows it.
_NO_ARTICLE = rf"(?:([B-H])(?!['’]?\w)|(A){_CLOSE})"
# "B", "(B)", "B. because", "**B**" at the very beginning; not "A robe".
_FIRST = re.compile(rf"{_OPEN}([{LETTERS}]){_CLOSE}")
# "the answer is A", "option (b)"; "Answer: B", where "A robe" may begin a sentence; "B is correct".
_SAID = re.compile(
    rf"(?i:\banswer\s+(?:is|(?:would|must|should)\s+be)|\b(?:option|choice)(?:\s+is)?){_OPEN}"
    rf"(?i:(?:option|choice)\s{_OPEN})?(?:{_CAPITAL}|{_SMALL})"
    rf"|(?i:\banswer\b){_OPEN}(?:{_NO_ARTICLE}|{_SMALL})"
    rf"|(?<![\w'’])([{LETTERS}])[)\]*\"']{{0,3}}\s+is\s+(?i:the\s+)?(?i:correct|right|best|answer)\b"
)
# Any capital that stands alone, or a small letter in brackets.
_ALONE = re.compile(rf"(?<![\w'’])(?:{_NO_ARTICLE}|[(\[]([a-h])[)\]])")


def letter_of(text: str) -> str:
    """The option that a text names, as a capital letter, or "".

    What the text begins with counts first (a short answer, perhaps followed by more), then the last statement such as
    "the answer is B", then the last letter that stands alone.
    """
    text = unicodedata.normalize("NFKC", text).strip()
    bare = text.strip(string.punctuation + string.whitespace)
    if len(bare) == 1 and bare.upper() in LETTERS:
        return bare.upper()
    if first := _FIRST.match(text):
        return first[1]
    for pattern in (_SAID, _ALONE):
        if matches := list(pattern.finditer(text)):
            return next(group for group in matches[-1].groups() if group).upper()
    return ""


@any_of
def multiple_choice(text: str, reference: str) -> float:
    """1.0 if the text names the reference's option by its letter."""
    expected = letter_of(reference)
    return float(bool(expected) and letter_of(text) == expected)


def _math_equivalence() -> Reward:
    if importlib.util.find_spec("math_verify") is None:
        raise InputError("the reward math_equivalence needs math-verify; pip install 'rlae_jax[eval]'")
    return NamedReward(f"{Path(__file__).with_name('math_equivalence.py')}:math_equivalence")


REWARDS: dict[str, Reward] = {
    "exact_match": exact_match,
    "squad_match": squad_match,
    "triviaqa_match": triviaqa_match,
    "token_f1": token_f1,
    "multiple_choice": multiple_choice,
    "last_number": last_number,
    "gsm8k": gsm8k,
}
# No reward of a text: how likely given texts are, see `Task.by_likelihood`.
LIKELIHOOD = "likelihood"
# Needs an optional library.
MATH = "math_equivalence"


def get_reward(name: str) -> Reward:
    """The reward of a name, or the user's function that "module:function" or "file.py:function" names.

    A user's function gets the text and one reference, and returns a number in [0, 1].

    Raises:
      InputError: an unknown name; no such module or function, or one that cannot be imported or called; math-verify is
        not installed.
    """
    if name in REWARDS:
        return REWARDS[name]
    if name == MATH:
        return _math_equivalence()
    if name.endswith(".py"):
        raise InputError(f"reward {name!r} is a file; name the function in it, too: {name}:FUNCTION")
    if ":" not in name:
        raise InputError(
            f"reward {name!r} is unknown; use one of {', '.join([*REWARDS, MATH])}, or MODULE:FUNCTION (to train "
            "and evaluate also likelihood)"
        )
    return NamedReward(find_function(name, f"reward {name!r}"))


def find_function(name: str, what: str) -> str:
    """Checks, in a process of its own, that "module:function" or "file.py:function" names a function. Returns the name
    by which workers find it wherever they are.

    Args:
      what: the beginning of a message.

    Raises:
      InputError: no such module or function, or one that cannot be imported or called.
    """
    module, _, function = name.rpartition(":")
    if module.endswith(".py"):
        name = f"{Path(module).resolve()}:{function}"
    elif module == "__main__":
        raise InputError(f"{what}: no other process can import it; put the function into a file of its own")
    try:
        workers.check(name)
    except workers.Lost as error:
        raise InputError(f"{what}: {error}") from None
    return name
