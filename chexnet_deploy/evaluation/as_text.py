"""An evaluation as text: rows and sentences that the command line and the page both print. Computes nothing.

PAPER is what was published, for a table beside ours: Rajpurkar et al. 2017 (arXiv 1711.05225 v3), tables 1 and 2. Their patients
were split at random and the lists never released, and their readers read 420 other images: nothing here can be compared number
by number, and the page says so.
"""

from collections.abc import Sequence
from typing import Final

from chexnet_deploy.evaluation.records import (
    Evaluation,
    FindingScore,
    Interval,
    Localization,
    ReaderComparison,
    Share,
    Subgroup,
)
from chexnet_deploy.metrics.f1 import Estimate
from chexnet_deploy.metrics.localization import LocalizationReport
from chexnet_deploy.metrics.radiologists import MODEL, FindingF1, MeanF1, ReaderStudy

UNDEFINED = "undefined"
PROTOCOLS = {
    "readers and model": "each rater against each other, as in the CheXNet paper",
    "readers only": "against the readers only",
    "majority": "against the majority of three readers",
}


def number(value: float | None, digits: int = 3) -> str:
    """Return a figure, or "undefined"."""
    return UNDEFINED if value is None else f"{value:.{digits}f}"


def interval(ends: Interval | None, digits: int = 3) -> str:
    """Return "low to high", or "undefined"."""
    return UNDEFINED if ends is None else f"{ends[0]:.{digits}f} to {ends[1]:.{digits}f}"


def signed(value: float | None, low: float | None, high: float | None) -> str:
    """Return a difference with its interval where it has one, e.g. "-0.0060 (-0.0163 to +0.0041)"; or "undefined"."""
    if value is None:
        return UNDEFINED
    return f"{value:+.4f}" if low is None or high is None else f"{value:+.4f} ({low:+.4f} to {high:+.4f})"


def summary_rows(evaluation: Evaluation) -> list[dict[str, str]]:
    """Return one row a finding; columns of decisions where there are operating points."""
    has_points = any(row.operating_point is not None for row in evaluation.findings)
    return [_summary_row(row, has_points=has_points) for row in evaluation.findings]


def mean_line(evaluation: Evaluation) -> str:
    """Return the mean with what it left out."""
    n_findings = len(evaluation.findings)
    mean = "undefined" if evaluation.mean_auroc is None else f"{evaluation.mean_auroc:.4f}"
    ends = evaluation.mean_auroc_interval
    line = f"mean AUROC {mean}" + (f" ({interval(ends, 4)})" if ends else "")
    line += f" over {evaluation.n_counted} of {n_findings} findings"
    return line + (f", without {', '.join(evaluation.left_out)}" if evaluation.left_out else "")


def undefined_lines(evaluation: Evaluation) -> list[str]:
    """Return what is undefined and why, one line a finding and reason."""
    lines = [f"{figure.replace('_', ' ')}: undefined, {why}" for figure, why in evaluation.undefined.items()]
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in evaluation.findings:
        for figure, why in row.undefined.items():
            reasons.setdefault((figure, why), []).append(row.finding)
    figures: dict[tuple[str, str], list[str]] = {}
    for (figure, why), findings in reasons.items():
        every = "every finding" if len(findings) == len(evaluation.findings) else ", ".join(findings)
        figures.setdefault((every, why), []).append(figure.replace("_", " "))
    return [f"{who}: {', '.join(what)} undefined, {why}" for (who, why), what in figures.items()] + lines


def missing_lines(evaluation: Evaluation) -> list[str]:
    """Return what is undefined, and what nobody asked to be measured."""
    lines = undefined_lines(evaluation)
    if evaluation.thresholds_from is None:
        lines.append("Decisions: no operating points are known")
    if not evaluation.subgroups:
        lines.append("Groups of patients: the labels name none")
    if evaluation.readers is None:
        lines.append("Beside radiologists: asked for by --readers")
    if evaluation.localization is None:
        lines.append("Where the model looks: asked for by --localization")
    return lines


def subgroup_tables(evaluation: Evaluation) -> dict[str, list[dict[str, str]]]:
    """Return a table each of sex, age and view, by that word: one row a finding, one column a group."""
    tables = {}
    for kind in ("sex", "age", "view"):
        groups = [group for group in evaluation.subgroups if group.name.startswith(f"{kind} ")]
        if groups:
            tables[kind] = [_subgroup_row(groups, i) for i in range(len(groups[0].findings))]
    return tables


