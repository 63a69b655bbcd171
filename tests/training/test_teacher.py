"""A run that learns from a teacher: what it learns, what its files say of it, and which teachers it refuses."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from chexnet_deploy.datasets.chestxray14 import ChestXray14
from chexnet_deploy.datasets.patients import PatientSet
from chexnet_deploy.errors import CheckpointError, ChexnetError, DatasetError, SpecError
from chexnet_deploy.export.from_torch.checkpoint import read_checkpoint
from chexnet_deploy.files import sha256_hex
from training.recipe import Recipe
from training.teacher import Ensemble, TeacherManifest, read_teacher, write_teacher
from training.train import BEST, Options, train

FINDINGS = ("Mass", "Nodule")
RECIPE = Recipe(
    findings=FINDINGS, resize_px=32, epochs=2, batch_size=16, max_learning_rate=1e-3, teacher_share=1.0, seed=0
)
A_STRANGER = 99_999


class Constant(nn.Module):
    """Answers the same for every image."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.logits + 0.0 * pixels.mean(dim=(1, 2, 3))[:, None]


def manifest(findings: tuple[str, ...] = FINDINGS, px: int = 32, patients: PatientSet | None = None) -> TeacherManifest:
    seen = patients or PatientSet.of({A_STRANGER})
    return TeacherManifest(findings=findings, resize_px=px, trained_on=seen, weights_sha256=(), val_mean_auroc=0.5)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt2"
    write_teacher(path, Ensemble([Constant(3.0, -2.0), Constant(1.0, -4.0)]).eval(), manifest())
    return path


def ignore(phase: str, done: int, total: int) -> None:
    pass


def test_a_teacher_read_back_answers_as_the_mean_of_its_members(teacher: Path, phantom_root: Path) -> None:
    read = read_teacher(RECIPE, teacher, ChestXray14.open(phantom_root))
    assert read is not None
    answers = read.on(torch.device("cpu"))(torch.zeros((5, 1, 32, 32)))
    torch.testing.assert_close(answers, torch.tensor([[2.0, -3.0]] * 5))
    assert read.sha256 == sha256_hex(teacher.read_bytes())


def test_a_student_learns_the_teachers_answers_and_says_whose_they_are(
    teacher: Path, phantom_root: Path, tmp_path: Path
) -> None:
    slow = RECIPE.model_copy(update={"epochs": 6, "max_learning_rate": 3e-3})
    made = read_checkpoint(train(phantom_root, slow, tmp_path / "run", ignore, options=Options(teacher=teacher)))
    assert made.manifest.taught_by == sha256_hex(teacher.read_bytes())
    assert made.manifest.trained_on is not None
    assert A_STRANGER in made.manifest.trained_on.patients()
    # The labels are absent for most images of both findings; the teacher calls the first of them present.
    with torch.inference_mode():
        logits = made.model(torch.zeros((2, 3, 32, 32)))
    assert float(logits[0, 0]) > 0.5 > -0.5 > float(logits[0, 1])
    # Another teacher is another run.
    other = tmp_path / "other.pt2"
    write_teacher(other, Constant(0.0, 0.0).eval(), manifest())
    with pytest.raises(CheckpointError, match="or teacher"):
        train(phantom_root, slow, tmp_path / "run", ignore, options=Options(teacher=other))
    assert (tmp_path / "run" / BEST).is_file()


def test_a_teacher_that_does_not_fit_is_refused(teacher: Path, phantom_root: Path, tmp_path: Path) -> None:
    dataset = ChestXray14.open(phantom_root)

    def refuse(error: type[ChexnetError], words: str, path: Path | None, recipe: Recipe = RECIPE) -> None:
        with pytest.raises(error, match=words):
            read_teacher(recipe, path, dataset)

    refuse(SpecError, "found teacher_share = 1 and no teacher", None)
    refuse(
        SpecError,
        r"found teacher_share = 0 and .*teacher\.pt2",
        teacher,
        RECIPE.model_copy(update={"teacher_share": 0.0}),
    )
    refuse(SpecError, "answers for Mass, Nodule at 32 px", teacher, RECIPE.model_copy(update={"resize_px": 64}))
    refuse(SpecError, "the recipe has Nodule, Mass", teacher, RECIPE.model_copy(update={"findings": FINDINGS[::-1]}))
    refuse(CheckpointError, "can't be read", tmp_path / "none.pt2")
    (tmp_path / "text.pt2").write_text("not a program")
    refuse(CheckpointError, "is not a teacher", tmp_path / "text.pt2")
    torch.export.save(torch.export.export(Constant(1.0, 1.0), (torch.zeros(2, 1, 32, 32),)), tmp_path / "bare.pt2")
    refuse(CheckpointError, "is not a teacher", tmp_path / "bare.pt2")
    val = PatientSet.of({radiograph.patient for radiograph in dataset.split("val")})
    write_teacher(tmp_path / "leaks.pt2", Constant(1.0, 1.0).eval(), manifest(patients=val))
    refuse(DatasetError, "choosing the epoch", tmp_path / "leaks.pt2")
