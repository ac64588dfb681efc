"""Members with one vocabulary and chat templates of their own, and templates that cannot be used."""

import copy
import dataclasses

import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax.evaluation import Method, evaluate
from rlae_jax.tasks import Examples, Task
from rlae_jax.tasks.rewards import token_f1
from tests.helpers import reference
from tests.helpers.reference import log_softmax

CHARACTERS = "abcdefghijklmnop"
V = len(CHARACTERS) + 1
ASKS = "c{{ messages[0]['content'] }}d"
CITES = "{{ messages[0]['content'] }}efgh{{ eos_token }}"
PROMPTS = ["ab", "h", "mnop"]
N = 7


@pytest.fixture(scope="module")
def with_template(make_lm, make_tokenizer):
    """with_template(seed, template) -> a member."""
    tokenizer = make_tokenizer(CHARACTERS)

    def make(seed, template, **fields):
        own = copy.deepcopy(tokenizer)
        own.chat_template = template
        return make_lm(seed, vocab=V, layers=1, tokenizer=own, end_ids=(V - 1,), name=f"member-{seed}", **fields)

    return make


@pytest.fixture(scope="module")
def pair(with_template):
    return [with_template(0, ASKS), with_template(1, CITES, width=12, heads=2, kv_heads=1, head_width=6)]


def by_hand(members, weights, n=N):
    """Greedy answers without a cache: each member reads its own prompt and what was written."""
    answers = []
    for prompt in PROMPTS:
        rows = [rj.Ensemble([lm]).encode([prompt], chat=True)[0] for lm in members]
        written = []
        for _ in range(n):
            own = [
                log_softmax(reference.read(lm, [*row, *written], 32)[1]) for lm, row in zip(members, rows, strict=True)
            ]
            written.append(int(np.argmax(sum(w * np.exp(p) for w, p in zip(weights, own, strict=True)))))
        answers.append(written)
    return answers


class TestOwnTemplates:
    def test_each_member_reads_its_own(self, pair):
        ensemble = rj.Ensemble(pair)
        assert ensemble.union is None
        assert ensemble.encode(["ab"], chat=True) == [([2, 0, 1, 3], [0, 1, 4, 5, 6, 7, V - 1])]
        assert ensemble.encode(["ab"]) == [[0, 1]]
        for weights in ([0.5, 0.5], [0.3, 0.7]):
            out = ensemble.generate(PROMPTS, weights, max_new_tokens=N, chat=True, ignore_eos=True)
            assert out.tokens == by_hand(pair, weights)
            swapped = rj.Ensemble(pair[::-1])
            other = swapped.generate(PROMPTS, weights[::-1], max_new_tokens=N, chat=True, ignore_eos=True)
            assert other.tokens == out.tokens
            assert other.texts == out.texts

    def test_weight_on_one_is_that_member_alone(self, pair):
        for k, lm in enumerate(pair):
            alone = rj.Ensemble([lm]).generate(PROMPTS, max_new_tokens=N, chat=True)
            out = rj.Ensemble(pair).generate(PROMPTS, np.eye(2)[k], max_new_tokens=N, chat=True)
            assert (out.texts, out.tokens, out.finish_reasons) == (alone.texts, alone.tokens, alone.finish_reasons)

    def test_going_on_streaming_and_samples(self, pair):
        ensemble = rj.Ensemble(pair)
        options = {"chat": True, "temperature": 1.0, "seed": 3}
        whole = ensemble.generate(PROMPTS, max_new_tokens=N, **options)
        part = ensemble.generate(PROMPTS, max_new_tokens=3, keep=True, **options)
        assert ensemble.extend(part, N - 3).tokens == whole.tokens
        pieces = list(ensemble.stream(PROMPTS, max_new_tokens=N, **options))
        assert ["".join(row) for row in zip(*pieces, strict=True)] == whole.texts
        assert len(ensemble.generate(PROMPTS, samples=2, max_new_tokens=3, **options).texts) == 6

    def test_log_likelihoods(self, pair):
        options = [["ab", "c"], ["d"], ["e", "fg"]]
        found = rj.Ensemble(pair).log_likelihoods(PROMPTS, options, [0.4, 0.6], chat=True)
        for prompt, texts, values in zip(PROMPTS, options, found, strict=True):
            rows = [rj.Ensemble([lm]).encode([prompt], chat=True)[0] for lm in pair]
            for text, value in zip(texts, values, strict=True):
                ids = [CHARACTERS.index(c) for c in text]
                total = 0.0
                for t, i in enumerate(ids):
                    own = [
                        log_softmax(reference.read(lm, [*r, *ids[:t]], 32)[1])[i]
                        for lm, r in zip(pair, rows, strict=True)
                    ]
                    total += np.log(0.4 * np.exp(own[0]) + 0.6 * np.exp(own[1]))
                assert value == pytest.approx(total, abs=1e-4)

    def test_equal_templates_stay_one_prompt(self, with_template):
        members = [with_template(0, ASKS), with_template(1, ASKS)]
        members[1].tokenizer.pad_token = "p"  # which the template does not write
        ensemble = rj.Ensemble(members)
        assert ensemble.encode(["ab"], chat=True) == [[2, 0, 1, 3]]
        assert ensemble.spec(chat=True).union is None

    def test_the_same_template_may_write_different_tokens(self, with_template):
        members = [with_template(0, CITES), with_template(1, CITES)]
        members[1].tokenizer.eos_token = "a"
        assert rj.Ensemble(members).encode(["b"], chat=True) == [([1, 4, 5, 6, 7, V - 1], [1, 4, 5, 6, 7, 0])]

    def test_training_and_evaluating(self, pair, tmp_path):
        ensemble = rj.Ensemble(pair)
        examples = Examples(PROMPTS, ["a b", "c", "d"])
        splits = dict.fromkeys(("train", "dev", "test"), examples)
        task = Task("chats", splits, token_f1, max_new_tokens=4, span_length=2, chat=True)
        config = rj.PPOConfig(iterations=1, prompts=2, epochs=1, minibatches=1)
        policy = rj.train(ensemble, task, config, tmp_path / "run")
        results = evaluate({"agent": Method(ensemble, policy)}, task, "test", out=tmp_path / "results")
        assert results["methods"]["agent"]["n"] == 3


