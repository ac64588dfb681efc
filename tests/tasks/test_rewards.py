"""The rewards of a finished answer."""

import pytest

from rlae_jax.tasks.rewards import exact_match, get_reward, last_number


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("42", "42", 1.0),
        (" 42\n", "42", 1.0),
        ("42", " 42 ", 1.0),
        ("4 2", "42", 0.0),
        ("Yes", "yes", 0.0),
        ("", "42", 0.0),
        ("42.", "42", 0.0),
    ],
)
def test_exact_match(text, reference, expected):
    assert exact_match(text, reference) == expected


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("The answer is 42.", "42", 1.0),
        ("1,000", "1000.0", 1.0),
        ("1000.0", "1,000", 1.0),
        ("It costs $1,234,567.50 in all", "1234567.5", 1.0),
        ("first 7, then 8", "8", 1.0),
        ("first 8, then 7", "8", 0.0),
        ("-5", "-5", 1.0),
        ("-5", "5", 0.0),
        ("5", "-5", 0.0),
        ("0.10", "0.1", 1.0),
        ("0.3000000000000000001", "0.3", 0.0),  # as numbers, not as floats
        ("007", "7", 1.0),
        ("3.14", "3", 0.0),
        ("no number at all", "42", 0.0),
        ("", "42", 0.0),
        ("42", "no number", 0.0),
        ("none", "none", 0.0),
        ("#### 72", "Natalia sold 48/2 = 24 clips. #### 72", 1.0),
    ],
)
def test_last_number(text, reference, expected):
    assert last_number(text, reference) == expected


def test_rewards_by_name(raises_input_error):
    assert get_reward("exact_match") is exact_match
    assert get_reward("last_number") is last_number
    raises_input_error(lambda: get_reward("bleu"), "'bleu'", "exact_match", "last_number")
