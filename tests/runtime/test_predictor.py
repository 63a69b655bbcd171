import math
from pathlib import Path

import numpy as np
import pytest

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.datasets.chestxray14 import ChestXray14
from chexnet_deploy.datasets.findings import FINDINGS
from chexnet_deploy.errors import ImageError, ImageRefusedError, SessionError
from chexnet_deploy.images.content_check import ImageGuardPolicy
from chexnet_deploy.images.preprocessing import Pixels
from chexnet_deploy.images.reader import read_image
from chexnet_deploy.images.scope import ScopePolicy
from chexnet_deploy.runtime.predictor import Predictor, draw_cam
from chexnet_deploy.runtime.sessions.base import Logits, Maps, sigmoid
from chexnet_deploy.runtime.sessions.open import open_session


@pytest.fixture(scope="module")
def image(phantom: ChestXray14) -> Path:
    path = phantom.split("test")[0].path
    assert path is not None
    return path


def test_sigmoid_by_hand() -> None:
    logits = np.array([0.0, math.log(3.0), -math.log(3.0)], np.float32)
    assert sigmoid(logits).dtype == np.float32
    assert sigmoid(logits).tolist() == pytest.approx([0.5, 0.75, 0.25], abs=1e-7)


def test_sigmoid_of_extremes_is_exact_and_silent() -> None:
    # A warning would be an error here.
    assert sigmoid(np.array([1000.0, -1000.0, np.inf, -np.inf], np.float32)).tolist() == [1.0, 0.0, 1.0, 0.0]
    assert np.isnan(sigmoid(np.array([np.nan], np.float32))).all()


def test_probabilities_are_the_sigmoid_of_the_logits(bundles: dict[str, Bundle], image: Path) -> None:
    bundle = bundles["fp32"]
    pixels = bundle.manifest.preprocessing(read_image(image))
    logits, _ = open_session(bundle).run(pixels)
    with Predictor.open(bundle.path) as predictor:
        prediction = predictor.predict(image)
    assert tuple(prediction.probabilities) == FINDINGS
    for name, logit in zip(FINDINGS, logits[0].tolist(), strict=True):
        assert prediction.probabilities[name] == pytest.approx(1.0 / (1.0 + math.exp(-logit)), abs=1e-5)


def test_path_text_and_array_give_the_same(bundles: dict[str, Bundle], image: Path) -> None:
    with Predictor.open(str(bundles["fp32"].path), threads=1, provider="cpu") as predictor:
        first, *others = (predictor.predict(source) for source in (image, str(image), read_image(image)))
    assert all(other.probabilities == first.probabilities for other in others)


def test_a_batch_keeps_its_order(bundles: dict[str, Bundle], phantom: ChestXray14) -> None:
    paths = [radiograph.path for radiograph in phantom.split("test")[:5] if radiograph.path is not None]
    with Predictor.open(bundles["fp32"].path, provider="cpu") as predictor:
        together = predictor.predict_batch(paths)
        for path, prediction in zip(paths, together, strict=True):
            assert prediction.probabilities == pytest.approx(predictor.predict(path).probabilities, abs=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_the_mean_of_a_map_and_the_bias_is_the_logit(bundles: dict[str, Bundle], image: Path, precision: str) -> None:
    bundle = bundles[precision]
    with Predictor.open(bundle.path) as predictor:
        prediction = predictor.predict(image)
    for name, bias in zip(FINDINGS, bundle.manifest.head_bias, strict=True):
        p = prediction.probabilities[name]
        assert float(prediction.maps[name].mean()) + bias == pytest.approx(math.log(p / (1 - p)), abs=1e-3)


def test_operating_points_decide_what_is_present(bundles: dict[str, Bundle], image: Path) -> None:
    bundle = bundles["fp32"]
    session = open_session(bundle, threads=1, provider="cpu")
    probabilities = Predictor(session, bundle.manifest).predict(image).probabilities
    points = {"Mass": probabilities["Mass"], "Edema": math.nextafter(probabilities["Edema"], 1.0), "Hernia": 0.0}
    manifest = bundle.manifest.model_copy(update={"operating_points": points})
    prediction = Predictor(session, manifest).predict(image)
    assert prediction.present == {"Mass": True, "Edema": False, "Hernia": True}


def test_no_images_and_wrong_images_are_refused(bundles: dict[str, Bundle]) -> None:
    with Predictor.open(bundles["fp32"].path, provider="cpu") as predictor:
        with pytest.raises(SessionError, match="got no images"):
            predictor.predict_batch([])
        with pytest.raises(ImageError, match="uint8"):
            predictor.predict(np.zeros((32, 32), np.float32))  # type: ignore[arg-type]


def test_a_closed_predictor_refuses(bundles: dict[str, Bundle], image: Path) -> None:
    with Predictor.open(bundles["fp32"].path, provider="cpu") as predictor:
        pass
    with pytest.raises(SessionError, match="closed"):
        predictor.predict(image)


@pytest.mark.parametrize("cam", [np.zeros((7, 7)), np.full((7, 7), -3.0), -np.arange(49.0).reshape(7, 7)])
def test_a_map_without_evidence_leaves_the_image_gray(rng: np.random.Generator, cam: np.ndarray) -> None:
    gray = rng.integers(0, 256, (40, 60), dtype=np.uint8)
    drawn = draw_cam(gray, cam.astype(np.float32))
    assert (drawn.dtype, drawn.shape) == (np.uint8, (40, 60, 3))
    assert (drawn == gray[..., None]).all()


def test_evidence_is_red_and_the_rest_stays_gray() -> None:
    gray = np.full((64, 64), 100, np.uint8)
    cam = np.full((4, 4), -1.0, np.float32)
    cam[0, 0] = 5.0
    drawn = draw_cam(gray, cam)
    # Full heat is half opaque red: 100 / 2 + 255 / 2 = 177.5 and 100 / 2 = 50.
    assert drawn[0, 0].tolist() == [178, 50, 50]
    assert (drawn[32:, 32:] == 100).all()


def test_the_known_answers_can_be_checked_again(bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    with Predictor.open(bundles["fp32"].path, threads=1, provider="cpu") as predictor:
        predictor.self_test()
        monkeypatch.setattr(predictor._session, "run", lambda pixels: _wrong(predictor, pixels))
        with pytest.raises(SessionError, match="known answers differ"):
            predictor.self_test()
    with pytest.raises(SessionError, match="found no bundle"):
        Predictor(predictor._session, bundles["fp32"].manifest).self_test()


def _wrong(predictor: Predictor, pixels: Pixels) -> tuple[Logits, Maps]:
    logits, maps = type(predictor._session).run(predictor._session, pixels)
    return logits + 1.0, maps


def test_a_scope_may_guard_the_picture(bundles: dict[str, Bundle], image: Path) -> None:
    scope = ScopePolicy(picture=ImageGuardPolicy())
    manifest = bundles["fp32"].manifest.model_copy(update={"scope": scope})
    with (
        Predictor(open_session(bundles["fp32"], provider="cpu"), manifest) as predictor,
        pytest.raises(ImageRefusedError) as caught,
    ):
        predictor.predict(image)
    assert caught.value.reason == "too-small"  # a phantom of 32 px
