"""calibrate: what becomes a point, what is refused with how many more, and that every result then says whose it is."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.site import SitePoint, site_path
from chexnet_deploy.datasets.patients import PatientSet
from chexnet_deploy.errors import SpecError
from chexnet_deploy.evaluation.on_site import SiteRequest, choose_point
from chexnet_deploy.runtime import Predictor
from tests.command_line import assert_one_line_error, chexnet


def request(**rates: float) -> SiteRequest:
    return SiteRequest(bundle=Path(), data=Path(), rates=rates)  # type: ignore[arg-type]


def choose(
    scores: np.ndarray, truth: np.ndarray, patients: np.ndarray | None = None, **rates: float
) -> SitePoint | str:
    patients = np.arange(scores.size) if patients is None else patients
    lots = np.arange(scores.size, dtype=np.uint64)
    return choose_point(scores.astype(np.float32), truth, patients.astype(np.int64), lots, request(**rates))


def test_sensitivity_takes_the_ninth_lowest_of_300() -> None:
    scores = np.concatenate([np.arange(300) / 1000 + 0.5, np.full(100, 0.1)])
    found = choose(scores, np.arange(400) < 300, sensitivity=0.95)
    assert isinstance(found, SitePoint)
    assert found.present_at == found.absent_below == pytest.approx(0.508)
    assert (found.sensitivity, found.specificity, found.undetermined) == (pytest.approx(292 / 300), 1.0, 0.0)
    assert found.guaranteed["sensitivity"].model_dump() == {"n_patients": 300, "n_wrong": 8}


def test_specificity_s_threshold_lies_just_above_the_score_it_keeps_absent() -> None:
    # P(Binomial(100, 0.1) <= 4) = 0.024 and of 5 = 0.058: four of a hundred may be called.
    scores, truth = np.arange(100) / 128, np.zeros(100, bool)
    found = choose(scores, truth, specificity=0.9)
    assert isinstance(found, SitePoint)
    assert found.specificity == 0.96
    assert found.sensitivity is None
    assert found.present_at == float(np.nextafter(np.float32(95 / 128), np.float32(1.0)))
    assert "the probability 1" in str(choose(np.ones(100), truth, specificity=0.9))


def test_many_images_of_a_patient_count_as_one() -> None:
    scores, truth, patients = np.tile([0.9, 0.2], 300), np.ones(600, bool), np.repeat(np.arange(58), 11)[:600]
    found = choose(scores, truth, patients, sensitivity=0.95)
    assert found == "sensitivity 0.95: 55 patients with the finding, 59 are the fewest; 4 more"


def test_ppv_and_npv_have_a_threshold_each_and_say_nothing_between() -> None:
    # The 100 highest of 1,000 show it, the 500 lowest don't, and every second one between.
    place = np.arange(1000)
    truth = (place >= 900) | ((place >= 500) & (place % 2 == 0))
    found = choose(place / 1024, truth, ppv=0.9, npv=0.95)
    assert isinstance(found, SitePoint)
    assert found.present_at is not None
    assert found.absent_below is not None
    assert 0.4 < found.absent_below < 0.55 < 0.85 < found.present_at
    assert found.undetermined > 0.3
    assert set(found.guaranteed) == {"ppv", "npv"}
    assert found.guaranteed["npv"].n_patients >= 500


def test_one_of_the_two_may_be_all_there_is() -> None:
    place = np.arange(400)
    found = choose(place / 512, np.zeros(400, bool), ppv=0.9, npv=0.95)
    assert isinstance(found, SitePoint)
    assert (found.present_at, found.absent_below) == (None, 1.0)  # nobody has it, so everybody is absent
    assert set(found.guaranteed) == {"npv"}
    assert "at no threshold do these 400 patients reach it" in found.not_guaranteed["ppv"]
    # All show it.
    found = choose(place / 512, np.ones(400, bool), ppv=0.9, npv=0.95)
    assert isinstance(found, SitePoint)
    assert (found.present_at, found.absent_below) == (0.0, None)
    assert choose(place[:20] / 512, np.ones(20, bool), ppv=0.9) == ("PPV 0.9: 20 patients, 29 are the fewest; 9 more")


def test_where_both_would_do_it_is_present() -> None:
    place = np.arange(2000)
    found = choose(place / 2048, place >= 1000, ppv=0.8, npv=0.8)
    assert isinstance(found, SitePoint)
    assert found.present_at == found.absent_below
    assert found.undetermined == 0.0


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"rates": {}}, "--sensitivity"),
        ({"rates": {"sensitivity": 0.9, "ppv": 0.9}}, "--ppv"),
        ({"rates": {"sensitivity": 0.9, "specificity": 0.9}}, "needed"),
        ({"rates": {"sensitivity": 95.0}}, "between 0 and 1"),
        ({"rates": {"npv": 0.9}, "confidence": float("nan")}, "--confidence"),
        ({"rates": {"npv": 0.9}, "split": "train"}, "fitted to training patients"),
    ],
)
def test_what_means_nothing_is_refused(wrong: dict, word: str) -> None:
    with pytest.raises(SpecError, match=word):
        SiteRequest(**{"bundle": Path(), "data": Path(), **wrong})


@pytest.fixture(scope="module")
def calibrated(bundles: dict[str, Bundle], phantom_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A copy with a site file; an untrained model on 40 phantom patients."""
    folder = tmp_path_factory.mktemp("site") / "bundle"
    shutil.copytree(bundles["fp32"].path, folder)
    done = chexnet("calibrate", folder, "--data", phantom_root, "--sensitivity", "0.6", "--provider", "cpu")
    assert done.returncode == 0, done.stderr
    assert f"{folder}.site.json" in done.stdout
    return Bundle.open(folder)


