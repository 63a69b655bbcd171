"""Which images are of which group of patients: sex, age band and view, as ChestX-ray14's table tells them.

A model may keep its accuracy on the whole and lose it on a few; bench and evaluate report each group beside the whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.datasets.chestxray14 import truth
from chexnet_deploy.datasets.findings import FINDINGS
from chexnet_deploy.datasets.nih_tables import Radiograph
from chexnet_deploy.errors import DatasetError
from chexnet_deploy.inputs import name_some

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


@dataclass(frozen=True, slots=True)
class LabelledImages:
    """Image files with what the tables say of them.

    Attributes:
        names: [N] image names.
        paths: [N] files.
        findings: [C] names.
        truth: [N, C] True where the finding is present.
        patients: [N] patient numbers.
        groups: [N] True for the images of each group of patients, by its name.
    """

    names: tuple[str, ...]
    paths: tuple[Path, ...]
    findings: tuple[str, ...]
    truth: NDArray[np.bool_]
    patients: NDArray[np.int64]
    groups: Mapping[str, NDArray[np.bool_]]

    @classmethod
    def of(cls, radiographs: Sequence[Radiograph], findings: Sequence[str]) -> "LabelledImages":
        """Take radiographs that are on disk, with those findings of a model that the tables label, in the model's order.

        Raises:
            DatasetError: there are none, one is not on disk, or the tables label no finding of the model.
        """
        labelled = tuple(finding for finding in findings if finding in FINDINGS)
        if not labelled:
            raise DatasetError(
                f"found a model of {name_some(findings)}, none of which ChestX-ray14 labels; needed one of its findings: "
                f"{', '.join(FINDINGS)}. Next: give labels of the model's findings, or name them as the labels do."
            )
        paths = [radiograph.path for radiograph in radiographs if radiograph.path is not None]
        if not paths or len(paths) < len(radiographs):
            raise DatasetError(
                f"{len(paths)} of {len(radiographs)} labelled images are on disk; needed all, and at least one."
            )
        columns = [FINDINGS.index(finding) for finding in labelled]
        return cls(
            tuple(radiograph.image for radiograph in radiographs),
            tuple(paths),
            labelled,
            truth(radiographs)[:, columns],
            np.array([radiograph.patient for radiograph in radiographs], np.int64),
            subgroups([r.sex for r in radiographs], [r.age_years for r in radiographs], [r.view for r in radiographs]),
        )

    def narrowed(self, findings: Sequence[str]) -> "LabelledImages":
        """Return the same images with those of the findings alone that are labelled, in the order given.

        Raises:
            DatasetError: none is.
        """
        kept = tuple(finding for finding in findings if finding in self.findings)
        if not kept:
            raise DatasetError(
                f"found labels of {name_some(self.findings)} and models of {name_some(findings) or 'nothing'} in common; needed "
                f"a finding that all know. Next: name them alike."
            )
        return replace(self, findings=kept, truth=self.truth[:, [self.findings.index(finding) for finding in kept]])
