"""The server on a socket: real clients, everything that can be wrong, and many at once. The engine is a fake one, so
that tests say when it goes on."""

import asyncio
import contextlib
import http.client
import json
import signal
import socket
from types import SimpleNamespace

import httpx2 as httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from rlae_jax.errors import InputError
from rlae_jax.serving import server as servers
from rlae_jax.serving.app import Limits
from rlae_jax.serving.html import PAGE, PAGE_HEADERS
from tests.helpers.serving import AGENT, MEMBERS, FakeEngine, answer, eventually, score, serving

KEY = "open sesame"
GREET = [{"role": "system", "content": "s"}, {"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def address():
    """A server that always goes on."""
    with serving(FakeEngine(), api_key=KEY) as (url, *_):
        yield url


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=30) as client:
        yield client


@pytest.fixture
def gated():
    """(address, engine, server) of a server whose engine goes only as many steps as it is allowed."""
    engine = FakeEngine(slots=2, queue=2, allowed=0)
    with serving(engine) as (url, server, _):
        yield url, engine, server


def post(url, body, path="/v1/completions", **headers):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with httpx.Client(timeout=30, headers={"content-type": "application/json"} | headers) as client:
        return client.post(url + path, content=raw)


def error_of(response):
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


@contextlib.contextmanager
def stream(url, **fields):
    """A streamed completion whose client can leave -> (its connection, the response)."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    body = json.dumps({"model": "both", "prompt": "a", "max_tokens": 100, "stream": True} | fields)
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    response = connection.getresponse()
    try:
        yield connection, response
    finally:
        response.close()
        connection.close()


class TestOpenAIClient:
    def test_models(self, client):
        models = client.models.list().data
        assert [model.id for model in models] == ["both", *MEMBERS, AGENT]
        assert [model.rlae["kind"] for model in models] == ["ensemble", "member", "member", "policy"]
        assert models[0].rlae["members"] == list(MEMBERS)
        assert client.models.retrieve("left").id == "left"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("nobody")

    def test_completions(self, client):
        told = client.completions.create(model="both", prompt=["a", "hello"], max_tokens=5, n=2)
        assert [choice.text for choice in told.choices] == [
            answer(prompt, 5, sample) for prompt in ("a", "hello") for sample in range(2)
        ]
        assert [choice.index for choice in told.choices] == [0, 1, 2, 3]
        assert {choice.finish_reason for choice in told.choices} == {"length"}
        assert (told.usage.prompt_tokens, told.usage.completion_tokens, told.usage.total_tokens) == (6, 20, 26)

    def test_token_ids_as_prompts(self, client):
        told = client.completions.create(model="both", prompt=[[97, 98], [99]], max_tokens=3, echo=True)
        assert [choice.text for choice in told.choices] == ["ab" + answer("b", 3), "c" + answer("c", 3)]

    def test_streamed_completions(self, client):
        fields = {"model": "both", "prompt": "a", "max_tokens": 5, "n": 2}
        chunks = list(client.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
        assert chunks[-1].usage.completion_tokens == 10
        assert not chunks[-1].choices
        choices = [choice for chunk in chunks for choice in chunk.choices]
        for sample in range(2):
            own = [choice for choice in choices if choice.index == sample]
            assert "".join(choice.text for choice in own) == answer("a", 5, sample)
            assert [choice.finish_reason for choice in own] == [*[None] * (len(own) - 1), "length"]

    def test_echo_with_log_probabilities(self, client):
        told = client.completions.create(model="both", prompt="abc", max_tokens=2, echo=True, logprobs=2)
        (choice,) = told.choices
        text = "abc" + answer("abc", 2)
        assert choice.text == text
        logprobs = choice.logprobs
        assert "".join(logprobs.tokens) == text
        assert logprobs.token_logprobs == [None, *(pytest.approx(score(ord(letter))[0]) for letter in text[1:])]
        assert logprobs.top_logprobs[0] is None
        assert all(chosen == max(top.values()) for chosen, top in zip(*_rest(logprobs), strict=True))
        assert logprobs.text_offset == [0, 1, 2, 3, 4]

    @pytest.mark.parametrize("streamed", [False, True])
    def test_nothing_but_a_prompts_log_probabilities(self, client, streamed):
        fields = {"model": "both", "prompt": ["abc", "d"], "max_tokens": 0, "echo": True, "logprobs": 0}
        if streamed:
            choices = [c for chunk in client.completions.create(**fields, stream=True) for c in chunk.choices]
        else:
            told = client.completions.create(**fields)
            assert told.usage.prompt_tokens == told.usage.total_tokens == 4
            choices = told.choices
        assert [choice.text for choice in choices] == ["abc", "d"]
        assert choices[0].logprobs.token_logprobs == [None, *(pytest.approx(score(ord(letter))[0]) for letter in "bc")]
        assert choices[1].logprobs.token_logprobs == [None]

    def test_chat(self, client):
        told = client.chat.completions.create(
            model="both", messages=GREET, max_completion_tokens=4, logprobs=True, top_logprobs=2
        )
        (choice,) = told.choices
        assert choice.message.role == "assistant"
        assert choice.message.content == answer("hello", 4)
        for letter, one in zip(answer("hello", 4), choice.logprobs.content, strict=True):
            assert (one.token, one.bytes) == (letter, list(letter.encode()))
            assert one.logprob == pytest.approx(score(ord(letter))[0])
            assert len(one.top_logprobs) == 2

    def test_a_chat_without_a_limit_takes_what_the_context_has_room_for(self, client):
        told = client.chat.completions.create(model="both", messages=GREET)
        assert told.usage.total_tokens == 512

    def test_streamed_chat(self, client):
        chunks = list(client.chat.completions.create(model="both", messages=GREET, max_tokens=4, stream=True))
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer("hello", 4)
        assert chunks[-1].choices[0].finish_reason == "length"
        assert len({chunk.id for chunk in chunks}) == 1

    def test_who_wrote_what(self, client):
        long = client.completions.create(model=AGENT, prompt="a", max_tokens=100)  # as far as the agent was trained for
        assert (long.usage.completion_tokens, long.choices[0].finish_reason) == (64, "length")
        fields = {"model": AGENT, "prompt": "a", "max_tokens": 6, "extra_body": {"rlae": {"attribution": True}}}
        told = client.completions.create(**fields).choices[0].rlae
        assert told["spans"] == [
            {"span": 0, "start": 0, "weights": [0.75, 0.25]},
            {"span": 1, "start": 4, "weights": [0.25, 0.75]},
        ]
        assert "".join(token["text"] for token in told["tokens"]) == answer("a", 6)
        assert [token["span"] for token in told["tokens"]] == [0, 0, 0, 0, 1, 1]
        streamed = [c.rlae for chunk in client.completions.create(**fields, stream=True) for c in chunk.choices]
        for name in ("spans", "tokens"):
            assert [one for rlae in streamed for one in rlae[name]] == told[name]

    def test_weights_and_members(self, client):
        def weights(model, **rlae):
            told = client.completions.create(model=model, prompt="a", max_tokens=1, extra_body={"rlae": rlae})
            return told.choices[0].rlae["spans"][0]["weights"]

        assert weights("both") == [0.5, 0.5]
        assert weights("both", weights=[1, 3]) == [0.25, 0.75]
        assert weights("both", policy=AGENT) == [0.75, 0.25]
        assert weights("right") == [0.0, 1.0]

    def test_what_is_wrong_is_an_exception_of_the_clients(self, client, address):
        with pytest.raises(openai.BadRequestError, match="temperature must be a number from 0 to 2") as caught:
            client.completions.create(model="both", prompt="a", temperature=3)
        assert caught.value.param == "temperature"
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="nobody", messages=GREET)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as long:
            client.completions.create(model="both", prompt="a" * 600)
        assert long.value.code == "context_length_exceeded"
        assert "max_new_tokens" not in str(long.value)
        with (
            openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0) as other,
            pytest.raises(openai.AuthenticationError) as denied,
        ):
            other.models.list()
        assert denied.value.code == "invalid_api_key"

    def test_an_answer_that_fails(self, client):
        with pytest.raises(openai.InternalServerError, match="on fire"):
            client.completions.create(model="both", prompt="fail")
        with pytest.raises(openai.APIError, match="on fire"):
            list(client.completions.create(model="both", prompt="fail", stream=True))

    def test_async(self, address):
        async def ask():
            async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
                whole = client.completions.create(model="both", prompt="a", max_tokens=3)
                chat = client.chat.completions.create(model="both", messages=GREET, max_tokens=3)
                events = await client.chat.completions.create(model="both", messages=GREET, max_tokens=3, stream=True)
                streamed = "".join([chunk.choices[0].delta.content or "" async for chunk in events])
                return (await whole).choices[0].text, (await chat).choices[0].message.content, streamed

        assert asyncio.run(ask()) == (answer("a", 3), answer("hello", 3), answer("hello", 3))


def _rest(logprobs):
    return logprobs.token_logprobs[1:], logprobs.top_logprobs[1:]


class TestRequestsThatAreWrong:
    @pytest.mark.parametrize(
        ("raw", "status"), [(b"{", 400), (b"\xff", 400), (b"[" * 10**5, 400), (b"3", 400), (b"", 400), (b"{}", 400)]
    )
    def test_bodies(self, address, raw, status):
        response = post(address, raw, authorization=f"Bearer {KEY}")
        assert response.status_code == status
        assert error_of(response)["type"] == "invalid_request_error"

    def test_keys(self, address):
        for headers in ({}, {"authorization": "Bearer"}, {"authorization": KEY}, {"authorization": f"Bearer {KEY}x"}):
            response = post(address, {}, **headers)
            assert response.status_code == 401
            assert error_of(response)["code"] == "invalid_api_key"
        assert httpx.get(f"{address}/v1/nowhere").status_code == 401
        for path in ("/health", "/metrics", "/openapi.json"):
            assert httpx.get(address + path).status_code == 200

    def test_paths_methods_and_types(self, address):
        headers = {"authorization": f"Bearer {KEY}"}
        assert error_of(httpx.get(f"{address}/v1/nowhere", headers=headers))["message"].startswith("Not Found")
        wrong = httpx.get(f"{address}/v1/completions", headers=headers)
        assert wrong.status_code == 405
        assert wrong.headers["allow"] == "POST"
        error_of(wrong)
        assert post(address, {}, **headers | {"content-type": "text/plain"}).status_code == 415

    def test_request_ids(self, address):
        assert httpx.get(f"{address}/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
        odd = httpx.get(f"{address}/health", headers={"x-request-id": "a b;c"}).headers["x-request-id"]
        assert odd.isalnum()

    def test_a_body_that_is_too_large(self, address):
        """It is refused by its declared length before it comes, and one without a length while it comes."""
        headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            head = [f"{name}: {value}\r\n" for name, value in headers.items()]
            head = ["POST /v1/completions HTTP/1.1\r\nHost: x\r\n", *head, "Content-Length: 104857600\r\n\r\n"]
            connection.sendall("".join(head).encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
        sent = 0

        def parts():
            nonlocal sent
            for _ in range(1600):
                yield b" " * 65536
                sent += 65536

        with httpx.Client(timeout=30) as client:
            response = client.post(f"{address}/v1/completions", content=parts(), headers=headers)
        assert response.status_code == 413
        assert error_of(response)["code"] == "body_too_large"

    @pytest.mark.parametrize(
        ("raw", "status"),
        [
            (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"".join(b"a%d: b\r\n" % i for i in range(10_000)), 431),
            (b"GET / HTTP/1.1\r\nHost: x\r\na: " + b"b" * 10**6, 431),
            (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
            (b"GET /\xff HTTP/1.1\r\n\r\n", 400),
        ],
    )
    def test_what_is_no_request(self, address, raw, status):
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(raw)
            with contextlib.suppress(ConnectionError), connection.makefile("rb") as file:
                told = file.read()
                assert told.startswith(b"HTTP/1.1 %d " % status)
                assert json.loads(told.partition(b"\r\n\r\n")[2])["error"]["message"]
        assert httpx.get(f"{address}/health").status_code == 200

    def test_a_body_that_does_not_come(self, raises_input_error):
        with serving(FakeEngine(), limits=Limits(read_seconds=0.05)) as (url, *_):
            host, port = url.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port)), timeout=30) as connection:
                head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                connection.sendall(f"{head}Content-Length: 10\r\n\r\n{{".encode())
                assert connection.recv(100).startswith(b"HTTP/1.1 408 ")

    def test_headers_that_do_not_come(self, monkeypatch):
        monkeypatch.setattr(servers, "_HEAD_SECONDS", 0.05)
        with serving(FakeEngine()) as (url, *_):
            host, port = url.removeprefix("http://").split(":")
            for sent in (b"", b"GET /health HT"):
                with socket.create_connection((host, int(port)), timeout=30) as connection:
                    connection.sendall(sent)
                    with contextlib.suppress(ConnectionResetError):
                        assert connection.recv(100) == b""

    def test_more_bodies_at_once_than_there_is_memory_for(self):
        with serving(FakeEngine(), limits=Limits(bodies_bytes=10)) as (url, *_):
            response = post(url, {"model": "both", "prompt": "a"})
            assert response.status_code == 429
            assert response.headers["retry-after"] == "1"
            assert error_of(response)["type"] == "rate_limit_error"

    def test_a_server_that_fails(self, caplog):
        engine = FakeEngine()
        engine.submit = lambda request: 1 / 0
        with serving(engine) as (url, *_):
            response = post(url, {"model": "both", "prompt": "a"})
        assert response.status_code == 500
        assert response.headers["x-request-id"] in error_of(response)["message"]
        assert "ZeroDivisionError" in caplog.text


class TestClientsThatLeave:
    def test_in_the_middle_of_a_stream(self, gated):
        url, engine, _ = gated
        with stream(url) as (_, response):
            engine.allow(3)
            assert json.loads(response.readline()[6:])["choices"][0]["text"] in ("u", "uv", "uvw")
        eventually(lambda: engine.tickets[0].ended.is_set())
        assert engine.tickets[0].cancelled
        assert engine.tickets[0].written == 3
        assert not engine.running

    @pytest.mark.parametrize("queued", [False, True])
    def test_before_a_whole_answer(self, gated, queued):
        url, engine, _ = gated
        with contextlib.ExitStack() as others:
            for _ in range(2 * queued):
                others.enter_context(stream(url))
            host, port = url.removeprefix("http://").split(":")
            body = json.dumps({"model": "both", "prompt": ["a", "b"], "max_tokens": 100}).encode()
            connection = socket.create_connection((host, int(port)), timeout=30)
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            eventually(lambda: len(engine.tickets) == 2 + 2 * queued)
            connection.close()
            eventually(lambda: all(ticket.cancelled for ticket in engine.tickets[-2:]))
            assert not any(ticket.cancelled for ticket in engine.tickets[:-2])

    def test_one_that_does_not_read_is_cut_off_and_nobody_waits_for_it(self, monkeypatch):
        monkeypatch.setattr(servers, "_STALLED_SECONDS", 0.2)
        engine = FakeEngine(slots=2, context=200_000)
        with serving(engine) as (url, *_):
            host, port = url.removeprefix("http://").split(":")
            slow = socket.create_connection((host, int(port)), timeout=30)
            # Echoes make an answer larger than what lies between the two programs.
            fields = {"model": "both", "prompt": "a" * 100_000, "echo": True, "n": 100, "max_tokens": 99_000}
            body = json.dumps(fields | {"stream": True}).encode()
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            slow.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            eventually(lambda: engine.tickets and engine.tickets[0].written)
            assert post(url, {"model": "both", "prompt": "a", "max_tokens": 3}).status_code == 200
            eventually(lambda: engine.tickets[0].ended.is_set(), seconds=30)
            slow.close()
            assert engine.tickets[0].cancelled
            assert engine.tickets[0].written < 99_000


class TestLoad:
    def test_a_full_queue_says_when_to_come_back(self, gated):
        url, engine, _ = gated
        with contextlib.ExitStack() as running:
            for n in range(4):  # two are written, two wait
                running.enter_context(stream(url))
                eventually(lambda n=n: len(engine.running) == min(n + 1, 2))
            response = post(url, {"model": "both", "prompt": "a"})
            assert response.status_code == 429
            assert response.headers["retry-after"] == "1"
            assert error_of(response)["code"] == "queue_full"
            assert post(url, {"model": "both", "prompt": "a", "stream": True}).status_code == 429
            assert httpx.get(f"{url}/health").status_code == 200
            assert not any(ticket.cancelled for ticket in engine.tickets)

    def test_more_prompts_than_the_queue_has_room_for(self):
        with serving(FakeEngine(slots=2, queue=2)) as (url, *_):
            prompts = [chr(97 + i) for i in range(20)]
            told = post(url, {"model": "both", "prompt": prompts, "max_tokens": 3}).json()
        assert [choice["text"] for choice in told["choices"]] == [answer(prompt, 3) for prompt in prompts]

    def test_two_hundred_streams_while_others_send_rubbish(self):
        rubbish = [b"{", b"\xff" * 1000, b'{"model": 3}', b"x" * 10**6]

        async def ask(client, i):
            fields = {"model": "both", "prompt": chr(97 + i % 26), "max_tokens": 8, "stream": True}
            async with client.stream("POST", "/v1/completions", json=fields) as response:
                events = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
            assert events.pop() == "[DONE]"
            return "".join(json.loads(event)["choices"][0]["text"] for event in events)

        async def spoil(client, i):
            headers = {"content-type": "application/json"}
            response = await client.post("/v1/completions", content=rubbish[i % len(rubbish)], headers=headers)
            return response.status_code

        async def all_of_them(url):
            limits = httpx.Limits(max_connections=300)
            async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
                good = [ask(client, i) for i in range(200)]
                bad = [spoil(client, i) for i in range(40)]
                return await asyncio.gather(asyncio.gather(*good), asyncio.gather(*bad))

        engine = FakeEngine(slots=16, queue=256)
        with serving(engine) as (url, *_):
            texts, statuses = asyncio.run(all_of_them(url))
        assert texts == [answer(chr(97 + i % 26), 8) for i in range(200)]
        assert set(statuses) == {400}
        assert all(ticket.ended.is_set() for ticket in engine.tickets)

    def test_a_thousand_connections(self, address):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 1000 if hard == resource.RLIM_INFINITY or hard > 3000 else 300
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(4096, hard)) if hard > 0 else 4096, hard))
        host, port = address.removeprefix("http://").split(":")
        with contextlib.ExitStack() as stack:
            for _ in range(wanted):
                stack.enter_context(socket.create_connection((host, int(port)), timeout=30)).sendall(b"GET ")
            response = post(address, {"model": "both", "prompt": "a", "max_tokens": 3}, authorization=f"Bearer {KEY}")
            assert response.json()["choices"][0]["text"] == answer("a", 3)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class TestEnd:
    def test_running_answers_end_and_new_ones_are_refused(self):
        engine = FakeEngine(allowed=0)
        with serving(engine) as (url, server, thread):
            with stream(url, max_tokens=4) as (_, response):
                engine.allow(1)
                begun = response.readline()
                server.handle_exit(signal.SIGTERM, None)
                refused = post(url, {"model": "both", "prompt": "a"})
                assert refused.status_code == 503
                assert error_of(refused)["code"] == "stopping"
                assert httpx.get(f"{url}/health").status_code == 503
                engine.allow(3)
                events = [line[6:] for line in (begun + response.read()).splitlines() if line]
            assert events.pop() == b"[DONE]"
            assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == answer("a", 4)
            thread.join(10)
            assert not thread.is_alive()

    def test_a_second_signal_ends_at_once(self):
        engine = FakeEngine(allowed=0)
        with serving(engine) as (url, server, thread), stream(url):
            server.handle_exit(signal.SIGTERM, None)
            server.handle_exit(signal.SIGTERM, None)
            thread.join(10)
            assert not thread.is_alive()
            assert engine.tickets[0].cancelled

    def test_addresses_that_cannot_be_listened_at(self, raises_input_error):
        with servers.listen("127.0.0.1", 0) as taken:
            taken.listen()
            port = taken.getsockname()[1]
            raises_input_error(lambda: servers.listen("127.0.0.1", port), str(port), "--port")
        raises_input_error(lambda: servers.listen("no.such.host.invalid", 0), "no.such.host.invalid")
        with pytest.raises(InputError):
            servers.listen("127.0.0.1", 99_999)


def test_the_page(address):
    for path, (body, kind) in PAGE.items():
        response = httpx.get(address + path)
        assert (response.status_code, response.content, response.headers["content-type"]) == (200, body, kind)
        assert PAGE_HEADERS.items() <= {name.title(): value for name, value in response.headers.items()}.items()
        assert httpx.head(address + path).headers["content-length"] == str(len(body))


def test_metrics():
    with serving(FakeEngine()) as (url, *_):
        post(url, {"model": "both", "prompt": "a", "max_tokens": 5})
        post(url, {"model": "both"})
        httpx.get(f"{url}/somewhere")
        text = httpx.get(f"{url}/metrics").text
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found["rlae_requests_total", "/v1/completions", "200"] == 1
    assert found["rlae_requests_total", "/v1/completions", "400"] == 1
    assert found["rlae_requests_total", "other", "404"] == 1
    assert found["rlae_slots",] == 4
    assert found["rlae_slots_in_use",] == found["rlae_queue",] == 0
    assert found["rlae_tokens_written_total",] == 5
    assert found["rlae_prefix_hits_total",] == 1
    assert found["rlae_time_to_first_token_seconds_count",] == 1
    assert found["rlae_time_per_token_seconds_count",] == 1
    assert found["rlae_weight_mean", "left"] == 0.5


def test_a_log_line_has_the_requests_id(caplog):
    caplog.set_level("INFO", "rlae_jax.serving")
    with serving(FakeEngine()) as (url, *_):
        name = post(url, {"model": "left", "prompt": "ab", "max_tokens": 5}).headers["x-request-id"]
    (line,) = [record.getMessage() for record in caplog.records if name in record.getMessage()]
    assert "POST /v1/completions 200" in line
    assert "model=left prompt=2 written=5" in line


def test_tokens_that_stand_for_no_bytes():
    engine = FakeEngine()

    def no_bytes(token):
        raise InputError("its tokens stand for no bytes")

    engine.token_text = no_bytes
    engine.ensemble.tokenizer = SimpleNamespace(decode=lambda ids: bytes(ids).decode())
    with serving(engine) as (url, *_):
        told = post(url, {"model": "both", "prompt": [97], "max_tokens": 2, "logprobs": 0, "echo": True}).json()
    assert "".join(told["choices"][0]["logprobs"]["tokens"]) == told["choices"][0]["text"] == "a" + answer("a", 2)
