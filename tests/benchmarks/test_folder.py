from pathlib import Path

import numpy as np
import pytest

from benchmarks.cpu.folder import LOOPS, Sample, Speed, draw_phantoms, settled_rate, summarise
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.images.reader import read_image


def test_phantoms_are_drawn_in_their_eight_turns(tmp_path: Path) -> None:
    seen: list[int] = []
    draw_phantoms(tmp_path / "drawn", 10, 1, lambda phase, done, total: seen.append(done))
    files = sorted((tmp_path / "drawn").iterdir())
    assert len({file.read_bytes() for file in files}) == len(files) == 10
    assert {read_image(file).shape for file in files} == {(1024, 1024)}
    assert seen == [8, 10]


def test_dicom_phantoms_show_the_same_pictures(tmp_path: Path) -> None:
    for name in ("png", "dcm"):
        draw_phantoms(tmp_path / name, 2, 1, lambda phase, done, total: None, as_dicom=name == "dcm")
    for file in (tmp_path / "png").iterdir():
        packed = read_image(tmp_path / "dcm" / file.with_suffix(".dcm").name)
        assert np.abs(packed.astype(int) - read_image(file)).max() <= 1  # of 255, in 12 bits without a window


def test_the_bound_and_the_bar_by_hand(bundles: dict[str, Bundle]) -> None:
    # 300 images from the hundredth row on in 20 s: 15 a second. Decoding 100/s and computing 25/s share the cores: 20/s.
    run = [Sample(1.0, 20, 90.0), Sample(5.0, 100, 100.0), Sample(15.0, 300, 104.0), Sample(25.0, 400, 102.0)]
    assert settled_rate(run) == 15.0
    speeds = {
        "decode": [Speed(100.0, 10.0)] * 3,
        "infer, one call on all cores": [Speed(20.0, 50.0)] * 3,
        "infer, a call on each core": [Speed(5.0, 1.0), Speed(25.0, 40.0), Speed(30.0, 41.0)],
        LOOPS: [Speed(12.0, 80.0), Speed(10.0, 90.0), Speed(14.0, 70.0)],
        "whole": [Speed(15.0, 66.0)] * 3,
    }
    results = summarise(bundles["fp32"], 400.0, speeds, [run], 2, "cpu")
    assert results["additive_bound_images_per_s"] == pytest.approx(20.0)
    assert results["times_additive_bound"] == pytest.approx(0.75)
    assert results["times_loops"] == pytest.approx(1.25)
    assert results["memory_growth_mib"] == 4.0
    assert results["memory_is_flat"]
    assert results["whole_with_start_images_per_s"] == 16.0
