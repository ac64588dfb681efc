"""Files as people have them: other formats than JSON lines, odd rows, few rows."""

import bz2
import csv
import gzip
import json

import pytest

from rlae_jax.tasks import get_task, jsonl
from rlae_jax.tasks.base import SPLITS
from rlae_jax.tasks.prompts import read_prompts
from rlae_jax.tasks.rows import read_rows

ROWS = [{"prompt": f"question {i}", "answer": f"answer {i}; or, {i}"} for i in range(40)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def table(delimiter):
    rows = [("prompt", "answer"), *((row["prompt"], row["answer"]) for row in ROWS)]
    return "".join(delimiter.join(f'"{value}"' for value in row) + "\r\n" for row in rows)


FORMATS = {
    "list.json": json.dumps(ROWS).encode(),
    "indented.json": json.dumps(ROWS, indent=2).encode(),
    "list.jsonl": json.dumps(ROWS, indent=1).encode(),
    "lines.json": LINES.encode(),
    "table.tsv": table("\t").encode(),
    "tabs.csv": table("\t").encode(),
    "semicolons.csv": table(";").encode(),
    "lines.jsonl.gz": gzip.compress(LINES.encode()),
    "packed.jsonl": gzip.compress(LINES.encode()),
    "table.csv.gz": gzip.compress(table(",").encode()),
    "utf16.jsonl": LINES.encode("utf-16"),
    "utf16.csv": table(";").encode("utf-16"),
}


@pytest.fixture
def write(tmp_path):
    def write(content, name="data.jsonl"):
        if not isinstance(content, bytes | str):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def digests(task):
    return {split: examples.digest() for split, examples in task.splits.items()}


def pairs(task):
    return {p: r for e in task.splits.values() for p, r in zip(e.prompts, e.references, strict=True)}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_read_as_json_lines_are(write, name):
    task = jsonl(write(FORMATS[name], name))
    assert digests(task) == digests(jsonl(write(LINES)))
    assert task.name == name.split(".")[0]


def test_benchmarks_and_prompts_have_them_too(write, tmp_path):
    rows = [{"question": f"what is {i}?", "answer": f"#### {i}"} for i in range(60)]
    write(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()), "train.jsonl.gz")
    write(json.dumps([{"question": "another?", "answer": "#### 5"}]), "test.json")
    task = get_task("gsm8k", data_dir=tmp_path, shots=0)
    assert len(task.split("test")) == 1
    assert len(task.split("train")) + len(task.split("dev")) == 60
    assert len(read_prompts(write(table("\t"), "p.tsv")).splits["train"]) == 32
    assert len(read_prompts(write(json.dumps(ROWS), "p.json")).splits["train"]) == 32


class TestNamedInTheError:
    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b"PAR1\x15\x04", "a Parquet file"),
            (b"PK\x03\x04\x14", "zip archive (or a spreadsheet)"),
            (bz2.compress(LINES.encode()), "compressed by bzip2"),
            (gzip.compress(LINES.encode())[:-9], "cannot be read"),
            (LINES.encode("utf-16-le"), "UTF-16 without its mark"),
            (LINES.encode("latin-1") + b"\xe9", "save it as UTF-8"),
            (json.dumps({"version": "2.0", "data": ROWS}, indent=2).encode(), "one JSON object with 'version', 'data'"),
        ],
        ids=["parquet", "zip", "bzip2", "cut-gzip", "utf16-no-mark", "latin-1", "object"],
    )
    def test_files(self, write, raises_input_error, content, said):
        raises_input_error(lambda: jsonl(write(content)), "data.jsonl", said)

    def test_items(self, write, raises_input_error):
        raises_input_error(lambda: jsonl(write(json.dumps([*ROWS, 5]))), "1 items that are not JSON objects: item 41")
        rows = [*ROWS[:2], {"prompt": "a"}]
        raises_input_error(lambda: jsonl(write(json.dumps(rows))), "item 3 has no 'answer'")

    def test_longer_chats(self, write, raises_input_error):
        chat = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
        raises_input_error(
            lambda: jsonl(write([{"messages": chat}])),
            "chat messages that are not one of a user and one of an assistant",
            "line 1 (roles: system, user, assistant)",
        )


def test_chat_messages(write):
    expected = pairs(jsonl(write(ROWS)))
    names = {"messages": ("role", "content", "user", "assistant"), "conversations": ("from", "value", "human", "gpt")}
    for name, (who, what, user, assistant) in names.items():
        rows = [{name: [{who: user, what: p}, {who: assistant, what: a}]} for p, a in expected.items()]
        assert pairs(jsonl(write(rows))) == expected
    both = [
        {"prompt": [{"role": "user", "content": p}], "answer": [{"role": "assistant", "content": a}]}
        for p, a in expected.items()
    ]
    assert pairs(jsonl(write(both))) == expected


