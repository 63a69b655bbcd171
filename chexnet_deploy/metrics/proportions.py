"""A share of images, such as sensitivity, with an interval that knows which images are of one patient.

Images of one patient are alike, so a share of n images is as certain as one of fewer independent ones: the variance
between patients says how many (Rao & Scott 1992, Biometrics 48:577), and Wilson's interval (1927) is taken at that number.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.metrics.student_t import student_t_quantile


@dataclass(frozen=True, slots=True)
class Proportion:
    """A share of images.

    Attributes:
        value: NaN of no image.
        low: NaN with fewer than two patients.
        high: likewise.
        n_images: of which it is a share.
        n_patients: whose images they are.
    """

    value: float
    low: float
    high: float
    n_images: int
    n_patients: int


def clustered_proportion(
    is_counted: NDArray[np.bool_], patients: NDArray[np.int64], *, level: float = 0.95
) -> Proportion:
    """Return the share of images that count, with its interval clustered by patient.

    Args:
        is_counted: [N].
        patients: [N] whose image it is.
        level: of the interval.
    """
    names, index = np.unique(patients, return_inverse=True)
    n_images, n_patients = is_counted.size, names.size
    if not n_images:
        return Proportion(math.nan, math.nan, math.nan, 0, 0)
    share = int(is_counted.sum()) / n_images
    if n_patients < 2:
        return Proportion(share, math.nan, math.nan, n_images, n_patients)
    excess = np.bincount(index, is_counted - share, n_patients)
    variance = n_patients / (n_patients - 1) * float(excess @ excess) / n_images**2
    # Without variance, as of 0 or 1, every patient may still stand for no more than one image. Never more than all
    # images either: patients who balance each other are luck.
    n_effective = min(share * (1 - share) / variance, n_images) if variance > 0 else float(n_patients)
    ratio = student_t_quantile((1 + level) / 2, n_patients - 1) ** 2 / n_effective
    half = math.sqrt(ratio * share * (1 - share) + ratio**2 / 4)
    middle = share + ratio / 2
    return Proportion(
        share, max((middle - half) / (1 + ratio), 0.0), min((middle + half) / (1 + ratio), 1.0), n_images, n_patients
    )
