"""Windows and macOS, as far as Linux can play them: what Python lacks there is taken away before anything is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.rigs.synthetic_dicom import make_dicom
from chexnet_deploy import Predictor
from chexnet_deploy.bundle.bundle import Bundle

LINUX_ALONE = "os.memfd_create os.sched_getaffinity os.O_PATH os.MFD_CLOEXEC os.MFD_ALLOW_SEALING socket.SOCK_SEQPACKET"
POSIX = f"""
{LINUX_ALONE}
os.fork os.forkpty os.register_at_fork os.geteuid os.getuid os.getegid os.getgid os.getpgid os.setsid os.killpg os.chown os.fchown
os.mkfifo os.statvfs os.pread os.pwrite os.getloadavg os.sysconf os.wait os.wait3 os.O_DIRECTORY os.O_NOFOLLOW
os.O_NONBLOCK os.O_CLOEXEC
socket.AF_UNIX socket.send_fds socket.recv_fds time.clock_gettime
signal.SIGKILL signal.SIGHUP signal.SIGUSR1 signal.SIGUSR2 signal.SIGALRM signal.SIGCHLD signal.SIGPIPE signal.SIGXFSZ
signal.setitimer signal.pthread_sigmask signal.sigwait
"""
SYSTEMS = {
    "Windows": (POSIX, "fcntl resource pwd grp termios tty pty syslog readline"),
    "Darwin": (LINUX_ALONE, "spwd ossaudiodev"),
}
TAKEN_AWAY = """
import os, platform, signal, socket, subprocess, sys, time, asyncio, multiprocessing, onnxruntime  # they have other ways there
name, attributes, modules = sys.argv.pop(1), sys.argv.pop(1).split(), sys.argv.pop(1).split()
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in modules:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
for module in modules:
    sys.modules.pop(module, None)
for attribute in attributes:
    module, _, attribute = attribute.partition(".")
    delattr(sys.modules[module], attribute)
if "os.fork" in (f"os.{a.partition('.')[2]}" for a in attributes):  # Windows opens no directory and lists none by number
    opened, listed = os.open, os.scandir
    def open_file(path, flags, mode=0o777, *, dir_fd=None):
        if dir_fd is not None:
            raise NotImplementedError("dir_fd unavailable on this platform")
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", path)
        return opened(path, flags, mode)
    def scandir(path="."):
        if isinstance(path, int):
            raise TypeError("scandir: path should be string, bytes, os.PathLike or None, not int")
        return listed(path)
    os.open, os.scandir = open_file, scandir
platform.system = lambda: name
"""
PREDICT = (
    TAKEN_AWAY
    + """
import json
from chexnet_deploy import ImageError, Predictor
answers = []
with Predictor.open(sys.argv[1], provider="cpu") as predictor:
    for file in sys.argv[2:]:
        try:
            answers.append(predictor.predict(file).probabilities)
        except ImageError as err:
            answers.append([err.reason.value, str(err)])
    stream = [getattr(each.answer, "probabilities", None) for each in predictor.predict_stream(sys.argv[2:])]
print(json.dumps([answers, stream]))
"""
)
COMMAND = TAKEN_AWAY + "from chexnet_deploy.cli.main import main\nsys.argv[0] = 'chexnet-deploy'\nmain()"


def run_on(system: str, program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, system, *SYSTEMS[system], *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "200", "ORT_DISABLE_TELEMETRY": "1"},
    )


@pytest.fixture(scope="module")
def radiographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One picture as PNG, as JPEG, as DICOM without compression and as JPEG 2000."""
    folder = tmp_path_factory.mktemp("radiographs")
    gray = np.arange(64 * 64, dtype=np.uint32).reshape(64, 64).astype(np.uint8)
    Image.fromarray(gray).save(folder / "a.png")
    Image.fromarray(gray).save(folder / "a.jpg")
    (folder / "a.dcm").write_bytes(make_dicom(gray))
    (folder / "b.dcm").write_bytes(make_dicom(gray, syntax="1.2.840.10008.1.2.4.90"))
    return [folder / name for name in ("a.png", "a.jpg", "a.dcm", "b.dcm")]


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_predictor_answers_as_on_linux(
    system: str, bundles: dict[str, Bundle], radiographs: list[Path], tmp_path: Path
) -> None:
    done = run_on(system, PREDICT, bundles["int8"].path, *radiographs)
    assert done.returncode == 0, done.stderr
    answers, stream = json.loads(done.stdout)
    with Predictor.open(bundles["int8"].path, provider="cpu") as predictor:
        here = [predictor.predict(path).probabilities for path in radiographs]
    assert answers[:3] == stream[:3] == here[:3]
    assert stream[3] is None
    reason, message = answers[3]
    assert reason == "transfer-syntax"
    assert "found compressed pixel data; needed uncompressed ones, or Linux" in message
    assert message.endswith("Next: export it uncompressed.")


