"""Choose how JPEG 2000 is decoded: at a reduced resolution only where the model answers as it does to every pixel.

The validation images are made into DICOM files of lossless JPEG 2000 and read at reduced resolution, as a scanner's would be. Ramps
and one-pixel lines, on which a smaller picture differs most, bound the change of a pixel.
"""

import io
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, DigitalXRayImageStorageForPresentation, JPEG2000Lossless

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.manifest import Check
from chexnet_deploy.datasets.labelled import LabelledImages
from chexnet_deploy.errors import GateError
from chexnet_deploy.evaluation.gatekeeper import Gatekeeper
from chexnet_deploy.evaluation.spec import Gate
from chexnet_deploy.images import ImageReader, Pixels, Preprocessing
from chexnet_deploy.images.preprocessing import LEAST_SIDES, Reduction
from chexnet_deploy.runtime.loading import PixelLoader
from chexnet_deploy.runtime.score import READERS
from chexnet_deploy.runtime.sessions.base import run_in_batches
from chexnet_deploy.runtime.sessions.ort import OrtSession
from chexnet_deploy.runtime.streaming import in_order

MEAN_CHANGES: Final = {2: 1.0, 1: 0.3}
"""By halvings, the most first: the largest mean change of a pixel of the validation images, in gray levels of 255."""
LEAST_IMAGES: Final = 20
"""Of the validation images, that are large enough to be halved so often."""
LINE_PERIODS_PX: Final = (2, 3, 4, 5, 8, 97)
"""Lines far apart meet every place in a halved picture's grid and in the model's; lines close together alias."""
_MARGIN: Final = 1.25  # for lines at other distances, and pictures of other sizes
_WHITE: Final = 65535


def reduce_decoding(exact: Bundle, out: Path, gate: Gate, validation: LabelledImages) -> Bundle:
    """Write a bundle of the same model that decodes JPEG 2000 with as many halvings as pass, two at the most.

    Args:
        exact: an fp32 bundle that decodes every pixel.
        out: where; nothing may be there yet.
        gate: what its answers must pass beside those to every pixel.
        validation: labelled images of validation patients.

    Raises:
        GateError: no halving passes; nothing is kept.
        ImageError, SessionError: a validation image can't be read or answered.
    """
    whole = exact.manifest.preprocessing
    # The bound of a pixel's change isn't known before it is measured; it changes no picture.
    declared = {
        n: whole.model_copy(update={"jpeg2000": Reduction(halvings=n, max_gray_change=255)}) for n in MEAN_CHANGES
    }
    pixels, n_halved = _read(validation.paths, whole, declared)
    session, keeper = OrtSession.open(exact), Gatekeeper(exact, gate)
    try:
        reference, _ = run_in_batches(session, pixels[0])
        refusals = []
        for n, reduced in declared.items():
            how = f"with sides halved {('once', 'twice')[n - 1]}"
            if len(n_halved[n]) < LEAST_IMAGES:
                refusals.append(
                    f"{how}: {len(n_halved[n])} validation images are large enough, {LEAST_IMAGES} are needed"
                )
                continue
            mean = float(np.abs(pixels[n][n_halved[n]].astype(np.int16) - pixels[0][n_halved[n]]).mean())
            compared, reasons = keeper.compare(reference, run_in_batches(session, pixels[n])[0], validation)
            if mean > MEAN_CHANGES[n]:
                reasons = (f"mean change of a pixel {mean:.2f} gray levels, limit {MEAN_CHANGES[n]}", *reasons)
            if reasons:
                refusals.append(f"{how}: {'; '.join(reasons)}")
                continue
            largest = _largest_change(whole, reduced)
            bound = min(255, ceil(_MARGIN * largest))
            checks = (
                Check(name=f"mean change of a pixel {how}, gray levels", value=mean, limit=MEAN_CHANGES[n]),
                Check(
                    name=f"largest change of a pixel by lines and ramps {how}, gray levels", value=largest, limit=bound
                ),
                *(Check(name=f"{each.name}, {how}", value=each.value, limit=each.limit) for each in compared),
            )
            kept = whole.model_copy(update={"jpeg2000": Reduction(halvings=n, max_gray_change=bound)})
            update = {"preprocessing": kept, "checks": (*exact.manifest.checks, *checks)}
            return Bundle.write(
                out, exact.manifest.model_copy(update=update), exact.read_model(), exact.read_probe_bytes()
            )
    finally:
        session.close()
    raise GateError(
        f"JPEG 2000 can't be decoded at reduced resolution for this model: {'; '.join(refusals)}. No bundle was kept. "
        f"Export with --decode exact, or give larger validation images."
    )


