"""The GPU benchmark itself, tried on a CPU: rows that fail cost their row, and every speed has a parity beside it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import why_invalid
from chexnet_deploy.bundle import Bundle

CHECKOUT = Path(__file__).parents[1]
STATE = {"clocks.sm": "1980 MHz", "clocks_event_reasons.active": "0x0000000000000000"}


def gpu_benchmark(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *map(str, arguments)]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_dry_run(bundles: dict[str, Bundle], checkpoint_path: Path, phantom_root: Path, tmp_path: Path) -> None:
    folder, out = bundles["fp32"].path.parent, tmp_path / "gpu.json"
    common = ("--data", phantom_root, "--images", 40, "--out", out, "--dry-run")
    done = gpu_benchmark(folder, checkpoint_path, *common)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    names = [f"onnxruntime-{name}-first" for name in ("fp16", "fp32", "int8")]
    assert list(rows) == [*names, "torch-eager-fp32"]
    for row in rows.values():
        assert list(row["batches"]) == ["1", "2"]
        assert row["batches"]["1"]["after_idle_ms"] > 0
        assert row["parity"]["max_abs_probability_difference"] < 0.15
    assert rows["torch-eager-fp32"]["parity"]["max_abs_probability_difference"] < 1e-4


def test_a_row_that_fails_costs_its_row_alone(bundles: dict[str, Bundle], phantom_root: Path, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    common = ("--data", phantom_root, "--images", 20, "--out", out, "--dry-run", "--row-deadline-s", 0.2)
    done = gpu_benchmark(bundles["fp32"].path.parent, tmp_path / "no.safetensors", *common)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 4
    assert all("stopped after" in row["error"] for row in rows.values())


@pytest.mark.skipif(Path("/proc/driver/nvidia/gpus").is_dir(), reason="there is a GPU here")
def test_without_a_gpu_one_line_says_so(bundles: dict[str, Bundle], checkpoint_path: Path, phantom_root: Path) -> None:
    done = gpu_benchmark(bundles["fp32"].path.parent, checkpoint_path, "--data", phantom_root)
    assert done.returncode == 2
    assert "no NVIDIA GPU" in done.stderr


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, None),
        ({"clocks_event_reasons.active": "0x0000000000000001"}, None),  # idle
        ({"clocks_event_reasons.active": "0x0000000000000020"}, "0x20"),  # software thermal slowdown
        ({"clocks.sm": "1700 MHz"}, "1980 to 1700"),
    ],
)
def test_timings_of_a_throttled_gpu_are_invalid(change: dict[str, str], found: str | None) -> None:
    why = why_invalid(STATE, {**STATE, **change})
    assert why is None if found is None else found in str(why)
