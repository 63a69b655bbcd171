"""attestation.json: what `bench` found of one bundle on one machine, in the one form that is accepted. Knows no keys.

It lies in the bundle, as its signature attestation.sig does, and is in no manifest: it is written when the bundle is long sealed.
The form is canonical JSON (RFC 8785; all values are text or whole numbers), so that the same facts are the same bytes.
"""

import json
from typing import Annotated, Literal

from pydantic import Field, model_validator

from chexnet_deploy.bundle.signing.signatures import WrittenRecord
from chexnet_deploy.errors import TrustError
from chexnet_deploy.files import FirstFormat, Sha256
from chexnet_deploy.inputs import StrictRecord

ATTESTATION = "attestation.json"
ATTESTATION_SIGNATURE = "attestation.sig"
MAX_ATTESTATION_BYTES = 16384


class RunsOn(StrictRecord):
    """What a bundle runs on; another one of any of these may answer otherwise.

    Attributes:
        processor: model of the GPU, or of the CPU.
        backend: with its version, e.g. "tensorrt 10.3.0".
        driver: the CUDA version that the GPU's driver supports; None on a CPU.
        platform: system and architecture.
    """

    processor: str
    backend: str
    driver: str | None = None
    platform: str


class Attestation(WrittenRecord):
    """The verdict on a bundle.

    Attributes:
        summary: the verdict with how much of the model it covers.
        model_sha256, reference_model_sha256: of the two models' files.
        spec_sha256: of the engine spec's file, as `sha256sum` prints it.
        data_sha256: over the names, patients, labels and files of the images; None where there were none.
        tools: versions of the packages that took part.
        finished_utc: when, ISO 8601.
    """

    writer = "bench"
    again = "Take the file that `bench` wrote."

    format: FirstFormat = 1
    verdict: Literal["PASS", "FAIL", "INCONCLUSIVE"]
    summary: str
    bundle_id: Sha256
    model_sha256: Sha256
    reference_id: Sha256
    reference_model_sha256: Sha256
    spec_sha256: Sha256
    data_sha256: Sha256 | None
    n_images: Annotated[int, Field(ge=0)]
    n_patients: Annotated[int, Field(ge=0)]
    runs_on: RunsOn
    tools: dict[str, str]
    finished_utc: str

    def to_bytes(self) -> bytes:
        """Return the bytes of attestation.json."""
        record = self.model_dump(mode="json")
        return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    @model_validator(mode="after")
    def _is_consistent(self) -> "Attestation":
        if self.verdict == "PASS" and (self.data_sha256 is None or not 1 <= self.n_patients <= self.n_images):
            raise ValueError("a PASS needs images, and no more patients than these")
        return self

    def refuse_other(self, bundle_id: Sha256, model_sha256: Sha256, where: str) -> None:
        """Refuse the attestation of another bundle or model.

        Raises:
            TrustError: names both bundles, or the file.
        """
        if self.bundle_id != bundle_id:
            raise TrustError(
                f"{where}: the attestation is of the bundle {self.bundle_id[:12]}…, needed one of {bundle_id[:12]}…. "
                f"Run: chexnet-deploy bench --engine {where}"
            )
        if self.model_sha256 != model_sha256:
            raise TrustError(
                f"{where}: the attestation is of another model file. Take the one that `bench` wrote of it."
            )

    def refuse_elsewhere(self, here: RunsOn, where: str) -> None:
        """Refuse a verdict that was reached on something else.

        Raises:
            TrustError: names what differs.
        """
        there = self.runs_on
        differ = [
            f"{name} {getattr(there, name)}, here {getattr(here, name)}"
            for name in RunsOn.model_fields
            if getattr(there, name) != getattr(here, name)
        ]
        if differ:
            raise TrustError(
                f"{where} has its PASS elsewhere: {'; '.join(differ)}. "
                f"Run here: chexnet-deploy bench --engine {where}, and have its attestation signed."
            )
