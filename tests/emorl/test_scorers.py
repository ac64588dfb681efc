"""Scores against independent ways to compute them, and what scorers refuse."""

import itertools
import math
import shutil
import sys

import numpy as np
import pytest

from rlae_jax.emorl import scorers
from rlae_jax.emorl.scorers import Objective, combine, get_objective, get_objectives, levenshtein
from rlae_jax.models import load_encoder

WORDS = ("i", "you", "we", "feel", "hear", "that", "this", "it", "is", "hard", "good", "sad", "and", "but", "very")


def sentences(seed, n=30):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 15))) for _ in range(n)]


def recursive_distance(a, b):
    """Levenshtein by its definition."""
    if not a or not b:
        return len(a) + len(b)
    return min(
        recursive_distance(a[1:], b) + 1,
        recursive_distance(a, b[1:]) + 1,
        recursive_distance(a[1:], b[1:]) + (a[0] != b[0]),
    )


class TestTextFunctions:
    def test_words(self):
        assert scorers.words("I don't KNOW -- why? 7 times.") == ["i", "don't", "know", "why", "7", "times"]

    @pytest.mark.parametrize("n", [1, 2, 3])
    def test_diversity(self, n):
        texts = sentences(n)
        for text, score in zip(texts, scorers.diversity(n)(texts, texts), strict=True):
            split = text.split()
            grams = [tuple(split[i : i + n]) for i in range(len(split) - n + 1)]
            assert score == pytest.approx(len(set(grams)) / len(grams) if grams else 0.0)

    def test_levenshtein_by_its_definition(self):
        rng = np.random.default_rng(0)
        for _ in range(60):
            a, b = ("".join(rng.choice(list("abc"), rng.integers(0, 6))) for _ in range(2))
            assert levenshtein(a, b) == recursive_distance(a, b)

    def test_edit_rate(self):
        score = scorers.edit_rate()
        assert score(["a b c", "a b", "a"], ["a b c", "b a", "x y z w"]).tolist() == [0.0, 1.0, 1.0]
        assert score(["a b c d"], ["a x c d"])[0] == 0.25

    def test_brevity_coverage_and_word_lists(self):
        texts = ["w " * n for n in (1, 3, 14, 26, 40)]
        np.testing.assert_allclose(scorers.brevity()(texts, texts), [1, 1, 1 - 11 / 23, 0, 0])
        assert scorers.coverage()(["sad dog", "sad dog"], ["a DOG, a dog", "the sad dog"]).tolist() == [0.5, 1.0]
        warmth = scorers.of_words("warmth", ["thank", "care", "glad"], enough=2)
        assert warmth(["", "", ""], ["I care", "thank you, glad, I care", "no"]).tolist() == [0.5, 1.0, 0.0]
        mine = scorers.of_function("mine", lambda prompt, response: len(prompt) / len(response))
        assert mine(["a"], ["abcd"]).tolist() == [0.25]


class TestWhatAScorerGives:
    @pytest.mark.parametrize("make", [scorers.edit_rate, scorers.brevity, scorers.diversity, scorers.coverage])
    def test_an_empty_response_scores_nothing(self, make):
        assert make()(["a prompt"] * 3, ["", "  \n", "a prompt"])[:2].tolist() == [0.0, 0.0]
        assert make()(["a"], [""]).tolist() == [0.0]

    def test_scores_stay_in_the_range(self):
        scorer = Objective("big", lambda prompts, responses: [5.0, -5.0], low=-1.0, high=2.0)
        assert scorer(["a", "b"], ["x", "y"]).tolist() == [2.0, -1.0]

    def test_what_is_no_score(self, raises_input_error):
        nan = Objective("bad", lambda prompts, responses: [1.0, math.nan])
        raises_input_error(lambda: nan(["a", "b"], ["x", "why not"]), "bad", "nan", "why not")
        short = Objective("short", lambda prompts, responses: [1.0])
        raises_input_error(lambda: short(["a", "b"], ["x", "y"]), "short", "2 responses")


class TestCombine:
    def test_each_way(self):
        scores = np.array([[0.2, 0.8], [0.0, 1.0]])
        np.testing.assert_allclose(combine(scores, "sum"), [0.5, 0.5])
        np.testing.assert_allclose(combine(scores, "sum", [1, 3]), [2.6, 3.0])
        clipped = [math.log(1e-4), math.log(1 - 1e-4)]
        np.testing.assert_allclose(combine(scores, "log")[1], sum(clipped) / 2)
        np.testing.assert_allclose(combine(scores, "product"), np.exp(combine(scores, "log")))
        np.testing.assert_allclose(combine(scores, "product", [1, 1])[0], 0.16)

    def test_what_it_refuses(self, raises_input_error):
        raises_input_error(lambda: combine(np.zeros((1, 2)), "mean"), "sum, log, product", "mean")
        raises_input_error(lambda: combine(np.zeros((1, 2)), "sum", [1.0]), "1 weights", "2 objectives")


