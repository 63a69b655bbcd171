"""Write one image's results to a folder: the structured report, and a picture of each finding asked for.

The only module that imports highdicom, which takes half a second; see result.py for what a result holds.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from chexnet_deploy.dicom.results.result import Result, encode
from chexnet_deploy.errors import DicomError, MissingPackageError
from chexnet_deploy.files import write_directory
from chexnet_deploy.images.gray import Gray

REPORT = "report.dcm"


def build_files(result: Result, gray: Gray, findings: Sequence[str]) -> dict[str, bytes]:
    """Return DICOM files by name: report.dcm, and map-<n>-<finding>.dcm for each finding.

    The same arguments give the same bytes.

    Args:
        result: of one image.
        gray: its picture as it was predicted, uint8 [H, W].
        findings: of the manifest's, those to draw; may be none.

    Raises:
        DicomError: a finding has no map or its name can't be coded, or gray is no picture.
        MissingPackageError: highdicom is not installed.
    """
    try:
        from chexnet_deploy.dicom.results.secondary_capture import build_secondary_capture
        from chexnet_deploy.dicom.results.structured_report import build_structured_report
    except ModuleNotFoundError as err:
        if (err.name or "").split(".")[0] != "highdicom":
            raise
        raise MissingPackageError("highdicom is not installed. Run: pip install 'chexnet-deploy[dicom-out]'") from err
    files = {REPORT: encode(build_structured_report(result))}
    for finding in dict.fromkeys(findings):
        capture = encode(build_secondary_capture(result, gray, finding))
        number = result.manifest.findings.index(finding) + 1
        files[f"map-{number:02}-{re.sub(r'[^A-Za-z0-9]+', '_', finding)}.dcm"] = capture
    return files


def write_results(folder: Path, result: Result, gray: Gray, findings: Sequence[str]) -> list[Path]:
    """Write a new folder with all of build_files, or none of it, also after a crash or SIGKILL.

    Returns:
        The files, the report first.

    Raises:
        DicomError: something is at `folder` already, or it can't be written; or see build_files.
        MissingPackageError: highdicom is not installed.
    """
    files = build_files(result, gray, findings)
    try:
        write_directory(folder, files)
    except OSError as err:
        if isinstance(err, FileExistsError) and folder.exists():
            raise DicomError(
                f"{folder} exists already; needed a new place for the results. Name another folder."
            ) from err
        raise DicomError(f"{folder} can't be written: {err.strerror}. Check the disk and its rights.") from err
    return [folder / name for name in files]
