"""A proxy that writes down what clients send, and hands it on. It runs among the clients: standard library alone."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NOT_PASSED_ON = ("host", "connection", "transfer-encoding", "accept-encoding")


class Recorder:
    """What was sent, and how it was answered."""

    def __init__(self, target: int) -> None:
        self.target = target
        """Port of the server."""
        self.requests: list[dict[str, Any]] = []

    def handler(self) -> type[BaseHTTPRequestHandler]:
        recorder = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                upstream = HTTPConnection("127.0.0.1", recorder.target, timeout=120)
                headers = {k: v for k, v in self.headers.items() if k.lower() not in NOT_PASSED_ON}
                upstream.request(self.command, self.path, raw or None, headers)
                answer = upstream.getresponse()
                sent: dict[str, Any] = {"method": self.command, "path": self.path, "status": answer.status}
                recorder.requests.append(sent | ({"body": json.loads(raw)} if raw else {}))
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                if self.command != "HEAD":
                    while piece := answer.read1(65536):
                        self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                        self.wfile.flush()
                    self.wfile.write(b"0\r\n\r\n")
                upstream.close()

            do_POST = do_HEAD = do_OPTIONS = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler


@contextmanager
def recording(target: int) -> Iterator[tuple[Recorder, str]]:
    """(the recorder, its address) in front of the server at a port of this machine."""
    recorder = Recorder(target)
    server = ThreadingHTTPServer(("127.0.0.1", 0), recorder.handler())
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield recorder, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
