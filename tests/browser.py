"""Headless Chromium, driven over its own protocol (Chrome DevTools Protocol)."""

import base64
import itertools
import json
import subprocess
import urllib.request
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import websocket

_AXE_HOME = find_spec("axe_playwright_python")
AXE = Path(_AXE_HOME.origin if _AXE_HOME and _AXE_HOME.origin else ".").with_name("axe.min.js")
"""axe-core (Deque), a judge of pages; WCAG's rules as far as a program can check them."""
START_S = 300.0  # a machine may be busy; a service or browser that ends is seen at once


class Browser:
    """One page.

    Attributes:
        requests: URLs that the page asked for.
        complaints: what it wrote to the console as an error, and exceptions.
    """

    def __init__(self, program: str, profile: Path) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._numbers = itertools.count(1)
        self.process = subprocess.Popen(
            [
                program,
                "--headless=new",
                "--no-sandbox",  # as root, in a container; the page is our own
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--remote-debugging-port=0",
                "--remote-allow-origins=*",
                f"--user-data-dir={profile}",
                "--window-size=1200,1000",
                "about:blank",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        ports, end_s = profile / "DevToolsActivePort", monotonic() + START_S
        while not (ports.exists() and ports.read_text().count("\n")):
            assert self.process.poll() is None, "Chromium ended"
            assert monotonic() < end_s, "Chromium doesn't start"
            sleep(0.05)
        port = int(ports.read_text().splitlines()[0])
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=START_S) as response:
            pages = [page for page in json.load(response) if page["type"] == "page"]
        self._socket = websocket.create_connection(pages[0]["webSocketDebuggerUrl"], timeout=START_S)
        for room in ("Page", "Runtime", "Network", "Log", "DOM"):
            self.call(f"{room}.enable")

    def call(self, method: str, **parameters: object) -> dict[str, Any]:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        kind, found = message.get("method"), message.get("params", {})
        if kind == "Network.requestWillBeSent":
            self.requests.append(found["request"]["url"])
        elif kind == "Runtime.exceptionThrown" or (kind == "Log.entryAdded" and found["entry"]["level"] == "error"):
            self.complaints.append(json.dumps(found)[:500])

    def run(self, script: str) -> Any:
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script: str) -> None:
        end_s = monotonic() + START_S
        while not self.run(script):
            assert monotonic() < end_s, f"{script}: never true; the page says: {self.run('document.body.innerText')}"
            sleep(0.05)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def violations(self, widths_px: Sequence[int] = (1280, 400)) -> list[str]:
        """Return what of the page as it stands axe finds unusable by eye, keyboard or screen reader, on a desk and on a phone."""
        found = []
        self.run(f"{AXE.read_text()};0")
        for width_px in widths_px:
            size = {"width": width_px, "height": 800, "deviceScaleFactor": 1, "mobile": False}
            self.call("Emulation.setDeviceMetricsOverride", **size)
            found += self.run(
                "axe.run().then(r => r.violations.flatMap(v => v.nodes.map(n => `${v.id}: ${n.html.slice(0, 200)}`)))"
            )
        self.call("Emulation.clearDeviceMetricsOverride")
        return found

    def choose_files(self, selector: str, *paths: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(path) for path in paths], nodeId=node)

    def press(self, key: str) -> None:
        codes = {"Tab": 9, "Enter": 13}
        text = {"text": "\r"} if key == "Enter" else {}
        common: dict[str, object] = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))

    def close(self) -> None:
        self._socket.close()
        self.process.kill()
        self.process.wait()
