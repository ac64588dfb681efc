"""Tokenizers with added tokens beyond their model's embedding: Gemma 3's <image_soft_token>, a [PAD] at vocab_size."""

import numpy as np
import pytest
from tokenizers import AddedToken

import rlae_jax as rj
from rlae_jax.evaluation import Method, evaluate
from rlae_jax.models import load
from rlae_jax.tasks import Examples, Task
from rlae_jax.tasks.rewards import exact_match
from tests.helpers.tokenizers import byte_level, sentencepiece

IMAGE = "<image_soft_token>"
ADDED = (AddedToken("</s>", special=True), AddedToken(IMAGE, special=True))
V = 256 + 2 + 1  # bytes, two words, the end token


@pytest.fixture(scope="module")
def published(make_lm, tmp_path_factory):
    """A directory whose tokenizer has one id more than the embedding."""
    tokenizer = byte_level([b" a", b" b"], ADDED)
    lm = make_lm(0, vocab=V, tokenizer=tokenizer, end_ids=(V - 1,), layers=1)
    directory = tmp_path_factory.mktemp("published") / "gemma"
    lm.save(directory)
    return directory


@pytest.fixture(scope="module")
def lm(published):
    return load(published)


@pytest.fixture(scope="module")
def mixed(lm, make_lm):
    """With a member of another tokenizer."""
    other = make_lm(1, vocab=262, tokenizer=sentencepiece(["▁", "a", "▁a"]), end_ids=(2,), layers=1)
    return rj.Ensemble([lm, other])


def test_it_loads_and_such_ids_are_never_written(lm):
    assert lm.tokenizer.convert_tokens_to_ids(IMAGE) == V
    assert lm.config.usable_vocab == V
    out = rj.Ensemble([lm]).generate(["a b", "b"], max_new_tokens=12, temperature=3.0, ignore_eos=True)
    assert all(0 <= i < V for row in out.tokens for i in row)


def test_the_padding_token_may_be_such_an_id(make_lm, tmp_path):
    tokenizer = byte_level([b" a"], (AddedToken("</s>", special=True), AddedToken("[PAD]", special=False)))
    tokenizer.pad_token = "[PAD]"
    make_lm(0, vocab=258, pad_id=258, tokenizer=tokenizer, end_ids=(257, 258)).save(tmp_path / "padded")
    padded = load(tmp_path / "padded")
    assert padded.config.pad_id == 258
    assert len(rj.Ensemble([padded]).generate(["a", " a a"], max_new_tokens=3).texts) == 2
    union = rj.Ensemble([padded, make_lm(1, vocab=262, tokenizer=sentencepiece(["▁", "a"]), end_ids=(2,))]).union
    assert len(union.own[0]) == 258


def test_a_tokenizer_of_another_model_is_refused(make_lm, tmp_path, raises_input_error):
    make_lm(0, vocab=V - 2, tokenizer=byte_level([b" a", b" b"], ADDED)).save(tmp_path / "other")
    raises_input_error(lambda: load(tmp_path / "other"), "ids up to 259", "vocab_size = 257", "another model")


def test_a_union_leaves_them_out(lm, mixed):
    assert len(mixed.union.own[0]) == V
    assert IMAGE.encode() not in [mixed.union.entry_bytes(e) for e in range(mixed.union.size)]
    out = mixed.generate(["a b"], max_new_tokens=4)
    assert all(i < V for i in out.tokens[0])
    swapped = rj.Ensemble(mixed.members[::-1])
    assert len(swapped.union.own[1]) == V


WITH_IMAGE = f"a {IMAGE} b"


class TestRefused:
    """In one line that names the token, before anything is compiled."""

    @pytest.fixture(params=["alone", "mixed"])
    def ensemble(self, request, lm, mixed):
        return rj.Ensemble([lm]) if request.param == "alone" else mixed

    @pytest.fixture
    def refused(self, raises_input_error):
        def check(call, *parts):
            message = raises_input_error(call, str(V), *parts)
            assert "\n" not in message

        return check

    def test_text(self, ensemble, refused):
        parts = (IMAGE, "gemma", "prompt 1")
        prompts = ["a", WITH_IMAGE]
        refused(lambda: ensemble.generate(prompts, max_new_tokens=2), *parts)
        refused(lambda: ensemble.generate(prompts, max_new_tokens=2, keep=True), *parts)
        refused(lambda: ensemble.stream(prompts, max_new_tokens=2), *parts)
        refused(lambda: ensemble.log_likelihoods(prompts, [["a"], ["b"]]), *parts)
        refused(lambda: ensemble.encode(prompts), *parts)
        refused(lambda: ensemble.log_likelihoods(["a"], [["a", IMAGE]]), "gemma", IMAGE)

    def test_ids(self, lm, refused, raises_input_error):
        refused(lambda: rj.Ensemble([lm]).generate(prompt_ids=[[1, V]], max_new_tokens=2), "prompt 0")
        for method in (lm.logits, lm.hidden, lm.log_probs):
            refused(lambda method=method: method([[1, V]]), "gemma")
        assert np.all(np.isfinite(lm.logits([[1, V]], [[1, 0]])[:, 0]))  # padding may be anything
        raises_input_error(lambda: lm.logits(np.array([[-1, 2]])), "gemma", "-1", f"0 to {V} - 1")

    def test_train_and_evaluate(self, ensemble, refused, tmp_path):
        examples = Examples(["a", WITH_IMAGE], ["a", "b"])
        task = Task("images", dict.fromkeys(("train", "dev", "test"), examples), exact_match, max_new_tokens=2)
        config = rj.PPOConfig(iterations=1, prompts=2)
        refused(lambda: rj.train(ensemble, task, config, tmp_path / "run"), IMAGE, "prompt 1")
        assert not (tmp_path / "run").exists()
        refused(lambda: evaluate({"uniform": Method(ensemble)}, task, "test", out=tmp_path / "results"), IMAGE)
