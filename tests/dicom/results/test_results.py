"""All of one image's files, or none."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from chexnet_deploy.dicom.results.files import write_results
from chexnet_deploy.dicom.results.result import Result
from chexnet_deploy.dicom.results.structured_report import read_probabilities
from chexnet_deploy.errors import DicomError


@pytest.fixture(scope="module")
def result(result_for: Callable[[Dataset], Result], header_of: Callable[..., Dataset]) -> Result:
    return result_for(header_of())


def test_report_and_maps_are_written(tmp_path: Path, result: Result, gray: np.ndarray) -> None:
    files = write_results(tmp_path / "out", result, gray, ["Mass", "Pleural_Thickening", "Mass"])
    assert [file.name for file in files] == ["report.dcm", "map-05-Mass.dcm", "map-13-Pleural_Thickening.dcm"]
    assert {file.name for file in (tmp_path / "out").iterdir()} == {file.name for file in files}
    read = [pydicom.dcmread(file) for file in files]
    assert read_probabilities(read[0]) == result.prediction.probabilities
    assert len({dataset.SOPInstanceUID for dataset in read}) == 3
    assert {dataset.StudyInstanceUID for dataset in read} == {"1.2.3"}


def test_nothing_is_written_where_one_can_t_be_made(tmp_path: Path, result: Result, gray: np.ndarray) -> None:
    with pytest.raises(DicomError, match="no activation map"):
        write_results(tmp_path / "out", result, gray, ["Mass", "Fracture"])
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path: Path, result: Result, gray: np.ndarray) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(DicomError, match="exists already"):
        write_results(tmp_path / "out", result, gray, [])
    (tmp_path / "file").touch()
    with pytest.raises(DicomError, match="can't be written"):
        write_results(tmp_path / "file" / "out", result, gray, [])


def test_without_highdicom_the_extra_is_named() -> None:
    code = """
import sys
sys.modules["highdicom"] = None
from chexnet_deploy.dicom.results.files import build_files
from chexnet_deploy.errors import MissingPackageError
try:
    build_files(None, None, [])
except MissingPackageError as err:
    print(err)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "pip install 'chexnet-deploy[dicom-out]'" in done.stdout, done.stderr
