"""F1 of readers and a model against each other's answers: the reader study of Rajpurkar et al. 2017 (1711.05225v3, 4).

Takes yes/no answers, reads no files, knows no scores but in `f1_threshold`. Three protocols:

    paper_protocol           raters are the readers and the model; each is scored against each of the others; images
                             are resampled. A reader's score so depends on the model: a bad one lowers every reader.
    readers_only_protocol    a reader against the other readers, the model against all readers; patients are resampled,
                             for images of one patient are alike. The model's score is that of the paper's protocol; a
                             reader has one label fewer.
    majority_protocol        on a majority label, the readers who did not vote and the model; patients are resampled.

F1 = 2 TP / (2 TP + FP + FN), the Dice coefficient of the two sets of images, is symmetric in rater and label. Where
neither calls an image positive it is 0/0: NaN. A rater's score is the mean over their labels and NaN where any of the
F1s is: a mean over what happened to be defined would be a mean over other labels in every resample. NaN becomes None.

What few positives allow. The interval of one F1 on n positives is about 3.9 sqrt(f (1-f) (2-f) / 2n) wide
(`expected_interval_width`): at F1 = .4 and n = 10, 30, 100, 300 that is .54, .31, .17, .10. More negatives don't
narrow it. With u images that either calls positive a resample of N images lacks them all with probability
(1 - u/N)^N, about e^-u (`expected_undefined_share`): below u = 3 no interval is given. With no positive label at all
(majority Pneumonia is 0 of 386 images) F1 is 0 whoever is scored, or undefined: neither sensitivity nor skill can be
concluded, only that the label's prevalence is likely below 3/386 = .8 % (rule of three, 95 %); such a finding gets no
interval and no place in a mean.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from chexnet_deploy.errors import MetricError
from chexnet_deploy.metrics.auroc import Scores

MODEL: Final = "model"
MAJORITY: Final = "majority"
N_RESAMPLES: Final = 10_000
SEED: Final = 14
LEVEL: Final = 0.95
MAX_UNDEFINED_SHARE: Final = 0.05
"""Of resamples; above it a percentile interval of the rest would be one of another quantity."""

_QUANTILES: Final = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
_NORMAL_QUANTILE: Final = 1.959963984540054
_CHUNK: Final = 4_000_000  # multiplicities in memory at once, 32 MB


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Estimate(_Record):
    """A statistic on all images, and the 2.5 and 97.5 percentiles of its resamples.

    Attributes:
        value: None where undefined.
        low: None where no interval is given: above 5 % undefined, and where low and high would be equal, for a
            bootstrap can't tell how uncertain a 0 or a 1 is.
        high: as low.
        undefined_share: of the resamples; those are left out of the percentiles.
    """

    value: float | None
    low: float | None
    high: float | None
    undefined_share: float


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


def resample_units(n_units: int, n_resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Yield the resamples in chunks [B, U]: each row draws U of the units 0..U-1 with replacement."""
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // n_units)
    for start in range(0, n_resamples, rows):
        yield rng.integers(0, n_units, (min(rows, n_resamples - start), n_units))


def f1_threshold(scores: Scores, truth: NDArray[np.bool_]) -> float:
    """Return the score t for which "score >= t" has the largest F1; the lowest of several; NaN without a positive.

    Args:
        scores: [N] finite.
        truth: [N] True where the finding is present.

    Raises:
        MetricError: shapes differ or a score is not finite.
    """
    if scores.shape != truth.shape or not np.isfinite(scores).all():
        raise MetricError(
            f"found {scores.shape} scores, {int((~np.isfinite(scores)).sum())} of them not finite, for {truth.shape} "
            f"labels; needed one finite score a label. Next: score the images again."
        )
    if not truth.any():
        return math.nan
    thresholds = np.unique(scores)
    n_called = scores.size - np.searchsorted(np.sort(scores), thresholds, side="left")
    positives = np.sort(scores[truth])
    n_hits = positives.size - np.searchsorted(positives, thresholds, side="left")
    # Equal fractions of integers round to equal floats, so ties are exact, and argmax takes the first: the lowest.
    return float(thresholds[int(np.argmax(2 * n_hits / (n_called + positives.size)))])


def expected_interval_width(f1: float, n_positive: int) -> float:
    """Return about how wide the 95 % interval of one F1 will be when rater and label each call n images positive.

    The delta method with TP and FP + FN as independent Poisson counts, as they are where positives are rare:
    variance = f (1 - f) (2 - f) / 2n. Images of one patient are alike and widen it; a mean over labels narrows it.

    Args:
        f1: in [0, 1].
        n_positive: at least 1; below 10 the interval is too skew for this to be more than an order of magnitude.
    """
    return 2 * _NORMAL_QUANTILE * math.sqrt(f1 * (1 - f1) * (2 - f1) / (2 * n_positive))


def expected_undefined_share(n_positive: int, n_units: int) -> float:
    """Return the share of resamples that hold none of the n units which rater or label call positive."""
    return (1 - n_positive / n_units) ** n_units


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
    n_images = len(answers.patients)
    unit_of = np.arange(n_images) if unit == "image" else np.unique(answers.patients, return_inverse=True)[1]
    scored = names[: len(panels)]
    has_model = answers.decisions is not None
    point, resampled = (
        _with_summaries(scores, has_model=has_model) for scores in _score(ratings, panels, unit_of, n_resamples, seed)
    )
    rows, left_out = _rows(answers.findings, names, panels, ratings.sum(axis=1), point[0], resampled)
    counted = [c for c, finding in enumerate(answers.findings) if finding not in left_out]
    means = _estimates(_mean(point[0][:, counted]), _mean(resampled[:, :, counted]))
    return ReaderStudy(
        protocol=protocol,
        unit=unit,
        n_images=n_images,
        n_patients=len(np.unique(answers.patients)),
        n_resamples=n_resamples,
        seed=seed,
        findings=rows,
        mean=MeanF1(n_counted=len(counted), left_out=left_out, **_by_name(means, scored)),
    )


