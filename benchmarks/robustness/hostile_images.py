"""Damaged and lying images through the path a service uses, in great number: the process that reads them must outlive all.

    python -m benchmarks.robustness.hostile_images      writes results/hostile-images-cpu.json; exit 1 where a bar is missed

Each input is a whole PNG, JPEG or DICOM file, damaged once or a few times by a seeded generator: bytes changed, the end cut
off, spans moved, DICOM elements edited, removed, repeated or made to lie about their length, codestreams damaged inside a
header that stays whole. What is read in spite of the damage is counted, and how often the picture differs: no codec sees
every damaged bit, so only a checksum of the sender could.
"""

import random
import resource
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Annotated

import numpy as np
import typer

from benchmarks.common import RESULTS, write_results
from benchmarks.robustness.damaged_files import Seed, damage, seed_of, synthetic_seeds
from chexnet_deploy.errors import ImageError, OnPhase
from chexnet_deploy.images import Gray, ImageReader
from chexnet_deploy.images.dicom.decoder import DecodeLimits, Decoder
from chexnet_deploy.images.dicom.process import DecodeError
from chexnet_deploy.inputs import ReportRecord
from chexnet_deploy.terminal import progress, run_program

SLOWEST_ANSWER_S = 3.0
MEMORY_GROWTH_MIB = 256.0
DEADLINE_S = 2.0  # a service's own: what remains of 3 s goes to starting the next process

app = typer.Typer(add_completion=False)


class HostileOutcome(ReportRecord):
    """What became of the inputs.

    Attributes:
        tried: inputs.
        answers: how many were read as the whole file is, read with other pixels, or refused, by reason; "process lost" where
            a codec crashed or hung and took its process with it.
        by_seed: the same by kind of file.
        slowest_s: the longest wait for an answer.
        slowest_refusals: reasons of the five slowest answers, with their seconds.
        memory_growth_mib: of this process, from the hundredth answer to its highest point.
        escaped: exceptions other than ImageError, which would have ended a service's request with a bug.
        failures: bars missed.
    """

    tried: int
    answers: dict[str, int]
    by_seed: dict[str, dict[str, int]]
    slowest_s: float
    slowest_refusals: tuple[tuple[float, str], ...]
    memory_growth_mib: float
    escaped: tuple[str, ...]
    failures: tuple[str, ...]


@app.command()
def main(
    n: Annotated[int, typer.Option("-n", help="Inputs.")] = 20_000,
    seed: Annotated[int, typer.Option(help="Of the generator.")] = 0,
    samples: Annotated[Path | None, typer.Option(help="A folder of .dcm files to damage too.")] = None,
    out: Annotated[Path, typer.Option(help="Where the result goes.")] = RESULTS / "hostile-images-cpu.json",
) -> None:
    """Read many hostile images and write what became of them."""
    seeds = synthetic_seeds()
    if samples is not None:
        seeds += [seed_of(path.stem, path.read_bytes()) for path in sorted(samples.glob("*.dcm"))]
    with progress() as on_phase, tempfile.TemporaryDirectory(prefix="chexnet-hostile-") as folder:
        outcome = read_hostile(seeds, n, seed=seed, folder=Path(folder), on_phase=on_phase)
    typer.echo(write_results(out, {"seed": seed, "outcome": outcome.model_dump()}))
    if outcome.failures:
        raise typer.Exit(1)


def read_hostile(seeds: Sequence[Seed], n: int, *, seed: int, folder: Path, on_phase: OnPhase) -> HostileOutcome:
    """Read n damaged copies of the seeds, in turn, each DICOM as bytes and each PNG and JPEG as a file.

    Args:
        seeds: whole files.
        n: how many copies.
        seed: of the generator; the same seed damages alike.
        folder: for the PNG and JPEG files.
        on_phase: told how far it is.
    """
    path = folder / "hostile.img"
    answers: dict[str, Counter[str]] = {each.name: Counter() for each in seeds}
    waits: list[tuple[float, str]] = []
    escaped: list[str] = []
    chance = random.Random(seed)
    settled_kib = 0
    with Decoder() as patient, ImageReader() as reader:
        whole = {each.name: _read(each.content, patient, reader, path) for each in seeds}
    with (
        Decoder(limits=DecodeLimits(processor_s=DEADLINE_S, deadline_s=DEADLINE_S)) as decoder,
        ImageReader() as reader,
    ):
        decoder.warm_up()
        for i in range(n):
            origin = seeds[i % len(seeds)]
            damaged = damage(origin, chance)
            start = perf_counter()
            try:
                gray = _read(damaged, decoder, reader, path)
                answer = "read alike" if np.array_equal(gray, whole[origin.name]) else "read otherwise"
            except ImageError as err:
                answer = err.reason.value
                if isinstance(err.__cause__, DecodeError) and not err.__cause__.is_usable:
                    answer += ", process lost"
            except Exception as err:  # noqa: BLE001  the very thing that must not happen is to be counted
                answer = "escaped"
                escaped.append(f"input {i} of {origin.name}: {type(err).__name__}")
            waits.append((perf_counter() - start, answer))
            answers[origin.name][answer] += 1
            if i == min(100, n // 10):
                settled_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            on_phase("hostile images", i + 1, n)
    growth_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - settled_kib) / 1024
    return _judge(answers, sorted(waits, reverse=True)[:5], growth_mib, escaped, n)


def _judge(
    answers: dict[str, Counter[str]], slowest: list[tuple[float, str]], growth_mib: float, escaped: list[str], n: int
) -> HostileOutcome:
    total: Counter[str] = sum(answers.values(), Counter())
    failures = []
    if escaped:
        failures.append(f"{len(escaped)} exceptions that are no ImageError")
    if slowest[0][0] > SLOWEST_ANSWER_S:
        failures.append(f"an answer after {slowest[0][0]:.2f} s, limit {SLOWEST_ANSWER_S:g}")
    if growth_mib > MEMORY_GROWTH_MIB:
        failures.append(f"memory grew by {growth_mib:.0f} MiB, limit {MEMORY_GROWTH_MIB:g}")
    return HostileOutcome(
        tried=n,
        answers=dict(total.most_common()),
        by_seed={name: dict(counts.most_common()) for name, counts in answers.items()},
        slowest_s=slowest[0][0],
        slowest_refusals=tuple(slowest),
        memory_growth_mib=growth_mib,
        escaped=tuple(escaped[:20]),
        failures=tuple(failures),
    )


def _read(content: bytes, decoder: Decoder, reader: ImageReader, path: Path) -> Gray:
    if content[128:132] == b"DICM":
        return decoder.decode(content).gray
    path.write_bytes(content)
    return reader.read(path)


if __name__ == "__main__":
    run_program(app)
