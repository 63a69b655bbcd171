"""How long a scanner waits: from starting the program to its first verified result, and for the first image after minutes idle.

    python -m benchmarks.cpu.startup BUNDLE IMAGE [--idle-s 60]      writes results/startup-cpu.json
    python -m benchmarks.cpu.startup --table                         prints it as docs/embedding.md shows it
    python -m benchmarks.cpu.startup BUNDLE IMAGE --embedded         writes results/startup-embedded-cpu.json
    python -m benchmarks.cpu.startup --embedded --table              prints that

A start is a new process that opens the bundle (hashes, known answers), predicts IMAGE once and ends; its clock begins before
Python does. Every provider has as many starts, in turns, after one that isn't counted, so all find the files in the system's
memory, and the bytecode that pip leaves with an installed package. The node's start ends when the destination has the report. Idle:
one Predictor in this process answers, sleeps, and answers again, timed.

--embedded: Predictor beside examples/embed_c, which does the same, and beside ten lines of Python over the bare library, which
verify nothing. The C program is given the picture's pixels, as it decodes none.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any, Final, NamedTuple

import typer
from PIL import Image

from benchmarks.common import RESULTS, checkout_environment, resident_mib, write_results
from benchmarks.rigs.embedded_c import FOLDER, build, find_libraries
from benchmarks.rigs.node_rig import NodeProcess, Pacs, find_dcmtk, store, write_radiograph
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.runtime.predictor import Predictor
from chexnet_deploy.runtime.sessions.base import Provider
from chexnet_deploy.terminal import run_program

OUT = RESULTS / "startup-cpu.json"
PROVIDERS: Final[tuple[Provider, ...]] = ("openvino", "cpu")
OUT_EMBEDDED: Final = RESULTS / "startup-embedded-cpu.json"
START_BAR_S: Final = 5.0
IDLE_BAR: Final = 2.0

# What a program of ten lines does.
_PROGRAM: Final = """
import sys
from chexnet_deploy import Predictor
with Predictor.open(sys.argv[1], provider=sys.argv[3]) as predictor:
    predictor.predict(sys.argv[2])
"""

_BARE: Final = {
    "openvino": """
import sys
import numpy, openvino
from PIL import Image
pixels = numpy.asarray(Image.open(sys.argv[2]).convert("L").resize((int(sys.argv[3]),) * 2, Image.Resampling.BILINEAR))
core = openvino.Core()
model = core.read_model(sys.argv[1] + "/model.onnx")
model.reshape([1, 1, *pixels.shape])
request = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
request.infer({0: pixels[None, None]})
""",
    "onnxruntime": """
