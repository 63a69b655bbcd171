"""Thresholds with a guarantee: the rate asked for holds for new patients of the site, with the confidence asked for.

The unit is the patient, as images of one patient are alike. Each patient gives one image, drawn by lot among those that the rate is
about, so that the images are independent draws of "an image of a new patient", and every patient counts alike, however
often they came. Nothing is assumed of how scores are distributed; ties and constant scores only make a bound safer.

`reached_by` serves sensitivity and specificity: the order statistic that is a one-sided tolerance limit (Wilks 1941, Annals
of Mathematical Statistics 12:91), with the exact binomial tail. A share of new scores at or above it is monotone in it, so
one test decides and no correction is due.

`confirmed_above` serves PPV and NPV, which are not monotone: Learn then Test by fixed sequences from several starts
(Angelopoulos, Bates, Candès, Jordan & Lei 2021, arXiv 2110.01052, section 2.3), with exact binomial p-values. How many scores
lie above a cut is fixed before a label is seen: given the score next to them, those above it are independent draws of
what lies above. One thing is assumed: a higher score never makes the finding less likely.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.errors import MetricError
from chexnet_deploy.metrics.roc import Scores

_START_RATIO: Final = 4  # each start of a sequence has so many times the scores of the one before
_MOST_PATIENTS: Final = 200_000  # beyond it "how many more" is no help


@dataclass(frozen=True, slots=True)
class Cut:
    """A threshold that the guarantee holds for.

    Attributes:
        threshold: in the scores' unit; whether it belongs to what is above it, the function says.
        n_patients: whose images the bound rests on.
        n_wrong: of them, images on the wrong side.
    """

    threshold: float
    n_patients: int
    n_wrong: int


@dataclass(frozen=True, slots=True)
class Shortfall:
    """Why there is no such threshold.

    Attributes:
        n_patients: that there are.
        n_more: patients that are needed beside them; None where more of the same would not do.
        is_certain: no bound can exist with fewer; else an estimate from the best threshold seen.
    """

    n_patients: int
    n_more: int | None
    is_certain: bool


def fewest_patients(rate: float, confidence: float) -> int:
    """Return the fewest patients that can show a rate: all right, by chance, in 1 - confidence of samples at the most.

    95 % with confidence 95 % takes 59, since 0.95^59 = 0.0485.

    Raises:
        MetricError: a number is not between 0 and 1.
    """
    _check(rate, confidence)
    n = max(1, int(np.log(1.0 - confidence) / np.log(rate)))
    while rate**n > 1.0 - confidence:
        n += 1
    return n


def draw_one_each(patients: NDArray[np.int64], lots: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return [P] the place of one image of each patient, that with the lowest lot.

    Args:
        patients: [N] whose image it is.
        lots: [N] drawn without regard to scores and labels, e.g. of a hash of the image's name.
    """
    order = np.lexsort((lots, patients))
    is_first = np.ones(order.size, np.bool_)
    is_first[1:] = np.diff(patients[order]) != 0
    return order[is_first]


def reached_by(scores: Scores, rate: float, confidence: float) -> Cut | Shortfall:
    """Return the largest threshold that at least `rate` of new patients' scores reach: are equal to it or above it.

    For sensitivity give the scores of images that show the finding. For specificity give those of images that don't,
    negated: their share at or below the negated threshold has the guarantee.

    Args:
        scores: [P] one image a patient.
        rate: e.g. 0.95.
        confidence: e.g. 0.95.

    Raises:
        MetricError: a score is not finite, or a number is not between 0 and 1.
    """
    _check(rate, confidence, scores)
    most = int(_most_wrong(scores.size, rate, 1.0 - confidence)[scores.size])
    if most < 0:
        return Shortfall(scores.size, fewest_patients(rate, confidence) - scores.size, is_certain=True)
    threshold = np.partition(scores, most)[most]
    return Cut(float(threshold), scores.size, int((scores < threshold).sum()))


