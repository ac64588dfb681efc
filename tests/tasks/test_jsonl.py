"""A user's own file as a task: splits by content, fields, and what is said about unusable files."""

import json
import re
from pathlib import Path

import pytest

from rlae_jax.tasks import jsonl
from rlae_jax.tasks.base import SPLITS
from rlae_jax.tasks.jsonl import split_of

# Of the prompts "question 0" to "question 39".
DEV, TEST = [12], [1, 3, 21, 38]
ROWS = [{"prompt": f"question {i}", "answer": f"answer {i}"} for i in range(400)]


@pytest.fixture
def write(tmp_path):
    """write(rows or text) -> a path."""

    def write(content, name="data.jsonl"):
        path = tmp_path / name
        if not isinstance(content, str | bytes):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def prompts(task):
    return {split: set(examples.prompts) for split, examples in task.splits.items()}


class TestSplits:
    def test_each_prompt_falls_into_one_split_with_its_own_answer(self, write):
        task = jsonl(write(ROWS))
        assert list(task.splits) == list(SPLITS)
        pairs = [pair for e in task.splits.values() for pair in zip(e.prompts, e.references, strict=True)]
        assert sorted(pairs) == sorted((row["prompt"], row["answer"]) for row in ROWS)

    def test_shares(self):
        counts = [0, 0, 0]
        for i in range(20_000):
            counts[SPLITS.index(split_of(f"prompt {i}"))] += 1
        assert counts[0] / 20_000 == pytest.approx(0.8, abs=0.01)
        assert counts[1] / 20_000 == pytest.approx(0.1, abs=0.01)

    def test_they_depend_neither_on_the_order_nor_on_the_rest_of_the_file(self, write):
        whole = prompts(jsonl(write(ROWS)))
        assert prompts(jsonl(write(ROWS[::-1], "reversed.jsonl"))) == whole
        part = prompts(jsonl(write(ROWS[50:90], "part.jsonl")))
        assert all(part[split] <= whole[split] for split in SPLITS)

    def test_they_are_the_same_in_every_version(self):
        """A change here would move yesterday's test prompts into today's training."""
        found = [split_of(f"question {i}") for i in range(40)]
        assert [i for i, split in enumerate(found) if split == "dev"] == DEV
        assert [i for i, split in enumerate(found) if split == "test"] == TEST

    def test_a_prompt_never_lies_in_two_splits(self, write):
        """Whatever its answers, its case or its white space."""
        rows = [
            {"prompt": variant, "answer": str(n)}
            for i in range(200)
            for n, variant in enumerate((f"What is {i}?", f"what is  {i}?", f" WHAT\tis {i}? "))
        ]
        task = jsonl(write(rows))
        words = {split: {" ".join(p.lower().split()) for p in part} for split, part in prompts(task).items()}
        assert not words["train"] & (words["dev"] | words["test"])
        assert not words["dev"] & words["test"]
        assert sum(map(len, task.splits.values())) == 600

    def test_order_within_a_split_is_the_files(self, write):
        train = jsonl(write(ROWS)).split("train").prompts
        assert list(train) == sorted(train, key=lambda prompt: int(prompt.split()[1]))


class TestFields:
    def test_names_and_reward(self, write):
        rows = [{"q": row["prompt"], "a": "7", "prompt": "x"} for row in ROWS]
        task = jsonl(write(rows, "mine.jsonl"), prompt_field="q", answer_field="a", reward="last_number")
        assert task.name == "mine"
        assert task.reward("it is 7.0", "7") == 1.0
        assert not task.token_reward
        assert task.split("train").prompts[0].startswith("question")

    def test_numbers_are_answers_too(self, write):
        rows = [{"prompt": row["prompt"], "answer": i if i % 2 else i / 4} for i, row in enumerate(ROWS)]
        train = jsonl(write(rows), reward="last_number").split("train")
        by_prompt = dict(zip(train.prompts, train.references, strict=True))
        for i, row in enumerate(ROWS):
            if row["prompt"] in by_prompt:
                assert by_prompt[row["prompt"]] == str(i if i % 2 else i / 4)

    def test_blank_lines_and_windows_line_ends(self, write):
        text = "".join(json.dumps(row) + "\r\n\r\n" for row in ROWS)
        assert prompts(jsonl(write(text))) == prompts(jsonl(write(ROWS, "plain.jsonl")))

    def test_line_separators_within_a_string_end_no_line(self, write):
        """U+2028, U+0085 and a form feed are line ends to str.splitlines, but not to JSON lines."""
        odd = ["one\u2028two", "three\u0085four"]
        text = "".join(json.dumps({"prompt": prompt, "answer": "x"}, ensure_ascii=False) + "\n" for prompt in odd)
        task = jsonl(write(text))
        assert sorted(p for part in prompts(task).values() for p in part) == sorted(odd)

    def test_a_byte_order_mark(self, write):
        task = jsonl(write(b"\xef\xbb\xbf" + b'{"prompt": "a", "answer": "b"}\n'))
        assert sum(map(len, task.splits.values())) == 1