import sys
import numpy, onnxruntime
from PIL import Image
pixels = numpy.asarray(Image.open(sys.argv[2]).convert("L").resize((int(sys.argv[3]),) * 2, Image.Resampling.BILINEAR))
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx", providers=["CPUExecutionProvider"])
session.run(None, {"pixels": pixels[None, None]})
""",
}

app = typer.Typer(add_completion=False)


@app.command()
def main(
    bundle: Annotated[Path | None, typer.Argument(help="A bundle.")] = None,
    image: Annotated[Path | None, typer.Argument(help="A radiograph.")] = None,
    starts: Annotated[int, typer.Option(min=3, help="Of each program.")] = 7,
    idle_s: Annotated[float, typer.Option(min=0.0, help="Before each answer after idling.")] = 60.0,
    idles: Annotated[int, typer.Option(min=1, help="Of each provider.")] = 5,
    out: Annotated[Path | None, typer.Option(help="JSON to write.")] = None,
    embedded: Annotated[
        bool, typer.Option("--embedded", help="Predictor beside C and bare libraries; starts alone.")
    ] = False,
    table: Annotated[bool, typer.Option("--table", help="Print the committed results and stop.")] = False,
) -> None:
    """Measure, print and write."""
    if table:
        typer.echo(
            embedded_table(json.loads(OUT_EMBEDDED.read_text()))
            if embedded
            else markdown_table(json.loads(OUT.read_text()))
        )
        return
    if bundle is None or image is None:
        raise typer.BadParameter("give a bundle and a radiograph")
    if embedded:
        typer.echo(write_results(out or OUT_EMBEDDED, _embedded_starts(bundle, image, starts)))
        return
    manifest = Bundle.open(bundle).manifest
    results = {
        "resize_px": manifest.preprocessing.resize_px,
        "precision": manifest.precision.value,
        "start_bar_s": START_BAR_S,
        "idle_bar": IDLE_BAR,
        "start_to_first_result": _starts(bundle, image, starts),
        "node_start_to_first_report": _node_starts(bundle, starts),
        "idle_s": idle_s,
        "first_after_idle": {provider: _idle(bundle, image, provider, idle_s, idles) for provider in PROVIDERS},
    }
    typer.echo(write_results(out or OUT, results))


def markdown_table(results: Mapping[str, Any]) -> str:
    """Return the results as a table for people."""
    lines = [
        "| program | start to first result, median (worst) | most memory | p50 of one image | first image after idling, worst of "
        f"{len(results['first_after_idle']['cpu']['first_ms'])} |",
        "|---|---|---|---|---|",
    ]
    for provider, name in zip(PROVIDERS, ("Predictor on OpenVINO", "Predictor on ONNX Runtime"), strict=True):
        start, idle = results["start_to_first_result"][provider], results["first_after_idle"][provider]
        lines.append(
            f"| {name} | {start['median_s']:.1f} s ({start['worst_s']:.1f} s) | {start['peak_memory_mib']:.0f} MiB "
            f"| {idle['steady_p50_ms']:.1f} ms | {max(idle['first_ms']):.1f} ms, {idle['worst_first_over_steady']:.2f} x p50 |"
        )
    node = results["node_start_to_first_report"]
    lines.append(
        f"| node, to the report at its destination | {node['median_s']:.1f} s ({node['worst_s']:.1f} s) | | | |"
    )
    machine = results["machine"]
    lines += [
        "",
        f"{results['precision']} bundle, {results['resize_px']} px; a result is a PNG of 1024 x 1024 px read and answered; idle "
        f"for {results['idle_s']:.0f} s. {machine['processor']}.",
    ]
    return "\n".join(lines)


def embedded_table(results: Mapping[str, Any]) -> str:
    """Return the results of --embedded as a table for people."""
    lines = [
        "| program | start to first result, median (worst) | processor time | most memory "
        "| beside Predictor: time | processor time | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in results["programs"].items():
        lines.append(
            f"| {name} | {row['median_s']:.2f} s ({row['worst_s']:.2f} s) | {row['processor_s']:.2f} s "
            f"| {row['peak_memory_mib']:.0f} MiB | {row['time_ratio']:.2f} | {row['processor_ratio']:.2f} "
            f"| {row['memory_ratio']:.2f} |"
        )
    machine = results["machine"]
    lines += [
        "",
        f"{results['precision']} bundle, {results['resize_px']} px; {results['starts']} starts of each, in turns; ratios are "
        f"medians of each turn's. {machine['processor']}, {machine['cores']} cores{results['load']}.",
    ]
    return "\n".join(lines)


def _embedded_starts(bundle: Path, image: Path, n_starts: int) -> Mapping[str, object]:
    """Return seconds and memory of every program, and their ratios to the Predictor's on the same library."""
    manifest = Bundle.open(bundle).manifest
    side_px = str(manifest.preprocessing.resize_px)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder, python = Path(name), [sys.executable, "-c"]
        Image.open(image).convert("L").save(folder / "image.pgm")
        families: dict[str, dict[str, list[str]]] = {}
        for library in find_libraries():
            title = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime"}[library]
            provider = {"openvino": "openvino", "onnxruntime": "cpu"}[library]
            program = build(folder / f"embed-{library}", library, source=FOLDER / "main.c")
            families[library] = {
                f"Predictor on {title}": [*python, _PROGRAM, str(bundle), str(image), provider],
                f"examples/embed_c on {title}": [str(program), str(bundle), str(folder / "image.pgm")],
                f"bare {title} in Python, nothing verified": [
                    *python,
                    _BARE[library],
                    str(bundle),
                    str(image),
                    side_px,
                ],
            }
        measured: dict[str, list[_Started]] = {}
        for turn in range(n_starts + 1):
            for family in families.values():
                for title, command in family.items():
                    started = _start(command, folder / "bytecode")
                    if turn:
                        measured.setdefault(title, []).append(started)
    programs: dict[str, object] = {}
    for family in families.values():
        peers = measured[next(iter(family))]
        for title in family:
            own = measured[title]
            programs[title] = {
                **_summary([each.seconds for each in own]),
                "processor_s": round(median(each.processor_s for each in own), 3),
                "peak_memory_mib": max(each.peak_mib for each in own),
                **{
                    f"{name}_ratio": round(
                        median(getattr(a, field) / getattr(b, field) for a, b in zip(own, peers, strict=True)), 3
                    )
                    for name, field in (("time", "seconds"), ("processor", "processor_s"), ("memory", "peak_mib"))
                },
            }
    return {
        "resize_px": int(side_px),
        "precision": manifest.precision.value,
        "starts": n_starts,
        "load": "" if load < 1 else f", busy with other work (load {load:.0f})",
        "programs": programs,
    }


