"""The report: 14 numbers that come back exactly, codes that claim no more than the model, and judges that did not write it."""

import dataclasses
import logging
import math
from collections.abc import Callable
from datetime import datetime, timedelta
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from chexnet_deploy.bundle.manifest import Manifest
from chexnet_deploy.bundle.site import OperatingPoints
from chexnet_deploy.datasets.findings import FINDINGS
from chexnet_deploy.dicom.results.codes import PRIVATE_SCHEME, finding_code
from chexnet_deploy.dicom.results.result import Device, Result, encode
from chexnet_deploy.dicom.results.structured_report import build_structured_report, read_probabilities
from chexnet_deploy.errors import DicomError
from chexnet_deploy.runtime.predictor import Prediction
from tests.dicom.results.conftest import Judge

HeaderOf = Callable[..., Dataset]
ResultFor = Callable[[Dataset], Result]


@pytest.fixture(scope="module")
def result(result_for: ResultFor, header_of: HeaderOf) -> Result:
    return result_for(header_of())


@pytest.fixture(scope="module")
def report(result: Result) -> Dataset:
    """As another program reads it."""
    return reread(build_structured_report(result))


def reread(built: Dataset) -> Dataset:
    return pydicom.dcmread(BytesIO(encode(built)))


def groups(report: Dataset) -> dict[str, list[Dataset]]:
    """The content items of each finding's group, by its tracking identifier."""
    (measurements,) = [item for item in report.ContentSequence if named(item) == "Imaging Measurements"]
    return {
        str(group.ContentSequence[0].TextValue): list(group.ContentSequence) for group in measurements.ContentSequence
    }


def named(item: Dataset) -> str:
    return str(item.ConceptNameCodeSequence[0].CodeMeaning)


def everything(item: Dataset) -> list[Dataset]:
    return [item, *(deeper for child in item.get("ContentSequence", ()) for deeper in everything(child))]


def test_a_group_by_hand(report: Dataset) -> None:
    items = groups(report)["Pneumonia"]
    probability, point = (item.MeasuredValueSequence[0] for item in items if item.ValueType == "NUM")
    # The seventh of 14 steps from 0.05 to 0.95, as a float32.
    assert probability.FloatingPointValue == float(np.linspace(0.05, 0.95, 14, dtype=np.float32)[6])
    assert (point.NumericValue, point.FloatingPointValue) == (0.3, 0.3)
    unit = probability.MeasurementUnitsCodeSequence[0]
    assert (unit.CodeValue, unit.CodingSchemeDesignator) == ("1", "UCUM")
    (decision,) = [item for item in items if named(item) == "Pneumonia"]
    name = decision.ConceptNameCodeSequence[0]
    assert (name.CodeValue, name.CodingSchemeDesignator) == ("233604007", "SCT")
    assert decision.ConceptCodeSequence[0].CodeMeaning == "Present"
    (image,) = [item.ReferencedSOPSequence[0] for item in items if item.ValueType == "IMAGE"]
    assert image.ReferencedSOPInstanceUID == "1.2.3.4.5"


def test_the_other_two_decisions(report: Dataset) -> None:
    by_finding = groups(report)
    assert by_finding["Atelectasis"][-2].ConceptCodeSequence[0].CodeMeaning == "Absent"
    assert by_finding["Hernia"][-2].ConceptCodeSequence[0].CodeMeaning == "Undetermined"
    assert [named(item) for item in by_finding["Hernia"] if item.ValueType == "NUM"] == ["Probability"]


def test_a_site_file_s_two_points_are_written_and_named(result: Result, report: Dataset) -> None:
    words = "site aaaaaaaaaaaa: PPV at least 0.9 and NPV at least 0.95 with confidence 0.95"
    points = OperatingPoints({"Mass": 0.9}, {"Mass": 0.125, "Hernia": 0.5}, words, "a" * 64)
    probabilities = result.prediction.probabilities  # Mass 0.33, Hernia 0.95
    decided = dataclasses.replace(result.prediction, present=points.decide(probabilities))
    built = reread(build_structured_report(dataclasses.replace(result, prediction=decided, points=points)))
    by_finding = groups(built)
    numbers = {named(item): item for item in by_finding["Mass"] if item.ValueType == "NUM"}
    assert list(numbers) == ["Probability", "Operating point", "Lower operating point"]
    assert numbers["Operating point"].MeasuredValueSequence[0].NumericValue == 0.9
    assert numbers["Lower operating point"].MeasuredValueSequence[0].NumericValue == 0.125
    for finding in ("Mass", "Hernia", "Pneumonia"):  # between, above its only one, without
        assert by_finding[finding][-2].ConceptCodeSequence[0].CodeMeaning == "Undetermined"
    (comment,) = [str(item.TextValue) for item in built.ContentSequence if named(item) == "Comment"]
    assert comment.endswith(f"Operating points of {words}.")
    parameters = [str(item.TextValue) for item in by_finding["Mass"] if named(item) == "Algorithm Parameters"]
    assert f"operating points site file sha256 {'a' * 64}" in parameters
    assert built.SOPInstanceUID != report.SOPInstanceUID  # what says something else is another object


