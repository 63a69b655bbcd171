"""Turn a bench run into one self-contained HTML page: its first screen is the verdict, everything else unfolds.

Computes nothing that isn't in the report or read off its scores.
"""

import io
from pathlib import Path

import numpy as np
from markupsafe import Markup
from PIL import Image

from chexnet_deploy.evaluation.bench_report import BenchReport, BenchRun, dicom_rows, limit_rows, summary_rows
from chexnet_deploy.evaluation.bench_words import (
    evidence,
    headline,
    next_steps,
    not_measured,
    same_file,
)
from chexnet_deploy.evaluation.engines import REFERENCE
from chexnet_deploy.evaluation.pages import bench_rows
from chexnet_deploy.evaluation.pages.charts import define_marks, draw_margins, draw_roc, mark
from chexnet_deploy.evaluation.pages.style import render, uri
from chexnet_deploy.files import write_file
from chexnet_deploy.images.reader import read_image
from chexnet_deploy.runtime.predictor import draw_cam
from chexnet_deploy.runtime.sessions.base import sigmoid

_PICTURE_PX = 256


def write_html(path: Path, run: BenchRun) -> None:
    """Write the page of a run to an .html file."""
    report = run.report
    compared = [engine for engine in report.engines if not report.is_reference(engine)]
    numbers = {engine.name: i for i, engine in enumerate(compared)}
    drawn = [engine for engine in compared if engine.parity is not None]
    page = render(
        "bench.html",
        report=report,
        headline=headline(report),
        evidence=evidence(report),
        next_steps=next_steps(report),
        same_files=[same_file(engine) for engine in report.engines if report.is_reference(engine)],
        not_measured=not_measured(report),
        marks=define_marks(),
        picture=draw_margins(drawn, numbers) if drawn else None,
        speed=bench_rows.speed_rows(report, {name: mark(i) for name, i in numbers.items()}),
        differences=bench_rows.difference_rows(drawn),
        pictures=_draw_maps(run),
        summary=summary_rows(report),
        engines=[(engine, mark(numbers[engine.name])) for engine in compared],
        limits=_limits(report),
        dicom=dicom_rows(report),
        rows=bench_rows,
        latency=_latency_rows(report),
        roc=_draw_rocs(run, numbers),
    )
    write_file(path, page)


def _limits(report: BenchReport) -> dict[str, list[dict[str, str]]]:
    """Return each engine's own rows."""
    limits: dict[str, list[dict[str, str]]] = {}
    for row in limit_rows(report):
        limits.setdefault(row.pop("engine"), []).append(row)
    return limits


def _latency_rows(report: BenchReport) -> list[dict[str, str]]:
    samples_ms = np.concatenate([engine.single_stream.samples_ms for engine in report.engines])
    # Up to the 99th percentile: one slow run would squeeze the rest into a single bar.
    return bench_rows.latency_rows(report, float(samples_ms.min()), float(np.percentile(samples_ms, 99)))


def _draw_rocs(run: BenchRun, numbers: dict[str, int]) -> list[tuple[str, Markup]]:
    """Return a caption with each finding's curves: the reference's, and those of the engines that have a mark."""
    if run.images is None:
        return []
    drawn = []
    for c, finding in enumerate(run.report.findings):
        known = run.images.labelled[:, c]
        truth = run.images.truth[known, c]
        scores = {name: sigmoid(run.logits[name][known, c]) for name in (REFERENCE, *numbers)}
        caption = f"{finding} ({int(truth.sum())} positive)"
        drawn.append((caption, draw_roc(scores, truth, numbers, f"ROC curves of {finding}")))
    return drawn


def _draw_maps(run: BenchRun) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return for each radiograph that is shown its caption, and its pictures: as it is, and with the map of each engine."""
    if run.images is None:
        return []
    pictures = []
    same = {engine.name for engine in run.report.engines if run.report.is_reference(engine)}
    c = {finding: i for i, finding in enumerate(run.report.findings)}
    for shown in run.shown:
        gray = read_image(run.images.paths[shown.row])
        image = Image.fromarray(gray)
        image.thumbnail((_PICTURE_PX, _PICTURE_PX), Image.Resampling.BILINEAR)
        small = np.asarray(image)
        drawn = [("radiograph", _jpeg(small))]
        for name, cam in shown.maps.items():
            if name not in same:
                probability = float(sigmoid(run.logits[name][shown.row, c[shown.finding]]))
                drawn.append((f"{name}: {probability:.3f}", _jpeg(draw_cam(small, cam))))
        pictures.append((f"{shown.finding} ({run.images.names[shown.row]})", drawn))
    return pictures


def _jpeg(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=80)
    return uri(buffer.getvalue(), "jpeg")
