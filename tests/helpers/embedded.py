"""Answers of the embedded tasks, worked out apart from the package."""

from rlae_jax.tasks import embedded


def by_hand(prompt):
    """The answer to a prompt, by arithmetic on lists of digits."""
    letters = letters_of(prompt)
    digits = [ord(character) - ord("0") for character in digits_of(prompt)]
    n = len(digits)
    results = {
        "r": [digits[n - 1 - i] for i in range(n)],
        "i": [0 if d == 9 else d + 1 for d in digits],
        "s": [d for value in range(10) for d in digits if d == value],
        "c": [9 - d for d in digits],
        "d": [d + d if d < 5 else d + d - 10 for d in digits],
        "t": [digits[(i + 1) % n] for i in range(n)],
    }
    return "".join(str(d) for letter in letters for d in results[letter])


def letters_of(prompt):
    return "".join(filter(str.isalpha, prompt))


def digits_of(prompt):
    return prompt.strip("".join(embedded.OPERATIONS) + "=")
