"""A small server of this machine alone: a viewer's page, and its tiles and maps when they are asked for."""

from __future__ import annotations

import re
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ..errors import GigamorphError
from .site import PAGE, Site

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css",
    ".png": "image/png",
}
_TILE = re.compile(r"/(?:tiles/(\d+)|masks/(\d+)/(predicted|reference))/(\d+)/(\d+)_(\d+)\.png")
_EVIDENCE = re.compile(r"/evidence/(\d+)\.js")


def make_server(site: Site, folder: Path, port: int) -> ThreadingHTTPServer:
    """A server of the page in a folder, which is reached from this machine only; port 0 takes one that is free.

    Raises:
        GigamorphError: the port is taken.
    """
    files = {"/" + path.name for path in PAGE.iterdir()} | {"/data.js"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # Pages of elsewhere that resolve their name to this machine must not read its images.
            if self.headers.get("Host", "").rpartition(":")[0] not in ("127.0.0.1", "localhost"):
                self.send_error(HTTPStatus.FORBIDDEN)
                return
            place = "/index.html" if self.path == "/" else self.path.partition("?")[0]
            try:
                body = (folder / place[1:]).read_bytes() if place in files else _made(site, place)
            except (IndexError, FileNotFoundError):
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            except GigamorphError as error:
                self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, str(error)[:200].encode("ascii", "replace").decode())
                return
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", _TYPES.get(Path(place).suffix, "text/plain; charset=utf-8"))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise GigamorphError(f"port {port} cannot be opened ({error.strerror}); give another --port") from error


def _made(site: Site, place: str) -> bytes:
    """A tile or a map, by its name."""
    if found := _TILE.fullmatch(place):
        image, masked, which = found.groups()[:3]
        level, column, row = map(int, found.groups()[3:])
        return site.tiles_of(int(image or masked), which or "").tile(level, column, row)
    if found := _EVIDENCE.fullmatch(place):
        return site.evidence(int(found[1])).encode()
    raise IndexError(place)
