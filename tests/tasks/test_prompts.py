"""Prompts from files: splits by count, the layouts, what is left out, and what is said about unusable files."""

import csv
import itertools
import json

import pytest

from rlae_jax.tasks.base import SPLITS
from rlae_jax.tasks.jsonl import content_hash
from rlae_jax.tasks.prompts import GRADES, PromptSet, graded_responses, read_prompts

HEADER = ["prompt", "hq1", "hq2", "mq1", "lq1", "lq2", "lq3", "lq4", "lq5", "topic"]


def texts(n, start=0):
    return [f"I feel that this is number {i}." for i in range(start, start + n)]


def pair_row(prompt):
    return [prompt, *(f"{column} to {prompt}" for column in HEADER[1:-1]), "a topic"]


@pytest.fixture
def write(tmp_path):
    """write(content, name) -> a path. Lists of lists are CSV, other lists JSON lines, or a JSON list for .json."""

    def write(content, name="data.jsonl"):
        path = tmp_path / name
        if isinstance(content, bytes | str):
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        elif name.endswith(".csv"):
            with path.open("w", newline="") as file:
                csv.writer(file).writerows(content)
        elif name.endswith(".json"):
            path.write_text(json.dumps(content))
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in content))
        return path

    return write


def sizes(prompts):
    return tuple(len(prompts.splits[split]) for split in SPLITS)


def everything(prompts):
    return {prompt for split in prompts.splits.values() for prompt in split}


class TestPairsFile:
    @pytest.fixture(scope="class")
    def path(self, shared):
        return shared / "data" / "pair" / "pair_reflections.csv"

    def test_splits(self, path):
        prompts = read_prompts(path)
        assert prompts.name == "pair_reflections"
        assert list(prompts.splits) == list(SPLITS)
        assert sizes(prompts) == (254, 32, 32)
        contents = [{" ".join(p.lower().split()) for p in prompts.split(split)} for split in SPLITS]
        assert sum(map(len, contents)) == 318
        assert not any(a & b for a, b in itertools.combinations(contents, 2))
        assert all(prompt == prompt.strip() for prompt in everything(prompts))

    def test_the_empty_response_is_told_and_its_prompt_is_kept(self, path):
        prompts = read_prompts(path)
        assert prompts.skipped == ("empty responses (1) left out: line 294, column lq2",)
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            row = next(row for row in reader if reader.line_num == 294)
        assert not row[HEADER.index("lq2")].strip()
        assert row[0].strip() in everything(prompts)

    def test_graded_responses(self, path):
        prompts, graded = read_prompts(path), graded_responses(path)
        assert sum(map(len, graded.values())) == 318 * 8 - 1
        counts = dict.fromkeys((0.0, 0.5, 1.0), 0)
        for split in SPLITS:
            assert {one.prompt for one in graded[split]} == set(prompts.split(split))
            assert all(one.response.strip() for one in graded[split])
            for one in graded[split]:
                counts[one.grade] += 1
        assert counts == {1.0: 318 * 2, 0.5: 318, 0.0: 318 * 5 - 1}


class TestSplits:
    @pytest.mark.parametrize(("n", "expected"), [(3, (1, 1, 1)), (10, (8, 1, 1)), (100, (80, 10, 10))])
    def test_by_count(self, write, n, expected):
        assert sizes(read_prompts(write([{"prompt": text} for text in texts(n)]))) == expected

    def test_in_the_order_of_their_contents_hashes(self, write):
        rows = [{"prompt": text} for text in texts(40)]
        prompts = read_prompts(write(rows))
        assert [p for split in SPLITS for p in prompts.split(split)] == sorted(texts(40), key=content_hash)
        again = read_prompts(write(rows[::-1], "reversed.jsonl"))
        assert again.splits == prompts.splits
        assert again.digest() == prompts.digest()

    def test_digests_know_each_split_again(self, write):
        prompts = read_prompts(write([{"prompt": text} for text in texts(20)]))
        other = PromptSet("other", prompts.splits | {"dev": ("something else",)})
        differing = [split for split in SPLITS if prompts.digest()[split] != other.digest()[split]]
        assert differing == ["dev"]
        assert all(len(digest) == 64 for digest in prompts.digest().values())

    def test_a_prompt_is_kept_once(self, write):
        """Whatever its case and white space; the first spelling stays."""
        rows = [{"prompt": v} for text in texts(30) for v in (text, text.upper(), f"  {text.replace(' ', '  ')}\n")]
        prompts = read_prompts(write(rows))
        assert everything(prompts) == set(texts(30))
        assert prompts.skipped == (
            "rows that repeat an earlier prompt (60) left out: line 2; line 3; line 5; line 6; line 8; ...",
        )

    def test_no_such_split_or_an_empty_one(self, raises_input_error):
        prompts = PromptSet("mine", {"train": ("a",), "dev": (), "test": ("b",)})
        raises_input_error(lambda: prompts.split("valid"), "mine", "'valid'", "train, dev, test")
        raises_input_error(lambda: prompts.split("dev"), "mine", "'dev'", "empty")


