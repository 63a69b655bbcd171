"""What a DICOM object says of one image, a result or why there is none: source, model, device, time and identity.

UIDs are made from the source image, header and pixels, the bundle and the site file alone, so a result that is made again, after
a crash or a lost acknowledgement, is the same object, and an archive that has it keeps one; a corrected image has results of its
own.
`LAYOUT` goes into them too: raise it whenever the objects' contents change otherwise. Knows no highdicom; structured_report.py
and secondary_capture.py build the objects.
"""

import io
import math
import uuid
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Final

from pydicom.dataset import Dataset
from pydicom.filewriter import dcmwrite

from chexnet_deploy import __version__
from chexnet_deploy.bundle.manifest import Manifest
from chexnet_deploy.bundle.site import OperatingPoints
from chexnet_deploy.dicom.results.identity import ImageIdentity
from chexnet_deploy.dicom.results.representations import check_value
from chexnet_deploy.dicom.results.source_header import SourceImage
from chexnet_deploy.errors import DicomError
from chexnet_deploy.runtime.predictor import Prediction

DISCLAIMER: Final = "AI result, not for diagnosis"
ALGORITHM: Final = "CheXNet"
LAYOUT: Final = "2"
_NAMESPACE: Final = uuid.UUID(
    "1bc7ff33-7d16-44fd-a3b2-68aabcff9dd1"
)  # drawn once; what follows from it must not change


@dataclass(frozen=True, slots=True)
class Device:
    """The machine that made a result (PS3.3 C.7.5.1 and C.7.5.2).

    Attributes:
        serial_number: of this installation, given by whoever installed it.
        manufacturer: who answers for the machine.
        model_name: what they call it.
    """

    serial_number: str
    manufacturer: str = "chexnet-deploy"
    model_name: str = "chexnet-deploy node"

    def __post_init__(self) -> None:
        for name in ("serial_number", "manufacturer", "model_name"):
            checked = check_value("LO", getattr(self, name))
            if not checked.text or checked.fault or not checked.text.isascii():
                raise DicomError(
                    f"A device's {name} is {getattr(self, name)!r}; needed 1 to 64 ASCII characters without backslash. "
                    "Change it in the configuration."
                )

    @property
    def software_version(self) -> str:
        """Of this package."""
        return __version__

    @property
    def uid(self) -> str:
        """Device Observer UID: the same machine has the same one in all its reports."""
        return _uid("device", self.manufacturer, self.model_name, self.serial_number)


@dataclass(frozen=True, slots=True)
class Statement:
    """What is said of one source image.

    Attributes:
        source: what its header says, from read_source_image.
        image: which one it is.
        bundle_id: SHA-256 of manifest.json; names the algorithm's version.
        device: where it was made.
        made_at: when, with a time zone.
    """

    source: SourceImage
    image: ImageIdentity
    bundle_id: str
    device: Device
    made_at: datetime

    def __post_init__(self) -> None:
        if self.made_at.tzinfo is None:
            raise DicomError("made_at has no time zone; needed one. Use datetime.now().astimezone().")

    def uid(self, role: str) -> str:
        """Return the UID of one part of this: 2.25 and a version 5 UUID (PS3.5 section B.2, RFC 9562 section 5.5)."""
        return _uid("result", LAYOUT, self.source.sop_instance_uid, *self.image, self.bundle_id, role)

    @property
    def local_time(self) -> datetime:
        """When it was made, in the zone that the source's header states for all its times, else in made_at's own."""
        offset = self.source.patient_study.get("TimezoneOffsetFromUTC")
        if not offset:
            return self.made_at
        minutes = int(offset[1:3]) * 60 + int(offset[3:5])
        return self.made_at.astimezone(timezone(timedelta(minutes=-minutes if offset[0] == "-" else minutes)))


@dataclass(frozen=True, slots=True)
class Refusal(Statement):
    """Why one source image has no result.

    Attributes:
        reason: a code, RefusalReason's or the node's own.
        words: what was found and what was needed.
    """

    reason: str
    words: str


@dataclass(frozen=True, slots=True)
class Result(Statement):
    """A prediction for one source image.

    Attributes:
        prediction: of that image, by the bundle.
        manifest: the bundle's.
        points: that decided.
    """

    prediction: Prediction
    manifest: Manifest
    points: OperatingPoints

    def uid(self, role: str) -> str:
        """Return as Statement.uid; under other operating points it is another object."""
        return Statement.uid(self, role if self.points.site is None else f"{role} at site {self.points.site}")

    def __post_init__(self) -> None:
        Statement.__post_init__(self)
        probabilities = self.prediction.probabilities
        if not set(probabilities) == set(self.manifest.findings) >= set(self.prediction.maps):
            raise DicomError(
                "The prediction's findings are not the manifest's; needed both of one bundle. Predict with that bundle."
            )
        for finding, probability in probabilities.items():
            if not (math.isfinite(probability) and 0.0 <= probability <= 1.0):
                raise DicomError(
                    f"The probability of {finding} is {probability}; needed 0 to 1. Don't use this model; run "
                    "`chexnet-deploy bench` on it."
                )
        if self.prediction.present != self.points.decide(probabilities):
            raise DicomError(
                "What the prediction calls present does not follow from the operating points; needed both of one bundle and site "
                "file. Predict with them."
            )

    def decision(self, finding: str) -> str:
        """Return in words how a finding's probability lies to its operating point."""
        return self.points.place(finding, self.prediction.probabilities[finding])


def finish(built: Dataset, said: Statement) -> None:
    """Give an object that highdicom built the source's patient and study, and this statement's time everywhere.

    highdicom takes both from its arguments, but warns of names with the name, and stamps the present moment, so that
    the same one made again would differ.
    """
    built.update(deepcopy(said.source.patient_study))
    built.StudyInstanceUID = said.source.study_uid
    day, moment = f"{said.local_time:%Y%m%d}", f"{said.local_time:%H%M%S.%f}"
    for prefix in ("InstanceCreation", "Content"):
        setattr(built, f"{prefix}Date", day)
        setattr(built, f"{prefix}Time", moment)
    for item in built.ContributingEquipmentSequence:
        item.ContributionDateTime = f"{day}{moment}"


def encode(built: Dataset) -> bytes:
    """Return the bytes of a DICOM file (PS3.10)."""
    content = io.BytesIO()
    dcmwrite(content, built, enforce_file_format=True)
    return content.getvalue()


def _uid(*sources: str) -> str:
    # pydicom's generate_uid makes 2.25 UIDs at random only.
    return f"2.25.{uuid.uuid5(_NAMESPACE, chr(0).join(sources)).int}"
