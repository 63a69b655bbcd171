"""Seeded samples of the long checks; `make soak` runs them in full."""

from pathlib import Path

import pytest

from benchmarks.robustness import soak
from chexnet_deploy.bundle.bundle import Bundle


def ignore(done: int) -> None:
    pass


@pytest.mark.slow
def test_killed_exports(checkpoint_path: Path, phantom_root: Path, tmp_path: Path) -> None:
    outcome = soak.kill_exports(checkpoint_path, phantom_root, tmp_path, 3, on_done=ignore)
    assert outcome.failures == ()


def test_damaged_bundles(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    outcome = soak.damage_bundles(bundles["int8"].path, tmp_path / "copy", 40, seed=1, on_done=ignore)
    assert (outcome.tried, outcome.failures) == (40, ())


def test_damaged_pngs(phantom_root: Path, tmp_path: Path) -> None:
    image = min((phantom_root / "images").iterdir())
    outcome = soak.damage_pngs(image, tmp_path / "png", 400, seed=1, on_done=ignore)
    assert (outcome.tried, outcome.failures) == (400, ())


def test_predictions(bundles: dict[str, Bundle], phantom_root: Path) -> None:
    image = min((phantom_root / "images").iterdir())
    outcome = soak.predict_often(bundles["int8"].path, image, 100, on_done=ignore)
    assert outcome.failures == ()


def test_a_check_that_fails_says_so(
    bundles: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak.Bundle, "open", lambda path: bundles["int8"])  # accepts anything
    outcome = soak.damage_bundles(bundles["int8"].path, tmp_path / "copy", 4, seed=1, on_done=ignore)
    assert len(outcome.failures) == 4
