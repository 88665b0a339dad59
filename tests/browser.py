"""A headless Chromium, driven through a pipe by its DevTools protocol."""

import json
import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SECONDS = 60  # that the page has for a text


class Browser:
    """Opens pages; `errors` are what they wrote to the console or raised."""

    def __init__(self, to: int, back: int):
        self.to, self.back, self.number, self.errors = to, os.fdopen(back, "rb"), 0, []
        self.rest, self.session = b"", None

    def call(self, method: str, session: str | None = None, **params: object) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            self._note(answer)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self) -> dict:
        while b"\0" not in self.rest:
            more = self.back.read1(1 << 16)
            assert more, "Chromium has ended"
            self.rest += more
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def _note(self, message: dict) -> None:
        if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
            self.errors.append(message["params"])
        if message.get("method") == "Runtime.consoleAPICalled":
            self.errors.append(message["params"]["args"])

    def open(self, address: str, width: int = 1280, height: int = 900, dark: bool = False) -> str:
        """Open a page in the place of the one before; returns its session."""
        if self.session is None:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
            self.session = attached["sessionId"]
            for domain in ("Runtime", "Log", "Page"):
                self.call(f"{domain}.enable", self.session)
        session = self.session
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", session, features=[scheme])
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setDeviceMetricsOverride", session, **size)
        self.call("Page.navigate", session, url=address)
        return session

    def evaluate(self, session: str, expression: str) -> object:
        """The value of an expression of JavaScript; a promise is waited for."""
        result = self.call(
            "Runtime.evaluate",
            session,
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
            timeout=SECONDS * 1000,
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, session: str, condition: str) -> None:
        """Until the condition is true."""
        self.evaluate(
            session,
            "new Promise((done, failed) => { const began = Date.now(); const look = () => "
            f"({condition}) ? done(1) : Date.now() - began > {SECONDS * 1000} ? failed() : "
            "setTimeout(look, 10); look(); })",
        )


@contextmanager
def browser():
    there, to = os.pipe()
    back, here = os.pipe()
    # the browser reads descriptor 3 and writes 4
    start = f'exec 3<&{there} 4>&{here}; exec "$@"'
    flags = "--headless --no-sandbox --disable-gpu --remote-debugging-pipe --no-first-run".split()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = ["bash", "-c", start, "bash", CHROMIUM, *flags, f"--user-data-dir={profile}"]
        process = subprocess.Popen(
            command, pass_fds=(there, here), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        os.close(there)
        os.close(here)
        shown = Browser(to, back)
        try:
            yield shown
        finally:
            shown.call("Browser.close")
            os.close(to)
            shown.back.close()
            process.wait()


def address(folder: Path, settings: str = "") -> str:
    return f"{(folder / 'index.html').resolve().as_uri()}#{settings}"
