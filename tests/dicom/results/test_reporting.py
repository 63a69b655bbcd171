"""`predict --dicom-out`: DICOM radiographs in, DICOM results out, by the command a user types."""

import gc
import json
import shutil
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import pydicom
import pytest

from benchmarks.rigs.node_rig import write_radiograph
from chexnet_deploy import Predictor
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.dicom.results.reporter import Reporter
from chexnet_deploy.dicom.results.result import Device
from tests.cli.test_cli import chexnet


@pytest.mark.slow
def test_each_radiograph_gets_a_folder_of_valid_objects(
    bundles: dict[str, Bundle], dciodvfy: Callable[[list[Path]], dict[Path, list[str]]], tmp_path: Path
) -> None:
    study, out, bundle = tmp_path / "study", tmp_path / "results", bundles["fp32"]
    for series in "ab":  # files of one name, as scanners write them
        (study / series).mkdir(parents=True)
    uids = [str(write_radiograph(study / s / "IM1.dcm", seed=i).SOPInstanceUID) for i, s in enumerate("ab")]
    (study / "c.dcm").write_bytes(b"no DICOM")
    done = chexnet("predict", bundle.path, study, "--dicom-out", out, "--serial-number", "S-1", "--json")
    assert done.returncode == 3, done.stderr
    answers = json.loads(done.stdout)
    assert "quarantined" in answers["c.dcm"]
    assert sorted(path.name for path in out.iterdir()) == sorted(uids)
    with Predictor.open(bundle.path) as predictor:
        for uid, series in zip(uids, "ab", strict=True):
            expected = predictor.predict(study / series / "IM1.dcm")
            assert answers[f"{series}/IM1.dcm"]["probabilities"] == pytest.approx(expected.probabilities, abs=1e-6)
            files = sorted((out / uid).iterdir())
            assert len(files) == 1 + sum(expected.present.values())
            assert not any(dciodvfy(files).values())
            patient = pydicom.dcmread(study / series / "IM1.dcm").PatientID
            assert {pydicom.dcmread(path).PatientID for path in files} == {patient}
            assert "S-1" in str(pydicom.dcmread(out / uid / "report.dcm"))


def test_a_corrected_orientation_is_another_header_with_another_answer(
    bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    first, corrected = tmp_path / "a.dcm", tmp_path / "b.dcm"
    write_radiograph(first, seed=1)
    dataset = pydicom.dcmread(first)
    dataset.PatientOrientation = ["L", "F"]
    dataset.save_as(first)
    dataset.PatientOrientation = ["R", "H"]  # the same pixels, taken to lie upside down
    dataset.save_as(corrected)
    with Predictor.of(bundles["fp32"], provider="cpu") as predictor:
        reporter = Reporter(bundles["fp32"], predictor, Device("1"), max_pictures=0)
        reports = [reporter.report(path, datetime(2026, 1, 1, tzinfo=timezone.utc)) for path in (first, corrected)]
    assert reports[0].image.pixels == reports[1].image.pixels
    assert reports[0].image.header != reports[1].image.header
    assert reports[0].prediction.probabilities != reports[1].prediction.probabilities


def test_the_garbage_collector_of_a_program_that_embeds_it_is_left_alone(bundles: dict[str, Bundle]) -> None:
    n_frozen = gc.get_freeze_count()
    with Predictor.of(bundles["fp32"], provider="cpu") as predictor:
        Reporter(bundles["fp32"], predictor, Device("1"), max_pictures=0).warm_up()
    assert gc.get_freeze_count() == n_frozen


def test_one_image_twice_is_refused_and_nothing_is_left(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    write_radiograph(tmp_path / "a.dcm", seed=1)
    shutil.copy(tmp_path / "a.dcm", tmp_path / "b.dcm")
    out = tmp_path / "results"
    done = chexnet("predict", bundles["fp32"].path, tmp_path / "a.dcm", tmp_path / "b.dcm", "--dicom-out", out)
    assert done.returncode == 3
    assert "a second file with this SOP Instance UID" in done.stdout
    assert len(list(out.iterdir())) == 1


def test_a_png_has_no_study_to_file_a_result_under(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    image.write_bytes(b"\x89PNG\r\n\x1a\n")
    done = chexnet("predict", bundles["fp32"].path, image, "--dicom-out", tmp_path / "results")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "DICOM" in done.stderr
    assert not (tmp_path / "results").exists()


def test_places_for_answers_exclude_each_other(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    done = chexnet(
        "predict", bundles["fp32"].path, tmp_path / "a.dcm", "--dicom-out", tmp_path / "r", "--cam", tmp_path / "c"
    )
    assert done.returncode == 2
    assert "Run them apart" in done.stderr
