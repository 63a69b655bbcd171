"""Train CheXNet on labelled images: one loop, on the CPU, on a GPU, or on as many as torchrun starts.

Writes into the run's folder: best.safetensors (the best epoch on validation patients), resume.pt (everything needed to go on
exactly, written again at each epoch's end and every so many steps) and what logbook.py writes. Reads images from the cache
alone, and never those of test patients.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ReduceLROnPlateau

from chexnet_deploy.datasets.chestxray14 import Split
from chexnet_deploy.datasets.data_set import DataSet, open_data
from chexnet_deploy.datasets.patients import PatientSet
from chexnet_deploy.errors import CheckpointError, DatasetError, OnPhase, SpecError
from chexnet_deploy.evaluation.machine import describe_machine
from chexnet_deploy.export.from_torch.checkpoint import Checkpoint, CheckpointManifest, write_checkpoint
from chexnet_deploy.export.from_torch.import_legacy import load_imagenet_backbone
from chexnet_deploy.export.from_torch.model import CheXNet, Normalise
from chexnet_deploy.files import sha256_hex, write_file
from chexnet_deploy.images.preprocessing import Preprocessing
from chexnet_deploy.inputs import quote_some
from chexnet_deploy.metrics.roc import auroc, mean_auroc, youden_threshold
from chexnet_deploy.runtime.sessions.base import sigmoid
from training.augment import augment
from training.batches import ReadAhead, Shard, TrainingImages, steps_per_epoch
from training.cache import Cache
from training.logbook import append_throughput, draw_curve, epoch_line, write_card, write_metrics, write_scalars
from training.objective import Loss, build_optimiser, build_schedule, start_from_prevalence
from training.prepare import prepare
from training.processes import Processes, keep_freed_memory
from training.recipe import Recipe
from training.start import copy_outputs, read_start, trained_on
from training.teacher import Teacher, read_teacher

BEST = "best.safetensors"
RESUME = "resume.pt"
CACHE = "cache"
_EVAL_BATCH = 32
_CHECK_STEPS = 20  # between looks at the loss: each makes a GPU wait
_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Options:
    """How a run is carried out; nothing here changes what comes out of it, but `shards` and where it starts.

    Attributes:
        cache: folder of prepared images; default: in the run's folder, made if need be.
        imagenet: torchvision's densenet121 file, for recipes that start from it.
        start_from: a checkpoint, likewise: the features, and the outputs of findings that both have.
        teacher: a file of training/teacher.py, for recipes that learn from one.
        shards: parts of a batch that see BatchNorm statistics of their own; default: one a process.
        save_every: steps between two writings of resume.pt inside an epoch; 0 for none.
        workers: processes that decode images for the cache.
    """

    cache: Path | None = None
    imagenet: Path | None = None
    start_from: Path | None = None
    teacher: Path | None = None
    shards: int | None = None
    save_every: int = 0
    workers: int = 1


def train(
    root: Path,
    recipe: Recipe,
    run: Path,
    on_phase: OnPhase,
    *,
    options: Options = Options(),
    processes: Processes = Processes(),  # noqa: B008 - frozen
    on_epoch: Callable[[str], None] | None = None,
) -> Path:
    """Train on the train patients, choose the epoch on the validation patients, return the best checkpoint.

    A run whose folder holds resume.pt of the same recipe and split goes on exactly where that was written.

    Args:
        root: labelled images, as open_data takes them.
        recipe: what.
        run: the run's folder, made if need be.
        on_phase: called with the phase's name, what is done and of how much.
        options: how.
        processes: this process's place among those of the run.
        on_epoch: called with a line of text after each epoch.

    Raises:
        DatasetError, ImageError: the data set can't be used, or the checkpoint to start from was trained on validation patients.
        SpecError: the recipe doesn't fit the data, the processes or the files given; or the folder holds something else.
        CheckpointError: resume.pt belongs to another recipe or split, or the loss is no longer finite.
    """
    if processes.device.type == "cpu":
        keep_freed_memory()
    dataset = open_data(root)
    preprocessing = Preprocessing(resize_px=recipe.resize_px)
    start = read_start(recipe, options.start_from, preprocessing, dataset)
    teacher = read_teacher(recipe, options.teacher, dataset)
    folder = options.cache or run / CACHE
    if processes.is_first:
        _make_folder(run)
    # Before the images are prepared: what can't begin or go on is refused at once.
    trainer = Trainer(
        recipe,
        preprocessing,
        run,
        options,
        processes,
        split_sha256=dataset.split_sha256(),
        trained_on=trained_on(dataset, start, teacher),
        start=start,
        teacher=teacher,
    )
    if processes.is_first:
        prepare(dataset, preprocessing, folder, workers=options.workers, on_phase=on_phase)
    processes.wait_for_all()
    images = read_images(dataset, recipe, folder)
    return trainer.fit(images["train"], images["val"], on_phase, on_epoch)


def _make_folder(run: Path) -> None:
    run.mkdir(parents=True, exist_ok=True)
    there = {path.name for path in run.iterdir()}
    if there and there.isdisjoint({CACHE, RESUME, BEST}):
        raise SpecError(f"{run} holds something that is not a run's. Give a new folder by --out.")


def read_images(dataset: DataSet, recipe: Recipe, cache_folder: Path) -> dict[str, TrainingImages]:
    """Return the images of the splits "train" and "val" out of a finished cache, without those it has quarantined.

    Raises:
        DatasetError: there is no such cache, it is of other images, or a finding has no label.
    """
    cache = Cache.open(cache_folder, Preprocessing(resize_px=recipe.resize_px), dataset)
    unusable = {quarantined.name for quarantined in cache.quarantined}
    images: dict[str, TrainingImages] = {}
    splits: tuple[Split, ...] = ("train", "val")
    for split in splits:
        chosen = dataset.require(split).for_findings(recipe.findings)
        rows = [row for row, name in enumerate(chosen.names) if name not in unusable]
        chosen = chosen.take(np.array(rows, np.intp))
        unknown = [recipe.findings[column] for column in np.flatnonzero(~chosen.labelled.any(axis=0)).tolist()]
        if unknown:
            raise DatasetError(
                f"{dataset.root}: found no {split} image labelled for {quote_some(unknown)}; needed one at least. "
                f"Next: name the findings that it labels in the recipe, or their columns in a TOML."
            )
        truth = np.where(chosen.labelled, chosen.truth, np.float32(np.nan)).astype(np.float32)
        images[split] = TrainingImages(cache.pixels, cache.rows(chosen.names), truth)
    return images


def validation_logits(
    model: nn.Module,
    normalise: nn.Module,
    val: TrainingImages,
    device: torch.device,
    processes: Processes | None = None,
) -> NDArray[np.float32]:
    """Return logits [N, C] of all images in order.

    Whole batches are dealt to the processes: the last digits of an answer depend on its batch, and so must not depend on
    how many processes there are.

    Args:
        model: in eval mode, on the device.
        normalise: likewise.
        val: images.
        device: where to compute.
        processes: that share the work, all of which call this; None for this one alone.
    """
    together = processes or Processes()
    starts = range(0, len(val.rows), _EVAL_BATCH)
    mine = {}
    with torch.inference_mode():
        for start in starts[together.rank :: together.count]:
            pixels = torch.from_numpy(np.ascontiguousarray(val.pixels[val.rows[start : start + _EVAL_BATCH]]))
            images = normalise(pixels.to(device)).to(memory_format=torch.channels_last)
            mine[start] = model(images).float().cpu().numpy()
    answers = {start: logits for each in together.gather(mine) for start, logits in each.items()}
    return np.concatenate([answers[start] for start in starts])


class Trainer:
    """The state of a run: model, optimiser, schedule, average, BatchNorm statistics of each shard, and history."""

    def __init__(
        self,
        recipe: Recipe,
        preprocessing: Preprocessing,
        run: Path,
        options: Options,
        processes: Processes,
        *,
        split_sha256: str | None = None,
        trained_on: PatientSet | None = None,
        start: Checkpoint | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self.recipe, self.preprocessing, self.run, self.options = recipe, preprocessing, run, options
        self.processes, self.split_sha256, self.trained_on = processes, split_sha256, trained_on
        self._start, self.started_from = start, None if start is None else start.sha256
        self.taught_by = None if teacher is None else teacher.sha256
        self.device = processes.device
        self.shards = options.shards or processes.count
        self.mine = processes.my_shards(self.shards)
        if recipe.batch_size % self.shards or recipe.batch_size < 2 * self.shards:
            raise SpecError(f"a batch of {recipe.batch_size} can't be split into {self.shards} shards of at least 2.")
        # The only use of torch's own generator; everything later is drawn by seed, epoch and step.
        torch.manual_seed(recipe.seed)
        model = CheXNet(len(recipe.findings))
        if recipe.initial_weights == "imagenet":
            if options.imagenet is None:
                raise SpecError(
                    "this recipe starts from ImageNet weights. Give torchvision's densenet121 file by --imagenet, "
                    'or set initial_weights = "scratch" to train from scratch.'
                )
            model.features.load_state_dict(load_imagenet_backbone(options.imagenet))
        if start is not None:
            model.features.load_state_dict(start.model.features.state_dict())
        self.model: CheXNet = model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.normalise = Normalise(preprocessing).to(self.device)
        self.teacher = None if teacher is None else teacher.on(self.device)
        self.network: nn.Module = self.model
        if recipe.compile_on_gpu and self.device.type == "cuda":
            self.network = torch.compile(self.model)  # type: ignore[assignment]
        if processes.count > 1:
            # Each shard keeps statistics of its own; they are averaged where they are read.
            self.network = DistributedDataParallel(self.network, broadcast_buffers=False)
        self.optimiser = build_optimiser(self.model, recipe)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.precision == "fp16")
        self.average = [p.detach().clone() for p in self.model.parameters()] if recipe.ema_decay else None
        self.statistics = [self._copy_buffers() for _ in self.mine]
        self.history: list[dict[str, Any]] = []
        self.n_steps = 0
        self._spent_s, self._began_s = 0.0, perf_counter()
        self._saved = self._read_saved()

    def fit(
        self,
        train: TrainingImages,
        val: TrainingImages,
        on_phase: OnPhase,
        on_epoch: Callable[[str], None] | None = None,
    ) -> Path:
        """Run what is left of the epochs and return the path of the best checkpoint."""
        each = steps_per_epoch(len(train.rows), self.recipe.batch_size)
        total = each * self.recipe.epochs
        self.get_ready(train)
        self.loss.is_partial |= not val.labelled.all()
        epoch, step, losses = self._resume()
        began_s, n_done = perf_counter(), epoch * each + step
        while epoch < self.recipe.epochs:
            losses = self._run_epoch(train, epoch, step, losses, on_phase, total)
            self._finish_epoch(epoch, losses, val)
            epoch, step, losses = epoch + 1, 0, []
            self._save(epoch, step, losses)
            if self.processes.is_first:
                self._write_card(len(train.rows), len(val.rows))
                if on_epoch is not None:
                    per_step_s = (perf_counter() - began_s) / (epoch * each - n_done)
                    on_epoch(epoch_line(self.history[-1], self.recipe.epochs, per_step_s * (total - epoch * each)))
        return self.run / BEST

    def get_ready(self, train: TrainingImages) -> None:
        """Set up what depends on the labels: loss, first answers, schedule."""
        labels = torch.from_numpy(train.truth)
        self.loss = Loss(self.recipe.loss, labels).to(self.device)
        if self.recipe.loss != "weighted_bce":  # its answers are balanced, so one half is where they start
            start_from_prevalence(self.model.classifier, labels)
        if self._start is not None:
            copy_outputs(self.model, self.recipe.findings, self._start)
        steps = steps_per_epoch(len(train.rows), self.recipe.batch_size)
        self.schedule = build_schedule(self.optimiser, self.recipe, steps * self.recipe.epochs)

    def _run_epoch(
        self, train: TrainingImages, epoch: int, step: int, losses: list[float], on_phase: OnPhase, total: int
    ) -> list[float]:
        """Make the steps that are left of an epoch; return the mean loss over shards of each step of it."""
        batches = ReadAhead(
            train,
            seed=self.recipe.seed,
            epoch=epoch,
            first_step=step,
            batch_size=self.recipe.batch_size,
            shards=self.shards,
            mine=self.mine,
            pin_memory=self.device.type == "cuda",
        )
        self.model.train()
        pending: list[Tensor] = []
        start, first = perf_counter(), step
        for shards in batches:
            pending.append(self.step(shards))
            step += 1
            if not isinstance(self.schedule, ReduceLROnPlateau):
                self.schedule.step()
            is_to_save = bool(self.options.save_every) and step % self.options.save_every == 0
            if is_to_save or len(pending) >= _CHECK_STEPS:
                losses += self._settle(pending)
            if is_to_save:
                self._save(epoch, step, losses)
            on_phase("training", epoch * (total // self.recipe.epochs) + step, total)
        losses += self._settle(pending)
        if self.processes.is_first:
            seconds = perf_counter() - start
            append_throughput(
                self.run,
                {
                    "epoch": epoch + 1,
                    "images_per_s": (step - first) * self.recipe.batch_size / seconds,
                    "data_wait_share": batches.waited_s / seconds,
                },
            )
        return losses

    def step(self, shards: Sequence[Shard]) -> Tensor:
        """Take one step of the optimiser; return the mean loss of this process's shards, still on the device."""
        self.optimiser.zero_grad()
        total = torch.zeros((), device=self.device)
        for number, shard in enumerate(shards):
            is_last = number == len(shards) - 1
            with self._statistics_of(number), self._synchronised(is_last=is_last):
                loss = self._loss_of(shard)
                self.scaler.scale(loss / len(shards)).backward()  # type: ignore[no-untyped-call]
            total += loss.detach() / len(shards)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.n_steps += 1
        if self.average is not None:
            self._average_weights()
        return total

    def _loss_of(self, shard: Shard) -> Tensor:
        pixels, labels, draws = (
            tensor.to(self.device, non_blocking=True) for tensor in (shard.pixels, shard.truth, shard.draws)
        )
        pixels, labels = augment(pixels, labels, draws, self.recipe.augmentation)
        images = self.normalise(pixels).contiguous(memory_format=torch.channels_last)
        with self._arithmetic():
            logits = self.network(images)
            if self.teacher is not None:
                with torch.no_grad():
                    labels = torch.lerp(
                        labels, self.teacher(pixels.float()).float().sigmoid(), self.recipe.teacher_share
                    )
        loss: Tensor = self.loss(logits, labels)
        return loss

    def _arithmetic(self) -> AbstractContextManager[Any]:
        dtype = _DTYPES[self.recipe.precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def _synchronised(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Gradients are averaged over processes once a step, with the last shard's."""
        if isinstance(self.network, DistributedDataParallel) and not is_last:
            return self.network.no_sync()
        return nullcontext()

    def _settle(self, pending: list[Tensor]) -> list[float]:
        """Return the losses as numbers, averaged over processes, and refuse to go on from one that is not finite."""
        mine = [float(loss) for loss in pending]
        pending.clear()
        values = [float(np.mean(each)) for each in zip(*self.processes.gather(mine), strict=True)]
        bad = [value for value in values if not math.isfinite(value)]
        if bad:
            raise CheckpointError(
                f"the loss is {bad[0]}; what was kept is the best epoch before. Lower max_learning_rate."
            )
        return values

    def _average_weights(self) -> None:
        assert self.average is not None
        # Short at first, or the average would remember the random start for long.
        decay = min(self.recipe.ema_decay, (1 + self.n_steps) / (10 + self.n_steps))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.model.parameters()], 1.0 - decay)

    def _copy_buffers(self) -> list[Tensor]:
        return [buffer.detach().clone() for buffer in self.model.buffers()]

    @contextmanager
    def _statistics_of(self, number: int) -> Iterator[None]:
        """Give the model one shard's BatchNorm statistics, and keep what it makes of them."""
        if len(self.mine) == 1:
            yield
            return
        _assign(self.model.buffers(), self.statistics[number])
        yield
        self.statistics[number] = self._copy_buffers()

    def _all_statistics(self) -> list[list[Tensor]]:
        """Return the statistics of every shard of every process, on the CPU."""
        mine = [self._copy_buffers()] if len(self.mine) == 1 else self.statistics
        gathered = self.processes.gather([[buffer.cpu() for buffer in shard] for shard in mine])
        return [shard for each in gathered for shard in each]

    def _kept_model(self) -> CheXNet:
        """Return the model as it is validated and kept: averaged weights where the recipe says so, averaged statistics."""
        model = copy.deepcopy(self.model)
        if self.average is not None:
            _assign(model.parameters(), self.average)
        if self.shards > 1:
            merged = [torch.stack(each).double().mean(dim=0) for each in zip(*self._all_statistics(), strict=True)]
            _assign(model.buffers(), merged)
        return model.eval()

    def _finish_epoch(self, epoch: int, losses: list[float], val: TrainingImages) -> None:
        """Validate, and keep the weights if they are the best so far."""
        model = self._kept_model()
        logits = validation_logits(model, self.normalise, val, self.device, self.processes)
        val_loss = float(self.loss(*(torch.from_numpy(each).to(self.device) for each in (logits, val.truth))))
        if isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step(val_loss)
        areas = {name: auroc(*_known(logits, val, c)) for c, name in enumerate(self.recipe.findings)}
        mean = mean_auroc(areas)
        line = {
            "epoch": epoch + 1,
            "train_loss": float(np.mean(losses)),
            "val_loss": val_loss,
            "val_mean_auroc": None if math.isnan(mean.value) else mean.value,
            "val_findings_counted": mean.n_counted,
            "learning_rate": self.optimiser.param_groups[0]["lr"],
        }
        is_best = all(_goodness(line, self.recipe) > _goodness(earlier, self.recipe) for earlier in self.history)
        self.history.append(line)
        if not self.processes.is_first:
            return
        if is_best:
            self._write_best(model, logits, val, areas, val_loss)
        write_metrics(self.run, self.history)
        write_scalars(self.run, line)
        draw_curve(self.run, self.history)

    def _write_best(
        self,
        model: CheXNet,
        logits: NDArray[np.float32],
        val: TrainingImages,
        areas: dict[str, float],
        val_loss: float,
    ) -> None:
        findings = self.recipe.findings
        points = {name: youden_threshold(*_known(sigmoid(logits), val, c)) for c, name in enumerate(findings)}
        manifest = CheckpointManifest(
            findings=findings,
            preprocessing=self.preprocessing,
            operating_points={name: point for name, point in points.items() if not math.isnan(point)},
            recipe=self.recipe.model_dump(mode="json"),
            split_sha256=self.split_sha256,
            trained_on=self.trained_on,
            started_from=self.started_from,
            taught_by=self.taught_by,
            metrics={
                "val_loss": val_loss,
                **{f"val_auroc_{name}": None if math.isnan(area) else area for name, area in areas.items()},
            },
            tools={name: version(name) for name in ("chexnet-deploy", "torch")},
        )
        write_checkpoint(self.run / BEST, model, manifest)

    def _write_card(self, n_train: int, n_val: int) -> None:
        is_gpu = self.device.type == "cuda"
        best = max(self.history, key=lambda line: _goodness(line, self.recipe))
        card = {
            "checkpoint_sha256": sha256_hex((self.run / BEST).read_bytes()),
            "best_epoch": best["epoch"],
            "recipe": self.recipe.model_dump(mode="json"),
            "started_from": self.started_from,
            "taught_by": self.taught_by,
            "data": {"n_train_images": n_train, "n_val_images": n_val, "split_sha256": self.split_sha256},
            "curve": self.history,
            "hours": round((self._spent_s + perf_counter() - self._began_s) / 3600.0, 4),
            "device": torch.cuda.get_device_name(self.device) if is_gpu else "cpu",
            "processes": self.processes.count,
            "shards": self.shards,
            "machine": describe_machine().model_dump(mode="json"),
            "torch": version("torch"),
        }
        write_card(self.run, card)

    def _save(self, epoch: int, step: int, losses: list[float]) -> None:
        """Write everything a resumed run needs, complete or not at all."""
        statistics = self._all_statistics()
        if not self.processes.is_first:
            return
        buffer = BytesIO()
        state = {
            **self._made_with(),
            "spent_s": self._spent_s + perf_counter() - self._began_s,
            "epoch": epoch,
            "step": step,
            "losses": losses,
            "n_steps": self.n_steps,
            "model": self.model.state_dict(),
            "statistics": statistics,
            "average": self.average,
            "optimiser": self.optimiser.state_dict(),
            "schedule": {k: v for k, v in self.schedule.state_dict().items() if k != "lr_lambdas"},
            "scaler": self.scaler.state_dict(),
            "history": self.history,
        }
        torch.save(state, buffer)
        write_file(self.run / RESUME, buffer.getvalue())

    def _made_with(self) -> dict[str, Any]:
        """Return what a resumed run must have in common with the one it goes on with."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "split_sha256": self.split_sha256,
            "shards": self.shards,
            "started_from": self.started_from,
            "taught_by": self.taught_by,
        }

    def _read_saved(self) -> dict[str, Any] | None:
        """Return what _save wrote, None where it has not yet."""
        path = self.run / RESUME
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
            made_with = {name: state[name] for name in self._made_with()}
        except Exception as err:  # what torch raises on a damaged file depends on the damaged byte
            raise CheckpointError(
                f"{path} can't be read. Delete it to start this run again from its beginning."
            ) from err
        if made_with != self._made_with():
            raise CheckpointError(
                f"{path} was made with another recipe, split, number of shards, checkpoint to start from or teacher. "
                f"Give another folder, or delete this one."
            )
        return state

    def _resume(self) -> tuple[int, int, list[float]]:
        """Return where to begin: epoch, step and the losses of its steps so far."""
        if self._saved is None:
            return 0, 0, []
        state, self._saved = self._saved, None
        self.model.load_state_dict(state["model"])
        self.statistics = [state["statistics"][number] for number in self.mine]
        _assign(self.model.buffers(), self.statistics[0])
        if self.average is not None:
            self.average = state["average"]
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict({**self.schedule.state_dict(), **state["schedule"]})
        self.scaler.load_state_dict(state["scaler"])
        self.history, self.n_steps, self._spent_s = state["history"], state["n_steps"], state["spent_s"]
        return state["epoch"], state["step"], state["losses"]


def _known(
    scores: NDArray[np.float32], val: TrainingImages, column: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return one finding's scores, and whether it is present, of the images that are labelled for it."""
    rows = val.labelled[:, column]
    return scores[rows, column], val.truth[rows, column] > 0


def _goodness(line: dict[str, Any], recipe: Recipe) -> float:
    """Return what the kept epoch has most of."""
    if recipe.select_by == "val_loss":
        return -float(line["val_loss"])
    return -math.inf if line["val_mean_auroc"] is None else float(line["val_mean_auroc"])


def _assign(targets: Iterator[Tensor] | Iterator[nn.Parameter], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for target, value in zip(targets, values, strict=True):
            target.copy_(value)
