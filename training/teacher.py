"""A trained network of any architecture, whose answers a recipe with teacher_share learns beside the labels.

The student sees what the teacher sees, every time anew (Beyer et al. 2022, arXiv 2106.05237).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from chexnet_deploy.datasets.chestxray14 import ChestXray14
from chexnet_deploy.datasets.patients import PatientSet, refuse_training_patients
from chexnet_deploy.errors import CheckpointError, SpecError
from chexnet_deploy.files import Sha256, sha256_hex
from chexnet_deploy.inputs import Record
from training.recipe import Recipe

_MANIFEST = "chexnet_deploy.json"


class TeacherManifest(Record):
    """What a teacher says of itself.

    Attributes:
        findings: of its logits, in order.
        resize_px: side of the images it takes.
        trained_on: the patients it has seen.
        weights_sha256: hashes of the files of weights that it started from.
        val_mean_auroc: of the validation patients.
    """

    findings: tuple[str, ...]
    resize_px: int
    trained_on: PatientSet
    weights_sha256: tuple[Sha256, ...]
    val_mean_auroc: float


@dataclass(frozen=True, slots=True)
class Teacher:
    """A teacher as read.

    Attributes:
        program: of pixels float32 [n, 1, S, S] in 0..255 -> logits [n, C].
        trained_on: the patients it has seen.
        sha256: of the file.
    """

    program: torch.export.ExportedProgram
    trained_on: PatientSet
    sha256: str

    def on(self, device: torch.device) -> nn.Module:
        """Return the network on a device."""
        return move_to_device_pass(self.program, device).module()


def write_teacher(path: Path, network: nn.Module, manifest: TeacherManifest) -> None:
    """Write a network in eval mode, on the CPU, as a program that needs no source code."""
    side = manifest.resize_px
    batch = {0: torch.export.Dim("n", min=2)}
    program = torch.export.export(network, (torch.zeros(2, 1, side, side),), dynamic_shapes=(batch,))
    torch.export.save(program, path, extra_files={_MANIFEST: manifest.model_dump_json()})


def read_teacher(recipe: Recipe, path: Path | None, dataset: ChestXray14) -> Teacher | None:
    """Return the teacher that a recipe learns from; None where it learns labels alone.

    Raises:
        CheckpointError: the file is not a teacher.
        DatasetError: it was trained on validation patients, so no epoch could be chosen by them.
        SpecError: the recipe wants none, or this one has other findings or takes images of another size.
    """
    if (recipe.teacher_share > 0.0) != (path is not None):
        raise SpecError(
            f"found teacher_share = {recipe.teacher_share:g} and {path or 'no teacher'}; needed a share above 0 and a "
            f"teacher, or neither. Give both, or omit both."
        )
    if path is None:
        return None
    extra = {_MANIFEST: ""}
    try:
        content = path.read_bytes()
        program = torch.export.load(BytesIO(content), extra_files=extra)
        manifest = TeacherManifest.model_validate(json.loads(extra[_MANIFEST]))
    except OSError as err:
        raise CheckpointError(
            f"{path} can't be read: {err.strerror}. Give a file of python -m training.fine_tune."
        ) from err
    except Exception as err:  # what torch raises on another file depends on its bytes
        raise CheckpointError(f"{path} is not a teacher. Give a file of python -m training.fine_tune.") from err
    if (manifest.findings, manifest.resize_px) != (recipe.findings, recipe.resize_px):
        raise SpecError(
            f"{path} answers for {_named(manifest.findings)} at {manifest.resize_px} px; the recipe has "
            f"{_named(recipe.findings)} at {recipe.resize_px} px. Give a teacher of the same."
        )
    val_patients = {radiograph.patient for radiograph in dataset.split("val")}
    refuse_training_patients(val_patients, manifest.trained_on, purpose="choosing the epoch")
    return Teacher(program, manifest.trained_on, sha256_hex(content))


class Ensemble(nn.Module):
    """The mean of several networks' logits, each of pixels [n, 1, S, S] in 0..255."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits [n, C]."""
        return torch.stack([member(pixels) for member in self.members]).mean(dim=0)


def _named(findings: Sequence[str]) -> str:
    return ", ".join(findings)
