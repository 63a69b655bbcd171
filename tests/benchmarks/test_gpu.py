"""The GPU benchmark itself, tried on a CPU: rows that fail cost their row, and every speed has a parity beside it."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.gpu.meter import Meter, Reading, percentiles
from benchmarks.gpu.propose import propose
from benchmarks.gpu.roofline import ConvCost, conv_costs, forms, least_ms
from benchmarks.gpu.rows import Rows
from benchmarks.gpu.summary import summarise
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.errors import SessionError
from chexnet_deploy.evaluation.spec import EngineSpec, read_spec
from chexnet_deploy.export.from_torch.model import CheXNet

CHECKOUT = Path(__file__).parents[2]
FORMS = ("fp16", "fp32", "int8")  # of those that the fixture makes, what a GPU takes


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu", *map(str, arguments)]


def gpu_benchmark(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=CHECKOUT, capture_output=True, text=True, timeout=300)


def start(*arguments: object) -> subprocess.Popen[bytes]:
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command(*arguments), cwd=CHECKOUT, stdout=quiet, stderr=quiet)


@pytest.mark.slow
def test_a_dry_run(bundles: dict[str, Bundle], checkpoint_path: Path, phantom_root: Path, tmp_path: Path) -> None:
    folder, out = bundles["fp32"].path.parent, tmp_path / "gpu.json"
    np.save(tmp_path / "more.npy", bundles["fp32"].read_probe().pixels[:4])
    more = ("--more-pixels", tmp_path / "more.npy")
    common = ("--data", phantom_root, "--images", 40, "--out", out, "--dry-run", *more)
    done = gpu_benchmark(folder, checkpoint_path, *common)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    rows = results["rows"]
    names = [f"onnxruntime-cpu-{name}" for name in FORMS]
    assert list(rows) == ["ceilings", "torch-eager-fp32", *names]
    ceilings = rows.pop("ceilings")
    assert ceilings["gmacs_per_image"] == pytest.approx(0.0531, rel=1e-2)  # 2.60 at 224 px, less at 32
    for row in rows.values():
        assert list(row["batches"]) == ["1", "2"]
        assert row["batches"]["1"]["after_idle_ms"]["plain"] > 0
        assert row["batches"]["1"]["variants"]["plain"]["p99_ms"] is None  # of five runs
        assert row["batches"]["2"]["clocks"]["invalid"] is None
        assert row["parity"]["max_abs_probability_difference"] < 0.15
        assert row["parity"]["more_images"]["max_abs_probability_difference"] < 0.15
    assert rows["torch-eager-fp32"]["batches"]["2"]["sustained"]["images_per_s"] > 0
    assert rows["torch-eager-fp32"]["parity"]["max_abs_probability_difference"] < 1e-4
    with pytest.raises(SessionError, match="dry run"):
        propose(results, 1.2)


def test_a_row_that_fails_costs_its_row_alone_and_is_tried_again_by_name(
    bundles: dict[str, Bundle], checkpoint_path: Path, phantom_root: Path, tmp_path: Path
) -> None:
    out = tmp_path / "gpu.json"
    arguments = (
        bundles["fp32"].path.parent,
        checkpoint_path,
        "--data",
        phantom_root,
        "--images",
        20,
        "--out",
        out,
        "--dry-run",
    )
    done = gpu_benchmark(*arguments, "--row-deadline-s", 0.2)
    assert done.returncode == 0, done.stderr
    before = json.loads(out.read_text())["rows"]
    assert len(before) == 2 + len(FORMS)
    assert all("stopped after" in row["error"] for row in before.values())
    assert "<h1>chexnet-deploy on a CPU (dry run)</h1>" in out.with_suffix(".html").read_text()
    done = gpu_benchmark(*arguments, "--only", "cpu-fp32")
    assert done.returncode == 0, done.stderr
    after = json.loads(out.read_text())["rows"]
    assert "error" not in after.pop("onnxruntime-cpu-fp32")
    assert all(row == before[name] for name, row in after.items())
    assert "nothing is missing" in done.stdout


def test_a_worker_starts_where_only_the_runtime_and_tensorrt_are_installed() -> None:
    heavy = ("torch", "onnx", "onnxruntime", "jinja2", "matplotlib", "scipy", "sklearn", "typer")
    modules = "benchmarks.gpu.worker, chexnet_deploy.export.tensorrt.build"
    code = f"import {modules}, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("is_quick", [True, False])
def test_rows_without_tensorrt_come_first_and_every_plan_after_its_build(
    bundles: dict[str, Bundle], tmp_path: Path, is_quick: bool
) -> None:
    found = {name: bundles[name] for name in ("fp32", "fp16", "int8")}
    source = Rows(found, tmp_path, tmp_path, tmp_path, {"tensorrt": "python"}, 1, is_quick)
    rows = list(source.on_gpu())
    names = [row.name for row in rows]
    assert names[:3] == ["driver-checks", "ceilings", "torch-compile-fp16"]
    assert names[-1] == "torch-autotune-fp16"
    assert all(names.index(row.needs) < names.index(row.name) for row in rows if row.needs is not None)
    plans = {row.task.plan: row.task.profile for row in rows if row.task.do == "plan"}
    assert list(plans.values()) == [(1, 128, 128)] * 3 if is_quick else [(1, 1, 1)] * 3 + [(128, 128, 128)] * 3
    assert "tensorrt-fp16-dynamic-level1-build" in names if is_quick else "tensorrt-fp16-single-level1-build" in names


@pytest.mark.slow
def test_killed_at_any_moment_the_results_are_whole_and_the_next_call_completes_them(
    bundles: dict[str, Bundle], checkpoint_path: Path, phantom_root: Path, tmp_path: Path
) -> None:
    folder, out = tmp_path / "bundles", tmp_path / "gpu.json"
    for name in ("fp32", "fp16"):
        shutil.copytree(bundles[name].path, folder / name)
    arguments = (folder, checkpoint_path, "--data", phantom_root, "--images", 20, "--out", out, "--dry-run")
    moments, n_rows = random.Random(4), 0
    for _ in range(10):
        process = start(*arguments, "--only", "cpu")
        try:
            process.wait(moments.uniform(0.5, 6.0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if out.exists():  # whole, and nothing that was measured is lost
            assert len(json.loads(out.read_text())["rows"]) >= n_rows
            n_rows = len(json.loads(out.read_text())["rows"])
    done = gpu_benchmark(*arguments, "--only", "cpu")
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert list(rows) == ["onnxruntime-cpu-fp16", "onnxruntime-cpu-fp32"]
    assert rows["onnxruntime-cpu-fp32"]["parity"]["max_abs_probability_difference"] < 1e-4


def test_results_of_something_else_are_not_gone_on_with(
    bundles: dict[str, Bundle], checkpoint_path: Path, phantom_root: Path, tmp_path: Path
) -> None:
    out = tmp_path / "gpu.json"
    arguments = (
        bundles["fp32"].path.parent,
        checkpoint_path,
        "--data",
        phantom_root,
        "--out",
        out,
        "--dry-run",
        "--only",
        "none",
    )
    assert gpu_benchmark(*arguments, "--images", 20).returncode == 0
    done = gpu_benchmark(*arguments, "--images", 21)
    assert done.returncode == 2
    assert "is of another images" in done.stderr
    assert "Choose another --out" in done.stderr


@pytest.mark.usefixtures("without_gpu")
def test_without_a_gpu_one_line_says_so(bundles: dict[str, Bundle], checkpoint_path: Path, phantom_root: Path) -> None:
    done = gpu_benchmark(bundles["fp32"].path.parent, checkpoint_path, "--data", phantom_root)
    assert done.returncode == 2
    assert "no NVIDIA" in done.stderr
    assert "--dry-run" in done.stderr


@pytest.mark.parametrize(
    ("sm_mhz", "reasons", "found"),
    [
        ((1980, 1980), 0x0, None),
        ((1900, 1980), 0x1, None),  # idle, and 4 %
        ((1980, 1980), 0x20, "0x20"),  # software thermal slowdown
        ((1700, 1980), 0x0, "between 1700 and 1980"),
        ((1500, 1980), 0x4, None),  # the board's power limit: so it is meant to run
        (None, None, None),  # Jetson says nothing
    ],
)
def test_timings_of_a_throttled_gpu_are_invalid(
    sm_mhz: tuple[int, int] | None, reasons: int | None, found: str | None
) -> None:
    reading = Reading(sm_mhz, reasons, power_w=1.0, energy_j=1.0, memory_mib=1.0)
    assert reading.is_power_limited is (reasons == 0x4)
    assert reading.why_invalid is None if found is None else found in str(reading.why_invalid)


def test_one_boost_in_a_window_does_not_move_its_clock() -> None:
    assert percentiles([1500, *[1980] * 98, 2100]) == (1980, 1980)
    assert percentiles([]) is None


def test_a_gpu_that_says_nothing_is_measured_unwatched() -> None:
    class Nvml:
        NVMLError = RuntimeError

        def __getattr__(self, name: str) -> object:
            def refuse(*_: object) -> None:
                raise RuntimeError("Not Supported")

            return refuse

    meter = Meter(None)
    meter._nvml, meter._handle = Nvml(), 0
    with meter:
        pass
    assert meter.reading == Reading(None, None, None, None, None)


def test_densenet_121_costs_what_it_is_known_to_cost() -> None:
    costs = conv_costs(CheXNet(14).eval(), torch.zeros(1, 3, 224, 224))
    assert len(costs) == 120  # and the head
    assert sum(cost.macs for cost in costs) == pytest.approx(
        2.83e9 - 3 * 0.75 * 102_760_448, rel=2e-3
    )  # transitions pool before they convolve
    # The first by hand: 7 x 7 x 3 for each of 64 x 112 x 112 outputs.
    assert costs[0] == ConvCost(7, 147 * 64 * 112 * 112, 3 * 224 * 224, 147 * 64, 64 * 112 * 112)


def test_the_per_layer_bound_by_hand() -> None:
    pointwise = ConvCost(side=1, macs=1000, inputs=30, weights=40, outputs=20)
    wide = ConvCost(side=3, macs=1000, inputs=30, weights=40, outputs=20)
    form = forms({"fp32": 1e5, "fp16": 1e5, "int8": 4e5})
    # Memory: (2 x 50 + 40) x 2 bytes at 1000/s = 0.28 s. Arithmetic: 2 x 2 x 1000 at 100000/s = 0.04 s.
    assert least_ms([wide], 2, 1000.0, form["fp16"]) == pytest.approx(280.0)
    assert least_ms([wide, wide], 2, 1e9, form["fp16"]) == pytest.approx(80.0)
    assert least_ms([wide], 2, 1000.0, form["fp32"]) == pytest.approx(560.0)
    # Int8 in, float16 out: 2 x (30 + 20 x 2) + 40 = 180 bytes.
    assert least_ms([wide], 2, 1000.0, form["int8"]) == pytest.approx(180.0)
    assert least_ms([pointwise, wide], 2, 1000.0, form["mixed"]) == pytest.approx(180.0 + 280.0)
    assert list(forms({"fp16": 1.0})) == ["fp16"]


def variant(p50_ms: float, images_per_s: float, gpu_ms: float | None = None, n_runs: int = 200) -> dict[str, object]:
    stages = {} if gpu_ms is None else {"compute": gpu_ms}
    timed = {"p50_ms": p50_ms, "p99_ms": 1.5 * p50_ms, "images_per_s": images_per_s, "n_runs": n_runs}
    return {**timed, "stages_ms": stages}


def test_rows_are_held_against_each_other() -> None:
    def offline(speed: float, gpu_ms: float) -> dict[str, object]:
        return {"128": {"variants": {"graphs": variant(1.0, speed, gpu_ms)}}}

    card = {"n_kernels": 188, "bytes_per_image": 1e6}
    single = {"graphs": variant(0.5, 2000.0, 0.4), "plain": variant(0.75, 1.0), "bare": variant(0.73, 1.0)}
    bound = {"fp16": {"1": 0.02, "128": 4.0}}
    rows = {
        "ceilings": {"per_layer_bound_ms": bound, "graph_node_us": 1.0, "copy_bytes_per_s": 32e9},
        "torch-compile-fp16": {"batches": offline(8_000.0, 10.0)},
        "tensorrt-fp16-offline": {"form": "fp16", "engine": card, "batches": offline(12_000.0, 8.0)},
        "tensorrt-fp16-single": {"form": "fp16", "engine": card, "batches": {"1": {"variants": single}}},
    }
    assert summarise(rows) == {
        "tensorrt-fp16-offline, share of the per-layer bound at batch 128": "0.50",
        "tensorrt-fp16-offline, share of its own traffic's bound at batch 128": "0.50",  # 128 MB at 32 GB/s
        "tensorrt-fp16-offline / torch.compile, images/s of one lane at batch 128": "1.50",
        "tensorrt-fp16-offline / torch.compile, speed on the GPU's clock at batch 128": "1.25",
        "tensorrt-fp16-single, share of the launch floor of 188 kernels at batch 1": "0.47",
        "tensorrt-fp16-single, session over bare execute at batch 1": "20 us",
    }


def results_of(n_runs: int = 200, invalid: str | None = None, verdict: str = "PASS") -> dict[str, object]:
    clocks = {"invalid": invalid, "note": None}
    batches = {"1": {"variants": {"graphs": variant(0.5, 2000.0, n_runs=n_runs)}, "clocks": clocks}}
    rows = {"tensorrt-fp16-single": {"engine": {}, "batches": batches, "parity": {"verdict": verdict}}}
    return {"dry_run": False, "gpu": {"name": "NVIDIA H100"}, "rows": rows}


def test_proposed_limits_are_a_gate_that_a_spec_takes() -> None:
    lines = propose(results_of(), 1.2)
    assert lines[-2:] == ["[gate]", "latency = { p50_ms = 0.6, p99_ms = 0.9 }"]
    spec = read_spec("h200-fp16").model_dump()
    spec["gate"]["latency"] = {"p50_ms": 0.6, "p99_ms": 0.9}
    assert EngineSpec.model_validate(spec).gate.latency != "unproven"


@pytest.mark.parametrize(
    ("results", "why"),
    [
        (results_of(n_runs=99), "99 runs, needed 100"),
        (results_of(invalid="throttle reasons 0x20"), "throttle reasons 0x20"),
        (results_of(verdict="FAIL"), "its parity is FAIL"),
    ],
)
def test_nothing_is_proposed_from_a_row_that_does_not_count(results: dict[str, object], why: str) -> None:
    with pytest.raises(SessionError, match=why):
        propose(results, 1.2)
