"""Which images are of which group of patients: sex, age band and view, as ChestX-ray14's table tells them.

A model may keep its accuracy on the whole and lose it on a few; bench and evaluate report each group beside the whole.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

AGE_BANDS = (("under 40", 0.0, 40.0), ("40 to 59", 40.0, 60.0), ("60 and over", 60.0, 120.0))
"""Name, from and below, in years. An age above 119 is a mistake in the table and falls into none."""


def subgroups(sex: Sequence[str], age_years: Sequence[float], view: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
    """Return [N] True for the images of each group, by its name; groups without an image are left out.

    Args:
        sex: [N] F or M; anything else falls into no group.
        age_years: [N]; NaN falls into none.
        view: [N] AP or PA; likewise.
    """
    sexes, ages, views = np.asarray(sex), np.asarray(age_years, np.float64), np.asarray(view)
    groups = {f"sex {name}": sexes == name for name in ("F", "M")}
    groups |= {f"age {name}": (ages >= low) & (ages < high) for name, low, high in AGE_BANDS}
    groups |= {f"view {name}": views == name for name in ("AP", "PA")}
    return {name: chosen for name, chosen in groups.items() if chosen.any()}
