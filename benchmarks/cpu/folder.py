"""How fast `predict` carries a folder into a table, beside decoding alone and the session alone; and how much memory it takes.

    python -m benchmarks.cpu.folder BUNDLE [--folder IMAGES] [--out benchmarks/results/folder-cpu.json]
    python -m benchmarks.cpu.folder BUNDLE --dicom --n-phantoms 200 --out benchmarks/results/folder-dicom-cpu.json

Without a folder, 1,000 phantoms of 1024 x 1024 px are written to a temporary one, as PNG or as DICOM of 12 bits in lossless
JPEG 2000: 125 drawn, each in its eight flips and quarter turns. All sides are measured in turns, round after round, and who
goes first changes; a rate is the median of the rounds. Files stay in the system's memory.

Decoding and computing share the cores. Where an image costs d core-seconds of one and c of the other, n cores can't finish
more than n / (d + c) images a second, which is 1 / (1 / decoding alone + 1 / computing alone): the bound that the bar is
held against. The smaller of the two rates alone can only be reached where they run on different chips. Nobody reaches the bound
either: what decoding leaves in a core's cache is of no use to computing. So a loop on each core, which decodes an image, computes
it, and does nothing else, stands beside it.
"""

import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter, process_time, sleep
from typing import Annotated, Any, Final, NamedTuple, TypeAlias

import numpy as np
import typer
from PIL import Image
from pydicom.uid import JPEG2000Lossless

from benchmarks.common import COMMAND, RESULTS, checkout_environment, resident_mib, write_results
from benchmarks.rigs.synthetic_dicom import make_dicom
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.cli.options import OnProvider, ProviderName
from chexnet_deploy.errors import OnPhase
from chexnet_deploy.images import ImageReader, Pixels, Preprocessing, find_images, read_image
from chexnet_deploy.runtime.predictor import Predictor
from chexnet_deploy.runtime.sessions.base import Provider, Session
from chexnet_deploy.runtime.sessions.open import open_session, resolve_provider
from chexnet_deploy.runtime.streaming import Flow, choose_flow, usable_cores
from chexnet_deploy.terminal import progress, run_program
from training.phantoms.draw import PhantomSpec, draw_radiograph, plan_studies

BAR: Final = 0.95
MEMORY_GROWTH_LIMIT_MIB: Final = 16.0
SETTLED_ROWS: Final = 100
LOOPS: Final = "decode and infer, a loop on each core"
N_ALONE: Final = 160  # images for the sides that are even from the first to the last
SAMPLE_EVERY_S: Final = 0.2

Side: TypeAlias = Callable[[], int]
"""Carries some images as far as it goes; returns how many."""

app = typer.Typer(add_completion=False)


class Speed(NamedTuple):
    """One turn of one side. Core time is what it cost, whatever else ran on the machine."""

    images_per_s: float
    core_ms_per_image: float


class Sample(NamedTuple):
    """One look at the running command."""

    seconds: float
    rows: int
    resident_mib: float


@app.command()
def main(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    folder: Annotated[Path | None, typer.Option(help="Radiographs; default: phantoms.")] = None,
    n_phantoms: Annotated[int, typer.Option(min=8, help="How many, where there is no folder.")] = 1000,
    dicom: Annotated[bool, typer.Option("--dicom", help="Phantoms as compressed DICOM.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each side.")] = 3,
    provider: OnProvider = ProviderName.AUTO,
    out: Annotated[Path, typer.Option(help="The JSON to write.")] = RESULTS / "folder-cpu.json",
) -> None:
    """Measure, write the JSON and print it in words; exits 1 below the bar or where memory grows."""
    opened, cores, backend = Bundle.open(bundle), usable_cores(), resolve_provider(provider.value)
    with tempfile.TemporaryDirectory(prefix="chexnet-folder-") as place, progress() as on_phase:
        if folder is None:
            folder = Path(place) / "phantoms"
            draw_phantoms(folder, n_phantoms, cores, on_phase, as_dicom=dicom)
        paths = list(find_images([folder]).paths())
        median_kb = median(path.stat().st_size for path in paths) / 1000
        sides = bare_sides(opened, paths, cores, backend) | settings_sides(opened, paths, cores, backend)
        speeds: dict[str, list[Speed]] = {name: [] for name in (*sides, "whole")}
        series: list[list[Sample]] = []
        for turn in range(rounds):
            names = [*sides, "whole"]
            for i, name in enumerate(names[::-1] if turn % 2 else names):
                if name == "whole":
                    core = _children_s()
                    series.append(watch_predict(bundle, folder, Path(place) / f"{turn}.csv", backend))
                    # With the start of the program, which has no core time of its own here.
                    core_ms = 1000.0 * (_children_s() - core) / len(paths)
                    speeds[name].append(Speed(settled_rate(series[-1]), core_ms))
                else:
                    speeds[name].append(timed(sides[name]))
                on_phase("measuring", turn * len(names) + i + 1, rounds * len(names))
    results = summarise(opened, median_kb, speeds, series, cores, backend)
    write_results(out, results)
    print_results(results)
    raise typer.Exit(0 if results["times_additive_bound"] >= BAR and results["memory_is_flat"] else 1)


