"""What decoding in a process of its own costs, beside the same codec called in this process.

    python -m benchmarks.robustness.dicom_isolation      writes results/dicom-isolation-cpu.json; exit 1 where the bar is missed

Both ways take turns, image by image, so that other work on the machine meets both. The picture is a noisy ramp of a detector's
size; both ways must give the same one.
"""

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Annotated

import numpy as np
import typer

from benchmarks.common import RESULTS, write_results
from benchmarks.rigs.synthetic_dicom import LOSSLESS, make_dicom
from chexnet_deploy.images.dicom.child import decode_words
from chexnet_deploy.images.dicom.decoder import Decoder
from chexnet_deploy.images.dicom.header import read_header
from chexnet_deploy.images.gray import Gray
from chexnet_deploy.inputs import ReportRecord
from chexnet_deploy.terminal import run_program

MOST_MS = 10.0
ROWS, COLUMNS = 1955, 1841  # a real CR chest's

app = typer.Typer(add_completion=False)


class Cost(ReportRecord):
    """Median times of one image, from the file's bytes to gray.

    Attributes:
        isolated_ms: by Decoder.
        in_process_ms: the same codec, called here.
        difference_ms: median of the differences of neighbouring images.
    """

    isolated_ms: float
    in_process_ms: float
    difference_ms: float


@app.command()
def main(runs: Annotated[int, typer.Option(help="Of each way and transfer syntax.")] = 25) -> None:
    """Measure and write the result."""
    costs = measure(ROWS, COLUMNS, runs)
    results = {"costs": {k: v.model_dump() for k, v in costs.items()}}
    typer.echo(write_results(RESULTS / "dicom-isolation-cpu.json", results))
    if any(cost.difference_ms > MOST_MS for cost in costs.values()):
        raise typer.Exit(1)


def measure(rows: int, columns: int, runs: int) -> dict[str, Cost]:
    """Return the cost of each lossless transfer syntax, for a picture of 12 bits."""
    ramp = np.linspace(0, 4000, columns)[np.newaxis, :] + np.random.default_rng(0).normal(0, 8, (rows, columns))
    words = np.clip(ramp, 0, 4095).astype(np.uint16)
    costs = {}
    with Decoder() as decoder:
        decoder.warm_up()
        for syntax in LOSSLESS:
            content = make_dicom(words, syntax=syntax)
            if not np.array_equal(decoder.decode(content).gray, _decode_here(content)):
                raise AssertionError(f"{syntax}: the two ways differ")
            pairs = [(_time(_decode_there(decoder), content), _time(_decode_here, content)) for _ in range(runs)]
            times = np.array(pairs)
            isolated, here = times[:, 0].tolist(), times[:, 1].tolist()
            costs[syntax] = Cost(
                isolated_ms=median(isolated),
                in_process_ms=median(here),
                difference_ms=median((times[:, 0] - times[:, 1]).tolist()),
            )
    return costs


def _decode_there(decoder: Decoder) -> Callable[[bytes], Gray]:
    return lambda content: decoder.decode(content).gray


def _decode_here(content: bytes) -> Gray:
    header = read_header("the DICOM object", content)
    grayscale = header.grayscale
    question = {
        "transfer_syntax_uid": header.transfer_syntax_uid,
        "rows": header.rows,
        "columns": header.columns,
        "bits_allocated": grayscale.bits_allocated,
        "bits_stored": grayscale.bits_stored,
        "is_signed": grayscale.is_signed,
    }
    return grayscale.apply(decode_words(question, bytes(header.pixel_data)))


def _time(decode: Callable[[bytes], Gray], content: bytes) -> float:
    start = perf_counter()
    decode(content)
    return (perf_counter() - start) * 1e3


if __name__ == "__main__":
    run_program(app)
