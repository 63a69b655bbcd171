"""`make demo`: the whole chain on phantoms, with the commands a user would type.

phantom ChestX-ray14 -> train -> export fp32, fp16, int8 -> bench all three beside fp32. Proves that the machinery
works; no figure here says anything about patients.
"""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from chexnet_deploy.errors import SpecError
from chexnet_deploy.evaluation.bench_report import print_bench
from chexnet_deploy.evaluation.engines import Effort
from chexnet_deploy.evaluation.parity import EXIT_CODES
from chexnet_deploy.terminal import progress, run_program
from training.chain import BENCH, BUNDLES, RUN, train_export_bench
from training.phantoms.draw import PhantomSpec, write_phantom

# 420 test patients at this prevalence give every finding more than 30 positive ones.
FULL = PhantomSpec(patients=2300, test_patients=420, side_px=128, seed=2, prevalence=0.20)
SMALL = PhantomSpec(patients=320, test_patients=120, side_px=64, seed=2, prevalence=0.20)
MARKER = "demo.txt"
PARTS = ("phantom", RUN, BUNDLES, BENCH)
CALIBRATION_IMAGES = {FULL: 256, SMALL: 100}

app = typer.Typer(add_completion=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder for everything; must be new, or one of an earlier demo.")] = Path(
        "demo"
    ),
    recipe: Annotated[str, typer.Option(help="A recipe's name, or a path to a .toml.")] = "demo",
    small: Annotated[
        bool,
        typer.Option(
            help="Few phantoms: the same steps in a minute, a poor model, and too few patients to pass every gate."
        ),
    ] = False,
) -> None:
    """Train on phantoms, export, quantise and bench; ends with a table and the path of the report."""
    spec = SMALL if small else FULL
    _make_room(out)
    with progress() as on_phase:
        write_phantom(out / "phantom", spec, on_image=lambda done, total: on_phase("drawing phantoms", done, total))
        report = train_export_bench(
            out / "phantom",
            recipe,
            out,
            n_calibration_images=CALIBRATION_IMAGES[spec],
            effort=Effort(min_runs=30, min_duration_s=1.0),
            on_phase=on_phase,
        )
    print_bench(report, out / BENCH / "report.html")
    raise typer.Exit(EXIT_CODES[report.verdict])


def _make_room(out: Path) -> None:
    """Make the folder, or clear it of what an earlier demo left, and of nothing else."""
    if out.is_dir() and any(out.iterdir()):
        if not (out / MARKER).is_file():
            raise SpecError(f"{out} holds something that is not a demo's. Give another folder by --out.")
        for name in PARTS:
            shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).write_text("Written by `python -m training.demo`, which clears its parts when run here again.\n")


if __name__ == "__main__":
    run_program(app)
