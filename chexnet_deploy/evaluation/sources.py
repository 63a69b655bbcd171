"""Scores and labels to evaluate: from an engine run on a data set's images, or from a CSV of predictions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.datasets import FINDINGS, LabelledImages
from chexnet_deploy.datasets.chestxray14 import ChestXray14, Split
from chexnet_deploy.datasets.nih_tables import Radiograph, read_image_list
from chexnet_deploy.datasets.patients import cover_official, recognise_split, refuse_training_patients
from chexnet_deploy.datasets.predictions import LabelledScores, read_predictions
from chexnet_deploy.errors import DatasetError, OnPhase, SpecError
from chexnet_deploy.evaluation.localize import BoxedMap, localize
from chexnet_deploy.evaluation.records import Localization
from chexnet_deploy.evaluation.request import EvaluationRequest
from chexnet_deploy.runtime import Predictor
from chexnet_deploy.runtime.engine import Engine, open_engine, resizing_of
from chexnet_deploy.runtime.score import score_files


@dataclass(frozen=True, slots=True, eq=False)
class Material:
    """Input of an evaluation; words and sentences as in records.Evaluation.

    Attributes:
        labelled: the images evaluated.
        everything: all images scored, where a list or a split narrowed predictions; else `labelled`.
        operating_points: a bundle's own.
        files: that were read beside images.
    """

    labelled: LabelledScores
    everything: LabelledScores
    source: str
    bundle_id: str | None
    operating_points: Mapping[str, float]
    data: str
    patients_note: tuple[str, ...]
    notes: tuple[str, ...]
    files: tuple[Path, ...]
    localization: Localization | None = None
    maps: tuple[BoxedMap, ...] = ()


def choose_images(dataset: ChestXray14, split: Split, image_list: Path | None) -> tuple[tuple[Radiograph, ...], str]:
    """Return a split's images on disk, narrowed to a list if one is given, and what they are in words.

    Raises:
        DatasetError: there is none, or the list names an image of another split.
    """
    radiographs, source = dataset.require(split), dataset.root.resolve().name
    n_absent = len(dataset.listed[split]) - len(radiographs)
    if image_list is not None:
        names = read_image_list(image_list)
        _refuse_strangers(
            image_list,
            names,
            dataset.listed[split],
            f"that are not {split} images",
            "Measure on the patients of one split only.",
        )
        radiographs, n_absent, source = dataset.select(names), 0, f"{source}, those of {image_list.name}"
    n_patients = len({radiograph.patient for radiograph in radiographs})
    words = f"{len(radiographs):,} {split} images of {n_patients:,} patients from {source}"
    words += f"; {n_absent:,} listed images are not on disk" if n_absent else ""
    return radiographs, words + (f"; {dataset.strays_in_words()}" if dataset.strays else "")


def run_engine(engine: Engine, request: EvaluationRequest, on_phase: OnPhase) -> Material:
    """Score an engine on the images of a split; patients it was trained on are refused unless the split is train.

    Raises:
        ChexnetError: the engine, the data or an image can't be used, or a patient was trained on.
    """
    assert request.data is not None  # EvaluationRequest checks it
    dataset = ChestXray14.open(request.data)
    split: Split = request.split or "test"
    radiographs, words = choose_images(dataset, split, request.images)
    patients_note = (
        say_who_is_known(engine, radiographs, split),
        *_whose(np.array([r.patient for r in radiographs]), dataset),
    )
    images = LabelledImages.of(radiographs, engine.findings)
    session = open_engine(engine, threads=request.threads, provider=request.provider)
    localization: Localization | None = None
    maps: tuple[BoxedMap, ...] = ()
    try:
        if request.has_localization:  # first: what is missing for it should not cost the whole run
            if not isinstance(engine, Bundle):
                raise SpecError(f"found --localization and {engine.place}, which has no activation maps. Omit it.")
            localization, maps = localize(
                Predictor(session, engine.manifest, checks=False),
                radiographs,
                dataset.boxes,
                engine.findings,
                on_images=lambda done, total: on_phase("localise", done, total),
            )
        logits = score_files(
            {"model": session},
            images.paths,
            resizing_of(engine),
            on_images=lambda done: on_phase("evaluate", done, len(images.paths)),
        )["model"]
    finally:
        session.close()
    labelled = _label(radiographs, images, engine.findings, logits.astype(np.float64))
    unlabelled = labelled.unlabelled_findings
    return Material(
        labelled=labelled,
        everything=labelled,
        source=_in_words(engine),
        bundle_id=engine.id if isinstance(engine, Bundle) else None,
        operating_points=dict(engine.operating_points),
        data=words,
        patients_note=patients_note,
        notes=(f"Not measured, as {dataset.table.name} does not label them: {', '.join(unlabelled)}.",)
        if unlabelled
        else (),
        files=(dataset.table, *_files_of(engine, request)),
        localization=localization,
        maps=maps,
    )


def _in_words(engine: Engine) -> str:
    if isinstance(engine, Bundle):
        return f"bundle {engine.name}, {engine.manifest.precision.value}, id {engine.id[:12]}"
    return f"{'endpoint' if engine.model is None else 'ONNX file'} {engine.name}, with its contract id {engine.id[:12]}"


def _files_of(engine: Engine, request: EvaluationRequest) -> tuple[Path, ...]:
    if isinstance(engine, Bundle):
        return (engine.path / "manifest.json",)
    files = (request.contract, engine.place if isinstance(engine.place, Path) else None)
    return tuple(file for file in files if file is not None)


def say_who_is_known(engine: Engine, radiographs: Sequence[Radiograph], split: Split) -> str:
    """Return a sentence on whether the model has seen these patients.

    Raises:
        DatasetError: it has, and the split is not the training split.
    """
    patients = {radiograph.patient for radiograph in radiographs}
    if split == "train":
        return (
            f"These {len(patients):,} patients are of the training split: the model was trained on such patients, and "
            f"the figures say nothing about new ones."
        )
    trained_on = engine.manifest.trained_on if isinstance(engine, Bundle) else None
    sentence = refuse_training_patients(patients, trained_on, purpose="evaluation")
    if split == "val":
        sentence += (
            " Checkpoint and operating points were chosen on validation patients: the figures flatter the model."
        )
    return sentence


def read_material(request: EvaluationRequest) -> Material:
    """Read predictions with their labels, narrowed to a split or a list if one is given.

    Raises:
        DatasetError: a file can't be read, the two don't fit, or nothing is left.
    """
    assert request.predictions is not None  # EvaluationRequest checks it
    dataset = None if request.data is None else ChestXray14.open(request.data)
    labels = request.labels if dataset is None or request.labels is not None else dataset.table
    assert labels is not None
    everything = read_predictions(request.predictions, labels)
    labelled, narrowed = everything, ""
    if request.split is not None and dataset is not None:
        labelled = _select(labelled, set(dataset.listed[request.split]))
        narrowed = f", {request.split} images alone"
    if request.images is not None:
        names = read_image_list(request.images)
        which = f"without a prediction{narrowed and f' of a {request.split} image'}"
        _refuse_strangers(request.images, names, labelled.names, which, "Shorten the list, or predict them too.")
        labelled = _select(labelled, set(names))
        narrowed += f", those of {request.images.name}"
    if not labelled.names:
        raise DatasetError(
            f"{request.predictions} has no {request.split} image of {request.data}; needed at least one. "
            f"Next: choose another --split, or omit it."
        )
    n_patients = np.unique(labelled.patients).size
    return Material(
        labelled=labelled,
        everything=everything,
        source=f"predictions {request.predictions.name}",
        bundle_id=None,
        operating_points={},
        data=f"{len(labelled.names):,} predicted images of {n_patients:,} patients{narrowed}; labels of {labels.name}",
        patients_note=(
            "Predictions don't say whom their model was trained on: nothing shows that these patients are new to it.",
            *_whose(labelled.patients, dataset),
        ),
        notes=_notes(everything, labels),
        files=(request.predictions, labels),
    )


def _whose(patients: NDArray[np.int64], dataset: ChestXray14 | None) -> tuple[str, ...]:
    """Return sentences on which lists these patients are in."""
    sentences = []
    known = recognise_split(patients.tolist())
    if known is not None:
        sentences.append(f"By the fingerprint of their even numbers these are the patients of {_the(known)}.")
    if dataset is not None:
        coverage = cover_official(
            patients,
            train_val_patients=dataset.listed_patients("train", "val"),
            test_patients=dataset.listed_patients("test"),
        )
        sentences.append(coverage.in_words())
    return tuple(sentences)


def _the(split: str) -> str:
    return f"the {split}" if split.startswith("official") else split


def _notes(labelled: LabelledScores, labels: Path) -> tuple[str, ...]:
    notes = []
    absent = [finding for finding in FINDINGS if finding not in (*labelled.findings, *labelled.unlabelled_findings)]
    if absent:
        notes.append(f"Not predicted: {', '.join(absent)}.")
    if labelled.unlabelled_findings:
        notes.append(f"Predicted, but not labelled in {labels.name}: {', '.join(labelled.unlabelled_findings)}.")
    if labelled.ignored:
        notes.append(f"Not read, as they name none of the 14 findings: {', '.join(labelled.ignored)}.")
    if labelled.n_quarantined:
        notes.append(
            f"{labelled.n_quarantined:,} images are left out: predict could not read them, and quarantined them."
        )
    if labelled.n_not_predicted:
        notes.append(f"{labelled.n_not_predicted:,} labelled images have no prediction.")
    return tuple(notes)


def _refuse_strangers(path: Path, names: Sequence[str], known: Sequence[str], which: str, next_step: str) -> None:
    strangers = sorted(set(names) - set(known))
    if strangers:
        raise DatasetError(f"{path} names {len(strangers)} images {which}, e.g. {strangers[0]}. {next_step}")


def _select(labelled: LabelledScores, names: set[str]) -> LabelledScores:
    rows = [row for row, name in enumerate(labelled.names) if name in names]
    return replace(
        labelled,
        names=tuple(labelled.names[row] for row in rows),
        scores=labelled.scores[rows],
        truth=labelled.truth[rows],
        patients=labelled.patients[rows],
        sex=tuple(labelled.sex[row] for row in rows),
        age_years=labelled.age_years[rows],
        view=tuple(labelled.view[row] for row in rows),
    )


def _label(
    radiographs: Sequence[Radiograph], images: LabelledImages, findings: tuple[str, ...], logits: NDArray[np.float64]
) -> LabelledScores:
    return LabelledScores(
        names=images.names,
        findings=images.findings,
        scores=logits[:, [findings.index(finding) for finding in images.findings]],
        kind="logit",
        truth=images.truth,
        patients=images.patients,
        sex=tuple(radiograph.sex for radiograph in radiographs),
        age_years=np.array([radiograph.age_years for radiograph in radiographs], np.float64),
        view=tuple(radiograph.view for radiograph in radiographs),
        unlabelled_findings=tuple(finding for finding in findings if finding not in images.findings),
        ignored=(),
        n_not_predicted=0,
    )
