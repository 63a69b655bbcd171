"""One row of the GPU benchmark, in a process of its own: what crashes or hangs here costs that row alone.

    python -m benchmarks.gpu_worker tensorrt BUNDLE PIXELS OUT --plan PLAN --profile 1,128,512 --batches 128
    python -m benchmarks.gpu_worker onnxruntime BUNDLE PIXELS OUT --provider cuda
    python -m benchmarks.gpu_worker torch CHECKPOINT PIXELS OUT --mode compile-fp16 --batches 128
    python -m benchmarks.gpu_worker checks PLAN OUT
    python -m benchmarks.gpu_worker tests OUT
    python -m benchmarks.gpu_worker roofline CHECKPOINT OUT

Started by gpu.py with the interpreter that has what is asked for. OUT gets result.json, written again after every batch
size, and logits.npy: float32 [N, C] of all PIXELS (uint8 [N, 1, S, S] .npy).
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import typer

from benchmarks.gpu_bare import BareEngine
from benchmarks.gpu_meter import Meter
from chexnet_deploy.bundle import Bundle
from chexnet_deploy.latency import LatencyReport, measure_latency
from chexnet_deploy.preprocessing import Pixels
from chexnet_deploy.sessions import Logits, Maps, Session, open_session
from chexnet_deploy.spec import BatchProfile, read_spec
from chexnet_deploy.terminal import run_program

CHECKOUT = Path(__file__).parents[1]
MIN_RUNS, MIN_SECONDS = 50, 0.5
SUSTAINED_S = 2.0
MAX_KEPT_SAMPLES = 1000

app = typer.Typer(add_completion=False)
PixelsFile = Annotated[Path, typer.Argument(help="uint8 [N, 1, S, S] .npy.")]
OutFolder = Annotated[Path, typer.Argument(help="Folder for result.json and logits.npy.")]
Batches = Annotated[str, typer.Option(help="Comma-separated batch sizes.")]
Idle = Annotated[float, typer.Option(help="Seconds of nothing before the one image that a radiographer waits for.")]
Device = Annotated[str, typer.Option(help="cuda, or cpu for a dry run.")]


@app.command()
def tensorrt(
    bundle: Annotated[Path, typer.Argument(help="fp32, fp16 or int8 ONNX bundle.")],
    pixels: PixelsFile,
    out: OutFolder,
    plan: Annotated[Path, typer.Option(help="Where the plan lies, or is built to.")],
    backend: Annotated[str, typer.Option(help="tensorrt or tensorrt_rtx.")] = "tensorrt",
    profile: Annotated[str, typer.Option(help="Smallest, tuned-for and largest batch.")] = "1,128,512",
    batches: Batches = "128",
    idle_s: Idle = 5.0,
) -> None:
    """Build a plan where there is none, measure it with and without CUDA graphs, and score the pixels with it."""
    from chexnet_deploy.builder.engine import build_engine
    from chexnet_deploy.sessions.trt import TrtSession

    if plan.exists():
        built = Bundle.open(plan)
    else:
        opened = Bundle.open(bundle)
        low, best, high = _numbers(profile)
        update = {"batch": BatchProfile(min=low, opt=best, max=high)}
        spec = read_spec(opened.manifest.precision.value).model_copy(update=update)
        built = build_engine(opened, spec, plan, backend=backend)  # type: ignore[arg-type]  # gpu.py names one
    assert built.manifest.engine is not None
    assert built.manifest.target is not None
    graphs, plain = TrtSession.open(built), TrtSession.open(built, with_graphs=False)
    about = {
        "engine": built.manifest.engine.model_dump(mode="json"),
        "target": built.manifest.target.model_dump(),
        "known_answer_error": built.manifest.probe_max_abs_logit_error,
        "why_no_graphs": graphs.why_no_graphs,
    }
    sessions: dict[str, Session] = {"graphs": graphs, "plain": plain}
    sizes = _numbers(batches)
    if sizes == [1]:
        sessions["bare"] = cast(Session, BareEngine(built))
    _measure(sessions, np.load(pixels), sizes, out, idle_s, about, is_on_gpu=True)
    for session in sessions.values():
        session.close()


@app.command()
def onnxruntime(
    bundle: Annotated[Path, typer.Argument(help="fp32, fp16 or int8 ONNX bundle.")],
    pixels: PixelsFile,
    out: OutFolder,
    provider: Annotated[str, typer.Option(help="cuda, or cpu for a dry run.")] = "cuda",
    batches: Batches = "1,128",
    idle_s: Idle = 5.0,
) -> None:
    """Measure ONNX Runtime on the bundle, as a user without TensorRT would run it."""
    session = open_session(Bundle.open(bundle), provider=provider)  # type: ignore[arg-type]  # gpu.py names one
    about = {"conv_types": dict(session.conv_types())}
    _measure({"plain": session}, np.load(pixels), _numbers(batches), out, idle_s, about, is_on_gpu=provider == "cuda")
    session.close()


@app.command()
def torch(
    checkpoint: Annotated[Path, typer.Argument(help="A .safetensors checkpoint.")],
    pixels: PixelsFile,
    out: OutFolder,
    mode: Annotated[str, typer.Option(help="eager-fp32, amp-fp16 or compile-fp16.")] = "eager-fp32",
    batches: Batches = "1,128",
    idle_s: Idle = 5.0,
    device: Device = "cuda",
) -> None:
    """Measure the PyTorch model as a user without TensorRT would run it."""
    import torch as pytorch

    from chexnet_deploy.export.checkpoint import read_checkpoint
    from chexnet_deploy.export.model import Normalise

    loaded = read_checkpoint(checkpoint)
    normalise: Any = Normalise(loaded.manifest.preprocessing).to(device)
    model: Any = loaded.model.eval().to(device)
    if mode != "eager-fp32":
        model = model.to(memory_format=pytorch.channels_last)
    if mode == "compile-fp16":
        model = pytorch.compile(model.half(), mode="max-autotune")

    class TorchModel:
        def run(self, batch: Pixels) -> tuple[Logits, Maps]:
            with pytorch.inference_mode():
                images = normalise(pytorch.from_numpy(batch).to(device))
                if mode == "compile-fp16":
                    images = images.half()
                with pytorch.autocast(device, dtype=pytorch.float16, enabled=mode == "amp-fp16"):
                    logits: Logits = model(images).float().cpu().numpy()
            return logits, logits  # it draws no maps, which favours it

    sessions = {"plain": cast(Session, TorchModel())}
    about = {"torch": pytorch.__version__}
    _measure(sessions, np.load(pixels), _numbers(batches), out, idle_s, about, is_on_gpu=device == "cuda")


@app.command()
def checks(
    plan: Annotated[Path, typer.Argument(help="A plan bundle.")],
    out: OutFolder,
    runs: Annotated[int, typer.Option(help="For the leak check.")] = 10_000,
) -> None:
    """Does the plan answer alike in every slot, batch size and thread, and does it leak?"""
    from benchmarks.gpu_checks import invariance, memory_growth

    bundle = Bundle.open(plan)
    result: dict[str, Any] = {"invariance": invariance(bundle).model_dump()}
    _write(out, result)
    result["growth"] = memory_growth(bundle, runs)
    _write(out, result)


@app.command()
def tests(out: OutFolder) -> None:
    """Run the tests that need a GPU; one that can't run is a failure."""
    import pytest

    os.environ["CHEXNET_REQUIRE_GPU"] = "1"
    with redirect_stdout(sys.stderr):
        code = int(
            pytest.main(
                ["-m", "gpu", "-q", "-p", "no:cacheprovider", "--rootdir", str(CHECKOUT), str(CHECKOUT / "tests")]
            )
        )
    _write(out, {"exit_code": code})
    raise typer.Exit(code)


