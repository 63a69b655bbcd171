"""`predict --dicom-out`: a folder of reports and pictures of many DICOM files."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.errors import ImageError, RefusalReason, require
from chexnet_deploy.files import new_folder
from chexnet_deploy.images.listing import ImageFiles
from chexnet_deploy.runtime.loading import BUSY_ATTEMPTS
from chexnet_deploy.runtime.predict_files import _refuse_lone
from chexnet_deploy.runtime.predictor import Prediction, Predictor
from chexnet_deploy.runtime.sessions.base import Provider


def report_images(
    bundle: Bundle, images: ImageFiles, folder: Path, serial_number: str, *, threads: int | None, provider: Provider
) -> Iterator[tuple[str, Prediction | ImageError]]:
    """Yield (name, findings) for each DICOM file in order, or the ImageError that says why there are none.

    Writes a new folder with a folder for each, named by its SOP Instance UID: the structured report, and a Secondary Capture of
    each finding that is present.

    Raises:
        ChexnetError: the session failed, the one file that was given can't be read, a package is missing, or the folder is
            there already.
    """
    with require("dicom-out"):
        from chexnet_deploy.dicom.results.reporter import Reporter
        from chexnet_deploy.dicom.results.result import Device
    device = Device(serial_number, model_name="chexnet-deploy predict")
    with ExitStack() as stack:
        partial = stack.enter_context(new_folder(folder))
        predictor = stack.enter_context(Predictor.of(bundle, threads=threads, provider=provider))
        reporter = Reporter(bundle, predictor, device, max_pictures=len(bundle.manifest.findings))
        for name, path in zip(images.names, images.paths(), strict=True):
            answer: Prediction | ImageError
            for _ in range(BUSY_ATTEMPTS):
                try:
                    report = reporter.report(path, datetime.now().astimezone())
                    _write_report(partial / report.source_uid, report.files)
                    answer = report.prediction
                except ImageError as err:
                    answer = err
                    if err.reason is RefusalReason.BUSY:
                        continue
                break
            _refuse_lone(images, answer)
            yield name, answer


def _write_report(folder: Path, files: Mapping[str, bytes]) -> None:
    if folder.exists():
        raise ImageError(
            f"{folder.name}: found a second file with this SOP Instance UID; needed each image once. Next: name one of them."
        )
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
