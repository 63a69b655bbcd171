"""How alike two models answer, image by image. AUROC is blind to all of it: it sees ranks within one finding alone.

Knows no labels, margins or verdicts: see parity.py.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.metrics.roc import Scores


@dataclass(frozen=True, slots=True)
class Flips:
    """Decisions at one threshold that differ: absent to present, and present to absent."""

    gained: int
    lost: int


def flips(reference: Scores, candidate: Scores, threshold: float) -> Flips:
    """Count the decisions that change; present means at or above the threshold, and NaN is never present.

    Args:
        reference: [N].
        candidate: [N].
        threshold: in the scores' unit.
    """
    before, after = reference >= threshold, candidate >= threshold
    return Flips(gained=int((~before & after).sum()), lost=int((before & ~after).sum()))


def observed_quantile(gaps: NDArray[np.floating], q: float) -> float:
    """Return a quantile that some value reaches: interpolation would understate a tail of one image."""
    return float(np.quantile(gaps, q, method="higher"))


def rank_churn(reference: Scores, candidate: Scores) -> float:
    """Return by how much of the list an image moves on average when a model orders the worklist: 0 for the same order.

    Mean |difference of midranks| / N; two unrelated orders give 1/3, reversed ones 1/2.

    Args:
        reference: [N].
        candidate: [N].
    """
    return float(np.abs(_midranks(reference) - _midranks(candidate)).mean() / len(reference))


def noise_share(reference: Scores, candidate: Scores) -> float:
    """Return the root mean square difference over the reference's standard deviation; NaN where it is flat.

    A flat model differs by little from anything: this says how little in units of what it has to say. 0.03 is 30 dB.

    Args:
        reference: [N] logits.
        candidate: [N] logits.
    """
    spread = float(np.std(reference, dtype=np.float64))
    if spread == 0.0:
        return math.nan
    gaps = reference.astype(np.float64) - candidate
    return math.sqrt(float(np.mean(gaps**2))) / spread


def map_correlation(reference: NDArray[np.floating], candidate: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return Pearson's correlation of each activation map with the other model's; NaN where a map is flat.

    Args:
        reference: [N, C, h, w].
        candidate: [N, C, h, w].

    Returns:
        [N, C].
    """
    first, second = (maps.reshape(*maps.shape[:2], -1).astype(np.float64) for maps in (reference, candidate))
    first = first - first.mean(axis=2, keepdims=True)
    second = second - second.mean(axis=2, keepdims=True)
    scale = np.sqrt((first**2).sum(axis=2) * (second**2).sum(axis=2))
    products = (first * second).sum(axis=2)
    correlation: NDArray[np.float32] = np.where(scale > 0, products / np.where(scale > 0, scale, 1.0), np.nan).astype(
        np.float32
    )
    return correlation


def _midranks(scores: Scores) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    midranks: NDArray[np.float64] = (last - (counts - 1) / 2)[inverse]
    return midranks