class _Started(NamedTuple):
    seconds: float
    processor_s: float
    peak_mib: float


def _start(command: Sequence[str], bytecode: Path) -> _Started:
    """Run a program to its end; its memory is looked at every 2 ms."""
    before, peak, start = _children_s(), 0.0, perf_counter()
    process = subprocess.Popen(
        command, env=_environment(bytecode), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None:
        # Not by getrusage: its figure of a child begins with its parent's.
        peak = max(peak, resident_mib(process.pid, "VmHWM"))
        time.sleep(0.002)
    seconds = perf_counter() - start
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return _Started(round(seconds, 3), round(_children_s() - before, 3), round(peak, 1))


def _environment(bytecode: Path) -> dict[str, str]:
    """Return the checkout's environment for a Python that keeps its bytecode in a folder."""
    return {**checkout_environment(), "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(bytecode)}


def _children_s() -> float:
    """Return the processor time of this process's children that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def _starts(bundle: Path, image: Path, n_starts: int) -> Mapping[str, object]:
    """Return seconds of every start and the most memory, by provider."""
    started: dict[str, list[_Started]] = {provider: [] for provider in PROVIDERS}
    with tempfile.TemporaryDirectory() as bytecode:
        for turn in range(n_starts + 1):
            for provider in PROVIDERS:
                command = [sys.executable, "-c", _PROGRAM, str(bundle), str(image), provider]
                each = _start(command, Path(bytecode))
                if turn:
                    started[provider].append(each)
    return {
        provider: {
            **_summary([each.seconds for each in starts]),
            "peak_memory_mib": max(each.peak_mib for each in starts),
        }
        for provider, starts in started.items()
    }


def _node_starts(bundle: Path, n_starts: int) -> Mapping[str, object] | str:
    """Return seconds from starting a node to the report of the first image at its destination."""
    storescp = find_dcmtk("storescp")
    if storescp is None:
        return "not measured: DCMTK is not installed"
    seconds = []
    for i in range(n_starts):
        with tempfile.TemporaryDirectory() as folder:
            node = NodeProcess(Path(folder) / "node", bundle)
            pacs = Pacs(Path(folder) / "pacs", node.pacs_port, storescp).start()
            image = write_radiograph(Path(folder) / "a.dcm", seed=i, side_px=1024)
            start = perf_counter()
            node.start()
            assert store(node.port, [image]) == [0]
            while not pacs.paths():
                time.sleep(0.01)
            seconds.append(round(perf_counter() - start, 3))
            node.stop()
            pacs.stop()
    return _summary(seconds)


def _idle(bundle: Path, image: Path, provider: Provider, idle_s: float, n_idles: int) -> Mapping[str, object]:
    """Return ms of the steady median and of each first answer after idling."""

    def answer_ms() -> float:
        start = perf_counter()
        predictor.predict(image)
        return (perf_counter() - start) * 1e3

    with Predictor.open(bundle, provider=provider) as predictor:
        for _ in range(20):
            answer_ms()
        steady = median(answer_ms() for _ in range(200))
        firsts = []
        for _ in range(n_idles):
            time.sleep(idle_s)
            firsts.append(answer_ms())
    return {
        "steady_p50_ms": round(steady, 2),
        "first_ms": [round(ms, 2) for ms in firsts],
        "median_first_over_steady": round(median(firsts) / steady, 3),
        "worst_first_over_steady": round(max(firsts) / steady, 3),
    }


def _summary(seconds: Sequence[float]) -> dict[str, object]:
    return {"median_s": round(median(seconds), 3), "worst_s": max(seconds), "seconds": list(seconds)}


if __name__ == "__main__":
    run_program(app)
