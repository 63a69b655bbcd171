"""A prediction as a DICOM Comprehensive 3D SR document after TID 1500, Measurement Report (PS3.16).

One measurement group (TID 1501) a finding, in the manifest's order:

    Tracking Identifier          the finding's name in the manifest
    Algorithm ... (TID 4019)     bundle id as version; precision, preprocessing and hashes as parameters
    (122157, DCM, Probability)   0..1
    Operating point              0..1; absent where the bundle has none for this finding
    Lower operating point        0..1; only where a site file has two for this finding
    <code of the finding>        Present: at or above the operating point; Absent: below it, or below the lower one;
                                 Undetermined: between the two, or there is none

The finding's code is the name of an evaluation and not the value of (121071, DCM, Finding): that would assert all 14 findings
of every patient, and a reader that looks no further would believe it. The evaluation stays in its group, beside the numbers
that it follows from, and not in TID 1500's own container (row 12): an "Absent" alone says more than the model does.

A probability is written as 64-bit Floating Point Value, exactly, and rounded to the 16 characters of a decimal string beside
it, which still tells every float32 apart.
"""

from typing import Final

from highdicom.coding_schemes import CodingSchemeIdentificationItem
from highdicom.sr import (
    AlgorithmIdentification,
    CodedConcept,
    Comprehensive3DSR,
    DeviceObserverIdentifyingAttributes,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    ObservationContext,
    ObserverContext,
    QualitativeEvaluation,
    SourceImageForMeasurementGroup,
    TextContentItem,
    TrackingIdentifier,
)
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code

from chexnet_deploy.dicom.results.codes import (
    ABSENT,
    ABSENT_BELOW,
    IMAGING,
    NO_UNITS,
    OPERATING_POINT,
    PRESENT,
    PRIVATE_SCHEME,
    PRIVATE_SCHEME_NAME,
    PROBABILITY,
    UNDETERMINED,
    finding_code,
)
from chexnet_deploy.dicom.results.result import ALGORITHM, DISCLAIMER, Result, finish
from chexnet_deploy.errors import DicomError

SERIES_NUMBER: Final = 9101  # far from those a modality counts up to; a study's series are told apart by UID
_TRACKING_IDENTIFIER: Final = Code("112039", "DCM", "Tracking Identifier")
_MEASUREMENT_GROUP: Final = Code("125007", "DCM", "Measurement Group")
_IMAGING_MEASUREMENTS: Final = Code("126010", "DCM", "Imaging Measurements")
_MEANING: Final = "Present and absent say how a probability lies to its operating point."


def build_structured_report(result: Result) -> Dataset:
    """Return the document, with file meta information; `encode` makes its bytes.

    The same result gives the same bytes. Only what the document itself is made of is said: 14 numbers are complete, not
    verified by anyone and preliminary (PS3.3 C.17.2).

    Raises:
        DicomError: a finding's name can't be coded.
    """
    device = result.device
    algorithm = _algorithm(result)
    first, *others = (_group(result, finding, algorithm) for finding in result.manifest.findings)
    report = MeasurementReport(
        observation_context=ObservationContext(
            observer_device_context=ObserverContext(
                observer_type=CodedConcept("121007", "DCM", "Device"),
                observer_identifying_attributes=DeviceObserverIdentifyingAttributes(
                    uid=device.uid,
                    manufacturer_name=device.manufacturer,
                    model_name=device.model_name,
                    serial_number=device.serial_number,
                ),
            )
        ),
        procedure_reported=IMAGING,
        imaging_measurements=[first],
    )
    # TID 1500 is extensible, and this must stay with the numbers wherever the tree is shown.
    report[0].ContentSequence.append(
        TextContentItem(
            Code("121106", "DCM", "Comment"), f"{DISCLAIMER}. {_MEANING}{_site(result)}", relationship_type="CONTAINS"
        )
    )
    built = Comprehensive3DSR(
        evidence=[_nameless(result)],
        content=report,
        series_instance_uid=result.uid("structured report series"),
        series_number=SERIES_NUMBER,
        sop_instance_uid=result.uid("structured report"),
        instance_number=1,
        manufacturer=device.manufacturer,
        is_complete=True,
        manufacturer_model_name=device.model_name,
        device_serial_number=device.serial_number,
        software_versions=device.software_version,
        series_description=f"{ALGORITHM} findings: {DISCLAIMER}",
        coding_schemes=[CodingSchemeIdentificationItem(PRIVATE_SCHEME, name=PRIVATE_SCHEME_NAME)],
    )
    # The document copies its content, and looks for images in all of it. Every group names the same one, so the others come
    # after that: a third of the time, and the same bytes.
    (measurements,) = _children(built, _IMAGING_MEASUREMENTS)
    for group in others:
        measurements.ContentSequence.extend(group)
    finish(built, result)
    return built


