"""Kill a training run again and again, also while it writes; its end must be the uninterrupted run's, to the last bit.

python -m benchmarks.robustness.killed_training
"""

import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import CHECKOUT, RESULTS, write_results
from chexnet_deploy.terminal import progress, run_program
from training.logbook import METRICS
from training.phantoms.draw import PhantomSpec, write_phantom
from training.train import BEST, RESUME

PHANTOM = PhantomSpec(patients=150, test_patients=20, side_px=64, seed=5, prevalence=0.2)
# Written every two steps, so that a good part of the kills falls into a writing.
SAVE_EVERY = 2
MOST_WRITINGS, WRITING_APART_S = 8, 0.4  # of some 170 in the whole run
RECIPE = """
resize_px = 64
epochs = {epochs}
batch_size = 16
max_learning_rate = 1e-3
weight_decay = 1e-2
schedule = "cosine"
ema_decay = 0.9
seed = 1

[augmentation]
flip_probability = 0.5
rotate_degrees = 10.0
contrast_share = 0.1
"""

app = typer.Typer(add_completion=False)


@app.command()
def main(
    kills: Annotated[int, typer.Option(min=1, help="How many.")] = 20,
    epochs: Annotated[int, typer.Option(min=1, help="Of the run.")] = 24,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    out: Annotated[Path, typer.Option(help="Results.")] = RESULTS / "killed-training-cpu.json",
) -> None:
    """Train once whole and once in pieces, and compare."""
    with tempfile.TemporaryDirectory() as name, progress() as on_phase:
        folder = Path(name)
        write_phantom(folder / "phantom", PHANTOM, workers=1)
        (folder / "recipe.toml").write_text(RECIPE.format(epochs=epochs))
        start = time.perf_counter()
        _start(folder, "whole").wait()
        whole_s = time.perf_counter() - start
        moments = random.Random(seed)
        killed: list[dict[str, Any]] = []
        while len(killed) < kills:
            process = _start(folder, "pieces")
            # Counted in writings, so that a busy machine has as many kills; then anywhere until the next is done.
            for _ in range(moments.randint(1, MOST_WRITINGS)):
                _wait_for_change(folder / "pieces" / RESUME, process)
            time.sleep(moments.uniform(0.0, WRITING_APART_S))
            if process.poll() is not None:
                break
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            partial = sorted(path.name for path in (folder / "pieces").iterdir() if path.name.startswith("."))
            killed.append({"at": _place(folder / "pieces"), "half_written": partial})
            on_phase("killed", len(killed), kills)
        _start(folder, "pieces").wait()
        results: dict[str, Any] = {
            "torch": torch.__version__,
            "epochs": epochs,
            "kills": killed,
            "n_inside_a_writing": sum(bool(kill["half_written"]) for kill in killed),
            "whole_s": whole_s,
            "same": {
                name: _digest(folder / "whole" / name) == _digest(folder / "pieces" / name) for name in (BEST, METRICS)
            },
            "same_state": _state(folder / "whole") == _state(folder / "pieces"),
        }
    write_results(out, results)
    typer.echo(
        f"{len(killed)} kills, {results['n_inside_a_writing']} inside a writing; same: {results['same']}, {results['same_state']}"
    )
    if not (all(results["same"].values()) and results["same_state"]):
        raise typer.Exit(1)


def _start(folder: Path, run: str) -> subprocess.Popen[bytes]:
    words = [str(folder / "phantom"), "--out", str(folder / run), "--recipe", str(folder / "recipe.toml")]
    return subprocess.Popen(
        [sys.executable, "-m", "training", *words, "--save-every", str(SAVE_EVERY), "--workers", "1"],
        cwd=CHECKOUT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _wait_for_change(path: Path, process: subprocess.Popen[bytes]) -> None:
    before = path.stat().st_mtime_ns if path.exists() else 0
    while process.poll() is None and (path.stat().st_mtime_ns if path.exists() else 0) == before:
        time.sleep(0.005)


def _place(run: Path) -> str:
    state = torch.load(run / RESUME, weights_only=True)
    return f"epoch {state['epoch'] + 1}, step {state['step']}"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _state(run: Path) -> list[str]:
    """Return a hash of every tensor of the last state: weights, average, optimiser."""
    state = torch.load(run / RESUME, weights_only=True)
    optimiser = [value for each in state["optimiser"]["state"].values() for value in each.values()]
    tensors = [*state["model"].values(), *(state["average"] or []), *optimiser]
    return [hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for tensor in tensors]


if __name__ == "__main__":
    run_program(app)
