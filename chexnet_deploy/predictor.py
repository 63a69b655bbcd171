"""From a radiograph to named probabilities and a picture of where the model looked.

Knows bundles and sessions; reads no labels and computes no statistics.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from chexnet_deploy.bundle import Bundle, Manifest
from chexnet_deploy.errors import SessionError
from chexnet_deploy.images import Gray, ImageReader
from chexnet_deploy.scope import ScopePolicy
from chexnet_deploy.sessions import Logits, Provider, Session, open_session

ImageSource: TypeAlias = Path | str | Gray


def sigmoid(logits: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return float32 probabilities; computed in float32 here, never in a graph's FP16 or INT8."""
    # exp(-|x|) never overflows.
    small = np.exp(-np.abs(logits.astype(np.float32)))
    return np.where(logits >= 0, 1.0 / (1.0 + small), small / (1.0 + small)).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model says of one radiograph.

    Attributes:
        probabilities: by finding, 0..1.
        present: by finding, True at and above its operating point; findings without one are left out.
        maps: by finding, class activation map float32 [S/32, S/32] in logits; its mean + the head's bias is the logit.
    """

    probabilities: dict[str, float]
    present: dict[str, bool]
    maps: dict[str, NDArray[np.float32]]


class Predictor:
    """A session with the preprocessing and the names that belong to it.

    Args:
        session: open.
        manifest: of the bundle the session was opened from.
    """

    def __init__(self, session: Session, manifest: Manifest) -> None:
        self._session = session
        self._findings = manifest.findings
        self._preprocessing = manifest.preprocessing
        self._operating_points = dict(manifest.operating_points)
        self._scope = manifest.scope or ScopePolicy()
        self._reader = ImageReader()

    @classmethod
    def open(cls, path: Path | str, *, threads: int | None = None, provider: Provider = "cpu") -> "Predictor":
        """Verify a bundle, load it and check its known answers; see open_session for the arguments.

        Raises:
            BundleError, SessionError, MissingPackageError: see Bundle.open and open_session.
        """
        bundle = Bundle.open(Path(path))
        return cls(open_session(bundle, threads=threads, provider=provider), bundle.manifest)

    def predict(self, image: ImageSource) -> Prediction:
        """Return the findings in one radiograph.

        Args:
            image: a PNG, JPEG or DICOM file, or gray uint8 [H, W] with bone bright.

        Raises:
            ImageError: the image can't be read without guessing, or is a DICOM file out of the model's scope.
        """
        return self.predict_batch([image])[0]

    def predict_batch(self, images: Sequence[ImageSource]) -> list[Prediction]:
        """Return the findings in several radiographs, in order, run as one batch.

        Raises:
            ImageError: an image can't be read without guessing, or is a DICOM file out of the model's scope.
            SessionError: none or more images than the session takes.
        """
        if isinstance(images, str | Path | np.ndarray):
            raise SessionError(f"got one {type(images).__name__}, needed a list of images. For one image: predict.")
        if not images:
            raise SessionError("got no images, needed at least one.")
        pixels = [self._preprocessing(self.read(image)) for image in images]
        logits, maps = self._session.run(pixels[0] if len(pixels) == 1 else np.concatenate(pixels))
        return [self._name(*row) for row in zip(logits, maps, strict=True)]

    def read(self, image: ImageSource) -> Gray:
        """Return the gray picture that `predict` would look at.

        Raises:
            ImageError: see predict.
        """
        return self._reader.read(Path(image), scope=self._scope) if isinstance(image, str | Path) else image

    def close(self) -> None:
        """Free the model, and end the process that decodes DICOM."""
        self._reader.close()
        self._session.close()

    def __enter__(self) -> "Predictor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _name(self, logits: Logits, maps: NDArray[np.float32]) -> Prediction:
        probabilities = dict(zip(self._findings, sigmoid(logits).tolist(), strict=True))
        present = {name: probabilities[name] >= point for name, point in self._operating_points.items()}
        return Prediction(probabilities, present, dict(zip(self._findings, maps, strict=True)))


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
