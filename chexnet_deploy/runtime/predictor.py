"""Predict: a radiograph -> its findings' probabilities and class activation maps.

Knows bundles and sessions; reads no labels and computes no statistics.
"""

from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from threading import Semaphore
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from chexnet_deploy.bundle import Bundle, Manifest, Trust
from chexnet_deploy.bundle.site import OperatingPoints
from chexnet_deploy.errors import ImageError, ImageRefusedError, OnStage, RefusalReason, SessionError
from chexnet_deploy.files import FileContent
from chexnet_deploy.images import Gray, ImageReader, Pixels
from chexnet_deploy.images.gray import read_image_file
from chexnet_deploy.runtime.loading import BUSY_ATTEMPTS, ImageSource, PixelLoader
from chexnet_deploy.runtime.sessions.base import Logits, Provider, Session, run_padded, sigmoid
from chexnet_deploy.runtime.sessions.open import check_known_answers, open_session
from chexnet_deploy.runtime.streaming import Flow, choose_flow, in_order, iter_groups, iter_lists, usable_cores


@dataclass(frozen=True, slots=True)
class Prediction:
    """The model's output for one radiograph.

    Attributes:
        probabilities: by finding, 0..1.
        present: by finding, True at and above its operating point; findings without one are omitted, and so are those between
            a site file's two thresholds.
        maps: by finding, class activation map float32 [S/32, S/32] in logits; its mean + the head's bias is the logit.
            Empty where they were not asked for.
    """

    probabilities: dict[str, float]
    present: dict[str, bool]
    maps: dict[str, NDArray[np.float32]]

    @classmethod
    def of(
        cls, logits: Logits, maps: NDArray[np.float32] | None, findings: Sequence[str], points: OperatingPoints
    ) -> "Prediction":
        """Return a Prediction of one image's logits float32 [C] and maps float32 [C, S/32, S/32], in findings' order."""
        probabilities = dict(zip(findings, sigmoid(logits).tolist(), strict=True))
        by_finding = {} if maps is None else dict(zip(findings, maps, strict=True))
        return cls(probabilities, points.decide(probabilities), by_finding)


class FileAnswer(NamedTuple):
    """What became of one file.

    Attributes:
        path: as it was given.
        answer: findings, or why there are none.
        content: of the file as it was read; None where it wasn't, or where the machine had no time for it.
    """

    path: Path
    answer: Prediction | ImageError
    content: FileContent | None