class TestAnswers:
    def test_several_of_which_any_counts(self, write):
        rows = [{"prompt": row["prompt"], "answer": ["7", 7.5, f"{i}"]} for i, row in enumerate(ROWS)]
        task = jsonl(write(rows), reward="last_number")
        assert task.split("train").references[0] == ("7", "7.5", "0")
        assert task.reward("7.50", task.split("train").references[0]) == 1.0

    def test_a_function_of_the_users(self, write):
        task = jsonl(write(ROWS), reward="tests.tasks.reward_functions:length")
        assert task.reward("ab", "abcd") == 0.5

    def test_options_of_the_task(self, write):
        task = jsonl(write(ROWS), max_new_tokens=9, span_length=3, stop=("\n",), chat=True)
        assert (task.max_new_tokens, task.span_length, task.stop, task.chat) == (9, 3, ("\n",), True)


class TestTemplates:
    def test_fields(self, write):
        rows = [{"q": row["prompt"], "n": i, "answer": "x"} for i, row in enumerate(ROWS)]
        train = jsonl(write(rows), template="{n}. {q}? {{}}\nA:").split("train")
        assert train.prompts[0] == "0. question 0? {}\nA:"

    def test_another_wording_leaves_the_splits(self, write):
        path = write(ROWS)
        plain, worded = jsonl(path), jsonl(path, template="Q: {prompt}\nA:")
        for split in SPLITS:
            assert [f"Q: {prompt}\nA:" for prompt in plain.splits[split].prompts] == worded.splits[split].prompts

    @pytest.mark.parametrize(
        ("template", "said"),
        [
            ("{", "write {{ and }} for braces"),
            ("no field", "names no field"),
            ("{}", "names alone"),
            ("{prompt.x}", "names alone"),
            ("{prompt[0]}", "names alone"),
            ("{prompt:>9}", "names alone"),
            ("{question}", "line 1 has no 'question'"),
        ],
    )
    def test_bad_ones(self, write, raises_input_error, template, said):
        raises_input_error(lambda: jsonl(write(ROWS), template=template), said)


class TestCsv:
    def test_the_same_as_json_lines(self, write):
        text = "answer,note,prompt\r\n" + "".join(f"{row['answer']},,{row['prompt']}\r\n" for row in ROWS)
        tables, lines = jsonl(write(text, "data.csv")), jsonl(write(ROWS))
        assert {split: examples.digest() for split, examples in tables.splits.items()} == {
            split: examples.digest() for split, examples in lines.splits.items()
        }

    def test_quotes_and_line_ends_within_a_field(self, write):
        task = jsonl(write('prompt,answer\n"a ""b"",\nc",d\n', "data.CSV"))
        (examples,) = [examples for examples in task.splits.values() if len(examples)]
        assert list(examples.prompts) == ['a "b",\nc']

    def test_a_real_one(self, shared):
        task = jsonl(
            shared / "data" / "counsel_chat" / "counsel_chat.csv",
            template="{questionTitle}\n{questionText}",
            answer_field="answerText",
            reward="token_f1",
        )
        counts = {split: len(examples) for split, examples in task.splits.items()}
        assert counts == {"train": 1_757, "dev": 251, "test": 121}
        assert task.split("train").prompts[0].startswith("Can I change my feeling of being worthless to everyone?\nI")
        assert task.split("train").references[0].startswith("If everyone thinks you're worthless")

    def test_bad_files(self, write, raises_input_error):
        def check(text, *parts):
            raises_input_error(lambda: jsonl(write(text, "bad.csv")), "bad.csv", *parts)

        check("question,answer\na,b\n", "line 2 has no 'prompt'", "the first without has 'question', 'answer'")
        check("prompt,answer\na\nb,c,d\ne,f\n", "line 2 has no 'answer'", "more fields than the header: line 3")
        check("prompt,prompt,answer\n", "names 'prompt' more than once")
        check("", "empty")
        check("prompt,answer\n", "empty")
        check('prompt,answer\n"a,b\n', "not CSV", "line 2")


