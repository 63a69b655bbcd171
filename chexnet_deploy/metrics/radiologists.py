"""F1 of readers and a model against each other's answers: the reader study of Rajpurkar et al. 2017 (1711.05225v3, 4).

Takes yes/no answers; reads no files and knows no scores. Three protocols:

    paper_protocol           raters are the readers and the model; each is scored against each of the others; images
                             are resampled. A reader's score so depends on the model: a bad one lowers every reader.
    readers_only_protocol    a reader against the other readers, the model against all readers; patients are resampled,
                             for images of one patient are alike. The model's score is that of the paper's protocol; a
                             reader has one label fewer.
    majority_protocol        on a majority label, the readers who did not vote and the model; patients are resampled.

A rater's score is the mean F1 over their labels and NaN, in the end None, where any of the F1s is: a mean over what
happened to be defined would be a mean over other labels in every resample. For F1 itself, its intervals and what few
positives allow see f1.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from chexnet_deploy.errors import MetricError
from chexnet_deploy.metrics.f1 import MAX_UNDEFINED_SHARE, Estimate, estimate_each, score_panels

MODEL: Final = "model"
MAJORITY: Final = "majority"
N_RESAMPLES: Final = 10_000
SEED: Final = 14


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FindingF1(_Record):
    """One finding.

    Attributes:
        finding: its name.
        n_positive: rater or label -> images called positive, of the study's images.
        f1: rater -> F1, the mean over the rater's labels.
        mean_of_readers: of the readers' F1. In the majority protocol that is also the majority's F1 against the
            readers who did not vote, as F1 is symmetric.
        difference: the model's F1 minus mean_of_readers; None without a model.
    """

    finding: str
    n_positive: dict[str, int]
    f1: dict[str, Estimate]
    mean_of_readers: Estimate
    difference: Estimate | None


class MeanF1(_Record):
    """The unweighted mean over findings; fields as in FindingF1.

    Attributes:
        n_counted: findings in the mean; the same for every rater.
        left_out: finding -> why it is not in the mean.
    """

    f1: dict[str, Estimate]
    mean_of_readers: Estimate
    difference: Estimate | None
    n_counted: int
    left_out: dict[str, str]


class ReaderStudy(_Record):
    """One protocol on one set of images.

    Attributes:
        unit: what a resample draws with replacement, as many as there are.
        seed: of NumPy's default generator; the same seed and unit draw the same resamples in every protocol.
    """

    protocol: Literal["readers and model", "readers only", "majority"]
    unit: Literal["image", "patient"]
    n_images: int
    n_patients: int
    n_resamples: int
    seed: int
    findings: tuple[FindingF1, ...]
    mean: MeanF1


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """Yes/no answers of readers, and of a model where there is one, on the same images.

    Attributes:
        findings: [C] names.
        patients: [N] patient numbers.
        readers: [R] names, at least two.
        reads: bool [R, N, C].
        decisions: bool [N, C] of the model; None for a study of the readers alone.

    Raises:
        MetricError: shapes or types don't fit, there is no image or a name is there twice.
    """

    findings: tuple[str, ...]
    patients: NDArray[np.int64]
    readers: tuple[str, ...]
    reads: NDArray[np.bool_]
    decisions: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        shape = (len(self.patients), len(self.findings))
        decisions = np.zeros(shape, np.bool_) if self.decisions is None else self.decisions
        if (
            self.reads.shape != (len(self.readers), *shape)
            or decisions.shape != shape
            or any(array.dtype != np.bool_ for array in (self.reads, decisions))
            or 0 in shape
        ):
            raise MetricError(
                f"found reads {self.reads.dtype} {list(self.reads.shape)} and decisions {decisions.dtype} "
                f"{list(decisions.shape)} for {len(self.readers)} readers, {shape[0]} images and {shape[1]} findings; "
                f"needed bool [R, N, C] and bool [N, C]. Next: threshold the scores and give every reader's answer for "
                f"the same images."
            )
        names = {*self.readers, MODEL, MAJORITY}
        if len(self.readers) < 2 or len(names) < len(self.readers) + 2 or len(set(self.findings)) < shape[1]:
            raise MetricError(
                f"found readers {', '.join(self.readers) or '(none)'} and {shape[1]} findings; needed two readers or "
                f"more, none called {MODEL} or {MAJORITY}, and each name once. Next: correct the names."
            )


def paper_protocol(answers: Answers, *, n_resamples: int = N_RESAMPLES, seed: int = SEED) -> ReaderStudy:
    """Score each rater against each of the others, the model among them (Rajpurkar et al. 2017 v3); resample images.

    Raises:
        MetricError: fewer than one resample.
    """
    ratings, names = _stack(answers)
    panels = tuple(tuple(j for j in range(len(names)) if j != k) for k in range(len(names)))
    return _study("readers and model", "image", answers, ratings, names, panels, n_resamples, seed)


def readers_only_protocol(answers: Answers, *, n_resamples: int = N_RESAMPLES, seed: int = SEED) -> ReaderStudy:
    """Score each reader against the other readers and the model against all of them; resample patients.

    Raises:
        MetricError: fewer than one resample.
    """
    ratings, names = _stack(answers)
    panels = tuple(tuple(j for j in range(len(answers.readers)) if j != k) for k in range(len(names)))
    return _study("readers only", "patient", answers, ratings, names, panels, n_resamples, seed)


def majority_protocol(
    answers: Answers,
    majority: NDArray[np.bool_],
    voters: Sequence[str],
    *,
    n_resamples: int = N_RESAMPLES,
    seed: int = SEED,
) -> ReaderStudy:
    """Score the readers who did not vote, and the model, on the label that the others' majority made; resample patients.

    Args:
        answers: of all readers.
        majority: bool [N, C] the label.
        voters: the readers whose majority it is; scored on their own vote they would look better than they are.
        n_resamples: bootstrap samples.
        seed: of the resamples.

    Raises:
        MetricError: shapes differ, a voter is no reader, every reader voted, or fewer than one resample.
    """
    scored = [r for r, reader in enumerate(answers.readers) if reader not in voters]
    shape = answers.reads.shape[1:]
    if majority.shape != shape or majority.dtype != np.bool_ or not scored or not set(voters) <= set(answers.readers):
        raise MetricError(
            f"found a majority {majority.dtype} {list(majority.shape)} of {', '.join(voters)}; needed bool "
            f"{list(shape)} by some, not all, of the readers {', '.join(answers.readers)}. "
            f"Next: name the readers whose majority the label is."
        )
    ratings, names = _stack(answers)
    kept = scored + list(range(len(answers.readers), len(names)))
    ratings = np.concatenate([ratings[kept], majority[None]])
    panels = ((len(kept),),) * len(kept)
    rater_names = (*(names[k] for k in kept), MAJORITY)
    return _study("majority", "patient", answers, ratings, rater_names, panels, n_resamples, seed)


def _stack(answers: Answers) -> tuple[NDArray[np.bool_], tuple[str, ...]]:
    """Return the ratings [K, N, C], the model last where there is one, and the raters' names [K]."""
    if answers.decisions is None:
        return answers.reads, answers.readers
    return np.concatenate([answers.reads, answers.decisions[None]]), (*answers.readers, MODEL)


