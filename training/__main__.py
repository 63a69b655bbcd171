"""`python -m training ROOT --out FOLDER --recipe NAME`: train CheXNet on labelled images.

On several GPUs: `torchrun --nproc_per_node=8 -m training ROOT --out FOLDER`.
"""

import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from chexnet_deploy.datasets.data_set import open_data
from chexnet_deploy.errors import SpecError
from chexnet_deploy.export.from_torch.import_legacy import IMAGENET_FILE
from chexnet_deploy.terminal import progress, run_program
from training.logbook import METRICS
from training.processes import join_processes, leave_processes
from training.recipe import read_recipe
from training.seeds import measure_seed_noise
from training.train import CACHE, Options, train

app = typer.Typer(add_completion=False)


@app.command(epilog="Example: python -m training ROOT --out runs/first --recipe chexnet14")
def main(
    root: Annotated[Path, typer.Argument(help="Labelled images: ChestX-ray14's folder, a table, or its TOML.")],
    out: Annotated[Path, typer.Option(help="Folder of this run; an unfinished run in it goes on.")],
    recipe: Annotated[str, typer.Option(help="A recipe's name, or a path to a .toml.")] = "chexnet14",
    cache: Annotated[
        Path | None, typer.Option(help="Folder of prepared images; default: made in the run's folder.")
    ] = None,
    imagenet: Annotated[Path | None, typer.Option(help=f"ImageNet weights: {IMAGENET_FILE}")] = None,
    start_from: Annotated[
        Path | None,
        typer.Option(help="A .safetensors checkpoint to start from; its resolution and findings may be others."),
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option(help="A file of `python -m training.fine_tune`, for a recipe with teacher_share.")
    ] = None,
    shards: Annotated[
        int | None,
        typer.Option(min=1, help="Parts of a batch with BatchNorm statistics of their own; default: one a process."),
    ] = None,
    save_every: Annotated[int, typer.Option(min=0, help="Steps between two writings of resume.pt; 0: epochs.")] = 500,
    seeds: Annotated[
        int, typer.Option(min=1, help="Train that many, each in a folder of its own, and report how they differ.")
    ] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Processes that decode images for the cache.")] = os.cpu_count()
    or 1,
) -> None:
    """Train CheXNet; writes best.safetensors, run.json, metrics.jsonl, a learning curve and resume.pt into the run's folder."""
    chosen = read_recipe(recipe)
    processes = join_processes()
    if start_from is not None:
        if imagenet is not None:
            raise SpecError("found --imagenet and --start-from, needed one start. Omit one of them.")
        chosen = chosen.model_copy(update={"initial_weights": "checkpoint"})
    if chosen.initial_weights == "imagenet" and imagenet is None:
        if processes.is_first:
            typer.echo(
                f"no ImageNet weights were given, so training starts from scratch. They are at {IMAGENET_FILE}",
                err=True,
            )
        chosen = chosen.model_copy(update={"initial_weights": "scratch"})
    options = Options(
        cache=cache,
        imagenet=imagenet,
        start_from=start_from,
        teacher=teacher,
        shards=shards,
        save_every=save_every,
        workers=workers,
    )
    # Progress bars are for terminals; a log under nohup or a scheduler gets lines.
    on_epoch = None if sys.stdout.isatty() else typer.echo
    for note in open_data(root).notes if processes.is_first else ():
        typer.echo(f"note: {note}", err=True)
    runs = {out: chosen}
    if seeds > 1:
        options = replace(options, cache=cache or out / CACHE)
        numbers = range(chosen.seed, chosen.seed + seeds)
        runs = {out / f"seed-{seed}": chosen.model_copy(update={"seed": seed}) for seed in numbers}
    for folder, one in runs.items():
        with progress() if processes.is_first else nullcontext(lambda phase, done, total: None) as on_phase:
            best = train(root, one, folder, on_phase, options=options, processes=processes, on_epoch=on_epoch)
        if processes.is_first:
            typer.echo(f"{best}\n{(folder / METRICS).read_text().splitlines()[-1]}")
    leave_processes(processes)
    if seeds > 1 and processes.is_first:
        noise = measure_seed_noise(root, chosen, out, list(numbers), options)
        typer.echo(noise.model_dump_json(indent=1, exclude={"findings"}))


if __name__ == "__main__":
    run_program(app)
