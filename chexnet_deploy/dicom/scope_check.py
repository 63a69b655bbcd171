"""Compare a DICOM header with the radiographs that a model is meant for."""

from chexnet_deploy.dicom.header import DicomHeader
from chexnet_deploy.errors import ImageRefusedError, RefusalReason
from chexnet_deploy.gray import refusal
from chexnet_deploy.scope import ScopePolicy


def find_scope_faults(header: DicomHeader, scope: ScopePolicy) -> dict[RefusalReason, str]:
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
    if age is None and not scope.accepts_unknown_age:
        faults[RefusalReason.AGE] = "no patient age"
    elif age is not None and not youngest <= age <= oldest:
        faults[RefusalReason.AGE] = f"a patient age outside {youngest} to {oldest} years"
    return faults


def check_scope(name: object, header: DicomHeader, scope: ScopePolicy) -> None:
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