def test_no_finding_is_asserted(report: Dataset) -> None:
    # (121071, DCM, Finding) = Pneumothorax would say that the patient has one, whatever the probability beside it.
    codes = {item.ConceptNameCodeSequence[0].CodeValue for item in everything(report)}
    assert "121071" not in codes
    values = {item.ConceptCodeSequence[0].CodeValue for item in everything(report) if item.ValueType == "CODE"}
    assert not values & {finding_code(finding).value for finding in FINDINGS}


def test_it_says_which_algorithm_and_device(report: Dataset, result: Result) -> None:
    algorithm = {named(item): [] for item in groups(report)["Mass"] if item.ValueType == "TEXT"}
    for item in groups(report)["Mass"]:
        if item.ValueType == "TEXT":
            algorithm[named(item)].append(str(item.TextValue))
    assert algorithm["Algorithm Name"] == ["CheXNet"]
    assert algorithm["Algorithm Version"] == ["d" * 64]
    assert algorithm["Algorithm Parameters"] == [
        "precision fp32",
        f"preprocessing sha256 {result.manifest.preprocessing.sha256}",
        f"model.onnx sha256 {'a' * 64}",
        f"checkpoint sha256 {'c' * 64}",
    ]
    observer = {named(item): item for item in report.ContentSequence}
    assert observer["Device Observer UID"].UID == result.device.uid == Device("SN-1").uid != Device("SN-2").uid
    assert report.DeviceSerialNumber == "SN-1"


def test_it_belongs_to_the_source_s_study_and_is_nobody_s_verdict(report: Dataset) -> None:
    assert (report.StudyInstanceUID, report.PatientID, report.PatientName) == ("1.2.3", "CANARY-4711", "Canary^Patient")
    (evidence,) = report.CurrentRequestedProcedureEvidenceSequence
    assert evidence.ReferencedSeriesSequence[0].SeriesInstanceUID == "1.2.3.4"
    assert (report.VerificationFlag, report.PreliminaryFlag, report.CompletionFlag) == (
        "UNVERIFIED",
        "PRELIMINARY",
        "COMPLETE",
    )
    assert "not for diagnosis" in report.SeriesDescription
    assert [str(item.TextValue) for item in report.ContentSequence if named(item) == "Comment"] == [
        "AI result, not for diagnosis. Present and absent say how a probability lies to its operating point."
    ]


def test_times_are_in_the_source_s_zone(result_for: ResultFor, header_of: HeaderOf) -> None:
    # Made at 12:30:15.25 one hour east of Greenwich.
    for offset, time in ((None, "123015.250000"), (b"+0000", "113015.250000"), (b"-0430", "070015.250000")):
        built = reread(build_structured_report(result_for(header_of(TimezoneOffsetFromUTC=offset))))
        assert (built.ContentDate, built.ContentTime, built.InstanceCreationTime) == ("20260301", time, time)


def test_every_finding_has_a_code_of_its_own() -> None:
    codes = [finding_code(finding) for finding in FINDINGS]
    assert len({code.value for code in codes}) == 14
    private = [f for f, code in zip(FINDINGS, codes, strict=True) if code.scheme_designator == PRIVATE_SCHEME]
    assert private == ["Pleural_Thickening", "Hernia"]
    # PS3.3 section 8: a Short String and a Long String.
    assert all(
        len(code.value) <= 16 and len(code.meaning) <= 64 for code in [*codes, finding_code("Lung Opacity (any)")]
    )


@pytest.mark.parametrize("name", ["", "x" * 65, "a\\b", "bell\a", "\N{LATIN SMALL LETTER U WITH DIAERESIS}"])
def test_a_finding_that_no_code_can_mean_is_refused(name: str) -> None:
    with pytest.raises(DicomError, match="can't be a code's meaning"):
        finding_code(name)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(probabilities=st.lists(st.floats(0.0, 1.0, width=32), min_size=14, max_size=14))
def test_probabilities_come_back_exactly(result: Result, probabilities: list[float]) -> None:
    drawn = dict(zip(FINDINGS, probabilities, strict=True))
    points = result.manifest.operating_points
    prediction = Prediction(drawn, {finding: drawn[finding] >= point for finding, point in points.items()}, {})
    written = reread(build_structured_report(dataclasses.replace(result, prediction=prediction)))
    assert read_probabilities(written) == drawn
    for item in everything(written):
        if item.ValueType == "NUM" and named(item) == "Probability":
            measured = item.MeasuredValueSequence[0]
            # A receiver that reads the decimal string alone still gets the model's float32.
            assert np.float32(float(measured.NumericValue)) == np.float32(measured.FloatingPointValue)


