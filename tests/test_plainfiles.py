"""Files that somebody else laid out: what is refused, and that nothing waits."""

import os
import resource
from pathlib import Path
from typing import Any

import pytest

from chexnet_deploy import files as plainfiles
from chexnet_deploy.errors import BundleError
from chexnet_deploy.files import PlainFile, sha256_hex


def plain(path: Path, **options: Any) -> PlainFile:
    return PlainFile(**{"path": path, "limit_bytes": 10**7, "error": BundleError, "next_step": "Copy it.", **options})


@pytest.mark.parametrize("size", [0, 1, 2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20])
def test_bytes_and_hash(tmp_path: Path, size: int) -> None:
    content = bytes(i % 251 for i in range(size))
    (tmp_path / "file").write_bytes(content)
    assert plain(tmp_path / "file").read() == content
    assert plain(tmp_path / "file").sha256() == sha256_hex(content)


def test_limit_is_exact(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert plain(tmp_path / "file", limit_bytes=5).read() == b"12345"
    with pytest.raises(BundleError, match="has 5 bytes, more than the 4"):
        plain(tmp_path / "file", limit_bytes=4).read()


def test_a_hard_link_is_refused_and_then_not(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "other").hardlink_to(tmp_path / "file")
    with pytest.raises(BundleError, match="2 names"):
        plain(tmp_path / "file").read()
    assert plain(tmp_path / "file", follows_links=True).read() == b"x"
    (tmp_path / "other").unlink()
    assert plain(tmp_path / "file").read() == b"x"


def test_a_symlink_is_followed_only_where_asked(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(BundleError, match="not a plain file"):
        plain(tmp_path / "link").read()
    assert plain(tmp_path / "link", follows_links=True).read() == b"x"


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for follows in (False, True):
        with pytest.raises(BundleError, match="not a plain file"):
            plain(tmp_path / "pipe", follows_links=follows).read()


@pytest.mark.parametrize("path", [Path("/dev/zero"), Path("/dev/full")])
def test_a_device_is_refused(path: Path) -> None:
    with pytest.raises(BundleError, match="not a plain file"):
        plain(path).read()


@pytest.mark.parametrize("change", ["grows", "shrinks"])
def test_a_file_that_changes_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * (3 * 2**20))
    read = os.read

    def read_and_change(handle: int, size: int) -> bytes:
        chunk = read(handle, size)
        os.truncate(path, 4 * 2**20 if change == "grows" else 2**20)
        return chunk

    monkeypatch.setattr(plainfiles.os, "read", read_and_change)
    for method in (PlainFile.read, PlainFile.sha256):
        path.write_bytes(b"x" * (3 * 2**20))
        with pytest.raises(BundleError, match="changed while it was read"):
            method(plain(path))


def test_files_come_from_the_folder_that_was_opened(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(b"a")
    folder = os.open(tmp_path / "a", os.O_RDONLY | os.O_DIRECTORY)
    try:
        (tmp_path / "a").rename(tmp_path / "b")
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "file").write_bytes(b"evil")
        assert plain(tmp_path / "a" / "file", folder=folder).read() == b"a"
    finally:
        os.close(folder)


def test_no_handle_is_left_open(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
    try:
        for _ in range(300):
            plain(tmp_path / "file").read()
            with pytest.raises(BundleError):
                plain(tmp_path / "file", limit_bytes=0).read()
            with pytest.raises(BundleError):
                plain(tmp_path).read()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
