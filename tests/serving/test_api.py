"""Reading bodies: what they mean, and for everything wrong one error that names the field and what would be right."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlae_jax.serving import fields as tables
from rlae_jax.serving.api import Catalogue, read_chat, read_completion
from rlae_jax.serving.fields import ApiError, read_json
from tests.helpers.serving import AGENT, MEMBERS, FakeEngine, make_catalogue

COMPLETION = {"model": "both", "prompt": "ab"}
CHAT = {"model": "both", "messages": [{"role": "user", "content": "ab"}]}


@pytest.fixture(scope="module")
def catalogue():
    engine = FakeEngine()
    yield make_catalogue(engine)
    engine.close()


def refused(read, body, catalogue):
    with pytest.raises(ApiError) as caught:
        read(body, catalogue)
    return caught.value


def test_names_that_are_taken_get_a_number():
    engine = FakeEngine()
    for lm in engine.ensemble.members:
        lm.name = "same"
    catalogue = Catalogue.create(engine, name="same", fusion="linear", policies={"same": None}, created=1)
    engine.close()
    assert list(catalogue.models) == ["same", "same-2", "same-3", "same-4"]
    assert catalogue.members == ("same-2", "same-3")
    assert catalogue.models["same-3"].weights == (0.0, 1.0)
    assert catalogue.models["same-4"].weights == "same"  # as the engine calls it


class TestMeaning:
    def test_defaults_are_the_apis(self, catalogue):
        call = read_completion(COMPLETION, catalogue)
        (request,) = call.requests
        assert (request.prompt, request.weights, request.options.samples) == ("ab", None, 1)
        assert (request.options.max_new_tokens, request.options.temperature) == (16, 1.0)
        assert not any((call.stream, call.echo, call.logprobs, call.rlae, request.options.scores))

    def test_everything_at_once(self, catalogue):
        body = COMPLETION | {
            **{"prompt": [[1, 2], [3]], "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1},
            **{"n": 2, "seed": 7, "stop": "x", "stream": True, "stream_options": {"include_usage": True}, "echo": True},
            **{"logprobs": 2, "best_of": 2, "min_tokens": 1, "ignore_eos": True, "repetition_penalty": 1.5},
            **{"rlae": {"weights": [1, 3], "span_length": 2, "fusion": "linear", "attribution": True}},
            **{"user": "me", "suffix": None, "frequency_penalty": 0, "anything": {"else": 1}},
        }
        call = read_completion(body, catalogue, timeout=3.0)
        assert [request.prompt for request in call.requests] == [[1, 2], [3]]
        for request in call.requests:
            options = request.options
            assert (request.weights, request.top, request.timeout) == ((1.0, 3.0), 2, 3.0)
            assert (options.max_new_tokens, options.min_new_tokens, options.span_length, options.seed) == (3, 1, 2, 7)
            assert (options.temperature, options.top_p, options.top_k, options.min_p) == (0.5, 0.9, 5, 0.1)
            assert (options.stop, options.samples, options.ignore_eos, options.scores) == (("x",), 2, True, True)
        assert call.stream
        assert call.usage
        assert call.echo
        assert call.span_length == 2

    def test_a_members_model_is_a_one_hot_weight_and_a_policys_its_name(self, catalogue):
        weights = [read_chat(CHAT | {"model": m}, catalogue).requests[0].weights for m in (*MEMBERS, AGENT)]
        assert weights == [(1.0, 0.0), (0.0, 1.0), AGENT]
        assert read_chat(CHAT | {"rlae": {"policy": AGENT}}, catalogue).requests[0].weights == AGENT

    @pytest.mark.parametrize(
        ("prompt", "expected"),
        [("a", ["a"]), (["a", "bc"], ["a", "bc"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]), ([1.0], [[1]])],
    )
    def test_prompts(self, catalogue, prompt, expected):
        assert [r.prompt for r in read_completion(COMPLETION | {"prompt": prompt}, catalogue).requests] == expected

    @pytest.mark.parametrize(
        ("stop", "expected"), [(None, ()), ("", ()), ([], ()), ("a", ("a",)), (["a", "b"], ("a", "b"))]
    )
    def test_stops(self, catalogue, stop, expected):
        assert read_completion(COMPLETION | {"stop": stop}, catalogue).requests[0].options.stop == expected

    def test_parts_of_messages_are_joined_and_developers_are_the_system(self, catalogue):
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        messages = [{"role": "developer", "content": "be kind", "name": "x"}, {"role": "user", "content": parts}]
        (request,) = read_chat(CHAT | {"messages": messages}, catalogue).requests
        assert request.prompt == [{"role": "system", "content": "be kind"}, {"role": "user", "content": "ab"}]

    def test_a_chats_limit(self, catalogue):
        assert read_chat(CHAT, catalogue).longest is None
        assert read_chat(CHAT | {"max_tokens": 3}, catalogue).longest == 3
        assert read_chat(CHAT | {"max_tokens": 3, "max_completion_tokens": 5}, catalogue).longest == 5

    def test_seeds_of_any_size_and_drawn_ones(self, catalogue):
        def seed(**given):
            return read_completion(COMPLETION | given, catalogue).requests[0].options.seed

        assert seed(seed=2**31 - 1) == 2**31 - 1
        for large in (-1, 2**31, 2**63 - 1, -(2**63)):
            assert 0 <= seed(seed=large) < 2**31
        assert len({seed() for _ in range(5)}) > 1

    def test_the_only_token_with_its_log_probability_may_be_the_end(self, catalogue):
        def goes_on(**given):
            return read_completion(COMPLETION | given, catalogue).requests[0].options.ignore_eos

        assert goes_on(max_tokens=1, logprobs=1)
        assert not goes_on(max_tokens=1)
        assert not goes_on(max_tokens=2, logprobs=1)

    def test_a_temperature_that_float32_cannot_divide_by_is_greedy(self, catalogue):
        assert read_completion(COMPLETION | {"temperature": 1e-300}, catalogue).requests[0].options.temperature == 0


WRONG = [
    ({"model": None}, "model", "missing"),
    ({"model": 3}, "model", "text"),
    ({"prompt": None}, "prompt", "missing"),
    ({"prompt": []}, "prompt", "none of them empty"),
    ({"prompt": [[]]}, "prompt", "none of them empty"),
    ({"prompt": ["a", 1]}, "prompt", "list"),
    ({"prompt": [-1]}, "prompt", "list"),
    ({"prompt": [2**40]}, "prompt", "list"),
    ({"prompt": {"a": 1}}, "prompt", "{...}"),
    ({"prompt": "\ud800"}, "prompt", "\\ud800"),
    ({"max_tokens": -1}, "max_tokens", "-1"),
    ({"max_tokens": 1.5}, "max_tokens", "whole number"),
    ({"max_tokens": True}, "max_tokens", "whole number"),
    ({"max_tokens": 0}, "max_tokens", "echo"),
    ({"max_tokens": 10**6}, "max_tokens", "context"),
    ({"max_tokens": 10**400}, "max_tokens", "whole number"),
    ({"temperature": -0.1}, "temperature", "from 0 to 2"),
    ({"temperature": float("inf")}, "temperature", "from 0 to 2"),
    ({"temperature": "hot"}, "temperature", '"hot"'),
    ({"top_p": 0}, "top_p", "above 0"),
    ({"top_k": -2}, "top_k", "-2"),
    ({"n": 0}, "n", "from 1"),
    ({"n": 10**9}, "n", "from 1"),
    ({"n": 2, "best_of": 3}, "best_of", "at most n"),
    ({"seed": 2**64}, "seed", "whole number"),
    ({"stop": ["a", ""]}, "stop", "1 to 256"),
    ({"stop": "a" * 257}, "stop", "1 to 256"),
    ({"prompt": ["a"] * 2048, "n": 3}, "n", "4096"),
    ({"prompt": ["a"] * 2049}, "prompt", "2048"),
    ({"stop": ["a"] * 17}, "stop", "16"),
    ({"stream": 1}, "stream", "true or false"),
    ({"stream_options": []}, "stream_options", "object"),
    ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage", "true or false"),
    ({"logprobs": 21}, "logprobs", "20"),
    ({"logprobs": True}, "logprobs", "whole number"),
    ({"min_tokens": 17}, "min_tokens", "max_tokens"),
    ({"suffix": "end"}, "suffix", "not supported"),
    ({"frequency_penalty": 1}, "frequency_penalty", "not supported"),
    ({"tools": [{"type": "function"}]}, "tools", "not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    ({"rlae": 1}, "rlae", "object"),
    ({"rlae": {"weights": [1]}}, "rlae.weights", "left, right"),
    ({"rlae": {"weights": [0, 0]}}, "rlae.weights", "above 0"),
    ({"rlae": {"weights": [1, float("nan")]}}, "rlae.weights", "numbers"),
    ({"rlae": {"weights": [1, 1e300]}}, "rlae.weights", "1e6"),
    ({"rlae": {"policy": "nobody"}}, "rlae.policy", AGENT),
    ({"rlae": {"policy": AGENT, "weights": [1, 1]}}, "rlae.policy", "not both"),
    ({"rlae": {"span_length": 0}}, "rlae.span_length", "at least 1"),
    ({"rlae": {"fusion": "loglinear"}}, "rlae.fusion", "linear"),
    ({"rlae": {"fusion": "magic"}}, "rlae.fusion", "unknown"),
    ({"rlae": {"attribution": "yes"}}, "rlae.attribution", "true or false"),
    ({"rlae": {"weihgts": [1, 1]}}, "rlae", "rlae.weihgts does not exist; there are weights"),
    ({"model": "left", "rlae": {"weights": [1, 1]}}, "rlae.weights", "both"),
]


class TestWrong:
    @pytest.mark.parametrize(("change", "param", "part"), WRONG)
    def test_fields_of_completions(self, catalogue, change, param, part):
        error = refused(read_completion, COMPLETION | change, catalogue)
        assert (error.status, error.param) == (400, param)
        assert part in str(error)
        json.dumps(error.body(), ensure_ascii=False).encode()

    @pytest.mark.parametrize(
        ("messages", "part"),
        [
            ([], "messages must be"),
            ("hello", "messages must be"),
            ([3], "messages must be"),
            ([{"role": "wizard", "content": "a"}], "messages[0].role"),
            ([{"content": "a"}], "messages[0].role"),
            ([{"role": [], "content": "a"}], "messages[0].role"),
            ([{"role": "user", "content": "a"}, {"role": "user"}], "messages[1].content"),
            ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content"),
            ([{"role": "user", "content": ["a"]}], "messages[0].content"),
            ([{"role": "user", "content": "\udc00"}], "messages[0].content"),
        ],
    )
    def test_messages(self, catalogue, messages, part):
        error = refused(read_chat, CHAT | {"messages": messages}, catalogue)
        assert (error.status, error.param) == (400, "messages")
        assert part in str(error)

    def test_top_logprobs_need_logprobs(self, catalogue):
        assert refused(read_chat, CHAT | {"top_logprobs": 2}, catalogue).param == "top_logprobs"

    def test_models_without_a_chat_template(self):
        engine = FakeEngine()
        for lm in engine.ensemble.members:
            lm.tokenizer.chat_template = None
        error = refused(read_chat, CHAT, make_catalogue(engine))
        engine.close()
        assert "/v1/completions" in str(error)

    def test_an_unknown_model(self, catalogue):
        error = refused(read_completion, COMPLETION | {"model": "nobody"}, catalogue)
        assert (error.status, error.code) == (404, "model_not_found")
        assert "both, left, right, agent" in str(error)

    @pytest.mark.parametrize(
        ("raw", "part"),
        [
            (b"", "not valid JSON"),
            (b"{", "not valid JSON"),
            (b'{"a": NaN}', "NaN"),
            (b'{"a": -Infinity}', "Infinity"),
            (b'{"a": "\xff"}', "UTF-8"),
            ("{}".encode("utf-16"), "UTF-8"),
            (b"[" * 100_000, "nested"),
            (b'{"a":' * 100_000, "nested"),
            (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
            (b"[1]", "object"),
            (b"null", "object"),
            (b'"text"', "object"),
        ],
    )
    def test_bodies(self, raw, part):
        with pytest.raises(ApiError) as caught:
            read_json(raw)
        assert caught.value.status == 400
        assert part in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=[])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data())
def test_whatever_fields_hold_they_are_read_or_refused(data):
    engine = FakeEngine()
    catalogue = make_catalogue(engine)
    engine.close()
    for read, fields, body in ((read_completion, tables.COMPLETION, COMPLETION), (read_chat, tables.CHAT, CHAT)):
        names = data.draw(st.lists(st.sampled_from([*fields, *tables.REFUSED]), max_size=3))
        body = body | {name: data.draw(JSON) for name in names}
        if isinstance(body.get("rlae"), dict):
            body["rlae"] = {name: data.draw(JSON) for name in data.draw(st.lists(st.sampled_from(sorted(tables.RLAE))))}
        for request in _read_or_refuse(read, body, catalogue):
            request.options.check()


def _read_or_refuse(read, body, catalogue):
    try:
        return read(body, catalogue).requests
    except ApiError as error:
        told = error
    assert told.status in (400, 404)
    json.dumps(told.body(), ensure_ascii=False, allow_nan=False).encode()
    return ()
