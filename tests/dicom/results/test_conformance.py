"""The conformance statement says what the code does."""

from collections.abc import Callable
from io import BytesIO

import numpy as np
from pydicom import Dataset, dcmread

from benchmarks.services.conformance import PAGE, RESULT_CLASSES, render
from chexnet_deploy.dicom.results.files import build_files
from chexnet_deploy.dicom.results.result import Result


def test_the_page_is_made_from_the_code_s_tables() -> None:
    page = PAGE.read_text()
    assert page == render(), "run python -m benchmarks.services.conformance"
    assert "| Computed Radiography Image Storage | 1.2.840.10008.5.1.4.1.1.1 | no | yes |" in page
    assert "| no-room | A700 |" in page
    assert "| Pneumonia | 233604007 | SCT | Pneumonia |" in page


def test_the_classes_sent_are_those_it_names(
    result_for: Callable[[Dataset], Result], header_of: Callable[..., Dataset], gray: np.ndarray
) -> None:
    built = [dcmread(BytesIO(content)) for content in build_files(result_for(header_of()), gray, ["Mass"]).values()]
    assert tuple(each.SOPClassUID for each in built) == RESULT_CLASSES
    assert {each.file_meta.TransferSyntaxUID.name for each in built} == {"Explicit VR Little Endian"}
