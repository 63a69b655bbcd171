"""Objects of every kind that is sent, before judges that others wrote: dicom3tools' dciodvfy and PixelMed's DicomSRValidator."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from highdicom.sr import CodedConcept
from pydicom.dataset import Dataset

from chexnet_deploy.bundle.site import OperatingPoints
from chexnet_deploy.dicom.results.files import REPORT, build_files
from chexnet_deploy.dicom.results.result import Refusal, Result, encode
from chexnet_deploy.dicom.results.secondary_capture import build_refusal
from chexnet_deploy.dicom.results.structured_report import build_structured_report
from chexnet_deploy.runtime.predictor import Prediction
from tests.dicom.results.conftest import Judge
from tests.dicom.results.test_structured_report import named

HeaderOf = Callable[..., Dataset]
ResultFor = Callable[[Dataset], Result]

# What the source's header says beyond, or instead of, the least that a valid one does.
HEADERS: dict[str, dict[str, bytes | None]] = {
    "plain": {},
    "sex and age unknown": {"PatientSex": b"", "PatientBirthDate": None, "PatientAge": None},
    "no identifiers": dict.fromkeys(
        ("PatientID", "PatientName", "PatientBirthDate", "StudyID", "AccessionNumber", "ReferringPhysicianName")
    ),
    "no times": {"StudyDate": None, "StudyTime": b""},
    "a name without a caret": {"PatientName": b"CANARY"},
    "Latin-1": {"SpecificCharacterSet": b"ISO_IR 100", "PatientName": b"M\xfcller^J\xf6rg"},
    "Japanese": {
        "SpecificCharacterSet": b"\\ISO 2022 IR 87",
        "PatientName": b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B",
    },
    "Chinese": {"SpecificCharacterSet": b"GB18030", "PatientName": "\u738b^\u5c0f\u6771".encode("gb18030")},
    "Cyrillic": {"SpecificCharacterSet": b"ISO_IR 192", "PatientName": "\u0418\u0432\u0430\u043d^\u0418".encode()},
    "long texts": {
        "StudyDescription": b"x" * 64,
        "PatientID": b"9" * 64,
        "AccessionNumber": b"8" * 16,
        "PatientComments": b"long " * 2000,
        "AdditionalPatientHistory": b"y" * 11000,
        "StudyInstanceUID": b"1." + b"2" * 62,
    },
    "everything said": {
        "SOPClassUID": b"1.2.840.10008.5.1.4.1.1.1.1",
        "PatientAge": b"45Y",
        "PatientWeight": b"70.5",
        "PatientIdentityRemoved": b"YES",
        "TimezoneOffsetFromUTC": b"-0430",
        "Allergies": b"a\\b",
        "BodyPartExamined": b"CHEST",
        "PatientOrientation": b"L\\F",
        "LossyImageCompression": b"01",
    },
    "a captured picture": {"SOPClassUID": b"1.2.840.10008.5.1.4.1.1.7"},
    "malformed": {
        "SpecificCharacterSet": b"utf8",
        "PatientSex": b"male",
        "StudyDate": b"1997.08.15",
        "StudyTime": b"10:15",
        "PatientAge": b"old",
        "PatientID": b"\x80\x81",
        "AccessionNumber": b"9" * 17,
    },
}


@pytest.fixture(scope="module")
def results(result_for: ResultFor, header_of: HeaderOf) -> dict[str, Result]:
    """By kind; the ordinary prediction has findings of each decision."""
    made = {kind: result_for(header_of(**header)) for kind, header in HEADERS.items()}
    plain = made["plain"]
    probabilities = plain.prediction.probabilities
    made["none present"] = answered(plain, dict.fromkeys(probabilities, 0.0))
    made["all present"] = answered(plain, dict.fromkeys(probabilities, 1.0))
    made["no operating points"] = answered(plain, probabilities, operating_points={})
    at_site = OperatingPoints(
        {"Mass": 0.9}, {"Mass": 0.1, "Edema": 0.5}, "site aaaaaaaaaaaa: PPV at least 0.9", "a" * 64
    )
    decided = Prediction(probabilities, at_site.decide(probabilities), {})
    made["two operating points"] = dataclasses.replace(plain, prediction=decided, points=at_site)
    other = {"Fracture": 0.5, "Lung Opacity (any)": 0.5}
    made["another model"] = answered(plain, other, findings=tuple(other), operating_points={"Fracture": 0.5})
    return made


def answered(plain: Result, probabilities: dict[str, float], **of_model: object) -> Result:
    manifest = plain.manifest.model_copy(update=of_model)
    points = OperatingPoints.of(manifest, None)
    prediction = Prediction(probabilities, points.decide(probabilities), {})
    return dataclasses.replace(plain, manifest=manifest, prediction=prediction, points=points)


@pytest.fixture(scope="module")
def sent(
    results: dict[str, Result], gray: np.ndarray, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Path]]:
    """The files of each kind, the report first, a refusal last; the ordinary predictions have maps and so a picture."""
    root, paths = tmp_path_factory.mktemp("sent"), {}
    for kind, result in results.items():
        files = build_files(result, gray, ["Mass"] if result.prediction.maps else [])
        refusal = Refusal(
            result.source, result.image, result.bundle_id, result.device, result.made_at, "view", "A lateral."
        )
        files["refusal.dcm"] = encode(build_refusal(refusal))
        paths[kind] = [root / f"{kind} {name}" for name in files]
        for path, content in zip(paths[kind], files.values(), strict=True):
            path.write_bytes(content)
    return paths


def test_dciodvfy_finds_nothing(sent: dict[str, list[Path]], dciodvfy: Judge) -> None:
    complaints = dciodvfy([path for paths in sent.values() for path in paths])
    assert {path: said for path, said in complaints.items() if said} == {}
    assert len(complaints) == 3 * len(HEADERS) + 2 * 5


@pytest.mark.slow
def test_pixelmed_finds_nothing_but_a_fault(
    sent: dict[str, list[Path]], results: dict[str, Result], pixelmed: Judge, tmp_path: Path
) -> None:
    faulty = build_structured_report(results["another model"])
    (procedure,) = [item for item in faulty.ContentSequence if named(item) == "Procedure reported"]
    procedure.ConceptCodeSequence = [CodedConcept("413815006", "SCT", "Chest imaging")]  # which CID 100 has not
    path = tmp_path / REPORT
    path.write_bytes(encode(faulty))
    complaints = pixelmed([path, *(paths[0] for paths in sent.values())])
    (fault,) = complaints.pop(path)
    assert fault.startswith("Error")
    assert "not found in context group 100" in fault
    assert {path: said for path, said in complaints.items() if said} == {}
    assert len(complaints) == len(HEADERS) + 5