class TestLayouts:
    @pytest.mark.parametrize("header", [[], [HEADER], [[name.upper() for name in HEADER]]])
    def test_pair(self, write, header):
        path = write([*header, *map(pair_row, texts(12))], "pair.csv")
        assert everything(read_prompts(path)) == everything(read_prompts(path, "pair")) == set(texts(12))
        for one in itertools.chain(*graded_responses(path).values()):
            column, _, prompt = one.response.partition(" to ")
            assert prompt == one.prompt
            assert one.grade == {"h": 1.0, "m": 0.5, "l": 0.0}[column[0]] == GRADES[column]

    def test_responses_of_a_repeated_prompt_belong_to_one(self, write):
        rows = [*map(pair_row, texts(5)), pair_row(texts(1)[0].upper()), pair_row("")]
        graded = [one for part in graded_responses(write(rows, "pair.csv")).values() for one in part]
        assert {one.prompt for one in graded} == set(texts(5))
        assert sum(one.prompt == texts(1)[0] for one in graded) == 16

    def test_psych8k(self, write):
        items = [{"instruction": "You are a counselor.", "input": text, "output": "I see."} for text in texts(9)]
        items.insert(2, {"instruction": "You are a counselor.", "input": " ", "output": "I see."})
        items.insert(4, {"instruction": "You are a counselor."})
        items.append({"input": ["no text"]})
        path = write(items, "psych.json")
        prompts = read_prompts(path)
        assert everything(prompts) == set(texts(9))
        assert prompts.skipped == ("rows without a prompt (3) left out: item 3; item 5; item 12",)
        marked = write(b"\xef\xbb\xbf" + path.read_bytes(), "marked.txt")
        assert read_prompts(marked, "psych8k").splits == prompts.splits

    @pytest.mark.parametrize("name", ["data.jsonl", "data.csv"])
    def test_rows(self, write, name):
        columns = ["id", "question", *(f"other {i}" for i in range(8))]  # as many as PAIR has
        rows = [[str(i), text, *["more words here"] * 8] for i, text in enumerate(["", *texts(7)])]
        if name.endswith(".csv"):
            path = write([columns, *rows], name)
        else:
            path = write([dict(zip(columns, row, strict=True)) for row in rows], name)
        prompts = read_prompts(path, prompt_field="question")
        assert everything(prompts) == set(texts(7))
        assert prompts.skipped == (f"rows without a prompt (1) left out: line {2 if name == 'data.csv' else 1}",)

    def test_real_questions(self, shared):
        path = shared / "data" / "counsel_chat" / "counsel_chat.csv"
        prompts = read_prompts(path, prompt_field="questionText")
        with path.open(newline="", encoding="utf-8") as file:
            asked = {" ".join(row["questionText"].lower().split()) for row in csv.DictReader(file)} - {""}
        assert sum(sizes(prompts)) == len(asked)
        assert {" ".join(prompt.lower().split()) for prompt in everything(prompts)} == asked


class TestBadInput:
    def test_layouts(self, write, raises_input_error):
        path = write([{"prompt": text} for text in texts(5)])
        raises_input_error(lambda: read_prompts(path, "table"), "auto, pair, psych8k, rows", "'table'")

    @pytest.mark.parametrize("name", ["absent.csv", "absent.json", "absent.jsonl"])
    def test_no_file(self, tmp_path, raises_input_error, name):
        raises_input_error(lambda: read_prompts(tmp_path / name), name, "cannot be read")

    @pytest.mark.parametrize(
        ("name", "content", "parts"),
        [
            ("data.jsonl", [{"question": "a", "id": 1}] * 5, ("'prompt'", "'question', 'id'")),
            ("data.jsonl", "", ("'prompt'", "no rows")),
            ("data.csv", [["question", "id"], ["a", "1"]], ("'prompt'", "'question', 'id'")),
            ("data.csv", "", ("'prompt'", "no rows")),
            ("data.json", [{"instruction": "a", "text": "b"}], ("'input'", "'instruction', 'text'")),
            ("data.json", [], ("'input'", "no rows")),
        ],
    )
    def test_no_prompts(self, write, raises_input_error, name, content, parts):
        path = write(content, name)
        raises_input_error(lambda: read_prompts(path), str(path), "no prompts in the column", *parts)

    def test_too_few(self, write, raises_input_error):
        path = write([{"prompt": text} for text in ("a", "A ", "b", "b")])
        raises_input_error(lambda: read_prompts(path), str(path), "2 different prompts are too few")

    def test_broken_lines(self, write, raises_input_error):
        path = write('{"prompt": "a"}\n{"prompt": \n[1]\n')
        raises_input_error(lambda: read_prompts(path), str(path), "line 2", "not JSON objects: line 3")
        path = write('prompt\n"a" b"\n', "data.csv")
        raises_input_error(lambda: read_prompts(path), str(path), "not CSV")
        path = write(b"prompt\n\xff\n", "data.csv")
        raises_input_error(lambda: read_prompts(path), str(path), "cannot be read")

    def test_what_is_not_in_pairs_layout(self, write, raises_input_error):
        path = write([*map(pair_row, texts(4)), ["too", "few"]], "pair.csv")
        raises_input_error(lambda: read_prompts(path), str(path), "line 5 (2)", "prompt, hq1")
        raises_input_error(lambda: graded_responses(write([["a", "b"]], "other.csv")), "line 1 (2)", "hq2")
        path = write('a,"b" c\n', "pair.csv")
        raises_input_error(lambda: read_prompts(path, "pair"), str(path), "not CSV")

    def test_what_is_not_in_psych8ks_layout(self, write, raises_input_error):
        path = write({"input": "a"}, "data.json")
        raises_input_error(lambda: read_prompts(path), str(path), "dict", "list of objects")
        path = write([{"input": "a"}, "b", None], "data.json")
        raises_input_error(lambda: read_prompts(path), str(path), "item 2; item 3", "list of objects")
        path = write('{"input": "a"}\n{"input": "b"}\n', "data.json")
        raises_input_error(lambda: read_prompts(path), str(path), "one JSON document", ".jsonl")
        path = write("[" * 100_000, "data.json")
        raises_input_error(lambda: read_prompts(path), str(path), "one JSON document")
