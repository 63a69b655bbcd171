"""Questions to a running node."""

import socket
from pathlib import Path

import pytest

from chexnet_deploy.dicom.node.control import CONTROL, Control, ask
from chexnet_deploy.errors import NodeError


def fail(about: str) -> dict[str, str]:
    raise ValueError(f"{about} must not be repeated")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / ("a-folder-whose-name-is-too-long-for-a-socket" * 4)
    folder.mkdir(mode=0o700)
    Control(folder, {"echo": lambda about: {"about": about}, "fail": fail}).start()
    return folder


@pytest.mark.parametrize("about", ["", "1.2.3", "x" * 100_000, "\n\u00fc"])
def test_a_question_is_answered(folder: Path, about: str) -> None:
    for _ in range(3):
        assert ask(folder, "echo", about) == {"about": about}


@pytest.mark.parametrize("question", ["fail", "unknown", ""])
def test_a_question_that_cannot_be_answered_ends_nothing(folder: Path, question: str) -> None:
    with pytest.raises(NodeError, match="can't answer now") as caught:
        ask(folder, question, "CANARY")
    assert "CANARY" not in str(caught.value)
    assert ask(folder, "echo", "x") == {"about": "x"}


@pytest.mark.parametrize("sent", [b"", b"nonsense\n", b"[]\n", b'{"ask": "echo"}\n'])
def test_nonsense_ends_nothing(folder: Path, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with socket.socket(socket.AF_UNIX) as channel:
        channel.connect(CONTROL)
        channel.sendall(sent)
        channel.shutdown(socket.SHUT_WR)
        assert b"failed" in channel.recv(1000)
    assert ask(folder, "echo", "x") == {"about": "x"}


def test_what_a_killed_node_left_is_replaced_and_nobody_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(NodeError, match="no running node"):
        ask(tmp_path, "echo")
    with pytest.raises(NodeError, match="no running node"):
        ask(tmp_path / "absent", "echo")
    (tmp_path / CONTROL).touch()
    with pytest.raises(NodeError, match="no running node"):
        ask(tmp_path, "echo")
    Control(tmp_path, {"echo": lambda about: {}}).start()
    assert ask(tmp_path, "echo") == {}