def test_what_is_no_such_report_is_not_read(report: Dataset) -> None:
    with pytest.raises(DicomError, match="no report"):
        read_probabilities(Dataset())
    report = reread(report)
    del report.ContentSequence[-1:]
    del report.ContentSequence[-1].ContentSequence[3].ContentSequence[0]
    with pytest.raises(DicomError, match="no report"):
        read_probabilities(report)


def test_made_again_it_is_the_same_object(result: Result, result_for: ResultFor, header_of: HeaderOf) -> None:
    assert encode(build_structured_report(result)) == encode(build_structured_report(result))
    first = build_structured_report(result)
    later = build_structured_report(dataclasses.replace(result, made_at=result.made_at + timedelta(days=1)))
    for other, is_same in (
        (later, True),
        (build_structured_report(dataclasses.replace(result, bundle_id="e" * 64)), False),
        (build_structured_report(result_for(header_of(SOPInstanceUID=b"1.2.3.4.6"))), False),
    ):
        assert (other.SOPInstanceUID == first.SOPInstanceUID) is is_same
        assert (other.SeriesInstanceUID == first.SeriesInstanceUID) is is_same
    assert first.SOPInstanceUID.startswith("2.25.")
    assert first.SOPInstanceUID.is_valid


def test_a_uid_is_pinned(result: Result) -> None:
    # A change here makes every archive keep the results of one image twice: raise LAYOUT and say so in the changelog.
    assert result.uid("structured report") == "2.25.219061628055415768849389035424275624039"


def test_what_contradicts_itself_is_refused(result: Result, prediction: Prediction, manifest: Manifest) -> None:
    for value in (math.nan, math.inf, -0.1, 1.1):
        wrong = Prediction({**prediction.probabilities, "Mass": value}, prediction.present, prediction.maps)
        with pytest.raises(DicomError, match="probability of Mass"):
            dataclasses.replace(result, prediction=wrong)
    with pytest.raises(DicomError, match="findings are not the manifest's"):
        dataclasses.replace(result, prediction=Prediction({"Mass": 0.5}, {}, {}))
    swapped = Prediction(prediction.probabilities, {**prediction.present, "Atelectasis": True}, prediction.maps)
    with pytest.raises(DicomError, match="operating points"):
        dataclasses.replace(result, prediction=swapped)
    with pytest.raises(DicomError, match="time zone"):
        dataclasses.replace(result, made_at=datetime(2026, 3, 1))
    with pytest.raises(DicomError, match="serial_number"):
        Device("")


def test_no_log_and_no_warning_names_the_patient(result: Result, caplog: pytest.LogCaptureFixture) -> None:
    # highdicom alone warns of a name without a caret, with the name; a warning is an error here.
    caplog.set_level(logging.DEBUG)
    result.source.patient_study.PatientName = "CANARY"
    build_structured_report(result)
    assert "canary" not in (caplog.text + repr(result)).lower()
    result.source.patient_study.PatientName = "Canary^Patient"


def test_dciodvfy_finds_nothing(tmp_path: Path, result: Result, dciodvfy: Judge) -> None:
    path = tmp_path / "report.dcm"
    path.write_bytes(encode(build_structured_report(result)))
    assert dciodvfy([path])[path] == []


def test_the_judge_sees_a_fault(tmp_path: Path, result: Result, dciodvfy: Judge) -> None:
    built = build_structured_report(result)
    del built.StudyID
    path = tmp_path / "report.dcm"
    path.write_bytes(encode(built))
    assert any("StudyID" in complaint for complaint in dciodvfy([path])[path])


def test_dciodvfy_finds_nothing_on_real_sources(
    tmp_path: Path, real_headers: list[Path], result_for: ResultFor, dciodvfy: Judge
) -> None:
    for source in real_headers:
        built = build_structured_report(result_for(pydicom.dcmread(source, stop_before_pixels=True)))
        (tmp_path / source.name).write_bytes(encode(built))
    assert set(map(str, dciodvfy(list(tmp_path.iterdir())).values())) == {"[]"}


@pytest.mark.slow
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_dciodvfy_finds_nothing_on_malformed_sources(
    tmp_path: Path,
    header_of: HeaderOf,
    malformed: st.SearchStrategy[dict[str, bytes | None]],
    result_for: ResultFor,
    dciodvfy: Judge,
    data: st.DataObject,
) -> None:
    path = tmp_path / "report.dcm"
    path.write_bytes(encode(build_structured_report(result_for(header_of(**data.draw(malformed))))))
    assert dciodvfy([path])[path] == []


def test_dcmtk_reads_it(tmp_path: Path, result: Result, dcmtk: Callable[..., str]) -> None:
    path = tmp_path / "report.dcm"
    path.write_bytes(encode(build_structured_report(result)))
    tree = dcmtk("dsrdump", path)
    assert tree.count('"Probability")=') == 14
    assert '"Pneumonia")=(52101004,SCT,"Present")' in tree
    assert "Comprehensive3DSRStorage" in dcmtk("dcmdump", path)
