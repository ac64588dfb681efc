"""Benchmarks as tasks: real files, stand-ins for the Hub, and what is said about bad data."""

import hashlib
import importlib
import itertools
import json

import pytest

from rlae_jax.tasks import get_task
from rlae_jax.tasks.base import SPLITS, Examples
from rlae_jax.tasks.datasets import BENCHMARKS, load
from rlae_jax.tasks.jsonl import content_hash
from rlae_jax.tasks.rewards import REWARDS, multiple_choice

# Rows in the layouts that the Hub has, and what they mean: question, reference, options.
HUB_ROWS = {
    "gsm8k": (
        {"question": "How many?", "answer": "It is <<1+1=2>>2.\n#### 2"},
        ("How many?", "2", None),
    ),
    "mmlu": (
        {"question": "Which?", "subject": "high_school_physics", "choices": ["w", "x", "y", "z"], "answer": 2},
        ("Which?", "C", ("w", "x", "y", "z")),
    ),
    "arc_challenge": (
        {
            "id": "1",
            "question": "Which?",
            "choices": {"text": ["w", "x", "y"], "label": ["1", "2", "3"]},
            "answerKey": "3",
        },
        ("Which?", "C", ("w", "x", "y")),
    ),
    "piqa": (
        {"goal": "Which?", "sol1": "w", "sol2": "x ", "label": 1},
        ("Which?", "B", ("w", "x")),
    ),
    "triviaqa": (
        {"question": "Who?", "answer": {"value": "Ann", "aliases": ["A.", "Ann", "Anne"], "normalized_value": "ann"}},
        ("Who?", ("Ann", "A.", "Anne"), None),
    ),
    "natural_questions": (
        {"question": "who?", "answer": ["Ann", "Anne"]},
        ("who?", ("Ann", "Anne"), None),
    ),
}


def blocks(prompt):
    return prompt.split("\n\n")


def questions(examples):
    """What stands in the last block of each prompt."""
    return [prompt.rpartition("Question: ")[2].removesuffix("\nAnswer:") for prompt in examples.prompts]


@pytest.fixture
def data(shared):
    return shared / "data"


@pytest.fixture
def hub(monkeypatch):
    """hub(rows by split name) puts them where the Hub's data sets would come from; -> the calls made."""
    library = importlib.import_module("datasets")

    def put(splits):
        calls = []

        def load_dataset(path, name=None, *, split):
            calls.append((path, name, split))
            if split not in splits:
                raise ValueError(f'Unknown split "{split}". Should be one of {list(splits)}.')
            return library.Dataset.from_list(splits[split])

        monkeypatch.setattr(library, "load_dataset", load_dataset)
        return calls

    return put