class Predictor:
    """A session with its model's loader and findings; use it as a context manager, or call `close`.

    Args:
        session: open.
        manifest: of the bundle the session was opened from.
        flow: how `predict_stream` moves images through the session.
        checks: whether images out of scope are refused; see PixelLoader.of.
        points: what decides; None for the bundle's own operating points.

    Attributes:
        loader: of its images.
        points: what decides.
    """

    _bundle: Bundle | None = None

    def __init__(
        self,
        session: Session,
        manifest: Manifest,
        flow: Flow | None = None,
        *,
        checks: bool = True,
        points: OperatingPoints | None = None,
    ) -> None:
        self._session = session
        self.points = points or OperatingPoints.of(manifest, None)
        self._flow = flow = flow or Flow()
        self._manifest = manifest
        # Processes are started as compressed DICOM asks for them.
        self.loader = PixelLoader.of(manifest, ImageReader(processes=max(1, flow.workers - 1)), checks=checks)

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        trust: Trust | None = None,
        threads: int | None = None,
        provider: Provider = "auto",
    ) -> "Predictor":
        """Verify a bundle, load it and check its known answers; see Bundle.open and open_session for the arguments.

        With trust, its release then becomes the oldest that runs here; see Bundle.keep_release. A site file beside it decides;
        see Bundle.read_site.

        For one image at a time, all cores at work on it (threads=None) answer soonest. For many, `predict_stream` is fastest
        with threads=1: each core then carries images of its own.

        Raises:
            BundleError, TrustError, SessionError, MissingPackageError: see Bundle.open and open_session.
        """
        return cls.of(Bundle.open(Path(path), trust=trust), threads=threads, provider=provider)

    @classmethod
    def of(
        cls, bundle: Bundle, *, threads: int | None = None, provider: Provider = "auto", flow: Flow | None = None
    ) -> "Predictor":
        """Load a verified bundle, as `open` does; flow None chooses one for this machine."""
        flow = flow or choose_flow(bundle.manifest, threads=threads, provider=provider, cores=usable_cores())
        points = OperatingPoints.of(bundle.manifest, bundle.read_site())
        session = open_session(bundle, threads=threads, provider=provider)
        predictor = cls(session, bundle.manifest, flow, points=points)
        predictor._bundle = bundle
        try:
            bundle.keep_release()
        except BaseException:
            predictor.close()
            raise
        return predictor

    @property
    def flow(self) -> Flow:
        """How `predict_stream` moves images through the session."""
        return self._flow

    def predict(self, image: ImageSource, on_stage: OnStage | None = None) -> Prediction:
        """Return the findings in one radiograph.

        Args:
            image: a PNG, JPEG or DICOM file, by path or as bytes; or gray uint8 [H, W] with bone bright.
            on_stage: called when its pixels are there ("resize"), and when the "model" has answered.

        Raises:
            ImageError: the image can't be read without guessing, or is out of the model's scope.
        """
        return self.predict_batch([image], on_stage)[0]

    def predict_batch(self, images: Sequence[ImageSource], on_stage: OnStage | None = None) -> list[Prediction]:
        """Return the findings in several radiographs, in order, run as one batch; on_stage as in `predict`.

        Raises:
            ImageError: an image can't be read without guessing, or is out of the model's scope.
            SessionError: none or more images than the session takes.
        """
        if isinstance(images, str | bytes | Path | np.ndarray):
            raise SessionError(f"got one {type(images).__name__}, needed a list of images. For one image: predict.")
        if not images:
            raise SessionError("got no images, needed at least one.")
        pixels = [self.loader.load(image).pixels for image in images]
        if on_stage is not None:
            on_stage("resize")
        logits, maps = self._session.run(pixels[0] if len(pixels) == 1 else np.concatenate(pixels))
        if on_stage is not None:
            on_stage("model")
        return [self._name(*row) for row in zip(logits, maps, strict=True)]

    def self_test(self) -> None:
        """Check the known answers again.

        Raises:
            SessionError: they differ from those of the bundle, or the predictor wasn't opened from one.
        """
        if self._bundle is None:
            raise SessionError("found no bundle, needed its known answers. Next: open the predictor from a bundle.")
        check_known_answers(self._session, self._bundle, at_once=self._flow.batch_size)

    def predict_stream(self, paths: Iterable[Path | str], *, with_maps: bool = False) -> Generator[FileAnswer]:
        """Yield each file's findings, in order; for a file that can't be read, the ImageError that says why.

        Lazy, in constant memory for any number of files: paths are taken a few ahead while answers are asked for. Files are
        decoded while others are computed. Batches are cut by place, every `flow.batch_size` paths: the same list gives the
        same bits, from any multiple of it on.

        Args:
            paths: files.
            with_maps: keep the activation maps.

        Raises:
            SessionError: the session failed; nothing more is begun.
        """
        turns = Semaphore(self._flow.calls)

        def answer(batches: list[list[Path | str]]) -> list[FileAnswer]:
            loaded = [[self._load(Path(path)) for path in batch] for batch in batches]
            with turns:
                predictions = [
                    self._run_batch(
                        [each for each, _ in batch if not isinstance(each, ImageError)], with_maps=with_maps
                    )
                    for batch in loaded
                ]
            named = chain.from_iterable(predictions)
            return [
                FileAnswer(Path(path), each if isinstance(each, ImageError) else next(named), content)
                for path, (each, content) in zip(chain(*batches), chain(*loaded), strict=True)
            ]

        workers, batch_size = self._flow.workers, self._flow.batch_size
        groups = iter_groups(iter_lists(paths, batch_size), batch_size=batch_size, n_single=2 * workers)
        with closing(in_order(answer, groups, workers=workers, ahead=2 * workers)) as answered:
            for answers in answered:
                yield from answers

    def close(self) -> None:
        """Free the model, and end the process that decodes DICOM."""
        self.loader.reader.close()
        self._session.close()

    def __enter__(self) -> "Predictor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _load(self, path: Path) -> tuple[Pixels | ImageError, FileContent | None]:
        content: FileContent | None = None
        try:
            image = read_image_file(path)
            content = FileContent.of(image)
            return self.loader.load(image, name=path, attempts=BUSY_ATTEMPTS).pixels, content
        except ImageRefusedError as err:
            # A new one: the first one's traceback would keep the damaged file's bytes for as long as it is kept.
            is_of_file = err.reason is not RefusalReason.BUSY
            return ImageRefusedError(err.reason, str(err)), content if is_of_file else None
        except ImageError as err:
            return ImageError(str(err)), content

    def _run_batch(self, pixels: list[Pixels], *, with_maps: bool) -> list[Prediction]:
        if not pixels:
            return []
        logits, maps = run_padded(self._session, np.concatenate(pixels))
        rows = zip(logits, maps, strict=True)
        return [self._name(row, row_maps if with_maps else None) for row, row_maps in rows]

    def _name(self, logits: Logits, maps: NDArray[np.float32] | None) -> Prediction:
        return Prediction.of(logits, maps, self._manifest.findings, self.points)


def draw_cam(gray: Gray, cam: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return RGB uint8 [H, W, 3]: the radiograph with one finding's activation map over it, as the paper shows it.

    Only evidence *for* the finding is shown, red where it is strongest; a map without any leaves the image gray.

    Args:
        gray: uint8 [H, W].
        cam: float32 [h, w], stretched bilinearly over the whole image: preprocessing squashes, so cells do too.
    """
    height, width = gray.shape
    evidence = np.maximum(cam, 0.0) / max(float(cam.max()), 1e-6)
    stretched = Image.fromarray(evidence.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    heat = np.clip(np.asarray(stretched), 0.0, 1.0)[..., None]
    colour = np.concatenate([heat, np.maximum(0.0, 1.0 - np.abs(2.0 * heat - 1.0)), 1.0 - heat], axis=2) * 255.0
    opacity = 0.5 * heat
    blended: NDArray[np.uint8] = (gray[..., None] * (1.0 - opacity) + colour * opacity).round().astype(np.uint8)
    return blended
