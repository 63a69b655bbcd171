"""A DICOM radiograph -> its DICOM results, for the node's worker and `predict --dicom-out`."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.dicom.results.files import build_files
from chexnet_deploy.dicom.results.result import Device, Result
from chexnet_deploy.dicom.results.source_header import read_source_image
from chexnet_deploy.errors import DicomError, ImageRefusedError, RefusalReason
from chexnet_deploy.runtime.predictor import Prediction, Predictor


@dataclass(frozen=True, slots=True)
class Report:
    """Results of one radiograph.

    Attributes:
        source_uid: the radiograph's SOP Instance UID.
        prediction: its findings.
        files: DICOM files by name, see build_files; the report first, then a picture of each finding that is present, the most
            probable first.
    """

    source_uid: str
    prediction: Prediction
    files: dict[str, bytes]


class Reporter:
    """Reads DICOM radiographs and writes their reports, with one loaded model.

    Args:
        bundle: the predictor's.
        predictor: loaded and proven; stays its owner's.
        device: what results say of this machine.
        max_pictures: of findings that are present.
    """

    def __init__(self, bundle: Bundle, predictor: Predictor, device: Device, *, max_pictures: int) -> None:
        self._bundle = bundle
        self._predictor = predictor
        self._device = device
        self._max_pictures = max_pictures

    def warm_up(self) -> None:
        """Start the decoding process and do the lazy imports of the first report, so that no image waits for them."""
        self._predictor.loader.reader.decoder.warm_up()
        from chexnet_deploy.dicom.results import secondary_capture, structured_report  # noqa: F401 - loaded, not used

    def report(self, path: Path, made_at: datetime) -> Report:
        """Return the findings in a DICOM file and the objects that say so.

        Args:
            path: the file.
            made_at: the time that the objects state, with a zone; the same time gives the same bytes.

        Raises:
            ImageRefusedError: the file can't be used, is out of the model's scope, or its results could not be filed.
            ImageError: there is no such file.
            MissingPackageError: highdicom is not installed.
        """
        image = self._predictor.loader.read_dicom(path)
        # First, so that a picture is refused for the same reason here as by whoever makes no results of it.
        prediction = self._predictor.predict(image.gray)
        try:
            source = read_source_image(image.header.read_dataset())
        except DicomError as err:
            raise ImageRefusedError(RefusalReason.SOURCE_HEADER, f"{path}: {err}") from err
        result = Result(source, prediction, self._bundle.manifest, self._bundle.id, self._device, made_at)
        present = [finding for finding, is_present in prediction.present.items() if is_present]
        present.sort(key=lambda finding: -prediction.probabilities[finding])
        files = build_files(result, image.gray, present[: self._max_pictures])
        return Report(source.sop_instance_uid, prediction, files)
