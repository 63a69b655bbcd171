"""The chain on real radiographs: train, export, quantise, bench; results as JSON and as the README's table.

    python -m benchmarks.cpu.real --data ROOT      measure, write results/real-cpu.json
    python -m benchmarks.cpu.real --table          print the README's table from the committed results

Trains from scratch on whatever train_val images are on disk, so with few images the AUROC is modest; it is reported as
it is. Test patients are used for the final measurement only.
"""

import gzip
import json
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image

from benchmarks.common import RESULTS
from chexnet_deploy.datasets.chestxray14 import ChestXray14
from chexnet_deploy.evaluation.bench_report import BenchReport, summary_rows
from chexnet_deploy.evaluation.engines import Effort
from chexnet_deploy.terminal import progress, run_program
from training.chain import RUN, train_export_bench
from training.logbook import METRICS

OUT = RESULTS / "real-cpu.json.gz"
CALIBRATION_IMAGES = 256
FULL_SIDE_PX = 1024

app = typer.Typer(add_completion=False)


@app.command()
def main(
    data: Annotated[Path | None, typer.Option(help="ChestX-ray14.", envvar="CHEXNET_CHESTXRAY14")] = None,
    recipe: Annotated[str, typer.Option(help="A recipe's name, or a path to a .toml.")] = "real_few",
    work: Annotated[Path | None, typer.Option(help="Folder for the run; default: a temporary one.")] = None,
    table: Annotated[bool, typer.Option(help="Print the table of the committed results and stop.")] = False,
) -> None:
    """Measure the chain on real radiographs."""
    if table:
        typer.echo(markdown_table(read_results()))
        return
    if data is None:
        raise typer.BadParameter("give ChestX-ray14 by --data or CHEXNET_CHESTXRAY14")
    folder = Path(tempfile.mkdtemp(prefix="chexnet-real-")) if work is None else work
    try:
        write_results(_run(data, recipe, folder), data, folder)
    finally:
        if work is None:
            shutil.rmtree(folder)
    typer.echo(markdown_table(read_results()))


def _run(data: Path, recipe: str, folder: Path) -> BenchReport:
    folder.mkdir(parents=True, exist_ok=True)
    test_list = folder / "full_size_test_images.txt"
    test_list.write_text("".join(f"{name}\n" for name in full_size_test_images(data)))
    with progress() as on_phase:
        return train_export_bench(
            data,
            recipe,
            folder,
            n_calibration_images=CALIBRATION_IMAGES,
            test_list=test_list,
            effort=Effort(min_runs=100, min_duration_s=2.0),
            on_phase=on_phase,
        )


def full_size_test_images(data: Path) -> list[str]:
    """Return the test images as NIH published them; smaller copies would mix two resolutions in one measurement."""
    names = []
    for radiograph in ChestXray14.open(data).split("test"):
        assert radiograph.path is not None  # split() leaves absent ones out
        with Image.open(radiograph.path) as image:
            if image.size == (FULL_SIDE_PX, FULL_SIDE_PX):
                names.append(radiograph.image)
    return names


def write_results(report: BenchReport, data: Path, folder: Path) -> None:
    """Write the report beside what it was trained on."""
    dataset = ChestXray14.open(data)
    results = {
        "trained_on": {split: len(dataset.split(split)) for split in ("train", "val")},
        "epochs": [json.loads(line) for line in (folder / RUN / METRICS).read_text().splitlines()],
        "report": report.model_dump(mode="json"),
    }
    OUT.write_bytes(gzip.compress(json.dumps(results).encode(), mtime=0))


def read_results() -> dict[str, Any]:
    """Return the committed results."""
    results: dict[str, Any] = json.loads(gzip.decompress(OUT.read_bytes()))
    return results


def markdown_table(results: dict[str, Any]) -> str:
    """Return the README's table of results."""
    report = BenchReport.model_validate_json(json.dumps(results["report"]))
    # A bar inside a cell would end it.
    rows = [{name.replace("|", "\\|"): value for name, value in row.items()} for row in summary_rows(report)]
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(row.values()) + " |" for row in rows]
    lines.append("")
    trained = results["trained_on"]
    lines.append(
        f"{report.data}. Trained from scratch on {trained['train']} images (validated on {trained['val']}), "
        f"{len(results['epochs'])} epochs. {report.machine.processor}, {report.machine.cores} cores."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    run_program(app)