def confirmed_above(scores: Scores, is_right: NDArray[np.bool_], rate: float, confidence: float) -> Cut | Shortfall:
    """Return the lowest threshold such that of new patients' images with a score above it at least `rate` are right.

    For PPV right is an image that shows the finding. For NPV give negated scores; right is an image that doesn't.

    Args:
        scores: [P] one image a patient.
        is_right: [P].
        rate: e.g. 0.9.
        confidence: e.g. 0.95.

    Returns:
        a Cut whose threshold is not above itself; -inf where all scores are. Its n_patients are those above it.

    Raises:
        MetricError: a score is not finite, the lengths differ, or a number is not between 0 and 1.
    """
    _check(rate, confidence, scores)
    if is_right.shape != scores.shape:
        raise MetricError(f"Found {is_right.size} labels for {scores.size} scores; needed one each. Next: give both.")
    starts = _starts(scores.size, rate, 1.0 - confidence)
    if not starts:
        return Shortfall(scores.size, fewest_patients(rate, confidence) - scores.size, is_certain=True)
    order = np.argsort(-scores, kind="stable")
    descending = scores[order]
    # A cut never parts equal scores: those above it are 1 to `above[-1]` of the highest.
    above = np.flatnonzero(np.append(np.diff(descending) != 0, True)) + 1
    n_wrong = np.cumsum(~is_right[order], dtype=np.int64)[above - 1]
    level = (1.0 - confidence) / len(starts)
    fails = np.flatnonzero(n_wrong > _most_wrong(scores.size, rate, level)[above])
    end = 0  # one past the last cut confirmed
    for start in starts:
        first = int(np.searchsorted(above, start))
        failed = int(np.searchsorted(fails, first))
        stop = int(fails[failed]) if failed < fails.size else above.size
        end = max(end, stop if stop > first else 0)
    if not end:
        return _estimate_shortfall(scores.size, above, n_wrong, rate, level)
    n = int(above[end - 1])
    threshold = float(descending[n]) if n < scores.size else -np.inf
    return Cut(threshold, n, int(n_wrong[end - 1]))


def _starts(n: int, rate: float, risk: float) -> tuple[int, ...]:
    """Return how many of the highest scores each sequence starts with: as many sequences as fit, which share the risk."""
    starts: tuple[int, ...] = ()
    while True:
        count = len(starts) + 1
        first = fewest_patients(rate, 1.0 - risk / count)
        if first * _START_RATIO ** (count - 1) > n:
            return starts
        starts = tuple(first * _START_RATIO**i for i in range(count))


def _estimate_shortfall(
    n: int, above: NDArray[np.int64], n_wrong: NDArray[np.int64], rate: float, level: float
) -> Shortfall:
    """Say how many more patients would do if the best share seen were the true one."""
    is_long = above >= fewest_patients(rate, 1.0 - level)
    if not is_long.any():
        return Shortfall(n, None, is_certain=False)
    share = n_wrong[is_long] / above[is_long]
    best = int(np.argmin(share))
    wrong, of = float(share[best]), int(above[is_long][best])
    if wrong >= 1.0 - rate:
        return Shortfall(n, None, is_certain=False)
    size = of
    while size * n // of < _MOST_PATIENTS:
        size = -(-size * 21 // 20)
        # A normal approximation would call the exact bound's demands too small where few are wrong.
        if np.ceil(wrong * size) <= _most_wrong(size, rate, level)[size]:
            return Shortfall(n, size * n // of - n, is_certain=False)
    return Shortfall(n, None, is_certain=False)


def _most_wrong(n: int, rate: float, risk: float) -> NDArray[np.int64]:
    """Return for 0 to n or more images how many may be wrong; -1 where not even none may."""
    return _table(1 << max(8, n.bit_length()), rate, risk)


@lru_cache(maxsize=64)
def _table(n: int, rate: float, risk: float) -> NDArray[np.int64]:
    """Return [n + 1] the largest c with P(Binomial(m, 1 - rate) <= c) <= risk, for each m, by the binomial's recurrences."""
    miss, most = 1.0 - rate, np.full(n + 1, -1, np.int64)
    c, term, tail = 0, 1.0, 1.0  # P(X = c) and P(X <= c) of m images
    for m in range(n):
        # One image more: the tail loses the chance of having been full; the term takes up that of having had one less.
        before = term * c * rate / ((m - c + 1) * miss)
        tail -= term * miss
        term = term * rate + before * miss
        further = term * (m + 1 - c) * miss / ((c + 1) * rate)
        if tail <= risk and tail + further <= risk:
            c, term, tail = c + 1, further, tail + further
        most[m + 1] = c if tail <= risk else -1
    most.flags.writeable = False
    return most


def _check(rate: float, confidence: float, scores: Scores | None = None) -> None:
    for name, value in (("rate", rate), ("confidence", confidence)):
        if not 0.0 < value < 1.0:
            raise MetricError(f"Found a {name} of {value}; needed between 0 and 1, such as 0.95. Next: give one.")
    if scores is not None and not np.isfinite(scores).all():
        raise MetricError("Found scores that are NaN or infinite; needed none. Next: leave those images out.")
