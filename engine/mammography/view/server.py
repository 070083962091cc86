"""A local server of the viewer's page, with tiles and maps on demand."""

from __future__ import annotations

import hmac
import re
import secrets
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

from ...errors import GigamorphError
from .site import PAGE, ViewerFiles

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css",
    ".png": "image/png",
}
_TEXT = "text/plain; charset=utf-8"
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
# Few digits, because computing with huge numbers would be slow.
_TILE = re.compile(
    r"(?:tiles/([0-9]{1,9})|masks/([0-9]{1,9})/(predicted|reference))/([0-9]{1,2})/([0-9]{1,9})_([0-9]{1,9})\.png"
)
_EVIDENCE = re.compile(r"evidence/([0-9]{1,9})\.png")


class PageServer(ThreadingHTTPServer):
    """Serves a site to clients that know its address, which contains a random token.

    The token is in the path and not in a cookie, because browsers send cookies to all ports of a machine.

    Args:
        site: the page and its files.
        port: 0 takes a free port.

    Attributes:
        address: of the page.

    Raises:
        GigamorphError: if the port is in use.
        DataError: if an image cannot be opened.
    """

    def __init__(self, site: ViewerFiles, port: int) -> None:
        self.site = site
        self.files = {path.name: path.read_bytes() for path in PAGE.iterdir()}
        self.files[""] = self.files["index.html"] = site.page("png").encode()
        self.root = f"/{secrets.token_urlsafe(32)}/"
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise GigamorphError(f"port {port} cannot be opened ({error.strerror}); choose another --port") from error
        own = f":{self.server_port}"
        ends = (own, "") if self.server_port == 80 else (own,)  # browsers omit the default port
        self.hosts = {name + end for name in ("127.0.0.1", "localhost") for end in ends}
        self.address = f"http://127.0.0.1{own}{self.root}"


class _Handler(BaseHTTPRequestHandler):
    default_request_version = "HTTP/1.0"  # HTTP/0.9 has no headers

    def parse_request(self) -> bool:
        """Check requests of all methods before they are handled."""
        if not super().parse_request():
            return False
        refusal = self._refusal()
        if refusal:
            self.send_error(HTTPStatus.FORBIDDEN, refusal)
        return not refusal

    def _refusal(self) -> str:
        """The reason to refuse a request; empty if the user or the page sent it."""
        server = cast(PageServer, self.server)
        hosts, origins, sites = (self.headers.get_all(name, []) for name in ("Host", "Origin", "Sec-Fetch-Site"))
        if len(hosts) != 1 or hosts[0] not in server.hosts:  # host names of other sites may resolve to this machine
            return f"this is not the address of gigamorph view, which is at port {server.server_port} of 127.0.0.1"
        # The page does not link to itself: only the user navigates to it.
        senders = {"none"} if self.headers.get("Sec-Fetch-Mode") == "navigate" else {"none", "same-origin"}
        if {*origins} - {f"http://{hosts[0]}"} or {*sites} - senders:
            return "the request comes from another page; copy the address that gigamorph view printed into a new tab"
        if self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers:
            return "a request must have no body"
        if not hmac.compare_digest(self.path[: len(server.root)].encode("latin-1"), server.root.encode()):
            return "open the complete address that gigamorph view printed"
        return ""

    def do_GET(self) -> None:
        server = cast(PageServer, self.server)
        name = self.path[len(server.root) :]
        try:
            body = server.files[name] if name in server.files else _generated(server.site, name)
        except (IndexError, FileNotFoundError):
            self.send_error(HTTPStatus.NOT_FOUND)
        except GigamorphError as error:
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))
        else:
            self._answer(HTTPStatus.OK, _TYPES.get(Path(name or "index.html").suffix, _TEXT), body)

    do_HEAD = do_GET  # noqa: N815

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Send the error as a line in the body, not the status line, because file names may contain any characters."""
        status = HTTPStatus(code)
        line = " ".join((message or status.phrase).split())
        self._answer(status, _TEXT, f"{code:d}: {line}\n".encode(errors="replace"))

    def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _generated(site: ViewerFiles, name: str) -> bytes:
    """The tile or map with this name."""
    if found := _TILE.fullmatch(name):
        image, masked, which = found.groups()[:3]
        level, column, row = map(int, found.groups()[3:])
        return site.tiles_of(int(image or masked), which or "").tile(level, column, row)
    if found := _EVIDENCE.fullmatch(name):
        return site.evidence(int(found[1]))
    raise IndexError(name)
