"""The text encoder in the loop: the same as an encoder that is run, without buffer, on the spelled ids of each span."""

import dataclasses

import jax
import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

import rlae_jax as rj
from rlae_jax.config import AgentConfig
from rlae_jax.fusion.policy import BoundPolicy
from rlae_jax.fusion.reading import read_prompts
from rlae_jax.fusion.vocabulary import spell_texts, token_bytes
from rlae_jax.models import Encoder, ModelConfig
from rlae_jax.models.transformer import init_params
from rlae_jax.ppo.agent import PPOAgent
from tests.helpers.tokenizers import byte_level

PROMPTS = ["Once upon a time", "x", "two and two are four, and more", "Żółw 你好"]
N, L = 10, 2
TOKENS = 16  # that the encoder reads: less than prompt and text


@pytest.fixture(scope="module")
def encoder():
    """A small encoder with a byte-level tokenizer that merges a few pieces and puts ids around a text."""
    tokenizer = byte_level([b" a", b"on", b"an", b" t", b"nd", b"four"])
    tokenizer.add_special_tokens({"cls_token": "<s>", "sep_token": "<e>"})
    around = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "<e>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A <e>", special_tokens=around)
    sizes = {"width": 16, "layers": 2, "heads": 2, "kv_heads": 2, "head_width": 8, "ffn_width": 24}
    config = ModelConfig(
        vocab=len(tokenizer), causal=False, has_head=False, rope=None, learned_positions=40, context=40, **sizes
    )
    return Encoder(config, init_params(config, jax.random.key(5)), tokenizer, name="small")


@pytest.fixture(scope="module")
def same(shared, make_lm):
    stories = AutoTokenizer.from_pretrained(shared / "models" / "stories260K")
    return rj.Ensemble(
        [make_lm(k, vocab=520, tokens=512, tokenizer=stories, end_ids=(1,), layers=1, sharpness=2.0) for k in range(2)]
    )


@pytest.fixture(scope="module")
def mixed(shared, make_lm, same):
    gpt2 = AutoTokenizer.from_pretrained(shared / "tokenizers" / "gpt2")
    other = make_lm(7, vocab=50_257, tokenizer=gpt2, name="gpt2", end_ids=(50_256,), layers=1)
    return rj.Ensemble([other, same.members[0]])


def spelled(ensemble, encoder, entry):
    """The encoder's ids of one token or entry, which stand for the same bytes."""
    pieces = (
        token_bytes(ensemble.tokenizer, "") if ensemble.union is None else {entry: ensemble.union.entry_bytes(entry)}
    )
    piece = pieces[entry]
    ids, offsets = spell_texts([piece], encoder.tokenizer, "small")
    assert b"".join(token_bytes(encoder.tokenizer, "small")[i] for i in ids) == (piece or b"")
    return ids[offsets[0] : offsets[1]].tolist()


@pytest.mark.parametrize("kind", ["same", pytest.param("mixed", marks=pytest.mark.slow)])
def test_the_encoder_in_the_loop_equals_one_without_a_buffer(kind, request, encoder, record_property):
    ensemble = request.getfixturevalue(kind)
    policy = PPOAgent(AgentConfig(reads=("text", "span"), encoder="small", projection=4, ffn_width=8))
    reader = ensemble.reader(encoder)
    assert len(reader.before) == len(reader.after) == 1
    text = read_prompts(PROMPTS, encoder, reader, TOKENS)
    options = {"span_length": L, "max_new_tokens": N, "temperature": 1.0, "ignore_eos": True}
    spec = ensemble.spec(policy=policy, record=True, sample_weights=True, reader=reader, **options)
    params = policy.init(jax.random.key(0), spec.dims)
    state = ensemble.run(ensemble.encode(PROMPTS), params, 3, spec, text=text)
    lost, differ, total = 0, 0, 0
    for b, prompt in enumerate(PROMPTS):
        ids = encoder.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        for p in range(int(state.decisions[b])):
            room = TOKENS - 2
            lost += len(ids) > room
            read = [*reader.before, *ids[-room:], *reader.after]
            expected = encoder.hidden(np.array([read]))[0, 0]
            found = state.trajectory.observation.text[b, p]
            np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
            for entry in state.tokens[b, p * L : (p + 1) * L].tolist():
                ids = ids + spelled(ensemble, encoder, entry)
        text = b"".join(token_bytes(encoder.tokenizer, "small")[i] for i in ids).decode(errors="ignore")
        again = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
        differ, total = differ + len(set(enumerate(ids)) ^ set(enumerate(again))) / 2, total + len(ids)
    assert lost > 3  # the oldest text went in several spans
    record_property("ids unlike those of the whole text", differ / total)


def test_a_trained_policy_brings_its_encoder(same, encoder, raises_input_error):
    policy = PPOAgent(AgentConfig(reads=("text",), encoder="small", projection=4, ffn_width=8))
    reader = same.reader(encoder)
    dims = same.spec(policy=policy, span_length=L, max_new_tokens=N, reader=reader).dims
    assert dims.text == 16
    params = policy.init(jax.random.key(1), dims)
    params["actor"]["w2"] = params["actor"]["w2"] * 300
    bound = BoundPolicy(policy, params, dims, L, encoder=encoder, text_tokens=TOKENS)
    out = same.generate(PROMPTS, bound, max_new_tokens=N, ignore_eos=True)
    weights = out.weights
    assert np.ptp(weights[..., 0]) > 0.05
    read = same.score_tokens(same.encode(PROMPTS), out.tokens, bound, prompts=PROMPTS)  # not written, but given
    np.testing.assert_allclose([one.weights[::L] for one in read], weights, atol=1e-5)
    alone = same.generate(PROMPTS[2:3], bound, max_new_tokens=N, ignore_eos=True)
    np.testing.assert_allclose(alone.weights[0], weights[2], atol=1e-5)
    ids = [same.tokenizer(prompt)["input_ids"] for prompt in PROMPTS[:1]]
    by_ids = same.generate(prompt_ids=ids, prompt_mask=np.ones_like(ids), weights=bound, max_new_tokens=N)
    np.testing.assert_allclose(by_ids.weights[0, 0], weights[0, 0], atol=1e-5)
    homeless = dataclasses.replace(bound, encoder=None)
    raises_input_error(lambda: same.generate(PROMPTS, homeless), "encoder")
    raises_input_error(lambda: AgentConfig(reads=("text",)), "encoder")
    raises_input_error(lambda: AgentConfig(encoder="small"), "encoder")
    raises_input_error(lambda: same.generate(PROMPTS, bound, span_length=3), "spans of 2", "3")


def test_more_spans_than_the_agent_knows(same, raises_input_error):
    policy = PPOAgent(AgentConfig(reads=("span",), ffn_width=8))
    dims = same.spec(policy=policy, span_length=L, max_new_tokens=N).dims
    bound = BoundPolicy(policy, policy.init(jax.random.key(1), dims), dims, L)
    raises_input_error(lambda: same.generate(PROMPTS, bound, max_new_tokens=N + 1), "6 spans", "5", "max_spans")
