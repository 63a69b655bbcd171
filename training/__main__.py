"""`python -m training ROOT --run FOLDER --recipe FILE`: train CheXNet on ChestX-ray14."""

from pathlib import Path
from typing import Annotated

import typer

from chexnet_deploy.cli import progress_bar, run_program
from training.train import METRICS, Progress, read_recipe, train

RECIPES = Path(__file__).parent / "recipes"

app = typer.Typer(add_completion=False)


@app.command()
def main(
    root: Annotated[Path, typer.Argument(help="ChestX-ray14: tables, split lists and images.")],
    run: Annotated[Path, typer.Option(help="Folder of this run; an unfinished run in it goes on.")],
    recipe: Annotated[Path, typer.Option(help="A TOML recipe.")] = RECIPES / "chexnet14.toml",
) -> None:
    """Train CheXNet; writes best.safetensors, metrics.jsonl and resume.pt into the run's folder."""
    chosen = read_recipe(recipe)
    with progress_bar() as bar:
        tasks = {phase: bar.add_task(phase, total=None) for phase in ("reading", "training")}

        def report(progress: Progress) -> None:
            loss = "" if progress.loss is None else f" loss {progress.loss:.3f}"
            bar.update(
                tasks[progress.phase],
                completed=progress.done,
                total=progress.total,
                description=f"{progress.phase}{loss}",
            )

        best = train(root, chosen, run, report)
    typer.echo(f"{best}\n{(run / METRICS).read_text().splitlines()[-1]}")


if __name__ == "__main__":
    run_program(app)
