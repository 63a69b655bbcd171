import errno
import itertools
import json
import os
import random
from pathlib import Path

import pytest

from chexnet_deploy.dicom.node.audit import HEAD_SUFFIX, START_HASH, AuditLog, find, read_head, verify
from chexnet_deploy.errors import AuditError

EVENTS = ("started", "received", "answered", "refused", "delivered", "stopped")


def write_log(path: Path, n_lines: int) -> str:
    log = AuditLog.open(path)
    for i in range(n_lines):
        log.append(EVENTS[i % len(EVENTS)], {"instance": f"{i:032x}", "documents": i % 3})
    log.close()
    return log.head.hash


def head_of(path: Path) -> str:
    return read_head(path.with_name(path.name + HEAD_SUFFIX)).hash


def test_a_log_that_was_only_appended_to_verifies(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    assert verify_empty(path) == START_HASH
    head = write_log(path, 20)
    assert verify(path) == verify(path, head)
    assert head == head_of(path)
    again = write_log(path, 5)
    assert verify(path, again).seq == 25
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["seq"] for line in lines] == list(range(1, 26))
    assert lines[0]["previous"] == START_HASH
    assert all(b["previous"] == a["hash"] for a, b in itertools.pairwise(lines))
    assert path.stat().st_mode & 0o777 == 0o600


def verify_empty(path: Path) -> str:
    AuditLog.open(path).close()
    return verify(path).hash


def mutate(lines: list[bytes], chance: random.Random) -> bytes:
    """Return a log with one change: of a byte, of lines, of their order, or its end cut off."""
    lines = list(lines)
    i, j = sorted(chance.sample(range(len(lines)), 2))
    kind = chance.randrange(7)
    if kind == 0:
        place = chance.randrange(len(lines[i]))
        lines[i] = lines[i][:place] + bytes([lines[i][place] ^ chance.randrange(1, 256)]) + lines[i][place + 1 :]
    elif kind == 1:
        del lines[i : i + chance.randint(1, 3)]
    elif kind == 2:
        lines[i], lines[j] = lines[j], lines[i]
    elif kind == 3:
        lines.insert(j, lines[i])
    elif kind == 4:
        del lines[-chance.randint(1, len(lines)) :]
    elif kind == 5:
        whole = b"".join(lines)
        return whole[: chance.randrange(len(whole))]
    else:
        lines[i] = lines[i].replace(b'"documents":', b'"documents": ', 1)  # the same meaning, other bytes
    return b"".join(lines)


def test_1000_of_1000_mutations_are_detected(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    head = write_log(path, 30)
    whole, chance, detected = path.read_bytes(), random.Random(0), 0
    lines = whole.splitlines(keepends=True)
    for _ in range(1000):
        changed = mutate(lines, chance)
        assert changed != whole
        path.write_bytes(changed)
        with pytest.raises(AuditError):
            verify(path, head)
        detected += 1
    assert detected == 1000
    path.write_bytes(whole)
    assert verify(path, head).seq == 30


def test_lines_cut_from_the_end_show_only_against_the_head(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    head = write_log(path, 10)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]))
    assert verify(path).seq == 8
    with pytest.raises(AuditError, match="ends with line 8"):
        verify(path, head)
    with pytest.raises(AuditError, match="ends with line 8"):
        AuditLog.open(path)  # against its own head file


def test_a_log_written_anew_shows_only_against_the_head(tmp_path: Path) -> None:
    head = write_log(tmp_path / "audit.jsonl", 10)
    write_log(tmp_path / "forged.jsonl", 10)
    assert verify(tmp_path / "forged.jsonl").seq == 10
    with pytest.raises(AuditError):
        verify(tmp_path / "forged.jsonl", head)


@pytest.mark.parametrize("lines_ahead", [1, 2])
def test_a_kill_between_line_and_head_is_one_line_ahead(tmp_path: Path, lines_ahead: int) -> None:
    path = tmp_path / "audit.jsonl"
    write_log(path, 10)
    head_path = path.with_name(path.name + HEAD_SUFFIX)
    old = head_path.read_bytes()
    write_log(path, lines_ahead)
    head_path.write_bytes(old)
    if lines_ahead == 1:
        AuditLog.open(path).close()
        assert read_head(head_path).seq == 11
    else:
        with pytest.raises(AuditError):
            AuditLog.open(path)


def test_a_torn_line_is_cut_off_and_recorded(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    write_log(path, 3)
    with path.open("ab") as file:
        file.write(b'{"seq":4,"utc":"20')
    log = AuditLog.open(path)
    log.close()
    assert verify(path, log.head.hash).seq == 4
    assert json.loads(path.read_text().splitlines()[-1])["event"] == "torn-line"


def test_half_written_heads_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    write_log(path, 3)
    (tmp_path / ".audit.jsonl.head.partial-abc").touch()
    AuditLog.open(path).close()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["audit.jsonl", "audit.jsonl.head"]


def test_missing_head_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    write_log(path, 3)
    path.with_name(path.name + HEAD_SUFFIX).unlink()
    with pytest.raises(AuditError, match="missing"):
        AuditLog.open(path)


def test_full_disk_refuses_and_leaves_the_chain_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "audit.jsonl"
    write_log(path, 3)
    log = AuditLog.open(path)
    real = os.write

    def half(handle: int, content: bytes) -> int:
        return real(handle, content[: len(content) // 2])

    def full(handle: int, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for broken in (half, full):
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", broken)
            with pytest.raises(AuditError, match="make room"):
                log.append("answered")
        assert not log.is_writable
        assert verify(path).seq == 3
    head_path = path.with_name(path.name + HEAD_SUFFIX)
    head_path.unlink()
    head_path.mkdir()
    for _ in range(3):
        with pytest.raises(AuditError):
            log.append("answered")
    assert verify(path).seq == 3  # no line runs ahead of its head
    head_path.rmdir()
    log.append("answered")
    assert log.is_writable
    assert verify(path, log.head.hash).seq == 4
    log.close()


def test_log_counts_as_writable_while_a_line_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # An image that comes in at that moment must not be refused.
    log = AuditLog.open(tmp_path / "audit.jsonl")
    seen, real = [], os.fsync

    def look(handle: int) -> None:
        seen.append(log.is_writable)
        real(handle)

    monkeypatch.setattr(os, "fsync", look)
    log.append("answered")
    log.close()
    assert seen
    assert all(seen)


@pytest.mark.parametrize(("instance", "numbers"), [("aa", [2, 5]), ("bb", [3]), ("cc", []), ("started", [])])
def test_the_lines_about_one_image_are_found(tmp_path: Path, instance: str, numbers: list[int]) -> None:
    log = AuditLog.open(tmp_path / "audit.jsonl")
    log.append("started")
    for event, about in (("received", "aa"), ("received", "bb"), ("started", ""), ("answered", "aa")):
        log.append(event, {"instance": about, "reason": "cc"})
    log.close()
    assert [line["seq"] for line in find(tmp_path / "audit.jsonl", instance)] == numbers
    path = tmp_path / "audit.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"aa"', b'"dd"'))
    with pytest.raises(AuditError, match="changed"):
        find(path, instance)


def test_log_and_head_are_their_owner_s_alone(tmp_path: Path) -> None:
    log = AuditLog.open(tmp_path / "audit.jsonl")
    for _ in range(3):
        assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
            "audit.jsonl": 0o600,
            "audit.jsonl.head": 0o600,
        }
        log.append("received")
