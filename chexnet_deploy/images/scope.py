"""Which radiographs a model is meant for, as data in a bundle's manifest, and whether a DICOM header is of one of them.

Reads no header, and needs no DICOM library.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, StringConstraints, ValidationError, model_validator

from chexnet_deploy.errors import ImageRefusedError, RefusalReason, SpecError
from chexnet_deploy.images.content_check import ImageGuardPolicy
from chexnet_deploy.images.gray import refusal
from chexnet_deploy.inputs import StrictRecord, describe, read_toml

if TYPE_CHECKING:
    from chexnet_deploy.images.dicom.header import DicomHeader

_Code = Annotated[str, StringConstraints(pattern=r"^[A-Z0-9_ ]{1,16}$")]  # DICOM's code string, PS3.5 section 6.2
_Years = Annotated[int, Field(ge=0, le=150)]


class ScopePolicy(StrictRecord):
    """The radiographs that a model may be asked about; what the header doesn't say is accepted only where said so here.

    The defaults are ChestX-ray14's: frontal chest radiographs by computed or digital radiography. Its patients include
    children (one in twenty is under 18), but too few for a figure of any finding, so a known child is refused; an unknown
    age is accepted, as emergency patients have none. An unknown view is refused: the model has never seen a lateral.

    Header fields are those of DICOM files; `picture` holds for every image file and array.

    Attributes:
        modalities: (0008,0060).
        body_parts: (0018,0015), or CHEST where the Anatomic Region Sequence says so.
        views: (0018,5101), or AP and PA where the View Code Sequence says so.
        age_years: youngest and oldest, inclusive.
        accepts_unknown_body_part: an empty one.
        accepts_unknown_view: an empty one.
        accepts_unknown_age: none, and no dates to count it from; one that can't be read is refused.
        picture: what the picture itself must look like; off unless a scope asks for it, as drawings and pictures smaller
            than a radiograph are refused by it.
    """

    modalities: Annotated[tuple[_Code, ...], Field(min_length=1)] = ("CR", "DX")
    body_parts: Annotated[tuple[_Code, ...], Field(min_length=1)] = ("CHEST", "THORAX")
    views: Annotated[tuple[_Code, ...], Field(min_length=1)] = ("PA", "AP")
    age_years: tuple[_Years, _Years] = (18, 120)
    accepts_unknown_body_part: bool = False
    accepts_unknown_view: bool = False
    accepts_unknown_age: bool = True
    picture: ImageGuardPolicy = ImageGuardPolicy(guard="off")

    @model_validator(mode="after")
    def _is_consistent(self) -> "ScopePolicy":
        if self.age_years[0] > self.age_years[1]:
            raise ValueError("age_years must name the youngest age first")
        return self


def find_scope_faults(header: "DicomHeader", scope: ScopePolicy) -> dict[RefusalReason, str]:
    """Return what is out of scope, most telling first, each with what was found; empty where the model may be asked.

    An age is not repeated: it belongs to the patient.
    """
    faults = {}
    if header.patient_is_animal:
        faults[RefusalReason.SPECIES] = "an animal"
    for reason, found, accepted, accepts_unknown in (
        (RefusalReason.MODALITY, header.modality, scope.modalities, False),
        (RefusalReason.BODY_PART, header.body_part, scope.body_parts, scope.accepts_unknown_body_part),
        (RefusalReason.VIEW, header.view_position, scope.views, scope.accepts_unknown_view),
    ):
        is_accepted = accepts_unknown if found is None else found in accepted
        if not is_accepted:
            faults[reason] = f"{reason.value.replace('-', ' ')} {found or 'not given'}"
    youngest, oldest = scope.age_years
    age = header.patient_age_years
    if header.has_unreadable_age:
        faults[RefusalReason.AGE] = "a patient age that can't be read (nnnD, nnnW, nnnM, nnnY or years can)"
    elif age is None and not scope.accepts_unknown_age:
        faults[RefusalReason.AGE] = "no patient age"
    elif age is not None and not youngest <= age <= oldest:
        faults[RefusalReason.AGE] = f"a patient age outside {youngest} to {oldest} years"
    return faults


def check_scope(name: object, header: "DicomHeader", scope: ScopePolicy) -> None:
    """Refuse a radiograph that the model is not meant for.

    Args:
        name: what the message calls it.
        header: of the radiograph.
        scope: of the model.

    Raises:
        ImageRefusedError: SPECIES, MODALITY, BODY_PART, VIEW or AGE, the first that holds; the message names them all.
    """
    faults = find_scope_faults(header, scope)
    if not faults:
        return
    parts, views = "/".join(scope.body_parts), "/".join(scope.views)
    needed = f"{'/'.join(scope.modalities)} of {parts}, {views}, {scope.age_years[0]} to {scope.age_years[1]} years"
    needed += ", the model's scope"
    next_step = "send what is in it, or export the model with the scope it was tested for"
    message = refusal(name, ", ".join(faults.values()), needed, next_step)
    raise ImageRefusedError(next(iter(faults)), message)


def read_scope(path: Path) -> ScopePolicy:
    """Read the radiographs that a model is meant for from a TOML file; what it leaves out is ScopePolicy's default.

    Raises:
        SpecError: not TOML, or a field is unknown or out of range.
    """
    try:
        # By JSON, in which a list is what becomes a tuple; strict Python wants a tuple from the start.
        return ScopePolicy.model_validate_json(json.dumps(read_toml(path), default=str), strict=True)
    except ValidationError as err:
        raise SpecError(f"{path}: {describe(err)}. The fields are {', '.join(ScopePolicy.model_fields)}.") from err
