"""Headers, results and judges for DICOM out."""

import os
import re
import shutil
import struct
import subprocess
import warnings
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta, timezone
from io import BytesIO
from pathlib import Path
from typing import Final, NoReturn, TypeAlias

import numpy as np
import pytest
from hypothesis import strategies as st
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset

from chexnet_deploy.bundle.manifest import ONNX_MODEL, PROBE, Manifest, Precision
from chexnet_deploy.bundle.site import OperatingPoints
from chexnet_deploy.datasets.findings import FINDINGS
from chexnet_deploy.dicom.results.attributes import PATIENT_STUDY, PICTURE
from chexnet_deploy.dicom.results.identity import ImageIdentity
from chexnet_deploy.dicom.results.result import Device, Result
from chexnet_deploy.dicom.results.source_header import read_source_image
from chexnet_deploy.images.preprocessing import Preprocessing
from chexnet_deploy.runtime.predictor import Prediction

# Values of the wrong kind for most attributes; each is right for some.
SEEN: Final = (
    *(
        b"",
        b" ",
        b"\0\0",
        b"19970815",
        b"1997.08.15",
        b"20231301",
        b"00000000",
        b"10:15:00",
        b"101500.1234567",
        b"2460",
    ),
    *(b"m", b"Male", b"M", b"45Y", b"045Y", b"45", b"YES", b"yes", b"X" * 16, b"X" * 17, b"X" * 65, b"X" * 11000),
    *(b"a\\b", b"L\\F", b"\xfc\xe4", b"a\nb\x07", b"\x1b[31m", b"a^b^c^d^e^f", b"a=b=c=d", b"=", b"^^^^", b"01", b"00"),
    *(b"1.5", b"1,5", b"1e5", b"+0100", b"-0000", b"TEXT", b"\x85\x99", b" lead", b"~", b"1.2.3", b"01.02"),
    *(
        name.encode("utf-8")
        for name in ("M\u00fcller^J\u00f6rg", "\u5c71\u7530^\u592a\u90ce", "\u5c71" * 40, "\u5c71" * 65)
    ),
    *(b"M\xfcller^J\xf6rg", b"\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B"),
)
CHARACTER_SETS: Final = (
    *(None, b"ISO_IR 100", b"ISO_IR 192", b"ISO IR 100", b"ISO_IR 999", b"utf8", b"\\ISO 2022 IR 87", b"ISO_IR 144"),
    *(b"GB18030", b"ISO_IR 13", b"ISO 2022 IR 6\\ISO 2022 IR 87"),
)

CHECKOUT = Path(__file__).parents[3]
Judge: TypeAlias = Callable[[list[Path]], dict[Path, list[str]]]
MADE_AT = datetime(2026, 3, 1, 12, 30, 15, 250000, tzinfo=timezone(timedelta(hours=1)))

# What any archive would take: the least that a valid chest radiograph says of patient and study.
SOUND: Mapping[str, bytes] = {
    "SOPClassUID": b"1.2.840.10008.5.1.4.1.1.1",
    "SOPInstanceUID": b"1.2.3.4.5",
    "SeriesInstanceUID": b"1.2.3.4",
    "StudyInstanceUID": b"1.2.3",
    "PatientName": b"Canary^Patient",
    "PatientID": b"CANARY-4711",
    "PatientBirthDate": b"19400305",
    "PatientSex": b"F",
    "StudyDate": b"20240102",
    "StudyTime": b"101500",
    "StudyID": b"S1",
    "AccessionNumber": b"A1",
    "ReferringPhysicianName": b"Canary^Doctor",
}


