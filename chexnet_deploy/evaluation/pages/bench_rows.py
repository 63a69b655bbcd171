"""The tables of a bench's page: rows of text, column -> cell. Computes nothing."""

from collections.abc import Sequence

from markupsafe import Markup

from chexnet_deploy.evaluation.as_text import UNDEFINED, number, signed
from chexnet_deploy.evaluation.bench_report import BenchReport, EngineResult
from chexnet_deploy.evaluation.pages.charts import draw_times
from chexnet_deploy.evaluation.parity import ParityReport


def speed_rows(report: BenchReport, marks: dict[str, Markup]) -> list[dict[str, str]]:
    """Return one row an engine for the first screen: verdict, accuracy and speed.

    Args:
        report: of all.
        marks: engine -> its mark in the picture.
    """
    rows = []
    for engine in report.engines:
        parity = engine.parity
        area = "not measured"
        if parity is not None:
            change = "" if report.is_reference(engine) else f" ({_mean_difference(parity).partition(' ')[0]})"
            area = number(parity.mean_auroc_candidate, 4) + change
        rows.append(
            {
                "engine": marks.get(engine.name, Markup("")) + engine.name,
                "verdict": report.verdict_of(engine),
                "AUROC": area,
                "ms": f"{engine.single_stream.p50_ms:.1f}" + ("*" if engine.is_emulated else ""),
                "images/s": f"{engine.offline.images_per_s:.0f}" + ("*" if engine.is_emulated else ""),
            }
        )
    return rows


def latency_rows(report: BenchReport, low_ms: float, high_ms: float) -> list[dict[str, str]]:
    """Return one row an engine: times of one image, and batches; histograms reach from `low_ms` to `high_ms`."""
    return [
        {
            "engine": engine.name + (" (emulated)" if engine.is_emulated else ""),
            f"{low_ms:.0f} to {high_ms:.0f} ms": draw_times(engine.single_stream.samples_ms, low_ms, high_ms),
            "p50 ms": f"{engine.single_stream.p50_ms:.2f}",
            "p90 ms": f"{engine.single_stream.p90_ms:.2f}",
            "p99 ms": f"{engine.single_stream.p99_ms:.2f}",
            "runs": str(len(engine.single_stream.samples_ms)),
            "batch": str(engine.offline.batch_size),
            "images/s": f"{engine.offline.images_per_s:.1f}",
        }
        for engine in report.engines
    ]


def difference_rows(engines: Sequence[EngineResult]) -> list[dict[str, str]]:
    """Return one row a finding, one column an engine: the AUROC difference with its interval."""
    lanes = {engine.name: engine.parity.findings for engine in engines if engine.parity is not None}
    return [
        {
            "finding": rows[0].finding,
            "positive patients": str(rows[0].n_positive_patients),
            "margin": ", ".join(dict.fromkeys(f"{row.margin:g}" for row in rows)),
            **{
                name: signed(row.difference, row.difference_low, row.difference_high)
                for name, row in zip(lanes, rows, strict=True)
            },
        }
        for rows in zip(*lanes.values(), strict=True)
    ]


def finding_rows(parity: ParityReport) -> list[dict[str, str]]:
    """Return one row a finding, and the mean: what the AUROC gate saw."""
    rows = [
        {
            "finding": row.finding,
            "positives": str(row.n_positive),
            "positive patients": str(row.n_positive_patients),
            "AUROC reference": number(row.auroc_reference, 4),
            "AUROC": number(row.auroc_candidate, 4),
            "difference (95 % interval)": signed(row.difference, row.difference_low, row.difference_high),
            "p": "" if row.p_value is None else "< 0.001" if row.p_value < 0.001 else f"{row.p_value:.3f}",
            "margin": f"{row.margin:g}",
            "verdict": row.verdict + (f": {row.why_not_assessable}" if row.why_not_assessable else ""),
        }
        for row in parity.findings
    ]
    mean = dict.fromkeys(rows[0], "") | {
        "finding": f"mean of {parity.n_counted}",
        "AUROC reference": number(parity.mean_auroc_reference, 4),
        "AUROC": number(parity.mean_auroc_candidate, 4),
        "difference (95 % interval)": _mean_difference(parity),
        "verdict": f"left out: {', '.join(parity.left_out)}" if parity.left_out else "",
    }
    return [*rows, mean]


def image_rows(parity: ParityReport) -> list[dict[str, str]]:
    """Return one row a finding: what AUROC does not see."""
    return [
        {
            "finding": row.finding,
            "operating point": "none" if row.operating_point is None else f"{row.operating_point:.3f}",
            "flips to present": "" if row.n_gained is None else str(row.n_gained),
            "to absent": "" if row.n_lost is None else str(row.n_lost),
            "McNemar p": "" if row.mcnemar_p is None else f"{row.mcnemar_p:.2g}",
            "ECE reference": number(row.ece_reference, 4),
            "ECE": number(row.ece_candidate, 4),
            "calibration error growth (95 % interval)": signed(
                row.calibration_growth, row.calibration_growth_low, row.calibration_growth_high
            ),
            "worklist churn": _percent(row.rank_churn),
            "logit noise / spread": _percent(row.noise_share),
            "map correlation: median, worst 1 %": UNDEFINED
            if row.map_correlation_median is None
            else f"{row.map_correlation_median:.4f}, {row.map_correlation_p01:.3f}",
        }
        for row in parity.findings
    ]


def group_rows(parity: ParityReport) -> list[dict[str, str]]:
    """Return one row a group of patients."""
    return [
        {
            "group": row.group,
            "images": str(row.n_images),
            "patients": str(row.n_patients),
            "findings assessable": str(row.n_assessable),
            "mean difference (95 % interval)": "not assessable"
            if row.mean_difference is None
            else signed(row.mean_difference, row.difference_low, row.difference_high),
            "worst finding": ""
            if row.worst_finding is None
            else f"{row.worst_finding} {signed(row.worst_difference, None, None)}",
            "max |Δp|": f"{row.max_abs_probability_difference:.4f}",
            "flips": str(row.n_flips),
        }
        for row in parity.subgroups
    ]


def _mean_difference(parity: ParityReport) -> str:
    if parity.mean_auroc_candidate is None or parity.mean_auroc_reference is None:
        return UNDEFINED
    difference = parity.mean_auroc_candidate - parity.mean_auroc_reference
    return signed(difference, parity.mean_difference_low, parity.mean_difference_high)


def _percent(value: float | None) -> str:
    return UNDEFINED if value is None else f"{100 * value:.2f} %"