def read_probabilities(report: Dataset) -> dict[str, float]:
    """Return a document's probabilities by finding, in its order, exactly as they were written.

    Args:
        report: as build_structured_report made it, or as pydicom read it.

    Raises:
        DicomError: it is not such a document.
    """
    try:
        (measurements,) = _children(report, _IMAGING_MEASUREMENTS)
        found = {}
        for group in _children(measurements, _MEASUREMENT_GROUP):
            (name,), (number,) = _children(group, _TRACKING_IDENTIFIER), _children(group, PROBABILITY)
            measured = number.MeasuredValueSequence[0]
            found[str(name.TextValue)] = float(measured.get("FloatingPointValue", measured.NumericValue))
    except (AttributeError, IndexError, TypeError, ValueError) as err:
        raise DicomError(
            "The DICOM object is no report of findings as this package writes them. Give the structured report itself."
        ) from err
    return found


def _children(parent: Dataset, name: Code) -> list[Dataset]:
    return [
        item for item in parent.ContentSequence if CodedConcept.from_dataset(item.ConceptNameCodeSequence[0]) == name
    ]


def _group(result: Result, finding: str, algorithm: AlgorithmIdentification) -> MeasurementsAndQualitativeEvaluations:
    high, low = result.points.present_at.get(finding), result.points.absent_below.get(finding)
    measurements = [Measurement(PROBABILITY, float(result.prediction.probabilities[finding]), NO_UNITS)]
    if high is not None:
        measurements.append(Measurement(OPERATING_POINT, float(high), NO_UNITS))
    if low is not None and low != high:
        measurements.append(Measurement(ABSENT_BELOW, float(low), NO_UNITS))
    decision = {True: PRESENT, False: ABSENT, None: UNDETERMINED}[result.prediction.present.get(finding)]
    return MeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(uid=result.uid(f"tracking of {finding}"), identifier=finding),
        algorithm_id=algorithm,
        measurements=measurements,
        qualitative_evaluations=[QualitativeEvaluation(finding_code(finding), decision)],
        source_images=[SourceImageForMeasurementGroup(result.source.sop_class_uid, result.source.sop_instance_uid)],
    )


def _algorithm(result: Result) -> AlgorithmIdentification:
    manifest = result.manifest
    parameters = [
        f"precision {manifest.precision.value}",
        f"preprocessing sha256 {manifest.preprocessing.sha256}",
        f"{manifest.model_name} sha256 {manifest.files[manifest.model_name]}",
        f"checkpoint sha256 {manifest.checkpoint_sha256}",
    ]
    if result.points.site is not None:
        parameters.append(f"operating points site file sha256 {result.points.site}")
    return AlgorithmIdentification(
        name=ALGORITHM,
        version=result.bundle_id,
        parameters=parameters,
        family=Code("123110", "DCM", "Artificial Intelligence"),
    )


def _site(result: Result) -> str:
    return "" if result.points.site is None else f" Operating points of {result.points.source}."


def _nameless(result: Result) -> Dataset:
    """Return the source as evidence without its patient: highdicom's warnings repeat a name, and `finish` writes it later."""
    evidence = Dataset()
    evidence.SOPClassUID = result.source.sop_class_uid
    evidence.SOPInstanceUID = result.source.sop_instance_uid
    evidence.SeriesInstanceUID = result.source.series_uid
    evidence.StudyInstanceUID = result.source.study_uid
    for keyword in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID"):
        setattr(evidence, keyword, "")
    evidence.StudyDate = evidence.StudyTime = None
    return evidence
