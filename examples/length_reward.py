"""A reward of one's own: 1 for an answer of ten words, less for each word more or fewer. Use it with

rlae-jax train ... --reward examples/length_reward.py:ten_words
"""


def ten_words(text: str, reference: str) -> float:
    """A number in [0, 1]; this one does not look at the reference."""
    return max(0.0, 1 - abs(len(text.split()) - 10) / 10)
