"""The trainer: the same run twice gives the same bytes, an interrupted run goes on exactly, and it refuses what it can't use."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing import event_accumulator

from chexnet_deploy.datasets.data_set import open_data
from chexnet_deploy.datasets.findings import FINDINGS
from chexnet_deploy.datasets.patients import PatientSet
from chexnet_deploy.errors import CheckpointError, ChexnetError, DatasetError, SpecError
from chexnet_deploy.export.from_torch.checkpoint import read_checkpoint, write_checkpoint
from chexnet_deploy.images.preprocessing import Preprocessing
from training.logbook import CARD, CURVE, METRICS, TENSORBOARD, THROUGHPUT, epoch_line
from training.recipe import Augmentation, Recipe, read_recipe
from training.start import trained_on
from training.train import BEST, CACHE, RESUME, Options, train

CHECKOUT = Path(__file__).parents[2]

RECIPE = Recipe(
    resize_px=32,
    epochs=3,
    batch_size=16,
    max_learning_rate=1e-3,
    weight_decay=1e-2,
    augmentation=Augmentation(flip_probability=0.5, rotate_degrees=5.0, contrast_share=0.1),
    ema_decay=0.9,
    seed=3,
)


def ignore(phase: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def finished(phantom_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    assert train(phantom_root, RECIPE, run, ignore) == run / BEST
    return run


def interrupt_at(step: int) -> Callable[[str, int, int], None]:
    def on_phase(phase: str, done: int, total: int) -> None:
        if phase == "training" and done == step:
            raise KeyboardInterrupt

    return on_phase


@pytest.mark.slow
def test_an_interrupted_run_goes_on_exactly(finished: Path, phantom_root: Path, tmp_path: Path) -> None:
    steps = len(open_data(phantom_root).split("train").names) // RECIPE.batch_size
    often = Options(save_every=2)
    # Inside the second epoch before anything of it is kept, inside it after two steps are kept, then inside the third.
    for step in (steps + 1, steps + 3, 2 * steps + 1):
        with pytest.raises(KeyboardInterrupt):
            train(phantom_root, RECIPE, tmp_path / "run", interrupt_at(step), options=often)
    train(phantom_root, RECIPE, tmp_path / "run", ignore)
    # Equal to the last bit: the same seed gives the same weights, and so does a run that was cut twice.
    for name in (BEST, METRICS):
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes()


def test_a_finished_run_is_not_run_again(finished: Path, phantom_root: Path) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir() if path.is_file()}
    phases = set()
    train(phantom_root, RECIPE, finished, lambda phase, done, total: phases.add(phase))
    assert "training" not in phases
    assert {path.name: path.read_bytes() for path in finished.iterdir() if path.is_file()} == before


def test_a_run_leaves_what_can_be_looked_at(finished: Path) -> None:
    assert (finished / CURVE).read_bytes().startswith(b"\x89PNG")
    events = event_accumulator.EventAccumulator(str(finished / TENSORBOARD)).Reload()
    logged = [(event.step, event.value) for event in events.Scalars("val_loss")]
    epochs = [json.loads(line) for line in (finished / METRICS).read_text().splitlines()]
    assert logged == [(epoch["epoch"], pytest.approx(epoch["val_loss"])) for epoch in epochs]
    speeds = [json.loads(line) for line in (finished / THROUGHPUT).read_text().splitlines()]
    assert all(line["images_per_s"] > 0 and 0 <= line["data_wait_share"] < 1 for line in speeds)


def test_it_learns_and_keeps_its_best_epoch(finished: Path, phantom_root: Path) -> None:
    epochs = [json.loads(line) for line in (finished / METRICS).read_text().splitlines()]
    assert [epoch["epoch"] for epoch in epochs] == [1, 2, 3]
    assert epochs[2]["train_loss"] < epochs[0]["train_loss"]
    manifest = read_checkpoint(finished / BEST).manifest
    assert manifest.metrics["val_loss"] == min(epoch["val_loss"] for epoch in epochs)
    assert manifest.recipe == RECIPE.model_dump(mode="json")
    assert manifest.preprocessing.resize_px == 32
    assert manifest.split_sha256 == open_data(phantom_root).split_sha256()
    train_patients = set(open_data(phantom_root).split("train").patients.tolist())
    assert manifest.trained_on is not None
    assert manifest.trained_on.patients() == train_patients


@pytest.mark.slow
def test_test_patients_are_never_read(phantom_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(phantom_root, root)
    for name in (root / "test_list.txt").read_text().split():
        (root / "images" / name).write_bytes(b"not an image")
    train(root, RECIPE.model_copy(update={"epochs": 1}), tmp_path / "run", ignore)
    assert (tmp_path / "run" / BEST).is_file()


@pytest.mark.parametrize("change", [{"seed": 4}, {"epochs": 4}, {"max_learning_rate": 2e-3}])
def test_another_recipe_in_the_same_folder_is_refused(
    finished: Path, phantom_root: Path, change: dict[str, float]
) -> None:
    with pytest.raises(CheckpointError, match="another recipe, split"):
        train(phantom_root, RECIPE.model_copy(update=change), finished, ignore)


def test_a_damaged_resume_file_is_refused(phantom_root: Path, tmp_path: Path) -> None:
    (tmp_path / RESUME).write_bytes(b"half a file")
    with pytest.raises(CheckpointError, match="Delete it"):
        train(phantom_root, RECIPE, tmp_path, ignore)


def test_a_loss_that_is_not_finite_stops_the_run(phantom_root: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Lower max_learning_rate"):
        train(phantom_root, RECIPE.model_copy(update={"max_learning_rate": 1e30}), tmp_path / "run", ignore)
    assert not (tmp_path / "run" / BEST).exists()


def test_fewer_images_than_a_batch_are_refused(phantom_root: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="fewer than one batch of 4096"):
        train(phantom_root, RECIPE.model_copy(update={"batch_size": 4096}), tmp_path / "run", ignore)


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("epochs = 3", "epochs = ", "not TOML"),
        ("epochs = 3", "epochs = 0", "epochs"),
        ("epochs = 3", "", "epochs: Field required"),
        ("epochs = 3", "epochs = 3\nrate = 2", "rate"),
    ],
)
def test_a_wrong_recipe_is_refused_by_field(tmp_path: Path, old: str, new: str, found: str) -> None:
    fields = ("resize_px", "epochs", "batch_size", "max_learning_rate", "weight_decay", "seed")
    text = "".join(f"{name} = {getattr(RECIPE, name)}\n" for name in fields)
    assert old in text
    (tmp_path / "recipe.toml").write_text(text.replace(old, new))
    with pytest.raises(SpecError, match=found):
        read_recipe(str(tmp_path / "recipe.toml"))


def test_an_unknown_recipe_is_told_the_known() -> None:
    with pytest.raises(SpecError, match=r"no recipe named .new.\. There are chexnet14, .*modern"):
        read_recipe("new")


def test_another_recipe_is_refused_before_another_cache_is(finished: Path, phantom_root: Path) -> None:
    with pytest.raises(CheckpointError, match="another recipe, split"):
        train(phantom_root, RECIPE.model_copy(update={"resize_px": 64}), finished, ignore)


def test_what_is_not_a_run_is_left_alone(phantom_root: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(SpecError, match="not a run's"):
        train(phantom_root, RECIPE, tmp_path, ignore)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_missing_imagenet_weights_are_told_before_images_are_prepared(phantom_root: Path, tmp_path: Path) -> None:
    recipe, run = RECIPE.model_copy(update={"initial_weights": "imagenet"}), tmp_path / "run"
    with pytest.raises(CheckpointError, match=r"is not there\. Get https"):
        train(phantom_root, recipe, run, ignore, options=Options(imagenet=tmp_path / "none.pth"))
    assert not (run / "cache").exists()


def edit(source: Path, path: Path, **changes: object) -> Path:
    """Write a checkpoint that says something else of itself."""
    checkpoint = read_checkpoint(source)
    write_checkpoint(path, checkpoint.model, checkpoint.manifest.model_copy(update=changes))
    return path


@pytest.mark.slow
def test_a_run_starts_from_a_checkpoint_of_another_resolution_and_other_findings(
    finished: Path, phantom_root: Path, tmp_path: Path
) -> None:
    earlier = edit(finished / BEST, tmp_path / "earlier.safetensors", trained_on=PatientSet.of({99_999}))
    (tmp_path / "recipe.toml").write_text(
        "findings = ['Hernia', 'Mass']\nresize_px = 64\nepochs = 1\nbatch_size = 64\nmax_learning_rate = 1e-12\nseed = 0\n"
    )
    run = tmp_path / "run"
    words = [phantom_root, "--out", run, "--recipe", tmp_path / "recipe.toml", "--start-from", earlier]
    done = subprocess.run(
        [sys.executable, "-m", "training", *map(str, words)], cwd=CHECKOUT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    # Standard output is no terminal here.
    assert re.match(r"epoch 1 of 1: loss [\d.]+, validation loss [\d.]+, mean AUROC .*; 0:00:00 left\n", done.stdout)
    start, made = read_checkpoint(earlier), read_checkpoint(run / BEST)
    assert made.manifest.started_from == start.sha256
    assert made.manifest.recipe["initial_weights"] == "checkpoint"
    # Nothing was learnt at that rate: two outputs of the fourteen, and the features, are as they were.
    rows = [FINDINGS.index("Hernia"), FINDINGS.index("Mass")]
    for name, tensor in made.model.named_parameters():
        earlier_tensor = start.model.state_dict()[name]
        torch.testing.assert_close(
            tensor, earlier_tensor[rows] if name.startswith("classifier") else earlier_tensor, atol=1e-9, rtol=0
        )
    train_patients = set(open_data(phantom_root).split("train").patients.tolist())
    assert made.manifest.trained_on is not None
    assert made.manifest.trained_on.patients() == train_patients | {99_999}
    card = json.loads((run / CARD).read_text())
    assert (card["checkpoint_sha256"], card["started_from"]) == (made.sha256, start.sha256)
    assert card["curve"] == [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    assert card["data"]["split_sha256"] == made.manifest.split_sha256
    assert card["best_epoch"] == 1
    assert 0 < card["hours"] < 1
    assert card["machine"]["cores"] == os.cpu_count()


def test_whom_an_earlier_checkpoint_was_trained_on_stays_unknown(
    finished: Path, phantom_root: Path, tmp_path: Path
) -> None:
    start = read_checkpoint(edit(finished / BEST, tmp_path / "x.safetensors", trained_on=None))
    assert trained_on(open_data(phantom_root), start, None) is None


def test_a_start_that_does_not_fit_is_refused(finished: Path, phantom_root: Path, tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"initial_weights": "checkpoint"})

    def refuse(error: type[ChexnetError], words: str, recipe: Recipe, start_from: Path | None, run: Path) -> None:
        with pytest.raises(error, match=words):
            train(phantom_root, recipe, run, ignore, options=Options(start_from=start_from))
        assert not (run / CACHE).exists() or run == finished

    new = tmp_path / "new"
    refuse(SpecError, 'found initial_weights = "checkpoint" and no checkpoint', recipe, None, new)
    refuse(SpecError, 'found initial_weights = "scratch" and .*best', RECIPE, finished / BEST, new)
    val = set(open_data(phantom_root).split("val").patients.tolist())
    seen = edit(finished / BEST, tmp_path / "seen.safetensors", trained_on=PatientSet.of(val))
    refuse(DatasetError, "that the model was trained on.* needed none for choosing the epoch", recipe, seen, new)
    other = edit(finished / BEST, tmp_path / "other.safetensors", preprocessing=Preprocessing(mean=(0.5, 0.5, 0.5)))
    refuse(SpecError, "another mean and deviation", recipe, other, new)
    refuse(CheckpointError, "can't be read", recipe, tmp_path / "none.safetensors", new)
    refuse(CheckpointError, "checkpoint to start from or teacher", recipe, finished / BEST, finished)


@pytest.mark.parametrize(
    ("left_s", "area", "said"),
    [
        (
            0.4,
            0.81234,
            "epoch 2 of 9: loss 0.1000, validation loss 0.2000, mean AUROC 0.8123 of 14 findings; 0:00:00 left",
        ),
        (3725.0, 0.5, "mean AUROC 0.5000 of 14 findings; 1:02:05 left"),
        (200_000.0, None, "mean AUROC undefined of 14 findings; 2 days, 7:33:20 left"),
    ],
)
def test_an_epoch_in_one_line(left_s: float, area: float | None, said: str) -> None:
    line = {"epoch": 2, "train_loss": 0.1, "val_loss": 0.2, "val_mean_auroc": area, "val_findings_counted": 14}
    assert epoch_line(line, 9, left_s).endswith(said)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "training" / "recipes").iterdir()))
def test_every_shipped_recipe_parses(path: Path) -> None:
    assert read_recipe(str(path)) == read_recipe(path.stem)
