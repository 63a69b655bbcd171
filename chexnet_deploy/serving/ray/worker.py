"""A Ray worker: a block of images -> their rows, by one Predictor.

Every worker verifies the bundle, its signature and its known answers for itself, and that its machine is like the one that asks.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, cast

import pyarrow as pa
import ray

from chexnet_deploy.bundle import Bundle, Trust
from chexnet_deploy.errors import BundleError, ClusterError
from chexnet_deploy.runtime.predictor import Predictor
from chexnet_deploy.runtime.sessions.base import Provider
from chexnet_deploy.runtime.streaming import Flow, choose_flow
from chexnet_deploy.runtime.table import TableCard, row_of

MAX_ATTEMPTS: Final = 3
BLOCK: Final = pa.schema({"place": pa.int64(), "name": pa.binary()})
ANSWERS: Final = pa.schema({"place": pa.int64(), "line": pa.binary(), "quarantined": pa.bool_()})
# What an answer's bits depend on, beside the processor.
_PACKAGES: Final = ("chexnet-deploy", "numpy", "pillow", "pydicom", "onnxruntime", "openvino", "tensorrt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Parameters of a worker.

    Attributes:
        folder: that all paths are relative to.
        bundle: the bundle's path.
        root: see ImageFiles.
        trust: see Bundle.open.
        card: of the table.
        cores: of this worker.
        versions: of the packages that the table's bits depend on, by name.
    """

    folder: Path
    bundle: Path
    root: Path
    trust: Trust | None
    card: TableCard
    cores: int
    versions: Mapping[str, str]

    @property
    def provider(self) -> Provider:
        """What runs an ONNX bundle; never "auto", which may be another one on another machine."""
        return cast(Provider, self.card.backend) if self.card.backend in ("openvino", "cpu", "cuda") else "auto"

    def flow(self, bundle: Bundle) -> Flow:
        """Return how images move through one worker."""
        return choose_flow(bundle.manifest, threads=self.card.threads, provider=self.provider, cores=self.cores)


class Worker:
    """One Predictor on one machine of the cluster; opened lazily for the first block, where an error reaches the user.

    Args:
        job: what to do.
        attempts: an Attempts actor.
    """

    def __init__(self, job: Job, attempts: Any) -> None:
        self._job = job
        self._attempts = attempts
        self._predictor: Predictor | None = None

    def __call__(self, block: pa.Table) -> pa.Table:
        """Return place, row and whether it is quarantined, for each place and name of a block."""
        places = block["place"].to_pylist()
        if ray.get(self._attempts.begin.remote(places[0])) > MAX_ATTEMPTS:
            raise ClusterError(
                f"{MAX_ATTEMPTS} workers ended while they carried images {places[0]:,} to {places[-1]:,} of the list. Rows "
                f"that are done are kept. Look for a damaged file among them, or for too little memory."
            )
        if self._predictor is None:
            self._predictor = self._open()
        names = [os.fsdecode(name) for name in block["name"].to_pylist()]
        lines, are_quarantined = [], []
        for name, done in zip(
            names, self._predictor.predict_stream(self._job.root / name for name in names), strict=True
        ):
            row = row_of(self._job.card, name, done)
            lines.append(row.line)
            are_quarantined.append(row.is_quarantined)
        self._attempts.end.remote(places[0])
        return pa.table({"place": block["place"], "line": lines, "quarantined": are_quarantined}, schema=ANSWERS)

    def _open(self) -> Predictor:
        job = self._job
        found = package_versions()
        for name, needed in job.versions.items():
            if found.get(name) != needed:
                raise ClusterError(
                    f"a machine of the cluster has {name} {found.get(name)}, the one that asks has {needed}; their answers may "
                    f"differ. Install the same on all."
                )
        try:
            os.chdir(job.folder)
        except OSError as err:
            raise ClusterError(
                f"{job.folder}: {err.strerror} on a machine of the cluster. All need the same files under the same paths."
            ) from err
        bundle = Bundle.open(job.bundle, trust=job.trust)
        if bundle.id != job.card.bundle:
            raise BundleError(
                f"{job.bundle} is another bundle on a machine of the cluster: {bundle.id[:12]}…, not "
                f"{job.card.bundle[:12]}…. Copy it there again."
            )
        predictor = Predictor.of(bundle, threads=job.card.threads, provider=job.provider, flow=job.flow(bundle))
        job.card.refuse_other_site(predictor.points)
        return predictor


class Attempts:
    """Counts how often each unfinished block was started; one actor in the cluster."""

    def __init__(self) -> None:
        self._begun: dict[int, int] = {}

    def begin(self, place: int) -> int:
        """Count a block, named by its first place; return how often it was begun now."""
        self._begun[place] = self._begun.get(place, 0) + 1
        return self._begun[place]

    def end(self, place: int) -> None:
        """Forget a block that is done."""
        self._begun.pop(place, None)


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that a table's bits depend on, of those that are installed."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
