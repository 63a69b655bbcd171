"""Reduced decoding is kept only where the model answers as it does to every pixel."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.datasets.findings import FINDINGS
from chexnet_deploy.datasets.labelled import LabelledImages
from chexnet_deploy.errors import GateError
from chexnet_deploy.evaluation.spec import Gate
from chexnet_deploy.export.decoding import LEAST_IMAGES, iter_patterns, make_dicom, reduce_decoding
from chexnet_deploy.images.reader import ImageReader
from chexnet_deploy.runtime.loading import PixelLoader
from chexnet_deploy.runtime.predictor import Predictor

WIDE = Gate(
    auroc_margin={"default": 0.5},
    max_abs_probability_difference=0.5,
    p999_abs_probability_difference=0.5,
    latency="not gated",
)


def labelled(folder: Path, pictures: list[NDArray[np.uint8]]) -> LabelledImages:
    paths = [folder / f"{i}.png" for i in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        Image.fromarray(picture).save(path)
    n = len(paths)
    return LabelledImages(
        names=tuple(path.name for path in paths),
        files=tuple(map(str, paths)),
        findings=FINDINGS,
        labels=np.tile(np.arange(n)[:, np.newaxis] % 2, (1, 14)).astype(np.int8),
        patients=np.arange(n),
        sex=("unknown",) * n,
        age_years=np.full(n, np.nan),
        view=("unknown",) * n,
    )


def waves(side_px: int) -> list[NDArray[np.uint8]]:
    """Smooth pictures, each of another wave."""
    y, x = np.indices((side_px, side_px)) / side_px
    return [np.uint8(127.5 + 100 * np.sin(6 * x + i) * np.cos((3 + i / 5) * y)) for i in range(LEAST_IMAGES)]


@pytest.mark.parametrize(("side_px", "halvings"), [(256, 2), (160, 1)])
def test_as_many_halvings_as_pass_are_kept(
    bundles: dict[str, Bundle], tmp_path: Path, side_px: int, halvings: int
) -> None:
    # The model takes 32 px: halved once a side has 64 at the least, twice from 256 on.
    exact = bundles["fp32"]
    made = reduce_decoding(exact, tmp_path / "fp32", WIDE, labelled(tmp_path, waves(side_px)))
    reduction = made.manifest.preprocessing.jpeg2000
    assert reduction is not None
    assert reduction.halvings == halvings
    assert made.model_sha256 == exact.model_sha256
    assert made.manifest.preprocessing.model_copy(update={"jpeg2000": None}) == exact.manifest.preprocessing
    new = made.manifest.checks[len(exact.manifest.checks) :]
    assert all(check.value <= check.limit for check in new)
    by_name = {check.name.split(",")[0].split(" with ")[0]: check for check in new}
    assert by_name["mean change of a pixel"].value <= {1: 0.3, 2: 1.0}[halvings]
    assert by_name["largest change of a pixel by lines and ramps"].limit == reduction.max_gray_change
    # The bound holds for lines at distances that it wasn't measured at.
    lines = np.zeros((256, 256), np.uint16)
    lines[::11] = 65535
    with ImageReader() as reader, Predictor.open(made.path, provider="cpu") as predictor:
        content = make_dicom(lines)
        assert predictor.loader.preprocessing == made.manifest.preprocessing
        one, other = (PixelLoader(b.manifest.preprocessing, None, reader).load(content).pixels for b in (exact, made))
    assert 0 < np.abs(one.astype(int) - other).max() <= reduction.max_gray_change


def test_what_fails_is_said_and_nothing_is_kept(
    bundles: dict[str, Bundle], tmp_path: Path, rng: np.random.Generator
) -> None:
    with pytest.raises(GateError, match=r"halved twice: 0 validation images are large enough, 20 .*halved once: 0 val"):
        reduce_decoding(bundles["fp32"], tmp_path / "small", WIDE, labelled(tmp_path, waves(96)))
    grain = [rng.integers(0, 256, (128, 128), dtype=np.uint8) for _ in range(LEAST_IMAGES)]
    with pytest.raises(GateError, match=r"halved once: mean change of a pixel \d+\.\d+ gray levels, limit 0\.3"):
        reduce_decoding(bundles["fp32"], tmp_path / "grain", WIDE, labelled(tmp_path, grain))
    tight = WIDE.model_copy(update={"max_abs_probability_difference": 1e-9})
    with pytest.raises(GateError, match=r"halved twice: .*probability.*halved once: .*probability"):
        reduce_decoding(bundles["fp32"], tmp_path / "tight", tight, labelled(tmp_path, waves(256)))
    assert not any((tmp_path / name).exists() for name in ("small", "grain", "tight"))


def test_patterns_by_hand() -> None:
    ramp, ramp_down, lines, *_ = iter_patterns(8)
    assert ramp[0].tolist() == [0, 9362, 18724, 28086, 37449, 46811, 56173, 65535]
    assert (ramp_down == ramp.T).all()
    assert lines[0].tolist() == [65535, 0] * 4
    assert lines[7].tolist() == [0, 65535] * 4
