"""The GPU benchmark itself, tried on a CPU: rows that fail cost their row, and every speed has a parity beside it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.gpu import summarise
from benchmarks.gpu_meter import Reading
from benchmarks.roofline import ConvCost, Rates, conv_costs, least_ms
from chexnet_deploy.bundle import Bundle
from chexnet_deploy.export.model import CheXNet

CHECKOUT = Path(__file__).parents[1]


def gpu_benchmark(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *map(str, arguments)]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_dry_run(bundles: dict[str, Bundle], checkpoint_path: Path, phantom_root: Path, tmp_path: Path) -> None:
    folder, out = bundles["fp32"].path.parent, tmp_path / "gpu.json"
    np.save(tmp_path / "more.npy", bundles["fp32"].read_probe().pixels[:4])
    more = ("--more-pixels", tmp_path / "more.npy")
    common = ("--data", phantom_root, "--images", 40, "--out", out, "--dry-run", *more)
    done = gpu_benchmark(folder, checkpoint_path, *common)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    names = [f"onnxruntime-cpu-{name}" for name in ("fp16", "fp32", "int8")]
    assert list(rows) == [*names, "torch-eager-fp32", "roofline"]
    assert rows.pop("roofline")["gmacs_per_image"] == pytest.approx(0.0531, rel=1e-2)  # 2.60 at 224 px, less at 32
    for row in rows.values():
        assert list(row["batches"]) == ["1", "2"]
        assert row["batches"]["1"]["after_idle_ms"]["plain"] > 0
        assert row["batches"]["2"]["sustained"]["images_per_s"] > 0
        assert row["parity"]["max_abs_probability_difference"] < 0.15
        assert row["parity"]["more_images"]["max_abs_probability_difference"] < 0.15
    assert rows["torch-eager-fp32"]["parity"]["max_abs_probability_difference"] < 1e-4


def test_a_row_that_fails_costs_its_row_alone(bundles: dict[str, Bundle], phantom_root: Path, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    common = ("--data", phantom_root, "--images", 20, "--out", out, "--dry-run", "--row-deadline-s", 0.2)
    done = gpu_benchmark(bundles["fp32"].path.parent, tmp_path / "no.safetensors", *common)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 5
    assert all("stopped after" in row["error"] for row in rows.values())
    assert "<h1>chexnet-deploy on a CPU (dry run)</h1>" in out.with_suffix(".html").read_text()


@pytest.mark.skipif(Path("/proc/driver/nvidia/gpus").is_dir(), reason="there is a GPU here")
def test_without_a_gpu_one_line_says_so(bundles: dict[str, Bundle], checkpoint_path: Path, phantom_root: Path) -> None:
    done = gpu_benchmark(bundles["fp32"].path.parent, checkpoint_path, "--data", phantom_root)
    assert done.returncode == 2
    assert "no NVIDIA GPU" in done.stderr


@pytest.mark.parametrize(
    ("sm_mhz", "reasons", "found"),
    [
        ((1980, 1980), 0x0, None),
        ((1900, 1980), 0x1, None),  # idle, and 4 %
        ((1980, 1980), 0x20, "0x20"),  # software thermal slowdown
        ((1700, 1980), 0x0, "between 1700 and 1980"),
    ],
)
def test_timings_of_a_throttled_gpu_are_invalid(sm_mhz: tuple[int, int], reasons: int, found: str | None) -> None:
    why = Reading(sm_mhz, reasons, energy_j=1.0, memory_mib=1.0).why_invalid
    assert why is None if found is None else found in str(why)


def test_densenet_121_costs_what_it_is_known_to_cost() -> None:
    costs = conv_costs(CheXNet(14).eval(), torch.zeros(1, 3, 224, 224))
    assert len(costs) == 120  # and the head
    assert sum(cost.macs for cost in costs) == pytest.approx(
        2.83e9 - 3 * 0.75 * 102_760_448, rel=2e-3
    )  # transitions pool before they convolve
    # The first by hand: 7 x 7 x 3 for each of 64 x 112 x 112 outputs.
    assert costs[0] == ConvCost(147 * 64 * 112 * 112, 3 * 224 * 224, 147 * 64, 64 * 112 * 112)


def test_the_roofline_by_hand() -> None:
    cost = ConvCost(macs=1000, inputs=30, weights=40, outputs=20)
    # Memory: (2 x 50 + 40) x 2 bytes at 1000/s = 0.28 s. Arithmetic: 2 x 2 x 1000 at 100000/s = 0.04 s.
    assert least_ms([cost], 2, Rates(1000.0, 100_000.0, 2)) == pytest.approx(280.0)
    assert least_ms([cost, cost], 2, Rates(1e9, 100_000.0, 2)) == pytest.approx(80.0)


def test_rows_are_held_against_each_other() -> None:
    def offline(variant: str, speed: float) -> dict[str, object]:
        return {"batches": {"128": {variant: {"images_per_s": speed}}}}

    rows = {
        "tensorrt-fp16-offline": offline("graphs", 12_000.0),
        "torch-compile-fp16": offline("plain", 8_000.0),
        "roofline": {"bound": {"fp16": {"least_ms": {"128": 4.0}}}},
        "tensorrt-fp16-single": {
            "batches": {"1": {"graphs": {"p50_ms": 0.5}, "plain": {"p50_ms": 0.75}, "bare": {"p50_ms": 0.73}}}
        },
    }
    assert summarise(rows) == {
        "tensorrt-fp16-offline / torch.compile fp16, images/s at batch 128": "1.50",
        # 128 images in 10.67 ms, 4 would do.
        "tensorrt-fp16-offline, share of the roofline at batch 128": "0.38",
        "tensorrt-fp16-single, session over bare execute": "20 us",
        "tensorrt-fp16-single, p50 with graphs": "0.500 ms",
    }
