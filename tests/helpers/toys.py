"""Ensembles and tasks small enough to be worked out by hand.

A prompt is a few letters, of which the last one decides. The right answer is one digit and the end:

    a b c d e f g h          member "left"  writes the right digit after a to e, a wrong one after f to h
    0 1 2 3 0 1 2 3          member "right" the other way round; it is the surer one, so that it wins at equal weights

so that "left" alone scores 5/8, "right" alone and equal weights 3/8, and whoever looks at the letter 1.
"""

import dataclasses
import itertools

import numpy as np

from rlae_jax.config import AgentConfig, PPOConfig
from rlae_jax.tasks import Examples, Task
from rlae_jax.tasks.rewards import exact_match

LETTERS, DIGITS = "abcdefgh", "0123"
CHARACTERS = LETTERS + DIGITS
END = len(CHARACTERS)
KNOWN = {"left": "abcde", "right": "fgh"}
SURENESS = {"left": 6.0, "right": 7.0}

SMALL_AGENT = AgentConfig(reads=("hidden", "span"), projection=8, span_embedding=4, ffn_width=16)
SETTINGS = PPOConfig(
    iterations=24,
    prompts=64,
    epochs=4,
    minibatches=2,
    learning_rate=2e-2,
    eval_every=4,
    eval_prompts=32,
    span_length=1,
    max_new_tokens=2,
    agent=SMALL_AGENT,
)


def right_digit(letter):
    return DIGITS[LETTERS.index(letter) % len(DIGITS)]


def table(name):
    """Next-token logits [V, V] of a member."""
    logits = np.zeros((END + 1, END + 1), np.float32)
    for i, letter in enumerate(LETTERS):
        digit = DIGITS.index(right_digit(letter))
        if letter not in KNOWN[name]:
            digit = (digit + 1) % len(DIGITS)
        logits[i, len(LETTERS) + digit] = SURENESS[name]
    logits[len(LETTERS) :, END] = SURENESS[name]
    return logits


def members(make_chain_lm, make_tokenizer):
    tokenizer = make_tokenizer(CHARACTERS)
    return [make_chain_lm(table(name), tokenizer=tokenizer, name=name, end_ids=(END,), context=64) for name in KNOWN]


def examples(prompts):
    return Examples(list(prompts), [right_digit(prompt[-1]) for prompt in prompts])


class Asked(dict):
    """Splits that remember which of them were asked for."""

    def __init__(self, *args):
        super().__init__(*args)
        self.names = []

    def get(self, name, default=None):
        self.names.append(name)
        return super().get(name, default)


def task(*, token_reward=True):
    pairs = ["".join(pair) for pair in itertools.product(LETTERS, repeat=2)]
    splits = Asked(
        {
            "train": examples(pairs),
            "dev": examples([f"ab{pair}" for pair in pairs[::2]]),
            "test": examples([f"cd{pair}" for pair in pairs]),
        }
    )
    return Task("toy", splits, exact_match, token_reward=token_reward, max_new_tokens=2, span_length=1)


def of_letters(name, letters, **changes):
    """The toy task with prompts that end with one of these letters."""
    whole = task()
    kept = {
        split: [i for i, prompt in enumerate(examples.prompts) if prompt[-1] in letters]
        for split, examples in whole.splits.items()
    }
    splits = {split: whole.splits[split].select(rows) for split, rows in kept.items()}
    return dataclasses.replace(whole, name=name, splits=splits, **changes)
