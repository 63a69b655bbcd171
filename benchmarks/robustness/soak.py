"""The long checks in full, of which `make test` runs seeded samples (tests/benchmarks/test_soak.py).

    python -m benchmarks.robustness.soak      writes results/soak-cpu.json; exit 1 where a check fails

The demo with its bars; export killed at every moment of its life; bundles and PNGs with a damaged byte; one Predictor
asked many times.
"""

import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, sleep

import numpy as np
import typer

from benchmarks.common import COMMAND, RESULTS, resident_mib, write_results
from benchmarks.statistics.phantom_difficulty import measure_difficulty
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.errors import BundleError, ChexnetError, ImageError
from chexnet_deploy.images.reader import read_image
from chexnet_deploy.inputs import ReportRecord
from chexnet_deploy.runtime.predictor import Predictor
from chexnet_deploy.terminal import progress, run_program

MEMORY_GROWTH_LIMIT_MIB = 16.0

app = typer.Typer(add_completion=False)
OnDone = Callable[[int], None]


class Outcome(ReportRecord):
    """One check; it passed when nothing failed."""

    tried: int
    failures: tuple[str, ...]
    figures: dict[str, float]


@app.command()
def main() -> None:
    """Run every long check and write the result."""
    folder = Path(tempfile.mkdtemp(prefix="chexnet-soak-"))
    demo = folder / "demo"
    try:
        outcomes = {"demo": check_demo(demo)}
        checkpoint, data, int8 = demo / "run" / "best.safetensors", demo / "phantom", demo / "bundles" / "int8"
        image = min((data / "images").iterdir())
        with progress() as on_phase:

            def counted(name: str, total: int) -> OnDone:
                return lambda done: on_phase(name, done, total)

            outcomes["killed exports"] = kill_exports(
                checkpoint, data, folder / "killed", 40, on_done=counted("kill", 40)
            )
            outcomes["damaged bundles"] = damage_bundles(
                int8, folder / "copy", 2000, seed=0, on_done=counted("bundle", 2000)
            )
            outcomes["damaged PNGs"] = damage_pngs(
                image, folder / "png", 20_000, seed=0, on_done=counted("PNG", 20_000)
            )
            outcomes["predictions"] = predict_often(int8, image, 3000, on_done=counted("predict", 3000))
    finally:
        shutil.rmtree(folder)
    results = {
        "outcomes": {name: outcome.model_dump() for name, outcome in outcomes.items()},
    }
    typer.echo(write_results(RESULTS / "soak-cpu.json", results))
    if any(outcome.failures for outcome in outcomes.values()):
        raise typer.Exit(1)


def check_demo(out: Path) -> Outcome:
    """Run the demo and hold it to its bars: a good model that thumbnails don't explain, and an int8 that loses nothing."""
    start = perf_counter()
    done = subprocess.run([sys.executable, "-m", "training.demo", "--out", out], capture_output=True, text=True)
    figures: dict[str, float] = {"exit code": done.returncode, "seconds": perf_counter() - start}
    if done.returncode:
        return Outcome(tried=1, failures=(done.stderr[-2000:],), figures=figures)
    difficulty = measure_difficulty(out)
    areas = difficulty.chexnet_mean_auroc
    figures |= {f"mean AUROC {name}": area for name, area in areas.items()}
    figures["thumbnail mean AUROC"] = difficulty.thumbnail_mean_auroc
    figures["fewest positive patients"] = difficulty.fewest_positive_patients
    bars = {
        "mean AUROC of fp32 >= 0.85": areas["fp32"] >= 0.85,
        "int8 within 0.005 of fp32": abs(areas["int8"] - areas["fp32"]) <= 0.005,
        "thumbnails <= 0.70": difficulty.thumbnail_mean_auroc <= 0.70,
        "30 positive patients a finding": difficulty.fewest_positive_patients >= 30,
        "5 minutes": figures["seconds"] <= 300,
    }
    return Outcome(tried=1, failures=tuple(bar for bar, is_met in bars.items() if not is_met), figures=figures)


