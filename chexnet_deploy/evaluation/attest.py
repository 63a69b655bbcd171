"""What `bench` found of each bundle, as an attestation that can be signed and travels with the bundle."""

import json
import logging
from collections.abc import Sequence

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.signing.attestation import Attestation
from chexnet_deploy.datasets.labelled import LabelledImages
from chexnet_deploy.errors import MissingPackageError, OnPhase
from chexnet_deploy.evaluation.bench_report import BenchRun
from chexnet_deploy.files import sha256_hex, sha256_of_file
from chexnet_deploy.runtime.engine import Engine
from chexnet_deploy.runtime.sessions.here import what_it_runs_on

_LOG = logging.getLogger(__name__)


def attest(
    run: BenchRun, engines: Sequence[Engine], reference: Engine, specs_sha256: Sequence[str], on_phase: OnPhase
) -> dict[str, Attestation]:
    """Return an attestation for each bundle of a run, by the name of its file.

    None beside a reference that is no bundle, or was itself made of another: by itself every bundle passes, and margins add up.

    Args:
        run: of `engines`, in their order.
        engines: opened.
        reference: what they were compared with.
        specs_sha256: of the file of each engine's spec.
        on_phase: called while images are hashed.
    """
    if not isinstance(reference, Bundle) or reference.manifest.ancestors:
        return {}
    data_sha256 = None if run.images is None else _hash_images(run.images, on_phase)
    made = {}
    for bundle, spec_sha256, result in zip(engines, specs_sha256, run.report.engines, strict=True):
        if not isinstance(bundle, Bundle):
            continue
        try:
            runs_on = what_it_runs_on(bundle, run.report.provider)
        except MissingPackageError as err:  # of ONNX Runtime on a GPU that nothing here can name
            _LOG.warning("no attestation of %s: %s", result.name, err)
            continue
        parity = result.parity
        is_decided = parity is not None and parity.verdict == result.verdict
        made[f"attestation-{result.name}.json"] = Attestation(
            verdict=result.verdict,
            summary=parity.summary if parity is not None and is_decided else result.verdict,
            bundle_id=bundle.id,
            model_sha256=bundle.manifest.files[bundle.manifest.model_name],
            reference_id=reference.id,
            reference_model_sha256=reference.manifest.files[reference.manifest.model_name],
            spec_sha256=spec_sha256,
            data_sha256=data_sha256,
            n_images=0 if parity is None else parity.n_images,
            n_patients=0 if parity is None else parity.n_patients,
            runs_on=runs_on,
            tools=dict(run.report.machine.packages),
            finished_utc=run.report.finished_utc,
        )
    return made


def _hash_images(images: LabelledImages, on_phase: OnPhase) -> str:
    """Return the SHA-256 of a line an image, in order: its name, patient, labels and the SHA-256 of its file."""
    lines, n = [], len(images.paths)
    for i, (name, path) in enumerate(zip(images.names, images.paths, strict=True)):
        labels = ",".join(map(str, images.labels[i].tolist()))
        lines.append(json.dumps([name, int(images.patients[i]), labels, sha256_of_file(path)]) + "\n")
        on_phase("hash images", i + 1, n)
    return sha256_hex("".join(lines).encode())
