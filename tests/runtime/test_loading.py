"""One way from a file to pixels; whether scope and content check apply is one argument."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.rigs.synthetic_dicom import make_dicom
from chexnet_deploy.bundle.manifest import Manifest
from chexnet_deploy.errors import ImageError, ImageRefusedError, RefusalReason
from chexnet_deploy.images.content_check import ImageGuardPolicy
from chexnet_deploy.images.preprocessing import Preprocessing
from chexnet_deploy.images.reader import ImageReader, read_image
from chexnet_deploy.images.scope import ScopePolicy
from chexnet_deploy.runtime.loading import PixelLoader
from chexnet_deploy.runtime.score import iter_pixels
from tests.tiny import tiny_manifest

CHILD = make_dicom(edits={"PatientAge": "005Y"})


def manifest(scope: ScopePolicy | None = None) -> Manifest:
    return tiny_manifest(
        {"model.onnx": b"m", "probe.npz": b"p"}, preprocessing=Preprocessing(resize_px=32), scope=scope
    )


@pytest.fixture
def reader() -> Iterator[ImageReader]:
    with ImageReader() as reader:
        yield reader


@pytest.fixture
def png(tmp_path: Path, rng: np.random.Generator) -> Path:
    Image.fromarray(rng.integers(0, 256, (60, 80), dtype=np.uint8)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.mark.parametrize("checks", [True, False])
def test_path_text_bytes_and_array_give_the_same(reader: ImageReader, png: Path, checks: bool) -> None:
    loader = PixelLoader.of(manifest(), reader, checks=checks)
    gray = read_image(png)
    for image in (png, str(png), png.read_bytes(), gray):
        loaded = loader.load(image)
        np.testing.assert_array_equal(loaded.gray, gray)
        np.testing.assert_array_equal(loaded.pixels, Preprocessing(resize_px=32)(gray))
        np.testing.assert_array_equal(loader.read(image), gray)


def test_a_dicom_header_out_of_scope_is_refused_only_with_checks(reader: ImageReader, tmp_path: Path) -> None:
    path = tmp_path / "child.dcm"
    path.write_bytes(CHILD)
    checked, unchecked = (PixelLoader.of(manifest(), reader, checks=checks) for checks in (True, False))
    for load in (checked.load, checked.read, checked.read_dicom):
        with pytest.raises(ImageRefusedError, match=r"child\.dcm: found a patient age outside") as caught:
            load(path)
        assert caught.value.reason is RefusalReason.AGE
    with pytest.raises(ImageRefusedError, match="the image: found a patient age outside"):
        checked.load(CHILD)
    assert unchecked.load(path).gray.shape == unchecked.read_dicom(path).gray.shape == (48, 40)
    children = PixelLoader.of(manifest(ScopePolicy(age_years=(0, 120))), reader, checks=True)
    np.testing.assert_array_equal(children.load(path).pixels, unchecked.load(path).pixels)


def test_the_content_check_applies_only_with_checks(reader: ImageReader, png: Path) -> None:
    guarded = manifest(ScopePolicy(picture=ImageGuardPolicy()))
    for image in (png, png.read_bytes(), read_image(png)):
        with pytest.raises(ImageRefusedError) as caught:
            PixelLoader.of(guarded, reader, checks=True).load(image)
        assert caught.value.reason is RefusalReason.TOO_SMALL
        assert PixelLoader.of(guarded, reader, checks=False).load(image).gray.shape == (60, 80)


@pytest.mark.parametrize("checks", [True, False])
@pytest.mark.parametrize("wrong", [np.zeros((32, 32), np.float32), np.zeros((2, 32, 32), np.uint8), [[0]]])
def test_an_array_that_is_no_gray_picture_is_always_refused(reader: ImageReader, wrong: Any, checks: bool) -> None:
    with pytest.raises(ImageError, match="uint8"):
        PixelLoader.of(manifest(), reader, checks=checks).load(wrong)


@pytest.mark.parametrize("checks", [True, False])
def test_an_unreadable_file_is_always_refused(reader: ImageReader, checks: bool) -> None:
    with pytest.raises(ImageError, match="neither a PNG"):
        PixelLoader.of(manifest(), reader, checks=checks).load(b"text")


def test_read_dicom_refuses_other_formats(reader: ImageReader, png: Path) -> None:
    with pytest.raises(ImageRefusedError):
        PixelLoader.of(manifest(), reader, checks=True).read_dicom(png)


def test_files_that_are_scored_are_not_checked(tmp_path: Path) -> None:
    path = tmp_path / "child.dcm"
    path.write_bytes(CHILD)
    (pixels,) = iter_pixels([path], Preprocessing(resize_px=32))
    with ImageReader() as reader:
        np.testing.assert_array_equal(pixels, Preprocessing(resize_px=32)(reader.decode(CHILD)))


def blank(syntax: str) -> bytes:
    """Return a DICOM radiograph whose window leaves nothing of it."""
    return make_dicom(syntax=syntax, edits={"WindowCenter": 30000, "WindowWidth": 10})


def test_a_blank_picture_is_refused_by_every_way_in(reader: ImageReader, tmp_path: Path) -> None:
    black = np.zeros((60, 80), np.uint8)
    checked, unchecked = (PixelLoader.of(manifest(), reader, checks=checks) for checks in (True, False))
    for kind in ("PNG", "JPEG"):
        Image.fromarray(black).save(tmp_path / "black", kind)
        for image in (tmp_path / "black", str(tmp_path / "black"), (tmp_path / "black").read_bytes()):
            assert refused(checked, image) is RefusalReason.BLANK
    assert refused(checked, black) is RefusalReason.BLANK
    for syntax in ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.90"):
        assert refused(checked, blank(syntax)) is RefusalReason.BLANK
    assert not unchecked.load(black).gray.any()  # a labelled list says what is in it


def refused(loader: PixelLoader, image: Any) -> RefusalReason:
    with pytest.raises(ImageRefusedError, match="almost nothing in the picture") as caught:
        loader.load(image)
    return caught.value.reason
