"""A local server that behaves like PhysioNet, with optional faults."""

from __future__ import annotations

import base64
import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

USER, PASSWORD = "reader@example.org", "s3cret-Pa55word"


@dataclass
class Fault:
    """The faults of one response.

    Attributes:
        status: respond with this status and no content.
        headers: headers of that response.
        cut: close the connection after this many bytes of the content.
        wrong: position of a changed byte.
        slow: seconds before the content.
        html: send a login page instead of the file.
        redirect: redirect to this address.
        body: send this content instead.
        replaced: headers to replace; None removes one.
        trickle: seconds between the bytes of the content.
    """

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    wrong: int | None = None
    slow: float = 0.0
    html: bool = False
    redirect: str = ""
    body: bytes | None = None
    replaced: dict[str, str | None] = field(default_factory=dict)
    trickle: float = 0.0


@dataclass
class Seen:
    """A received request."""

    method: str
    path: str
    range: str
    authorization: str
    agent: str


class Server:
    """A server with files, users and faults.

    Attributes:
        files: content by path.
        closed: whether user and password are required.
        signed: whether the user has signed the agreement.
        ranges: whether range requests are supported.
        faults: called with the request and the number of earlier requests for its path.
        seen: all requests.
        most: the largest number of concurrent responses.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.closed, self.signed, self.ranges = False, True, True
        self.faults: Callable[[Seen, int], Fault | None] = lambda _seen, _number: None
        self.seen: list[Seen] = []
        self.most = self._now = 0
        self.pace = 0.0
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def gets(self, part: str = "") -> list[Seen]:
        return [one for one in self.seen if one.method == "GET" and part in one.path]

    def add_sums(self, base: str) -> None:
        """Add the checksum list of all files below a path, as in a release."""
        lines = [
            f"{hashlib.sha256(content).hexdigest()} {path.removeprefix(base)}\n"
            for path, content in self.files.items()
            if path.startswith(base)
        ]
        self.files[f"{base}SHA256SUMS.txt"] = "".join(lines).encode()

    def enter(self, seen: Seen) -> int:
        with self._lock:
            self.seen.append(seen)
            self._counts[seen.path] += 1
            self._now += 1
            self.most = max(self.most, self._now)
            return self._counts[seen.path] - 1

    def leave(self) -> None:
        with self._lock:
            self._now -= 1


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        headers = self.headers
        seen = Seen(
            self.command,
            self.path,
            headers.get("Range", ""),
            headers.get("Authorization", ""),
            headers.get("User-Agent", ""),
        )
        number = self.state.enter(seen)
        try:
            self._answer(seen, number)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            self.state.leave()

    def _answer(self, seen: Seen, number: int) -> None:
        state = self.state
        fault = state.faults(seen, number) or Fault()
        if state.closed and (status := self._refusal(seen)):
            return self._empty(status)
        if fault.status:
            return self._empty(fault.status, fault.headers)
        if fault.redirect:
            return self._empty(302, {"Location": fault.redirect})
        content = state.files.get(seen.path)
        if fault.html:
            return self._send(200, b"<html>log in</html>", {"Content-Type": "text/html"}, fault)
        if content is None:
            return self._empty(404)
        if fault.body is not None:
            content = fault.body
        tag = f'"{hashlib.md5(content).hexdigest()}"'
        extra = {"ETag": tag, "Content-Type": "application/octet-stream"}
        unchanged = self.headers.get("If-Range", tag) == tag
        if seen.range and state.ranges and unchanged:
            start = int(seen.range.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                return self._empty(416, {"Content-Range": f"bytes */{len(content)}"})
            extra["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return self._send(206, content[start:], extra, fault)
        self._send(200, content, extra, fault)

    def _refusal(self, seen: Seen) -> int:
        """The rules of PhysioNet: 403 for unknown user agents, 401 for wrong passwords."""
        wanted = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        if not seen.agent.startswith("Wget/"):
            return 403
        if seen.authorization != wanted:
            return 401
        return 0 if self.state.signed else 403

    def _empty(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, status: int, content: bytes, headers: dict[str, str], fault: Fault) -> None:
        self.send_response(status)
        sent = {**headers, "Content-Length": str(len(content)), **fault.replaced}
        for name, value in sent.items():
            if value is not None:
                self.send_header(name, value)
        if sent["Content-Length"] is None:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if self.command == "HEAD":
            return
        time.sleep(fault.slow + self.state.pace)
        if fault.wrong is not None and content:
            place = fault.wrong % len(content)
            content = content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]
        if fault.cut is not None:
            content = content[: fault.cut % (len(content) + 1)]
            self.close_connection = True
        if not fault.trickle:
            self.wfile.write(content)
        for place in range(len(content) if fault.trickle else 0):
            self.wfile.write(content[place : place + 1])
            self.wfile.flush()
            time.sleep(fault.trickle)


@contextmanager
def serving() -> Iterator[Server]:
    """Run the server within a context."""
    state = Server()
    handler = type("Handler", (_Handler,), {"state": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    state.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
