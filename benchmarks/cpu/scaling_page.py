"""The tables of docs/scaling.md, from what benchmarks/cpu/scaling.py and benchmarks/cpu/peers.py measured. Measures nothing."""

from statistics import median
from typing import Final

from benchmarks.common import RESULTS
from benchmarks.cpu.peers import OUT as PEERS
from benchmarks.cpu.peers_page import OURS_INT8
from benchmarks.cpu.peers_page import Results as Peers
from chexnet_deploy.evaluation.machine import Machine
from chexnet_deploy.inputs import Record

OUT = RESULTS / "scaling-cpu.json"
MILLION: Final = 1_000_000
NETWORK_GBIT_S: Final = 10
GPU_RATES: Final = (1_000, 4_000, 16_000)  # images a second, to read the formula at; none was measured
ONE, BATCH = 1, 16


class Input(Record):
    """One kind of file.

    Attributes:
        shape: height and width of the first, in pixels.
        n_files: how many different ones.
        median_kb: of a file, in 1,000 bytes.
        core_ms: to read one, decode it and resize it, of every round.
    """

    shape: tuple[int, int]
    n_files: int
    median_kb: float
    core_ms: tuple[float, ...]


class Results(Record):
    """What was measured on one machine.

    Attributes:
        resize_px: side of the pixels that the model takes.
        inputs: by kind of file.
        row_bytes: of one image in a CSV.
        row_core_us: to append a row that a worker made, of every round.
    """

    machine: Machine
    resize_px: int
    inputs: dict[str, Input]
    row_bytes: int
    row_core_us: tuple[float, ...]


def read_peers() -> Peers:
    """Return what the model costs on a CPU."""
    return Peers.model_validate_json(PEERS.read_text())


def model_core_ms(peers: Peers, batch: int) -> float:
    """Return the core time of one image in our int8 for CPUs: the time it takes, on each of the cores it has."""
    row = next(row for row in peers.rows if row.engine == OURS_INT8)
    return peers.threads * median(row.ms_per_image[batch])


def markdown(results: Results, peers: Peers) -> str:
    """Return the tables."""
    return "\n\n".join(
        [_cpu_table(results, peers), _gpu_table(results), _table_line(results), _caption(results, peers)]
    )


def _cpu_table(results: Results, peers: Peers) -> str:
    model = model_core_ms(peers, ONE)
    lines = [
        "| from | file, KB | decode, core-ms | model, core-ms | images/s per core | core-hours per million "
        f"| cores that fill {NETWORK_GBIT_S} Gbit/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in results.inputs.items():
        decode = median(found.core_ms)
        rate = 1e3 / (decode + model)
        filling = NETWORK_GBIT_S * 1e9 / (8e3 * found.median_kb) / rate
        lines.append(
            f"| {name}, {found.shape[1]} x {found.shape[0]} | {found.median_kb:,.0f} | {decode:.1f} | {model:.1f} | {rate:.0f} "
            f"| {MILLION / rate / 3600:.1f} | {filling:,.0f} |"
        )
    return "\n".join(lines)


def _gpu_table(results: Results) -> str:
    head = "".join(f" {rate:,} images/s: cores, Gbit/s |" for rate in GPU_RATES)
    lines = [f"| for a GPU, from |{head}", "|---|" + "---|" * len(GPU_RATES)]
    for name, found in results.inputs.items():
        cells = [
            f" {rate * median(found.core_ms) / 1e3:,.0f}, {rate * found.median_kb * 8e-6:.1f} |" for rate in GPU_RATES
        ]
        lines.append(f"| {name} |{''.join(cells)}")
    return "\n".join(lines)


def _table_line(results: Results) -> str:
    us = median(results.row_core_us)
    return (
        f"A row has {results.row_bytes} bytes, so a million rows {results.row_bytes * MILLION / 1e6:,.0f} MB; the one process "
        f"that writes the table appends {1e6 / us:,.0f} a second ({us:.1f} core-us each)."
    )


def _caption(results: Results, peers: Peers) -> str:
    counts = ", ".join(str(found.n_files) for found in results.inputs.values())
    return (
        f"Core time, medians of {len(results.row_core_us)} rounds on {results.machine.processor}; {counts} different files; "
        f"pixels of {results.resize_px} px. Model: our int8 for CPUs at {peers.resize_px} px, one image a call on "
        f"{peers.threads} cores of {peers.machine.processor}; in batches of {BATCH} it takes "
        f"{model_core_ms(peers, BATCH):.1f} core-ms."
    )