def test_nested_answers(write):
    """As SQuAD has them."""
    rows = [
        {"question": f"question {i}", "answers": {"text": [f"a {i}", "b"], "answer_start": [1, 2]}} for i in range(40)
    ]
    path = write(rows)
    for field in ("answers", "answers.text"):
        task = jsonl(path, prompt_field="question", answer_field=field)
        assert pairs(task)["question 3"] == ("a 3", "b")


def test_halves_of_characters(write):
    rows = [*ROWS, {"prompt": "cut \ud83d here", "answer": "\ude00"}, {"prompt": "whole \ud83d\ude00", "answer": "x"}]
    for content in (rows, json.dumps(rows)):
        read = pairs(jsonl(write(content)))
        assert read["cut \ufffd here"] == "\ufffd"
        assert read["whole \U0001f600"] == "x"
    json.dumps(read, ensure_ascii=False).encode()  # as tokenizers need them


def test_fields_of_any_length(write):
    before = csv.field_size_limit()
    long = "word " * 40_000
    task = jsonl(write(f"prompt,answer\n{long},x\n", "long.csv"))
    assert pairs(task) == {long: "x"}
    assert csv.field_size_limit() == before
    row = ",".join([long, *"abcdefgh", "topic"])
    others = "\n".join(",".join([f"prompt of {i} words", *"abcdefgh", "topic"]) for i in range(3))
    assert long.strip() in str(read_prompts(write(f"{row}\n{others}\n", "pair.csv"), "pair").splits)


class TestBlankRows:
    @pytest.mark.parametrize(
        ("content", "name"),
        [
            (LINES + '{"prompt": "", "answer": ""}\n', "x.jsonl"),
            (LINES + '{"prompt": null, "answer": " "}\n', "x.jsonl"),
            (table(",") + " \r\n,\r\n", "x.csv"),
        ],
    )
    def test_they_are_left_out(self, write, content, name):
        with pytest.warns(UserWarning, match=rf"{name}: \d blank rows left out: line 4\d"):
            task = jsonl(write(content, name))
        assert digests(task) == digests(jsonl(write(LINES)))

    def test_so_are_rows_with_an_empty_prompt(self, write):
        with pytest.warns(UserWarning, match="1 rows with an empty prompt left out: line 41"):
            task = jsonl(write([*ROWS, {"prompt": " ", "answer": "x"}]))
        assert digests(task) == digests(jsonl(write(LINES)))

    def test_of_benchmarks(self, tmp_path, write):
        rows = [{"question": f"what is {i}?", "answer": f"#### {i}"} for i in range(60)]
        write([*rows, {"question": "", "answer": None}], "train.jsonl")
        with pytest.warns(UserWarning, match="blank rows"):
            task = get_task("gsm8k", data_dir=tmp_path, shots=0)
        assert sum(map(len, task.splits.values())) == 60


class TestFewRows:
    @pytest.mark.parametrize("n", [3, 4, 7])
    def test_every_split_has_some(self, write, n):
        rows = ROWS[13 : 13 + n]  # whose hashes are all of train
        task = jsonl(write(rows))
        assert [len(task.splits[split]) for split in SPLITS] == [n - 2, 1, 1]
        assert pairs(task) == {row["prompt"]: row["answer"] for row in rows}
        backwards = jsonl(write(rows[::-1]))
        for split in SPLITS:
            assert set(backwards.splits[split].prompts) == set(task.splits[split].prompts)

    def test_a_prompt_lies_in_one_split(self, write):
        rows = [row | {"prompt": row["prompt"].upper()} for row in ROWS[13:16]] + ROWS[13:16]
        task = jsonl(write(rows))
        words = [{p.lower() for p in examples.prompts} for examples in task.splits.values()]
        assert sum(map(len, words)) == len(set().union(*words)) == 3

    def test_benchmarks(self, tmp_path, write):
        for names, expected in ((("train",), [1, 1, 1]), (("train", "test"), [2, 1, 3])):
            for name in names:
                rows = [{"question": f"{name} question {i}", "answer": f"#### {i}"} for i in range(3)]
                write(rows, f"{name}.jsonl")
            task = get_task("gsm8k", data_dir=tmp_path, shots=0)
            assert [len(task.splits[split]) for split in SPLITS] == expected


def test_places_are_those_of_the_file(write):
    rows, findings = read_rows(write('\n{"a": 1}\n\nx\n{"b": 2}\n'))
    assert rows == [("line 2", {"a": 1}), ("line 5", {"b": 2})]
    assert findings == [("lines that are not JSON", "line 4 (Expecting value)")]
