"""What every request passes before the application sees it: token, host, size and speed of its body.

Bodies are read whole, within their limits, so that the application never waits for a client in the middle of one.
"""

from __future__ import annotations

import asyncio
import hmac
import re
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lrt.serve.config import Limits
from lrt.serve.errors import ApiError
from lrt.serve.metrics import ServerMetrics
from lrt.serve.page_files import PAGE_FILES

PUBLIC_PATHS = (*PAGE_FILES, "/healthz", "/health")
"""Answered without a token: the page itself, which holds no data, and whether the server lives."""
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page may load from this server and talk to it, and to nobody else; what is written into it runs nothing."""
UNREAD_SECONDS = 30.0
"""Seconds after the time limit of a request at which a client that does not read is cut off."""


class RequestGuard:
    """ASGI middleware: refuses what may not pass, counts every response and gives it the security headers.

    `request.state.owner` says afterwards which token was sent.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        metrics: ServerMetrics,
        tokens: Collection[str],
        hosts: Collection[str] | None,
        routes: Collection[str],
    ) -> None:
        """tokens: of which `Authorization: Bearer` must hold one; empty: nothing is asked for. hosts: names that `Host`
        may have (against DNS rebinding, pages that point a name of their own at this machine); None: any. routes:
        addresses that are counted by name."""
        self.app, self.limits, self.metrics, self.routes = app, limits, metrics, frozenset(routes)
        self.tokens = [token.encode() for token in tokens]
        self.hosts = None if hosts is None else frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        send = self._count_response(scope, send)
        try:
            scope.setdefault("state", {})["owner"] = self._authorise(scope)
            body = await self._read_body(Headers(scope=scope), receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        if body is None:  # the client went away
            return
        try:
            async with asyncio.timeout(self.limits.request_seconds + UNREAD_SECONDS):
                await self.app(scope, replay(body, receive), send)
        except TimeoutError:
            return  # the server closes a connection whose answer is not complete

    def _authorise(self, scope: Scope) -> str:
        """Which of the tokens was sent, by its number; "" where none is asked for.

        ApiError 403 for a wrong host, 401 for a wrong token.
        """
        headers = Headers(scope=scope)
        if self.hosts is not None and host_name(headers.get("host", "")) not in self.hosts:
            raise ApiError(403, "this server is for its own machine only; use http://127.0.0.1", code="wrong_host")
        if not self.tokens or scope["path"] in PUBLIC_PATHS:
            return ""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        guess = token.strip().encode("utf-8", "replace")
        # In constant time, and with all of them: how long it takes must not tell how much of a guess was right.
        matches = [hmac.compare_digest(guess, one) for one in self.tokens]
        if scheme.lower() != "bearer" or not any(matches):
            message = "the token is missing or wrong; send Authorization: Bearer TOKEN (clients call it api_key)"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return str(matches.index(True))

    async def _read_body(self, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body, read no further than the limits go. None: the client went away.

        ApiError 413 where it is too large, 408 where it comes too slowly; the connection is then closed.
        """
        limit, close = self.limits.body_bytes, {"Connection": "close"}
        too_large = ApiError(413, f"the body is larger than {limit:,} bytes; send less", headers=close)
        length = headers.get("content-length", "0")
        # 19 digits are more than any limit, and Python refuses to read thousands.
        if not length.isdecimal() or int(length[:19]) > limit:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:  # chunked bodies announce no length
                        raise too_large
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            seconds = self.limits.body_seconds
            raise ApiError(408, f"the body did not arrive within {seconds:g} seconds", headers=close) from None

    def _count_response(self, scope: Scope, send: Send) -> Send:
        """`send`, which also counts the response and adds the security headers."""
        route = scope["path"] if scope["path"] in self.routes else "other"

        async def send_counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(route, str(message["status"])).inc()
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Cache-Control"] = "no-store"
                headers["Referrer-Policy"] = "no-referrer"
                headers["Content-Security-Policy"] = CONTENT_SECURITY_POLICY
            await send(message)

        return send_counted


def host_name(host: str) -> str:
    """The name or address in a Host header, which may have a port behind it; an IPv6 address is in brackets there."""
    matched = re.fullmatch(r"(?:\[([^\[\]]*)\]|([^:\[\]]*))(?::\d*)?", host)
    return "" if matched is None else (matched[1] or matched[2] or "").lower()


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once, then whatever comes."""
    sent = False

    async def receive_body() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_body
