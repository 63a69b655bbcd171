"""What answers in a node: a radiograph's DICOM file in, its structured report and pictures out.

Joins the rooms that read DICOM, predict and write DICOM; decides nothing itself. Runs in the node's worker process:

    python -m chexnet_deploy.node.join CONFIG
"""

import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Final

from chexnet_deploy import __version__
from chexnet_deploy.bundle import Bundle
from chexnet_deploy.dicom.decoder import Decoder
from chexnet_deploy.dicom.patient_study import read_source_image
from chexnet_deploy.dicom.result import Device, Result
from chexnet_deploy.dicom.results import build_files
from chexnet_deploy.errors import DicomError, ImageError
from chexnet_deploy.node.config import NodeConfig, read_config
from chexnet_deploy.node.work import Answer
from chexnet_deploy.node.worker import serve
from chexnet_deploy.predictor import Predictor
from chexnet_deploy.scope import ScopePolicy
from chexnet_deploy.sessions import N_STARTUP_PROBES, check_known_answers, open_session

SOURCE_HEADER: Final = "source-header"
"""The reason where the picture is good, but a result could not be filed under its study or patient."""


class RadiographWork:
    """The model with its decoder, loaded and proven; a node's Work.

    Args:
        config: the node's.

    Attributes:
        versions: what an audit line names.

    Raises:
        BundleError, SessionError, MissingPackageError: as Predictor.open.
    """

    def __init__(self, config: NodeConfig) -> None:
        model = config.model
        self._bundle = Bundle.open(model.bundle)
        self._session = open_session(self._bundle, threads=model.threads, provider=model.provider)
        self._manifest = self._bundle.manifest
        self._predictor = Predictor(self._session, self._manifest)
        self._scope = self._manifest.scope or ScopePolicy()
        self._device = Device(**config.device.model_dump())
        self._max_pictures = config.results.max_pictures
        self._decoder = Decoder()
        self._decoder.warm_up()
        _open_rooms()
        self.versions: Mapping[str, str] = {
            "bundle": self._bundle.id,
            "precision": self._manifest.precision.value,
            "chexnet-deploy": __version__,
        }

    def self_test(self) -> None:
        """Answer the probes again.

        Raises:
            SessionError: otherwise than when the bundle was made.
        """
        check_known_answers(self._session, self._bundle, n_probes=N_STARTUP_PROBES)

    def answer(self, path: Path) -> Answer:
        """Return a report, and pictures of findings that are present; see Work."""
        try:
            image = self._decoder.decode(path, scope=self._scope)
        except ImageError as err:
            return Answer(refusal=err.reason.value)
        try:
            source = read_source_image(image.header.read_dataset())
        except DicomError:
            return Answer(refusal=SOURCE_HEADER)
        prediction = self._predictor.predict(image.gray)
        # The time of arrival, not of this moment: an image that is answered again after a kill gives the same bytes.
        made_at = datetime.fromtimestamp(path.stat().st_mtime).astimezone()
        result = Result(source, prediction, self._manifest, self._bundle.id, self._device, made_at)
        present = [finding for finding, is_present in prediction.present.items() if is_present]
        present.sort(key=lambda finding: -prediction.probabilities[finding])
        return Answer(tuple(build_files(result, image.gray, present[: self._max_pictures]).values()))

    def close(self) -> None:
        """Free the model and end the decoding process."""
        self._decoder.close()
        self._predictor.close()


def _open_rooms() -> None:
    """Import now what the first report would need, so that the first image doesn't wait for it."""
    from chexnet_deploy.dicom import secondary_capture, structured_report  # noqa: F401


if __name__ == "__main__":
    serve(lambda: RadiographWork(read_config(Path(sys.argv[1]))))
