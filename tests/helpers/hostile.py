"""A page of another origin that tries, in a browser, to read what a server of this machine serves."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Each way resolves to what it has read: an empty text is nothing.
_PAGE = """<!doctype html><meta charset="utf-8"><title>hostile</title><body><script>
const loaded = (tag, set, found) => new Promise((done) => {
  const element = document.createElement(tag);
  element.onload = element.onloadedmetadata = () => done(found(element));
  element.onerror = () => done("");
  set(element);
  document.body.append(element);
  setTimeout(() => done(""), 5000);
});
const text = (place) => { try { return place().body.innerText; } catch { return ""; } };
const pixel = (image) => {
  const context = document.createElement("canvas").getContext("2d");
  context.drawImage(image, 0, 0);
  try { return `${context.getImageData(0, 0, 1, 1).data}`; } catch { return ""; }
};
const answer = (url, options) => fetch(url, options).then((found) => found.text(), () => "");
const posted = (url) => new Promise((done) => {
  const frame = document.createElement("iframe"), form = document.createElement("form");
  frame.name = url;
  let loads = 0;  // of the empty frame, and of the answer
  frame.onload = () => { if (++loads === 2) done(text(() => frame.contentDocument)); };
  Object.assign(form, { method: "post", action: url, target: url });
  document.body.append(frame, form);
  form.submit();
  setTimeout(() => done(""), 5000);
});
const WAYS = {
  script: (url) => loaded("script", (e) => { e.src = url; }, () => "ran"),
  module: (url) => loaded("script", (e) => { e.type = "module"; e.src = url; }, () => "ran"),
  style: (url) => loaded("link", (e) => { e.rel = "stylesheet"; e.href = url; }, () => "loaded"),
  image: (url) => loaded("img", (e) => { e.src = url; }, (e) => `${e.naturalWidth}`),
  canvas: (url) => loaded("img", (e) => { e.src = url; }, pixel),
  cors: (url) => loaded("img", (e) => { e.crossOrigin = "use-credentials"; e.src = url; }, pixel),
  fetch: (url) => answer(url, {}),
  opaque: (url) => answer(url, { mode: "no-cors", credentials: "include" }),
  frame: (url) => loaded("iframe", (e) => { e.src = url; }, (e) => text(() => e.contentDocument)),
  object: (url) => loaded("object", (e) => { e.data = url; }, (e) => text(() => e.contentDocument)),
  window: (url) => {
    const other = open(url);
    return new Promise((done) => setTimeout(done, 2000)).then(() => {
      const found = text(() => other.document);
      other?.close();
      return found;
    });
  },
  post: posted,
};
async function attack(base, names) {
  const read = {};
  await Promise.all(names.flatMap((name) => Object.entries(WAYS).map(async ([way, tried]) => {
    const found = await tried(base + name);
    if (found) read[`${way} ${name}`] = found.slice(0, 60);
  })));
  return read;
}
let read = null;
const begin = (base, names) => { read = null; attack(base, names).then((found) => { read = found; }); };
</script>"""


@contextlib.contextmanager
def hostile(own: Path) -> Iterator[int]:
    """Serves the page at every address of a port, and at /own/ the files of a folder, which its page may read."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(own))

        def do_GET(self) -> None:
            if self.path.startswith("/own/"):
                self.path = self.path.removeprefix("/own")
                super().do_GET()
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(_PAGE.encode())

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
