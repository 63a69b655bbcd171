"""Train CheXNet on ChestX-ray14: one device, one loop, read top to bottom.

Writes into the run's folder: best.safetensors (lowest validation loss), resume.pt (everything needed to go on exactly),
metrics.jsonl (a line an epoch). Never touches test patients.
"""

import json
import math
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from chexnet_deploy.chestxray14 import ChestXray14
from chexnet_deploy.errors import CheckpointError, SpecError
from chexnet_deploy.export.checkpoint import CheckpointManifest, write_checkpoint
from chexnet_deploy.export.model import CheXNet, Normalise
from chexnet_deploy.files import write_file
from chexnet_deploy.findings import FINDINGS
from chexnet_deploy.metrics.auroc import auroc, mean_auroc, youden_threshold
from chexnet_deploy.phases import OnPhase
from chexnet_deploy.predictor import sigmoid
from chexnet_deploy.preprocessing import Pixels, Preprocessing
from chexnet_deploy.scoring import LabelledImages, iter_pixels
from chexnet_deploy.spec import describe, read_toml
from chexnet_deploy.splits import PatientSet

BEST = "best.safetensors"
RESUME = "resume.pt"
METRICS = "metrics.jsonl"
_EVAL_BATCH = 32


class Recipe(BaseModel):
    """One training run as data; see training/recipes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    resize_px: Annotated[int, Field(ge=32, le=1024, multiple_of=32)]
    epochs: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=2)]
    max_learning_rate: Annotated[float, Field(gt=0.0)]
    weight_decay: Annotated[float, Field(ge=0.0)]
    flip_probability: Annotated[float, Field(ge=0.0, le=1.0)]  # left-right, as the paper's only augmentation
    seed: Annotated[int, Field(ge=0)]


def read_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        SpecError: missing, not TOML, or a field is unknown, missing or out of range.
    """
    try:
        return Recipe.model_validate(read_toml(path))
    except ValidationError as err:
        raise SpecError(f"{path}: {describe(err)}. See training/recipes for examples.") from err


def train(root: Path, recipe: Recipe, run: Path, on_phase: OnPhase) -> Path:
    """Train on the official train patients, choose the epoch on the validation patients, return the best checkpoint.

    A run whose folder holds resume.pt of the same recipe and split goes on after its last finished epoch.

    Args:
        root: ChestX-ray14 on disk.
        recipe: how.
        run: the run's folder, made if need be.
        on_phase: called with the phase's name, what is done and of how much, after every image read and every step.

    Raises:
        DatasetError, ImageError: the data set can't be used.
        CheckpointError: resume.pt belongs to another recipe or split, or the loss is no longer finite.
    """
    dataset = ChestXray14.open(root)
    preprocessing = Preprocessing(resize_px=recipe.resize_px)
    splits = [LabelledImages.of(dataset.split(name), FINDINGS) for name in ("train", "val")]
    total = sum(len(split.paths) for split in splits)
    read = 0
    cached: list[Pixels] = []
    for split in splits:
        arrays = []
        for pixels in iter_pixels(split.paths, preprocessing):
            arrays.append(pixels)
            read += 1
            on_phase("reading", read, total)
        cached.append(np.concatenate(arrays))
    run.mkdir(parents=True, exist_ok=True)
    trained_on = PatientSet.of(set(splits[0].patients.tolist()))
    return _Trainer(recipe, preprocessing, dataset.split_sha256(), trained_on, run).fit(
        (cached[0], splits[0].truth), (cached[1], splits[1].truth), on_phase
    )


