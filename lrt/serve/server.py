"""Uvicorn, with two things of ours: an orderly end of streams, and connections that never send a request are closed."""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import signal
import socket
import sys
import threading
from contextlib import suppress
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from lrt.serve.config import Limits
from lrt.serve.registry import ModelRegistry

LOG = logging.getLogger("lrt.serve")
QUIET_SECONDS = 30.0
"""How long connections must have been accepted before it is said again that they cannot be."""
OTHER_FILES = 256
"""Files that a server may have open beside its connections."""
READ_AT_ONCE = 4 * 1024
"""Bytes of a connection that are looked at in one turn: chunks of one byte each take h11 about 10 µs a byte."""

BETWEEN_PIPELINED = 0.002
"""Seconds between the answer to a request and the next one that a client has sent without waiting for it. A thousand
requests sent at once would else keep the engine from the interpreter until all are answered."""


class Server(uvicorn.Server):
    """After SIGTERM or SIGINT: accept nothing, let answers end, and end those with an error that take too long.

    After SIGHUP: load the models anew whose checkpoints have changed.
    """

    def __init__(self, config: uvicorn.Config, registry: ModelRegistry) -> None:
        super().__init__(config)
        self.registry = registry
        self.reloads: set[asyncio.Task[None]] = set()
        """Those at work."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(AcceptErrors())
        raise_open_files(self.registry.limits.connections + OTHER_FILES)
        if takes_hangups():
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self.reload)
        await super().startup(sockets)

    def reload(self) -> None:
        task = asyncio.get_running_loop().create_task(self.registry.reload())
        self.reloads.add(task)  # the loop itself keeps no task alive
        task.add_done_callback(self.reloads.discard)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.registry.drain()
        loop = asyncio.get_running_loop()
        loop.call_later(self.registry.limits.grace_seconds, self.registry.interrupt)
        await super().shutdown(sockets)


class AcceptErrors:
    """Says that no connection can be accepted, for want of file descriptors: once, until it has been well for a while.

    asyncio reports it for every place in the queue of connections, and tries again each second.
    """

    def __init__(self) -> None:
        self.last = -math.inf
        """When it happened last, in seconds of the loop's clock."""

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, ValueError) and "_start_serving" in context.get("message", ""):
            return  # it tries again behind the server's end: the socket that it listens on is closed
        if not (isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE) and "socket" in context):
            loop.default_exception_handler(context)
            return
        now = loop.time()
        if now - self.last > QUIET_SECONDS:
            LOG.warning("no connection can be accepted (%s): clients wait; raise `ulimit -n`", error.strerror)
        self.last = now


def takes_hangups() -> bool:
    """Whether SIGHUP reloads. In a terminal it says that the terminal was closed, and ends the server as ever."""
    main = threading.current_thread() is threading.main_thread()  # elsewhere Python takes no signals
    return main and hasattr(signal, "SIGHUP") and not (sys.stdin is not None and sys.stdin.isatty())


def raise_open_files(needed: int) -> None:
    """Raise this process's limit of open files to what so many connections need, as far as it may."""
    with suppress(ImportError, ValueError, OSError):  # not on Windows; not beyond what the system gives
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < needed:
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed if hard < 0 else min(needed, hard), hard))


def limited_protocol(limits: Limits) -> type[H11Protocol]:
    """HTTP/1.1 for so many connections, each of which has `body_seconds` to send the head of a request: of its first
    from the beginning, of a later one from its first byte."""
    connections = 0  # uvicorn makes a protocol per connection, so the count is kept beside the class

    class LimitedProtocol(H11Protocol):
        head_alarm: asyncio.TimerHandle | None = None
        just_answered = False

        def connection_made(self, transport: Any) -> None:
            nonlocal connections
            connections += 1
            super().connection_made(transport)
            transport.max_size = READ_AT_ONCE  # asyncio's own attribute
            if connections > limits.connections:
                transport.abort()
                return
            self._set_alarm()

        def on_response_complete(self) -> None:
            self.just_answered = True
            super().on_response_complete()  # which handles what the client has sent already
            self.just_answered = False

        def handle_events(self) -> None:
            if self.just_answered and self.conn.trailing_data[0]:
                self.loop.call_later(BETWEEN_PIPELINED, self.handle_events)
                return
            super().handle_events()
            # Bytes have come, and are not a whole head yet.
            waiting = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
            if not waiting and self.cycle is not None:
                self._cancel_alarm()
            elif self.head_alarm is None:
                self._set_alarm()

        def _set_alarm(self) -> None:
            self.head_alarm = self.loop.call_later(limits.body_seconds, self.transport.abort)

        def _cancel_alarm(self) -> None:
            if self.head_alarm is not None:
                self.head_alarm.cancel()
                self.head_alarm = None

        def connection_lost(self, exc: Exception | None) -> None:
            nonlocal connections
            connections -= 1
            self._cancel_alarm()
            super().connection_lost(exc)

    return LimitedProtocol


def create_server(app: FastAPI, registry: ModelRegistry, host: str, port: int) -> Server:
    """A server for an application, not started yet."""
    limits = registry.limits
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=limited_protocol(limits),
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_level="info",
        access_log=False,  # /metrics counts; prompts and addresses stay out of logs
        server_header=False,
        date_header=True,
        proxy_headers=False,
        backlog=256,
        timeout_keep_alive=5,
        # After the grace answers end with an error event; a client that does not read that is cut off soon after.
        timeout_graceful_shutdown=max(1, round(limits.grace_seconds) + 5),
        h11_max_incomplete_event_size=16 * 1024,
    )
    return Server(config, registry)
