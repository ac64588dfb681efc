"""The application: routes, the key, limits, request ids, and what happens while an answer is written.

`make_app` gives an ASGI application around an engine. Everything that goes wrong ends as the API's error form: handlers
raise `ApiError`, and `App` is the one place that turns exceptions into answers.
"""

import asyncio
import contextlib
import dataclasses
import functools
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route, Router
from starlette.types import Message, Receive, Scope, Send

from rlae_jax.errors import InputError
from rlae_jax.serving import engine as engines
from rlae_jax.serving import requests
from rlae_jax.serving.answers import Choice, Scored, envelope, joined, nothing, token_text, usage
from rlae_jax.serving.api import Call, Catalogue, read_chat, read_completion
from rlae_jax.serving.echo import prompt_text, score_prompts
from rlae_jax.serving.fields import ApiError, read_json
from rlae_jax.serving.html import PAGE, PAGE_HEADERS
from rlae_jax.serving.metrics import Metrics
from rlae_jax.serving.openapi import describe

log = logging.getLogger("rlae_jax.serving")
CLIENT_GONE = 499  # as servers log a request whose client left; nobody gets it
_RETRY_SECONDS = 1
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What one client, and all of them together, may take."""

    body_bytes: int = 4 * 2**20
    bodies_bytes: int = 128 * 2**20  # of all bodies that are being read
    read_seconds: float = 60  # for a body to arrive
    answer_seconds: float = 600  # for an answer, from its request on


class Running:
    """The tickets of one call, and the pieces that the engine's thread has sent for them."""

    def __init__(self, call: Call, metrics: Metrics):
        self.call, self.metrics, self.started = call, metrics, time.perf_counter()
        self.tickets: list[requests.Ticket] = []
        self.read = 0  # tokens of prompts that were scored, and not continued
        self.open = 0  # tickets that go on
        self._samples: list[int] = []  # of each ticket, those that go on
        self._failed: requests.Ticket | None = None
        self.tokens = 0
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._pieces: list[tuple[int, requests.Piece]] = []
        # Of each choice: when its first and last tokens came, and how many came after the first ones.
        self._times: dict[int, tuple[float, float, int]] = {}

    def add(self, ticket: requests.Ticket) -> None:
        number = len(self.tickets)
        self.tickets.append(ticket)
        self._samples.append(self.call.samples)
        self.open += 1

        def listen(piece: requests.Piece | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server was ended by force
                self._loop.call_soon_threadsafe(self._take, number, piece)

        ticket.listen(listen)

    def _take(self, number: int, piece: requests.Piece | None) -> None:
        if piece is None:
            self.open -= 1
            if self._samples[number]:
                self._failed = self.tickets[number]
        else:
            self._samples[number] -= piece.finish_reason is not None
            choice = number * self.call.samples + piece.sample
            self._pieces.append((choice, piece))
            self._time(choice, piece)
        self._news.set()

    def _time(self, choice: int, piece: requests.Piece) -> None:
        self.tokens += len(piece.tokens)
        now = time.perf_counter()
        first, last, later = now, now, 0
        if choice in self._times:
            first, last, later = self._times[choice]
            if piece.tokens:
                last, later = now, later + len(piece.tokens)
        elif piece.tokens and not self._times:
            self.metrics.first_token.observe(now - self.started)
        if piece.tokens:
            self._times[choice] = first, last, later
        if piece.finish_reason is not None and later:
            self.metrics.per_token.observe((last - first) / later)

    async def wait(self) -> None:
        """Until there is something new of any ticket."""
        await self._news.wait()
        self._news.clear()

    async def pieces(self) -> AsyncIterator[dict[int, requests.Piece]]:
        """What each choice gained since the last look, until all tickets have ended: who reads slowly gets more at a
        time, and never holds more than the answers.

        Raises:
          ApiError: an answer that the engine gave up.
        """
        while self.open or self._pieces or self._failed:
            while self.open and not (self._pieces or self._failed):
                await self.wait()
            if self._failed is not None:
                raise _failure(self._failed)
            taken, self._pieces = self._pieces, []
            gained: dict[int, list[requests.Piece]] = {}
            for choice, piece in taken:
                if piece.finish_reason == "cancelled":
                    raise ApiError(503, "the server is stopping", code="stopping")
                gained.setdefault(choice, []).append(piece)
            if gained:
                yield {choice: joined(pieces) for choice, pieces in gained.items()}

    def cancel(self) -> None:
        """Ends what goes on; nothing where all is told."""
        if self.open:
            for ticket in self.tickets:
                ticket.cancel()

    @property
    def usage(self) -> dict[str, int]:
        return usage(self.read + sum(ticket.prompt_tokens for ticket in self.tickets), self.tokens)


def _cancel_ticket(submitted: asyncio.Future[requests.Ticket]) -> None:
    if submitted.exception() is None:
        submitted.result().cancel()


def _failure(ticket: requests.Ticket) -> ApiError:
    """Why a ticket ended before its answers did."""
    try:
        ticket.result(0)
    except requests.Failed as error:
        return ApiError(500, str(error), code="engine_error")
    return ApiError(500, "the answer could not be finished", code="engine_error")


class _Events(StreamingResponse):
    """A stream of events whose answers are cancelled however it ends."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]):
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.close()


def _event(data: Any) -> bytes:
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return b"data: " + text.encode() + b"\n\n"


class Service:
    """What the handlers share."""

    def __init__(self, engine: engines.Engine, catalogue: Catalogue, limits: Limits):
        self.engine, self.catalogue, self.limits = engine, catalogue, limits
        self.metrics = Metrics(engine, catalogue.members)
        self.stopping = False  # no new requests
        self.active = 0  # requests that are being answered
        self._arriving = 0  # bytes of bodies
        self._scoring = asyncio.Semaphore()  # what reads prompts for `echo` leaves threads for others
        self._description = describe(catalogue)
        self._bytes_of = token_text(engine)

    async def health(self, request: Request) -> Response:
        del request
        if self.stopping:
            raise ApiError(503, "the server is stopping", code="stopping")
        return JSONResponse({"status": "ok"})

    async def show_metrics(self, request: Request) -> Response:
        del request
        text = await asyncio.to_thread(self.metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def show_description(self, request: Request) -> Response:
        del request
        return JSONResponse(self._description)

    async def list_models(self, request: Request) -> Response:
        del request
        data = [self.catalogue.described(model) for model in self.catalogue.models.values()]
        return JSONResponse({"object": "list", "data": data})

    async def show_model(self, request: Request) -> Response:
        return JSONResponse(self.catalogue.described(self.catalogue.find(request.path_params["name"])))

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, read_completion)

    async def chat_completions(self, request: Request) -> Response:
        return await self._answer(request, read_chat)

    async def _read(self, request: Request) -> bytes:
        """The body.

        Raises:
          ApiError: no JSON, too large, too slow.
        """
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise ApiError(415, "the header Content-Type must be application/json")
        most = self.limits.body_bytes
        too_large = ApiError(413, f"the body has more than {most} bytes", code="body_too_large")
        if int(request.headers.get("content-length", 0)) > most:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.read_seconds):
                async for chunk in request.stream():
                    body += chunk
                    self._arriving += len(chunk)
                    if len(body) > most:
                        raise too_large
                    if self._arriving > self.limits.bodies_bytes:
                        raise ApiError(429, "too many bodies at once; try again", retry_after=_RETRY_SECONDS)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive in {self.limits.read_seconds:g} s") from None
        finally:
            self._arriving -= len(body)
        return bytes(body)

    async def _answer(self, request: Request, read: Callable[..., Call]) -> Response:
        raw = await self._read(request)
        timeout = self.limits.answer_seconds
        # Large bodies, and large answers, take their time: others do not wait for it.
        call = await asyncio.to_thread(lambda: read(read_json(raw), self.catalogue, timeout))
        running = Running(call, self.metrics)
        noted: dict[str, Any] = request.scope["rlae"]
        noted.update(model=call.model.name, running=running)
        name, created = call.prefix + uuid.uuid4().hex, int(time.time())
        try:
            choices = await _unless_gone(request, self._begin(call, running))
            if call.stream:
                events = self._events(call, running, choices, envelope(call, name, created, chunk=True))
                return _Events(events, running.cancel)
            pieces = await _unless_gone(request, self._whole(running, choices))

            def respond() -> Response:
                told = [choice.gain(piece, chunk=False) for choice, piece in zip(choices, pieces, strict=True)]
                return JSONResponse(envelope(call, name, created) | {"choices": told, "usage": running.usage})

            return await asyncio.to_thread(respond)
        except BaseException:
            running.cancel()
            raise

    async def _begin(self, call: Call, running: Running) -> list[Choice]:
        """Gives a call to the engine, once its prompts are scored if that was asked for.

        Raises:
          ApiError: a prompt that cannot be used; no room in the queue.
        """
        prompts: list[tuple[str, Scored | None]] = [("", None)] * len(call.requests)
        try:
            if call.echo:
                async with self._scoring:
                    prompts = await asyncio.to_thread(self._echoes, call)
            if call.longest == 0:
                running.read = sum(len(scored.tokens) for _, scored in prompts if scored is not None)
            else:
                for request in call.requests:
                    running.add(await self._submit(request, running))
        except InputError as error:
            raise call.error(error) from None
        return [
            Choice(call, i * call.samples + sample, self._bytes_of, prompt)
            for i, prompt in enumerate(prompts)
            for sample in range(call.samples)
        ]

    async def _submit(self, request: requests.Request, running: Running) -> requests.Ticket:
        """A ticket. One of several prompts waits for the others of its call where the queue is full."""
        while True:
            others = running.open
            submitting = asyncio.get_running_loop().run_in_executor(None, self._admit, request, running.call)
            try:
                return await asyncio.shield(submitting)
            except asyncio.CancelledError:
                submitting.add_done_callback(_cancel_ticket)
                raise
            except requests.Busy as busy:
                if running.open:
                    await running.wait()
                elif not others:  # else they ended meanwhile, and made room
                    raise ApiError(429, str(busy), code="queue_full", retry_after=_RETRY_SECONDS) from None

    def _admit(self, request: requests.Request, call: Call) -> requests.Ticket:
        # A policy that was trained for shorter answers than a client's usual limit ends them earlier, as a limit does.
        longest = min(call.longest, self.engine.longest(request)) if call.longest else self.engine.room(request)
        options = dataclasses.replace(request.options, max_new_tokens=longest)
        return self.engine.submit(dataclasses.replace(request, options=options))

    def _echoes(self, call: Call) -> list[tuple[str, Scored | None]]:
        texts = [prompt_text(request.prompt, self._bytes_of) for request in call.requests]
        if not call.logprobs:
            return [(text, None) for text in texts]
        return list(zip(texts, score_prompts(self.engine, call.requests), strict=True))

    async def _whole(self, running: Running, choices: list[Choice]) -> list[requests.Piece]:
        """All that each choice gains."""
        gained: list[list[requests.Piece]] = [[] for _ in choices]
        async for pieces in running.pieces():
            for i, piece in pieces.items():
                gained[i].append(piece)
        return [joined(own or [self._nothing(choice)]) for choice, own in zip(choices, gained, strict=True)]

    async def _events(
        self, call: Call, running: Running, choices: list[Choice], around: dict[str, Any]
    ) -> AsyncIterator[bytes]:
        counted = {"usage": None} if call.usage else {}

        def chunk(i: int, piece: requests.Piece) -> bytes:
            return _event(around | {"choices": [choices[i].gain(piece, chunk=True)]} | counted)

        try:
            if call.chat:  # clients learn at once that they were heard, and from a first delta whose part it is
                yield b"".join(chunk(i, self._nothing(choice, None)) for i, choice in enumerate(choices))
            if call.longest == 0:
                yield b"".join(chunk(i, self._nothing(choice)) for i, choice in enumerate(choices))
            async for pieces in running.pieces():
                yield b"".join(chunk(i, piece) for i, piece in pieces.items())
            if call.usage:
                yield _event(around | {"choices": [], "usage": running.usage})
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body())

    def _nothing(self, choice: Choice, reason: str | None = "length") -> requests.Piece:
        """A piece without a token."""
        return nothing(choice.index % choice.call.samples, len(self.catalogue.members), reason)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """What the work gives, which is cancelled where the client leaves before.

    Raises:
      ClientDisconnect: it did.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise ClientDisconnect
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class App:
    """Around the routes: ids, the key, counting, logging, and errors in the API's form."""

    def __init__(self, service: Service, router: Router, api_key: str | None):
        self.service, self.router = service, router
        self.key = None if api_key is None else b"Bearer " + api_key.encode()
        self.paths = {route.path for route in router.routes if isinstance(route, Route)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        begun, given = time.perf_counter(), dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        name = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        status = 0

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", name.encode())]
            await send(message)

        scope["app"], scope["rlae"] = self, {}
        self.service.active += 1
        try:
            self._check(scope)
            await self.router(scope, receive, tagged)
        except ClientDisconnect:
            status = CLIENT_GONE
        except Exception as error:
            if status:  # the answer is broken off, which tells the client
                log.exception("%s broke off", name)
                raise
            await _error(error, name)(scope, receive, tagged)
        finally:
            self.service.active -= 1
            self._note(scope, name, status or CLIENT_GONE, time.perf_counter() - begun)

    def _check(self, scope: Scope) -> None:
        """Raises an `ApiError` for what is not even looked at."""
        if not scope["path"].startswith("/v1/"):
            return
        if self.key is not None:
            sent = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(sent, self.key):  # in a time that says nothing of the key
                raise ApiError(
                    401, "the API key is missing or wrong (Authorization: Bearer KEY)", code="invalid_api_key"
                )
        if self.service.stopping:
            raise ApiError(503, "the server is stopping", code="stopping", retry_after=_RETRY_SECONDS)

    def _note(self, scope: Scope, name: str, status: int, seconds: float) -> None:
        path = scope["path"]
        endpoint = "/v1/models" if path.startswith("/v1/models/") else path if path in self.paths else "other"
        self.service.metrics.requests.labels(endpoint, str(status)).inc()
        noted, told = scope["rlae"], ""
        if "running" in noted:
            counts = noted["running"].usage
            told = f" model={noted['model']} prompt={counts['prompt_tokens']} written={counts['completion_tokens']}"
        level = logging.INFO if path.startswith("/v1/") or status >= 400 else logging.DEBUG
        log.log(level, "%s %s %s %d %.3fs%s", name, scope["method"], ascii(path)[1:-1], status, seconds, told)


def _error(error: Exception, name: str) -> Response:
    """An exception as an answer."""
    headers = {}
    if isinstance(error, HTTPException):  # of the router
        headers = dict(error.headers or {})
        error = ApiError(error.status_code, f"{error.detail}; /openapi.json describes what there is")
    elif not isinstance(error, ApiError):
        log.error("%s failed", name, exc_info=error)
        error = ApiError(500, f"something is wrong with the server; its log tells more under {name}", code="internal")
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    return JSONResponse(error.body(), error.status, headers)


async def _page(path: str, request: Request) -> Response:
    """A file of the page."""
    del request
    body, kind = PAGE[path]
    return Response(body, headers=PAGE_HEADERS, media_type=kind)


def make_app(
    engine: engines.Engine, catalogue: Catalogue, *, api_key: str | None = None, limits: Limits | None = None
) -> App:
    """The ASGI application of an engine.

    Args:
      api_key: what clients must send for everything under /v1/.
    """
    service = Service(engine, catalogue, limits or Limits())
    get = functools.partial(Route, methods=["GET"])
    post = functools.partial(Route, methods=["POST"])
    routes = [
        *(get(path, functools.partial(_page, path)) for path in PAGE),
        get("/health", service.health),
        get("/metrics", service.show_metrics),
        get("/openapi.json", service.show_description),
        get("/v1/models", service.list_models),
        get("/v1/models/{name:path}", service.show_model),
        post("/v1/completions", service.completions),
        post("/v1/chat/completions", service.chat_completions),
    ]
    return App(service, Router(routes, redirect_slashes=False), api_key)
