"""The reader study of Rajpurkar et al. 2017 on the public five-reader labels of ChestX-ray14, all 14 findings.

    python -m benchmarks.statistics.reader_study --data ROOT [--predictions CSV] [--out benchmarks/results/reader-study.json]

Three studies, each in every protocol of radiologists.py:

    readers        the five readers alone
    nih_labels     NIH's own labels, mined from reports, in the place of the model: what a network trained on them can
                   hope for
    predictions    a model's probabilities on those expert-read images that the CSV has

A model's thresholds are those of the largest F1 on NIH labels. They are chosen on patients without expert reads who are
not in the official test list either: its images are never used to tune anything. Writes aggregates only, no reads.
"""

import json
from pathlib import Path
from time import perf_counter
from typing import Annotated

import numpy as np
import typer

from benchmarks.common import RESULTS
from chexnet_deploy.datasets.chestxray14 import ChestXray14, truth
from chexnet_deploy.datasets.findings import FINDINGS
from chexnet_deploy.datasets.predictions import LabelledScores, read_predictions
from chexnet_deploy.datasets.radiologist_labels import MAJORITY_READERS, ExpertLabels
from chexnet_deploy.datasets.table import read_labels
from chexnet_deploy.errors import DatasetError
from chexnet_deploy.evaluation.machine import Machine, describe_machine
from chexnet_deploy.evaluation.radiologists import (
    answers_of,
    choose_thresholds,
    compare_with_readers,
    run_protocols,
    tuning_rows,
)
from chexnet_deploy.evaluation.records import Threshold
from chexnet_deploy.inputs import ReportRecord, quote_some
from chexnet_deploy.metrics.f1 import Estimate
from chexnet_deploy.metrics.radiologists import (
    MODEL,
    FindingF1,
    MeanF1,
    ReaderStudy,
    paper_protocol,
    readers_only_protocol,
)
from chexnet_deploy.terminal import run_program

DIGITS = 6  # of a resampled F1 the third is already noise

app = typer.Typer(add_completion=False)


class Results(ReportRecord):
    """All studies; `both_protocols_s` is the paper's and the readers-only protocol of nih_labels: 386 images, 6 raters."""

    source: str
    machine: Machine
    both_protocols_s: float
    majority_readers: tuple[str, ...]
    readers: tuple[ReaderStudy, ...]
    nih_labels: tuple[ReaderStudy, ...]
    predictions: tuple[ReaderStudy, ...]
    n_threshold_images: int
    n_threshold_patients: int
    thresholds: tuple[Threshold, ...]


@app.command()
def main(
    data: Annotated[Path, typer.Option(help="ChestX-ray14 with expert_labels/ in it.")],
    predictions: Annotated[Path | None, typer.Option(help="Probabilities of all 14 findings, wide or long.")] = None,
    out: Annotated[Path, typer.Option(help="The JSON to write.")] = RESULTS / "reader-study.json",
) -> None:
    """Run the study, print its tables and write the JSON."""
    results = run_study(data, predictions)
    for title, studies in (
        ("Readers alone", results.readers),
        ("NIH labels in the place of the model", results.nih_labels),
        ("Predictions", results.predictions),
    ):
        for study in studies:
            typer.echo(f"\n{title}\n{table(study)}")
    typer.echo(f"\nPaper's and readers-only protocol on all images: {results.both_protocols_s:.2f} s")
    rounded = json.loads(results.model_dump_json(), parse_float=lambda text: round(float(text), DIGITS))
    out.write_text(json.dumps(rounded, indent=1) + "\n")


