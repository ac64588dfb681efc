"""The rewards of a finished answer."""

import pickle
import sys

import pytest

from rlae_jax.tasks.reward_worker import UnusableReward
from rlae_jax.tasks.rewards import (
    REWARDS,
    exact_match,
    get_reward,
    gsm8k,
    last_number,
    letter_of,
    multiple_choice,
    normalise_squad,
    normalise_triviaqa,
    numbers_in,
    squad_match,
    token_f1,
    triviaqa_match,
)


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
        ("42", ("41", "42"), 1.0),
        ("42", ("41", "43"), 0.0),
        ("", (), 0.0),
    ],
)
def test_exact_match(text, reference, expected):
    assert exact_match(text, reference) == expected


class TestNumbers:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("", []),
            ("none. at, all - $", []),
            ("1,234.50", ["1234.50"]),
            ("-3", ["-3"]),
            ("$5.", ["5"]),
            ("-$3 and $-4", ["-3", "-4"]),
            ("€ 7, £8, ¥9", ["7", "8", "9"]),
            ("x=-3, (-4), y = -5", ["-3", "-4", "-5"]),
            ("10-3=7", ["10", "3", "7"]),
            ("pages 3-5 of A-4", ["3", "5", "4"]),
            ("- 3", ["3"]),
            ("\u22123 or \u20134", ["-3", "-4"]),
            (".5 and $.50", ["0.5", "0.50"]),
            ("0.10.", ["0.10"]),
            ("version 1.2.3", ["1.2", "3"]),
            ("1,2,3", ["1", "2", "3"]),
            ("1,2345", ["1", "2345"]),
            ("12,345,678", ["12345678"]),
            ("1/2 = 50%", ["1", "2", "50"]),
            ("5 m²", ["5"]),
            ("\\boxed{8{,}000}", ["8000"]),
            ("8\\,000\\,000", ["8000000"]),
            ("70\u00a0000 and 1\u202f234\u202f567.5", ["70000", "1234567.5"]),
            ("3\u00a04567", ["3", "4567"]),
            ("1\u00a0234,567", ["1234", "567"]),
            ("1e3, -2.5E-1, 1e3x, 2e1234", ["1E+3", "-0.25", "1", "3", "2", "1234"]),
            # Digits of other scripts, with their own separators.
            ("\u0664\u0662", ["42"]),
            ("\uff14\uff12", ["42"]),
            ("\uff0d\uff11\uff0c\uff12\uff13\uff14\uff0e\uff15", ["-1234.5"]),
            ("\u0661\u066c\u0662\u0663\u0664\u066b\u0665", ["1234.5"]),
        ],
    )
    def test_in_a_text(self, text, expected):
        assert [str(number) for number in numbers_in(text)] == expected

    def test_any_number_of_digits(self):
        """Beyond what int() converts and what Decimal's context would round to."""
        text = "-" + "7" * 10_000 + ".5"
        assert str(numbers_in(text)[0]) == text

    @pytest.mark.parametrize(
        "text",
        [
            *("1," * 5_000, "1,111" * 3_000, "9" * 20_000, "-$" * 5_000, "." * 20_000, " " * 20_000),
            *("1/" * 8_000, "1e" * 8_000, "\\frac{" * 5_000, "1\u00a0" * 8_000),
        ],
    )
    def test_no_text_takes_long(self, text):
        """The last of many partial matches: these run without a time limit of their own."""
        assert last_number(text + "x 42", "42") == 1.0


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
        ("-0", "0", 1.0),
        ("3", ("1", "3"), 1.0),
        ("The answer is $\\boxed{8{,}000}$.", "8000", 1.0),
        ("so 70\u00a0000", "70,000", 1.0),
        ("70000", "70\u202f000", 1.0),
        ("It is 1/2.", "0.5", 1.0),
        ("0.5", "1/2", 1.0),
        ("\\frac{1}{2}", "0.5", 1.0),
        ("-3/4", "-0.75", 1.0),
        ("1/3", "0.3333", 0.0),
        ("3/2", "1/2", 0.0),
        ("1/0", "0", 1.0),  # no quotient: the last number
        ("on 1/2/2024", "2024", 1.0),
        ("48/2 = 24", "24", 1.0),
        ("1e3", "1000", 1.0),
        ("1000", "1.0E3", 1.0),
        ("9e999", "9e998", 0.0),
    ],
)
def test_last_number(text, reference, expected):
    assert last_number(text, reference) == expected


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("2 + 2 = 4\n#### 4", "4", 1.0),
        ("#### 1,200", "1200", 1.0),
        ("#### $5.", "5", 1.0),
        ("#### -3", "-3", 1.0),
        ("####\n18", "18", 1.0),
        ("it is 18", "18", 1.0),  # unmarked: the last number
        ("#### 18 eggs for 3 days", "18", 1.0),
        ("#### 18\n\nQuestion: Two?\n#### 2", "18", 1.0),
        ("#### 18\n\nQuestion: Two?\n#### 2", "2", 0.0),
        ("18, so #### none", "18", 0.0),
        ("####", "18", 0.0),
        ("#### 8{,}000", "8,000", 1.0),
        ("#### 1/2", "0.5", 1.0),
        ("", "18", 0.0),
    ],
)
def test_gsm8k(text, reference, expected):
    assert gsm8k(text, reference) == expected


