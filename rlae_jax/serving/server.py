"""The application on a socket: uvicorn, with an end that lets answers end, and with patience that has an end.

started ── SIGTERM, SIGINT ──► draining: new requests get 503, running answers go on ── the last one ends ──► stopped
                               └─ a second signal: stopped at once
"""

import asyncio
import json
import logging
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from rlae_jax.errors import InputError
from rlae_jax.serving.app import App
from rlae_jax.serving.fields import ApiError

_HEAD_BYTES = 32 * 2**10  # of a request's line and headers
_HEAD_SECONDS = 30  # for them to arrive
_IDLE_SECONDS = 60  # until another request comes; longer than clients keep idle connections, so that none is cut
_STALLED_SECONDS = 60  # in which a client that is sent something reads nothing of it
_CLOSING_SECONDS = 5  # for connections to close once every answer is written


class _Timer:
    """Calls something unless it is stopped before."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._handle: asyncio.TimerHandle | None = None

    def start(self, loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
        if self._handle is None:
            self._handle = loop.call_later(self.seconds, call)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._handle = None


class Protocol(H11Protocol):
    """A connection, which is cut where the client sends or reads nothing for too long. What is no HTTP is answered in
    the API's form."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.head, self.stalled = _Timer(_HEAD_SECONDS), _Timer(_STALLED_SECONDS)
        self.head.start(self.loop, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:  # a request's headers are not there yet
            self.head.start(self.loop, self.transport.abort)
        else:
            self.head.stop()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stalled.start(self.loop, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.stalled.stop()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()  # which waits until the last bytes are read
        self.stalled.start(self.loop, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.head.stop()
        self.stalled.stop()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # amid another answer
            self.transport.close()
            return
        error = sys.exception()
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        what = "the headers are too large" if status == 431 else f"this is no HTTP request that can be read: {error}"
        body = json.dumps(ApiError(status, what).body()).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class Server(uvicorn.Server):
    """Serves an application until a signal.

    Args:
      ready: is called once requests are taken.
    """

    def __init__(self, app: App, ready: Callable[[], None] = lambda: None):
        config: Any = uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            h11_max_incomplete_event_size=_HEAD_BYTES,
            timeout_keep_alive=_IDLE_SECONDS,
            timeout_graceful_shutdown=_CLOSING_SECONDS,
        )
        super().__init__(config)
        self.service, self.ready = app.service, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()

    def drain(self) -> None:
        """Takes no more requests, and ends once those at hand are answered."""
        self.service.stopping = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        del frame
        if self.service.stopping:
            self.should_exit = self.force_exit = True
            logging.getLogger("uvicorn.error").disabled = True  # a traceback for every answer that is cut off
        else:
            logging.getLogger("rlae_jax.serving").info(
                "stopping: %d answers go on, new requests are refused", self.service.active
            )
        self.drain()

    async def on_tick(self, counter: int) -> bool:
        if self.service.stopping and not self.service.active:
            self.should_exit = True
        return await super().on_tick(counter)


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address; 0 is any port that is free.

    Raises:
      InputError: there is no such address here, or it is taken.
    """
    if not 0 <= port < 2**16:
        raise InputError(f"--port must be from 0 to 65535, not {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InputError(f"--host {host}: {error.strerror or error}") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise InputError(f"cannot listen at {host}, port {port}: {error}; --port takes another one") from None
    return bound
