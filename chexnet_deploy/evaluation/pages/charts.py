"""The charts of the pages, as SVG inside them: small, sharp at any size, and their words are text.

A chart is as wide as its place: what lies along x is in percent, so that letters keep their size on a telephone too. An engine
is told by the shape of its mark beside its colour.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from chexnet_deploy.evaluation import as_text
from chexnet_deploy.evaluation.bench_report import EngineResult
from chexnet_deploy.evaluation.pages.style import COLOURS
from chexnet_deploy.evaluation.parity import FindingParity
from chexnet_deploy.evaluation.records import Evaluation
from chexnet_deploy.metrics.roc import roc_curve

_SHAPES: Final = (
    "M-3.6 0a3.6 3.6 0 1 0 7.2 0a3.6 3.6 0 1 0-7.2 0z",
    "M-3.1-3.1h6.2v6.2h-6.2z",
    "M0-4.4L4.2 3.2h-8.4z",
    "M0-4.6L4.6 0 0 4.6-4.6 0z",
    "M0 4.4L4.2-3.2h-8.4z",
    "M-1.4-4.2h2.8v2.8h2.8v2.8H1.4v2.8h-2.8V1.4h-2.8v-2.8h2.8z",
)
"""Circle, square, triangle, diamond, triangle on its tip, cross; around (0, 0), in px."""
_FARTHEST: Final = (-4, 2)  # margins; what reaches farther ends in an arrow
_ENGINE_PX: Final = 7
_GAP_PX: Final = 7
_ROW_PX: Final = 24
_TOP_PX: Final = 34
_BINS: Final = 60
_ROC_STEPS: Final = 64
_ROC_SIDE: Final = 100


def element(name: str, *children: str, **attributes: object) -> Markup:
    """Return an element, everything escaped that isn't Markup; `_` stands for `-` in a name, and for nothing at its end."""
    named = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None)
    start = Markup("").join(Markup(' {}="{}"').format(key, value) for key, value in named)
    return Markup("<{0}{1}>{2}</{0}>").format(name, start, Markup("").join(children))


def define_marks() -> Markup:
    """Return the shapes that `mark` and the charts use; once in a page."""
    shapes = [element("path", id=f"mark{i}", d=shape) for i, shape in enumerate(_SHAPES)]
    return element("svg", element("defs", *shapes), width=0, height=0, aria_hidden="true", style="position:absolute")


def mark(i: int) -> Markup:
    """Return the mark of engine i, for a line of text."""
    return element("svg", _mark(i, "50%", 6, is_filled=True), width=12, height=12, aria_hidden="true", class_="mark")


@dataclass(frozen=True, slots=True)
class _Axis:
    """What lies along x, from one value to another."""

    low: float
    high: float

    def x(self, value: float) -> str:
        """Return where a value lies; one that is outside lies at the edge."""
        return f"{100 * (min(max(value, self.low), self.high) - self.low) / (self.high - self.low):.2f}%"