@app.command()
def roofline(
    checkpoint: Annotated[Path, typer.Argument(help="A .safetensors checkpoint.")],
    out: OutFolder,
    device: Device = "cuda",
) -> None:
    """Measure the rates that bound any engine here, and the bound by precision and batch size."""
    import torch as pytorch

    from benchmarks.roofline import Rates, conv_costs, least_ms, measure_copy, measure_product
    from chexnet_deploy.export.checkpoint import read_checkpoint

    loaded = read_checkpoint(checkpoint)
    resize_px = loaded.manifest.preprocessing.resize_px
    costs = conv_costs(loaded.model.eval(), pytorch.zeros(1, 3, resize_px, resize_px))
    on_gpu = device == "cuda"
    copy = measure_copy(device, (1 << 30) if on_gpu else (1 << 24))
    side, bound, errors = 8192 if on_gpu else 256, {}, {}
    pytorch.backends.cuda.matmul.allow_tf32 = False  # the fp32 engines have none either
    for precision, dtype, n_bytes in (
        ("fp32", pytorch.float32, 4),
        ("fp16", pytorch.float16, 2),
        ("int8", pytorch.int8, 1),
    ):
        try:
            rates = Rates(copy, measure_product(device, dtype, side), n_bytes)
        except RuntimeError as err:  # an operation that this torch lacks here
            errors[precision] = str(err)
            continue
        bound[precision] = {
            **asdict(rates),
            "least_ms": {str(batch): least_ms(costs, batch, rates) for batch in (1, 8, 32, 128, 512)},
        }
    _write(
        out,
        {
            "gmacs_per_image": sum(cost.macs for cost in costs) / 1e9,
            "elements_per_image": sum(cost.inputs + cost.outputs for cost in costs),
            "weights": sum(cost.weights for cost in costs),
            "bound": bound,
            "errors": errors,
        },
    )


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _write(out: Path, result: Mapping[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "result.json").write_text(json.dumps(result))


def _measure(
    sessions: Mapping[str, Session],
    pixels: Pixels,
    sizes: list[int],
    out: Path,
    idle_s: float,
    about: Mapping[str, Any],
    *,
    is_on_gpu: bool,
) -> None:
    """Time the sessions in turns at each batch size, host array to host array; then score all pixels with the first."""
    meter = _open_meter(about) if is_on_gpu else None
    best = next(iter(sessions.values()))
    result: dict[str, Any] = {**about, "batches": {}}
    for size in sizes:
        batch = np.resize(pixels, (size, *pixels.shape[1:]))
        for session in sessions.values():  # the clock has risen when the window opens
            _run_for(session, batch, 0.5)
        with meter or nullcontext():
            reports = measure_latency(
                sessions,
                batch,
                "single_stream" if size == 1 else "offline",
                min_runs=MIN_RUNS,
                min_duration_s=MIN_SECONDS,
            )
        entry: dict[str, Any] = {name: _summary(report) for name, report in reports.items()}
        entry["clocks"] = _reading(meter)
        with meter or nullcontext():
            seconds, runs = _run_for(best, batch, SUSTAINED_S)
        entry["sustained"] = {"images_per_s": size * runs / seconds, **_reading(meter)}
        energy = entry["sustained"].get("energy_j")
        entry["sustained"]["mj_per_image"] = None if energy is None else 1000.0 * energy / (size * runs)
        entry["stage_times_ms"] = dict(best.stage_times_ms(batch)) if hasattr(best, "stage_times_ms") else {}
        if size == 1:
            time.sleep(idle_s)
            entry["after_idle_ms"] = {name: _one_ms(session, batch) for name, session in sessions.items()}
        result["batches"][str(size)] = entry
        _write(out, result)
    step = max(sizes)
    np.save(
        out / "logits.npy", np.concatenate([best.run(pixels[i : i + step])[0] for i in range(0, len(pixels), step)])
    )


def _open_meter(about: Mapping[str, Any]) -> Meter | None:
    try:
        return Meter()
    except ImportError:
        return None  # _reading says so in every row


def _reading(meter: Meter | None) -> dict[str, Any]:
    if meter is None or meter.reading is None:
        return {"invalid": "clocks were not watched: nvidia-ml-py is not installed"}
    return {**asdict(meter.reading), "invalid": meter.reading.why_invalid}


def _summary(report: LatencyReport) -> dict[str, Any]:
    kept = [round(ms, 4) for ms in report.samples_ms[:MAX_KEPT_SAMPLES]]
    return {
        "p50_ms": report.p50_ms,
        "p90_ms": report.p90_ms,
        "p99_ms": report.p99_ms,
        "images_per_s": report.images_per_s,
        "n_runs": len(report.samples_ms),
        "samples_ms": kept,
    }


def _run_for(session: Session, batch: Pixels, seconds: float) -> tuple[float, int]:
    start, runs = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds or runs == 0:
        session.run(batch)
        runs += 1
    return elapsed, runs


def _one_ms(session: Session, batch: Pixels) -> float:
    start = time.perf_counter()
    session.run(batch)
    return 1000.0 * (time.perf_counter() - start)


if __name__ == "__main__":
    run_program(app)
