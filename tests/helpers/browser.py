"""Headless Chromium, driven by the WebDriver protocol; None where there is none."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1200,900 --allow-file-access-from-files=false"
).split()


def there() -> bool:
    return all(shutil.which(name) for name in ("chromium", "chromedriver"))


class Browser:
    """One window."""

    def __init__(self, base: str) -> None:
        self._base = base
        options = {"binary": shutil.which("chromium"), "args": _FLAGS}
        wanted = {
            "capabilities": {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}
        }
        self._session = f"{base}/session/{self._ask('POST', f'{base}/session', wanted)['sessionId']}"

    @staticmethod
    def _ask(method: str, url: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        with urlopen(Request(url, data, {"Content-Type": "application/json"}, method=method), timeout=60) as answer:
            return json.loads(answer.read())["value"]

    def open(self, url: str) -> None:
        self._ask("POST", f"{self._session}/url", {"url": url})

    def reload(self) -> None:
        """As the browser's own button does."""
        self._ask("POST", f"{self._session}/refresh", {})

    def run(self, script: str) -> Any:
        """What a script returns."""
        return self._ask("POST", f"{self._session}/execute/sync", {"script": script, "args": []})

    def wait(self, script: str, looks: int = 300) -> Any:
        """Until a script returns something true; by looks at the page, which get slower as the page does."""
        for _ in range(looks):
            if found := self.run(script):
                return found
            time.sleep(0.1)
        raise AssertionError(f"never true: {script}; {self.errors()}")

    def resize(self, width: int, height: int) -> None:
        """Give the page other sides, also those of a phone, which no window has."""
        sides = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        given = {"cmd": "Emulation.setDeviceMetricsOverride", "params": sides}
        self._ask("POST", f"{self._session}/goog/cdp/execute", given)

    def press(self, key: str) -> None:
        """A key of the keyboard; WebDriver's codes for those that are no letters."""
        codes = {"ArrowRight": "\ue014", "ArrowLeft": "\ue012", "ArrowUp": "\ue013"}
        actions = [{"type": kind, "value": codes.get(key, key)} for kind in ("keyDown", "keyUp")]
        self._ask("POST", f"{self._session}/actions", {"actions": [{"type": "key", "id": "k", "actions": actions}]})

    def errors(self) -> list[str]:
        """What the page complained of since it was asked last."""
        found = self._ask("POST", f"{self._session}/se/log", {"type": "browser"})
        return [entry["message"] for entry in found if entry["level"] == "SEVERE" and "favicon" not in entry["message"]]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._ask("GET", f"{self._session}/screenshot")))

    def close(self) -> None:
        self._ask("DELETE", self._session)


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A window that is closed at the end."""
    # It takes a free port itself and says when it listens there: a port that is looked for here may be another worker's
    # by then, and how long it takes to begin is the machine's affair.
    streams: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    driver = subprocess.Popen(["chromedriver", "--port=0"], **streams)
    try:
        said = (re.search(r"started successfully on port (\d+)", line) for line in driver.stdout or ())
        port = next((found[1] for found in said if found), "")
        assert port, f"chromedriver ended with {driver.wait()}"
        window = Browser(f"http://127.0.0.1:{port}")
        try:
            yield window
        finally:
            window.close()
    finally:
        driver.terminate()
        driver.wait(20)
