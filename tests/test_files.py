import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.manifest import PROBE
from chexnet_deploy.errors import BundleError
from chexnet_deploy.files import PlainFile, new_directory, sha256_hex, write_directory, write_file
from tests.tiny import tiny_manifest

CHECKOUT = Path(__file__).parents[1]
FILES = {"model.onnx": b"m" * 300_000, PROBE: b"p" * 1000}

HANG_INSIDE = """
import sys, time
from pathlib import Path
from chexnet_deploy.files import new_directory
with new_directory(Path(sys.argv[1])) as partial:
    (partial / "half").write_bytes(b"x" * 1000)
    print("ready", flush=True)
    time.sleep(60)
"""

WRITE_BUNDLE_WITH_A_FILE_LIMIT = """
import resource, signal, sys
from pathlib import Path
from chexnet_deploy.bundle import Bundle
from chexnet_deploy.bundle.manifest import Manifest
from chexnet_deploy.errors import BundleError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
manifest = Manifest.model_validate_json(sys.argv[2], strict=True)
try:
    Bundle.write(Path(sys.argv[1]), manifest, b"m" * 300_000, b"p" * 1000)
except BundleError as err:
    print(err)
"""


def write_tiny(path: Path) -> Bundle:
    return Bundle.write(path, tiny_manifest(FILES), FILES["model.onnx"], FILES[PROBE])


@contextmanager
def live_writer(path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HANG_INSIDE, str(path)]
    with subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_sha256_of_known_answers() -> None:
    # FIPS 180-4 examples: the empty message and "abc".
    assert sha256_hex(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert sha256_hex(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_write_directory_writes_all_files(tmp_path: Path) -> None:
    write_directory(tmp_path / "a" / "b", FILES)
    assert {entry.name: entry.read_bytes() for entry in (tmp_path / "a" / "b").iterdir()} == FILES
    assert names(tmp_path / "a") == ["b"]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_error_inside_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def write_half() -> None:
        with new_directory(tmp_path / "new") as partial:
            (partial / "half").write_bytes(b"x")
            (partial / "sub").mkdir()
            assert names(tmp_path) == [partial.name]
            raise error

    with pytest.raises(error):
        write_half()
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["directory", "empty directory", "file"])
def test_something_there_is_not_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "there"
    if kind == "file":
        path.write_text("mine")
    else:
        path.mkdir()
        if kind == "directory":
            (path / "mine").touch()
    with pytest.raises(FileExistsError):
        write_directory(path, FILES)
    with pytest.raises(FileExistsError), new_directory(path) as partial:
        (partial / "x").touch()
    assert names(tmp_path) == ["there"]
    assert path.is_file() or names(path) == (["mine"] if kind == "directory" else [])


def test_file_size_limit_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITE_BUNDLE_WITH_A_FILE_LIMIT, str(tmp_path / "new")]
    command.append(tiny_manifest(FILES).model_dump_json())
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=True)
    assert str(tmp_path / "new") in done.stdout
    assert "It needs" in done.stdout
    assert "MiB" in done.stdout
    assert names(tmp_path) == []


@pytest.mark.parametrize("where", ["write", "sync"])
def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(*{"write": (Path, "write_bytes"), "sync": (os, "fsync")}[where], full)
        with pytest.raises(BundleError, match=r"new could not be written: No space left.*It needs \d+ MiB"):
            write_tiny(tmp_path / "new")
    assert names(tmp_path) == []
    write_tiny(tmp_path / "new")
    assert names(tmp_path) == ["new"]


def test_parent_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BundleError):
        write_tiny(tmp_path / "file" / "new")
    assert (tmp_path / "file").read_text() == "mine"


def test_sigkill_leaves_no_target_and_the_next_write_cleans_up(tmp_path: Path) -> None:
    path = tmp_path / "new"
    with live_writer(path) as process:
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
    (abandoned,) = names(tmp_path)
    assert abandoned.startswith(".new.partial-")
    write_tiny(path)
    assert names(tmp_path) == ["new"]


def test_live_writer_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "new"
    with live_writer(path):
        (partial,) = names(tmp_path)
        write_tiny(path)
        assert names(tmp_path) == [partial, "new"]
        assert (tmp_path / partial / "half").read_bytes() == b"x" * 1000


def test_partial_of_another_target_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".other.partial-abc").mkdir()
    write_directory(tmp_path / "new", FILES)
    assert names(tmp_path) == [".other.partial-abc", "new"]


def test_second_of_two_writers_is_refused(tmp_path: Path) -> None:
    def overtake() -> None:
        with new_directory(tmp_path / "new") as slow:
            (slow / "slow").touch()
            write_directory(tmp_path / "new", {"fast": b""})

    with pytest.raises(FileExistsError):
        overtake()
    assert names(tmp_path) == ["new"]
    assert names(tmp_path / "new") == ["fast"]


def test_write_file_replaces(tmp_path: Path) -> None:
    for content in (b"one", b"two"):
        write_file(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == content
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("failing", [(os, "fsync"), (Path, "replace"), (Path, "chmod")])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_write_file_keeps_old_content_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: tuple[object, str], error: BaseException
) -> None:
    def fail(*_args: object) -> None:
        raise error

    write_file(tmp_path / "file", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(*failing, fail)
        with pytest.raises(type(error)):
            write_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


# --- Files that somebody else laid out: what is refused, and that nothing waits -----------------------------------------


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

    monkeypatch.setattr(os, "read", read_and_change)
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
