"""One recipe from images to held-out figures: train, export, quantise, bench; of pneumonia, compare with readers too.

    python -m benchmarks.cpu.recipe_runs modern --phantoms 3000 --resize-px 96
    python -m benchmarks.cpu.recipe_runs chexnet14 --data ROOT --epochs 3

Recipes that want ImageNet weights start from scratch here, as no such file is at hand; the results say so.
"""

import json
import shutil
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import RESULTS, write_results
from benchmarks.cpu.real import full_size_test_images
from chexnet_deploy.datasets.chestxray14 import ChestXray14
from chexnet_deploy.evaluation.engines import Effort
from chexnet_deploy.evaluation.request import EvaluationRequest
from chexnet_deploy.evaluation.run import run_evaluation
from chexnet_deploy.terminal import progress, run_program
from training.chain import BUNDLES, RUN, export_and_bench
from training.logbook import METRICS, THROUGHPUT
from training.phantoms.draw import PhantomSpec, write_phantom
from training.processes import join_processes
from training.recipe import read_recipe
from training.train import Options, train

TEST_PATIENTS, SEED, PREVALENCE, SIDE_PX = 420, 2, 0.20, 128  # as the demo's phantoms
CALIBRATION_IMAGES = 256

app = typer.Typer(add_completion=False)


@app.command()
def main(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or a path to a .toml.")],
    data: Annotated[Path | None, typer.Option(help="ChestX-ray14.")] = None,
    phantoms: Annotated[int | None, typer.Option(help="Draw that many phantom patients instead.")] = None,
    resize_px: Annotated[int | None, typer.Option(help="In place of the recipe's.")] = None,
    epochs: Annotated[int | None, typer.Option(help="In place of the recipe's.")] = None,
    readers: Annotated[Path | None, typer.Option(help="Folder of expert labels.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the results' file; default: the recipe's.")] = None,
    work: Annotated[Path | None, typer.Option(help="Folder for the run; default: a temporary one.")] = None,
) -> None:
    """Run it all and write the figures."""
    changes = {"resize_px": resize_px, "epochs": epochs, "initial_weights": "scratch"}
    chosen = read_recipe(recipe).model_copy(update={key: value for key, value in changes.items() if value is not None})
    folder = Path(tempfile.mkdtemp(prefix="chexnet-recipe-")) if work is None else work
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with progress() as on_phase:
            test_list = None
            if phantoms is not None:
                data = folder / "phantom"
                spec = PhantomSpec(phantoms, TEST_PATIENTS, side_px=SIDE_PX, seed=SEED, prevalence=PREVALENCE)
                if not data.exists():
                    write_phantom(data, spec, on_image=lambda done, total: on_phase("drawing phantoms", done, total))
            elif data is None:
                raise typer.BadParameter("give --data or --phantoms")
            else:
                test_list = folder / "full_size_test_images.txt"
                test_list.write_text("".join(f"{image}\n" for image in full_size_test_images(data)))
            start = perf_counter()
            best = train(data, chosen, folder / RUN, on_phase, options=Options(workers=2), processes=join_processes())
            train_s = perf_counter() - start
            report = export_and_bench(
                best,
                data,
                folder,
                n_calibration_images=CALIBRATION_IMAGES,
                test_list=test_list,
                effort=Effort(min_runs=20, min_duration_s=0.5),
                on_phase=on_phase,
            )
            request = EvaluationRequest(engine=folder / BUNDLES / "fp32", data=data, images=test_list, readers=readers)
            evaluation = run_evaluation(request, on_phase=on_phase).evaluation
        dataset = ChestXray14.open(data)
        results: dict[str, Any] = {
            "torch": torch.__version__,
            "recipe": chosen.model_dump(mode="json"),
            "trained_on": {split: len(dataset.split(split)) for split in ("train", "val")},
            "train_s": train_s,
            "epochs": _lines(folder / RUN / METRICS),
            "throughput": _lines(folder / RUN / THROUGHPUT),
            "data": evaluation.data,
            "patients_note": evaluation.patients_note,
            "mean_auroc": evaluation.mean_auroc,
            "mean_auroc_interval": evaluation.mean_auroc_interval,
            "findings": {
                row.finding: {"auroc": row.auroc, "interval": row.auroc_interval, "n_positive": row.n_positive}
                for row in evaluation.findings
            },
            "bench": {
                engine.name: {
                    "verdict": engine.verdict,
                    "summary": None if engine.parity is None else engine.parity.summary,
                    "mean_auroc": None if engine.parity is None else engine.parity.mean_auroc_candidate,
                    "max_abs_probability_difference": (
                        None if engine.parity is None else engine.parity.max_abs_probability_difference
                    ),
                }
                for engine in report.engines
            },
            "readers": None
            if evaluation.readers is None
            else _reader_means(evaluation.readers.model_dump(mode="json")),
        }
        out = RESULTS / f"recipe-{name or Path(recipe).stem}.json"
        write_results(out, results)
    finally:
        if work is None:
            shutil.rmtree(folder)
    mean = (
        "undefined"
        if evaluation.mean_auroc is None
        else f"{evaluation.mean_auroc:.4f} {evaluation.mean_auroc_interval}"
    )
    typer.echo(f"mean AUROC {mean} over {evaluation.n_counted}, trained in {train_s:.0f} s\n{out}")


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _reader_means(readers: dict[str, Any]) -> dict[str, Any]:
    """Return what a page would show of each protocol: the findings' rows, without the single labels'."""
    kept = ("protocol", "n_images", "n_patients", "n_resamples", "findings", "mean")
    return {
        "n_images": readers["n_images"],
        "studies": [{key: study[key] for key in kept} for study in readers["studies"]],
    }


if __name__ == "__main__":
    run_program(app)
