"""`bench --dicom`: how long from a DICOM file to its report, by the code that the node's worker and `predict` run.

Pictures of findings that are present, which the node sends beside the report, are not made.
"""

import gc
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Final, TypeAlias

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.site import OperatingPoints
from chexnet_deploy.dicom.results.reporter import Reporter
from chexnet_deploy.dicom.results.result import Device
from chexnet_deploy.errors import ImageError, ImageRefusedError, OnPhase, RefusalReason, require
from chexnet_deploy.evaluation.dicom_times import DicomKind, DicomTimes, KindTimes
from chexnet_deploy.evaluation.engines import Effort
from chexnet_deploy.evaluation.latency import WARMUP_RUNS
from chexnet_deploy.images import Resizing, find_images
from chexnet_deploy.images.dicom.codestreams import JPEG_2000, JPEG_LOSSLESS, JPEG_LS, RLE
from chexnet_deploy.images.dicom.header import UNCOMPRESSED, DicomHeader, read_header
from chexnet_deploy.images.gray import read_image_file
from chexnet_deploy.runtime.predictor import Predictor
from chexnet_deploy.runtime.sessions.base import Session
from chexnet_deploy.runtime.streaming import Flow

IDLE_S: Final = 5.0
IDLES: Final = 3

_KINDS: Final[Mapping[str, DicomKind]] = {
    RLE: "rle",
    **dict.fromkeys(UNCOMPRESSED, "uncompressed"),
    **dict.fromkeys(JPEG_LOSSLESS, "jpeg-lossless"),
    **dict.fromkeys(JPEG_LS, "jpeg-ls"),
    **dict.fromkeys(JPEG_2000, "jpeg2000"),
}

_Milliseconds: TypeAlias = dict[str, float]  # of one image, by stage
_Runs: TypeAlias = dict[DicomKind, list[_Milliseconds]]
_Queues: TypeAlias = Mapping[DicomKind, "_Queue"]


@dataclass(frozen=True, slots=True)
class DicomFolder:
    """DICOM files to measure with.

    Attributes:
        place: as it was given.
        headers: of those that can be read, without pixel data.
        refused: how many others there are, by the reason's word.
    """

    place: Path
    headers: Mapping[Path, DicomHeader]
    refused: Mapping[str, int]

    @classmethod
    def open(cls, place: Path) -> "DicomFolder":
        """Read the headers of all files below a folder.

        Raises:
            ImageError: there is no DICOM file that can be read.
            MissingPackageError: highdicom is not installed.
        """
        with require("dicom-out"):
            import highdicom  # noqa: F401 - loaded, not used
        headers, refused = dict[Path, DicomHeader](), Counter[str]()
        for path in find_images([place]).paths():
            try:
                headers[path] = replace(read_header(path, read_image_file(path)), pixel_data=memoryview(b""))
            except ImageError as err:
                refused[err.reason.value] += 1
        folder = cls(place, headers, refused)
        if not headers:
            raise folder._nothing_left(refused)
        return folder

    def measure(self, bundle: Bundle, session: Session, effort: Effort, on_phase: OnPhase | None) -> DicomTimes:
        """Report on one image after another, a file of each kind in turn, and after idling.

        Args:
            bundle: what the session was opened from.
            session: stays its owner's.
            effort: images and seconds of each kind.
            on_phase: called after each round.

        Raises:
            ImageError: the model takes none of the files, or the machine is too busy to decode.
            SessionError: the session failed.
        """
        refused = Counter(self.refused)
        points = OperatingPoints.of(bundle.manifest, bundle.read_site())
        # One image at a time, so one decoding process, as in the node's worker.
        predictor = Predictor(session, bundle.manifest, Flow(), points=points)
        with predictor.loader.reader:
            reporter = Reporter(bundle, predictor, Device("bench"), max_pictures=0)
            reporter.warm_up()
            queues = {
                kind: _Queue(files, reporter, refused)
                for kind, files in self._by_kind(bundle.manifest.preprocessing).items()
            }
            queues = {kind: queue for kind, queue in queues.items() if queue.is_warm()}
            if not queues:
                raise self._nothing_left(refused)
            gc.collect()
            gc.freeze()  # as the node's worker does
            try:
                steady, after_idle = _steady(queues, effort, on_phase), _after_idle(queues, on_phase)
            finally:
                gc.unfreeze()
        return DicomTimes(
            idle_s=IDLE_S,
            refused=dict(refused),
            kinds=tuple(
                KindTimes(
                    kind=kind,
                    n_files=len(queue.seen),
                    megapixels=median(
                        self.headers[path].rows * self.headers[path].columns / 1e6 for path in queue.seen
                    ),
                    stages_ms=_columns(steady[kind]),
                    after_idle_ms=_columns(after_idle[kind]),
                )
                for kind, queue in queues.items()
            ),
        )

    def _by_kind(self, resizing: Resizing) -> dict[DicomKind, list[Path]]:
        files: dict[DicomKind, list[Path]] = {}
        for path, header in self.headers.items():
            kind = _KINDS.get(header.transfer_syntax_uid, "jpeg")
            if header.halvings(resizing):
                kind = "jpeg2000-reduced"
            files.setdefault(kind, []).append(path)
        return files

    def _nothing_left(self, refused: Mapping[str, int]) -> ImageError:
        why = ", ".join(f"{reason}: {n}" for reason, n in sorted(refused.items()))
        return ImageError(
            f"{self.place}: found no DICOM radiograph that can be answered ({why}); needed at least one. Next: give a folder of "
            f"chest radiographs; `predict` says what is wrong with each file."
        )