def kill_exports(checkpoint: Path, data: Path, folder: Path, n: int, *, on_done: OnDone) -> Outcome:
    """SIGKILL an export at n moments spread over the time a whole one takes; what is visible afterwards must be whole."""

    def command(out: Path) -> list[str]:
        words = ("export", checkpoint, "--out", out, "--precision", "fp32,int8", "--data", data)
        return [*COMMAND, *map(str, words), "--calibration-images", "100"]

    start = perf_counter()
    subprocess.run(command(folder / "whole"), check=True, capture_output=True)
    whole_s = perf_counter() - start
    failures, n_hidden = [], 0
    for i in range(n):
        out = folder / f"{i:03d}"
        with subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            sleep(whole_s * (i + 0.5) / n)
            process.send_signal(signal.SIGKILL)
        entries = list(out.iterdir()) if out.exists() else []
        hidden = [entry for entry in entries if ".partial-" in entry.name]
        n_hidden += len(hidden)
        for bundle in (entry for entry in entries if entry.is_dir() and entry not in hidden):
            failures += _complaints(bundle, f"killed after {i + 0.5}/{n}")
        on_done(i + 1)
    return Outcome(
        tried=n, failures=tuple(failures), figures={"seconds of a whole export": whole_s, "hidden": n_hidden}
    )


def _complaints(bundle: Path, when: str) -> list[str]:
    try:
        Bundle.open(bundle)
    except ChexnetError as err:
        return [f"{when}: {err}"]
    return []


def damage_bundles(bundle: Path, copy: Path, n: int, *, seed: int, on_done: OnDone) -> Outcome:
    """Change one byte of a bundle at n random places, in each of its files in turn; every one must be refused."""
    shutil.copytree(bundle, copy)
    chance = random.Random(seed)
    files = sorted(copy.iterdir())
    failures = []
    for i in range(n):
        path = files[i % len(files)]
        place, mask = chance.randrange(path.stat().st_size), chance.randrange(1, 256)
        _change_byte(path, place, mask)
        try:
            Bundle.open(copy)
            failures.append(f"{path.name} byte {place} ^ {mask} was accepted")
        except BundleError:
            pass
        _change_byte(path, place, mask)
        on_done(i + 1)
    Bundle.open(copy)  # all bytes are back
    return Outcome(tried=n, failures=tuple(failures), figures={})


def _change_byte(path: Path, place: int, mask: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        old = file.read(1)[0]
        file.seek(place)
        file.write(bytes([old ^ mask]))


def damage_pngs(image: Path, folder: Path, n: int, *, seed: int, on_done: OnDone) -> Outcome:
    """Change one byte of a PNG, or cut it short, at n random places; every one must be refused, none may crash."""
    folder.mkdir(parents=True)
    whole, damaged = image.read_bytes(), folder / "damaged.png"
    chance = random.Random(seed)
    failures = []
    for i in range(n):
        place = chance.randrange(len(whole))
        content = whole[:place]
        if i % 2:
            content += bytes([whole[place] ^ chance.randrange(1, 256)]) + whole[place + 1 :]
        damaged.write_bytes(content)
        try:
            read_image(damaged)
            failures.append(f"{'changed' if i % 2 else 'cut'} at byte {place}: was read")
        except ImageError:
            pass
        on_done(i + 1)
    return Outcome(tried=n, failures=tuple(failures), figures={})


def predict_often(bundle: Path, image: Path, n: int, *, on_done: OnDone) -> Outcome:
    """Ask one Predictor n times for the same image: the same bits each time, and no growing memory."""
    failures = []
    with Predictor.open(bundle) as predictor:
        first = predictor.predict(image)
        settled_mib = resident_mib()
        for i in range(n):
            again = predictor.predict(image)
            if again.probabilities != first.probabilities or any(
                not np.array_equal(again.maps[name], first.maps[name]) for name in first.maps
            ):
                failures.append(f"answer {i + 1} differs from the first")
            if i == n // 10:
                settled_mib = resident_mib()
            on_done(i + 1)
        growth_mib = resident_mib() - settled_mib
    if growth_mib > MEMORY_GROWTH_LIMIT_MIB:
        failures.append(f"memory grew by {growth_mib:.1f} MiB, limit {MEMORY_GROWTH_LIMIT_MIB}")
    return Outcome(tried=n, failures=tuple(failures), figures={"memory growth in MiB": growth_mib})


if __name__ == "__main__":
    run_program(app)
