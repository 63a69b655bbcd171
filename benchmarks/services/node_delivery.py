"""How long a report takes from a scanner to the archive: from C-STORE acknowledged, and from its first byte, to the report there.

    python -m benchmarks.services.node_delivery BUNDLE REDUCED RADIOGRAPH JPEG2000      writes results/node-delivery-cpu.json
    python -m benchmarks.services.node_delivery --table                                 prints it as docs/dicom-node.md shows it

BUNDLE reads every pixel and REDUCED a smaller JPEG 2000 picture; RADIOGRAPH is an uncompressed DICOM file, JPEG2000 the same
radiograph compressed. A node that tests itself as often as any other sends reports alone to DCMTK's storescp, all on loopback. Each
image comes in an association of its own, under a new UID. The model's time is the median of single images in this process, one
after each report.
"""

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Final

import numpy as np
import typer
from pydicom import dcmread
from pydicom.uid import generate_uid

from benchmarks.common import RESULTS, write_results
from benchmarks.rigs.node_rig import NodeProcess, Pacs, find_dcmtk, store
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.runtime.sessions.open import open_session
from chexnet_deploy.terminal import run_program

OUT: Final = RESULTS / "node-delivery-cpu.json"
BARS: Final = {"uncompressed": 20, "jpeg2000": 100, "jpeg2000-reduced": 40}
"""Model times that the 99th percentile from acknowledged may take."""
WARM_UP: Final = 5
PAUSE_S: Final = 0.3
PATIENCE_S: Final = 30.0

app = typer.Typer(add_completion=False)


@app.command()
def main(
    bundle: Annotated[Path | None, typer.Argument(help="Reads every pixel.")] = None,
    reduced: Annotated[Path | None, typer.Argument(help="Reads a smaller JPEG 2000 picture.")] = None,
    radiograph: Annotated[Path | None, typer.Argument(help="An uncompressed DICOM file.")] = None,
    jpeg2000: Annotated[Path | None, typer.Argument(help="A DICOM file in JPEG 2000.")] = None,
    n: Annotated[int, typer.Option("-n", min=2, help="Images of each kind.")] = 100,
    out: Annotated[Path, typer.Option(help="JSON to write.")] = OUT,
    table: Annotated[bool, typer.Option("--table", help="Print the committed results and stop.")] = False,
) -> None:
    """Measure, print and write."""
    if table:
        typer.echo(markdown_table(json.loads(OUT.read_text())))
        return
    program = find_dcmtk("storescp")
    if bundle is None or reduced is None or radiograph is None or jpeg2000 is None or program is None:
        raise typer.BadParameter("give two bundles and two DICOM files, and install DCMTK")
    sources = dict(zip(BARS, ((bundle, radiograph), (bundle, jpeg2000), (reduced, jpeg2000)), strict=True))
    typer.echo(write_results(out, measure(sources, program, n)))


def measure(sources: Mapping[str, tuple[Path, Path]], program: str, n: int) -> dict[str, Any]:
    """Return milliseconds by kind.

    Args:
        sources: kind -> bundle and DICOM file.
        program: DCMTK's storescp.
        n: images of each kind.
    """
    opened = Bundle.open(next(iter(sources.values()))[0])
    session, pixels = open_session(opened), opened.read_probe().pixels
    sent_ms: dict[str, list[float]] = {kind: [] for kind in sources}
    there_ms: dict[str, list[float]] = {kind: [] for kind in sources}
    model_ms: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        for kind, (bundle, file) in sources.items():
            node = NodeProcess(Path(name) / f"node-{kind}", bundle, max_pictures=0)
            archive = Pacs(Path(name) / f"archive-{kind}", node.pacs_port, program).start()
            try:
                node.start()
                for turn in range(n + WARM_UP):
                    sent, there = _deliver(node, archive, file)
                    if turn >= WARM_UP:
                        sent_ms[kind].append(sent)
                        there_ms[kind].append(there)
                    model_ms.append(_time_ms(lambda: session.run(pixels[:1])))
                    time.sleep(PAUSE_S)
            finally:
                node.kill()
                archive.stop()
    session.close()
    model = median(model_ms)
    return {
        "resize_px": opened.manifest.preprocessing.resize_px,
        "precision": opened.manifest.precision.value,
        "n": n,
        "model_p50_ms": round(model, 2),
        "kinds": {kind: summarise(sent_ms[kind], there_ms[kind], model, BARS[kind]) for kind in sources},
    }


def markdown_table(results: Mapping[str, Any]) -> str:
    """Return the results as a table for people."""
    lines = [
        "| file | sent and acknowledged | from there to the report at the archive | p99 in model times |",
        "|---|---|---|---|",
    ]
    for kind, row in results["kinds"].items():
        cells = [f"{row[part]['p50_ms']:.0f} ({row[part]['p99_ms']:.0f}) ms" for part in ("sent", "delivered")]
        lines.append(f"| {kind} | {cells[0]} | {cells[1]} | {row['p99_model_times']:.0f} |")
    machine = results["machine"]
    lines += [
        "",
        f"{results['precision']} bundle, {results['resize_px']} px, reports alone; median (99th percentile) of {results['n']} "
        f"images; the model alone takes {results['model_p50_ms']:.1f} ms. {machine['processor']}, {machine['cores']} cores.",
    ]
    return "\n".join(lines)


def _deliver(node: NodeProcess, archive: Pacs, file: Path) -> tuple[float, float]:
    """Send a radiograph under a new UID; return milliseconds to its acknowledgement, and from there to the report's arrival."""
    image = dcmread(file)
    image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    n_before, start = len(archive.paths()), time.perf_counter()
    if store(node.port, [image]) != [0]:
        raise RuntimeError(f"the node did not take {file}")
    acknowledged = time.perf_counter()
    while len(archive.paths()) == n_before:
        if time.perf_counter() - start > PATIENCE_S:
            raise RuntimeError(f"no report of {file} after {PATIENCE_S:g} s: {node.journal.read_text()[-2000:]}")
        time.sleep(0.001)
    return (acknowledged - start) * 1e3, (time.perf_counter() - acknowledged) * 1e3


def _time_ms(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return (time.perf_counter() - start) * 1e3


def summarise(sent_ms: list[float], delivered_ms: list[float], model_ms: float, bar: int) -> dict[str, object]:
    """Return one kind's percentiles, and its 99th in model times."""
    parts = {"sent": sent_ms, "delivered": delivered_ms}
    p99 = float(np.percentile(delivered_ms, 99))
    return {
        **{
            name: {"p50_ms": round(median(values), 1), "p99_ms": round(float(np.percentile(values, 99)), 1)}
            for name, values in parts.items()
        },
        "p99_model_times": round(p99 / model_ms, 1),
        "bar_model_times": bar,
    }


if __name__ == "__main__":
    run_program(app)