@pytest.mark.parametrize("system", SYSTEMS)
def test_commands_run_or_say_that_they_need_linux(
    system: str, bundles: dict[str, Bundle], radiographs: list[Path], tmp_path: Path
) -> None:
    bundle, table = bundles["fp32"].path, tmp_path / "findings.csv"
    refused: dict[tuple[Any, ...], str] = {
        ("serve", bundle): "serve",
        ("node", tmp_path / "node.toml"): "the DICOM node",
        ("node", "status", tmp_path / "node.toml"): "the DICOM node",
    }
    runs: dict[tuple[Any, ...], int] = {
        ("inspect", bundle): 0,
        ("doctor",): 0,
        ("keygen", tmp_path / "key.pem"): 0,
        ("sign", tmp_path / "none", "--key", tmp_path / "key.pem"): 2,
        ("predict", bundle, *radiographs[:3], "--provider", "cpu"): 0,
        ("predict", bundle, radiographs[2], "--provider", "cpu", "--dicom-out", tmp_path / "results"): 0,
    }
    with_table = ("predict", bundle, *radiographs, "--out", table, "--provider", "cpu")
    if system == "Windows":
        refused[with_table] = "a table that is gone on with"
    else:
        runs[with_table] = 3  # the compressed one is quarantined
    for words, what in refused.items():
        done = run_on(system, COMMAND, *words)
        said = f"error: {what} needs Linux, and this is {system}. Run it on Linux, in WSL 2 or in a container."
        assert (done.returncode, done.stderr.strip().splitlines()[-1]) == (2, said), done.stderr
    for words, code in runs.items():
        done = run_on(system, COMMAND, *words)
        assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert table.exists() == (system == "Darwin")
    assert not list(tmp_path.glob("*.partial*"))


@pytest.mark.parametrize("system", SYSTEMS)
def test_bundles_and_floors_are_written(system: str, bundles: dict[str, Bundle], tmp_path: Path) -> None:
    program = f"""{TAKEN_AWAY}
from pathlib import Path
from chexnet_deploy import Bundle
from chexnet_deploy.bundle.signing.releases import Release, raise_floor, read_floor, start_floor
source, out, floor = Bundle.open(Path(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3])
copy = Bundle.write(out, source.manifest, source.read_model(), (source.path / "probe.npz").read_bytes())
start_floor(floor, Release(line="a", number=1))
raise_floor(floor, Release(line="a", number=2))
print(copy.id == source.id, read_floor(floor).number)
"""
    done = run_on(system, program, bundles["int8"].path, tmp_path / "out", tmp_path / "floor.json")
    assert done.stdout == "True 2\n", done.stderr
    assert not list(tmp_path.glob(".*.partial-*"))


@pytest.mark.slow
def test_only_what_needs_linux_imports_nowhere_else() -> None:
    program = f"""{TAKEN_AWAY}
import importlib, pkgutil, torch, chexnet_deploy
for module in pkgutil.walk_packages(chexnet_deploy.__path__, "chexnet_deploy."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except Exception:
            print(module.name)
"""
    done = run_on("Windows", program.replace("asyncio,", "asyncio, torch,", 1))
    assert done.returncode == 0, done.stderr
    allowed = ("dicom.node.", "images.dicom.child", "serving.http.program", "serving.ray.")
    assert [name for name in done.stdout.split() if not name.removeprefix("chexnet_deploy.").startswith(allowed)] == []
