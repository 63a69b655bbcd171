"""Load a radiograph: file -> gray -> pixels. The only place that joins reading, the checks and preprocessing."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from chexnet_deploy.bundle.manifest import Manifest
from chexnet_deploy.errors import ImageRefusedError, OnStage, RefusalReason
from chexnet_deploy.images import Gray, ImageReader, Pixels, Resizing, ScopePolicy
from chexnet_deploy.images.content_check import check_image

if TYPE_CHECKING:
    from chexnet_deploy.images.dicom.decoder import DicomImage

ImageSource: TypeAlias = Path | str | bytes | Gray

BUSY_ATTEMPTS: Final = 4
"""Of a file of many, which waits for a busy machine."""


class LoadedImage(NamedTuple):
    """A radiograph as a person sees it, uint8 [H, W], and as the model does, uint8 [1, 1, S, S]."""

    gray: Gray
    pixels: Pixels


@dataclass(frozen=True, slots=True)
class PixelLoader:
    """Loads radiographs for one model; any number of threads may call it.

    Attributes:
        preprocessing: the model's.
        scope: the radiographs accepted, by DICOM header and by content; None skips both checks. Whoever answers about a
            patient checks; measuring a labelled list (`bench`, `evaluate`, calibration) doesn't, as the list says what is in it.
        reader: stays its owner's to close.
    """

    preprocessing: Resizing
    scope: ScopePolicy | None
    reader: ImageReader

    @classmethod
    def of(cls, manifest: Manifest, reader: ImageReader, *, checks: bool) -> "PixelLoader":
        """Return a bundle's loader.

        Args:
            manifest: the bundle's.
            reader: see PixelLoader.
            checks: refuse what is out of the model's scope or fails the content check; False loads every readable image.
        """
        return cls(manifest.preprocessing, (manifest.scope or ScopePolicy()) if checks else None, reader)

    def read(self, image: ImageSource, *, name: object = "the image") -> Gray:
        """Return the gray picture of a PNG, JPEG or DICOM file, given by path or as bytes; an array is checked alone.

        Args:
            image: the file or array.
            name: what messages call bytes; a file is called by its path.

        Raises:
            ImageError: it can't be read without guessing, or a check refuses it; its `reason` says which.
            MissingPackageError: it is a DICOM file, and pydicom is not installed.
        """
        if isinstance(image, bytes):
            gray = self.reader.decode(image, scope=self.scope, name=name, resizing=self.preprocessing)
        elif isinstance(image, str | Path):
            gray = self.reader.read(Path(image), scope=self.scope, resizing=self.preprocessing)
        else:
            gray = image
        check_image(gray, None if self.scope is None else self.scope.picture)
        return gray

    def load(self, image: ImageSource, *, name: object = "the image", attempts: int = 1) -> LoadedImage:
        """Return the gray picture and the model's pixels; arguments and errors as `read`.

        Args:
            image: see read.
            name: see read.
            attempts: how often to try while the machine is too busy; BUSY_ATTEMPTS where nobody waits for this image.
        """
        while True:
            attempts -= 1
            try:
                gray = self.read(image, name=name)
                return LoadedImage(gray, self.preprocessing(gray))
            except ImageRefusedError as err:
                if err.reason is not RefusalReason.BUSY or attempts < 1:
                    raise

    def read_dicom(self, path: Path, on_stage: OnStage | None = None) -> "DicomImage":
        """Return a DICOM file's header, gray picture and pixels' hash, checked against the header's scope.

        `load` checks the content. For on_stage see Decoder.decode.

        Raises:
            ImageError, MissingPackageError: as `read`; and any other format is refused.
        """
        return self.reader.decoder.decode(
            path, scope=self.scope, is_identified=True, resizing=self.preprocessing, on_stage=on_stage
        )