def _read(
    paths: tuple[Path, ...], whole: Preprocessing, declared: dict[int, Preprocessing]
) -> tuple[dict[int, Pixels], dict[int, NDArray[np.intp]]]:
    """Return the images' pixels by halvings, 0 for none, and by halvings the rows of the images that have as many."""
    pixels: dict[int, list[Pixels]] = {0: [], **{n: [] for n in declared}}
    rows: dict[int, list[int]] = {n: [] for n in declared}
    with ImageReader(processes=READERS) as reader:

        def load(path: Path) -> tuple[tuple[int, int], dict[int, Pixels]]:
            gray, exact = PixelLoader(whole, None, reader).load(path)
            content = make_dicom(gray.astype(np.uint16) * 257)
            smaller = {n: PixelLoader(each, None, reader).load(content).pixels for n, each in declared.items()}
            return (gray.shape[0], gray.shape[1]), {0: exact, **smaller}

        for row, (shape, loaded) in enumerate(in_order(load, paths, workers=READERS, ahead=2 * READERS)):
            for n, each in loaded.items():
                pixels[n].append(each)
                if n and declared[n].halvings(*shape) == n:
                    rows[n].append(row)
    return {n: np.concatenate(each) for n, each in pixels.items()}, {
        n: np.array(each, np.intp) for n, each in rows.items()
    }


def _largest_change(whole: Preprocessing, reduced: Preprocessing) -> int:
    """Return the largest change of a pixel, in gray levels, by ramps and one-pixel lines in the smallest picture that is halved."""
    assert reduced.jpeg2000 is not None
    side_px = LEAST_SIDES * whole.resize_px << reduced.jpeg2000.halvings
    largest = 0
    with ImageReader() as reader:
        for words in iter_patterns(side_px):
            content = make_dicom(words)
            one, other = (PixelLoader(each, None, reader).load(content).pixels for each in (whole, reduced))
            largest = max(largest, int(np.abs(one.astype(np.int16) - other).max()))
    return largest


def iter_patterns(side_px: int) -> Iterator[NDArray[np.uint16]]:
    """Yield square pictures of black to white, each along the rows and along the columns: a ramp, and lines of one pixel.

    Lines are white on black in one half and black on white in the other.
    """
    ramp = np.tile(np.linspace(0, _WHITE, side_px).round().astype(np.uint16), (side_px, 1))
    patterns = [ramp]
    for period in LINE_PERIODS_PX:
        lines = np.zeros((side_px, side_px), np.uint16)
        lines[:, ::period] = _WHITE
        lines[side_px // 2 :] = _WHITE - lines[side_px // 2 :]
        patterns.append(lines)
    for pattern in patterns:
        yield pattern
        yield np.ascontiguousarray(pattern.T)


def make_dicom(words: NDArray[np.uint16]) -> bytes:
    """Return a DICOM file of lossless JPEG 2000 (PS3.5 section 8.2.4) whose window shows 0 black and 65535 white."""
    stream = io.BytesIO()
    Image.fromarray(words).save(stream, "JPEG2000", no_jp2=True)
    dataset = Dataset()
    dataset.SOPClassUID = DigitalXRayImageStorageForPresentation
    dataset.SOPInstanceUID, dataset.StudyInstanceUID, dataset.SeriesInstanceUID = (UID(f"2.25.{n}") for n in (1, 2, 3))
    dataset.Modality = "DX"
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PixelRepresentation = 1, "MONOCHROME2", 0
    dataset.Rows, dataset.Columns = words.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.WindowCenter, dataset.WindowWidth = 32768, 65536
    dataset.PixelData = encapsulate([stream.getvalue()])
    dataset["PixelData"].VR = "OB"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
    content = io.BytesIO()
    dataset.save_as(content, enforce_file_format=True)
    return content.getvalue()
