"""What benchmarks/cpu/peers.py measured, as records, a table and a figure. Measures nothing."""

from collections.abc import Mapping
from pathlib import Path
from statistics import median

from benchmarks.int8.accuracy import Accuracy
from chexnet_deploy.evaluation.machine import Machine
from chexnet_deploy.inputs import Record

OURS_FP32, OURS_INT8 = "ours, fp32", "ours, int8"


class Row(Record):
    """One engine.

    Attributes:
        accuracy: beside torch in float32; None for torch itself.
        ms_per_image: by batch size, of every round, in the rounds' order.
        note: how it was run, where there was a choice, or why it was not.
    """

    engine: str
    accuracy: Accuracy | None
    ms_per_image: dict[int, tuple[float, ...]]
    note: str = ""


class Results(Record):
    """All engines on one machine.

    Attributes:
        nncf_with_open_batch: noise_mean of NNCF's model compiled with an open batch dimension, which is why none is timed so.
        avx2: OpenVINO's engines with the CPU's instructions limited to AVX2; None where not measured.
    """

    machine: Machine
    packages: dict[str, str]
    resize_px: int
    threads: int
    n_calibration_images: int
    n_test_images: int
    fp32_mean_auroc: float
    nncf_with_open_batch: float
    rows: tuple[Row, ...]
    avx2: tuple[Row, ...] | None = None


def times_faster(ours: Row, theirs: Row, batch: int) -> float | None:
    """Return the median over rounds of their time over ours in the same round; None where one was not timed."""
    pairs = zip(ours.ms_per_image.get(batch, ()), theirs.ms_per_image.get(batch, ()), strict=False)
    ratios = [other / own for own, other in pairs]
    return median(ratios) if ratios else None


def markdown_table(results: Results) -> str:
    """Return the results as tables for people, AVX2 below where it was measured."""
    parts = [_table(results.rows), _caption(results)]
    if results.avx2 is not None:
        parts += ["Instructions limited to AVX2, so without VNNI:", _table(results.avx2)]
    return "\n\n".join(parts)


def draw(results: Results, out: Path) -> None:
    """Draw speed against logit noise to a file; its suffix is its format."""
    from matplotlib.figure import Figure

    from chexnet_deploy.evaluation.pages.style import COLOURS

    batches = sorted({batch for row in results.rows for batch in row.ms_per_image})
    figure = Figure(figsize=(5.2 * len(batches), 4.2), layout="constrained")
    for batch, axes in zip(batches, figure.subplots(1, len(batches), squeeze=False)[0], strict=True):
        for row in results.rows:
            if row.accuracy is None or batch not in row.ms_per_image:
                continue
            is_ours = row.engine.startswith("ours")
            x, y = median(row.ms_per_image[batch]), 100 * row.accuracy.noise_mean
            axes.plot(x, y, "o" if is_ours else "s", color=COLOURS[1 if is_ours else 0])
            axes.annotate(row.engine, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
        axes.set(xscale="log", yscale="log", xlabel="ms per image", title=f"batch {batch}")
        axes.margins(x=0.35, y=0.15)
        axes.grid(which="major", alpha=0.3)
        axes.set_ylabel("logit noise, % of the logits' standard deviation")
    figure.suptitle(f"{results.machine.processor}, {results.threads} threads; lower left is better")
    figure.savefig(out)


def _table(rows: tuple[Row, ...]) -> str:
    by_name: Mapping[str, Row] = {row.engine: row for row in rows}
    lines = [
        "| engine | ms/image, batch 1 | ours int8 is faster | ms/image, batch 16 | ours int8 is faster | mean AUROC change "
        "| max \\|Δp\\| | logit noise, mean (worst) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if not row.ms_per_image:
            lines.append(f"| {row.engine} | {row.note} | | | | | | |")
            continue
        speeds = [text for batch in (1, 16) for text in _speed(row, by_name[OURS_INT8], batch)]
        lines.append("| " + " | ".join([row.engine, *speeds, *_accuracy(row.accuracy)]) + " |")
    return "\n".join(lines)


def _speed(row: Row, ours: Row, batch: int) -> tuple[str, str]:
    times, ratio = row.ms_per_image.get(batch), times_faster(ours, row, batch)
    if not times or ratio is None:
        return "", ""
    return f"{median(times):.1f} (least {min(times):.1f})", "" if row is ours else f"{ratio:.2f} x"


def _accuracy(found: Accuracy | None) -> tuple[str, str, str]:
    if found is None:
        return "the reference", "", ""
    return (
        f"{found.mean_auroc_change:+.4f}",
        f"{found.max_abs_probability_difference:.4f}",
        f"{100 * found.noise_mean:.2g} % ({100 * found.noise_worst:.2g} %)",
    )


def _caption(results: Results) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results.packages.items())
    return (
        f"{results.resize_px} px, {results.threads} threads, engines in turns; medians, and of ratios within the same round. "
        f"{results.n_test_images} test images, fp32 mean AUROC {results.fp32_mean_auroc:.3f}; {results.n_calibration_images} "
        f"calibration images, the same for all. Peers on OpenVINO get fixed batch sizes: with an open one NNCF's int8 answers "
        f"wrongly (logit noise {100 * results.nncf_with_open_batch:.0f} %). {results.machine.processor}. {versions}."
    )
