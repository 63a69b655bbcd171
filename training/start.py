"""Start a run from an earlier checkpoint, of any resolution and findings, and know whom its weights have seen."""

from collections.abc import Sequence
from pathlib import Path

import torch

from chexnet_deploy.datasets.chestxray14 import ChestXray14
from chexnet_deploy.datasets.patients import PatientSet, refuse_training_patients
from chexnet_deploy.errors import SpecError
from chexnet_deploy.export.from_torch.checkpoint import Checkpoint, read_checkpoint
from chexnet_deploy.export.from_torch.model import CheXNet
from chexnet_deploy.images.preprocessing import Preprocessing
from training.recipe import Recipe
from training.teacher import Teacher


def read_start(
    recipe: Recipe, path: Path | None, preprocessing: Preprocessing, dataset: ChestXray14
) -> Checkpoint | None:
    """Return the checkpoint that a run starts from; None where its recipe says another start.

    Raises:
        CheckpointError: it can't be read.
        DatasetError: it was trained on validation patients, so no epoch could be chosen by them.
        SpecError: the recipe says another start, or the checkpoint takes images of another mean and deviation.
    """
    if (recipe.initial_weights == "checkpoint") != (path is not None):
        raise SpecError(
            f'found initial_weights = "{recipe.initial_weights}" and {path or "no checkpoint"} to start from; '
            f'needed "checkpoint" and one, or neither. Give both, or omit both.'
        )
    if path is None:
        return None
    start = read_checkpoint(path)
    prepared = start.manifest.preprocessing.model_copy(update={"resize_px": preprocessing.resize_px})
    if prepared != preprocessing:
        raise SpecError(
            f"{path} takes images of another mean and deviation than training here. Start from another one."
        )
    val_patients = {radiograph.patient for radiograph in dataset.split("val")}
    refuse_training_patients(val_patients, start.manifest.trained_on, purpose="choosing the epoch")
    return start


def trained_on(dataset: ChestXray14, start: Checkpoint | None, teacher: Teacher | None) -> PatientSet | None:
    """Return the train patients, and those the weights or the teacher have seen before; None where nobody knows these."""
    patients = {radiograph.patient for radiograph in dataset.require("train")}  # a quarantined image's may have others
    before = [] if start is None else [start.manifest.trained_on]
    before += [] if teacher is None else [teacher.trained_on]
    known = [each.patients() for each in before if each is not None]
    return PatientSet.of(patients.union(*known)) if len(known) == len(before) else None


def copy_outputs(model: CheXNet, findings: Sequence[str], start: Checkpoint) -> None:
    """Let the outputs of findings that a checkpoint has answer as there."""
    known = {name: row for row, name in enumerate(start.manifest.findings)}
    with torch.no_grad():
        for row, name in enumerate(findings):
            if name in known:
                model.classifier.weight[row] = start.model.classifier.weight[known[name]]
                model.classifier.bias[row] = start.model.classifier.bias[known[name]]
