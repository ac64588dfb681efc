"""Readers and documents that are wrong somewhere: a few of each, always the same. `python -m tests.faults.fuzz` and
`make fuzz` have more."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlae_jax.errors import InputError
from tests.faults import fuzz, mutate
from tests.faults.targets import Target, make_targets


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    return make_targets(tmp_path_factory.mktemp("fuzz"))


def test_documents_are_read(targets):
    """Otherwise a change of them would say nothing."""
    fuzz.warm(targets)
    assert len({target.name for target in targets}) == len(targets) > 40


def test_readers_take_what_is_wrong(targets):
    @settings(max_examples=6 * len(targets))
    @given(st.sampled_from(targets), st.randoms(use_true_random=False))
    def check(target, source):
        data = fuzz.spoilt(target, source)
        assert fuzz.check(target, data) is None, (target.name, data[:2_000])

    check()


@pytest.mark.parametrize(
    ("read", "found"),
    [
        (lambda data: {}["x"], "KeyError at outside: 'x'"),
        (lambda data: [0] * 2**60, "MemoryError"),
        (lambda data: exec("while True: pass"), "took more than"),
        (lambda data: exec("raise SystemExit(3)"), "SystemExit"),
        (lambda data: exec("raise InputError('\\n' * 50)", {"InputError": InputError}), "a message without words"),
    ],
)
def test_what_is_found(monkeypatch, read, found):
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    assert fuzz.check(Target("x", (), mutate.raw, read), b"").startswith(found)


def test_the_same_seed_makes_the_same_document(targets):
    for target in targets[:5]:
        assert fuzz.spoilt(target, random.Random(7)) == fuzz.spoilt(target, random.Random(7))


def test_a_message_is_readable_whatever_it_quotes():
    message = str(InputError(f"file: the name '{'x' * 50_000}' is too long\nand \x1b[2J\r\u2028 more\ttabs"))
    first, second = message.splitlines()
    assert first.startswith("file: the name 'xxx")
    assert first.endswith("' is too long")
    assert len(first) < 3_100
    assert second == r"and \x1b[2J\r\u2028 more" + "\ttabs"