class TestModels:
    def test_perplexity_one_text_at_a_time(self, make_lm, make_tokenizer):
        letters = "abcdefgh"
        lm = make_lm(0, vocab=len(letters) + 1, tokenizer=make_tokenizer(letters), sharpness=2.0)
        texts = ["".join(text) for text in itertools.islice(itertools.permutations(letters, 5), 0, 300, 40)] + ["a"]
        found = scorers.perplexities(lm, texts)
        for text, perplexity in zip(texts[:-1], found, strict=False):
            ids = lm.tokenizer(text)["input_ids"]
            logits = np.asarray(lm.logits(np.array([ids])))[0, :-1].astype(np.float64)
            log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            expected = math.exp(-np.mean([log_p[t, token] for t, token in enumerate(ids[1:])]))
            assert perplexity == pytest.approx(expected, rel=1e-4)
        assert found[-1] == np.inf
        fluent = scorers.fluency(lm, worst=20.0)
        np.testing.assert_allclose(fluent(texts, texts), np.clip((20 - np.minimum(found, 20)) / 20, 0, 1), rtol=1e-5)


FUNCTIONS = """
def share(prompt, response):
    return len(response) / len(prompt)

def broken(prompt, response):
    return {}[response]

def nothing(prompt, response):
    return None

def nan(prompt, response):
    return float("nan")

def leaves(prompt, response):
    import sys
    sys.exit(3)

def numbers(prompt, response):
    import numpy
    from decimal import Decimal
    print("x")
    return [numpy.float32(0.5), Decimal("0.25"), numpy.array(7), False][int(response)]

def process(prompt, response):
    import os, sys
    return os.getppid() != 1 and "jax" not in sys.modules

NUMBER = 3
"""


