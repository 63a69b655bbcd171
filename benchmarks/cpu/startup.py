"""How long a scanner waits: from starting the program to its first verified result, and for the first image after minutes idle.

    python -m benchmarks.cpu.startup BUNDLE IMAGE [--idle-s 60]      writes results/startup-cpu.json
    python -m benchmarks.cpu.startup --table                         prints it as docs/embedding.md shows it

A start is a new process that opens the bundle (hashes, known answers), predicts IMAGE once and ends; its clock begins before Python
does. Every provider has as many starts, in turns, so all but the first find the files in the system's memory. The node's start ends
when the destination has the report. Idle: one Predictor in this process answers, sleeps, and answers again, timed.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any, Final

import typer

from benchmarks.common import RESULTS, checkout_environment, write_results
from benchmarks.rigs.node_rig import NodeProcess, Pacs, find_dcmtk, store, write_radiograph
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.runtime.predictor import Predictor
from chexnet_deploy.runtime.sessions.base import Provider
from chexnet_deploy.terminal import run_program

OUT = RESULTS / "startup-cpu.json"
PROVIDERS: Final[tuple[Provider, ...]] = ("openvino", "cpu")
START_BAR_S: Final = 5.0
IDLE_BAR: Final = 2.0

# What a program of ten lines does; prints its memory at the end, in KiB.
_PROGRAM: Final = """
import resource, sys
from chexnet_deploy import Predictor
with Predictor.open(sys.argv[1], provider=sys.argv[3]) as predictor:
    predictor.predict(sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""

app = typer.Typer(add_completion=False)


@app.command()
def main(
    bundle: Annotated[Path | None, typer.Argument(help="A bundle.")] = None,
    image: Annotated[Path | None, typer.Argument(help="A radiograph.")] = None,
    starts: Annotated[int, typer.Option(min=3, help="Of each program.")] = 7,
    idle_s: Annotated[float, typer.Option(min=0.0, help="Before each answer after idling.")] = 60.0,
    idles: Annotated[int, typer.Option(min=1, help="Of each provider.")] = 5,
    out: Annotated[Path, typer.Option(help="JSON to write.")] = OUT,
    table: Annotated[bool, typer.Option("--table", help="Print the committed results and stop.")] = False,
) -> None:
    """Measure, print and write."""
    if table:
        typer.echo(markdown_table(json.loads(OUT.read_text())))
        return
    if bundle is None or image is None:
        raise typer.BadParameter("give a bundle and a radiograph")
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
    typer.echo(write_results(out, results))


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


def _starts(bundle: Path, image: Path, n_starts: int) -> Mapping[str, object]:
    """Return seconds of every start and the most memory, by provider."""
    seconds: dict[str, list[float]] = {provider: [] for provider in PROVIDERS}
    peak_mib: dict[str, float] = {}
    for _ in range(n_starts):
        for provider in PROVIDERS:
            start = perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", _PROGRAM, str(bundle), str(image), provider],
                check=True,
                capture_output=True,
                text=True,
                env=checkout_environment(),
            )
            seconds[provider].append(round(perf_counter() - start, 3))
            peak_mib[provider] = max(peak_mib.get(provider, 0.0), round(int(done.stdout) / 1024, 1))
    return {provider: {**_summary(seconds[provider]), "peak_memory_mib": peak_mib[provider]} for provider in PROVIDERS}


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
