"""The figures of an evaluation's page, drawn from its record alone.

Letters are at least 7 points high where a figure is as wide as a sheet of A4; colours come with line styles or markers.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Final

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from chexnet_deploy.evaluation.as_text import PROTOCOLS, number
from chexnet_deploy.evaluation.localize import BoxedMap
from chexnet_deploy.evaluation.pages.style import COLOURS, uri
from chexnet_deploy.evaluation.records import FindingScore, ReaderComparison, ReaderRoc
from chexnet_deploy.images.reader import read_image
from chexnet_deploy.metrics.localization import detect_boxes
from chexnet_deploy.metrics.radiologists import MODEL
from chexnet_deploy.metrics.roc import RATES
from chexnet_deploy.runtime.predictor import draw_cam

_LETTERS_PT: Final = 10
_MARKERS: Final = ("s", "^", "v", "P", "X")


def draw_finding(row: FindingScore, reader_roc: ReaderRoc | None, short_names: Mapping[str, str]) -> Figure:
    """Draw a finding's ROC curve with its band, its reliability diagram, and its curve beside the readers."""
    n_panels = 3 if reader_roc is not None else 2
    figure = Figure(figsize=(3.2 * n_panels, 3.4), layout="constrained")
    _draw_roc(figure.add_subplot(1, n_panels, 1), row)
    _draw_reliability(figure.add_subplot(1, n_panels, 2), row)
    if reader_roc is not None:
        _draw_reader_roc(figure.add_subplot(1, n_panels, 3), reader_roc, short_names)
    for axes in figure.axes:
        axes.tick_params(labelsize=_LETTERS_PT - 1)
        axes.title.set_fontsize(_LETTERS_PT)
        axes.xaxis.label.set_fontsize(_LETTERS_PT)
        axes.yaxis.label.set_fontsize(_LETTERS_PT)
    return figure


def draw_readers(readers: ReaderComparison) -> Figure:
    """Draw the model's F1 minus the readers' mean for each finding, in every protocol."""
    names = [row.finding for row in readers.studies[0].findings]
    figure = Figure(figsize=(9.5, 0.5 * len(names) + 1.9), layout="constrained")
    axes = figure.add_subplot()
    for i, study in enumerate(readers.studies):
        label = PROTOCOLS[study.protocol]
        for y, row in enumerate(study.findings):
            difference = row.difference
            if difference is None or difference.value is None:
                continue
            place = y + 0.24 * (i - 1)
            if difference.low is not None and difference.high is not None:
                axes.plot((difference.low, difference.high), (place, place), color=COLOURS[i], linewidth=1.8)
            # Hollow: a point without an interval.
            face = "white" if difference.low is None else COLOURS[i]
            axes.plot(difference.value, place, _MARKERS[i], color=COLOURS[i], markerfacecolor=face, markersize=7)
        axes.plot([], [], f"{_MARKERS[i]}-", color=COLOURS[i], label=label)
    axes.axvline(0.0, color="0.4", linestyle=":", linewidth=1.2)
    axes.set(yticks=range(len(names)), ylim=(len(names) - 0.5, -0.5))
    axes.set_yticklabels(names, fontsize=_LETTERS_PT)
    axes.set_xlabel(
        "F1 of the model minus the readers' mean, 95 % interval; hollow: no interval; left of 0 the readers are better",
        fontsize=_LETTERS_PT,
    )
    axes.grid(axis="x", color="0.9")
    figure.legend(fontsize=_LETTERS_PT, loc="outside upper left", frameon=False)
    return figure


def draw_maps(maps: Sequence[BoxedMap], places: Sequence[str]) -> Figure:
    """Draw maps over their radiographs, the true boxes solid and the detected ones dashed.

    Args:
        maps: of one finding.
        places: what each is among the finding's, e.g. "best".
    """
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    for i, (each, place) in enumerate(zip(maps, places, strict=True)):
        gray = read_image(each.path)
        axes = figure.add_subplot(1, 3, i + 1)
        axes.imshow(draw_cam(gray, each.cam))
        for box in each.boxes:
            corner = (box.x_px - 0.5, box.y_px - 0.5)
            for colour, width in (("black", 3.6), ("white", 1.8)):
                axes.add_patch(
                    Rectangle(corner, box.width_px, box.height_px, fill=False, edgecolor=colour, linewidth=width)
                )
        for x, y, width_px, height_px in detect_boxes(each.cam, height_px=gray.shape[0], width_px=gray.shape[1]):
            axes.add_patch(
                Rectangle((x - 0.5, y - 0.5), width_px, height_px, fill=False, edgecolor="cyan", ls="--", linewidth=1.8)
            )
        axes.set_axis_off()
        scored = each.scored
        axes.set_title(
            f"{place}: IoU {max(scored.iou):.2f}, p {scored.probability:.2f}\n{scored.image}", fontsize=_LETTERS_PT
        )
    return figure