class _Trainer:
    """The state of a run: model, optimiser, schedule, random numbers and history."""

    def __init__(
        self, recipe: Recipe, preprocessing: Preprocessing, split_sha256: str, trained_on: PatientSet, run: Path
    ) -> None:
        self.recipe, self.preprocessing, self.run = recipe, preprocessing, run
        self.split_sha256, self.trained_on = split_sha256, trained_on
        # On the CPU torch's generator is the only source of randomness: initialisation, flips and the order of the images.
        torch.manual_seed(recipe.seed)
        self.model = CheXNet(len(FINDINGS)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.normalise = Normalise(preprocessing)
        # Decay on weights only: BatchNorm's scale and shift and the biases have no scale to be kept small.
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        plain = [p for p in self.model.parameters() if p.ndim <= 1]
        self.optimiser = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=recipe.max_learning_rate,
            betas=(0.9, 0.99),
        )
        self.history: list[dict[str, Any]] = []

    def fit(
        self, train: tuple[Pixels, NDArray[np.bool_]], val: tuple[Pixels, NDArray[np.bool_]], on_phase: OnPhase
    ) -> Path:
        """Run the epochs that are left and return the path of the best checkpoint."""
        pixels, truth = torch.from_numpy(train[0]), torch.from_numpy(train[1]).to(torch.float32)
        # A last batch of one image has no variance for BatchNorm, so incomplete batches are dropped; the order is new
        # every epoch, so every image has its turn.
        steps = len(pixels) // self.recipe.batch_size
        if steps == 0:
            raise SpecError(f"{len(pixels)} training images are fewer than one batch of {self.recipe.batch_size}.")
        total = steps * self.recipe.epochs
        self._start_from_prevalence(truth)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimiser, self.recipe.max_learning_rate, total_steps=total, pct_start=0.1, div_factor=4.0
        )
        self._resume(schedule)
        for epoch in range(len(self.history), self.recipe.epochs):
            order = torch.randperm(len(pixels))
            self.model.train()
            losses = []
            for step in range(steps):
                rows = order[step * self.recipe.batch_size : (step + 1) * self.recipe.batch_size]
                losses.append(self._step(self._flip(pixels[rows]), truth[rows]))
                schedule.step()
                on_phase("training", epoch * steps + step + 1, total)
            self._finish_epoch(epoch, float(np.mean(losses)), val, schedule)
        return self.run / BEST

    def _start_from_prevalence(self, truth: Tensor) -> None:
        """Set the head's bias so that the first answers are the prevalences, which the first epoch then needn't learn."""
        share = truth.mean(dim=0).clamp(1e-3, 1.0 - 1e-3)
        with torch.no_grad():
            self.model.classifier.bias.copy_(torch.logit(share))

    def _flip(self, pixels: Tensor) -> Tensor:
        is_flipped = torch.rand(len(pixels)) < self.recipe.flip_probability
        return torch.where(is_flipped[:, None, None, None], pixels.flip(3), pixels)

    def _step(self, pixels: Tensor, truth: Tensor) -> float:
        images = self.normalise(pixels).to(memory_format=torch.channels_last)
        loss = nn.functional.binary_cross_entropy_with_logits(self.model(images), truth)
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        value = loss.item()
        if not math.isfinite(value):
            raise CheckpointError(
                f"the loss is {value}; what was kept is the best epoch before. Lower max_learning_rate."
            )
        return value

    def _finish_epoch(
        self,
        epoch: int,
        train_loss: float,
        val: tuple[Pixels, NDArray[np.bool_]],
        schedule: torch.optim.lr_scheduler.OneCycleLR,
    ) -> None:
        """Validate, keep the weights if they are the best so far, and write what a resumed run needs."""
        logits = self._logits(val[0])
        truth = torch.from_numpy(val[1]).to(torch.float32)
        val_loss = nn.functional.binary_cross_entropy_with_logits(torch.from_numpy(logits), truth).item()
        areas = {name: auroc(logits[:, c], val[1][:, c]) for c, name in enumerate(FINDINGS)}
        mean = mean_auroc(areas)
        line = {
            "epoch": epoch + 1,
            "train_loss": train_loss,
            "val_loss": val_loss,
            "val_mean_auroc": None if math.isnan(mean.value) else mean.value,
            "val_findings_counted": mean.n_counted,
        }
        is_best = all(val_loss < earlier["val_loss"] for earlier in self.history)
        self.history.append(line)
        if is_best:
            self._write_best(logits, val[1], areas, val_loss)
        self._write_resume(schedule)
        lines = "".join(json.dumps(entry) + "\n" for entry in self.history)
        write_file(self.run / METRICS, lines.encode())

    def _logits(self, pixels: Pixels) -> NDArray[np.float32]:
        self.model.eval()
        batches = []
        with torch.inference_mode():
            for i in range(0, len(pixels), _EVAL_BATCH):
                images = self.normalise(torch.from_numpy(pixels[i : i + _EVAL_BATCH]))
                batches.append(self.model(images.to(memory_format=torch.channels_last)).numpy())
        return np.concatenate(batches)

    def _write_best(
        self, logits: NDArray[np.float32], truth: NDArray[np.bool_], areas: dict[str, float], val_loss: float
    ) -> None:
        points = {name: youden_threshold(sigmoid(logits[:, c]), truth[:, c]) for c, name in enumerate(FINDINGS)}
        manifest = CheckpointManifest(
            findings=FINDINGS,
            preprocessing=self.preprocessing,
            operating_points={name: point for name, point in points.items() if not math.isnan(point)},
            recipe=self.recipe.model_dump(),
            split_sha256=self.split_sha256,
            trained_on=self.trained_on,
            metrics={
                "val_loss": val_loss,
                **{f"val_auroc_{name}": None if math.isnan(area) else area for name, area in areas.items()},
            },
            tools={name: version(name) for name in ("chexnet-deploy", "torch")},
        )
        write_checkpoint(self.run / BEST, self.model, manifest)

    def _write_resume(self, schedule: torch.optim.lr_scheduler.OneCycleLR) -> None:
        buffer = BytesIO()
        state = {
            "recipe": self.recipe.model_dump(),
            "split_sha256": self.split_sha256,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": schedule.state_dict(),
            "random": torch.get_rng_state(),
            "history": self.history,
        }
        torch.save(state, buffer)
        write_file(self.run / RESUME, buffer.getvalue())

    def _resume(self, schedule: torch.optim.lr_scheduler.OneCycleLR) -> None:
        path = self.run / RESUME
        if not path.exists():
            return
        try:
            state = torch.load(path, weights_only=True)
            made_with = (state["recipe"], state["split_sha256"])
        except Exception as err:  # what torch raises on a damaged file depends on the damaged byte
            raise CheckpointError(
                f"{path} can't be read. Delete it to start this run again from its beginning."
            ) from err
        if made_with != (self.recipe.model_dump(), self.split_sha256):
            raise CheckpointError(
                f"{path} was made with another recipe or split. Give another folder, or delete this one."
            )
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"])
        self.history = state["history"]