class _Queue:
    """Files of one kind, taken in turn; those that the model doesn't take leave it."""

    def __init__(self, files: Sequence[Path], reporter: Reporter, refused: Counter[str]) -> None:
        self._files, self._reporter, self._refused = deque(files), reporter, refused
        self.seen: set[Path] = set()

    def is_warm(self) -> bool:
        """Answer a few images; say whether there is one that the model takes."""
        try:
            for _ in range(WARMUP_RUNS):
                self.take()
        except IndexError:
            return False
        return True

    def take(self) -> _Milliseconds:
        """Report on the next file and return what each stage took; IndexError where none is left."""
        while True:
            path = self._files.popleft()
            try:
                stages_ms = _time(self._reporter, path)
            except ImageRefusedError as err:
                if err.reason is RefusalReason.BUSY:
                    raise
                self._refused[err.reason.value] += 1
                continue
            self._files.append(path)
            self.seen.add(path)
            return stages_ms


def _steady(queues: _Queues, effort: Effort, on_phase: OnPhase | None) -> _Runs:
    runs: _Runs = {kind: [] for kind in queues}
    spent_ms, n = dict.fromkeys(queues, 0.0), 0
    while n < effort.min_runs or min(spent_ms.values()) < effort.min_duration_s * 1000.0:
        for kind, queue in queues.items():
            runs[kind].append(queue.take())
            spent_ms[kind] += sum(runs[kind][-1].values())
        n += 1
        if on_phase is not None:
            on_phase("DICOM to report", n, max(n, effort.min_runs))
    return runs


def _after_idle(queues: _Queues, on_phase: OnPhase | None) -> _Runs:
    runs: _Runs = {kind: [] for kind in queues}
    for i in range(IDLES):
        for kind, queue in queues.items():
            sleep(IDLE_S)
            runs[kind].append(queue.take())
        if on_phase is not None:
            on_phase("first after idle", i + 1, IDLES)
    return runs


def _time(reporter: Reporter, path: Path) -> _Milliseconds:
    stages_ms: _Milliseconds = {}
    began_s = perf_counter()

    def on_stage(stage: str) -> None:
        nonlocal began_s
        now_s = perf_counter()
        stages_ms[stage], began_s = (now_s - began_s) * 1000.0, now_s

    reporter.report(path, datetime.now().astimezone(), on_stage)
    on_stage("report")
    return stages_ms


def _columns(runs: list[_Milliseconds]) -> dict[str, tuple[float, ...]]:
    return {stage: tuple(run[stage] for run in runs) for stage in runs[0]}
