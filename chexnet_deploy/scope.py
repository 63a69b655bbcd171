"""Which radiographs a model is meant for, as data: part of a bundle's manifest.

Says nothing of how a DICOM header is read; dicom/scope_check.py compares the two.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from chexnet_deploy.input_guard import ImageGuardPolicy

_Code = Annotated[str, StringConstraints(pattern=r"^[A-Z0-9_ ]{1,16}$")]  # DICOM's code string, PS3.5 section 6.2
_Years = Annotated[int, Field(ge=0, le=150)]


class ScopePolicy(BaseModel):
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
        accepts_unknown_age: none, and no dates to count it from.
        picture: what the picture itself must look like; off unless a scope asks for it, as drawings and pictures smaller
            than a radiograph are refused by it.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

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
