"""A proxy before a server of HTTP that fails a part of the requests, which ones is fixed by a seed.

What befalls a request depends on the seed, its line and how often it was made before, not on what runs beside it.
"""

import collections
import contextlib
import http.client
import http.server
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator

SECONDS = 0.5
"""How long a slow one is held."""
WEATHER = ("503", "reset", "reply lost", "slow")
OUTAGE = ("503", "reset")
"""What befalls requests, none of which is done in an outage."""


class Storm:
    """`share` of the requests meet one of the `fates`: a 503, a reset before or after the request is done, a wait."""

    def __init__(self, target: str, share: float, seed: int = 0) -> None:
        self.target, self.share, self.seed = target, share, seed
        self.befallen: collections.Counter[str] = collections.Counter()
        self.seen: collections.Counter[str] = collections.Counter()
        self.fates = WEATHER
        self.only = ""
        """What a request's line must hold for the storm to touch it."""
        self._lock = threading.Lock()

    def fate(self, line: str) -> str:
        with self._lock:
            self.seen[line] += 1
            chance = random.Random(f"{self.seed} {line} {self.seen[line]}")
            fate = "pass"
            if self.only in line and chance.random() < self.share:
                fate = chance.choice(self.fates)
            self.befallen[fate] += 1
            return fate


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    storm: Storm

    def handle_any(self) -> None:
        body = self._body()
        fate = self.storm.fate(f"{self.command} {self.path}")
        if fate == "503":
            self._answer(503, [("Content-Type", "text/plain")], b"a storm")
        elif fate == "reset":
            self._reset()
        else:
            if fate == "slow":
                time.sleep(SECONDS)
            status, headers, content = self._forwarded(body)
            if fate == "reply lost":
                self._reset()
            else:
                self._answer(status, headers, content)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = handle_any

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _forwarded(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.storm.target, timeout=60)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("transfer-encoding", "content-length")}
        connection.request(self.command, self.path, body, headers)
        with contextlib.closing(connection), connection.getresponse() as response:
            return response.status, response.getheaders(), response.read()

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                self.send_header(name, value)
        told = dict(headers).get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", told)
        self.end_headers()
        self.wfile.write(content)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def log_message(self, *words: object) -> None:
        pass


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *words: object) -> None:
        pass  # a client that was killed


@contextlib.contextmanager
def before(storm: Storm) -> Iterator[str]:
    """The address, `http://host:port`, at which the storm stands before its target."""
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"storm": storm}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
