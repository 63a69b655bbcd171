"""Which attributes a result may take over from its source image's header, and what each may hold.

Names and types are those of PS3.3 C.7.1.1 (Patient), C.7.2.2 (Patient Study), C.7.2.1 (General Study) and C.7.6.1 (General
Image); what happens to a value that breaks them is said in source_header.py.
"""

from dataclasses import dataclass, field
from itertools import permutations
from typing import Final, Literal


@dataclass(frozen=True, slots=True)
class Attribute:
    """One attribute of plain text.

    Attributes:
        vr: its value representation (PS3.6).
        type: 2 must be there and may be empty; 3 may be absent.
        is_description: free words, whose beginning is worth keeping; never of what identifies.
        n_values: how many it has; None for any number.
        terms: the values it may have; empty for any that its representation allows.
    """

    keyword: str
    vr: str
    type: Literal[2, 3] = 3
    is_description: bool = False
    n_values: int | None = 1
    terms: frozenset[str] = field(default_factory=frozenset)


_LOSSY_METHODS: Final = frozenset({"ISO_10918_1", "ISO_14495_1", "ISO_15444_1"})  # of still pictures (C.7.6.1.1.5.1)
_YES_NO: Final = frozenset({"YES", "NO"})
_OFFSETS: Final = frozenset(  # of the world's time zones (PS3.3 C.12.1.1.8)
    f"{sign}{hours:02}{minutes:02}" for sign in "+-" for hours in range(15) for minutes in (0, 15, 30, 45)
) - {"-0000"}
_DIRECTIONS: Final = frozenset(  # of a biped, the strongest first, no direction with its opposite (PS3.3 C.7.6.1.1.1)
    "".join(letters)
    for n in (1, 2, 3)
    for letters in permutations("APRLHF", n)
    if not any(set(pair) <= set(letters) for pair in ("AP", "RL", "HF"))
)
PATIENT_STUDY: Final = (
    Attribute("PatientName", "PN", 2),
    Attribute("PatientID", "LO", 2),
    Attribute("IssuerOfPatientID", "LO"),
    Attribute("TypeOfPatientID", "CS", terms=frozenset({"TEXT", "RFID", "BARCODE"})),
    Attribute("PatientBirthDate", "DA", 2),
    Attribute("PatientBirthTime", "TM"),
    Attribute("PatientSex", "CS", 2, terms=frozenset("MFO")),
    Attribute("QualityControlSubject", "CS", terms=_YES_NO),
    Attribute("OtherPatientNames", "PN", n_values=None),
    Attribute("EthnicGroup", "SH"),
    Attribute("PatientComments", "LT", is_description=True),
    Attribute("PatientIdentityRemoved", "CS", terms=_YES_NO),
    Attribute("DeidentificationMethod", "LO", n_values=None),
    Attribute("PatientAge", "AS"),
    Attribute("PatientSize", "DS"),
    Attribute("PatientWeight", "DS"),
    Attribute("Occupation", "SH"),
    Attribute("SmokingStatus", "CS", terms=frozenset({"YES", "NO", "UNKNOWN"})),
    Attribute("MedicalAlerts", "LO", n_values=None),
    Attribute("Allergies", "LO", n_values=None),
    Attribute("LastMenstrualDate", "DA"),
    Attribute("PatientState", "LO", is_description=True),
    Attribute("AdditionalPatientHistory", "LT", is_description=True),
    Attribute("AdmittingDiagnosesDescription", "LO", n_values=None),
    Attribute("AdmissionID", "LO"),
    Attribute("ServiceEpisodeID", "LO"),
    Attribute("ServiceEpisodeDescription", "LO", is_description=True),
    Attribute("StudyDate", "DA", 2),
    Attribute("StudyTime", "TM", 2),
    Attribute("StudyID", "SH", 2),
    Attribute("AccessionNumber", "SH", 2),
    Attribute("ReferringPhysicianName", "PN", 2),
    Attribute("ConsultingPhysicianName", "PN", n_values=None),
    Attribute("StudyDescription", "LO", is_description=True),
    Attribute("PhysiciansOfRecord", "PN", n_values=None),
    Attribute("NameOfPhysiciansReadingStudy", "PN", n_values=None),
    Attribute("TimezoneOffsetFromUTC", "SH", terms=_OFFSETS),
)
PICTURE: Final = (
    Attribute("BodyPartExamined", "CS"),
    Attribute("BurnedInAnnotation", "CS", terms=_YES_NO),
    Attribute("PatientOrientation", "CS", n_values=2, terms=_DIRECTIONS),
    Attribute("LossyImageCompression", "CS", terms=frozenset({"00", "01"})),
    Attribute("LossyImageCompressionRatio", "DS", n_values=None),
    Attribute("LossyImageCompressionMethod", "CS", n_values=None, terms=_LOSSY_METHODS),
)
# Of the General Study module, beside the carried ones; those of the patient are found by their group.
STUDY_LEFT_OUT: Final = (
    "ReferringPhysicianIdentificationSequence",
    "ConsultingPhysicianIdentificationSequence",
    "PhysiciansOfRecordIdentificationSequence",
    "PhysiciansReadingStudyIdentificationSequence",
    "IssuerOfAccessionNumberSequence",
    "RequestingService",
    "RequestingServiceCodeSequence",
    "ReferencedStudySequence",
    "ProcedureCodeSequence",
    "ReasonForPerformedProcedureCodeSequence",
    "AdmittingDiagnosesCodeSequence",
    "IssuerOfAdmissionIDSequence",
    "IssuerOfServiceEpisodeIDSequence",
    "ReasonForVisit",
    "ReasonForVisitCodeSequence",
)