class TestByName:
    @pytest.fixture
    def functions(self, tmp_path):
        """A user's file."""
        (tmp_path / "mine.py").write_text(FUNCTIONS)
        return tmp_path / "mine.py"

    @pytest.fixture
    def with_tokenizer(self, stored_checkpoint, make_tokenizer, tmp_path):
        """with_tokenizer(case, family) -> a copy of a stored checkpoint that reads letters."""

        def make(case, family="bert"):
            directory = tmp_path / f"{family}-{case}"
            shutil.copytree(stored_checkpoint(case, family), directory)
            make_tokenizer("abcdefgh").save_pretrained(directory)
            return directory

        return make

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("coverage", scorers.coverage()),
            ("brevity", scorers.brevity()),
            ("edit_rate", scorers.edit_rate()),
            ("diversity", scorers.diversity(2)),
            ("diversity_3", scorers.diversity(3)),
        ],
    )
    def test_functions_of_texts(self, text, expected):
        found = get_objective(text)
        prompts, responses = sentences(0), sentences(1)
        assert found.name == expected.name
        assert found(prompts, responses).tolist() == expected(prompts, responses).tolist()

    @pytest.mark.parametrize(
        ("name", "case", "make"),
        [
            ("reflection", "one_label", lambda encoder: scorers.regression("reflection", encoder)),
            ("empathy", "three_labels", lambda encoder: scorers.classifier("empathy", encoder)),
            ("coherence", "next_sentence", scorers.coherence),
            ("specificity", "base", scorers.specificity),
        ],
    )
    def test_encoders(self, with_tokenizer, name, case, make):
        directory = with_tokenizer(case)
        found = get_objective(f"{name}={directory}")
        prompts, responses = ["abc", "hgf", "a"], ["cab", "bbbb", "ddh"]
        expected = make(load_encoder(directory))(prompts, responses)
        assert found.name == name
        assert found(prompts, responses).tolist() == expected.tolist()

    def test_fluency(self, make_lm, make_tokenizer, tmp_path):
        lm = make_lm(0, vocab=9, tokenizer=make_tokenizer("abcdefgh"), sharpness=2.0)
        lm.save(tmp_path / "lm")
        found, texts = get_objective(f"fluency={tmp_path / 'lm'}"), ["abcd", "hhhh"]
        assert found.name == "fluency"
        expected = 1 - np.minimum(scorers.perplexities(lm, texts), 50) / 50
        np.testing.assert_allclose(found(["a", "a"], texts), expected, rtol=1e-5)

    def test_a_users_function(self, functions, monkeypatch):
        found = get_objective(f"{functions}:share")
        assert found.name == "share"
        assert found(["abcd"] * 3, ["ab", "", "abcdef"]).tolist() == [0.5, 0.0, 1.0]
        monkeypatch.syspath_prepend(functions.parent)
        assert get_objective("mine:share")(["abcd"], ["a"]).tolist() == [0.25]

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("broken", "raised KeyError: 'oh no'"),
            ("nothing", "gave no number but NoneType"),
            ("nan", "gave NaN"),
            ("leaves", "ended its process (exit status 3)"),
        ],
    )
    def test_a_users_function_that_fails_scores_nothing_and_is_told(self, functions, name, said, capfd):
        scorer = get_objective(f"{functions}:{name}")
        with pytest.warns(UserWarning, match=f"objective {name} failed for an answer, which scores 0"):
            assert scorer(["a", "b"], ["oh no", "oh no"]).tolist() == [0.0, 0.0]
        assert scorer.problems.shown == [("a", said), ("b", said)]
        assert str(scorer.problems).startswith(f"objective {name} failed for 2 answers, which score 0: 2 ")
        assert capfd.readouterr() == ("", "")

    def test_kinds_of_numbers_and_what_is_printed(self, functions, capfd):
        scorer = get_objective(f"{functions}:numbers")
        assert scorer(["a"] * 4, ["0", "1", "2", "3"]).tolist() == [0.5, 0.25, 1.0, 0.0]
        assert not scorer.problems.counts
        assert str(scorer.problems) == "objective numbers: it printed 8 bytes, which are not kept; they begin: 'x'"
        assert capfd.readouterr() == ("", "")

    def test_it_is_not_imported_here(self, functions):
        before = set(sys.modules)
        scorer = get_objective(f"{functions}:process")
        assert scorer(["a"], ["b"]).tolist() == [1.0]
        assert not [name for name in sys.modules.keys() - before if "mine" in name]

    def test_a_function_given_in_python_that_fails(self):
        scorer = scorers.of_function("mine", lambda prompt, response: 1 / len(response.strip("x")))
        with pytest.warns(UserWarning, match="ZeroDivisionError"):
            assert scorer(["a", "b"], ["x", "ab"]).tolist() == [0.0, 0.5]
        assert scorer.problems.counts == {"raised ZeroDivisionError": 1}

    @pytest.mark.parametrize(
        ("text", "parts"),
        [
            ("warmth", ("'warmth'", "coverage", "diversity_N", "reflection", "MODULE:FUNCTION")),
            ("", ("unknown", "coverage")),
            ("diversity_0", ("'diversity_0'", "unknown")),
            ("warmth=here", ("'warmth=here'", "unknown", "fluency")),
            ("reflection", ("reflection=CHECKPOINT",)),
            ("fluency=", ("fluency=CHECKPOINT",)),
            ("fluency=/no/such/place", ("/no/such/place", "does not exist")),
            ("no_such_module:f", ("scorer 'no_such_module:f'", "no module")),
            ("absent.py:f", ("scorer 'absent.py:f'", "no file")),
        ],
    )
    def test_what_it_refuses(self, raises_input_error, text, parts):
        assert "\n" not in raises_input_error(lambda: get_objective(text), *parts)

    def test_what_is_no_function(self, functions, raises_input_error):
        raises_input_error(lambda: get_objective(f"{functions}:absent"), "scorer", "no 'absent'")
        raises_input_error(lambda: get_objective(f"{functions}:NUMBER"), "scorer", "'NUMBER'", "int")

    def test_models_without_the_head_or_a_tokenizer(self, with_tokenizer, stored_checkpoint, raises_input_error):
        three = with_tokenizer("three_labels")
        raises_input_error(lambda: get_objective(f"reflection={three}"), "scorer reflection", "3 outputs")
        raises_input_error(lambda: get_objective(f"fluency={three}"), str(three), "load_encoder")
        bare = stored_checkpoint("one_label", "bert")
        raises_input_error(lambda: get_objective(f"reflection={bare}"), str(bare), "no tokenizer")

    def test_several(self, functions, raises_input_error):
        found = get_objectives(["diversity", f"{functions}:share", "brevity"])
        assert [scorer.name for scorer in found] == ["diversity_2", "share", "brevity"]
        raises_input_error(lambda: get_objectives([]), "no scorers", "coverage")
        # Before the model is looked for.
        twice = ["fluency=/no/such/place", "diversity", "brevity", "diversity_2"]
        message = raises_input_error(lambda: get_objectives(twice), "diversity_2 are named more than once")
        assert "\n" not in message
