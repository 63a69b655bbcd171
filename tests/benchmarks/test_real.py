"""The chain on real radiographs, in small: a real CheXNet, proven with its int8, wherever they are at hand."""

from pathlib import Path

import pytest

from benchmarks.cpu.real import markdown_table, run_all
from chexnet_deploy.datasets.chestxray14 import ChestXray14

N_IMAGES = 240


@pytest.mark.slow
def test_a_real_checkpoint_is_proven_on_official_test_images(real_small: tuple[Path, Path], tmp_path: Path) -> None:
    root, checkpoint = real_small
    dataset = ChestXray14.open(root)
    test = sorted(radiograph.image for radiograph in dataset.split("test"))
    (tmp_path / "images.txt").write_text("\n".join(test[:: len(test) // N_IMAGES][:N_IMAGES]))
    results = run_all(
        checkpoint,
        root,
        tmp_path / "real",
        before=None,
        readers=None,
        images=tmp_path / "images.txt",
        n_calibration=64,
        forms="cpu",
    )
    assert [engine["name"] for engine in results["bench"]["engines"]] == ["fp16", "fp32", "int8"]
    for engine in results["bench"]["engines"]:
        assert engine["verdict"] != "FAIL", engine["reasons"]
        assert engine["parity"]["n_images"] == N_IMAGES
    # Trained on real radiographs: better than chance by far, on patients that nothing has seen.
    assert results["evaluation"]["mean_auroc"] > 0.6
    # Calibration images are of training patients.
    calibration = (tmp_path / "real" / "bundles" / "calibration.txt").read_text().split()
    train_patients = {radiograph.patient for radiograph in dataset.split("train")}
    assert {int(name.split("_")[0]) for name in calibration if name[0].isdigit()} <= train_patients
    assert f"{N_IMAGES} test images" in markdown_table(results)
