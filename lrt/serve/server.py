"""Uvicorn, with two things of ours: an orderly end of streams, and connections that never send a request are closed."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from lrt.serve.config import Limits
from lrt.serve.models import ModelRegistry


class Server(uvicorn.Server):
    """After SIGTERM or SIGINT: accept nothing, let answers end, and tell those that have not ended in time."""

    def __init__(self, config: uvicorn.Config, library: ModelRegistry) -> None:
        super().__init__(config)
        self.library = library

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.library.drain()
        loop = asyncio.get_running_loop()
        loop.call_later(self.library.limits.grace_seconds, self.library.interrupt)
        await super().shutdown(sockets)


def protocol(limits: Limits) -> type[H11Protocol]:
    """HTTP/1.1 for so many connections, each of which has `body_seconds` to send the head of a request: of its first
    from the beginning, of a later one from its first byte."""
    count = 0

    class Guarded(H11Protocol):
        head_alarm: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            nonlocal count
            count += 1
            super().connection_made(transport)
            if count > limits.connections:
                transport.abort()
                return
            self._expect()

        def handle_events(self) -> None:
            super().handle_events()
            waiting = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
            if not waiting and self.cycle is not None:
                self._heard()
            elif self.head_alarm is None:
                self._expect()

        def _expect(self) -> None:
            self.head_alarm = self.loop.call_later(limits.body_seconds, self.transport.abort)

        def _heard(self) -> None:
            if self.head_alarm is not None:
                self.head_alarm.cancel()
                self.head_alarm = None

        def connection_lost(self, exc: Exception | None) -> None:
            nonlocal count
            count -= 1
            self._heard()
            super().connection_lost(exc)

    return Guarded


def server(app: FastAPI, library: ModelRegistry, host: str, port: int) -> Server:
    """A server for an application, not started yet."""
    limits = library.limits
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=protocol(limits),
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_level="info",
        access_log=False,  # /metrics counts; prompts and addresses stay out of logs
        server_header=False,
        date_header=True,
        proxy_headers=False,
        backlog=1024,
        timeout_keep_alive=5,
        # Answers are told to end after the grace; a client that does not read that is cut off soon after.
        timeout_graceful_shutdown=max(1, round(limits.grace_seconds) + 5),
        h11_max_incomplete_event_size=32 * 1024,
    )
    return Server(config, library)
