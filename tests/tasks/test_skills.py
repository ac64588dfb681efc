"""The embedded task: right answers, splits that share nothing, specialists that never see what is not theirs."""

import collections

import numpy as np
import pytest

from rlae_jax.tasks import get_task, skills
from rlae_jax.tasks.base import SPLITS

END = skills.TOKENS.index(skills.END)


def by_hand(prompt):
    """The answer to a prompt, by arithmetic on lists of digits."""
    digits = [ord(character) - ord("0") for character in prompt[2:6]]
    results = {
        "r": [digits[3], digits[2], digits[1], digits[0]],
        "i": [0 if d == 9 else d + 1 for d in digits],
        "s": [d for value in range(10) for d in digits if d == value],
        "c": [9 - d for d in digits],
    }
    return "".join(str(d) for letter in prompt[:2] for d in results[letter])


@pytest.fixture(scope="module")
def task():
    return skills.skills()


@pytest.fixture(scope="module")
def sequences():
    return {name: skills.specialist_sequences(known, seed=5) for name, known in skills.SPECIALISTS.items()}


def spell(ids):
    return "".join(skills.TOKENS[i] for i in ids if i != END)


def test_the_digit_strings_are_dealt_to_the_splits():
    strings = skills.digit_strings()
    assert list(strings) == list(SPLITS)
    assert sorted(s for part in strings.values() for s in part) == [f"{n:04d}" for n in range(10_000)]
    assert [len(part) for part in strings.values()] == [8_000, 1_000, 1_000]


def test_splits_share_no_digit_string(task):
    used = {split: {prompt[2:6] for prompt in examples.prompts} for split, examples in task.splits.items()}
    assert not used["train"] & used["dev"]
    assert not used["train"] & used["test"]
    assert not used["dev"] & used["test"]
    dealt = {split: set(strings) for split, strings in skills.digit_strings().items()}
    assert all(used[split] <= dealt[split] for split in SPLITS)
    assert {split: len(examples) for split, examples in task.splits.items()} == skills.EXAMPLES


def test_answers_are_right(task):
    for examples in task.splits.values():
        for prompt, reference in zip(examples.prompts, examples.references, strict=True):
            assert prompt[6:] == "="
            assert reference == by_hand(prompt)
            assert task.reward(reference, reference) == 1.0
    assert skills.answer("rs", "4821") == "12841248"
    assert skills.answer("ic", "0990") == "10019009"


def test_all_pairs_of_operations_are_asked_for_alike(task):
    for split, examples in task.splits.items():
        counts = collections.Counter(prompt[:2] for prompt in examples.prompts)
        assert len(counts) == 16
        assert min(counts.values()) > 0.6 * skills.EXAMPLES[split] / 16


def test_the_task_says_which_skill_each_span_needs(task):
    for split, examples in task.splits.items():
        expected = [[skills.OPERATION_NAMES[letter] for letter in prompt[:2]] for prompt in examples.prompts]
        assert task.skills[split] == expected
    assert task.span_length == skills.DIGITS
    assert task.max_new_tokens == len(task.splits["test"].references[0]) + 1


def test_everything_is_the_same_each_time(task, sequences):
    again = get_task("skills")
    assert {s: e.prompts for s, e in again.splits.items()} == {s: e.prompts for s, e in task.splits.items()}
    name, known = next(iter(skills.SPECIALISTS.items()))
    for one, other in zip(skills.specialist_sequences(known, seed=5), sequences[name], strict=True):
        np.testing.assert_array_equal(one, other)
    assert np.any(skills.specialist_sequences(known, seed=6)[0] != sequences[name][0])


@pytest.mark.parametrize("name", skills.SPECIALISTS)
class TestSpecialists:
    def test_they_see_no_string_of_dev_and_test(self, sequences, name):
        strings = skills.digit_strings()
        seen = {spell(row[2:6]) for row in sequences[name][0]}
        assert seen == set(strings["train"])

    def test_they_learn_the_results_of_their_own_operations_and_nothing_else(self, sequences, name):
        ids, learnt = sequences[name]
        known = skills.SPECIALISTS[name]
        assert ids.shape == learnt.shape
        rows = np.random.default_rng(0).choice(len(ids), 3_000, replace=False)
        for row, places in zip(ids[rows], learnt[rows], strict=True):
            text = spell(row)
            assert row[-1] == END
            assert places[-1]
            assert not places[:7].any()
            expected = by_hand(text[:7])
            for span, operation in enumerate(text[:2]):
                part = slice(7 + 4 * span, 11 + 4 * span)
                assert np.all(places[part] == (operation in known))
                if operation in known:
                    assert text[part] == expected[4 * span : 4 * span + 4]

    def test_foreign_spans_are_random_digits(self, sequences, name):
        """Right ones would come up once in 10,000; being told the foreign result would show at once."""
        ids, _ = sequences[name]
        known = skills.SPECIALISTS[name]
        right = total = 0
        for row in ids[::7]:
            text = spell(row)
            expected = by_hand(text[:7])
            for span, operation in enumerate(text[:2]):
                if operation not in known:
                    total += 1
                    right += text[7 + 4 * span : 11 + 4 * span] == expected[4 * span : 4 * span + 4]
        assert total > 5_000
        assert right <= 0.002 * total

    def test_no_sequence_is_all_foreign(self, sequences, name):
        ids, learnt = sequences[name]
        assert len(ids) == 12 * len(skills.digit_strings()["train"])
        assert learnt[:, 7:15].any(axis=1).all()


def test_the_specialists_know_each_operation_between_them():
    assert sorted("".join(skills.SPECIALISTS.values())) == sorted(skills.OPERATIONS)


def test_an_unknown_task(raises_input_error):
    raises_input_error(lambda: get_task("skill"), "'skill'", "skills", "JSON lines")