def test_a_member_without_a_template_is_told_in_any_order(with_template, raises_input_error):
    members = [with_template(0, ASKS), with_template(1, None), with_template(2, ASKS)]
    said = {
        raises_input_error(lambda order=order: rj.Ensemble(order).generate(["a"], chat=True), "member-1")
        for order in (members, members[::-1], [members[1], members[0]])
    }
    assert said == {"member-1 has no chat template; leave out chat"}
    assert rj.Ensemble(members).encode(["a"]) == [[0]]


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        ("{{ raise_exception('Only with\nan image') }}", ("TemplateError: Only with an image",)),
        ("{% for m in %}", ("TemplateSyntaxError",)),
        ("{{ messages[0].foo.bar }}", ("UndefinedError", "foo")),
        ("{{ 1 / 0 }}", ("ZeroDivisionError",)),
        ({"tool_use": "a", "rag": "b"}, ("templates for tool_use, rag", "none called default")),
    ],
    ids=["raises", "does-not-parse", "undefined", "fails", "no-default"],
)
def test_templates_that_cannot_be_used(with_template, raises_input_error, template, parts):
    for members in ([with_template(3, template)], [with_template(0, ASKS), with_template(3, template)]):
        ensemble = rj.Ensemble(members)
        message = raises_input_error(
            lambda e=ensemble: e.generate(["a"], chat=True), "member-3", *parts, "leave out chat"
        )
        assert "\n" not in message


def test_a_default_among_several(with_template):
    several = with_template(0, {"tool_use": "a", "default": ASKS})
    assert rj.Ensemble([several]).encode(["b"], chat=True) == [[2, 1, 3]]


def test_an_encoder_decoder_cannot_have_one_of_its_own(with_template, t5, raises_input_error):
    member = with_template(0, ASKS)
    other = copy.deepcopy(member.tokenizer)
    other.chat_template = CITES
    ensemble = rj.Ensemble([dataclasses.replace(t5, tokenizer=other), member])
    raises_input_error(lambda: ensemble.generate(["a"], chat=True), "different chat templates", "encoder-decoder")


def test_prompts_that_are_no_text(pair, raises_input_error):
    ensemble = rj.Ensemble(pair)
    raises_input_error(lambda: ensemble.generate(["a", "x\ud83d", 5]), "2 prompts", "prompt 1", "prompt 2 is 5")