@pytest.fixture
def write(tmp_path):
    """write("train", rows) -> the directory, now with train.jsonl."""

    def put(stem, rows):
        (tmp_path / f"{stem}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path

    return put


def sums(n, start=0):
    return [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(start, start + n)]


class TestRealFiles:
    @pytest.mark.parametrize(
        ("name", "counts", "first", "last"),
        [
            ("gsm8k", (6_704, 764, 1_319), "18", "14"),
            ("mmlu", (596, 89, 64), "D", "D"),
            ("arc_challenge", (1_001, 107, 1_172), "C", "A"),
            ("piqa", (1_473, 191, 168), "A", "B"),
            ("triviaqa", (1_529, 188, 178), "Cancer pathology", "Leeds, UK"),
            ("natural_questions", (2_861, 385, 359), "James I", "Turducken"),
        ],
    )
    def test_counts_and_answers(self, data, name, counts, first, last):
        task = load(name, data)
        assert tuple(len(task.split(split)) for split in SPLITS) == counts
        answers = [one if isinstance(one, str) else one[0] for one in task.split("test").references]
        assert (answers[0], answers[-1]) == (first, last)
        assert get_task(name, data_dir=data).split("test").digest() == task.split("test").digest()

    @pytest.mark.parametrize("name", ["gsm8k", "arc_challenge"])
    def test_the_published_test_split_is_the_test_split(self, data, name):
        rows = [json.loads(line) for line in (data / name / "test.jsonl").read_text().splitlines()]
        asked = load(name, data, template="{question}", shots=0).split("test").prompts
        assert [blocks_of.endswith(row["question"].strip()) for blocks_of, row in zip(asked, rows, strict=True)]

    @pytest.mark.parametrize("name", BENCHMARKS)
    def test_no_question_is_in_two_splits_or_among_the_shots(self, data, name):
        task = load(name, data)
        contents = {split: set(map(content_hash, questions(task.split(split)))) for split in SPLITS}
        assert not any(a & b for a, b in itertools.combinations(contents.values(), 2))
        shots = {block for prompt in task.split("test").prompts for block in blocks(prompt)[:-1]}
        shown = {content_hash(block.removeprefix("Question: ").rpartition("\nAnswer:")[0]) for block in shots}
        assert shown
        assert not shown & set().union(*contents.values())

    @pytest.mark.parametrize("name", BENCHMARKS)
    def test_every_prompt_can_be_continued_and_every_reference_is_right(self, data, name):
        task = load(name, data)
        for split in SPLITS:
            examples = task.split(split)
            assert all(prompt == prompt.strip() and prompt.endswith("\nAnswer:") for prompt in examples.prompts)
            for i, reference in enumerate(examples.references):
                written = reference if isinstance(reference, str) else reference[-1]
                assert task.reward(f" {written}", reference) == 1.0
                assert task.reward("", reference) == 0.0
                if examples.options is not None:
                    assert f" {reference}" in examples.options[i]

    def test_the_references_of_gsm8k_are_numbers(self, data):
        train = load("gsm8k", data, shots=0).split("train")
        assert all(reference.replace(",", "").lstrip("-").replace(".", "").isdigit() for reference in train.references)

    def test_numbered_options_are_letters(self, data):
        """Some rows of ARC have 1 to 4 for their answer."""
        rows = [json.loads(line) for line in (data / "arc_challenge" / "test.jsonl").read_text().splitlines()]
        references = load("arc_challenge", data).split("test").references
        numbered = [i for i, row in enumerate(rows) if row["answer"].isdigit()]
        assert len(numbered) > 10
        assert all(references[i] == "ABCD"[int(rows[i]["answer"]) - 1] for i in numbered)


class TestPrompts:
    def test_of_gsm8k(self, data):
        task = load("gsm8k", data, shots=1)
        assert task.split("test").prompts[1] == (
            "Solve each problem step by step. End with #### and the answer as a number.\n\n"
            "Question: Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
            "How many clips did Natalia sell altogether in April and May?\n"
            "Answer: Natalia sold 48/2 = 24 clips in May.\n"
            "Natalia sold 48+24 = 72 clips altogether in April and May.\n#### 72\n\n"
            "Question: A robe takes 2 bolts of blue fiber and half that much white fiber.  How many bolts in total "
            "does it take?\nAnswer:"
        )

    def test_of_mmlu(self, data):
        """Shots are of the question's own subject."""
        task = load("mmlu", data, subset="world_religions")
        assert task.name == "mmlu:world_religions"
        for split in SPLITS:
            for prompt in task.split(split).prompts:
                head, *shots, question = blocks(prompt)[:1] + prompt.split("\n\nQuestion: ")[1:]
                assert head == "The following are multiple choice questions (with answers) about world religions."
                assert len(shots) == 5
                assert shots[0].startswith("What is the sign of the covenant for Jewish males?\nA. The rainbow\nB.")
                assert shots[0].endswith("\nAnswer: B")
                assert question.endswith("\nAnswer:")

    def test_by_likelihood_of_the_texts(self, data):
        task = load("piqa", data, reward="likelihood", shots=1)
        test = task.split("test")
        assert task.by_likelihood
        assert task.reward is multiple_choice
        assert blocks(test.prompts[0])[-1] == "Question: How do you attach toilet paper to a glass jar?\nAnswer:"
        assert "\nAnswer: Provide the guinea pig with a cage full of a few inches of bedding" in test.prompts[0]
        assert test.options[0][0].startswith(" Press a piece of double-sided tape")
        assert test.references[0] == "A"
        assert len(test.take(7).options) == 7

    def test_by_likelihood_of_worked_answers(self, data):
        """Where there are no options to compare: as examples in a prompt have them."""
        written, read = (load("gsm8k", data, reward=reward, shots=0).split("test") for reward in (None, "likelihood"))
        assert read.prompts == written.prompts
        for text, answer in zip(read.texts(), written.references, strict=True):
            assert text.startswith(" ")
            assert text.endswith(f"#### {answer}")
        assert load("gsm8k", data, reward="likelihood", shots=0).reads_texts
        assert not load("piqa", data, reward="likelihood").reads_texts

    def test_by_likelihood_of_the_letters(self, data):
        by_letter, by_likelihood = (load("mmlu", data, reward=reward) for reward in (None, "likelihood"))
        assert by_likelihood.by_likelihood
        assert not by_letter.by_likelihood
        assert by_likelihood.split("test") == by_letter.split("test")
        assert by_letter.split("test").options[0] == (" A", " B", " C", " D")

    def test_for_chat_templates(self, data):
        task = load("arc_challenge", data, chat=True)
        assert task.chat
        assert task.stop == ()
        assert len(blocks(task.split("test").prompts[0])) == 2
        assert task.split("test").options[0] == ("A", "B", "C", "D")
        assert len(blocks(load("arc_challenge", data, chat=True, shots=2).split("test").prompts[0])) == 4

    def test_by_a_template_of_the_users(self, data):
        task = load("arc_challenge", data, template="Q: {question}\n{options}\nLetter: ", shots=1)
        _, shot, asked = blocks(task.split("test").prompts[0])
        assert shot.startswith("Q: George wants")
        # It ends with a space of its own, after which none is written.
        assert shot.endswith("\nD. palms covered with lotion\nLetter: A")
        assert asked.endswith("\nLetter: ")
        assert task.split("test").options[0] == ("A", "B", "C", "D")

    def test_braces_in_questions_are_left_alone(self, write):
        path = write("train", [{"question": f"{{x}} {i} {{", "answer": "#### 1"} for i in range(60)])
        task = load("gsm8k", path, shots=0)
        assert "{x} " in task.split("train").prompts[0]

    def test_other_rewards(self, data):
        assert load("triviaqa", data, reward="token_f1").reward is REWARDS["token_f1"]
        reward = load("triviaqa", data, reward="tests.tasks.reward_functions:same").reward
        assert reward("a", ("b", "a")) == 1.0

    def test_bad_settings(self, data, raises_input_error):
        raises_input_error(lambda: load("gsm9k", data), "'gsm9k'", *BENCHMARKS)
        raises_input_error(lambda: load("gsm8k", data, reward="bleu"), "'bleu'", "gsm8k")
        raises_input_error(lambda: load("gsm8k", data, shots=-1), "-1")
        raises_input_error(lambda: load("gsm8k", data, template="{answer}"), "{answer}", "question, options, subject")
        raises_input_error(lambda: load("gsm8k", data, template="Q:"), "lacks {question}")
        raises_input_error(lambda: load("gsm8k", data, template="{question"), "{question", "braces")
        raises_input_error(lambda: load("gsm8k", data, template="{question!r}"), "names alone")
        raises_input_error(lambda: load("mmlu", data, subset="physics"), "'physics'", "abstract algebra", "world reli")
        raises_input_error(lambda: load("gsm8k", data, subset="physics"), "'physics'", "gsm8k has none")


class TestDigest:
    def test_options_count(self):
        plain = Examples(["q"], ["A"])
        # As it was before there were options: runs know their data again by it.
        assert plain.digest() == hashlib.sha256(b'[["q"], ["A"]]').hexdigest()
        digests = {plain.digest(), *(Examples(["q"], ["A"], [options]).digest() for options in (("x",), ("x", "y")))}
        assert len(digests) == 3


class TestSplits:
    def test_test_questions_leave_the_others(self, write):
        write("train", sums(200))
        task = load("gsm8k", write("test", sums(50, start=180)), shots=0)
        assert len(task.split("test")) == 50
        asked = {*questions(task.split("train")), *questions(task.split("dev"))}
        assert asked == {row["question"] for row in sums(180)}

    def test_a_published_dev_split_is_dev(self, write):
        rows = [{"question": f"q {i}", "A": "x", "B": "y", "answer": "B"} for i in range(100)]
        write("train", rows[:70])
        write("validation", rows[60:85])
        task = load("arc_challenge", write("test", rows[80:]), shots=0)
        asked = {split: [q.partition("\n")[0] for q in questions(task.split(split))] for split in SPLITS}
        assert asked == {
            "train": [f"q {i}" for i in range(60)],
            "dev": [f"q {i}" for i in range(60, 80)],
            "test": [f"q {i}" for i in range(80, 100)],
        }

    @pytest.mark.parametrize("stem", ["train", "test"])
    def test_one_file_is_dealt_by_content(self, write, stem):
        task = load("gsm8k", write(stem, sums(300)), shots=0)
        reversed_task = load("gsm8k", write(stem, sums(300)[::-1]), shots=0)
        assert sum(len(task.split(split)) for split in SPLITS) == 300
        for split in SPLITS:
            assert sorted(task.split(split).prompts) == sorted(reversed_task.split(split).prompts)
            assert len(task.split(split)) > 10

    def test_the_limit_keeps_the_same_questions_in_any_order(self, write):
        some, others = (
            load("gsm8k", write("train", rows), shots=0, limit=50).split("train").prompts
            for rows in (sums(300), sums(300)[::-1])
        )
        assert len(some) == 50
        assert list(some) == list(others)[::-1]

    def test_csv(self, tmp_path):
        lines = ["question,A,B,answer", *(f'"q, {i}",no,yes,{"AB"[i % 2]}' for i in range(100))]
        (tmp_path / "dev.csv").write_text("\n".join(lines))
        task = load("piqa", tmp_path)
        assert sum(len(task.split(split)) for split in SPLITS) == 95
        assert "\nA. no\nB. yes\nAnswer:" in task.split("train").prompts[0]


class TestBadFiles:
    def test_no_files(self, tmp_path, raises_input_error):
        raises_input_error(lambda: load("gsm8k", tmp_path / "gone"), "gsm8k", "no directory", "gone")
        raises_input_error(lambda: load("gsm8k", tmp_path), "train.jsonl, test.jsonl", "found nothing")
        (tmp_path / "training.json").write_text("")
        raises_input_error(lambda: load("gsm8k", tmp_path), "found training.json")

    def test_other_columns(self, write, raises_input_error):
        path = write("train", [{"prompt": "a", "completion": "b"}])
        raises_input_error(
            lambda: load("gsm8k", path), "train.jsonl", "needed are question, answer", "it has prompt, completion"
        )
        raises_input_error(lambda: load("piqa", path), "goal, sol1, sol2, label or question, A, B, answer")

    def test_bad_rows(self, write, raises_input_error):
        bad = [{"question": "x", "answer": "12"}, {"question": "y"}, {"question": " ", "answer": "5"}]
        path = write("train", [*sums(3), *bad])
        raises_input_error(
            lambda: load("gsm8k", path),
            "2 rows that are no question with its answer: line 4 (its answer has no '#### NUMBER'); line 6",
            "1 rows that lack a column: line 5 has no 'answer'",
        )

    def test_letters_of_no_option(self, write, raises_input_error):
        answers = ("A", "C", "E", "0", "3", "AB", "")
        path = write("dev", [{"question": "q", "A": "x", "B": "y", "answer": answer} for answer in answers])
        raises_input_error(lambda: load("piqa", path), "6 rows", "none of its options", "full list")

    def test_numbers_of_no_option(self, write, raises_input_error):
        rows = [{"question": "q", "choices": ["x", "y"], "answer": answer} for answer in (float("inf"), 2)]
        raises_input_error(lambda: load("mmlu", write("dev", rows)), "2 rows", "line 1 (cannot convert", "line 2 (its")

    def test_lines_that_are_not_json(self, tmp_path, raises_input_error):
        (tmp_path / "train.jsonl").write_text('{"question": "a"\n[]\n')
        raises_input_error(lambda: load("gsm8k", tmp_path), "line 1", "1 lines that are not JSON objects: line 2")

    def test_too_few_for_the_shots(self, write, raises_input_error):
        raises_input_error(lambda: load("gsm8k", write("test", sums(4))), "5 shots", "there are")

    def test_an_empty_split(self, write, raises_input_error):
        task = load("gsm8k", write("test", sums(1)), shots=0)
        empty = next(split for split in SPLITS if not len(task.splits[split]))
        raises_input_error(lambda: task.split(empty), repr(empty), "empty")
        raises_input_error(lambda: task.split("validation"), "'validation'", "train, dev, test")


class TestHub:
    @pytest.mark.parametrize("name", BENCHMARKS)
    def test_layouts(self, hub, name):
        row, (question, reference, options) = HUB_ROWS[name]
        key = "goal" if name == "piqa" else "question"
        benchmark = BENCHMARKS[name]
        names = {names[0]: role for role, names in benchmark.splits.items()}
        calls = hub({split: [{**row, key: f"{question} {split} {i}"} for i in range(40)] for split in names})
        task = load(name)
        assert calls == [(benchmark.hub, benchmark.config, split) for split in names]
        test = task.split("test")
        assert len(test) == 40
        asked = f"Question: {question} {benchmark.splits['test'][0]} 0\n"
        if options is not None:
            asked += "".join(f"{letter}. {option}\n" for letter, option in zip("ABCD", options, strict=False))
        assert test.prompts[0].endswith(f"\n\n{asked}Answer:")
        assert test.references[0] == reference
        shots = "shots" if "shots" in benchmark.splits else "train"
        assert test.prompts[0].count(f"{question} {benchmark.splits[shots][0]} ") == 5
        assert len(task.split("train")) + len(task.split("dev")) == (80 if "dev" in benchmark.splits else 40) - (
            5 if shots == "train" else 0
        )

    def test_exported_files_have_the_hubs_layout_too(self, write):
        row, _ = HUB_ROWS["arc_challenge"]
        task = load("arc_challenge", write("test", [{**row, "question": f"q {i}"} for i in range(60)]), shots=0)
        assert task.split("train").references[0] == "C"

    def test_other_columns(self, hub, raises_input_error):
        hub({"train": [{"text": "a"}], "test": [{"text": "a"}]})
        raises_input_error(lambda: load("gsm8k"), "openai/gsm8k (main), split train", "question, answer", "it has text")

    def test_a_split_that_is_not_there(self, hub, raises_input_error):
        hub({"train": sums(3)})
        message = raises_input_error(lambda: load("gsm8k"), "openai/gsm8k (main), split test", "Unknown split")
        assert "\n" not in message

    def test_offline(self, monkeypatch, raises_input_error):
        library = importlib.import_module("datasets")

        def load_dataset(*args, **kwargs):
            raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub\n(OfflineModeIsEnabled)")

        monkeypatch.setattr(library, "load_dataset", load_dataset)
        message = raises_input_error(lambda: load("gsm8k"), "gsm8k", "Couldn't reach", "offline", "directory")
        assert "\n" not in message

    def test_files_need_no_hub(self, hub, write):
        calls = hub({})
        load("gsm8k", write("train", sums(60)))
        assert not calls


class TestByName:
    def test_unknown(self, raises_input_error):
        raises_input_error(lambda: get_task("gsm9k"), "'gsm9k'", "skills", *BENCHMARKS)

    def test_options(self, data, raises_input_error):
        assert len(blocks(get_task("piqa", data_dir=data, shots=0).split("test").prompts[0])) == 2
        raises_input_error(lambda: get_task("skills", data_dir=data), "skills", "'data_dir'", "comes with everything")
        raises_input_error(lambda: get_task("piqa", folder=data), "'folder'", "data_dir, subset, shots")
