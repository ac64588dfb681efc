"""What is written carries its digest; on reading one changed byte is noticed, and what older versions wrote is not."""

import contextlib
import json
from typing import Any

import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax import digests, files, records
from rlae_jax.errors import InputError
from rlae_jax.runs.metrics import MetricsLog, read_metrics

VALUE = {"schema": 1, "weights": {"a": 0.1, "b": [1e-7, None, True]}, "text": "ü\u2028\ud800", "seconds": 1.5}


class Small(records.Record):
    weights: dict[str, Any]
    text: str
    seconds: float
    schema: int = 1


def flipped(content):
    """The content with each bit flipped, one at a time."""
    for i in range(len(content)):
        for bit in range(8):
            yield content[:i] + bytes([content[i] ^ 1 << bit]) + content[i + 1 :]


def test_an_object_comes_back_and_every_flipped_bit_of_it_is_noticed_or_harmless(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, VALUE)
    assert files.read_json(path) == VALUE
    assert records.read(path, Small).text == VALUE["text"]
    noticed = harmless = 0
    for content in flipped(path.read_bytes()):
        path.write_bytes(content)
        try:
            found = records.read(path, Small)
        except InputError:
            noticed += 1
        else:
            # A time is no result: two runs that have all else alike have one digest.
            assert (found.weights, found.text, found.schema) == (VALUE["weights"], VALUE["text"], 1)
            harmless += 1
    assert noticed > 10 * harmless


def test_a_message_says_what_is_wrong_rather_than_that_something_is(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, VALUE)
    for old, new, told in (
        ('"text"', '"texts"', "unknown key texts"),
        ('"schema": 1', '"schema": 7', "written by a newer version"),
        ("0.1", "0.2", 'edited by hand \\(then remove the key "digest"\\)'),
    ):
        files.write_json(path, VALUE)
        path.write_text(path.read_text().replace(old, new))
        with pytest.raises(InputError, match=told):
            records.read(path, Small)


def test_what_has_no_digest_is_taken_as_it_is(tmp_path):
    path = tmp_path / "x.json"
    for value in (VALUE, VALUE | {"digest": "md5"}):
        path.write_text(json.dumps(value))
        assert files.read_json(path) == value
    files.write_json(path, VALUE, ours=False)
    assert json.loads(path.read_text()) == VALUE


def test_two_runs_that_differ_in_their_times_alone_have_one_digest():
    other = VALUE | {"seconds": 2.5, "rows": [{"ms_per_token": 3}]}
    assert digests.sealed(other) == digests.sealed(other | {"seconds": 1, "rows": [{"ms_per_token": 4}]}) | {
        "seconds": 2.5,
        "rows": [{"ms_per_token": 3}],
    }
    assert digests.sealed(VALUE)["digest"] != digests.sealed(VALUE | {"text": ""})["digest"]


def test_lines_that_grow(tmp_path):
    log = MetricsLog(tmp_path, -1)
    for i in range(3):
        log.write(i, {"dev": i / 3})
    log.close()
    path = tmp_path / "metrics.jsonl"
    rows, content = read_metrics(tmp_path), path.read_bytes()
    assert rows == [{"iteration": i, "dev": i / 3} for i in range(3)]
    for changed in flipped(content):
        path.write_bytes(changed)
        with contextlib.suppress(InputError):  # of a key that is called otherwise there is one more
            assert [row | known for row, known in zip(read_metrics(tmp_path), rows, strict=True)] == read_metrics(
                tmp_path
            )
    last = content.rindex(b"\n", 0, -1) + 1
    for end in range(last, len(content) - 1):  # killed in the middle of a line
        path.write_bytes(content[:end])
        assert read_metrics(tmp_path) == rows[:2]
    path.write_bytes(content[:-1])
    assert read_metrics(tmp_path) == rows


class TestDirectories:
    @pytest.fixture
    def made(self, tmp_path):
        with files.making(tmp_path / "made") as partial:
            (partial / "a.bin").write_bytes(bytes(100))
            files.write_json(partial / "b" / "c.json", {"x": 1})
            with files.making(partial / "own") as inner:
                (inner / "d").write_text("d")
        return tmp_path / "made"

    def test_what_is_told(self, made):
        assert json.loads((made / "digests.json").read_text())["files"].keys() == {
            "a.bin",
            "b/c.json",
            "own/digests.json",
        }
        digests.check(made)
        (made / "own" / "d").write_text("e")
        digests.check(made)
        with pytest.raises(InputError, match="own: d: content differs"):
            digests.check(made / "own")
        (made / "new").touch()
        digests.check(made)
        (made / "a.bin").write_bytes(bytes(99) + b"\1")
        with pytest.raises(InputError, match=r"made: a\.bin: content differs from its digest; .* remove digests\.json"):
            digests.check(made)
        digests.check(made, ".json")
        (made / "a.bin").unlink()
        with pytest.raises(InputError, match=r"incomplete: a\.bin is missing"):
            digests.check(made)

    @pytest.mark.parametrize(
        "text", ["{", "[]", '{"schema": 1}', '{"schema": 1, "files": {"../x": ""}}', '{"files": {}}']
    )
    def test_a_list_that_is_none(self, made, text):
        (made / "digests.json").write_text(text)
        with pytest.raises(InputError, match=r"digests\.json: "):
            digests.check(made)

    def test_none_or_an_empty_one_of_a_process_that_was_killed(self, made):
        (made / "digests.json").write_text("")
        digests.check(made)
        (made / "digests.json").unlink()
        digests.check(made)

    def test_while_it_is_read(self, made):
        with digests.checking(made):
            pass
        with pytest.raises(ZeroDivisionError), digests.checking(made):
            1 / 0  # noqa: B018
        (made / "a.bin").write_bytes(b"")
        for error in (InputError("other"), ZeroDivisionError()):
            with pytest.raises(digests.Damaged, match=r"a\.bin"), digests.checking(made):
                raise error


def test_every_flipped_byte_of_a_saved_model_is_noticed(make_lm, make_tokenizer, tmp_path):
    lm = make_lm(0, vocab=5, tokenizer=make_tokenizer("abcd"))
    lm.save(tmp_path / "model")
    whole = rj.load(tmp_path / "model").fingerprint()
    rng = np.random.default_rng(0)
    for path in sorted((tmp_path / "model").iterdir()):
        content = path.read_bytes()
        for place in rng.integers(len(content), size=3):
            path.write_bytes(content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :])
            with pytest.raises(InputError, match=r"digest|not the name|missing"):
                rj.load(tmp_path / "model")
        path.write_bytes(content)
    assert rj.load(tmp_path / "model").fingerprint() == whole
