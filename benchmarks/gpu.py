"""Everything a GPU machine can prove, in one command: plans of every bundle by every TensorRT at hand, torch beside them.

    python -m benchmarks.gpu BUNDLES CHECKPOINT --data ROOT

Works in order of importance, each row in a process of its own with a deadline, and writes JSON and HTML after each row:
what hangs, crashes or is missing costs its row alone. Each speed stands beside the parity of the same plan.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.gpu_page import write_page
from chexnet_deploy.bench import describe_machine
from chexnet_deploy.bundle import Bundle
from chexnet_deploy.chestxray14 import ChestXray14
from chexnet_deploy.errors import ChexnetError, SessionError
from chexnet_deploy.parity import compare
from chexnet_deploy.predictor import sigmoid
from chexnet_deploy.preprocessing import Pixels
from chexnet_deploy.scoring import LabelledImages, iter_pixels
from chexnet_deploy.sessions import Logits, open_session, run_in_batches
from chexnet_deploy.spec import read_spec
from chexnet_deploy.terminal import print_table, run_program

CHECKOUT = Path(__file__).parents[1]
PRECISION_ORDER = ("fp16", "int8", "fp32")
# One plan for the image that a radiographer waits for, one for throughput: a profile is tuned for one batch size.
SINGLE, OFFLINE = ("single", "1,1,1", "1"), ("offline", "1,128,512", "128")
REST = "8,32,512"
TORCH_MODES = {"eager-fp32": "1,128", "amp-fp16": "1,128", "compile-fp16": "128"}
_SMI = "name,driver_version,memory.total,power.limit,clocks.max.sm,temperature.gpu"

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class Row:
    """One process: its name, command without OUT, place in the command where OUT goes, and the bundle it must equal."""

    name: str
    command: tuple[str, ...]
    bundle: Bundle | None = None


@app.command()
def main(
    bundles: Annotated[Path, typer.Argument(help="Folder of bundles: fp32, and any of fp16, int8, int8-trt8.")],
    checkpoint: Annotated[Path, typer.Argument(help="The checkpoint they came from, for torch.")],
    data: Annotated[Path, typer.Option(help="Labelled images in ChestX-ray14's layout.")],
    images: Annotated[int, typer.Option(min=20, help="How many, at the most.")] = 2000,
    more_pixels: Annotated[
        Path | None, typer.Option(help="uint8 [N, 1, S, S] .npy without labels, e.g. real radiographs.")
    ] = None,
    interpreter: Annotated[
        list[str] | None, typer.Option(help="BACKEND=PYTHON: another interpreter that has that TensorRT.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Results; the page goes beside them.")] = CHECKOUT
    / "benchmarks"
    / "results"
    / "gpu.json",
    deadline_s: Annotated[float, typer.Option(help="For the whole benchmark.")] = 480.0,
    row_deadline_s: Annotated[float, typer.Option(help="For one row.")] = 120.0,
    dry_run: Annotated[
        bool, typer.Option(help="Try the benchmark itself on a CPU: ONNX Runtime, batches 1 and 2.")
    ] = False,
) -> None:
    """Measure, and print a short table last."""
    end = monotonic() + deadline_s
    gpu = None if dry_run else _nvidia_smi()
    opened = (Bundle.open(folder) for folder in sorted(bundles.iterdir()) if (folder / "manifest.json").is_file())
    found = {bundle.path.name: bundle for bundle in opened if bundle.manifest.dialect != "cpu"}
    if "fp32" not in found:
        raise SessionError(f"{bundles} holds no bundle named fp32 to compare with. Give the folder that export wrote.")
    work = Path(tempfile.mkdtemp(prefix="chexnet-gpu-"))
    try:
        reference = _Reference(found["fp32"], data, images, more_pixels, work)
        results: dict[str, Any] = {
            "machine": describe_machine().model_dump(),
            "python": platform.python_version(),
            "gpu": gpu,
            "dry_run": dry_run,
            "n_images": len(reference.labelled.paths),
            "n_more_images": reference.n_more,
            "rows": {},
        }
        rows = _dry_rows(found, checkpoint, work) if dry_run else _rows(found, checkpoint, work, interpreter or [])
        for row in rows:
            left = end - monotonic()
            if left <= 0:
                results["rows"][row.name] = {"error": "not started: the benchmark's time was up"}
            else:
                results["rows"][row.name] = _run_row(row, work / row.name, min(left, row_deadline_s))
                if row.bundle is not None:
                    results["rows"][row.name]["parity"] = reference.judge(work / row.name, row.bundle)
                shutil.rmtree(work / row.name, ignore_errors=True)
            results["summary"] = summarise(results["rows"])
            out.write_text(json.dumps(results, indent=1) + "\n")
            write_page(out.with_suffix(".html"), results)
    finally:
        shutil.rmtree(work)
    print_table([_line(name, row) for name, row in results["rows"].items()])
    for name, value in results["summary"].items():
        typer.echo(f"{name}: {value}")
    typer.echo(str(out))


class _Reference:
    """The fp32 model's answers, from ONNX Runtime on the CPU, and the labels to judge other answers by."""

    def __init__(self, fp32: Bundle, data: Path, n_images: int, more: Path | None, work: Path) -> None:
        dataset = ChestXray14.open(data)
        # Test patients first; training patients serve parity of one model with another as well.
        radiographs = [radiograph for name in ("test", "val", "train") for radiograph in dataset.split(name)]
        self.labelled = LabelledImages.of(radiographs[:n_images], fp32.manifest.findings)
        preprocessing = fp32.manifest.preprocessing
        pixels: Pixels = np.concatenate(list(iter_pixels(self.labelled.paths, preprocessing)))
        self.n_more = 0
        if more is not None:
            others = np.load(more)
            self.n_more, pixels = len(others), np.concatenate([pixels, others])
        np.save(work / "pixels.npy", pixels)
        session = open_session(fp32)
        self._wanted, _ = run_in_batches(session, pixels)
        session.close()

    def judge(self, folder: Path, bundle: Bundle) -> dict[str, Any]:
        """Return the parity of a row's logits: with labels, and in numbers alone on the images without."""
        try:
            got = np.load(folder / "logits.npy")
        except OSError:
            return {"error": "it wrote no logits, so nothing is known of its answers"}
        n, manifest = len(self.labelled.paths), bundle.manifest
        try:
            gate = read_spec(manifest.precision.value).gate
            report = compare(
                self._wanted[:n],
                got[:n],
                self.labelled.truth,
                self.labelled.patients,
                manifest.findings,
                manifest.operating_points,
                gate,
            )
        except ChexnetError as err:
            return {"error": str(err)}
        judged: dict[str, Any] = {
            "summary": report.summary,
            "verdict": report.verdict,
            "reasons": report.reasons,
            "mean_auroc": report.mean_auroc_candidate,
            "max_abs_probability_difference": report.max_abs_probability_difference,
            "n_flips": report.n_flips,
        }
        if self.n_more:
            judged["more_images"] = _differences(self._wanted[n:], got[n:])
        return judged


