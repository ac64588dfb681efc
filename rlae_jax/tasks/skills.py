"""The embedded task: two operations on a string of digits, for members that know two of the four operations each.

    prompt  rs4821=      answer  12841248       reverse, then sort, both of the prompt's digits
            ||\\__/                \\__/\\__/
            || digits             r   s
            |second operation
            first operation

Every answer is two spans of four digits and an end, so that a span needs exactly one skill. Digit strings, not prompts,
are dealt to train, dev and test, for the specialists' own training too: no test string is ever seen before the test.
Everything here is a function of fixed seeds.
"""

import itertools
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int

from rlae_jax.tasks.base import Examples, Task
from rlae_jax.tasks.rewards import exact_match

DIGITS = 4
OPERATIONS: dict[str, Callable[[str], str]] = {
    "r": lambda digits: digits[::-1],
    "i": lambda digits: "".join(str((int(d) + 1) % 10) for d in digits),
    "s": lambda digits: "".join(sorted(digits)),
    "c": lambda digits: "".join(str(9 - int(d)) for d in digits),
}
OPERATION_NAMES = {"r": "reverse", "i": "increment", "s": "sort", "c": "complement"}
# Which operations each specialist is trained on.
SPECIALISTS = {"reverse_increment": "ri", "sort_complement": "sc"}

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
# In the order of their ids: one token per character.
TOKENS = (PAD, END, UNKNOWN, *"0123456789", *OPERATIONS, "=")
SHARES = {"train": 0.8, "dev": 0.1, "test": 0.1}
EXAMPLES = {"train": 8_192, "dev": 1_024, "test": 2_048}
_SPLIT_SEED, _PAIR_SEED = 2506, 439


def digit_strings() -> dict[str, list[str]]:
    """All 10^4 digit strings, dealt to the splits; no string is in two."""
    order = np.random.default_rng(_SPLIT_SEED).permutation(10**DIGITS)
    bounds = np.cumsum([round(share * len(order)) for share in SHARES.values()])[:-1]
    parts = np.split(order, bounds)
    return {split: [f"{n:0{DIGITS}d}" for n in part] for split, part in zip(SHARES, parts, strict=True)}


def prompt(operations: str, digits: str) -> str:
    """The prompt that asks for two operations on a string of digits."""
    return f"{operations}{digits}="


def answer(operations: str, digits: str) -> str:
    """The exact answer: each operation's result, one after the other."""
    return "".join(OPERATIONS[operation](digits) for operation in operations)


def skills() -> Task:
    """The task: each prompt asks for two operations, drawn uniformly from the four."""
    splits, needed = {}, {}
    for seed, (split, strings) in enumerate(digit_strings().items()):
        rng = np.random.default_rng((_PAIR_SEED, seed))
        n = EXAMPLES[split]
        pairs = ["".join(pair) for pair in rng.choice(list(OPERATIONS), size=(n, 2))]
        chosen = [strings[i % len(strings)] for i in range(n)]
        splits[split] = Examples(
            [prompt(pair, digits) for pair, digits in zip(pairs, chosen, strict=True)],
            [answer(pair, digits) for pair, digits in zip(pairs, chosen, strict=True)],
        )
        needed[split] = [[OPERATION_NAMES[operation] for operation in pair] for pair in pairs]
    return Task(
        "skills",
        splits,
        exact_match,
        token_reward=True,
        max_new_tokens=2 * DIGITS + 1,
        span_length=DIGITS,
        skills=needed,
    )


def specialist_sequences(operations: str, seed: int) -> tuple[Int[np.ndarray, "R T"], Bool[np.ndarray, "R T"]]:
    """Training sequences of one specialist, and which of their tokens it learns to predict.

    It learns the results of its own operations on the digit strings of the train split. The other operation of a prompt
    may be foreign; then random digits stand in for its result and nothing is learnt there, so that a specialist can go
    on from somebody else's span without ever having seen what a foreign operation gives.
    """
    ids = {token: i for i, token in enumerate(TOKENS)}
    rng = np.random.default_rng((_PAIR_SEED, seed))
    strings = digit_strings()["train"]
    rows, learnt = [], []
    for pair in ("".join(pair) for pair in itertools.product(OPERATIONS, repeat=2)):
        own = [operation in operations for operation in pair]
        if not any(own):
            continue
        for digits in strings:
            spans = [
                OPERATIONS[operation](digits) if known else f"{rng.integers(10**DIGITS):0{DIGITS}d}"
                for operation, known in zip(pair, own, strict=True)
            ]
            text = prompt(pair, digits)
            rows.append([ids[character] for character in text + "".join(spans)] + [ids[END]])
            learnt.append([False] * len(text) + [own[0]] * DIGITS + [own[1]] * DIGITS + [True])
    return np.array(rows, np.int32), np.array(learnt)