def test_the_site_file_is_of_the_patients_it_was_chosen_on(calibrated: Bundle, phantom_root: Path) -> None:
    site = calibrated.read_site()
    assert site is not None
    assert (site.bundle, site.asked, site.confidence) == (calibrated.id, {"sensitivity": 0.6}, 0.95)
    assert site.n_patients <= 40
    assert "test images" in site.data
    assert "doesn't say whom it was trained on" in site.patients_note[0]
    for point in site.points.values():
        evidence = point.guaranteed["sensitivity"]
        # P(Binomial(n, 0.4) <= wrong) <= 0.05 takes 6 patients at least.
        assert evidence.n_patients >= 6
        assert point.sensitivity is not None
        assert point.sensitivity >= 0.5
    for reason in site.without.values():
        assert "6 are the fewest" in reason
    assert_one_line_error(
        chexnet("calibrate", calibrated.path, "--data", phantom_root, "--sensitivity", "0.6"), 2, "is there already"
    )


def test_too_few_patients_are_refused_at_once_with_how_many_more(
    bundles: dict[str, Bundle], phantom_root: Path, tmp_path: Path
) -> None:
    shutil.copytree(bundles["fp32"].path, tmp_path / "bundle")
    done = chexnet("calibrate", tmp_path / "bundle", "--data", phantom_root, "--sensitivity", "0.95")
    assert_one_line_error(done, 2, "59 are the fewest", "more")
    assert not (tmp_path / "bundle.site.json").exists()


def test_training_patients_are_refused(bundles: dict[str, Bundle], phantom_root: Path, tmp_path: Path) -> None:
    source = bundles["fp32"]
    manifest = source.manifest.model_copy(update={"trained_on": PatientSet.of(range(100_000))})
    Bundle.write(tmp_path / "bundle", manifest, source.read_model(), source.read_probe_bytes())
    done = chexnet("calibrate", tmp_path / "bundle", "--data", phantom_root, "--sensitivity", "0.6")
    assert_one_line_error(done, 2, "patients that the model was trained on")


def test_predict_decides_by_it_and_says_so(calibrated: Bundle, phantom_root: Path, tmp_path: Path) -> None:
    site = calibrated.read_site()
    assert site is not None
    images = phantom_root / "images"
    first = sorted(images.iterdir())[0]
    with Predictor.open(calibrated.path, provider="cpu") as predictor:
        expected = predictor.predict(first)
    assert set(expected.present) == set(site.points)
    said = json.loads(chexnet("predict", calibrated.path, first, "--json").stdout)[str(first)]
    assert said["operating_points_from"] == site.in_words
    assert said["present"] == expected.present
    assert f"operating points of {site.in_words}" in chexnet("predict", calibrated.path, first).stdout
    table = tmp_path / "table.csv"
    done = chexnet("predict", calibrated.path, images, "--out", table)
    assert done.returncode == 0, done.stderr
    assert site.in_words in done.stdout
    with table.open() as lines:
        rows = list(csv.DictReader(lines))
    assert {row["site"] for row in rows} == {site.id}
    row = next(row for row in rows if row["image"] == first.name)
    assert {name: bool(int(row[f"present_{name}"])) for name in expected.present} == expected.present
    assert json.loads((tmp_path / "table.csv.json").read_bytes())["site"] == site.id


def test_a_table_goes_on_under_one_site_file_alone(
    bundles: dict[str, Bundle], calibrated: Bundle, phantom_root: Path, tmp_path: Path
) -> None:
    table, images = tmp_path / "table.csv", phantom_root / "images"
    assert chexnet("predict", bundles["fp32"].path, images, "--out", table).returncode == 0
    assert_one_line_error(chexnet("predict", calibrated.path, images, "--out", table), 2, "was begun with")


def test_an_edited_site_file_stops_predict(calibrated: Bundle, phantom_root: Path, tmp_path: Path) -> None:
    shutil.copytree(calibrated.path, tmp_path / "bundle")
    path = site_path(tmp_path / "bundle")
    path.write_bytes(site_path(calibrated.path).read_bytes().replace(b'"confidence": 0.95', b'"confidence": 0.99'))
    image = sorted((phantom_root / "images").iterdir())[0]
    assert_one_line_error(chexnet("predict", tmp_path / "bundle", image), 2, "was changed after it was written")
    path.write_bytes(site_path(calibrated.path).read_bytes())
    assert chexnet("predict", tmp_path / "bundle", image).returncode == 0
