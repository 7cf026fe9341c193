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
    """After SIGTERM or SIGINT: accept nothing, let answers end, and end those with an error that take too long."""

    def __init__(self, config: uvicorn.Config, registry: ModelRegistry) -> None:
        super().__init__(config)
        self.registry = registry

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.registry.drain()
        loop = asyncio.get_running_loop()
        loop.call_later(self.registry.limits.grace_seconds, self.registry.interrupt)
        await super().shutdown(sockets)


def limited_protocol(limits: Limits) -> type[H11Protocol]:
    """HTTP/1.1 for so many connections, each of which has `body_seconds` to send the head of a request: of its first
    from the beginning, of a later one from its first byte."""
    connections = 0  # uvicorn makes a protocol per connection, so the count is kept beside the class

    class LimitedProtocol(H11Protocol):
        head_alarm: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            nonlocal connections
            connections += 1
            super().connection_made(transport)
            if connections > limits.connections:
                transport.abort()
                return
            self._set_alarm()

        def handle_events(self) -> None:
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
        backlog=1024,
        timeout_keep_alive=5,
        # After the grace answers end with an error event; a client that does not read that is cut off soon after.
        timeout_graceful_shutdown=max(1, round(limits.grace_seconds) + 5),
        h11_max_incomplete_event_size=32 * 1024,
    )
    return Server(config, registry)