def draw_margins(engines: Sequence[EngineResult], numbers: Mapping[str, int]) -> Markup:
    """Draw each finding's AUROC difference with its interval, in units of its margin: left of -1 more is lost than may be.

    Args:
        engines: with parity, of the same findings.
        numbers: engine -> the number of its mark.
    """
    lanes = [engine.parity.findings for engine in engines if engine.parity is not None]
    judged = [row for lane in lanes for row in lane if row.verdict != "not assessable"]
    ends = [end for row in judged for end in _in_margins(row) if math.isfinite(end)]
    low = max(math.floor(min([-1.4, *ends])), _FARTHEST[0])
    high = min(math.ceil(max([0.6, *ends])), _FARTHEST[1])
    axis, row_px = _Axis(low, high), max(len(engines) * _ENGINE_PX + _GAP_PX, 20)
    height_px = row_px * len(lanes[0])
    parts = [
        element("rect", x=0, y=_TOP_PX, width=axis.x(-1), height=height_px, class_="beyond"),
        element("text", "lost too much", y=12),
        element("text", "no change", x=axis.x(0), y=12, class_="middle"),
    ]
    lines = {-1: "limit", 0: "zero"}
    ticks = [(unit, f"{unit:+d}" if unit else "0", lines.get(unit, "unit")) for unit in range(low, high + 1)]
    parts += _draw_grid(axis, ticks, [row.finding for row in lanes[0]], row_px)
    for i, rows in enumerate(zip(*lanes, strict=True)):
        middle_px = _TOP_PX + (i + 0.5) * row_px
        if all(row.verdict == "not assessable" for row in rows):
            parts.append(element("text", "not judged", x=axis.x(0), y=middle_px + 4, class_="middle small why"))
            continue
        first_px = middle_px - (len(rows) - 1) * _ENGINE_PX / 2
        for j, (engine, row) in enumerate(zip(engines, rows, strict=True)):
            parts += _draw_difference(row, engine.name, numbers[engine.name], first_px + j * _ENGINE_PX, axis)
    return _chart(
        "AUROC differences in units of the margin",
        f"For each of {len(lanes[0])} findings the AUROC difference of {len(engines)} engines to the reference with its 95 % "
        f"interval, in units of the finding's margin. A table further down has the figures.",
        parts,
        _TOP_PX + height_px,
    )


def draw_areas(evaluation: Evaluation) -> Markup:
    """Draw each finding's AUROC with its interval, and the mean."""
    rows = [(row.finding, row.auroc, row.auroc_interval) for row in evaluation.findings]
    rows.append((f"mean of {evaluation.n_counted}", evaluation.mean_auroc, evaluation.mean_auroc_interval))
    ends = [end for _, area, interval in rows for end in (area, *(interval or ())) if end is not None]
    tenths = range(math.floor(10 * min([0.5, *ends])), 11)
    axis = _Axis(tenths[0] / 10, 1.0)
    ticks = [(tenth / 10, f"{tenth / 10:.1f}", "limit" if tenth == 5 else "unit") for tenth in tenths]
    parts = _draw_grid(axis, ticks, [name for name, *_ in rows], _ROW_PX)
    for i, (name, area, interval) in enumerate(rows):
        y_px = _TOP_PX + (i + 0.5) * _ROW_PX
        if area is None:
            parts.append(element("text", "undefined", x=axis.x(0.5), dx=6, y=y_px + 4, class_="small why"))
            continue
        number = int(i == len(rows) - 1)
        drawn = [element("title", f"{name}: {as_text.number(area, 4)} ({as_text.interval(interval)})")]
        if interval is not None:
            drawn.append(element("line", x1=axis.x(interval[0]), x2=axis.x(interval[1]), y1=y_px, y2=y_px))
        drawn.append(_mark(number, axis.x(area), y_px, is_filled=True))
        parts.append(element("g", *drawn, class_=_colour(number)))
    return _chart(
        "AUROC of every finding",
        f"AUROC of {len(evaluation.findings)} findings and their mean, with 95 % intervals. The summary has the figures.",
        parts,
        _TOP_PX + _ROW_PX * len(rows),
    )


def _draw_grid(
    axis: _Axis, ticks: Sequence[tuple[float, str, str]], names: Sequence[str], row_px: float
) -> list[Markup]:
    """Return a line and a label for each tick (value, label, kind of line), and for each row."""
    bottom_px = _TOP_PX + row_px * len(names)
    parts = []
    for value, label, kind in ticks:
        x = axis.x(value)
        parts.append(element("line", x1=x, x2=x, y1=_TOP_PX - 4, y2=bottom_px, class_=kind))
        parts.append(element("text", label, x=x, y=_TOP_PX - 8, class_="middle small"))
    for i, name in enumerate(names):
        y_px = _TOP_PX + i * row_px
        parts.append(element("line", x1="-8.5rem", x2="100%", y1=y_px, y2=y_px, class_="unit"))
        parts.append(element("text", name.replace("_", " "), x=-8, y=y_px + row_px / 2 + 4, class_="end"))
    return parts


