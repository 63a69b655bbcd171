import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.manifest import PROBE, Manifest, Precision, hash_files
from chexnet_deploy.errors import BundleError
from chexnet_deploy.files import new_directory, sha256_hex, write_directory, write_file
from chexnet_deploy.images.preprocessing import Preprocessing

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


def tiny_manifest() -> Manifest:
    return Manifest(
        precision=Precision.FP32,
        findings=("Mass",),
        preprocessing=Preprocessing(),
        head_bias=(0.0,),
        operating_points={},
        files=hash_files(FILES),
        checkpoint_sha256="0" * 64,
        probe_max_abs_logit_error=0.0,
        tools={},
    )


def write_tiny(path: Path) -> Bundle:
    return Bundle.write(path, tiny_manifest(), FILES["model.onnx"], FILES[PROBE])


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
    command.append(tiny_manifest().model_dump_json())
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
