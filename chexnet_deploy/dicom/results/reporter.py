"""A DICOM radiograph -> its DICOM results, for the node's worker and `predict --dicom-out`."""

from dataclasses import dataclass
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Final

from pydicom import dcmread

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.dicom.results.files import build_files
from chexnet_deploy.dicom.results.identity import ImageIdentity, header_sha256
from chexnet_deploy.dicom.results.result import Device, Refusal, Result, encode
from chexnet_deploy.dicom.results.source_header import read_source_image
from chexnet_deploy.errors import DicomError, ImageError, ImageRefusedError, OnStage, RefusalReason
from chexnet_deploy.images.dicom.elements import read_structure
from chexnet_deploy.images.dicom.header import TRANSFER_SYNTAXES
from chexnet_deploy.images.gray import read_image_file
from chexnet_deploy.runtime.predictor import Prediction, Predictor

_MAX_WORDS: Final = 400  # of why an image was refused


@dataclass(frozen=True, slots=True)
class Report:
    """Results of one radiograph.

    Attributes:
        source_uid: the radiograph's SOP Instance UID.
        prediction: its findings.
        files: DICOM files by name, see build_files; the report first, then a picture of each finding that is present, the most
            probable first.
        image: which image it is about.
    """

    source_uid: str
    prediction: Prediction
    files: dict[str, bytes]
    image: ImageIdentity


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

    def report(self, path: Path, made_at: datetime, on_stage: OnStage | None = None) -> Report:
        """Return the findings in a DICOM file and the objects that say so.

        Args:
            path: the file.
            made_at: the time that the objects state, with a zone; the same time gives the same bytes.
            on_stage: called as "header", "decode", "resize" and "model" end; the rest is the objects.

        Raises:
            ImageRefusedError: the file can't be used, is out of the model's scope, or its results could not be filed.
            ImageError: there is no such file.
            MissingPackageError: highdicom is not installed.
        """
        image = self._predictor.loader.read_dicom(path, on_stage)
        if on_stage is not None:
            on_stage("decode")
        # First, so that a picture is refused for the same reason here as by whoever makes no results of it.
        prediction = self._predictor.predict(image.gray, on_stage)
        # Of the header as it was sent: read_dataset's says how the picture lies that was made of it.
        identity = ImageIdentity(header_sha256(dcmread(BytesIO(image.header.raw))), image.pixels_sha256)
        try:
            source = read_source_image(image.header.read_dataset())
        except DicomError as err:
            raise ImageRefusedError(RefusalReason.SOURCE_HEADER, f"{path}: {err}") from err
        manifest, points = self._bundle.manifest, self._predictor.points
        result = Result(source, identity, self._bundle.id, self._device, made_at, prediction, manifest, points)
        present = [finding for finding, is_present in prediction.present.items() if is_present]
        present.sort(key=lambda finding: -prediction.probabilities[finding])
        files = build_files(result, image.gray, present[: self._max_pictures])
        return Report(source.sop_instance_uid, prediction, files, identity)

    def refuse(self, path: Path, made_at: datetime, reason: str, words: str) -> tuple[ImageIdentity, bytes | None]:
        """Return which image was refused, as far as its header says, and the object that says so in its study.

        Args:
            path: the file.
            made_at: as in `report`.
            reason: a code.
            words: what was found and what was needed.

        Returns:
            identity: without the pixels' hash, as they may be what is wrong.
            document: a DICOM file (PS3.10); None where no header can be trusted, or names no study to file it in.
        """
        try:
            content = read_image_file(path)
            structure = read_structure(path, content, TRANSFER_SYNTAXES)
        except ImageError:
            return ImageIdentity(), None
        header = dcmread(BytesIO(structure.header))
        identity = ImageIdentity(header_sha256(header))
        try:
            source = read_source_image(header)
        except DicomError:
            return identity, None
        words = words.encode("ascii", "replace").decode()  # as the font and every viewer have it
        words = words[:1].upper() + words[1:_MAX_WORDS]
        from chexnet_deploy.dicom.results.secondary_capture import build_refusal

        refusal = Refusal(source, identity, self._bundle.id, self._device, made_at, reason, words)
        return identity, encode(build_refusal(refusal))
