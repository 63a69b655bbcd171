"""CheXNet on this machine's CPU, engine beside engine: how fast each answers, and how far its answers are from torch's.

    python -m benchmarks.cpu.peers CHECKPOINT --data ROOT --work DIR --prepare     make the models, measure their accuracy, and stop
    python -m benchmarks.cpu.peers CHECKPOINT --data ROOT --work DIR               time them (after making what DIR lacks)
    python -m benchmarks.cpu.peers CHECKPOINT --data ROOT --work DIR --isa avx2    the same for OpenVINO on CPUs without VNNI
    python -m benchmarks.cpu.peers --table | --plot FILE                           from the committed results

Peers run the graph as the paper has it, with the convolution before the pooling of each transition: that is what an exported
torchvision model looks like. All int8 models are made of the same calibration images and judged on the same test images. Engines
are timed in turns, each once in every round after a run that is not timed, so that ratios are of one moment.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from benchmarks.common import RESULTS
from benchmarks.cpu.peers_page import Results, Row, draw, markdown_table
from benchmarks.int8.accuracy import cores, packages
from chexnet_deploy.datasets import open_data
from chexnet_deploy.evaluation.machine import describe_machine
from chexnet_deploy.terminal import run_program

if TYPE_CHECKING:
    from benchmarks.cpu.peers_models import Models

OUT = RESULTS / "peers-cpu.json"
ISA_VARIABLE: Final = "ONEDNN_MAX_CPU_ISA"  # of oneDNN, which is what OpenVINO computes with
ROUNDS: Final[Mapping[int, int]] = {1: 40, 16: 10}

app = typer.Typer(add_completion=False)


@app.command()
def main(
    checkpoint: Annotated[Path | None, typer.Argument(help="A .safetensors checkpoint.")] = None,
    data: Annotated[Path | None, typer.Option(help="ChestX-ray14's layout.", envvar="CHEXNET_CHESTXRAY14")] = None,
    images: Annotated[Path | None, typer.Option(help="List of images to judge on; default: the test split.")] = None,
    calibration_images: Annotated[int, typer.Option(help="For every int8 model.")] = 256,
    work: Annotated[Path | None, typer.Option(help="Folder that keeps the models; default: a temporary one.")] = None,
    prepare: Annotated[bool, typer.Option(help="Make the models and measure their accuracy, then stop.")] = False,
    rounds: Annotated[int | None, typer.Option(min=2, help="Of each batch size; default: 40 and 10.")] = None,
    isa: Annotated[Literal["native", "avx2"], typer.Option(help="Instructions that OpenVINO may use.")] = "native",
    out: Annotated[Path, typer.Option(help="The JSON to write or read.")] = OUT,
    table: Annotated[bool, typer.Option(help="Print the table of the committed results and stop.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the committed results to a file and stop.")] = None,
) -> None:
    """Measure every engine, or show what was measured."""
    if plot is not None:
        draw(Results.model_validate_json(out.read_text()), plot)
    elif not table:
        if checkpoint is None or data is None:
            raise typer.BadParameter("give a checkpoint, and ChestX-ray14 by --data or CHEXNET_CHESTXRAY14")
        if isa == "avx2" and os.environ.get(ISA_VARIABLE) != "AVX2":
            # oneDNN reads it once, when it is loaded.
            command = [sys.executable, "-m", "benchmarks.cpu.peers", *sys.argv[1:]]
            raise typer.Exit(subprocess.run(command, env={**os.environ, ISA_VARIABLE: "AVX2"}, check=False).returncode)
        with tempfile.TemporaryDirectory() as temporary:
            # Here, as a table is printed without torch and OpenVINO too.
            from benchmarks.cpu.peers_models import prepare_models

            models = prepare_models(
                checkpoint, open_data(data), images, calibration_images, work or Path(temporary), isa
            )
            if prepare:
                return
            results = _measured(models, ROUNDS if rounds is None else dict.fromkeys(ROUNDS, rounds), isa, out)
        out.write_text(results.model_dump_json(indent=1) + "\n")
    if plot is None:
        typer.echo(markdown_table(Results.model_validate_json(out.read_text())))


def _measured(models: "Models", rounds: Mapping[int, int], isa: str, out: Path) -> Results:
    from benchmarks.cpu.peers_engines import open_engines, time_in_turns

    engines = open_engines(models, openvino_only=isa == "avx2")
    rows = tuple(
        Row(
            engine=engine.name,
            accuracy=models.prepared.accuracy.get(engine.name),
            ms_per_image=samples,
            note=engine.note,
        )
        for engine, samples in zip(engines, time_in_turns(engines, models.pixels, rounds), strict=True)
    )
    if isa == "avx2":
        return Results.model_validate_json(out.read_text()).model_copy(update={"avx2": rows})
    prepared = models.prepared
    return Results(
        machine=describe_machine(),
        packages=packages(),
        resize_px=models.side,
        threads=cores(),
        n_calibration_images=prepared.n_calibration_images,
        n_test_images=prepared.n_test_images,
        fp32_mean_auroc=prepared.fp32_mean_auroc,
        nncf_with_open_batch=prepared.nncf_with_open_batch,
        rows=rows,
    )


if __name__ == "__main__":
    run_program(app)
