"""Scores and labels to evaluate: from an engine run on a data set's images, or from a CSV of predictions."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.datasets.chestxray14 import Split
from chexnet_deploy.datasets.csv_rows import letters_of, read_names
from chexnet_deploy.datasets.data_set import DataSet, open_data
from chexnet_deploy.datasets.labelled import LabelledImages
from chexnet_deploy.datasets.patients import (
    cover_official,
    recognise_split,
    refuse_calibration_files,
    refuse_training_patients,
)
from chexnet_deploy.datasets.predictions import LabelledScores, read_predictions
from chexnet_deploy.datasets.table import read_labels
from chexnet_deploy.errors import DatasetError, ImageError, OnPhase, SpecError
from chexnet_deploy.evaluation.localize import BoxedMap, localize
from chexnet_deploy.evaluation.records import Localization
from chexnet_deploy.evaluation.request import EvaluationRequest
from chexnet_deploy.files import Sha256, sha256_hex
from chexnet_deploy.images.gray import read_image_file
from chexnet_deploy.inputs import name_some
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


def choose_images(dataset: DataSet, split: Split, image_list: Path | None) -> tuple[LabelledImages, str]:
    """Return a split's images on disk, narrowed to a list if one is given, and what they are in words.

    Raises:
        DatasetError: there is none, or the list names an image of another split.
    """
    images, source = dataset.require(split), dataset.root.resolve().name
    n_absent = len(dataset.rows[split]) - len(images.names)
    if image_list is not None:
        names = read_names(image_list)
        _refuse_strangers(
            image_list,
            names,
            [dataset.images.names[row] for row in dataset.rows[split].tolist()],
            f"that are not {split} images",
            "Measure on the patients of one split only.",
        )
        images, n_absent, source = dataset.select(names), 0, f"{source}, those of {image_list.name}"
    of = "unknown patients" if dataset.patients_unknown else f"{len(set(images.patients.tolist())):,} patients"
    words = f"{len(images.names):,} {split} images of {of} from {source}"
    words += f"; {n_absent:,} listed images are not on disk" if n_absent else ""
    # How many rows of all splits have no image says nothing of these.
    return images, "; ".join([words, *(note for note in dataset.notes if not note.endswith("no image on disk"))])


def run_engine(engine: Engine, request: EvaluationRequest, on_phase: OnPhase) -> Material:
    """Score an engine on the images of a split; patients it was trained on are refused unless the split is train.

    Raises:
        ChexnetError: the engine, the data or an image can't be used, or a patient was trained on.
    """
    assert request.data is not None  # EvaluationRequest checks it
    dataset = open_data(request.data)
    split: Split = request.split or "test"
    images, words = choose_images(dataset, split, request.images)
    patients_note = (say_who_is_known([engine], images, split), *_whose(images.patients, dataset))
    findings = images.shared_with(engine.findings)
    session = open_engine(engine, threads=request.threads, provider=request.provider)
    localization: Localization | None = None
    maps: tuple[BoxedMap, ...] = ()
    try:
        if request.has_localization:  # first: what is missing for it should not cost the whole run
            if not isinstance(engine, Bundle):
                raise SpecError(f"found --localization and {engine.place}, which has no activation maps. Omit it.")
            localization, maps = localize(
                Predictor(session, engine.manifest, checks=False),
                images,
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
    columns = [engine.findings.index(finding) for finding in findings]
    labelled = _label(images.for_findings(findings), logits[:, columns].astype(np.float64), engine.findings)
    return Material(
        labelled=labelled,
        everything=labelled,
        source=_in_words(engine),
        bundle_id=engine.id if isinstance(engine, Bundle) else None,
        operating_points=dict(engine.operating_points),
        data=words,
        patients_note=patients_note,
        notes=_notes(labelled, images, dataset.table),
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


def say_who_is_known(engines: Sequence[Engine], images: LabelledImages, split: Split) -> str:
    """Return in words whether models have seen these patients, and whether these images set int8 ranges.

    Raises:
        DatasetError: one has, or they did, and the split is not the training split.
    """
    patients = set(images.patients.tolist())
    if split == "train":
        return (
            f"These {len(patients):,} patients are of the training split: the model was trained on such patients, and "
            f"the figures say nothing about new ones."
        )
    bundles = [engine for engine in engines if isinstance(engine, Bundle)]
    trained_on = [(e.name, e.manifest.trained_on if isinstance(e, Bundle) else None) for e in engines]
    sentences = _group(
        (name, refuse_training_patients(patients, each, purpose="evaluation")) for name, each in trained_on
    )
    calibrations = [(bundle.name, bundle.manifest.calibration) for bundle in bundles if bundle.manifest.calibration]
    if calibrations:
        hashes = _hash_files(images)
        sentences += _group(
            (name, refuse_calibration_files(hashes, calibration.image_files, purpose="evaluation"))
            for name, calibration in calibrations
        )
    if split == "val":
        sentences.append(
            "Checkpoint and operating points were chosen on validation patients: the figures flatter the model."
        )
    return " ".join(sentences)


def _group(said: Iterable[tuple[str, str]]) -> list[str]:
    """Return each sentence once, with the names of whom it is said where there are several sentences."""
    names: dict[str, list[str]] = {}
    for name, sentence in said:
        names.setdefault(sentence, []).append(name)
    return list(names) if len(names) == 1 else [f"{name_some(of)}: {sentence}" for sentence, of in names.items()]


def _hash_files(images: LabelledImages) -> dict[str, Sha256]:
    """Return the SHA-256 of each image's file; without those that can't be read, which the reader refuses in its own words."""
    hashes = {}
    for name, path in zip(images.names, images.paths, strict=True):
        with suppress(ImageError):
            hashes[name] = sha256_hex(read_image_file(path))
    return hashes


def read_material(request: EvaluationRequest) -> Material:
    """Read predictions with their labels, narrowed to a split or a list if one is given.

    Raises:
        DatasetError: a file can't be read, the two don't fit, or nothing is left.
    """
    assert request.predictions is not None  # EvaluationRequest checks it
    dataset = None if request.data is None else open_data(request.data)
    labels = dataset if request.labels is None else read_labels(request.labels)
    assert labels is not None
    everything = read_predictions(request.predictions, labels)
    labelled, narrowed = everything, ""
    if request.split is not None and dataset is not None:
        labelled = _select(labelled, {dataset.images.names[row] for row in dataset.rows[request.split].tolist()})
        narrowed = f", {request.split} images alone"
    if request.images is not None:
        names = read_names(request.images)
        which = f"without a prediction{narrowed and f' of a {request.split} image'}"
        _refuse_strangers(request.images, names, labelled.names, which, "Shorten the list, or predict them too.")
        labelled = _select(labelled, set(names))
        narrowed += f", those of {request.images.name}"
    if not labelled.names:
        raise DatasetError(
            f"{request.predictions} has no {request.split} image of {request.data}; needed at least one. "
            f"Next: choose another --split, or omit it."
        )
    of = "unknown patients" if labels.patients_unknown else f"{np.unique(labelled.patients).size:,} patients"
    return Material(
        labelled=labelled,
        everything=everything,
        source=f"predictions {request.predictions.name}",
        bundle_id=None,
        operating_points={},
        data=f"{len(labelled.names):,} predicted images of {of}{narrowed}; labels of {labels.table.name}",
        patients_note=(
            "Predictions don't say whom their model was trained on: nothing shows that these patients are new to it.",
            *_whose(labelled.patients, dataset or labels),
        ),
        notes=_notes(everything, labels.images, labels.table),
        files=(request.predictions, labels.table),
    )


def _whose(patients: NDArray[np.int64], dataset: DataSet) -> tuple[str, ...]:
    """Return sentences on which lists these patients are in."""
    sentences = []
    known = recognise_split(patients.tolist())
    if known is not None:
        sentences.append(f"By the fingerprint of their even numbers these are the patients of {_the(known)}.")
    if dataset.patients_unknown:
        sentences.append(
            f"Found {dataset.patients_unknown}: all images are taken as one patient's, so no figure has an interval."
        )
    elif dataset.is_chestxray14:
        coverage = cover_official(
            patients,
            train_val_patients=dataset.patients_of("train", "val"),
            test_patients=dataset.patients_of("test"),
        )
        sentences.append(coverage.in_words())
    return tuple(sentences)


def _the(split: str) -> str:
    return f"the {split}" if split.startswith("official") else split


def _notes(labelled: LabelledScores, images: LabelledImages, table: Path) -> tuple[str, ...]:
    notes: list[str] = []
    known = set(map(letters_of, (*labelled.findings, *labelled.unlabelled_findings)))
    if absent := [finding for finding in images.findings if letters_of(finding) not in known]:
        notes.append(f"Not predicted: {name_some(absent)}.")
    if labelled.unlabelled_findings:
        notes.append(f"Predicted, but not labelled in {table.name}: {', '.join(labelled.unlabelled_findings)}.")
    if not labelled.is_labelled.all():
        counts = zip(labelled.findings, labelled.is_labelled.sum(axis=0).tolist(), strict=True)
        fewer = [f"{name} {n:,}" for name, n in counts if n < len(labelled.names)]
        notes.append(
            f"Measured on the images labelled for them, fewer than all {len(labelled.names):,}: {', '.join(fewer)}."
        )
    if labelled.ignored:
        notes.append(f"Not read, as they name no finding of {table.name}: {', '.join(labelled.ignored)}.")
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
        is_labelled=labelled.is_labelled[rows],
        patients=labelled.patients[rows],
        sex=tuple(labelled.sex[row] for row in rows),
        age_years=labelled.age_years[rows],
        view=tuple(labelled.view[row] for row in rows),
    )


def _label(images: LabelledImages, logits: NDArray[np.float64], predicted: Sequence[str]) -> LabelledScores:
    return LabelledScores(
        names=images.names,
        findings=images.findings,
        scores=logits,
        kind="logit",
        truth=images.truth,
        is_labelled=images.labelled,
        patients=images.patients,
        sex=images.sex,
        age_years=images.age_years,
        view=images.view,
        unlabelled_findings=tuple(finding for finding in predicted if finding not in images.findings),
        ignored=(),
        n_not_predicted=0,
    )
