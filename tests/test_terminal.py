"""Names that a terminal can't show, and readers that leave."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from chexnet_deploy.terminal import progress

PROGRAM = """
import json, sys, typer
from chexnet_deploy.terminal import print_json, print_table, run_program
app = typer.Typer()

@app.command()
def lines(name: str) -> None:
    for _ in range(20_000):
        typer.echo(name)

@app.command()
def table(name: str) -> None:
    print_table([{"file": name}] * 5_000)

@app.command("json")
def as_json(name: str) -> None:
    print_json([{name: 1}] * 5_000)

@app.command()
def gate() -> None:
    from chexnet_deploy.errors import GateError
    raise GateError("as before")

run_program(app)
"""
NAMES = ("胸部.png", "é.png", "🫁.png", os.fsdecode(b"\xff.png"))
TERMINALS: tuple[Mapping[str, str], ...] = (
    {"PYTHONIOENCODING": "latin-1"},
    {"PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"PYTHONIOENCODING": "utf-8"},
)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", PROGRAM, *arguments]


@pytest.mark.parametrize("terminal", TERMINALS, ids=str)
@pytest.mark.parametrize("how", ["lines", "table", "json"])
def test_a_name_that_the_terminal_cannot_show_is_escaped(how: str, terminal: Mapping[str, str]) -> None:
    for name in NAMES[:: 3 if how == "table" else 1]:
        done = subprocess.run(command(how, name), capture_output=True, env={**os.environ, **terminal}, timeout=60)
        assert (done.returncode, done.stderr) == (0, b"")
        assert b".png" in done.stdout
        if how == "json":
            assert b".png" in json.dumps(json.loads(done.stdout)).encode()


@pytest.mark.parametrize("how", ["lines", "table", "json"])
def test_a_reader_that_leaves_ends_it_quietly(how: str, tmp_path: Path) -> None:
    with (tmp_path / "complaints").open("wb") as complaints:
        with subprocess.Popen(command(how, "a.png"), stdout=subprocess.PIPE, stderr=complaints) as process:
            assert process.stdout is not None
            process.stdout.readline()
            process.stdout.close()
        assert process.returncode in ((141,) if how == "lines" else (141, 0))  # 0: all was written at once
    assert (tmp_path / "complaints").read_bytes() == b""


def test_a_gate_still_fails_with_1() -> None:
    done = subprocess.run(command("gate"), capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, b"gate failed: as before\n")


def test_a_phase_that_nobody_watches_gets_a_line_when_it_begins_one_a_minute_and_one_at_its_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now_s = 0.0
    monkeypatch.setattr("chexnet_deploy.terminal.monotonic", lambda: now_s)
    with progress() as on_phase:
        for done in range(1000, 1151):  # gone on with: 150 of 1,150 are left, one a second
            on_phase("predict", done, 1150)
            now_s += 1.0
        on_phase("predict", 1150, 1150)
        on_phase("page", 1, 1)
    assert capsys.readouterr().err.splitlines() == [
        "predict: 1,000 of 1,150, 0:00:00 passed",
        "predict: 1,060 of 1,150, 0:01:00 passed, 0:01:30 left",
        "predict: 1,120 of 1,150, 0:02:00 passed, 0:00:30 left",
        "predict: 1,150 of 1,150, 0:02:30 passed",
        "page: 1 of 1, 0:00:00 passed",
    ]
