"""The embedded tasks: right answers, splits that share nothing, spans that do or do not fit the operations."""

import itertools

import pytest

from rlae_jax.tasks import embedded, skills
from rlae_jax.tasks.base import SPLITS
from tests.helpers.embedded import by_hand, digits_of, letters_of

NAMES = list(embedded.FORMS)


@pytest.fixture(scope="module")
def tasks():
    return {name: embedded.embedded(name) for name in NAMES}


@pytest.mark.parametrize("length", [3, 4, 5])
def test_the_digit_strings_are_dealt_to_the_splits(length):
    strings = embedded.digit_strings(length)
    assert list(strings) == list(SPLITS)
    assert sorted(s for part in strings.values() for s in part) == [f"{n:0{length}d}" for n in range(10**length)]
    for split, share in skills.SHARES.items():
        assert len(strings[split]) == pytest.approx(share * 10**length, rel=0.2)


def test_four_digits_are_dealt_as_those_of_skills():
    """One pool of specialists answers both, and may have seen no test string of either."""
    ours, theirs = embedded.digit_strings(4), skills.digit_strings()
    assert {split: set(part) for split, part in ours.items()} == {split: set(part) for split, part in theirs.items()}


@pytest.mark.parametrize("name", NAMES)
class TestTasks:
    def test_answers_are_right(self, tasks, name):
        task = tasks[name]
        assert task.name == name
        for split, examples in task.splits.items():
            assert len(examples) == skills.EXAMPLES[split]
            for prompt, reference in zip(examples.prompts, examples.references, strict=True):
                assert reference == by_hand(prompt)
                assert task.reward(reference, reference) == 1.0
                assert task.reward(reference + "0", reference) == 0.0

    def test_splits_share_no_digit_string(self, tasks, name):
        for split, examples in tasks[name].splits.items():
            used = {digits_of(prompt) for prompt in examples.prompts}
            lengths = {len(digits) for digits in used}
            assert lengths == set(embedded.FORMS[name].lengths)
            assert used <= {digits for length in lengths for digits in embedded.digit_strings(length)[split]}

    def test_prompts_ask_for_the_forms_operations_alike(self, tasks, name):
        form = embedded.FORMS[name]
        for examples in tasks[name].splits.values():
            asked = [letters_of(prompt) for prompt in examples.prompts]
            assert asked == [form.operations_of(prompt) for prompt in examples.prompts]
            turned = {prompt[0].isdigit() for prompt in examples.prompts}
            assert turned == {form.digits_first}
            orders = list(itertools.permutations(form.groups))
            for operations in asked:
                fits = [all(a in b for a, b in zip(operations, order, strict=True)) for order in orders]
                assert any(fits), operations
            for place in range(form.per_prompt):
                letters = [operations[place] for operations in asked]
                assert set(letters) == set(form.operations)
                assert min(map(letters.count, form.operations)) > 0.7 * len(letters) / len(form.operations)

    def test_answers_and_their_end_fit(self, tasks, name):
        task = tasks[name]
        longest = max(len(reference) for examples in task.splits.values() for reference in examples.references)
        assert task.max_new_tokens == longest + 1 <= 16

    def test_everything_is_the_same_each_time(self, tasks, name):
        again = embedded.embedded(name)
        assert again.splits == tasks[name].splits
        assert again.skills == tasks[name].skills

    def test_skills_are_told_where_a_span_is_an_operation(self, tasks, name):
        task = tasks[name]
        if embedded.FORMS[name].lengths != (4,):
            assert task.skills is None
            return
        for split, examples in task.splits.items():
            expected = [[embedded.OPERATION_NAMES[a] for a in letters_of(prompt)] for prompt in examples.prompts]
            assert task.skills[split] == expected


@pytest.mark.parametrize("name", ["skills3", "mixed"])
def test_spans_begin_and_end_within_operations(tasks, name):
    task = tasks[name]
    for examples in task.splits.values():
        for prompt in examples.prompts:
            ends = {place * len(digits_of(prompt)) for place in (1, 2, 3)}
            assert not ends & set(range(0, task.max_new_tokens, task.span_length)), prompt
            # Some span holds parts of two operations, so that not every choice is one of a single member.
            assert any(end % task.span_length for end in list(ends)[:-1])


def test_what_a_task_of_the_circle_is_apart_by_is_in_no_other_one(tasks):
    """An agent that was trained on the others has not seen it."""

    def pairs(name):
        asked = [letters_of(prompt) for examples in tasks[name].splits.values() for prompt in examples.prompts]
        return {a + b for letters in asked for a, b in itertools.pairwise(letters)}

    def strings(name):
        return {digits_of(prompt) for examples in tasks[name].splits.values() for prompt in examples.prompts}

    held = pairs("circle_held")
    assert held == set(embedded.HELD_PAIRS)
    assert sorted(a for a, _ in held) == sorted(b for _, b in held) == sorted("riscdt")
    others = [name for name in embedded.CIRCLE if name != "circle_held"]
    every = {a + b for a in "riscdt" for b in "riscdt"}
    assert all(pairs(name) == every - held for name in others)
    first = {name: {digits[0] for digits in strings(name)} for name in embedded.CIRCLE}
    assert first.pop("circle_digits") == set("89")
    assert all(seen == set("01234567") for seen in first.values())
    lengths = {name: {len(digits) for digits in strings(name)} for name in embedded.CIRCLE}
    assert lengths.pop("circle_long") == {5, 6}
    assert set(map(tuple, lengths.values())) == {(4,)}
    assert [name for name in embedded.CIRCLE if embedded.FORMS[name].per_prompt == 3] == ["circle_three"]
    assert [name for name in embedded.CIRCLE if embedded.FORMS[name].digits_first] == ["circle_turned"]


def test_only_tasks_of_one_tokenizer_are_scored_by_tokens(tasks):
    assert [name for name, task in tasks.items() if not task.token_reward] == ["mixed"]
