"""Everything a GPU machine can prove, in one command: plans of every bundle by every TensorRT at hand, torch beside them.

    python -m benchmarks.gpu BUNDLES CHECKPOINT --data ROOT

Works in order of importance, each row in a process of its own with a deadline, and writes JSON and HTML after each row:
what hangs, crashes or is missing costs its row alone. Killed at any moment, the next call goes on with what is missing, so
that several short calls make one result. Each speed stands beside the parity of the same plan.
"""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

import typer

from benchmarks.common import CHECKOUT, RESULTS
from benchmarks.gpu.reference import Reference
from benchmarks.gpu.rows import Row, Rows
from benchmarks.gpu.summary import line, summarise
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.errors import ChexnetError, SessionError
from chexnet_deploy.evaluation.machine import describe_machine
from chexnet_deploy.files import sha256_of_file, write_file
from chexnet_deploy.runtime.sessions.driver import open_driver
from chexnet_deploy.terminal import print_table, run_program

LEAST_S = 1.0  # less is not worth a start
_SMI = "driver_version,memory.total,power.limit,clocks.max.sm,temperature.gpu"

app = typer.Typer(add_completion=False)


@app.command()
def main(
    bundles: Annotated[Path, typer.Argument(help="Folder of bundles: fp32, and any other forms.")],
    checkpoint: Annotated[Path, typer.Argument(help="The checkpoint they came from, for torch.", exists=True)],
    data: Annotated[Path, typer.Option(help="Labelled images in ChestX-ray14's layout.")],
    images: Annotated[int, typer.Option(min=20, help="How many, at the most.")] = 2000,
    more_pixels: Annotated[
        Path | None, typer.Option(help="uint8 [N, 1, S, S] .npy without labels, e.g. real radiographs.")
    ] = None,
    interpreter: Annotated[
        list[str] | None, typer.Option(help="BACKEND=PYTHON: another interpreter that has that TensorRT.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Results, gone on with where they are there; the page goes beside them.")
    ] = RESULTS / "gpu.json",
    work: Annotated[
        Path | None,
        typer.Option(help="Kept between calls: plans, timing caches, pixels, logs. Default: beside the results."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only rows whose name contains this; of them those that failed are tried again."),
    ] = None,
    quick: Annotated[
        bool, typer.Option(help="One plan for batches 1 to 128 in place of two for 1 and for 128.")
    ] = False,
    optimization_level: Annotated[int, typer.Option(min=0, max=5, help="TensorRT's effort when it builds.")] = 3,
    deadline_s: Annotated[float, typer.Option(help="For this call.")] = 480.0,
    row_deadline_s: Annotated[float, typer.Option(help="For one row.")] = 120.0,
    build_deadline_s: Annotated[float, typer.Option(help="For one row that builds or compiles.")] = 300.0,
    dry_run: Annotated[
        bool, typer.Option(help="Try the benchmark itself on a CPU: ONNX Runtime, batches 1 and 2.")
    ] = False,
) -> None:
    """Measure what has not been measured yet, and print a short table last."""
    end = monotonic() + deadline_s
    gpu = None if dry_run else describe_gpu()
    work = (work or out.with_suffix(".work")).resolve()
    work.mkdir(parents=True, exist_ok=True)
    found = _open_bundles(bundles.resolve())
    reference = Reference(found["fp32"], data, images, more_pixels, work)
    results = _begin(found, checkpoint, reference, gpu, out)
    pythons = dict(pair.split("=", 1) for pair in interpreter or []) or {"tensorrt": sys.executable}
    source = Rows(found, checkpoint.resolve(), work, reference.pixels_path, pythons, optimization_level, quick)
    rows = {row.name: row for row in (source.on_cpu() if dry_run else source.on_gpu())}
    deadlines = {False: row_deadline_s, True: build_deadline_s}
    for row in _wanted(rows, only or [], results["rows"]):
        own, left = deadlines[row.is_long], end - monotonic()
        if left < LEAST_S:
            break
        result = _run_row(row, results["rows"], reference, work, min(left, own))
        if result.get("error", "").startswith("stopped") and left < own:
            break  # by this call's end: the next one does it again
        results["rows"][row.name] = result
        _write(out, results)
    _write(out, results)
    shown = [line(name, row) for name, row in results["rows"].items()]
    print_table(shown or [{"row": "none"}])
    for name, value in results["summary"].items():
        typer.echo(f"{name}: {value}")
    missing = [name for name in rows if name not in results["rows"]]
    typer.echo(f"missing: {', '.join(missing)}" if missing else "nothing is missing")
    typer.echo(str(out))


def describe_gpu() -> dict[str, str]:
    """Return what the driver and, where it answers, nvidia-smi say of the GPU.

    Raises:
        SessionError: there is none.
    """
    try:
        driver = open_driver()
        gpu = driver.describe(0)
    except ChexnetError as err:
        raise SessionError(f"{err} To try the benchmark itself on a CPU: --dry-run") from err
    said = {"name": gpu.name, "compute_capability": gpu.compute_capability, "cuda": str(driver.cuda_version())}
    command = ["nvidia-smi", f"--query-gpu={_SMI}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):  # Jetson has none, or one that knows nothing
        return said
    words = done.stdout.splitlines()[0].split(",") if done.stdout else []
    return said | dict(zip(_SMI.split(","), (word.strip() for word in words), strict=False))


def _open_bundles(folder: Path) -> dict[str, Bundle]:
    opened = (Bundle.open(path) for path in sorted(folder.iterdir()) if (path / "manifest.json").is_file())
    found = {bundle.path.name: bundle for bundle in opened if bundle.manifest.dialect != "cpu"}
    if "fp32" not in found:
        raise SessionError(f"{folder} holds no bundle named fp32 to compare with. Give the folder that export wrote.")
    return found


def _begin(
    found: Mapping[str, Bundle], checkpoint: Path, reference: Reference, gpu: Mapping[str, str] | None, out: Path
) -> dict[str, Any]:
    """Return the results at `out`, if they are of the same things, or new ones.

    Raises:
        SessionError: they are of something else.
    """
    machine = describe_machine()
    of = {
        "GPU": "none (dry run)" if gpu is None else gpu["name"],
        "processor": machine.processor,
        "checkpoint": sha256_of_file(checkpoint),
        "images": reference.images_id,
        **{f"bundle {name}": bundle.id for name, bundle in found.items()},
    }
    rows: dict[str, Any] = {}
    if out.exists():
        try:
            before = json.loads(out.read_text())
            was, rows = before["of"], before["rows"]
        except (ValueError, KeyError, TypeError) as err:
            raise SessionError(f"{out} is no result of this benchmark. Choose another --out.") from err
        for what, value in of.items():
            if was.get(what, value) != value:
                raise SessionError(
                    f"{out} is of another {what}: found {was[what][:40]}, needed {value[:40]}. Choose another --out."
                )
        of = {**was, **of}
    return {
        "of": of,
        "machine": machine.model_dump(),
        "python": platform.python_version(),
        "gpu": gpu,
        "dry_run": gpu is None,
        "n_images": len(reference.labelled.paths),
        "n_more_images": reference.n_more,
        "rows": rows,
    }


def _wanted(rows: Mapping[str, Row], only: Sequence[str], done: Mapping[str, Mapping[str, Any]]) -> Iterator[Row]:
    """Yield the rows that are missing, each after the one that it needs; of those that failed, the ones named."""
    asked = [row for row in rows.values() if not only or any(word in row.name for word in only)]
    names = dict.fromkeys(name for row in asked for name in (row.needs, row.name) if name is not None)
    for name in names:
        before = done.get(name)
        if before is None or "skipped" in before or ("error" in before and only):
            yield rows[name]


def _run_row(
    row: Row, done: Mapping[str, Mapping[str, Any]], reference: Reference, work: Path, seconds: float
) -> dict[str, Any]:
    needed = done.get(row.needs or "", {})
    if "error" in needed:
        return {"skipped": f"{row.needs} failed: {needed['error'][-300:]}"}
    if row.task.pixels:
        reference.prepare()
    folder = work / "rows" / row.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start = monotonic()
    error = _run_worker(row, folder, work, seconds)
    written = folder / "result.json"
    result: dict[str, Any] = json.loads(written.read_text()) if written.is_file() else {}
    result["took_s"] = round(monotonic() - start, 1)
    if error is not None:
        result["error"] = error
    if row.bundle is not None and row.task.batches:
        result["parity"] = reference.judge(folder, row.bundle, row.spec or row.bundle.manifest.precision.value)
    return result


def _run_worker(row: Row, folder: Path, work: Path, seconds: float) -> str | None:
    """Run the row's process and return why it failed; its output stays beside its folder."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"), "TRITON_CACHE_DIR": str(work / "triton")}
    paths = os.pathsep.join((str(CHECKOUT), os.environ.get("PYTHONPATH", "")))
    command = [row.python, "-m", "benchmarks.gpu.worker", json.dumps(asdict(row.task)), str(folder)]
    log = folder.parent / f"{row.name}.log"
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                command,
                cwd=CHECKOUT,
                env={**os.environ, **caches, "PYTHONPATH": paths},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        except OSError as err:
            return f"{row.python} does not start: {err.strerror}"
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
        finally:  # torch compiles in processes of its own, which may be left
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    said = log.read_text(errors="replace").strip()[-500:]
    return None if code == 0 else f"exit {code}: {said}"


def _write(out: Path, results: dict[str, Any]) -> None:
    results["summary"] = summarise(results["rows"])
    write_file(out, (json.dumps(results, indent=1) + "\n").encode())
    if find_spec("jinja2") is not None:
        from benchmarks.gpu.page import write_page

        write_page(out.with_suffix(".html"), results)


if __name__ == "__main__":
    run_program(app)
