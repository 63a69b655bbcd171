"""What the command line says of itself: its version, an example of each command, and completions."""

import shlex
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import typer.main

from chexnet_deploy import __version__
from chexnet_deploy.cli.main import app
from tests.command_line import chexnet

PROGRAM = typer.main.get_command(app)


def names(command: Any = PROGRAM, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words that call each command and each group of commands."""
    yield before
    for name, child in getattr(command, "commands", {}).items():
        yield from names(child, (*before, name))


def find(words: tuple[str, ...]) -> Any:
    command: Any = PROGRAM
    for word in words:
        command = command.commands[word]
    return command


@pytest.mark.parametrize("words", [*names()], ids=" ".join)
def test_help_ends_with_an_example_that_a_terminal_shows_whole_and_the_command_takes(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    last = chexnet(*words, "--help").stdout.strip().splitlines()[-1].strip()
    assert last.startswith("Example: chexnet-deploy ")
    called = {each: Mock() for each in names() if each and not hasattr(find(each), "commands")}
    for each, instead in called.items():
        monkeypatch.setattr(find(each), "callback", instead)
    PROGRAM.main(shlex.split(last)[2:], standalone_mode=False)
    ran = [each for each, instead in called.items() if instead.called]
    assert len(ran) == 1
    assert ran[0] == words or hasattr(find(words), "commands")  # a group shows one of its commands


def test_training_shows_an_example_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from training.__main__ import app as training

    monkeypatch.setenv("COLUMNS", "80")
    program: Any = typer.main.get_command(training)
    program.main(["--help"], standalone_mode=False)
    last = capsys.readouterr().out.strip().splitlines()[-1].strip()
    monkeypatch.setattr(program, "callback", ran := Mock())
    program.main(shlex.split(last.removeprefix("Example: python -m training ")), standalone_mode=False)
    assert str(ran.call_args.kwargs["out"]) == "runs/first"


def test_the_version() -> None:
    assert chexnet("--version").stdout == f"chexnet-deploy {__version__}\n"


def test_a_shell_completes_commands_and_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_CHEXNET_DEPLOY_COMPLETE", "complete_bash")
    for typed, expected in (("chexnet-deploy cal", "calibrate"), ("chexnet-deploy bench --eng", "--engine")):
        monkeypatch.setenv("COMP_WORDS", typed)
        monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
        with pytest.raises(SystemExit):
            PROGRAM.main([], prog_name="chexnet-deploy")
        assert capsys.readouterr().out.split() == [expected]
