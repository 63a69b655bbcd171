"""Names that a terminal can't show, and readers that leave."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

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
