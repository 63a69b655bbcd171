"""The node's worker process: a radiograph's DICOM file -> its structured report and pictures.

Connects Predictor and Reporter to the worker's protocol; decides nothing itself:

    python -m chexnet_deploy.dicom.node.radiograph_worker CONFIG
"""

import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from chexnet_deploy import __version__
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.signing.trust import read_trust
from chexnet_deploy.dicom.node.config import NodeConfig, read_config
from chexnet_deploy.dicom.node.worker import Answer, serve
from chexnet_deploy.dicom.results.reporter import Reporter
from chexnet_deploy.dicom.results.result import Device
from chexnet_deploy.errors import ImageError
from chexnet_deploy.runtime.predictor import Predictor
from chexnet_deploy.runtime.streaming import Flow


class RadiographWork:
    """A node's Work: the loaded model with its decoder.

    Args:
        config: the node's.

    Attributes:
        versions: what an audit line names.

    Raises:
        BundleError, TrustError, SessionError, MissingPackageError: as Predictor.open.
    """

    def __init__(self, config: NodeConfig) -> None:
        model = config.model
        self._bundle = Bundle.open(model.bundle, trust=read_trust(model.trust))
        # One image at a time, so one decoding process.
        self._predictor = Predictor.of(self._bundle, threads=model.threads, provider=model.provider, flow=Flow())
        device, max_pictures = Device(**config.device.model_dump()), config.results.max_pictures
        self._explains = config.results.explain_refusals
        self._reporter = Reporter(self._bundle, self._predictor, device, max_pictures=max_pictures)
        self._reporter.warm_up()
        self.versions: Mapping[str, str] = {
            "bundle": self._bundle.id,
            "precision": self._bundle.manifest.precision.value,
            "chexnet-deploy": __version__,
            **({} if self._predictor.points.site is None else {"site": self._predictor.points.site}),
        }

    def self_test(self) -> None:
        """Check the known answers again; see Predictor.self_test."""
        self._predictor.self_test()

    def answer(self, path: Path) -> Answer:
        """Return a report and pictures of findings that are present, or why there are none; see Work."""
        try:
            report = self._reporter.report(path, _arrived_at(path))
        except ImageError as err:
            return self._refuse(path, err.reason.value, str(err).removeprefix(f"{path}: "))
        return Answer(tuple(report.files.values()), "", *report.image)

    def explain(self, path: Path, reason: str) -> Answer:
        """Return why an image that a worker was lost over has no result; see Work."""
        return self._refuse(path, reason, "The program failed on this image twice.")

    def _refuse(self, path: Path, reason: str, words: str) -> Answer:
        image, document = self._reporter.refuse(path, _arrived_at(path), reason, words)
        return Answer((document,) if document is not None and self._explains else (), reason, *image)

    def close(self) -> None:
        """Free the model and end the decoding process."""
        self._predictor.close()


def _arrived_at(path: Path) -> datetime:
    # Not this moment: an image that is answered again after a kill gives the same bytes.
    return datetime.fromtimestamp(path.stat().st_mtime).astimezone()


if __name__ == "__main__":
    serve(lambda: RadiographWork(read_config(Path(sys.argv[1]))))
