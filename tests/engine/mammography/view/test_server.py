"""Whom a viewer's server answers, and how; and texts of tables in pages, which hold anything. No browser is needed."""

import contextlib
import csv
import http.client
import itertools
import json
import re
import socket
import threading

import browser
import imagecodecs
import numpy as np
import pytest
from predicted_masks import write_predicted
from viewed import shown

from gigamorph.engine.errors import DataError
from gigamorph.engine.mammography.view.exams import read_exams
from gigamorph.engine.mammography.view.server import PageServer
from gigamorph.engine.mammography.view.site import ViewerFiles

HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
POLICY = {
    *("default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self'"),
    *("frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'"),
}
HOSTILE = "</script><!--<script><img src=x onerror=document.title='read'>&amp;"


class Maps:
    """In place of a trained network's."""

    made_by = "test"

    def of(self, view, shown):
        return np.full((4, 3), 200, np.uint8)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Of masks whose class, patients, files and views have hostile names."""
    folder = tmp_path_factory.mktemp("server")
    table, predictions = write_predicted(folder)
    for path in (table, predictions):
        with path.open(newline="") as file:
            found = list(csv.DictReader(file))
        for row in found:
            row.update(patient_id=HOSTILE, view=HOSTILE)
            name = f"{HOSTILE.replace('/', '')}{row['image_path'][-5:]}"
            if path == table:
                (folder / row["image_path"]).rename(folder / name)
                row["image_path"] = name
            else:
                row["image_path"] = str(folder / name)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [column.replace("mass", HOSTILE) for column in found[0]])
            writer.writeheader()
            writer.writerows({column.replace("mass", HOSTILE): cell for column, cell in row.items()} for row in found)
    note = folder / "out" / "predictions.json"
    note.write_text(json.dumps({"masks": {"classes": ["background", HOSTILE, "cyst"], "binary": False}}))
    return ViewerFiles(read_exams(predictions, table=table), Maps(), identifiers=True)


@pytest.fixture(scope="module")
def server(site):
    with PageServer(site, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(server, name="", *, root=None, host=None, method="GET", headers=(), body=None):
    """(status, headers, body), after what all answers have in common."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    with contextlib.closing(connection):
        connection.putrequest(method, (server.root if root is None else root) + name, skip_host=True)
        for one in [f"127.0.0.1:{server.server_port}"] if host is None else host:
            connection.putheader("Host", one)
        for key, value in headers:
            connection.putheader(key, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, require_headers(answer.headers), answer.read()


def require_headers(headers):
    assert {key: headers[key] for key in HEADERS} == HEADERS
    assert set(headers["Content-Security-Policy"].split("; ")) == POLICY
    assert not {"Set-Cookie", "Access-Control-Allow-Origin", "Location"} & set(headers)
    return headers


def refused(server, *args, status=403, **options):
    found, headers, body = ask(server, *args, **options)
    assert found == status and headers["Content-Type"] == "text/plain; charset=utf-8"
    return re.fullmatch(rf"{status}: [^\n]{{9,110}}\n", body.decode()) and server.root.strip("/") not in body.decode()


def test_the_page_and_its_parts_at_its_address(server, site):
    parts = {
        "": ("text/html; charset=utf-8", b"<!doctype html>"),
        "index.html": ("text/html; charset=utf-8", b"<!doctype html>"),
        "view.js": ("text/javascript; charset=utf-8", b'"use strict"'),
        "view.css": ("text/css", b"*"),
        "openseadragon.LICENSE.txt": ("text/plain; charset=utf-8", b"Copyright"),
        "tiles/3/0/1_2.png": ("image/png", b"\x89PNG"),
        "masks/0/reference/1/0_0.png": ("image/png", b"\x89PNG"),
        "evidence/3.png": ("image/png", b"\x89PNG"),
    }
    own = ({"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"}, {"Sec-Fetch-Site": "same-origin"}, {})
    for (name, (kind, begin)), sent, host in itertools.product(parts.items(), own, ("127.0.0.1", "localhost")):
        host = f"{host}:{server.server_port}"
        sent = [*sent.items(), *([("Origin", f"http://{host}")] if sent else [])]
        status, headers, body = ask(server, name, host=[host], headers=sent)
        assert (status, headers["Content-Type"]) == (200, kind) and body.startswith(begin)
        status, headers, body = ask(server, name, host=[host], headers=sent, method="HEAD")
        assert (status, headers["Content-Type"], body) == (200, kind, b"") and int(headers["Content-Length"]) > 0
    assert (imagecodecs.png_decode(ask(server, "evidence/3.png")[2]) == 200).all()
    assert shown(ask(server)[2].decode())["exams"][0]["name"] == HOSTILE


def test_each_server_has_an_address_of_its_own(server, site):
    with PageServer(site, 0) as other:
        assert other.root != server.root
        assert re.fullmatch(r"/[\w-]{43}/", other.root)
        assert other.address == f"http://127.0.0.1:{other.server_port}{other.root}"


def test_without_the_token_nothing_is_there(server):
    root = server.root
    wrong = [
        *("/", "", "/x/", f"/{'A' * 43}/"),
        *(root[:-1], root[:-2] + "/", root.swapcase(), root[1:], f"{root[:-1]}x/", f"/x/..{root}", f"/.{root}"),
        *(
            f"/%{ord(root[1]):02x}{root[2:]}",
            f"/?{root}",
            f"/#{root}",
            f"{server.address[:-1]}",
            f"/{root.strip('/')}%2f",
        ),
    ]
    names = (
        "",
        "index.html",
        "view.js",
        "data.js",
        "data.json",
        "evidence/0.js",
        "evidence/0.png",
        "tiles/0/0/0_0.png",
    )
    for start, name in itertools.product(wrong, names):
        assert refused(server, name, root=start), (start, name)


def test_with_the_token_only_the_site_s_names_are_there(server):
    for name in (
        *("data.js", "data.json", "evidence/0.js", "evidence/4.png", "tiles/4/0/0_0.png", "tiles/0/9/0_0.png"),
        *("tiles/0/0/9_0.png", "tiles/-1/0/0_0.png", "tiles/0/0/0_0.png/", "/tiles/0/0/0_0.png", "tiles/%30/0/0_0.png"),
        *("masks/0/other/0/0_0.png", "../", "..", "../server.py", "page/../view.js", "%2e%2e/server.py", "view.js%00"),
        *("..%2f..%2fetc/passwd", "/etc/passwd", "view.js?x", "view.js/", ".", "%76iew.js", "VIEW.JS", "view\\.js"),
        *(f"tiles/{'9' * 5000}/0/0_0.png", f"tiles/0/{'9' * 9}/0_0.png", "x" * 60_000),
    ):
        assert refused(server, name, status=404), name
    assert refused(server, "x" * 70_000, status=414)


def test_other_pages_are_refused_even_with_the_token(server):
    port = server.server_port
    hosts = [
        *("elsewhere.example", f"elsewhere.example:{port}", "127.0.0.1", "localhost", f"127.0.0.1:{port + 1}", ""),
        *(f"127.0.0.1:{port}.elsewhere.example", f"127.0.0.1:{port}@elsewhere.example", f"x@127.0.0.1:{port}"),
        *(f"[::1]:{port}", f"0.0.0.0:{port}", f"127.1:{port}", f"2130706433:{port}", f"127.0.0.1:0{port}"),
        *(f"localhost.:{port}", f"127.0.0.1.elsewhere.example:{port}", f"127.0.0.1:{port},127.0.0.1:{port}"),
    ]
    own = f"127.0.0.1:{port}"
    for host in [*([one] for one in hosts), [], [own, own], [own, f"elsewhere.example:{port}"]]:
        assert refused(server, host=host), host
    for headers in (
        *([("Origin", f"http://{one}")] for one in hosts if one),
        *(
            [("Origin", one)]
            for one in ("null", "", own, f"https://{own}", f"http://{own}/", f"http://localhost:{port}")
        ),
        [("Origin", f"http://{own}"), ("Origin", "null")],
        *([("Sec-Fetch-Site", one)] for one in ("cross-site", "same-site", "", "None", "same-origin, none")),
        [("Sec-Fetch-Site", "same-origin"), ("Sec-Fetch-Site", "cross-site")],
        *(
            [("Sec-Fetch-Site", one), ("Sec-Fetch-Mode", "navigate")]
            for one in ("cross-site", "same-site", "same-origin")
        ),
        [("Transfer-Encoding", "chunked")],
    ):
        for name in ("", "tiles/0/0/0_0.png"):
            assert refused(server, name, headers=headers), headers
    assert refused(server, headers=[("Content-Length", "3")], body=b"a=b")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PATCH", "get", "NONE"])
def test_other_methods_are_refused(server, method):
    assert refused(server, method=method, status=501)
    assert refused(server, root="/", method=method)


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ("GET {root} HTTP/1.0\r\nHost: 127.0.0.1:{port}", 200),
        ("GET {root} HTTP/1.0", 403),
        ("GET {root} HTTP/1.1", 403),
        ("GET {root}", 403),  # HTTP/0.9, which has no headers
        ("GET {root} HTTP/2.0\r\nHost: 127.0.0.1:{port}", 505),
        ("GET {root} HTTP/x\r\nHost: 127.0.0.1:{port}", 400),
        ("GET http://127.0.0.1:{port}{root} HTTP/1.1\r\nHost: 127.0.0.1:{port}", 403),
        ("GET /" + 43 * "\xe9" + "/ HTTP/1.0\r\nHost: 127.0.0.1:{port}", 403),
        ("GET {root}tiles/\xb2/0/0_0.png HTTP/1.0\r\nHost: 127.0.0.1:{port}", 404),
        ("HEAD / HTTP/1.0", 403),
        ("nonsense", 400),
        ("POST {root}", 400),
        ("GET {root} HTTP/1.1\r\n" + "\r\n".join(f"X-{n}: y" for n in range(200)), 431),
    ],
)
def test_answers_to_raw_requests_have_all_headers(server, lines, status):
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as connection:
        connection.sendall(f"{lines.format(root=server.root, port=server.server_port)}\r\n\r\n".encode("latin-1"))
        with connection.makefile("rb") as answer:
            assert answer.readline().split()[:2] == [b"HTTP/1.0", str(status).encode()]
            require_headers(http.client.parse_headers(answer))


