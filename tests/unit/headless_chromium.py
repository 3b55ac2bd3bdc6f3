"""A headless Chromium for tests, driven over its debugging pipe with nothing but the standard library."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def chromium_path() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    """One open page; `problems` collects console errors, uncaught exceptions and refused resources."""

    def __init__(self, write_fd: int, read_fd: int) -> None:
        self._write, self._read = os.fdopen(write_fd, "wb"), os.fdopen(read_fd, "rb")
        self._number, self._session, self._rest = 0, None, b""
        self.problems: list[str] = []

    def open(self, file: Path, width: int, height: int, dark: bool = False) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call("Page.navigate", url=file.resolve().as_uri())
        self.until("document.documentElement?.dataset.ready === 'true'")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._write.write(json.dumps(message).encode() + b"\0")
        self._write.flush()
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def js(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, expression: str, seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while not self.js(expression):
            assert time.monotonic() < deadline, f"never true: {expression}; problems: {self.problems}"
            time.sleep(0.1)

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            block = os.read(self._read.fileno(), 1 << 20)
            assert block, "Chromium closed its debugging pipe"
            self._rest += block
        line, self._rest = self._rest.split(b"\0", 1)
        message = json.loads(line)
        params = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.problems.append(str(params["exceptionDetails"].get("exception", params["exceptionDetails"])))
        elif message.get("method") == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.problems.append(str(params["args"]))
        elif message.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(params["entry"]["text"])
        return message


@contextlib.contextmanager
def headless_page(profile: Path) -> Iterator[Page]:
    """Starts Chromium with a fresh profile and ends it afterwards. It reads commands on fd 3 and answers on fd 4."""
    executable = chromium_path()
    assert executable is not None
    to_browser, from_browser = os.pipe(), os.pipe()
    arguments = ["--headless=new", "--no-sandbox", "--disable-gpu-sandbox", "--use-angle=swiftshader"]
    arguments += [
        "--enable-unsafe-swiftshader",
        "--no-first-run",
        "--mute-audio",
        f"--user-data-dir={profile}",
        "--remote-debugging-pipe",
    ]
    # A shell can't redirect descriptors above 9, so a small Python puts them in place and becomes the browser.
    command = (
        "import os, sys; a, b = os.dup(int(sys.argv[1])), os.dup(int(sys.argv[2])); "
        "os.dup2(a, 3); os.dup2(b, 4); os.set_inheritable(3, True); os.set_inheritable(4, True); "
        "os.execv(sys.argv[3], sys.argv[3:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", command, str(to_browser[0]), str(from_browser[1]), executable, *arguments],
        pass_fds=(to_browser[0], from_browser[1]),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser[0])
    os.close(from_browser[1])
    try:
        yield Page(to_browser[1], from_browser[0])
    finally:
        process.terminate()
        process.wait(timeout=20)
