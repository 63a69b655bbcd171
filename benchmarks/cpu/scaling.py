"""What one image costs on its way from a file to a row: the measured figures that docs/scaling.md calculates with.

    python -m benchmarks.cpu.scaling BUNDLE IMAGES [--dicom FILE]...    measures, and writes results/scaling-cpu.json
    python -m benchmarks.cpu.scaling --table                            prints the tables of docs/scaling.md

Costs are core time, of this process and of the one that decodes DICOM, so that other work on the machine counts for little.
Stages take turns. What the model costs is in results/peers-cpu.json.
"""

import resource
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Final

import pydicom
import typer

from benchmarks.cpu.scaling_page import OUT, Input, Results, markdown, read_peers
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.evaluation.machine import describe_machine
from chexnet_deploy.files import FileContent
from chexnet_deploy.images import ImageReader, Preprocessing, find_images
from chexnet_deploy.runtime.predictor import FileAnswer, Predictor
from chexnet_deploy.runtime.table import Row, TableCard, row_of
from chexnet_deploy.runtime.table_file import open_table
from chexnet_deploy.terminal import run_program

N_ROWS: Final = 20_000
N_DICOM_READS: Final = 5

app = typer.Typer(add_completion=False)


@app.command()
def main(
    bundle: Annotated[Path | None, typer.Argument(help="A bundle.")] = None,
    images: Annotated[Path | None, typer.Argument(help="A folder of PNG radiographs, as NIH ships them.")] = None,
    dicom: Annotated[list[Path] | None, typer.Option(help="A DICOM radiograph; one for each transfer syntax.")] = None,
    n_images: Annotated[int, typer.Option(min=2, help="PNGs, at the most.")] = 100,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    table: Annotated[bool, typer.Option("--table", help="Print the tables, measure nothing.")] = False,
    out: Annotated[Path, typer.Option(help="The JSON.")] = OUT,
) -> None:
    """Measure, or print what was measured."""
    if not table:
        if bundle is None or images is None:
            raise typer.BadParameter("give a bundle and a folder of PNGs, or --table")
        pngs = list(find_images([images]).paths())[:n_images]
        results = measure(Bundle.open(bundle), pngs, dicom or [], rounds)
        out.write_text(results.model_dump_json(indent=1) + "\n")
    typer.echo(markdown(Results.model_validate_json(out.read_text()), read_peers()))


def measure(bundle: Bundle, pngs: Sequence[Path], dicom: Sequence[Path], rounds: int) -> Results:
    """Return every figure, the stages in turns."""
    files = {"PNG": list(pngs)} | {_syntax(path): [path] * N_DICOM_READS for path in dicom}
    core_ms: dict[str, list[float]] = {name: [] for name in files}
    row_core_us: list[float] = []
    with Predictor.of(bundle, threads=1) as predictor:
        answer = predictor.predict(pngs[0])
    card = _card(bundle)
    row = row_of(card, pngs[0].name, FileAnswer(pngs[0], answer, FileContent.of(pngs[0].read_bytes())))
    for turn in range(rounds):
        for name in list(files)[:: -1 if turn % 2 else 1]:
            core_ms[name].append(_decode_core_ms(bundle.manifest.preprocessing, files[name]))
        seconds = _core_s(lambda: _write_rows(card, row))
        row_core_us.append(1e6 * seconds / N_ROWS)
    with ImageReader() as reader:
        shapes = {name: reader.read(paths[0]).shape for name, paths in files.items()}
    return Results(
        machine=describe_machine(),
        resize_px=bundle.manifest.preprocessing.resize_px,
        inputs={
            name: Input(
                shape=(shapes[name][0], shapes[name][1]),
                n_files=len(set(paths)),
                median_kb=median(path.stat().st_size for path in paths) / 1e3,
                core_ms=tuple(round(ms, 3) for ms in core_ms[name]),
            )
            for name, paths in files.items()
        },
        row_bytes=len(row.line),
        row_core_us=tuple(round(us, 3) for us in row_core_us),
    )


def _decode_core_ms(preprocessing: Preprocessing, paths: Sequence[Path]) -> float:
    """Return the core time from a file to pixels, without that of starting what decodes."""

    def carry(some: Sequence[Path]) -> None:
        with ImageReader() as reader:  # closed, so that its process has ended and is counted
            for path in some:
                preprocessing(reader.read(path))

    start = _core_s(lambda: carry(paths[:1]))
    return 1e3 * (_core_s(lambda: carry(paths)) - start) / (len(paths) - 1)


def _write_rows(card: TableCard, row: Row) -> None:
    with tempfile.TemporaryDirectory(prefix="chexnet-scaling-") as place:
        names = [f"{number:08d}_000.png" for number in range(N_ROWS)]
        with open_table(Path(place) / "table.csv", card, names) as table:
            for _ in range(N_ROWS):
                table.add(row)


def _card(bundle: Bundle) -> TableCard:
    return TableCard(
        bundle=bundle.id,
        preprocessing=bundle.manifest.preprocessing,
        findings=bundle.manifest.findings,
        operating_points=bundle.manifest.operating_points,
        backend="cpu",
        threads=1,
        batch_size=1,
        n_images=N_ROWS,
        images_sha256="0" * 64,
    )


def _core_s(work: Callable[[], object]) -> float:
    before = _spent_s()
    work()
    return _spent_s() - before


def _spent_s() -> float:
    """Return the core time of this process and of those that it saw end."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _syntax(path: Path) -> str:
    return f"DICOM, {pydicom.dcmread(path, stop_before_pixels=True).file_meta.TransferSyntaxUID.name}"


if __name__ == "__main__":
    run_program(app)