def draw_phantoms(folder: Path, n: int, workers: int, on_phase: OnPhase, *, as_dicom: bool = False) -> None:
    """Write n PNG or DICOM files: every drawn one in its eight flips and quarter turns."""
    folder.mkdir()
    studies = plan_studies(PhantomSpec(patients=n, test_patients=1))
    done = 0

    def write(first: int) -> int:
        gray = draw_radiograph(studies[first // 8], seed=0, side_px=1024)
        for i, (turns, is_flipped) in list(enumerate(product(range(4), (False, True))))[: n - first]:
            turned = np.rot90(gray[:, ::-1] if is_flipped else gray, turns)
            path = folder / f"{first + i:08d}_000.png"
            if as_dicom:
                path.with_suffix(".dcm").write_bytes(make_dicom(turned.astype(np.uint16) * 16, syntax=JPEG2000Lossless))
            else:
                Image.fromarray(np.ascontiguousarray(turned)).save(path)
        return min(8, n - first)

    with ThreadPoolExecutor(workers) as pool:
        for written in pool.map(write, range(0, n, 8)):
            done += written
            on_phase("drawing", done, n)


def bare_sides(bundle: Bundle, paths: Sequence[Path], cores: int, provider: Provider) -> dict[str, Side]:
    """Return what measures decoding alone and the session alone, in images a second, all cores at work."""
    preprocessing = bundle.manifest.preprocessing
    pixels = [preprocessing(read_image(path)) for path in paths[:N_ALONE]]
    one_call = open_session(bundle, provider=provider)
    call_per_core = open_session(bundle, threads=1, provider=provider)
    return {
        "decode": partial(decode_all, paths, preprocessing, cores),
        "infer, one call on all cores": partial(infer_all, one_call, pixels, 1),
        "infer, a call on each core": partial(infer_all, call_per_core, pixels, cores),
        LOOPS: partial(loop_all, call_per_core, paths[:N_ALONE], preprocessing, cores),
    }


def settings_sides(bundle: Bundle, paths: Sequence[Path], cores: int, provider: Provider) -> dict[str, Side]:
    """Return what measures files to findings, in this process, with other settings than the default."""
    settings: list[tuple[int | None, Flow]] = [
        (None, Flow(calls=1, workers=cores + 1)),
        (None, Flow(batch_size=8, calls=1, workers=cores + 1)),
        (1, Flow(calls=cores, workers=cores)),
        (1, Flow(calls=cores, workers=cores + 1)),
        (1, Flow(calls=cores, workers=2 * cores)),
        (1, Flow(batch_size=8, calls=cores, workers=cores + 1)),
    ]
    sides: dict[str, Side] = {}
    for threads, flow in settings:
        predictor = Predictor(open_session(bundle, threads=threads, provider=provider), bundle.manifest, flow)
        words = f"threads {threads or 'all'}, batch {flow.batch_size}, calls {flow.calls}, workers {flow.workers}"
        sides[f"stream, {words}"] = partial(stream_all, predictor, paths[:N_ALONE])
    return sides


def decode_all(paths: Sequence[Path], preprocessing: Preprocessing, cores: int) -> int:
    """Carry files to pixels; return how many."""
    with ImageReader(processes=cores) as reader, ThreadPoolExecutor(cores) as pool:
        return sum(len(pixels) for pixels in pool.map(lambda path: preprocessing(reader.read(path)), paths))


def loop_all(session: Session, paths: Sequence[Path], preprocessing: Preprocessing, cores: int) -> int:
    """Carry files to logits, every core its share, one image after another; return how many."""
    with ImageReader(processes=cores) as reader, ThreadPoolExecutor(cores) as pool:

        def loop(part: Sequence[Path]) -> int:
            return sum(len(session.run(preprocessing(reader.read(path)))[0]) for path in part)

        return sum(pool.map(loop, [paths[i::cores] for i in range(cores)]))


def infer_all(session: Session, pixels: Sequence[Pixels], calls: int) -> int:
    """Carry pixels to logits, one image a call; return how many."""
    with ThreadPoolExecutor(calls) as pool:
        return sum(len(logits) for logits, _ in pool.map(session.run, pixels))


def stream_all(predictor: Predictor, paths: Sequence[Path]) -> int:
    """Carry files to findings; return how many."""
    return sum(1 for _ in predictor.predict_stream(paths))


def timed(side: Side) -> Speed:
    """Run one side once."""
    wall, core = perf_counter(), process_time()
    n = side()
    return Speed(n / (perf_counter() - wall), 1000.0 * (process_time() - core) / n)


def watch_predict(bundle: Path, folder: Path, table: Path, provider: Provider) -> list[Sample]:
    """Run the command as a user does and look at its rows and memory until it ends."""
    words = [*COMMAND, "predict", str(bundle), str(folder), "--out", str(table), "--provider", provider]
    samples: list[Sample] = []
    written, rows, n_read = table.with_name(f"{table.name}.partial"), 0, 0
    start = perf_counter()
    with subprocess.Popen(
        words, env=checkout_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while process.poll() is None:
            if written.exists():
                with written.open("rb") as file:
                    file.seek(n_read)
                    new = file.read()
                n_read, rows = n_read + len(new), rows + new.count(b"\n")
                samples.append(Sample(perf_counter() - start, max(0, rows - 1), resident_mib(process.pid)))
            sleep(SAMPLE_EVERY_S)
        if process.returncode:
            raise RuntimeError(f"predict ended with {process.returncode}")
    samples.append(Sample(perf_counter() - start, table.read_bytes().count(b"\n") - 1, samples[-1].resident_mib))
    return samples


def settled_rate(samples: Sequence[Sample]) -> float:
    """Return images a second from the first hundred rows to the last row."""
    settled = _settled(samples)
    return (settled[-1].rows - settled[0].rows) / (settled[-1].seconds - settled[0].seconds)


def summarise(
    bundle: Bundle,
    median_kb: float,
    speeds: Mapping[str, Sequence[Speed]],
    series: Sequence[Sequence[Sample]],
    cores: int,
    provider: Provider,
) -> dict[str, Any]:
    """Return the JSON's content."""
    medians = {name: median(speed.images_per_s for speed in samples) for name, samples in speeds.items()}
    core_ms = {name: median(speed.core_ms_per_image for speed in samples) for name, samples in speeds.items()}
    decode = medians["decode"]
    infer = max(medians["infer, one call on all cores"], medians["infer, a call on each core"])
    whole, bound = medians["whole"], 1.0 / (1.0 / decode + 1.0 / infer)
    growth_mib = max(max(s.resident_mib for s in _settled(run)) - _settled(run)[0].resident_mib for run in series)
    flow = choose_flow(bundle.manifest, threads=1, provider=provider, cores=cores)
    return {
        "cores": cores,
        "provider": provider,
        "precision": bundle.manifest.precision.value,
        "resize_px": bundle.manifest.preprocessing.resize_px,
        "n_images": series[-1][-1].rows,
        "median_file_kb": median_kb,
        "settings": {"threads": 1, "batch_size": flow.batch_size, "calls": flow.calls, "workers": flow.workers},
        "median_images_per_s": medians,
        "median_core_ms_per_image": core_ms,
        "additive_bound_images_per_s": bound,
        "times_additive_bound": whole / bound,
        "bar_times_additive_bound": BAR,
        "times_loops": whole / medians[LOOPS],
        "whole_with_start_images_per_s": median(run[-1].rows / run[-1].seconds for run in series),
        "memory_growth_mib": growth_mib,
        "memory_growth_limit_mib": MEMORY_GROWTH_LIMIT_MIB,
        "memory_is_flat": growth_mib <= MEMORY_GROWTH_LIMIT_MIB,
        "images_per_s": {name: [speed.images_per_s for speed in samples] for name, samples in speeds.items()},
        "seconds_rows_mib": [[round(s.seconds, 1), s.rows, round(s.resident_mib, 1)] for s in series[-1][::5]],
    }


def print_results(results: dict[str, Any]) -> None:
    """Print the figures in words."""
    for name, rate in results["median_images_per_s"].items():
        core_ms = results["median_core_ms_per_image"][name]
        typer.echo(f"{name:60} {rate:7.1f} images/s {core_ms:7.1f} core-ms an image")
    typer.echo(
        f"whole: {results['times_additive_bound']:.2f} of the additive bound "
        f"{results['additive_bound_images_per_s']:.1f} (bar {BAR:g}), {results['times_loops']:.2f} of the loops; "
        f"memory grew by {results['memory_growth_mib']:.1f} MiB after the first {SETTLED_ROWS} images"
    )


def _children_s() -> float:
    usage = os.times()
    return usage.children_user + usage.children_system


def _settled(samples: Sequence[Sample]) -> list[Sample]:
    return [sample for sample in samples if sample.rows >= SETTLED_ROWS]


if __name__ == "__main__":
    run_program(app)