def _draw_roc(axes: Axes, row: FindingScore) -> None:
    _set_unit_square(axes, "1 - specificity", "sensitivity")
    if row.roc is None:
        axes.set_title("ROC: undefined")
        return
    # To the corner: the curve at rate 0 begins where no negative is called yet.
    axes.plot((0.0, *RATES), (0.0, *row.roc.sensitivity), color=COLOURS[0], linewidth=1.8, label="model")
    if row.roc.low is not None and row.roc.high is not None:
        axes.fill_between(
            RATES, row.roc.low, row.roc.high, color=COLOURS[0], alpha=0.22, linewidth=0, label="95 % band"
        )
    point = row.operating_point
    if point is not None and point.sensitivity.value is not None and point.specificity.value is not None:
        x = 1 - point.specificity.value
        axes.plot(x, point.sensitivity.value, "D", color="black", markersize=7, label="operating point")
    axes.legend(fontsize=_LETTERS_PT - 1.5, loc="lower right")
    axes.set_title(f"ROC, n+ = {row.n_positive:,}: AUROC {number(row.auroc)}")


def _draw_reliability(axes: Axes, row: FindingScore) -> None:
    if not row.reliability:
        _set_unit_square(axes, "mean probability", "observed share")
        axes.set_title("Reliability: undefined")
        return
    x = np.array([point.mean_probability for point in row.reliability])
    y = np.array([point.observed for point in row.reliability])
    end = 1.08 * max(float(x.max()), float(y.max()), 0.01)
    axes.plot((0, end), (0, end), color="0.5", linestyle="--", linewidth=1.2, label="calibrated")
    axes.plot(x, y, "o-", color=COLOURS[1], linewidth=1.4, markersize=5, label=f"{len(x)} bins")
    axes.set(xlim=(0, end), ylim=(0, end), aspect="equal", xlabel="mean probability", ylabel="observed share")
    axes.legend(fontsize=_LETTERS_PT - 1.5, loc="best")
    axes.set_title(f"Reliability: ECE {number(row.ece, 4)}")


def _draw_reader_roc(axes: Axes, roc: ReaderRoc, short_names: Mapping[str, str]) -> None:
    _set_unit_square(axes, "1 - specificity", "sensitivity")
    axes.set_title(
        f"Majority label, n+ = {roc.n_positive}: {'undefined' if roc.auroc is None else f'AUROC {roc.auroc:.3f}'}"
    )
    if not roc.sensitivities:
        return
    axes.plot(roc.false_positive_rates, roc.sensitivities, color=COLOURS[0], linewidth=1.8, label=MODEL)
    n_readers = 0
    for point in roc.points:
        if point.false_positive_rate is None or point.sensitivity is None:
            continue
        if point.rater == MODEL:
            style, colour, label = "D", "black", "model's threshold"
        else:
            style, colour = _MARKERS[n_readers % len(_MARKERS)], COLOURS[1 + n_readers % (len(COLOURS) - 1)]
            label, n_readers = f"reader {short_names[point.rater]}", n_readers + 1
        axes.plot(
            point.false_positive_rate, point.sensitivity, style, color=colour, markersize=8, label=label, clip_on=False
        )
    axes.legend(fontsize=_LETTERS_PT - 1.5, loc="lower right")


def _set_unit_square(axes: Axes, x: str, y: str) -> None:
    axes.plot([0, 1], [0, 1], color="0.8", linewidth=1.0)
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1], aspect="equal", xlabel=x, ylabel=y)


def png(figure: Figure, *, dpi: int = 110) -> str:
    """Return a figure as a data URI, in 64 colours: the eye sees no difference, and it has a third of the bytes."""
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(_save(figure, "png", dpi))) as image:
        image.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return uri(buffer.getvalue(), "png")


def jpeg(figure: Figure, *, dpi: int = 110) -> str:
    """Return a figure as a data URI; for photographs, of which a PNG would be ten times as large."""
    return uri(_save(figure, "jpeg", dpi), "jpeg")


def _save(figure: Figure, kind: str, dpi: int) -> bytes:
    buffer = io.BytesIO()
    with mpl.rc_context({"savefig.dpi": dpi}):
        figure.savefig(buffer, format=kind)
    return buffer.getvalue()