def short_names(readers: ReaderComparison) -> dict[str, str]:
    """Return reader ID -> R1, R2, ..., in ascending order."""
    raters = [rater for rater in readers.studies[0].mean.f1 if rater != MODEL]
    return {rater: f"R{i}" for i, rater in enumerate(raters, start=1)}


def study_rows(study: ReaderStudy, names: dict[str, str]) -> list[dict[str, str]]:
    """Return one row a finding, and the mean; raters by their short names."""
    rows: list[tuple[str, FindingF1 | MeanF1]] = [(row.finding, row) for row in study.findings]
    return [
        {
            "finding": title,
            **_called(row),
            **{names.get(rater, rater): _f1(value) for rater, value in row.f1.items() if rater != MODEL},
            "mean of readers": estimate(row.mean_of_readers),
            MODEL: estimate(row.f1[MODEL]),
            "model - readers": estimate(row.difference, sign=True),
        }
        for title, row in (*rows, (f"mean of {study.mean.n_counted}", study.mean))
    ]


def readers_line(readers: ReaderComparison) -> str:
    """Return whose reads these are and what thresholds the model had, in one line."""
    line = (
        f"Readers: {readers.n_images} of {readers.n_read} expert-read images, of {readers.n_patients} patients, are "
        f"scored; the model's thresholds are {readers.thresholds_from}."
    )
    reasons: dict[str, list[str]] = {}
    for finding, why in readers.left_out.items():
        reasons.setdefault(why, []).append(finding)
    return " ".join([line, *(f"Left out: {', '.join(names)} ({why})." for why, names in reasons.items())])


def study_line(study: ReaderStudy) -> str:
    """Return the mean of one protocol in one line."""
    mean = study.mean
    return (
        f"F1 {PROTOCOLS[study.protocol]}: model {estimate(mean.f1[MODEL])}, readers {estimate(mean.mean_of_readers)}, "
        f"difference {estimate(mean.difference, sign=True)}; mean of {mean.n_counted} of {len(study.findings)} findings"
        + (f", without {', '.join(mean.left_out)}" if mean.left_out else "")
    )


def estimate(value: Estimate | None, *, sign: bool = False) -> str:
    """Return a statistic with its interval."""
    if value is None or value.value is None:
        return UNDEFINED
    shown = f"{value.value:+.3f}" if sign else f"{value.value:.3f}"
    if value.low is None or value.high is None:
        return f"{shown} (no interval)"
    return (
        f"{shown} ({value.low:+.3f} to {value.high:+.3f})" if sign else f"{shown} ({value.low:.3f} to {value.high:.3f})"
    )


def localization_line(of: Localization) -> str:
    """Return on how many images the maps were scored."""
    line = f"Boxes: {of.n_images} evaluated images have some"
    if of.n_left_out:
        line += (
            f"; {of.n_left_out} more are left out, as they are not {of.width_px} x {of.height_px} px like these and "
            f"nothing says where in them the box lies"
        )
    without = of.summary.without_boxes
    return f"{line}." + (f" Without a box, so that nothing is known of them: {', '.join(without)}." if without else "")


def localization_rows(report: LocalizationReport) -> list[dict[str, str]]:
    """Return one row a finding that has boxes."""
    return [
        {
            "finding": row.finding,
            "images": str(row.n_images),
            "boxes": str(row.n_boxes),
            "pointing": f"{row.pointing_accuracy:.3f}",
            "mean IoU": f"{row.mean_iou:.3f}",
            "mean IoBB": f"{row.mean_iobb:.3f}",
            **{f"IoU ≥ {at.threshold:g}": f"{at.share:.2f}" for at in row.iou if at.threshold in (0.1, 0.3, 0.5)},
            **{f"IoBB ≥ {at.threshold:g}": f"{at.share:.2f}" for at in row.iobb if at.threshold in (0.1, 0.25, 0.5)},
            "boxes found": f"{row.detected_per_image:.1f}",
        }
        for row in report.findings
    ]


def _summary_row(row: FindingScore, *, has_points: bool) -> dict[str, str]:
    cells = {
        "finding": row.finding,
        "positives": f"{row.n_positive:,}",
        "positive patients": f"{row.n_positive_patients:,}",
        "AUROC": number(row.auroc, 4),
        "95 % interval": interval(row.auroc_interval),
        "AUPRC": number(row.auprc),
        "Brier": number(row.brier, 4),
        "ECE": number(row.ece, 4),
    }
    if not has_points:
        return cells
    point = row.operating_point
    if point is None:
        return cells | dict.fromkeys(("threshold", "sensitivity", "specificity"), "no threshold")
    return cells | {
        "threshold": f"{point.threshold:.4g}",
        "sensitivity": _share(point.sensitivity),
        "specificity": _share(point.specificity),
    }


