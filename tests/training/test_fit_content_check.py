"""Fitting the guard's score: arithmetic by hand, patients kept apart, and the shipped file made again."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from chexnet_deploy.datasets.chestxray14 import ChestXray14
from chexnet_deploy.images.content_check import GuardWeights, ImageGuardPolicy, read_weights
from chexnet_deploy.images.gray import Gray
from training import fit_content_check
from training.fit_content_check import (
    PENALTY,
    Chests,
    Fit,
    all_ways,
    as_json,
    choose_min_score,
    describe_chests,
    describe_drawings,
    fit,
    is_adult,
    main,
    out_of_fold,
)


def test_a_fit_by_hand() -> None:
    """One edge: 1 upright, 0 otherwise. Minimise (w + b - 1)^2 + 2 (b + 1)^2 + penalty w^2."""
    chests = np.zeros((1, 3, 8, 1))
    chests[:, :, 0] = 1
    made = fit(chests, np.zeros((5, 8, 1)))
    # Over b: w + 3 b = -1. Over w: w (1 + penalty) + b = 1. So w = (4 / 3) / (2 / 3 + penalty).
    expected = (4 / 3) / (2 / 3 + PENALTY)
    assert made.weights == pytest.approx([expected])
    assert made.bias == pytest.approx(-(1 + expected) / 3)
    assert made.scores(chests[0]).shape == (3, 8)


def test_out_of_fold_never_scores_a_patient_it_was_fitted_to() -> None:
    """Each patient's images are all ones in a column of his own; a fit remembers whom it saw."""
    patients = np.repeat(np.arange(25), 2)
    ways = np.zeros((1, 50, 8, 25))
    ways[0, np.arange(50), :, patients] = 1

    def seen(some: NDArray[np.float64]) -> Fit:
        return Fit(some.sum(axis=(0, 1, 2)), 0.0)

    assert (out_of_fold(Chests(ways, patients), seen) == 0).all()
    assert (seen(ways).scores(ways[0]) == 16).all()


def test_the_strictest_score_refuses_none() -> None:
    scores = np.array([0.9, 0.517, 0.6])
    assert choose_min_score(scores) == 0.51
    assert (scores >= choose_min_score(scores)).all()
    assert choose_min_score(np.array([-0.001])) == -0.01


def test_a_mirror_image_is_the_same_to_the_fit(rng: np.random.Generator) -> None:
    gray = rng.integers(0, 256, (128, 128), np.uint8)
    np.testing.assert_allclose(all_ways(gray), all_ways(np.ascontiguousarray(gray[:, ::-1])), atol=1e-9)


def test_the_test_list_is_never_opened(phantom: ChestXray14, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def spy(path: Path) -> Gray:
        opened.append(path.name)
        return fit_content_check.thumbnail(np.arange(4096, dtype=np.uint32).reshape(64, 64).astype(np.uint8))

    monkeypatch.setattr(fit_content_check, "read_image", spy)
    monkeypatch.setattr(fit_content_check, "N_DRAWINGS", 3)
    out = tmp_path / "weights.json"
    main(phantom.root, out)
    train_val = [radiograph.image for name in ("train", "val") for radiograph in phantom.split(name)]  # type: ignore[arg-type]
    assert opened == train_val
    assert GuardWeights.model_validate_json(out.read_bytes()).n_images == len(train_val)


def test_the_file_is_written_as_it_is_read(phantom: ChestXray14) -> None:
    radiographs = phantom.split("val")
    made = Fit(np.linspace(-1, 1, 512), 0.25)
    text = as_json(made, radiographs)
    stored = GuardWeights.model_validate_json(text)
    np.testing.assert_allclose(stored.as_edges().ravel(), made.weights, atol=5e-5)
    assert (stored.bias, stored.n_images) == (0.25, len(radiographs))
    assert list(json.loads(text)) == list(GuardWeights.model_fields)


@pytest.mark.dataset
@pytest.mark.slow
def test_the_shipped_score_is_made_again(real_root: Path) -> None:
    dataset = ChestXray14.open(real_root)
    radiographs = dataset.split("train") + dataset.split("val")
    shipped = read_weights()
    if len(radiographs) != shipped.n_images:
        pytest.skip(
            f"NOT RUN: {len(radiographs)} train_val images are here, the score was fitted to {shipped.n_images}"
        )
    chests, drawings = describe_chests(radiographs), describe_drawings()
    made = GuardWeights.model_validate_json(as_json(fit(chests.ways, drawings), radiographs))
    assert made.images_sha256 == shipped.images_sha256
    # Pillow's rotations are in floating point: another machine may differ in the last digits.
    np.testing.assert_allclose(made.as_edges(), shipped.as_edges(), atol=5e-3)
    scores = out_of_fold(chests, lambda ways: fit(ways, drawings))
    adults = [is_adult(radiograph) for radiograph in radiographs]
    assert choose_min_score(scores[adults, 0]) == pytest.approx(ImageGuardPolicy().min_score, abs=0.015)
    assert (scores[:, 0] == scores.max(axis=1)).all()
