"""The embedded tasks beyond `skills`: the same kind of prompt, more operations, more of them, strings of other lengths.

    prompt  drt48213=     answer  864263128482134       (d, r and t of five digits each, then the end)
            |||\\___/
            ||| digits
            operations, two or three; in one task they come behind the digits

The tasks of `CIRCLE` are answered by the same members: pairs of operations, and what an agent may meet beyond those.
Which members answer a task, and what each of them was taught, is `rlae_jax.specialists`' business. Digit strings are
dealt to train, dev and test as those of `skills` are: a string of another length goes where its first four digits go.
Everything here is a function of fixed seeds.
"""

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Callable

import numpy as np

from rlae_jax.tasks import skills
from rlae_jax.tasks.base import Examples, Task
from rlae_jax.tasks.rewards import exact_match

OPERATIONS: dict[str, Callable[[str], str]] = {
    **skills.OPERATIONS,
    "d": lambda digits: "".join(str(2 * int(d) % 10) for d in digits),
    "t": lambda digits: digits[1:] + digits[0],
}
OPERATION_NAMES = {**skills.OPERATION_NAMES, "d": "double", "t": "turn"}
SPAN_LENGTH = 4
_SEED = 733


@dataclasses.dataclass(frozen=True)
class Form:
    """What a task's prompts look like.

    Attributes:
      groups: a prompt asks for one operation of each group, drawn uniformly, in any order.
      lengths: how many digits a prompt's string may have; drawn uniformly.
      one_tokenizer: whether all members of the task write one character per token.
      held_pairs: whether operations that stand side by side are always one of `HELD_PAIRS`, or never one; None asks
        for any.
      first_digits: that strings begin with.
      digits_first: whether the digits come before the operations.
    """

    groups: tuple[str, ...]
    lengths: tuple[int, ...] = (skills.DIGITS,)
    one_tokenizer: bool = True
    held_pairs: bool | None = None
    first_digits: str = "0123456789"
    digits_first: bool = False

    @property
    def operations(self) -> str:
        """The letters that prompts may have."""
        return "".join(dict.fromkeys("".join(self.groups)))

    @property
    def per_prompt(self) -> int:
        """Operations per prompt."""
        return len(self.groups)

    def operations_of(self, prompt: str) -> str:
        """The letters of a prompt."""
        return prompt[-1 - self.per_prompt : -1] if self.digits_first else prompt[: self.per_prompt]

    def prompt(self, operations: str, digits: str) -> str:
        """The prompt that asks for these operations."""
        return skills.prompt(*((digits, operations) if self.digits_first else (operations, digits)))

    def draw_operations(self, rng: np.random.Generator) -> str:
        """What a prompt asks for."""
        while True:
            asked = "".join(group[rng.integers(len(group))] for group in rng.permutation(self.groups))
            held = [first + second in HELD_PAIRS for first, second in itertools.pairwise(asked)]
            if self.held_pairs is None or (all(held) if self.held_pairs else not any(held)):
                return asked


# Every operation once in each place, and never two that one member of `CIRCLE` was made for.
HELD_PAIRS = ("rs", "sd", "di", "it", "tc", "cr")
_PAIR = ("riscdt", "riscdt")
_SEEN_DIGITS, _OTHER_DIGITS = "01234567", "89"

# `skills3` has no length that is a multiple of the span, so that no span but the first begins with an operation. Its
# groups are what its three members know, so that no member may be left out.
FORMS = {
    "overlap": Form(("risc", "risc")),
    "skills3": Form(("ri", "sc", "dt"), lengths=(3, 5)),
    "mixed": Form(("ri", "sc", "dt"), lengths=(3, 5), one_tokenizer=False),
    "noisy": Form(("riscdt", "riscdt")),
    "twins": Form(("risc", "risc")),
    "dominant": Form(("riscd", "riscd")),
    # One and the same members from here on. What is told apart from `circle` in one task stays out of all others.
    "circle": Form(_PAIR, held_pairs=False, first_digits=_SEEN_DIGITS),
    "circle_held": Form(_PAIR, held_pairs=True, first_digits=_SEEN_DIGITS),
    "circle_long": Form(_PAIR, lengths=(5, 6), held_pairs=False, first_digits=_SEEN_DIGITS),
    "circle_three": Form(("riscdt",) * 3, held_pairs=False, first_digits=_SEEN_DIGITS),
    "circle_turned": Form(_PAIR, held_pairs=False, first_digits=_SEEN_DIGITS, digits_first=True),
    "circle_digits": Form(_PAIR, held_pairs=False, first_digits=_OTHER_DIGITS),
}
CIRCLE = tuple(name for name in FORMS if name.startswith("circle"))


@functools.cache
def digit_strings(length: int) -> dict[str, list[str]]:
    """All strings of so many digits, dealt to the splits by their first four (a shorter string begins again)."""
    dealt = {string: split for split, strings in skills.digit_strings().items() for string in strings}
    parts: dict[str, list[str]] = {split: [] for split in skills.SHARES}
    for digits in map("".join, itertools.product("0123456789", repeat=length)):
        parts[dealt[(digits * skills.DIGITS)[: skills.DIGITS]]].append(digits)
    return parts


def answer(operations: str, digits: str) -> str:
    """The exact answer: each operation's result, one after the other."""
    return "".join(OPERATIONS[operation](digits) for operation in operations)


def embedded(name: str) -> Task:
    """The embedded task of this name, one of `FORMS`."""
    form = FORMS[name]
    aligned = all(length == SPAN_LENGTH for length in form.lengths)
    splits, needed = {}, {}
    for split, n in skills.EXAMPLES.items():
        rng = np.random.default_rng((_SEED, zlib.crc32(f"{name} {split}".encode())))
        strings = {
            length: [digits for digits in digit_strings(length)[split] if digits[0] in form.first_digits]
            for length in form.lengths
        }
        asked = [form.draw_operations(rng) for _ in range(n)]
        pools = [strings[length] for length in rng.choice(form.lengths, size=n)]
        chosen = [pool[rng.integers(len(pool))] for pool in pools]
        splits[split] = Examples(
            [form.prompt(operations, digits) for operations, digits in zip(asked, chosen, strict=True)],
            [answer(operations, digits) for operations, digits in zip(asked, chosen, strict=True)],
        )
        needed[split] = [[OPERATION_NAMES[operation] for operation in operations] for operations in asked]
    return Task(
        name,
        splits,
        exact_match,
        token_reward=form.one_tokenizer,
        max_new_tokens=form.per_prompt * max(form.lengths) + 1,
        span_length=SPAN_LENGTH,
        skills=needed if aligned else None,
    )