def _share(share: Share) -> str:
    if share.value is None:
        return UNDEFINED
    return f"{share.value:.3f} ({interval(share.interval)})" if share.interval else f"{share.value:.3f} (no interval)"


def _subgroup_row(groups: Sequence[Subgroup], finding: int) -> dict[str, str]:
    row = {"finding": groups[0].findings[finding].finding}
    for group in groups:
        of = group.findings[finding]
        value = "not assessable" if of.auroc is None else f"{of.auroc:.3f} ({interval(of.auroc_interval)})"
        row[f"{group.name}: {group.n_images:,} images, {group.n_patients:,} patients"] = (
            f"{value}; n+ {of.n_positive:,}/{of.n_positive_patients:,}"
        )
    return row


def _called(row: FindingF1 | MeanF1) -> dict[str, str]:
    """Return how many images the raters call positive: the least and the most of the readers or the label, and the model."""
    if isinstance(row, MeanF1):
        return {"positives": "", "model's": ""}
    counts = [n for rater, n in row.n_positive.items() if rater != MODEL]
    return {
        "positives": f"{min(counts)} to {max(counts)}",
        "model's": str(row.n_positive.get(MODEL, "")),
    }


def _f1(value: Estimate) -> str:
    """Return one reader's F1, in a column too narrow for more."""
    return "-" if value.value is None else f"{value.value:.3f}"


NOT_COMPARABLE: Final = "other split, not comparable"

# Finding -> AUROC of Wang et al. 2017, Yao et al. 2017 and CheXNet, as the paper's table 2 has them.
AUROC: Final = {
    "Atelectasis": (0.716, 0.772, 0.8094),
    "Cardiomegaly": (0.807, 0.904, 0.9248),
    "Effusion": (0.784, 0.859, 0.8638),
    "Infiltration": (0.609, 0.695, 0.7345),
    "Mass": (0.706, 0.792, 0.8676),
    "Nodule": (0.671, 0.717, 0.7802),
    "Pneumonia": (0.633, 0.713, 0.7680),
    "Pneumothorax": (0.806, 0.841, 0.8887),
    "Consolidation": (0.708, 0.788, 0.7901),
    "Edema": (0.835, 0.882, 0.8878),
    "Emphysema": (0.815, 0.829, 0.9371),
    "Fibrosis": (0.769, 0.767, 0.8047),
    "Pleural_Thickening": (0.708, 0.765, 0.8062),
    "Hernia": (0.767, 0.914, 0.9164),
}

# F1 of pneumonia with 95 % intervals, the paper's table 1.
PNEUMONIA_F1: Final = {
    "radiologist 1": (0.383, 0.309, 0.453),
    "radiologist 2": (0.356, 0.282, 0.428),
    "radiologist 3": (0.365, 0.291, 0.435),
    "radiologist 4": (0.442, 0.390, 0.492),
    "mean of radiologists": (0.387, 0.330, 0.442),
    "CheXNet": (0.435, 0.387, 0.481),
}


def auroc_rows(evaluation: Evaluation) -> list[dict[str, str]]:
    """Return the paper's table 2 beside the evaluation's own areas."""
    rows = []
    for row in evaluation.findings:
        if row.finding in AUROC:
            wang, yao, chexnet = AUROC[row.finding]
            rows.append(
                {
                    "finding": row.finding,
                    "here": "undefined" if row.auroc is None else f"{row.auroc:.4f}",
                    "CheXNet": f"{chexnet:.4f}",
                    "Yao et al.": f"{yao:.3f}",
                    "Wang et al.": f"{wang:.3f}",
                }
            )
    return rows


def f1_rows(evaluation: Evaluation) -> list[dict[str, str]]:
    """Return the paper's table 1, where pneumonia was compared with readers here too; else nothing."""
    readers = evaluation.readers
    if readers is None or "Pneumonia" in readers.left_out:
        return []
    return [
        {"rater": name, "F1": f"{f1:.3f} ({low:.3f} to {high:.3f})"} for name, (f1, low, high) in PNEUMONIA_F1.items()
    ]