class TestWords:
    @pytest.mark.parametrize(
        ("text", "squad", "triviaqa"),
        [
            ("The  Beatles!", "beatles", "beatles"),
            ("an apple, a day", "apple day", "apple day"),
            ("AC/DC", "acdc", "ac dc"),
            ("Rock_n_Roll", "rocknroll", "rock n roll"),
            ("O’Neill", "o’neill", "o neill"),
            ("theatre", "theatre", "theatre"),
            (" \n", "", ""),
            ("The The", "", ""),
        ],
    )
    def test_normalised(self, text, squad, triviaqa):
        assert normalise_squad(text) == squad
        assert normalise_triviaqa(text) == triviaqa

    @pytest.mark.parametrize("match", [squad_match, triviaqa_match])
    def test_matches(self, match):
        assert match(" the Sunset Boulevard.\n", ("Sunset Blvd", "Sunset Boulevard")) == 1.0
        assert match("Sunset", ("Sunset Blvd", "Sunset Boulevard")) == 0.0
        assert match("", ("Sunset Blvd",)) == 0.0

    @pytest.mark.parametrize("match", [squad_match, triviaqa_match, token_f1])
    def test_an_answer_of_articles_or_punctuation_is_not_empty(self, match):
        for reference in ("The The", "?", "A"):
            assert match("", reference) == 0.0
            assert match("!", reference) == 0.0
            assert match(reference.lower() + " ", reference) == 1.0

    def test_accents(self):
        """However they are composed."""
        assert squad_match("cafe\u0301", "caf\u00e9") == 1.0

    @pytest.mark.parametrize(
        ("text", "reference", "expected"),
        [
            ("the cat sat", "a cat", 2 * 0.5 * 1 / 1.5),
            ("cat cat", "cat", 2 / 3),
            ("cat", "cat cat", 2 / 3),
            ("dog", "cat", 0.0),
            ("", "cat", 0.0),
            ("Cat!", "cat", 1.0),
            ("one two", ("two three four", "two"), 2 / 3),
        ],
    )
    def test_token_f1(self, text, reference, expected):
        assert token_f1(text, reference) == pytest.approx(expected)


class TestLetters:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            # Alone, or first.
            ("B", "B"),
            (" b\n", "B"),
            ("(B)", "B"),
            ("**B**", "B"),
            ("B. because it is not C", "B"),
            ("C) palms, not D) lotion", "C"),
            ("A: dry palms", "A"),
            ("A", "A"),
            ("a.", "A"),
            ("A\n\nQuestion: What?\nAnswer: C", "A"),
            # Said.
            ("The answer is B.", "B"),
            ("The answer is A because it is.", "A"),
            ("the correct answer is option (c).", "C"),
            ("I thought of (B), but the answer is: D", "D"),
            ("The answer is B. No: the answer is C.", "C"),
            ("A is wrong, the answer is B.", "B"),
            ("Answer:\nB", "B"),
            ("Answer - C", "C"),
            ("B is the answer, A is not", "B"),
            ("It must be \\boxed{D}", "D"),
            ("the answer is $\\boxed{\\text{C}}$", "C"),
            ("The answer is not A but C", "C"),
            ("I think B", "B"),
            # Articles, pronouns, words.
            ("A robe takes 2 bolts", ""),
            ("The answer is a robe", ""),
            ("Answer: A robe takes 2", ""),
            ("I do not know", ""),
            ("Bananas", ""),
            ("It's a dog's life", ""),
            ("", ""),
            ("...", ""),
            ("Z", ""),
            # Other forms of the same characters.
            ("\uff22", "B"),
            ("\uff08\uff22\uff09", "B"),
        ],
    )
    def test_of_a_text(self, text, expected):
        assert letter_of(text) == expected

    def test_reward(self):
        assert multiple_choice("(b)", "B") == 1.0
        assert multiple_choice("The answer is B.", "(B)") == 1.0
        assert multiple_choice("A", "B") == 0.0
        assert multiple_choice("", "") == 0.0
        assert multiple_choice("C", ("B", "C")) == 1.0

    @pytest.mark.parametrize(
        "text",
        [
            "answer " + "(" * 5_000,
            "answer " * 3_000,
            "A" + " " * 20_000,
            "A is " * 4_000,
            "\\boxed{" * 3_000,
            "B\n" * 9_000,
        ],
    )
    def test_no_text_takes_long(self, text):
        assert letter_of("x " + text + "x The answer is C.") == "C"


