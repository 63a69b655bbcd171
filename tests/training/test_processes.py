"""Two processes are one: the same steps, the same weights, the same validation answers."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from chexnet_deploy.datasets.data_set import open_data
from chexnet_deploy.export.from_torch.checkpoint import read_checkpoint
from chexnet_deploy.export.from_torch.model import Normalise
from chexnet_deploy.metrics.roc import auroc, mean_auroc
from training.logbook import METRICS
from training.processes import Processes
from training.recipe import Recipe
from training.train import BEST, CACHE, Options, read_images, train, validation_logits

CHECKOUT = Path(__file__).parents[2]
RECIPE = Recipe(resize_px=32, epochs=1, batch_size=16, max_learning_rate=1e-3, ema_decay=0.9, seed=3)


def ignore(phase: str, done: int, total: int) -> None:
    pass


@pytest.mark.slow
def test_two_processes_equal_one_that_takes_both_shards(phantom_root: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    lines = RECIPE.model_dump(exclude_defaults=True)
    recipe.write_text("".join(f"{name} = {value}\n" for name, value in lines.items()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "training"]
    words = [str(phantom_root), "--out", str(tmp_path / "two"), "--recipe", str(recipe)]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *words], cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of the two has; other threads sum in another order, which Adam magnifies
    train(phantom_root, RECIPE, tmp_path / "one", ignore, options=Options(shards=2))
    torch.set_num_threads(threads)
    two, one = (load_file(tmp_path / name / BEST) for name in ("two", "one"))
    assert two.keys() == one.keys()
    for name, weights in one.items():
        np.testing.assert_allclose(two[name], weights, atol=1e-5, rtol=1e-5, err_msg=name)
    lines_two, lines_one = (json.loads((tmp_path / name / METRICS).read_text()) for name in ("two", "one"))
    for name, value in lines_one.items():
        assert lines_two[name] == pytest.approx(value, abs=1e-5), name
    # Of the same weights, to the last digit: the kept ones, validated here by one process and there by two.
    validated = validate_alone(phantom_root, tmp_path / "two")
    assert validated == lines_two["val_mean_auroc"]


def validate_alone(root: Path, run: Path) -> float:
    checkpoint = read_checkpoint(run / BEST)
    val = read_images(open_data(root), RECIPE, run / CACHE)["val"]
    normalise = Normalise(checkpoint.manifest.preprocessing)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = checkpoint.model.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    logits = validation_logits(model, normalise, val, torch.device("cpu"))
    torch.set_num_threads(threads)
    areas = {name: auroc(logits[:, c], val.truth[:, c] > 0) for c, name in enumerate(RECIPE.findings)}
    return mean_auroc(areas).value


def test_shards_are_dealt_in_order() -> None:
    assert [list(Processes(rank, 2).my_shards(4)) for rank in (0, 1)] == [[0, 1], [2, 3]]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="NOT RUN without glibc, which alone has mallopt")
def test_freed_memory_is_taken_again_without_asking_the_system() -> None:
    code = """
import resource
from training.processes import keep_freed_memory
keep_freed_memory()
import torch

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

counts = []
for _ in range(3):
    before = faults()
    torch.ones(64_000_000)
    counts.append(faults() - before)
print(*counts)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=CHECKOUT, check=True
    )
    first, *later = map(int, done.stdout.split())
    assert first > 100  # huge pages of 2 MiB, or more pages of 4 KiB
    assert max(later) < 10
