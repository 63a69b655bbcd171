import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chexnet_deploy.datasets.data_set import DataSet, open_data
from chexnet_deploy.errors import CalibrationError, DatasetError
from chexnet_deploy.export.quantize.calibration import MIN_IMAGES, CalibrationSet, choose_calibration, coverage
from chexnet_deploy.images.preprocessing import Preprocessing
from chexnet_deploy.images.reader import read_image

PREPROCESSING = Preprocessing(resize_px=32)


@pytest.fixture(scope="module")
def train_names(phantom_data: DataSet) -> list[str]:
    return [*phantom_data.split("train").names]


@pytest.fixture
def own_root(phantom_root: Path, tmp_path: Path) -> Path:
    root = tmp_path / "own"
    shutil.copytree(phantom_root, root)
    return root


def path_of(dataset: DataSet, name: str) -> Path:
    path = dataset.select([name]).paths[0]
    assert path is not None
    return path


def test_order_names_and_pixels_are_kept(phantom_data: DataSet, train_names: list[str]) -> None:
    names = train_names[:MIN_IMAGES][::-1]
    seen: list[int] = []
    chosen = CalibrationSet.read(phantom_data, names, PREPROCESSING, on_images=seen.append)
    assert chosen.images == tuple(names)
    assert (chosen.pixels.dtype, chosen.pixels.shape) == (np.uint8, (MIN_IMAGES, 1, 32, 32))
    for place in (0, 50, MIN_IMAGES - 1):
        expected = PREPROCESSING(read_image(path_of(phantom_data, names[place])))[0]
        assert (chosen.pixels[place] == expected).all()
    assert seen == list(range(1, MIN_IMAGES + 1))


def test_the_hash_is_of_names_and_pixels(phantom_data: DataSet, train_names: list[str]) -> None:
    names = train_names[:MIN_IMAGES]
    chosen = CalibrationSet.read(phantom_data, names, PREPROCESSING)
    digests = [hashlib.sha256(pixels.tobytes()).hexdigest() for pixels in chosen.pixels]
    listing = "".join(f"{name} {digest}\n" for name, digest in zip(names, digests, strict=True))
    assert chosen.sha256 == hashlib.sha256(listing.encode()).hexdigest()
    assert CalibrationSet.read(phantom_data, names[::-1], PREPROCESSING).sha256 != chosen.sha256


def test_one_changed_image_changes_the_hash(phantom_data: DataSet, own_root: Path, train_names: list[str]) -> None:
    names = train_names[:MIN_IMAGES]
    before = CalibrationSet.read(phantom_data, names, PREPROCESSING)
    own = open_data(own_root)
    assert CalibrationSet.read(own, names, PREPROCESSING).sha256 == before.sha256
    path = path_of(own, names[42])
    gray = read_image(path).copy()
    gray[0, 0] ^= 1
    Image.fromarray(gray).save(path)
    after = CalibrationSet.read(own, names, PREPROCESSING)
    assert after.images == before.images
    assert after.sha256 != before.sha256


def test_too_few_are_refused(phantom_data: DataSet, train_names: list[str]) -> None:
    with pytest.raises(
        CalibrationError, match=f"got {MIN_IMAGES - 1} calibration images, needed {MIN_IMAGES} to 4,096"
    ):
        CalibrationSet.read(phantom_data, train_names[: MIN_IMAGES - 1], PREPROCESSING)


def test_a_repeated_name_is_refused(phantom_data: DataSet, train_names: list[str]) -> None:
    names = [*train_names[:MIN_IMAGES], train_names[3]]
    with pytest.raises(CalibrationError, match=f"names {train_names[3]} twice"):
        CalibrationSet.read(phantom_data, names, PREPROCESSING)


def test_an_unknown_name_is_refused(phantom_data: DataSet, train_names: list[str]) -> None:
    with pytest.raises(DatasetError, match=r"99999999_000\.png"):
        CalibrationSet.read(phantom_data, [*train_names[:MIN_IMAGES], "99999999_000.png"], PREPROCESSING)


def test_the_same_pixels_under_two_names_are_refused(own_root: Path, train_names: list[str]) -> None:
    own = open_data(own_root)
    shutil.copyfile(path_of(own, train_names[0]), path_of(own, train_names[7]))
    with pytest.raises(CalibrationError, match="two images have the same pixels"):
        CalibrationSet.read(own, train_names[:MIN_IMAGES], PREPROCESSING)


def test_a_constant_image_is_refused_by_name(own_root: Path, train_names: list[str]) -> None:
    own = open_data(own_root)
    Image.fromarray(np.full((32, 32), 128, np.uint8)).save(path_of(own, train_names[5]))
    with pytest.raises(CalibrationError, match=f"{train_names[5]} has one gray value"):
        CalibrationSet.read(own, train_names[:MIN_IMAGES], PREPROCESSING)


@pytest.mark.parametrize("split", ["val", "test"])
def test_an_evaluation_patient_is_refused_by_name(phantom_data: DataSet, train_names: list[str], split: str) -> None:
    kept = phantom_data.split("val" if split == "val" else "test").names[0]
    with pytest.raises(CalibrationError, match=rf"1 patients .* kept for validation or test: '{kept}'\."):
        CalibrationSet.read(phantom_data, [*train_names[:MIN_IMAGES], kept], PREPROCESSING)


@pytest.mark.parametrize("n_images", [100, 107])
def test_the_choice_is_of_training_images_and_always_the_same(
    phantom_data: DataSet, phantom_root: Path, train_names: list[str], n_images: int
) -> None:
    chosen = choose_calibration(phantom_data, n_images)
    assert len(chosen) == len(set(chosen)) == n_images
    assert set(chosen) <= set(train_names)
    assert choose_calibration(open_data(phantom_root), n_images) == chosen


def test_the_choice_covers_findings_sexes_and_views(phantom_data: DataSet) -> None:
    available = coverage(phantom_data.split("train"))
    chosen = coverage(phantom_data.select(choose_calibration(phantom_data, 100)))
    assert set(chosen) == set(available) >= {"F", "M", "AP", "PA", "No Finding"}
    assert chosen["F"] + chosen["M"] == chosen["AP"] + chosen["PA"] == 100
    # A 28th of 100 is 3.
    assert all(count >= min(3, available[name]) for name, count in chosen.items())


def test_all_training_images_can_be_chosen(phantom_data: DataSet, train_names: list[str]) -> None:
    assert choose_calibration(phantom_data, len(train_names)) == tuple(sorted(train_names))


@pytest.mark.parametrize("extra", [MIN_IMAGES - 1, 100_000])
def test_a_number_that_can_not_be_chosen_is_refused(phantom_data: DataSet, train_names: list[str], extra: int) -> None:
    with pytest.raises(CalibrationError, match=f"asked for {extra} .* holds {len(train_names)} on disk"):
        choose_calibration(phantom_data, extra)