def _study(
    protocol: Literal["readers and model", "readers only", "majority"],
    unit: Literal["image", "patient"],
    answers: Answers,
    ratings: NDArray[np.bool_],
    names: tuple[str, ...],
    panels: tuple[tuple[int, ...], ...],
    n_resamples: int,
    seed: int,
) -> ReaderStudy:
    """Score rater k of `ratings` [K, N, C] against the raters in panels[k]; raters past the panels are labels only."""
    if n_resamples < 1:
        raise MetricError(
            f"found {n_resamples} resamples; needed 1 or more, the paper has {N_RESAMPLES}. Next: ask more."
        )
    patients, patient_of = np.unique(answers.patients, return_inverse=True)
    unit_of = np.arange(len(patient_of)) if unit == "image" else patient_of
    point, resampled = (
        _with_summaries(scores, has_model=answers.decisions is not None)
        for scores in score_panels(ratings, panels, unit_of, n_resamples, seed)
    )
    scored = names[: len(panels)]
    n_positive = ratings.sum(axis=1)  # [K, C]
    rows: list[FindingF1] = []
    left_out: dict[str, str] = {}
    for c, finding in enumerate(answers.findings):
        estimates = estimate_each(point[0, :, c], resampled[:, :, c])
        positive = {name: int(n_positive[k, c]) for k, name in enumerate(names)}
        f1, readers, difference = _by_name(estimates, scored)
        rows.append(
            FindingF1(finding=finding, n_positive=positive, f1=f1, mean_of_readers=readers, difference=difference)
        )
        why = _why_left_out([n_positive[list(panel), c] for panel in panels], estimates)
        if why:
            left_out[finding] = why
    counted = [c for c, finding in enumerate(answers.findings) if finding not in left_out]
    means = estimate_each(_mean(point[0][:, counted]), _mean(resampled[:, :, counted]))
    f1, readers, difference = _by_name(means, scored)
    return ReaderStudy(
        protocol=protocol,
        unit=unit,
        n_images=len(answers.patients),
        n_patients=len(patients),
        n_resamples=n_resamples,
        seed=seed,
        findings=tuple(rows),
        mean=MeanF1(f1=f1, mean_of_readers=readers, difference=difference, n_counted=len(counted), left_out=left_out),
    )


def _why_left_out(n_positive: Sequence[NDArray[np.int64]], estimates: Sequence[Estimate]) -> str:
    """Return why a finding has no place in a mean, or ""; `n_positive` has the labels of each scored rater."""
    if not all(labels.any() for labels in n_positive):
        return "a rater's labels have no positive image: F1 is 0 or undefined whatever the answers"
    share = max(estimate.undefined_share for estimate in estimates)
    if share > MAX_UNDEFINED_SHARE:
        return f"F1 is undefined in up to {share:.1%} of resamples, above {MAX_UNDEFINED_SHARE:.0%}"
    return ""


def _with_summaries(scores: NDArray[np.float64], *, has_model: bool) -> NDArray[np.float64]:
    """Append to [B, S, C] the mean of the readers and, with a model (the last), its difference from that mean."""
    readers = scores[:, : scores.shape[1] - has_model].mean(axis=1, keepdims=True)
    return np.concatenate([scores, readers, scores[:, -1:] - readers] if has_model else [scores, readers], axis=1)


def _mean(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean over the last axis; NaN where that is empty."""
    return scores.mean(axis=-1) if scores.shape[-1] else np.full(scores.shape[:-1], np.nan)


def _by_name(
    estimates: Sequence[Estimate], scored: Sequence[str]
) -> tuple[dict[str, Estimate], Estimate, Estimate | None]:
    """Return f1, mean_of_readers and difference of a record."""
    rest = estimates[len(scored) :]
    return dict(zip(scored, estimates, strict=False)), rest[0], rest[1] if len(rest) > 1 else None