def run_study(data: Path, predictions: Path | None) -> Results:
    """Score the readers, NIH's labels and, where there are any, predictions."""
    dataset, labels = ChestXray14.open(data), ExpertLabels.open(data / "expert_labels")
    by_image = {radiograph.image: radiograph for radiograph in dataset.radiographs}
    unknown = [image for image in labels.images if image not in by_image]
    if unknown:
        raise DatasetError(
            f"{dataset.table}: found no row for the expert reads of {quote_some(unknown)}; needed a row for each. "
            f"Next: take the expert reads of the images that the table has."
        )
    nih = truth([by_image[image] for image in labels.images])
    answers = answers_of(labels, FINDINGS, nih)
    start_s = perf_counter()
    paper_protocol(answers)
    readers_only_protocol(answers)
    both_protocols_s = perf_counter() - start_s
    thresholds: tuple[Threshold, ...] = ()
    studies: tuple[ReaderStudy, ...] = ()
    n_images = n_patients = 0
    if predictions is not None:
        predicted = read_probabilities(predictions, dataset.table)
        rows = tuning_rows(predicted.patients, labels, {by_image[image].patient for image in dataset.listed["test"]})
        n_images, n_patients = int(rows.sum()), len(np.unique(predicted.patients[rows]))
        thresholds = choose_thresholds(predicted.scores[rows], predicted.truth[rows], predicted.findings)
        if len(thresholds) < len(FINDINGS):
            raise DatasetError(
                f"{predictions}: found no image of some finding to choose its threshold on; needed one each of patients "
                f"without expert reads outside the test list. Next: predict train_val images too."
            )
        studies = compare_with_readers(predicted, labels, thresholds, thresholds_from="largest F1").studies
    return Results(
        source="Nabulsi et al. 2021, all findings; Wang et al. 2017, labels of 2020",
        machine=describe_machine(),
        both_protocols_s=both_protocols_s,
        majority_readers=MAJORITY_READERS,
        readers=run_protocols(labels, FINDINGS, None),
        nih_labels=run_protocols(labels, FINDINGS, nih),
        predictions=studies,
        n_threshold_images=n_images,
        n_threshold_patients=n_patients,
        thresholds=thresholds,
    )


def read_probabilities(path: Path, labels: Path) -> LabelledScores:
    """Return the predictions with their NIH labels.

    Raises:
        DatasetError: as read_predictions; or they are not probabilities of all 14 findings.
    """
    predicted = read_predictions(path, read_labels(labels))
    if predicted.findings != FINDINGS or predicted.kind != "probability":
        raise DatasetError(
            f"{path}: found a {predicted.kind} of {', '.join(predicted.findings)}; needed a probability of each of the "
            f"14 findings. Next: predict again."
        )
    return predicted


def table(study: ReaderStudy) -> str:
    """Return one line a finding, and the mean: readers, their mean, the model and the difference."""
    raters = list(study.mean.f1)
    lines = [
        f"{study.protocol}: {study.n_images} images of {study.n_patients} patients, {study.n_resamples:,} resamples of "
        f"the {study.unit}s, seed {study.seed}",
        f"{'':19}" + "".join(f"{name:>12}" for name in raters) + f"{'mean of readers':>23}{'model - mean':>25}",
    ]
    mean = study.mean
    rows: list[tuple[str, FindingF1 | MeanF1]] = [(row.finding, row) for row in study.findings]
    for name, row in (*rows, (f"mean of {mean.n_counted}", mean)):
        cells = "".join(f"{_number(row.f1[rater]):>12}" for rater in raters)
        lines.append(f"{name:19}{cells}{_interval(row.mean_of_readers):>23}{_interval(row.difference):>25}")
    lines += [f"  not in the mean: {finding}: {why}" for finding, why in mean.left_out.items()]
    if MODEL in mean.f1:
        lines.append(f"  model, mean of {mean.n_counted}: {_interval(mean.f1[MODEL])}")
    return "\n".join(lines)


def _number(estimate: Estimate) -> str:
    return "-" if estimate.value is None else f"{estimate.value:.3f}"


def _interval(estimate: Estimate | None) -> str:
    if estimate is None or estimate.value is None:
        return "-"
    if estimate.low is None:
        return f"{estimate.value:.3f} (no interval)"
    return f"{estimate.value:.3f} ({estimate.low:.3f}, {estimate.high:.3f})"


if __name__ == "__main__":
    run_program(app)
