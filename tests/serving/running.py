"""A real service in a process of its own, and its port: what most of these tests talk to."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep

START_S = 300.0  # a machine may be busy; a service or browser that ends is seen at once


class Running:
    """One service.

    Attributes:
        port: on 127.0.0.1.
    """

    def __init__(self, arguments: list[str], log: Path) -> None:
        self._log = log
        command = [sys.executable, "-m", "chexnet_deploy", "serve", *arguments, "--port", "0"]
        with log.open("wb") as stream:
            self.process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
        self.port = int(self.wait_for_log(r"listening on http://127\.0\.0\.1:(\d+)"))

    def log(self) -> str:
        return self._log.read_text()

    def wait_for_log(self, pattern: str) -> str:
        end_s = monotonic() + START_S
        while monotonic() < end_s:
            found = re.search(pattern, self.log())
            if found:
                return found.group(found.lastindex or 0)
            if self.process.poll() is not None:
                break
            sleep(0.02)
        raise AssertionError(f"no {pattern!r} in the log:\n{self.log()}")

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        finally:
            connection.close()

    def json(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> dict:
        status, _, content = self.ask(method, path, body, headers)
        return {"status": status, **json.loads(content)}

    def metric(self, name: str) -> float:
        lines = self.ask("GET", "/metrics")[2].decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name) and line[len(name)] in " {")

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            os.kill(self.process.pid, number)
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()


Start = Callable[..., Running]