class TestBadFiles:
    def test_missing(self, tmp_path, raises_input_error):
        raises_input_error(lambda: jsonl(tmp_path / "none.jsonl"), "none.jsonl", "No such file")

    def test_a_directory(self, tmp_path, raises_input_error):
        raises_input_error(lambda: jsonl(tmp_path), str(tmp_path), "cannot be read")

    @pytest.mark.parametrize("content", ["", "\n\n  \n"], ids=["no-bytes", "blank-lines"])
    def test_empty(self, write, raises_input_error, content):
        raises_input_error(lambda: jsonl(write(content)), "data.jsonl", "empty")

    def test_not_text(self, write, raises_input_error):
        raises_input_error(lambda: jsonl(write(b"\xff\x00\x00\x01")), "data.jsonl", "cannot be read", "UTF-8")

    def test_lines_that_are_not_json(self, write, raises_input_error):
        text = '{"prompt": "a", "answer": "b"}\n\n{"prompt": "a"\nhello\n'
        raises_input_error(lambda: jsonl(write(text)), "2 lines that are not JSON:", "line 3 (", "line 4 (")

    def test_lists_in_lines(self, write, raises_input_error):
        raises_input_error(lambda: jsonl(write("[1]\n[2]\n")), "2 lines that are not JSON objects: line 1")

    def test_lacking_fields(self, write, raises_input_error):
        rows = [{"prompt": "a", "answer": "b"}, {"prompt": "a"}, {"answer": "b"}, {}]
        raises_input_error(
            lambda: jsonl(write(rows)),
            "3 lines that lack a field",
            "line 2 has no 'answer'",
            "line 3 has no 'prompt'",
            "line 4 has no 'prompt' and no 'answer'",
            '{"prompt": "...", "answer": "..."}',
        )

    def test_fields_by_another_name(self, write, raises_input_error):
        message = raises_input_error(lambda: jsonl(write(ROWS), prompt_field="question"), "400 lines", "'question'")
        assert len(re.findall(r"line \d+ ", message)) == 5
        listing = Path(re.search(r"full list is in (\S+)", message)[1])
        assert len(listing.read_text().splitlines()) == 400

    @pytest.mark.parametrize("value", [None, True, [], ["b", None], [["b"]], {"a": "b"}, {"text": []}], ids=str)
    def test_values_that_are_neither_text_nor_numbers(self, write, raises_input_error, value):
        rows = [ROWS[0], {"prompt": "a", "answer": value}]
        raises_input_error(lambda: jsonl(write(rows)), "1 lines whose fields are neither text nor numbers: line 2")

    def test_empty_prompts(self, write, raises_input_error):
        raises_input_error(lambda: jsonl(write([{"prompt": " ", "answer": "b"}])), "empty, or no row has a prompt")

    def test_numbers_beyond_what_python_reads(self, write, raises_input_error):
        text = '{"prompt": "a", "answer": ' + "9" * 5_000 + "}\n"
        raises_input_error(lambda: jsonl(write(text)), "not JSON", "line 1")

    def test_every_kind_at_once_is_still_short(self, write, raises_input_error):
        lines = ['{"prompt": 1}', "[1]", "{", '{"prompt": "", "answer": ""}', '{"prompt": null, "answer": null}'] * 40
        with pytest.warns(UserWarning, match="80 blank rows left out: line 4, line 5"):
            raises_input_error(lambda: jsonl(write("\n".join(lines))), "40 lines", "full list")

    def test_an_unknown_reward(self, write, raises_input_error):
        raises_input_error(lambda: jsonl(write(ROWS), reward="bleu"), "'bleu'", "exact_match")

    def test_a_split_without_examples(self, write, raises_input_error):
        task = jsonl(write([{"prompt": "question 0", "answer": "x"}]))
        empty = next(split for split, examples in task.splits.items() if not len(examples))
        raises_input_error(lambda: task.split(empty), repr(empty), "empty")
        raises_input_error(lambda: task.split("validation"), "'validation'", "train, dev, test")
