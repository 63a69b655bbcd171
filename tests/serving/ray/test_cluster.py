"""A cluster's table is the one that this process would have made, whatever dies on the way."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.services.ray_executor import workers_of
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.errors import ClusterError
from chexnet_deploy.runtime.streaming import usable_cores
from chexnet_deploy.serving.ray.cluster import fit_workers
from tests.command_line import assert_one_line_error, chexnet

N_IMAGES = 900
BAD = ("00000001_555.png", "00000009_555.png")


@pytest.mark.parametrize(
    ("nodes", "workers", "needs_gpu", "fitted"),
    [
        ([(2, 0)], 2, False, (2, 1)),
        ([(2, 0)], None, False, (1, 2)),  # one a machine, with all its cores
        ([(64, 0), (64, 0), (16, 0)], None, False, (3, 32)),  # 96 cores at work; with 16 each it would be 48
        ([(64, 0), (64, 0)], 5, False, (5, 21)),  # three on one machine, two on the other
        ([(0, 0), (8, 0)], None, False, (1, 8)),  # a head that only asks
        ([(32, 4), (32, 4)], None, True, (8, 8)),
        ([(128, 0), (16, 2)], None, True, (2, 8)),  # cores without a GPU are no room
    ],
)
def test_workers_get_all_the_cores_that_leave_room_for_the_others(
    nodes: list[tuple[int, int]], workers: int | None, needs_gpu: bool, fitted: tuple[int, int]
) -> None:
    resources = [{"CPU": float(cores), "GPU": float(gpus)} for cores, gpus in nodes]
    assert fit_workers(resources, workers, needs_gpu=needs_gpu) == fitted


@pytest.mark.parametrize(
    ("nodes", "workers", "needs_gpu"),
    [([(2, 0)], 3, False), ([(64, 0)], None, True), ([(1, 4)], None, True), ([], None, False)],
)
def test_workers_that_do_not_fit_are_refused(
    nodes: list[tuple[int, int]], workers: int | None, needs_gpu: bool
) -> None:
    with pytest.raises(ClusterError, match="Ask for fewer, or add machines"):
        fit_workers([{"CPU": cores, "GPU": gpus} for cores, gpus in nodes], workers, needs_gpu=needs_gpu)


def test_options_that_a_cluster_can_not_have_are_refused(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    bundle, lone = str(bundles["fp32"].path), str(tmp_path / "a.png")
    assert_one_line_error(chexnet("predict", bundle, lone, "--executor", "ray", "--out", "t.csv"), 2, "several images")
    (tmp_path / "a.png").touch()
    (tmp_path / "b.png").touch()
    assert_one_line_error(chexnet("predict", bundle, str(tmp_path), "--executor", "ray"), 2, "Give --out")
    assert_one_line_error(chexnet("predict", bundle, lone, "--workers", "2"), 2, "--workers and --cluster are for")


@pytest.fixture(scope="module")
def folder(phantom_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Links to the phantoms, enough of them for a run of seconds, and two files that are no image."""
    folder = tmp_path_factory.mktemp("many")
    files = sorted((phantom_root / "images").iterdir())
    for number in range(N_IMAGES):
        (folder / f"{number:08d}_000.png").symlink_to(files[number % len(files)])
    for name in BAD:
        (folder / name).write_bytes(b"\x89PNG\r\n\x1a\nno more")
    return folder


@pytest.fixture(scope="module")
def local(bundles: dict[str, Bundle], folder: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The table that this machine makes without a cluster."""
    out = tmp_path_factory.mktemp("local") / "table.csv"
    done = chexnet("predict", str(bundles["fp32"].path), str(folder), "--out", str(out), "--provider", "auto")
    assert done.returncode == 3, done.stderr
    return out.read_bytes()


@pytest.fixture(autouse=True)
def _two_cores() -> None:
    if usable_cores() < 2:
        pytest.skip("NOT RUN with two workers: this machine has one core")


def begin(bundle: Bundle, folder: Path, out: Path) -> "subprocess.Popen[str]":
    words = ["predict", str(bundle.path), str(folder), "--out", str(out), "--executor", "ray", "--workers", "2"]
    return subprocess.Popen([sys.executable, "-m", "chexnet_deploy", *words], stderr=subprocess.PIPE, text=True)


def wait_for_rows(out: Path, process: "subprocess.Popen[str]") -> None:
    partial = out.with_name(f"{out.name}.partial")
    while not partial.exists() or partial.read_bytes().count(b"\n") < 2:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)


@pytest.mark.slow
def test_a_killed_worker_loses_no_row_and_makes_none_twice(
    bundles: dict[str, Bundle], folder: Path, local: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "table.csv"
    with begin(bundles["fp32"], folder, out) as process:
        wait_for_rows(out, process)
        workers = list(workers_of(process.pid))
        os.kill(workers[0], signal.SIGKILL)
        _, errors = process.communicate(timeout=500)
    assert len(workers) == 2
    assert process.returncode == 3, errors  # the two bad files
    assert out.read_bytes() == local


@pytest.mark.slow
def test_a_killed_run_is_gone_on_with_by_this_machine_alone(
    bundles: dict[str, Bundle], folder: Path, local: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "table.csv"
    with begin(bundles["fp32"], folder, out) as process:
        wait_for_rows(out, process)
        process.kill()
    assert not out.exists()
    assert (
        chexnet("predict", str(bundles["fp32"].path), str(folder), "--out", str(out), "--provider", "auto").returncode
        == 3
    )
    assert out.read_bytes() == local


# Which ray reads when it is imported, before the command line can make a key.
KEY = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
DEADLY = """
import os, signal, sys
from pathlib import Path
from chexnet_deploy.cli.main import app
from chexnet_deploy.terminal import run_program
from chexnet_deploy.serving.ray import cluster

class Deadly(cluster.Worker):
    def _open(self):
        os.kill(os.getpid(), signal.SIGKILL)

cluster.Worker = Deadly
run_program(app)
"""


def run_script(script: str, words: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *words]
    return subprocess.run(command, env={**os.environ, **KEY}, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_images_that_end_worker_after_worker_end_the_run(
    bundles: dict[str, Bundle], folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "table.csv"
    words = ["predict", str(bundles["fp32"].path), str(folder), "--out", str(out), "--executor", "ray"]
    done = run_script(DEADLY, words)
    assert done.returncode == 2, done.stderr
    # Ray may begin with any of the blocks that are ready.
    assert re.search(r"3 workers ended while they carried images \d+ to \d+ of the list", done.stderr), done.stderr


@pytest.mark.slow
def test_what_a_worker_refuses_reaches_the_user(bundles: dict[str, Bundle], folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "bundle"
    shutil.copytree(bundles["fp32"].path, place)
    # Another bundle on the worker's disk than the one that was asked for.
    script = DEADLY.replace(
        "os.kill(os.getpid(), signal.SIGKILL)",
        f"import shutil; shutil.rmtree({str(place)!r}); shutil.copytree({str(bundles['int8'].path)!r}, {str(place)!r})\n"
        "        return super()._open()",
    )
    words = ["predict", str(place), str(folder), "--out", str(tmp_path / "table.csv"), "--executor", "ray"]
    done = run_script(script, words)
    assert done.returncode == 2, done.stderr
    assert "is another bundle on a machine of the cluster" in done.stderr
