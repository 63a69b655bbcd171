"""`make demo`: the whole chain on phantoms, with the commands a user would type.

phantom ChestX-ray14 -> train -> export fp32, fp16, int8 -> bench all three beside fp32. Proves that the machinery
works; no figure here says anything about patients.
"""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from chexnet_deploy.bench import Effort, summary_rows
from chexnet_deploy.bundle import Precision
from chexnet_deploy.cli import print_table, progress, run_program
from chexnet_deploy.parity import EXIT_CODES
from chexnet_deploy.pipeline import bench_bundles, export_bundles
from training.__main__ import RECIPES
from training.phantom import PhantomSpec, write_phantom
from training.train import read_recipe, train

# 420 test patients at this prevalence give every finding more than 30 positive ones.
FULL = PhantomSpec(patients=2300, test_patients=420, side_px=128, seed=2, prevalence=0.20)
SMALL = PhantomSpec(patients=320, test_patients=120, side_px=64, seed=2, prevalence=0.20)
CALIBRATION_IMAGES = {FULL: 256, SMALL: 100}

app = typer.Typer(add_completion=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder for everything; must be new, or one of an earlier demo.")] = Path(
        "demo"
    ),
    recipe: Annotated[Path, typer.Option(help="A TOML recipe.")] = RECIPES / "demo.toml",
    small: Annotated[
        bool, typer.Option(help="Few phantoms: the same steps in half a minute, and a poor model.")
    ] = False,
) -> None:
    """Train on phantoms, export, quantise and bench; ends with a table and the path of the report."""
    spec = SMALL if small else FULL
    if (out / "phantom").exists():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    with progress() as on_phase:
        write_phantom(out / "phantom", spec, on_image=lambda done, total: on_phase("drawing phantoms", done, total))
        best = train(out / "phantom", read_recipe(recipe), out / "run", on_phase)
        bundles = export_bundles(
            best,
            out / "bundles",
            tuple(Precision),
            data_root=out / "phantom",
            calibration_list=None,
            n_calibration_images=CALIBRATION_IMAGES[spec],
            dialect="typed",
            on_phase=on_phase,
        )
        report = bench_bundles(
            [bundle.path for bundle in bundles],
            bundles[0].path,
            out / "phantom",
            "test",
            None,
            None,
            out / "bench",
            effort=Effort(min_runs=30, min_duration_s=1.0),
            threads=None,
            with_html=True,
            on_phase=on_phase,
        )
    print_table(summary_rows(report))
    typer.echo(f"{report.verdict}  {out / 'bench' / 'report.html'}")
    raise typer.Exit(EXIT_CODES[report.verdict])


if __name__ == "__main__":
    run_program(app)
