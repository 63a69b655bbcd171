"""Print results of commands on the terminal."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from chexnet_deploy.errors import ImageError
from chexnet_deploy.terminal import print_json, print_table

if TYPE_CHECKING:
    from pydantic import BaseModel

    from chexnet_deploy.bundle.site import OperatingPoints
    from chexnet_deploy.evaluation.records import Evaluation
    from chexnet_deploy.runtime.predictor import Prediction
    from chexnet_deploy.serving.triton import TritonModel


def print_record(record: "BaseModel", **before: object) -> None:
    """Print a record as its file holds it, behind what is to stand before it."""
    print_json({**before, **json.loads(record.model_dump_json())})


def print_repository(path: Path, models: "Sequence[TritonModel]") -> None:
    """Print each model's versions, and what the server must bring along to answer rightly."""
    from chexnet_deploy.bundle.manifest import FLOAT16_DIALECTS

    for model in models:
        for version, bundle in model.versions.items():
            typer.echo(f"{path}  {model.name} {version}  on {model.device}  id {bundle.id[:12]}")
            if bundle.manifest.dialect in FLOAT16_DIALECTS and bundle.manifest.engine is None:
                typer.echo(
                    f"warning: {model.name} answers wrongly in a Triton with an ONNX Runtime before 1.30", err=True
                )


def print_evaluation(evaluation: "Evaluation") -> None:
    """Print the table, what is undefined, whose images these are, and one line for each further study."""
    from chexnet_deploy.evaluation import as_text

    shown = (
        "finding",
        "positives",
        "positive patients",
        "AUROC",
        "95 % interval",
        "AUPRC",
        "sensitivity",
        "specificity",
    )
    print_table([{k: row[k] for k in shown if k in row} for row in as_text.summary_rows(evaluation)])
    typer.echo(f"{as_text.mean_line(evaluation)}; {evaluation.data}")
    for line in (*as_text.undefined_lines(evaluation), *evaluation.patients_note, *evaluation.notes):
        typer.echo(line)
    if evaluation.readers is not None:
        typer.echo(as_text.readers_line(evaluation.readers))
        for study in evaluation.readers.studies:
            typer.echo(as_text.study_line(study))
    if evaluation.localization is not None:
        typer.echo(as_text.localization_line(evaluation.localization))
        print_table(as_text.localization_rows(evaluation.localization.summary))


def print_site(points_from: str) -> None:
    """Say that a site file decided, and what it guarantees; nothing where the bundle's own operating points did."""
    if points_from != "bundle":
        typer.echo(f"operating points of {points_from}")


def print_answers(answers: "Iterable[tuple[str, Prediction | ImageError]]", points: "OperatingPoints") -> int:
    """Print each image's findings, the likeliest first, beside their operating points; return how many have none."""
    from chexnet_deploy.images.listing import one_line

    print_site(points.source)
    n_quarantined = 0
    for name, answer in answers:
        typer.echo(one_line(name))
        if isinstance(answer, ImageError):
            n_quarantined += 1
            typer.echo(f"  quarantined: {one_line(str(answer))}")
            continue
        for finding, probability in sorted(answer.probabilities.items(), key=lambda item: -item[1]):
            verdict = points.place(finding, probability)
            if finding in answer.present:
                is_there = answer.present[finding]
                point = (points.present_at if is_there else points.absent_below)[finding]
                verdict = f"{'>=' if is_there else '< '} {point:.4f}{'  present' if is_there else ''}"
            typer.echo(f"  {finding:20} {probability:.4f} {verdict}")
    return n_quarantined


def print_json_answers(answers: "Iterable[tuple[str, Prediction | ImageError]]", points: "OperatingPoints") -> int:
    """Print one JSON object, an entry for each image as it comes; return how many have no findings."""
    n_quarantined, opening = 0, "{\n"
    for name, answer in answers:
        entry: dict[str, object]
        if isinstance(answer, ImageError):
            n_quarantined += 1
            entry = {"quarantined": str(answer)}
        else:
            entry = {"probabilities": answer.probabilities, "present": answer.present}
            entry["operating_points_from"] = points.source
        typer.echo(opening + json.dumps({name: entry}, indent=2)[2:-2], nl=False)
        opening = ",\n"
    typer.echo("\n}")
    return n_quarantined
