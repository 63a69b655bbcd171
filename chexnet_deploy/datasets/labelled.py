"""Images with what their labels say: one column an attribute, one row an image, whatever layout they were read from.

A finding is measured on the images that are labelled for it. A model may keep its accuracy on the whole and lose it on a
few; bench and evaluate report groups of sex, age band and view beside the whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.datasets.csv_rows import letters_of
from chexnet_deploy.datasets.findings import FINDINGS
from chexnet_deploy.datasets.nih_tables import Radiograph
from chexnet_deploy.errors import DatasetError
from chexnet_deploy.inputs import name_some

Sex: TypeAlias = Literal["F", "M", "unknown"]
View: TypeAlias = Literal["AP", "PA", "unknown"]

NOT_LABELLED: Final = -1
"""In `LabelledImages.labels`: nobody says whether the finding is there."""
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


@dataclass(frozen=True, slots=True, eq=False)
class LabelledImages:
    """Image files with what their table says of them.

    Attributes:
        names: [N] as the table writes them.
        files: [N] paths as text; empty where an image is not on disk.
        findings: [C] names.
        labels: int8 [N, C], 1 present, 0 absent, NOT_LABELLED.
        patients: int64 [N] patient numbers.
        sex: [N].
        age_years: float64 [N]; NaN where unknown.
        view: [N].
        refused: finding -> why its column can't be read; an error only for who asks for that finding.
    """

    names: tuple[str, ...]
    files: tuple[str, ...]
    findings: tuple[str, ...]
    labels: NDArray[np.int8]
    patients: NDArray[np.int64]
    sex: tuple[Sex, ...]
    age_years: NDArray[np.float64]
    view: tuple[View, ...]
    refused: Mapping[str, DatasetError] = field(default_factory=dict)

    @classmethod
    def of(cls, radiographs: Sequence[Radiograph], findings: Sequence[str] = FINDINGS) -> "LabelledImages":
        """Take rows of ChestX-ray14's table, with the labels' columns in a manifest's order; errors as for_findings."""
        images = cls(
            names=tuple(radiograph.image for radiograph in radiographs),
            files=tuple("" if radiograph.path is None else str(radiograph.path) for radiograph in radiographs),
            findings=FINDINGS,
            labels=np.array([[f in r.findings for f in FINDINGS] for r in radiographs], np.int8).reshape(-1, 14),
            patients=np.array([radiograph.patient for radiograph in radiographs], np.int64),
            sex=tuple(radiograph.sex for radiograph in radiographs),
            age_years=np.array([radiograph.age_years for radiograph in radiographs], np.float64),
            view=tuple(radiograph.view for radiograph in radiographs),
        )
        return images if tuple(findings) == FINDINGS else images.for_findings(findings)

    @property
    def paths(self) -> tuple[Path, ...]:
        """[N] files; of images on disk alone."""
        assert all(self.files)
        return tuple(map(Path, self.files))

    @property
    def truth(self) -> NDArray[np.bool_]:
        """[N, C] True where the finding is present."""
        present: NDArray[np.bool_] = self.labels == 1
        return present

    @property
    def labelled(self) -> NDArray[np.bool_]:
        """[N, C] True where the table says whether it is."""
        labelled: NDArray[np.bool_] = self.labels != NOT_LABELLED
        return labelled

    @property
    def groups(self) -> Mapping[str, NDArray[np.bool_]]:
        """[N] True for the images of each group of patients, by its name."""
        return subgroups(self.sex, self.age_years.tolist(), self.view)

    def take(self, rows: NDArray[np.intp]) -> "LabelledImages":
        """Return the images of some rows, in the order given."""
        places = rows.tolist()
        return replace(
            self,
            names=tuple(self.names[i] for i in places),
            files=tuple(self.files[i] for i in places),
            labels=self.labels[rows],
            patients=self.patients[rows],
            sex=tuple(self.sex[i] for i in places),
            age_years=self.age_years[rows],
            view=tuple(self.view[i] for i in places),
        )

    def for_findings(self, findings: Sequence[str]) -> "LabelledImages":
        """Return the same images with the columns of a model's findings; one that the table lacks is labelled nowhere.

        Capitals, blanks and underscores don't matter.

        Raises:
            DatasetError: the table has none of them, or a column of theirs holds what can't be right.
        """
        for finding, error in self.refused.items():
            if letters_of(finding) in map(letters_of, findings):
                raise error
        column_of = {letters_of(finding): column for column, finding in enumerate(self.findings)}
        columns = [column_of.get(letters_of(finding)) for finding in findings]
        labels = np.full((len(self.names), len(columns)), NOT_LABELLED, np.int8)
        for place, column in enumerate(columns):
            if column is not None:
                labels[:, place] = self.labels[:, column]
        if not (labels != NOT_LABELLED).any():
            if alike := [self.findings[column] for column in columns if column is not None]:
                raise DatasetError(
                    f"found no image labelled for {name_some(alike)}, as all cells are empty or uncertain; needed one at least. "
                    f"Next: label them, or say in a TOML what empty and -1 stand for."
                )
            raise DatasetError(
                f"found labels of {name_some(self.findings) or 'no finding'}; needed at least one image labelled for a finding "
                f'out of {", ".join(findings)}. Next: name their columns in a TOML, [findings] {findings[0]} = "...".'
            )
        return replace(self, findings=tuple(findings), labels=labels, refused={})

    def shared_with(self, findings: Sequence[str]) -> tuple[str, ...]:
        """Return those of a model's findings that some image is labelled for, in the model's words and order."""
        known = np.flatnonzero(self.for_findings(findings).labelled.any(axis=0))
        return tuple(findings[column] for column in known.tolist())
