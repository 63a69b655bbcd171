"""How far two trainings lie apart: nothing for the same seed, something for another."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from training.recipe import Recipe
from training.seeds import SEED_NOISE, measure_seed_noise
from training.train import CACHE, Options

CHECKOUT = Path(__file__).parents[2]
RECIPE = "resize_px = 32\nepochs = 1\nbatch_size = 32\nmax_learning_rate = 1e-3\nseed = 3\n"


@pytest.mark.slow
def test_seeds_are_trained_and_compared(phantom_root: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    words = [str(phantom_root), "--out", str(tmp_path / "runs"), "--recipe", str(tmp_path / "recipe.toml")]
    command = [sys.executable, "-m", "training", *words, "--seeds", "2", "--workers", "1"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    noise = json.loads((tmp_path / "runs" / SEED_NOISE).read_text())
    assert noise["seeds"] == [3, 4]
    assert 0 < noise["median_abs_probability_difference"] <= noise["max_abs_probability_difference"] <= 1
    first = next(row for row in noise["findings"] if row["aurocs"] is not None)
    low, high = sorted(first["aurocs"])
    assert first["auroc_mean"] == pytest.approx((low + high) / 2)
    assert first["auroc_sd"] == pytest.approx((high - low) / 2**0.5)  # of two values
    # The same run twice has no noise.
    shutil.rmtree(tmp_path / "runs" / "seed-4")
    shutil.copytree(tmp_path / "runs" / "seed-3", tmp_path / "runs" / "seed-4")
    recipe = Recipe(resize_px=32, epochs=1, batch_size=32, max_learning_rate=1e-3, seed=3)
    options = Options(cache=tmp_path / "runs" / CACHE)
    same = measure_seed_noise(phantom_root, recipe, tmp_path / "runs", [3, 4], options)
    assert (same.max_abs_probability_difference, same.mean_auroc_sd, same.flip_share) == (0.0, 0.0, 0.0)
