"""Everything a GPU machine can prove, in one command: plans of every bundle by every TensorRT at hand, torch beside them.

    python -m benchmarks.gpu BUNDLES CHECKPOINT --data ROOT

Works in order of importance, each row in a process of its own with a deadline, and writes the results after each row: what
hangs, crashes or is missing costs its row alone. Each speed stands beside the parity of the same plan. Not here yet: CUDA
graphs, energy, roofline, ONNX Runtime on CUDA.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

import numpy as np
import typer

from chexnet_deploy.bench import describe_machine
from chexnet_deploy.bundle import Bundle
from chexnet_deploy.chestxray14 import ChestXray14
from chexnet_deploy.cli import print_table, run_program
from chexnet_deploy.errors import ChexnetError, SessionError
from chexnet_deploy.parity import compare
from chexnet_deploy.scoring import LabelledImages, iter_pixels
from chexnet_deploy.sessions import open_session, run_in_batches
from chexnet_deploy.spec import read_spec

CHECKOUT = Path(__file__).parents[1]
FIRST, REST = "1,128", "8,32,512"
TORCH_MODES = {"eager-fp32": FIRST, "amp-fp16": FIRST, "compile-fp16": "128"}
_SMI = "name,driver_version,clocks.sm,clocks_event_reasons.active,power.draw,memory.used"
CLOCK_CHANGE_LIMIT = 0.05
IDLE_REASON = 0x1

app = typer.Typer(add_completion=False)


@app.command()
def main(
    bundles: Annotated[Path, typer.Argument(help="Folder of bundles that export wrote.")],
    checkpoint: Annotated[Path, typer.Argument(help="The checkpoint they came from, for torch.")],
    data: Annotated[Path, typer.Option(help="Labelled images in ChestX-ray14's layout.")],
    images: Annotated[int, typer.Option(min=20, help="How many, at the most.")] = 2000,
    interpreter: Annotated[
        list[str] | None, typer.Option(help="BACKEND=PYTHON: another interpreter that has that TensorRT.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Results.")] = CHECKOUT / "benchmarks" / "results" / "gpu.json",
    deadline_s: Annotated[float, typer.Option(help="For the whole benchmark.")] = 480.0,
    row_deadline_s: Annotated[float, typer.Option(help="For one row.")] = 120.0,
    dry_run: Annotated[
        bool, typer.Option(help="Try the benchmark itself on a CPU: ONNX Runtime, batches 1 and 2.")
    ] = False,
) -> None:
    """Measure, and print a short table last."""
    end = monotonic() + deadline_s
    gpu = None if dry_run else _nvidia_smi()
    found = {
        bundle.name: Bundle.open(bundle) for bundle in sorted(bundles.iterdir()) if (bundle / "manifest.json").is_file()
    }
    reference = found["fp32"]
    labelled = _some_images(data, reference, images)
    work = Path(tempfile.mkdtemp(prefix="chexnet-gpu-"))
    try:
        pixels = np.concatenate(list(iter_pixels(labelled.paths, reference.manifest.preprocessing)))
        np.save(work / "pixels.npy", pixels)
        session = open_session(reference)
        wanted, _ = run_in_batches(session, pixels)
        session.close()
        results: dict[str, Any] = {
            "machine": describe_machine().model_dump(),
            "python": platform.python_version(),
            "gpu": gpu,
            "dry_run": dry_run,
            "n_images": len(pixels),
            "rows": {},
        }
        for name, command, bundle in _rows(found, checkpoint, work, interpreter or [], dry_run=dry_run):
            left = end - monotonic()
            if left <= 0:
                results["rows"][name] = {"error": "not started: the benchmark's time was up"}
            else:
                results["rows"][name] = _run_row(command, work / name, min(left, row_deadline_s), dry_run=dry_run)
                logits = work / name / "logits.npy"
                if logits.is_file():
                    results["rows"][name]["parity"] = _parity(wanted, np.load(logits), labelled, bundle or reference)
                shutil.rmtree(work / name, ignore_errors=True)
            out.write_text(json.dumps(results, indent=1) + "\n")
    finally:
        shutil.rmtree(work)
    print_table([_line(name, row) for name, row in results["rows"].items()])
    typer.echo(str(out))


def _rows(
    found: dict[str, Bundle], checkpoint: Path, work: Path, interpreters: list[str], *, dry_run: bool
) -> list[tuple[str, list[str], Bundle | None]]:
    """Return (name, command, bundle) of each row, the most important first."""
    pixels = str(work / "pixels.npy")
    if dry_run:
        backends, sizes, device = {"onnxruntime": sys.executable}, {"first": "1,2"}, "cpu"
        modes = {"eager-fp32": "1,2"}
    else:
        backends = dict(pair.split("=", 1) for pair in interpreters) or {"tensorrt": sys.executable}
        sizes, device, modes = {"first": FIRST, "rest": REST}, "cuda", TORCH_MODES
    worker, idle = ["-m", "benchmarks.gpu_worker"], ["--idle-s", "0.2" if dry_run else "5"]
    rows: list[tuple[str, list[str], Bundle | None]] = []
    for part, batches in sizes.items():
        for backend, python in backends.items():
            for name, bundle in found.items():
                row = f"{backend}-{name}-{part}"
                words = [
                    "tensorrt",
                    str(bundle.path),
                    pixels,
                    str(work / row),
                    "--backend",
                    backend,
                    "--batches",
                    batches,
                ]
                rows.append((row, [python, *worker, *words, *idle], bundle))
        if part == "first":
            for mode, mode_batches in modes.items():
                row = f"torch-{mode}"
                words = ["torch", str(checkpoint), pixels, str(work / row), "--mode", mode, "--batches", mode_batches]
                rows.append((row, [sys.executable, *worker, *words, *idle, "--device", device], None))
    return rows


def _run_row(command: list[str], folder: Path, seconds: float, *, dry_run: bool) -> dict[str, Any]:
    before = None if dry_run else _nvidia_smi()
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    try:
        done = subprocess.run(
            command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
        error = None if done.returncode == 0 else f"exit {done.returncode}: {done.stderr.strip()[-500:]}"
    except subprocess.TimeoutExpired:
        error = f"stopped after {seconds:.0f} s"
    timings = folder / "timings.json"
    row: dict[str, Any] = json.loads(timings.read_text()) if timings.is_file() else {}
    if error is not None:
        row["error"] = error
    if before is not None:
        row["gpu_before"], row["gpu_after"] = before, _nvidia_smi()
        row["invalid"] = why_invalid(row["gpu_before"], row["gpu_after"])
    return row


def why_invalid(before: dict[str, str], after: dict[str, str]) -> str | None:
    """Return why timings between two states of a GPU say nothing, or None: it throttled, or its clock moved by over 5 %."""
    reasons = int(after["clocks_event_reasons.active"], 16) & ~IDLE_REASON
    if reasons:
        return f"throttle reasons 0x{reasons:x}"
    first, last = (float(state["clocks.sm"].split()[0]) for state in (before, after))
    if abs(last - first) > CLOCK_CHANGE_LIMIT * first:
        return f"the clock went from {first:.0f} to {last:.0f} MHz"
    return None


def _nvidia_smi() -> dict[str, str]:
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={_SMI}", "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as err:
        raise SessionError("nvidia-smi does not answer, so there is no NVIDIA GPU here. Try --dry-run.") from err
    return dict(zip(_SMI.split(","), (word.strip() for word in done.stdout.splitlines()[0].split(",")), strict=True))


def _some_images(data: Path, reference: Bundle, n: int) -> LabelledImages:
    dataset = ChestXray14.open(data)
    # Test patients first; training patients serve numeric parity as well, and AUROC parity of one model with another.
    radiographs = [radiograph for name in ("test", "val", "train") for radiograph in dataset.split(name)]
    return LabelledImages.of(radiographs[:n], reference.manifest.findings)


def _parity(wanted: Any, got: Any, labelled: LabelledImages, bundle: Bundle) -> dict[str, Any]:
    manifest = bundle.manifest
    try:
        gate = read_spec(manifest.precision.value).gate
        report = compare(
            wanted, got, labelled.truth, labelled.patients, manifest.findings, manifest.operating_points, gate
        )
    except ChexnetError as err:
        return {"error": str(err)}
    return {
        "summary": report.summary,
        "verdict": report.verdict,
        "reasons": report.reasons,
        "mean_auroc": report.mean_auroc_candidate,
        "max_abs_probability_difference": report.max_abs_probability_difference,
        "n_flips": report.n_flips,
    }


def _line(name: str, row: dict[str, Any]) -> dict[str, str]:
    batches, parity = row.get("batches", {}), row.get("parity", {})
    one, most = batches.get("1", {}), max((b["images_per_s"] for b in batches.values()), default=None)
    note = row.get("error") or row.get("invalid") or parity.get("summary", "")
    return {
        "row": name,
        "p50 ms, batch 1": f"{one['p50_ms']:.3f}" if one else "",
        "images/s": f"{most:.0f}" if most else "",
        "max |Δp|": f"{parity['max_abs_probability_difference']:.4f}"
        if "max_abs_probability_difference" in parity
        else "",
        "": note[:60],
    }


if __name__ == "__main__":
    run_program(app)