def test_an_error_s_text_adds_no_headers(server, site, monkeypatch):
    def fails(number, which):
        raise DataError("a\r\nSet-Cookie: b=c\r\n\r\n\ud800.png: cannot be read")

    monkeypatch.setattr(site, "tiles_of", fails)
    status, headers, body = ask(server, "tiles/0/0/0_0.png")
    assert status == 500 and headers["Content-Type"] == "text/plain; charset=utf-8"
    assert body.decode() == "500: a Set-Cookie: b=c ?.png: cannot be read\n"


@pytest.mark.skipif(not browser.there(), reason="no chromium and chromedriver")
def test_names_are_shown_as_texts(server, site, tmp_path):
    site.write_page(tmp_path)
    site.write_all(tmp_path, lambda number: None)
    with browser.browser() as page:
        for place in (server.address, f"file://{tmp_path}/index.html"):
            page.open(place)
            page.wait(
                "return state.shown.length > 0 && state.shown.every(s => s.viewer.world.getItemAt(0)?.getFullyLoaded())"
            )
            assert page.errors() == []
            assert page.run("return document.title") == "gigamorph view"
            assert page.run("return document.querySelectorAll('img, header script, main script').length") == 0
            texts = page.run("return [...document.querySelector('.told').children].map(line => line.textContent)")
            image = site.views[0].record
            assert texts[0] == f"{image.laterality} {HOSTILE}" and texts[1].startswith(f"{HOSTILE}: ")
            assert texts[-1] == image.path.name
            assert page.run("return document.getElementById('name').textContent").startswith(HOSTILE)


def test_a_number_that_is_not_finite_is_one_line(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((20, 20), np.uint8))
    for cells, bad in (("1,nan,0.5", True), ("1,inf,0.5", True), ("nan,0.5,0.5", False)):
        (tmp_path / "predictions.csv").write_text(f"image_path,label_0,p_0,p_1\na.npy,{cells}\n")
        site = ViewerFiles(read_exams(tmp_path), None, identifiers=False)
        expected = (
            pytest.raises(DataError, match=r"a\.npy: a prediction, label or outline is not finite") if bad else None
        )
        with expected or contextlib.nullcontext():
            assert shown(site.page("js"))["exams"][0]["views"][0]["truth"] == {}
