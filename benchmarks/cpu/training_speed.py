"""Images a second of the trainer beside a plain loop, as CheXNet's public reproductions have it, in turns on one machine.

    python -m benchmarks.cpu.training_speed --data ROOT

The plain loop decodes each PNG in a DataLoader's workers whenever it is seen, and trains in float32 without a memory format.
"""

import multiprocessing
import statistics
import tempfile
from collections.abc import Iterator
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.common import RESULTS, write_results
from chexnet_deploy.datasets import DataSet, open_data
from chexnet_deploy.datasets.chestxray14 import ChestXray14, truth
from chexnet_deploy.datasets.findings import FINDINGS
from chexnet_deploy.datasets.nih_tables import Radiograph
from chexnet_deploy.export.from_torch.model import CheXNet
from chexnet_deploy.images.preprocessing import Preprocessing
from chexnet_deploy.terminal import progress, run_program
from training.batches import ReadAhead, TrainingImages
from training.prepare import prepare
from training.processes import Processes, keep_freed_memory
from training.recipe import Recipe, read_recipe
from training.train import Options, Trainer

STEPS, WARMUP_STEPS, WORKERS = 6, 2, 2

app = typer.Typer(add_completion=False)


@app.command()
def main(
    data: Annotated[Path, typer.Option(help="ChestX-ray14.", envvar="CHEXNET_CHESTXRAY14")],
    recipe: Annotated[str, typer.Option(help="A recipe's name, or a path to a .toml.")] = "chexnet14",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each.")] = 5,
    out: Annotated[Path, typer.Option(help="Results.")] = RESULTS / "training-speed-cpu.json",
) -> None:
    """Measure both, and print the ratio."""
    chosen = read_recipe(recipe).model_copy(update={"initial_weights": "scratch"})
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, progress() as on_phase:
        # Each in a process of its own: how ours takes memory would be the plain loop's too.
        pipes, processes = {}, []
        for name in seconds:
            pipes[name], its_end = spawn.Pipe()
            processes.append(spawn.Process(target=_answer, args=(name, its_end, data, chosen, Path(folder))))
            processes[-1].start()
            its_end.close()  # or the death of the process would go unseen
        for pipe in pipes.values():
            _seconds_of(WARMUP_STEPS, pipe)
        for turn in range(rounds):
            for name, pipe in pipes.items():
                seconds[name].append(_seconds_of(STEPS, pipe))
            on_phase("measuring", turn + 1, rounds)
        for pipe in pipes.values():
            pipe.send(0)
        for process in processes:
            process.join()
    speeds = {name: [STEPS * chosen.batch_size / each for each in values] for name, values in seconds.items()}
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    results = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "recipe": chosen.model_dump(mode="json"),
        "images_per_s": speeds,
        "median_images_per_s": medians,
        "ratio": statistics.median(a / b for a, b in zip(speeds["ours"], speeds["plain"], strict=True)),
    }
    write_results(out, results)
    typer.echo(
        f"plain {medians['plain']:.2f}, ours {medians['ours']:.2f} images/s: {results['ratio']:.2f} times\n{out}"
    )


def _seconds_of(n_steps: int, pipe: Connection) -> float:
    pipe.send(n_steps)
    seconds: float = pipe.recv()
    return seconds


def _answer(name: str, pipe: Connection, data: Path, recipe: Recipe, folder: Path) -> None:
    """Make as many steps as are asked for and say how long they took, until none is asked for."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    radiographs = ChestXray14.open(data).split("train")
    if name == "plain":
        steps = _plain_steps(radiographs, recipe, device)
    else:
        keep_freed_memory()
        steps = _our_steps(open_data(data), radiographs, recipe, device, folder)
    while n_steps := pipe.recv():
        start = perf_counter()
        for _ in range(n_steps):
            next(steps)
        pipe.send(perf_counter() - start)


class _Pngs(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, radiographs: tuple[Radiograph, ...], side: int) -> None:
        self.radiographs, self.side = radiographs, side
        self.truth = truth(radiographs).astype(np.float32)
        self.mean, self.std = (
            np.array(values, np.float32) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        )

    def __len__(self) -> int:
        return len(self.radiographs)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        path = self.radiographs[i].path
        assert path is not None
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB").resize((self.side, self.side), Image.Resampling.BILINEAR))
        if torch.rand(()) < 0.5:
            pixels = pixels[:, ::-1]
        images = (pixels.astype(np.float32) / 255.0 - self.mean) / self.std
        return torch.from_numpy(np.ascontiguousarray(images.transpose(2, 0, 1))), torch.from_numpy(self.truth[i])


def _plain_steps(radiographs: tuple[Radiograph, ...], recipe: Recipe, device: torch.device) -> Iterator[None]:
    torch.manual_seed(0)
    loader: DataLoader[Any] = DataLoader(
        _Pngs(radiographs, recipe.resize_px),
        recipe.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=WORKERS,
        persistent_workers=True,
    )
    model = CheXNet(len(FINDINGS)).to(device).train()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in cycle([0]):
        for images, labels in loader:
            optimiser.zero_grad()
            logits = model(images.to(device))
            loss: Any = nn.functional.binary_cross_entropy_with_logits(logits, labels.to(device))
            loss.backward()
            optimiser.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            yield


def _our_steps(
    dataset: DataSet, radiographs: tuple[Radiograph, ...], recipe: Recipe, device: torch.device, folder: Path
) -> Iterator[None]:
    preprocessing = Preprocessing(resize_px=recipe.resize_px)
    with progress() as on_phase:
        cache = prepare(dataset, preprocessing, folder / "cache", workers=WORKERS, on_phase=on_phase)
    images = TrainingImages(
        cache.pixels, cache.rows([r.image for r in radiographs]), truth(radiographs).astype(np.float32)
    )
    trainer = Trainer(recipe, preprocessing, folder / "run", Options(), Processes(device=device))
    trainer.get_ready(images)
    epoch = 0
    while True:
        batches = ReadAhead(
            images, seed=recipe.seed, epoch=epoch, batch_size=recipe.batch_size, pin_memory=device.type == "cuda"
        )
        for shards in batches:
            trainer.step(shards)
            if device.type == "cuda":
                torch.cuda.synchronize()
            yield
        epoch += 1


if __name__ == "__main__":
    run_program(app)