def _differences(wanted: Logits, got: Logits) -> dict[str, float]:
    gap = np.abs(sigmoid(wanted) - sigmoid(got))
    return {
        "max_abs_logit_difference": float(np.abs(wanted - got).max()),
        "max_abs_probability_difference": float(gap.max()),
        "p999_abs_probability_difference": float(np.quantile(gap, 0.999, method="higher")),
    }


def _rows(found: Mapping[str, Bundle], checkpoint: Path, work: Path, interpreters: Sequence[str]) -> Iterator[Row]:
    """Yield the rows, the most important first."""
    here = sys.executable
    pythons = dict(pair.split("=", 1) for pair in interpreters) or {"tensorrt": here}
    names = [name for p in PRECISION_ORDER for name in found if found[name].manifest.precision.value == p]
    pixels = str(work / "pixels.npy")

    def plan_row(backend: str, name: str, kind: str, profile: str, batches: str, suffix: str = "") -> Row:
        plan = work / "plans" / f"{backend}-{name}-{kind}"
        row = f"{backend}-{name}-{kind}{suffix}"
        options = ("--plan", str(plan), "--backend", backend, "--profile", profile, "--batches", batches)
        command = (pythons[backend], "tensorrt", str(found[name].path), pixels, str(work / row), *options)
        return Row(row, command, found[name])

    for kind, profile, batches in (OFFLINE, SINGLE):
        for backend in pythons:
            for name in names:
                yield plan_row(backend, name, kind, profile, batches)
        if kind == "offline":
            for mode, sizes in reversed(TORCH_MODES.items()):
                yield _torch_row(checkpoint, work, found["fp32"], mode, sizes, "cuda")
            yield Row("roofline", (here, "roofline", str(checkpoint), str(work / "roofline")))
    for backend, python in pythons.items():
        for name in names:
            row = f"{backend}-{name}-checks"
            plan = str(work / "plans" / f"{backend}-{name}-offline")
            if name != "fp32":
                yield Row(row, (python, "checks", plan, str(work / row)))
    yield Row("tests", (here, "tests", str(work / "tests")))
    for name in names:
        row = f"onnxruntime-cuda-{name}"
        yield Row(row, (here, "onnxruntime", str(found[name].path), pixels, str(work / row)), found[name])
    for backend in pythons:
        for name in names:
            yield plan_row(backend, name, "offline", OFFLINE[1], REST, "-rest")