def _rows(
    findings: tuple[str, ...],
    names: tuple[str, ...],
    panels: tuple[tuple[int, ...], ...],
    n_positive: NDArray[np.int64],
    point: NDArray[np.float64],
    resampled: NDArray[np.float64],
) -> tuple[tuple[FindingF1, ...], dict[str, str]]:
    """Return a row a finding, and why which findings have no place in a mean.

    Args:
        findings: [C].
        names: [K] of raters and labels; the first len(panels) are scored.
        panels: the labels of each scored rater.
        n_positive: [K, C].
        point: [S, C] of the scored raters and the summaries.
        resampled: [B, S, C].
    """
    rows: list[FindingF1] = []
    left_out: dict[str, str] = {}
    for c, finding in enumerate(findings):
        estimates = _estimates(point[:, c], resampled[:, :, c])
        share = max(estimate.undefined_share for estimate in estimates)
        if not all(n_positive[list(panel), c].any() for panel in panels):
            left_out[finding] = "a rater's labels have no positive image: F1 is 0 or undefined whatever the answers"
        elif share > MAX_UNDEFINED_SHARE:
            left_out[finding] = f"F1 is undefined in up to {share:.1%} of resamples, above {MAX_UNDEFINED_SHARE:.0%}"
        rows.append(
            FindingF1(
                finding=finding,
                n_positive={name: int(n_positive[k, c]) for k, name in enumerate(names)},
                **_by_name(estimates, names[: len(panels)]),
            )
        )
    return tuple(rows), left_out


def _score(
    ratings: NDArray[np.bool_],
    panels: tuple[tuple[int, ...], ...],
    unit_of: NDArray[np.intp],
    n_resamples: int,
    seed: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return each rater's mean F1 against its panel, [1, S, C] on all images and [B, S, C] on the resamples."""
    pairs = sorted({(min(k, j), max(k, j)) for k, panel in enumerate(panels) for j in panel})
    first, second = (np.array(side) for side in zip(*pairs, strict=True))
    # Positives and true positives are sums over images, so those of a resample are its multiplicities times the sums
    # by unit: one matrix product for all raters, pairs and findings.
    indicators = np.concatenate([ratings, ratings[first] & ratings[second]])  # [K + P, N, C]
    n_units = int(unit_of.max()) + 1
    by_unit = np.zeros((n_units, *indicators.shape[::2]))
    np.add.at(by_unit, unit_of, indicators.transpose(1, 0, 2))
    places = [[pairs.index((min(k, j), max(k, j))) for j in panel] for k, panel in enumerate(panels)]

    def score(multiplicities: NDArray[np.float64]) -> NDArray[np.float64]:
        counts = (multiplicities @ by_unit.reshape(n_units, -1)).reshape(-1, *by_unit.shape[1:])
        n_called, n_both = counts[:, : len(ratings)], counts[:, len(ratings) :]
        with np.errstate(invalid="ignore"):  # 0/0 is NaN, as it should be
            f1 = 2 * n_both / (n_called[:, first] + n_called[:, second])
        return np.stack([f1[:, place].mean(axis=1) for place in places], axis=1)

    return score(np.ones((1, n_units))), np.concatenate(
        [score(_multiplicities(drawn)) for drawn in resample_units(n_units, n_resamples, seed)]
    )


def _multiplicities(drawn: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return how often each unit is in each resample [B, U]."""
    n_resamples, n_units = drawn.shape
    flat = (drawn + n_units * np.arange(n_resamples)[:, None]).ravel()
    return np.bincount(flat, minlength=drawn.size).reshape(drawn.shape).astype(np.float64)


def _with_summaries(scores: NDArray[np.float64], *, has_model: bool) -> NDArray[np.float64]:
    """Append to [B, S, C] the mean of the readers and, with a model (the last), its difference from that mean."""
    readers = scores[:, : scores.shape[1] - has_model].mean(axis=1, keepdims=True)
    return np.concatenate([scores, readers, scores[:, -1:] - readers] if has_model else [scores, readers], axis=1)


def _mean(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean over the last axis; NaN where that is empty."""
    return scores.mean(axis=-1) if scores.shape[-1] else np.full(scores.shape[:-1], np.nan)


def _estimates(point: NDArray[np.float64], resampled: NDArray[np.float64]) -> tuple[Estimate, ...]:
    """Return an estimate for each of [S] values and their resamples [B, S]."""
    estimates = []
    for value, samples in zip(point.tolist(), resampled.T, strict=True):
        is_undefined = np.isnan(samples)
        share = float(is_undefined.mean())
        interval: tuple[float, float] | tuple[None, None] = (None, None)
        if share <= MAX_UNDEFINED_SHARE:
            low, high = np.quantile(samples[~is_undefined], _QUANTILES).tolist()
            # No true positive at all gives 0 in every resample: a width of 0 would look like certainty.
            interval = (low, high) if low < high else (None, None)
        estimates.append(
            Estimate(
                value=None if math.isnan(value) else value, low=interval[0], high=interval[1], undefined_share=share
            )
        )
    return tuple(estimates)


class _ByName(TypedDict):
    f1: dict[str, Estimate]
    mean_of_readers: Estimate
    difference: Estimate | None


def _by_name(estimates: Sequence[Estimate], scored: Sequence[str]) -> _ByName:
    rest = estimates[len(scored) :]
    return {
        "f1": dict(zip(scored, estimates, strict=False)),
        "mean_of_readers": rest[0],
        "difference": rest[1] if len(rest) > 1 else None,
    }
