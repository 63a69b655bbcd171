"""One engine or one torch baseline, measured in a process of its own: what crashes here costs one row of the benchmark.

    python -m benchmarks.gpu_worker tensorrt BUNDLE PIXELS OUT --backend tensorrt --batches 1,128
    python -m benchmarks.gpu_worker torch CHECKPOINT PIXELS OUT --mode compile-fp16 --batches 128

Started by gpu.py with the interpreter that has what is asked for. OUT gets timings.json after every batch size, and
logits.npy: float32 [N, C] of all PIXELS (uint8 [N, 1, S, S] .npy).
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from chexnet_deploy.bundle import Bundle
from chexnet_deploy.cli import run_program
from chexnet_deploy.preprocessing import Pixels
from chexnet_deploy.sessions import Logits, open_session
from chexnet_deploy.spec import BatchProfile, read_spec

MIN_RUNS = 50
MIN_SECONDS = 1.0
Run = Callable[[Pixels], Logits]

app = typer.Typer(add_completion=False)
PixelsFile = Annotated[Path, typer.Argument(help="uint8 [N, 1, S, S] .npy.")]
OutFolder = Annotated[Path, typer.Argument(help="Folder for timings.json and logits.npy.")]
Batches = Annotated[str, typer.Option(help="Comma-separated batch sizes.")]
Idle = Annotated[float, typer.Option(help="Seconds of nothing before the one image that a radiographer waits for.")]


@app.command()
def tensorrt(
    bundle: Annotated[Path, typer.Argument(help="fp32, fp16 or int8 ONNX bundle.")],
    pixels: PixelsFile,
    out: OutFolder,
    backend: Annotated[str, typer.Option(help="tensorrt, tensorrt_rtx, or onnxruntime for a dry run.")] = "tensorrt",
    batches: Batches = "1,128",
    idle_s: Idle = 5.0,
) -> None:
    """Build a plan, measure it, and score the pixels with it."""
    opened, sizes, about = Bundle.open(bundle), _sizes(batches), {}
    if backend != "onnxruntime":
        from chexnet_deploy.builder.engine import build_engine

        precision = opened.manifest.precision.value
        profile = BatchProfile(min=1, opt=max(sizes), max=max(sizes))
        spec = read_spec(precision).model_copy(update={"batch": profile})
        opened = build_engine(opened, spec, out / "plan", backend=backend)  # type: ignore[arg-type]  # gpu.py names one
        assert opened.manifest.engine is not None
        assert opened.manifest.target is not None
        about = {
            "engine": opened.manifest.engine.model_dump(mode="json"),
            "target": opened.manifest.target.model_dump(),
        }
    session = open_session(opened)
    _measure(lambda batch: session.run(batch)[0], np.load(pixels), sizes, out, idle_s, about)
    session.close()


@app.command()
def torch(
    checkpoint: Annotated[Path, typer.Argument(help="A .safetensors checkpoint.")],
    pixels: PixelsFile,
    out: OutFolder,
    mode: Annotated[str, typer.Option(help="eager-fp32, amp-fp16 or compile-fp16.")] = "eager-fp32",
    batches: Batches = "1,128",
    idle_s: Idle = 5.0,
    device: Annotated[str, typer.Option(help="cuda, or cpu for a dry run.")] = "cuda",
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

    def run(batch: Pixels) -> Logits:
        with pytorch.inference_mode():
            images = normalise(pytorch.from_numpy(batch).to(device))
            if mode == "compile-fp16":
                images = images.half()
            with pytorch.autocast(device, dtype=pytorch.float16, enabled=mode == "amp-fp16"):
                logits: Logits = model(images).float().cpu().numpy()
        return logits

    _measure(run, np.load(pixels), _sizes(batches), out, idle_s, {"torch": pytorch.__version__})


def _sizes(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _measure(run: Run, pixels: Pixels, sizes: list[int], out: Path, idle_s: float, about: dict[str, Any]) -> None:
    """Time each batch size from host array to host array, write after each, then score all pixels."""
    out.mkdir(parents=True, exist_ok=True)
    timings: dict[str, Any] = {}
    for size in sizes:
        batch = np.resize(pixels, (size, *pixels.shape[1:]))
        samples_ms = _samples_ms(run, batch)
        timings[str(size)] = {
            "samples_ms": samples_ms,
            "p50_ms": float(np.percentile(samples_ms, 50)),
            "p90_ms": float(np.percentile(samples_ms, 90)),
            "p99_ms": float(np.percentile(samples_ms, 99)),
            "images_per_s": 1000.0 * size * len(samples_ms) / sum(samples_ms),
        }
        if size == 1:
            time.sleep(idle_s)
            timings["1"]["after_idle_ms"] = _one_ms(run, batch)
        (out / "timings.json").write_text(json.dumps({**about, "batches": timings}))
    step = max(sizes)
    parts: list[NDArray[np.float32]] = [run(pixels[i : i + step]) for i in range(0, len(pixels), step)]
    np.save(out / "logits.npy", np.concatenate(parts))


def _samples_ms(run: Run, batch: Pixels) -> list[float]:
    for _ in range(5):
        run(batch)
    samples: list[float] = []
    while len(samples) < MIN_RUNS or sum(samples) < 1000.0 * MIN_SECONDS:
        samples.append(_one_ms(run, batch))
    return samples


def _one_ms(run: Run, batch: Pixels) -> float:
    start = time.perf_counter()
    run(batch)
    return 1000.0 * (time.perf_counter() - start)


if __name__ == "__main__":
    run_program(app)
