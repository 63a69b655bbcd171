"""`python -m training ROOT --run FOLDER --recipe FILE`: train CheXNet on ChestX-ray14."""

from pathlib import Path
from typing import Annotated

import typer

from chexnet_deploy.cli import progress, run_program
from training.train import METRICS, read_recipe, train

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
    with progress() as on_phase:
        best = train(root, chosen, run, on_phase)
    typer.echo(f"{best}\n{(run / METRICS).read_text().splitlines()[-1]}")


if __name__ == "__main__":
    run_program(app)
