"""How long a radiograph takes from its DICOM file to its report, stage by stage: what `bench --dicom` found, judged by the spec.

Measures nothing: dicom/results/measure.py does.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Final, Literal, TypeAlias

import numpy as np
from pydantic import Field, computed_field

from chexnet_deploy.evaluation.latency import MIN_RUNS_FOR_P99
from chexnet_deploy.inputs import ReportRecord

DicomKind: TypeAlias = Literal[
    "uncompressed", "rle", "jpeg", "jpeg-lossless", "jpeg-ls", "jpeg2000", "jpeg2000-reduced"
]
"""How a picture is packed, and for JPEG 2000 whether a smaller one of it is decoded (see Reduction)."""

STAGES: Final = ("header", "decode", "resize", "model", "report")

_Samples: TypeAlias = dict[str, Annotated[tuple[float, ...], Field(min_length=1)]]


class KindTimes(ReportRecord):
    """Host milliseconds of one kind of files, one image after another.

    Attributes:
        n_files: different ones, taken in turn.
        megapixels: of the median file.
        stages_ms: of every image, in the order they were taken: "header" (file read, header read and checked), "decode" (to gray),
            "resize" (content check and resizing), "model", "report" (the structured report's bytes).
        after_idle_ms: likewise, of images that came after nothing had come for a while.
    """

    kind: DicomKind
    n_files: int
    megapixels: float
    stages_ms: _Samples
    after_idle_ms: _Samples

    @computed_field  # type: ignore[prop-decorator]  # pydantic's own advice for mypy
    @property
    def p50_ms(self) -> dict[str, float]:
        """Median of each stage, and of the "total"."""
        return _percentiles(self.stages_ms, 50)

    @computed_field  # type: ignore[prop-decorator]  # pydantic's own advice for mypy
    @property
    def p99_ms(self) -> dict[str, float]:
        """99th percentile of each stage, and of the "total"."""
        return _percentiles(self.stages_ms, 99)

    @computed_field  # type: ignore[prop-decorator]  # pydantic's own advice for mypy
    @property
    def after_idle_p50_ms(self) -> dict[str, float]:
        """Median of each stage, and of the "total", after idling."""
        return _percentiles(self.after_idle_ms, 50)

    @computed_field  # type: ignore[prop-decorator]  # pydantic's own advice for mypy
    @property
    def p99_over_model_p50(self) -> float:
        """99th percentile of the total as a multiple of the model's median among the same images."""
        return self.p99_ms["total"] / self.p50_ms["model"]


class DicomTimes(ReportRecord):
    """One engine's times on a folder of DICOM files.

    Attributes:
        idle_s: of nothing before each image of `after_idle_ms`.
        refused: files that were left out, by the reason's word; see RefusalReason.
    """

    idle_s: float
    refused: dict[str, int]
    kinds: tuple[KindTimes, ...]


def judge_dicom(times: DicomTimes | None, limits: Mapping[DicomKind, float] | None) -> tuple[list[str], list[str]]:
    """Return which limits are broken, and why others are not decided.

    Args:
        times: None where no files were given.
        limits: of KindTimes.p99_over_model_p50; a kind without one is not gated.
    """
    if not limits:
        return [], []
    measured = [] if times is None else [each for each in times.kinds if each.kind in limits]
    if not measured:
        return [], [f"DICOM to report: no file of {', '.join(limits)} was measured. Give --dicom"]
    failures, doubts = [], []
    for each in measured:
        n, ratio, most = len(each.stages_ms["model"]), each.p99_over_model_p50, limits[each.kind]
        if n < MIN_RUNS_FOR_P99:
            doubts.append(f"DICOM to report, {each.kind}: p99 of {n} runs; needed {MIN_RUNS_FOR_P99}. Give --min-runs")
        if not ratio <= most:
            took = f"p99 {each.p99_ms['total']:.1f} ms is {ratio:.1f} times the model's median"
            failures.append(f"DICOM to report, {each.kind}: {took}, limit {most:g}")
    return failures, doubts


def _percentiles(samples_ms: Mapping[str, Sequence[float]], q: float) -> dict[str, float]:
    total = np.sum(list(samples_ms.values()), axis=0)
    return {name: float(np.percentile(values, q)) for name, values in [*samples_ms.items(), ("total", total)]}
