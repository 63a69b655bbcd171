"""Which column of anyone's table holds what: recognised by name where that is obvious, else named by a TOML.

    table = "train.csv"                        # relative to the TOML, as root is
    root = "CheXpert-v1.0"                     # what image paths are relative to; default: the table's folder
    path = "Path"                              # a column, or a template of columns: "images/{image_id}.dicom"
    patient = "PatientID"                      # where each image is another patient's, the image column itself
    patient_in_path = "(patient[0-9]+)/"       # or a regular expression: its first group in the path is the patient
    labels = "Labels"                          # a column of lists: "Mass|Edema", or ['mass', 'edema']
    uncertain = "ignore"                       # what -1 is: not labelled, or "zeros", or "ones"
    empty = "ignore"                           # what an empty cell is: not labelled, or "zeros"
    sex = "Sex"
    age = "Age"
    view = ["AP/PA", "Frontal/Lateral"]        # the first that isn't empty
    views = ["AP", "PA"]                       # images of other views are left out
    split = "split"                            # a column of train, val and test; or "train", "test" or "by patient" for all
    missing = "refuse"                         # rows without a file; or "leave out"

    [findings]                                 # the model's name of a finding = the table's; default: columns named alike
    Effusion = "Pleural Effusion"

Every key but `table` may be omitted. Reads no row.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, ValidationError, field_validator

from chexnet_deploy.datasets.csv_rows import Row, find_column, find_findings, letters_of, require_column
from chexnet_deploy.errors import DatasetError, SpecError
from chexnet_deploy.inputs import Record, describe, quote_some, read_toml

IMAGE_COLUMNS: Final = (
    *("path", "imagepath", "filepath", "imageindex", "image", "imageid", "imagename", "filename", "file"),
)
IMAGE_COLUMN_NEEDED: Final = "an image column such as Image Index, image or path"
NIH_LABELS: Final = "Finding Labels"
_LABELS: Final = ("findinglabels", "labels")
_PATIENT: Final = ("patientid", "patient", "subjectid", "subject")
_SEX: Final = ("patientsex", "patientgender", "sex", "gender", "patientsexdicom")
_AGE: Final = ("patientage", "age", "ageyears")
_VIEW: Final = ("viewposition", "view", "projection", "appa", "frontallateral")
_SPLIT: Final = ("split", "set", "subset", "partition")
_LABEL_WORDS: Final = ("label", "true", "truth", "target", "gt")
FOR_ALL: Final = ("train", "test", "by patient")
_FIELD: Final = re.compile(r"\{([^{}]*)\}")


class Description(Record):
    """A TOML's content; see the module's first lines."""

    table: str
    root: str | None = None
    path: str | None = None
    patient: str | None = None
    patient_in_path: str | None = None
    labels: str | None = None
    uncertain: Literal["ignore", "zeros", "ones"] | None = None
    empty: Literal["ignore", "zeros"] = "ignore"
    sex: str | None = None
    age: str | None = None
    view: str | Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    views: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    split: str | None = None
    missing: Literal["refuse", "leave out"] = "refuse"
    findings: dict[str, str] = Field(default={})

    @field_validator("patient_in_path")
    @classmethod
    def _has_a_group(cls, pattern: str | None) -> str | None:
        try:
            if pattern is not None and re.compile(pattern).groups < 1:
                raise ValueError("needs a group in parentheses, the patient")
        except re.error as err:
            raise ValueError(f"is no regular expression ({err})") from err
        return pattern


def read_description(path: Path) -> Description:
    """Return what a TOML says, with `table` and `root` as paths; or of a table itself, that it is one.

    Raises:
        SpecError: the TOML can't be read, or a field is unknown, missing or wrong.
    """
    if path.suffix.lower() != ".toml":
        return Description(table=str(path), root=str(path.parent))
    try:
        stated = Description.model_validate(read_toml(path))
    except ValidationError as err:
        raise SpecError(f"{path}: {describe(err)}. See docs/own-data.md for the fields.") from err
    table = path.parent / stated.table
    root = table.parent if stated.root is None else path.parent / stated.root
    return stated.model_copy(update={"table": str(table), "root": str(root)})


@dataclass(frozen=True, slots=True)
class Columns:
    """Places in a table's rows.

    Attributes:
        image: places of the columns that an image's path is made of.
        template: how, by Python's format; None takes the one column as it is.
        patient, labels, sex, age, split: None where there is no such column.
        view: the first that isn't empty counts.
        is_nih: the lists are ChestX-ray14's, whose names are known.
        findings: of columns of labels, name -> place. Some may hold something else.
        refused: of these, those that another is spelt like.
        are_named: the findings are those of a TOML, so no column may hold anything but labels.
    """

    image: tuple[int, ...]
    template: str | None
    patient: int | None
    labels: int | None
    sex: int | None
    age: int | None
    view: tuple[int, ...]
    split: int | None
    findings: Mapping[str, int]
    refused: Mapping[str, DatasetError]
    are_named: bool
    is_nih: bool


def find_columns(header: Row, stated: Description) -> Columns:
    """Return where a table holds what.

    Raises:
        DatasetError: a column that was named is not there, one that is needed is not found, or two may be meant.
    """

    def place(name: str | None, usual: Sequence[str]) -> int | None:
        return _only(header, find_column(header, usual)) if name is None else _named(header, name)

    wide = find_findings(header, _LABEL_WORDS)
    is_for_all = stated.split in FOR_ALL and stated.split not in header.fields
    views = (stated.view,) if isinstance(stated.view, str) else stated.view
    image, template = _find_image(header, stated.path)
    labels = place(stated.labels, _LABELS[:1] if wide else _LABELS)
    others = {
        "patient": None if stated.patient_in_path is not None else place(stated.patient, _PATIENT),
        "sex": place(stated.sex, _SEX),
        "age": place(stated.age, _AGE),
        "split": None if is_for_all else place(stated.split, _SPLIT),
    }
    view = tuple(
        p for word in _VIEW if (p := place(None, (word,))) is not None
    ) if views is None else tuple(_named(header, name) for name in views)  # fmt: skip
    used = {*image, *view, *others.values(), labels}
    if labels is not None:
        named: list[tuple[str, int]] = []
    elif stated.findings:
        named = [(finding, _named(header, name)) for finding, name in stated.findings.items()]
    else:
        known = {p: finding for finding, p in wide.items()}
        named = [
            (known.get(p, name.strip()), p) for p, name in enumerate(header.fields) if p not in used and name.strip()
        ]
    findings, times = dict(named), Counter(letters_of(finding) for finding, _ in named)
    if labels is None and not findings:
        raise header.column_error("a column of 0 and 1 for each finding, or one of lists, such as Finding Labels")
    return Columns(
        image,
        template,
        labels=labels,
        view=view,
        findings=findings,
        refused={
            finding: header.error(
                f"{times[letters_of(finding)]} columns of {finding}", "one; rename or drop the others"
            )
            for finding in findings
            if times[letters_of(finding)] > 1
        },
        are_named=bool(stated.findings),
        is_nih=labels is not None and header.fields[labels] == NIH_LABELS and not stated.findings,
        **others,
    )


def _find_image(header: Row, stated: str | None) -> tuple[tuple[int, ...], str | None]:
    """Return the columns that make an image's path, and how."""
    if stated is None:
        place = require_column(header, IMAGE_COLUMNS, IMAGE_COLUMN_NEEDED)
        _only(header, place)
        return (place,), None
    names = _FIELD.findall(stated)
    if not names or stated in header.fields:
        return (_named(header, stated),), None
    # By number: a column's name may hold a dot or a colon, which mean something to format.
    template = _FIELD.sub("{}", stated)
    try:
        template.format(*names)
    except (ValueError, IndexError, KeyError) as err:
        raise SpecError(f"path = {stated!r}: {err}. Write each column as {{name}}, and no other brace.") from err
    return tuple(_named(header, name) for name in names), template


def _named(header: Row, name: str) -> int:
    """Return the place of the one column of that name, written so; else of the one spelt like it."""
    letters = letters_of(name)
    places = [p for p, field in enumerate(header.fields) if field.strip() == name.strip()]
    places = places or [p for p, field in enumerate(header.fields) if letters and letters_of(field) == letters]
    if len(places) != 1:
        raise header.column_error(f"one column {name!r}, which the TOML names")
    return places[0]


def _only(header: Row, place: int | None) -> int | None:
    """Refuse a column that another is spelt like: nobody says which is meant."""
    if place is not None:
        twins = [field for field in header.fields if letters_of(field) == letters_of(header.fields[place])]
        if len(twins) > 1:
            raise header.error(
                f"the columns {quote_some(twins)}", "one of them; rename the other, or name one in a TOML"
            )
    return place