class TestMathEquivalence:
    @pytest.mark.parametrize(
        ("text", "reference", "expected"),
        [
            ("The answer is $\\frac{1}{2}$", "\\frac{1}{2}", 1.0),
            ("0.5", "1/2", 1.0),
            ("so \\boxed{8{,}000}", "8000", 1.0),
            ("The answer is 70\u202f000.", "70\u00a0000", 1.0),
            ("1e3", "1000", 1.0),
            ("\\boxed{x^2+2x+1}", "(x+1)^2", 1.0),
            ("$\\sqrt{8}$", "2\\sqrt{2}", 1.0),
            ("$\\{1,2\\}$", "\\{2,1\\}", 1.0),
            ("1,234.50", "1234.5", 1.0),
            ("-3", "-3", 1.0),
            ("$5.", "5", 1.0),
            ("first 3, then 42", "42", 1.0),
            ("7", "so it is $\\boxed{7}$", 1.0),
            ("3", "4", 0.0),
            ("", "4", 0.0),
            ("no idea", "4", 0.0),
            ("3", ("4", "3"), 1.0),
        ],
    )
    def test_values(self, text, reference, expected):
        pytest.importorskip("math_verify", reason="math-verify is not installed")
        assert get_reward("math_equivalence")(text, reference) == expected

    def test_without_the_library(self, monkeypatch, raises_input_error):
        monkeypatch.setitem(sys.modules, "math_verify", None)
        message = raises_input_error(lambda: get_reward("math_equivalence"), "pip install 'rlae_jax[eval]'")
        assert "\n" not in message


class TestByName:
    def test_those_of_the_package(self, raises_input_error):
        assert get_reward("exact_match") is exact_match
        assert get_reward("last_number") is last_number
        raises_input_error(lambda: get_reward("bleu"), "'bleu'", *REWARDS, "math_equivalence", "MODULE:FUNCTION")

    @pytest.mark.parametrize("name", REWARDS)
    def test_they_can_be_sent_to_another_process(self, name):
        assert pickle.loads(pickle.dumps(REWARDS[name])) is REWARDS[name]

    def test_the_users_function(self):
        reward = get_reward("tests.tasks.reward_functions:length")
        assert pickle.loads(pickle.dumps(reward)) == reward
        assert reward("ab", "abcd") == 0.5
        assert reward("ab", ("abcd", "abc")) == pytest.approx(2 / 3)
        with pytest.raises(UnusableReward, match="outside"):
            get_reward("tests.tasks.reward_functions:by_order")("2", "")

    def test_in_the_directory_where_a_command_was_started(self, tmp_path, monkeypatch):
        (tmp_path / "rewards_of_mine.py").write_text("def half(text, reference):\n    return 0.5\n")
        monkeypatch.setattr(sys, "path", [part for part in sys.path if part])
        monkeypatch.chdir(tmp_path)
        assert get_reward("rewards_of_mine:half")("", "") == 0.5
        assert get_reward("rewards_of_mine.py:half")("", "") == 0.5

    @pytest.mark.parametrize(
        ("name", "parts"),
        [
            ("no_such_module:f", ["no module 'no_such_module'"]),
            ("tests.no_such_module:f", ["no module 'tests.no_such_module'"]),
            ("no_such_file.py:f", ["no file", "no_such_file.py"]),
            ("tests.tasks.reward_functions:nothing", ["tests.tasks.reward_functions has no 'nothing'"]),
            ("tests.tasks.reward_functions:NOT_A_FUNCTION", ["'NOT_A_FUNCTION'", "no function but int"]),
            ("tests.tasks.reward_functions:", ["has no ''"]),
            (":f", ["reward ':f'"]),
            ("__main__:f", ["no other process can import it"]),
        ],
    )
    def test_what_is_no_function(self, raises_input_error, name, parts):
        raises_input_error(lambda: get_reward(name), repr(name)[1:-1].split(":")[0], *parts)

    @pytest.mark.parametrize(
        ("content", "said"),
        [("1 / 0", "ZeroDivisionError"), ("import nothing_like_it", "nothing_like_it"), ("(", "Syntax")],
    )
    def test_modules_that_cannot_be_imported(self, tmp_path, raises_input_error, content, said):
        (tmp_path / "broken.py").write_text(content)
        raises_input_error(lambda: get_reward(f"{tmp_path}/broken.py:f"), "broken.py cannot be imported", said)
