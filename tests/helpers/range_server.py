"""A web server of a folder, for tests: with byte ranges, as stores have them, or without; it counts what it sends."""

from __future__ import annotations

import http.server
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class Served:
    """Where it is, and what it has sent."""

    def __init__(self, url: str) -> None:
        self.url, self.bytes, self.requests = url, 0, 0


@contextmanager
def serving(folder: Path, *, ranges: bool = True) -> Iterator[Served]:
    """Serve the files below a folder."""
    served = Served("")

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            path = folder / self.path.lstrip("/")
            if not path.is_file():
                self.send_error(404)
                return
            data = path.read_bytes()
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if ranges else None
            total = len(data)
            if asked is not None:
                start, end = int(asked[1]), int(asked[2] or total - 1)
                data = data[start : end + 1]
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{total}")
            else:
                self.send_response(200)
            if ranges:
                self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                served.bytes += len(data)
                served.requests += 1
                with suppress(BrokenPipeError):  # who asks for the last byte reads no others
                    self.wfile.write(data)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        served.url = f"http://127.0.0.1:{server.server_port}"
        yield served
        server.shutdown()