def _chart(title: str, words: str, parts: Sequence[Markup], height_px: float) -> Markup:
    return element(
        "svg",
        element("title", title, id="chart-title"),
        element("desc", words, id="chart-desc"),
        *parts,
        role="img",
        aria_labelledby="chart-title chart-desc",
        height=height_px + 4,
        class_="chart",
    )


def _draw_difference(row: FindingParity, engine: str, number: int, y_px: float, axis: _Axis) -> list[Markup]:
    low, high, value = _in_margins(row)
    if row.verdict == "not assessable" or not math.isfinite(value):
        return []
    difference = as_text.signed(row.difference, row.difference_low, row.difference_high)
    parts = [
        element("title", f"{row.finding}, {engine}: {difference}, {row.verdict}"),
        element("line", x1=axis.x(low), x2=axis.x(high), y1=y_px, y2=y_px),
    ]
    for end, is_outside, arrow in ((low, low < axis.low, "M4-3L0 0 4 3"), (high, high > axis.high, "M-4-3L0 0-4 3")):
        if is_outside:
            tip = element("path", d=arrow)
            parts.append(element("svg", tip, x=axis.x(end), y=y_px, overflow="visible", class_="arrow"))
    parts.append(_mark(number, axis.x(value), y_px, is_filled=row.verdict != "inconclusive"))
    return [element("g", *parts, class_=_colour(number))]


def _in_margins(row: FindingParity) -> tuple[float, float, float]:
    """Return the interval's ends and the difference in units of the margin; NaN where undefined."""
    values = (row.difference_low, row.difference_high, row.difference)
    low, high, value = (math.nan if each is None else each / row.margin for each in values)
    return low, high, value


def _mark(i: int, x: str, y_px: float, *, is_filled: bool) -> Markup:
    kind = _colour(i) + ("" if is_filled else " open")
    return element("use", href=f"#mark{i % len(_SHAPES)}", x=x, y=y_px, class_=kind)


def _colour(i: int) -> str:
    """Return the class of engine i's colour; where shapes come again they have another one."""
    return f"engine{(i + i // len(_SHAPES)) % len(COLOURS)}"


def draw_times(samples_ms: Sequence[float], low_ms: float, high_ms: float) -> Markup:
    """Draw a histogram of times between two, for a line of a table."""
    counts, _ = np.histogram(samples_ms, bins=_BINS, range=(low_ms, high_ms))
    tallest = max(int(counts.max()), 1)
    bars = "".join(f"M{i} 20v-{20 * n / tallest:.0f}h1V20" for i, n in enumerate(counts.tolist()) if n)
    return element(
        "svg",
        element("path", d=bars),
        viewBox=f"0 0 {_BINS} 20",
        preserveAspectRatio="none",
        class_="times",
        aria_hidden="true",
    )


def draw_roc(
    curves: Mapping[str, NDArray[np.float32]], truth: NDArray[np.bool_], numbers: Mapping[str, int], title: str
) -> Markup:
    """Draw the ROC curves of one finding; the dotted one is the reference's.

    Args:
        curves: engine -> [N] scores; of one that has no number, the reference, the curve is dotted.
        truth: [N].
        numbers: engine -> the number of its mark.
        title: of the chart.
    """
    side = _ROC_SIDE
    parts = [element("title", title), element("path", d=f"M0 {side}L{side} 0", class_="unit")]
    if truth.any() and not truth.all():
        rates = np.linspace(0.0, 1.0, _ROC_STEPS + 1)
        for name, scores in curves.items():
            false_alarms, hits = roc_curve(scores, truth)
            # The highest of each rate: a curve goes straight up where no negative is called.
            heights = hits[np.searchsorted(false_alarms, rates, side="right") - 1]
            points = " ".join(f"{side * x:.0f} {side * (1 - y):.0f}" for x, y in zip(rates, heights, strict=True))
            kind = "dotted" if name not in numbers else _colour(numbers[name])
            parts.append(element("path", d=f"M0 {side}L{points}", class_=kind))
    else:
        parts.append(element("text", "undefined", x=side / 2, y=side / 2, class_="middle small"))
    return element("svg", *parts, viewBox=f"-1 -1 {side + 2} {side + 2}", role="img", aria_label=title, class_="roc")