def _dry_rows(found: Mapping[str, Bundle], checkpoint: Path, work: Path) -> Iterator[Row]:
    quick = ("--batches", "1,2", "--idle-s", "0.2")
    for name, bundle in found.items():
        row = f"onnxruntime-cpu-{name}"
        words = (sys.executable, "onnxruntime", str(bundle.path), str(work / "pixels.npy"), str(work / row))
        yield Row(row, (*words, "--provider", "cpu", *quick), bundle)
    yield _torch_row(checkpoint, work, found["fp32"], "eager-fp32", "1,2", "cpu")
    yield Row("roofline", (sys.executable, "roofline", str(checkpoint), str(work / "roofline"), "--device", "cpu"))


def _torch_row(checkpoint: Path, work: Path, fp32: Bundle, mode: str, batches: str, device: str) -> Row:
    row = f"torch-{mode}"
    words = (sys.executable, "torch", str(checkpoint), str(work / "pixels.npy"), str(work / row))
    return Row(row, (*words, "--mode", mode, "--batches", batches, "--device", device), fp32)


def _run_row(row: Row, folder: Path, seconds: float) -> dict[str, Any]:
    python, *words = row.command
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(CHECKOUT), os.environ.get("PYTHONPATH", "")))}
    start = monotonic()
    try:
        done = subprocess.run(
            [python, "-m", "benchmarks.gpu_worker", *words],
            cwd=CHECKOUT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        error = None if done.returncode == 0 else f"exit {done.returncode}: {done.stderr.strip()[-500:]}"
    except subprocess.TimeoutExpired:
        error = f"stopped after {seconds:.0f} s"
    except OSError as err:
        error = f"{python} does not start: {err.strerror}"
    written = folder / "result.json"
    result: dict[str, Any] = json.loads(written.read_text()) if written.is_file() else {}
    result["took_s"] = round(monotonic() - start, 1)
    if error is not None:
        result["error"] = error
    return result


def summarise(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return what the rows say of each other, in words: ratio to torch.compile, share of the roofline, overhead."""
    said: dict[str, str] = {}
    compiled = _offline_images_per_s(rows.get("torch-compile-fp16", {}), "plain")
    bound = rows.get("roofline", {}).get("bound", {})
    for name, row in rows.items():
        if not name.endswith(("-offline", "-single")) or "batches" not in row:
            continue
        precision = str(row["engine"]["precision"]) if "precision" in row.get("engine", {}) else name.split("-")[1]
        speed = _offline_images_per_s(row, "graphs")
        if speed is not None and compiled is not None:
            said[f"{name} / torch.compile fp16, images/s at batch 128"] = f"{speed / compiled:.2f}"
        least_ms = bound.get(precision, {}).get("least_ms", {}).get("128")
        if speed is not None and least_ms is not None:
            said[f"{name}, share of the roofline at batch 128"] = f"{speed * least_ms / 128_000:.2f}"
        one = row["batches"].get("1", {})
        if "bare" in one:
            overhead_us = 1000.0 * (one["plain"]["p50_ms"] - one["bare"]["p50_ms"])
            said[f"{name}, session over bare execute"] = f"{overhead_us:.0f} us"
            said[f"{name}, p50 with graphs"] = f"{one['graphs']['p50_ms']:.3f} ms"
    return said


def _offline_images_per_s(row: Mapping[str, Any], variant: str) -> float | None:
    speed: float | None = row.get("batches", {}).get("128", {}).get(variant, {}).get("images_per_s")
    return speed


def _nvidia_smi() -> dict[str, str]:
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={_SMI}", "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as err:
        raise SessionError("nvidia-smi does not answer, so there is no NVIDIA GPU here. Try --dry-run.") from err
    return dict(zip(_SMI.split(","), (word.strip() for word in done.stdout.splitlines()[0].split(",")), strict=True))


def _line(name: str, row: Mapping[str, Any]) -> dict[str, str]:
    batches, parity = row.get("batches", {}), row.get("parity", {})
    variants = [
        (int(size), entry[variant])
        for size, entry in batches.items()
        for variant in ("graphs", "plain")
        if variant in entry
    ]
    one = min((entry["p50_ms"] for size, entry in variants if size == 1), default=None)
    most = max((entry["images_per_s"] for _, entry in variants), default=None)
    invalid = next((entry["clocks"]["invalid"] for entry in batches.values() if entry["clocks"]["invalid"]), None)
    gap = parity.get("max_abs_probability_difference")
    note = row.get("error") or (f"INVALID: {invalid}" if invalid else parity.get("summary", ""))
    return {
        "row": name,
        "p50 ms, batch 1": "" if one is None else f"{one:.3f}",
        "images/s": "" if most is None else f"{most:.0f}",
        "max |Δp|": "" if gap is None else f"{gap:.4f}",
        "": str(note)[:70],
    }


if __name__ == "__main__":
    run_program(app)