def read_header(values: Mapping[str, bytes]) -> Dataset:
    """Return a header as pydicom reads it from a file that holds these bytes and no others, whatever they are."""
    elements = sorted((int(tag_for_keyword(keyword) or 0), value) for keyword, value in values.items())
    written = b"".join(
        struct.pack("<HHL", tag >> 16, tag & 0xFFFF, len(value) + len(value) % 2) + value + b" " * (len(value) % 2)
        for tag, value in elements
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's own, of unknown character sets; what comes after must be silent
        return read_dataset(BytesIO(written), is_implicit_VR=True, is_little_endian=True)


@pytest.fixture(scope="session")
def header_of() -> Callable[..., Dataset]:
    """Make the sound header with some values replaced, and without those that are None."""

    def make(**values: bytes | None) -> Dataset:
        merged = {**SOUND, **values}
        return read_header({keyword: value for keyword, value in merged.items() if value is not None})

    return make


@pytest.fixture(scope="session")
def malformed() -> st.SearchStrategy[dict[str, bytes | None]]:
    """Draw what real headers and hostile ones put where patient and study should be; for `header_of`."""
    values = st.one_of(st.none(), st.sampled_from(SEEN), st.binary(max_size=80))
    keywords = st.sampled_from([attribute.keyword for attribute in PATIENT_STUDY + PICTURE])
    sets = st.sampled_from(CHARACTER_SETS)
    return st.builds(
        lambda drawn, character_set: {**drawn, "SpecificCharacterSet": character_set},
        st.dictionaries(keywords, values, min_size=3, max_size=30),
        sets,
    )


@pytest.fixture(scope="session")
def manifest() -> Manifest:
    """Of a plausible fp32 bundle; Hernia has no operating point."""
    return Manifest(
        precision=Precision.FP32,
        findings=FINDINGS,
        preprocessing=Preprocessing(),
        head_bias=(0.0,) * 14,
        operating_points={finding: 0.3 for finding in FINDINGS if finding != "Hernia"},
        files={ONNX_MODEL: "a" * 64, PROBE: "b" * 64},
        checkpoint_sha256="c" * 64,
        probe_max_abs_logit_error=0.0,
        tools={},
    )


@pytest.fixture(scope="session")
def prediction(manifest: Manifest) -> Prediction:
    """Float32 probabilities from 0.05 to 0.95; the map of each finding is hot in its upper left cell."""
    probabilities = dict(zip(FINDINGS, np.linspace(0.05, 0.95, 14, dtype=np.float32).tolist(), strict=True))
    cam = np.full((7, 7), -1.0, np.float32)
    cam[0, 0] = 3.0
    present = {finding: probabilities[finding] >= point for finding, point in manifest.operating_points.items()}
    return Prediction(probabilities, present, dict.fromkeys(FINDINGS, cam))


@pytest.fixture(scope="session")
def result_for(manifest: Manifest, prediction: Prediction) -> Callable[[Dataset], Result]:
    """Make a result about the image with this header."""

    def make(header: Dataset) -> Result:
        image = ImageIdentity("e" * 64, "f" * 64)
        points = OperatingPoints.of(manifest, None)
        return Result(read_source_image(header), image, "d" * 64, Device("SN-1"), MADE_AT, prediction, manifest, points)

    return make


@pytest.fixture(scope="session")
def gray() -> np.ndarray:
    return (np.add.outer(np.arange(120), np.arange(90)) % 256).astype(np.uint8)


@pytest.fixture(scope="session")
def real_headers() -> list[Path]:
    """Real DICOM files: CHEXNET_DICOM, or shared/dicom beside the checkout."""
    root = Path(os.environ.get("CHEXNET_DICOM", CHECKOUT.parent / "shared" / "dicom"))
    files = sorted(root.glob("*.dcm"))
    if not files:
        pytest.skip("NOT RUN on real DICOM files: set CHEXNET_DICOM to a folder of them")
    return files


def _tool(name: str, package: str) -> str:
    path = shutil.which(name)
    if path is None:
        _not_run(f"no {name}; on Debian: apt-get install {package}")
    return path


def _not_run(why: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(f"NOT RUN: {why}")
    pytest.skip(f"NOT RUN: {why}")


@pytest.fixture(scope="session")
def dciodvfy() -> Judge:
    """Judge files by dicom3tools' dciodvfy: what it says of each that is an error, and what it warns of that we answer for."""
    tool = _tool("dciodvfy", "dicom3tools")

    def judge(files: list[Path]) -> dict[Path, list[str]]:
        complaints = {}
        for file in files:
            done = subprocess.run([tool, str(file)], capture_output=True, timeout=60)
            said = (done.stdout + done.stderr).decode("utf-8", "replace").splitlines()
            assert {"SCImage", "Comprehensive3DSR"} & set(said), said  # it knew what it was looking at
            kept = [line for line in said if line.startswith(("Error", "Warning")) and not _is_answered_for(line)]
            complaints[file] = [] if kept == [INVALID_VALUES] else kept
        return complaints

    return judge


INVALID_VALUES = "Error - Dicom dataset contains invalid data values for Value Representations"  # beside each such line


def _is_answered_for(line: str) -> bool:
    """Whether PS3 allows what dciodvfy complains of."""
    # It counts bytes where PS3.5 table 6.2-1 limits characters.
    if length := re.search(r"<(.*)> - Length invalid for this VR = \d+, expected <= (\d+)$", line):
        return len(length[1]) <= int(length[2]) and not length[1].isascii()
    return line.startswith("Warning") and any(
        known in line
        for known in (
            "<99CHEXNET>",  # of every private scheme
            "Retired Person Name form",  # of names without a caret, which PS3.5 section 6.2.1 allows
            "needed to build DICOMDIR",  # of empty type 2 attributes
            "only permitted to be empty when actually unknown",  # of Laterality, which then is unknown
            "<Body Part Examined>",  # of other defined terms than it knows; PS3.16 annex L can be extended
            "Value is zero",  # of weights and sizes carried over
        )
    )


PIXELMED = Path("/usr/share/java/pixelmed.jar")


@pytest.fixture(scope="session")
def pixelmed() -> Judge:
    """Judge structured reports by PixelMed's DicomSRValidator: errors, and warnings that we don't answer for."""
    java = str(Path(_tool("javac", "default-jdk-headless")).with_name("java"))  # a runtime alone runs no source file
    if not PIXELMED.exists():
        _not_run(f"no {PIXELMED}; on Debian: apt-get install libpixelmed-java")
    limits = [f"-Djdk.xml.xpath{limit}Limit=0" for limit in ("ExprOp", "ExprGrp", "TotalOp")]  # its rules exceed Java's

    def judge(files: list[Path]) -> dict[Path, list[str]]:
        program = Path(__file__).with_name("ValidateReports.java")
        command = [java, *limits, "-cp", str(PIXELMED), str(program), *map(str, files)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        said: dict[Path, list[str]] = {file: [] for file in files}
        for name, _, line in (line.partition("\t") for line in done.stdout.splitlines()):
            said[Path(name)].append(line)
        for lines in said.values():
            assert lines[:2] == ["Found Comprehensive3DSR IOD", "Found Root Template TID_1500 (MeasurementReport)"]
            assert "IOD validation complete" in lines
        is_complaint = ("Error", "Warning")
        return {
            file: [
                line for line in lines if line.startswith(is_complaint) and not _PIXELMED_ANSWERED_FOR.fullmatch(line)
            ]
            for file, lines in said.items()
        }

    return judge


_PIXELMED_ANSWERED_FOR = re.compile(
    r"Warning: .*"
    # Its rules for TID 1410, 1411 and 1501 are older than these templates' rows for qualitative evaluations.
    r'(CONTAINER \(125007,DCM,"Measurement Group"\)/CODE \(.*\)'
    # TID 1500 is extensible, and the disclaimer stands at its root.
    r'|/CONTAINER \(126000,DCM,"Imaging Measurement Report"\)/TEXT \(121106,DCM,"Comment"\))'
    r": Content Item not in template"
)


@pytest.fixture(scope="session")
def dcmtk() -> Callable[..., str]:
    """Run one of dcmtk's tools on a file and return what it prints; an error fails."""
    for name in ("dsrdump", "dcmdump"):
        _tool(name, "dcmtk")

    def run(name: str, *arguments: str | Path) -> str:
        done = subprocess.run([name, *map(str, arguments)], capture_output=True, timeout=60)
        output = (done.stdout + done.stderr).decode("utf-8", "replace")
        assert done.returncode == 0, output
        assert not [line for line in output.splitlines() if line.startswith(("E:", "W:", "F:"))], output
        return output

    return run
