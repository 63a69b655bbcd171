"""Every figure of `evaluate` on data small enough to check by hand, and against scikit-learn on published predictions."""

import json
from dataclasses import replace
from pathlib import Path
from time import process_time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.datasets.chestxray14 import ChestXray14
from chexnet_deploy.datasets.findings import FINDINGS
from chexnet_deploy.datasets.labelled import LabelledImages
from chexnet_deploy.datasets.nih_tables import Radiograph
from chexnet_deploy.datasets.patients import PatientSet
from chexnet_deploy.datasets.predictions import LabelledScores
from chexnet_deploy.datasets.radiologist_labels import MAJORITY_READERS, ExpertLabels
from chexnet_deploy.errors import ChexnetError, DatasetError, SpecError
from chexnet_deploy.evaluation import as_text
from chexnet_deploy.evaluation.bench_report import write_predictions
from chexnet_deploy.evaluation.localize import choose_pictures, localize
from chexnet_deploy.evaluation.pages.evaluation_page import write_html
from chexnet_deploy.evaluation.radiologists import choose_thresholds, compare_with_readers, read_thresholds, tuning_rows
from chexnet_deploy.evaluation.records import Evaluation, Threshold
from chexnet_deploy.evaluation.request import EvaluationRequest
from chexnet_deploy.evaluation.run import EvaluationRun, run_evaluation
from chexnet_deploy.evaluation.sources import run_engine
from chexnet_deploy.metrics.localization import Box
from chexnet_deploy.runtime.predictor import Prediction
from chexnet_deploy.runtime.score import score_files
from chexnet_deploy.runtime.sessions.open import open_session
from tests.browser import Browser
from tests.html_page import assert_accessible


def quiet(phase: str, done: int, total: int) -> None:
    pass


def run(**options: object) -> EvaluationRun:
    return run_evaluation(EvaluationRequest(**options), on_phase=quiet)  # type: ignore[arg-type]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture
def small(tmp_path: Path) -> Evaluation:
    """Eight images of eight patients: Mass wins 12.5 of its 16 pairs; nobody has Hernia, everybody Edema."""
    scores = (0.9, 0.8, 0.4, 0.6, 0.6, 0.3, 0.2, 0.1)
    present = (1, 1, 0, 1, 0, 0, 1, 0)
    rows = [f"{i},{s},0.5,0.5" for i, s in enumerate(scores)]
    predictions = write(tmp_path / "p.csv", "image,prob_Mass,prob_Hernia,prob_Edema\n" + "\n".join(rows))
    truths = [f"{i},{i},{y},0,1,F,50" for i, y in enumerate(present)]
    labels = write(tmp_path / "l.csv", "image,patient,Mass,Hernia,Edema,sex,age\n" + "\n".join(truths))
    thresholds = write(tmp_path / "t.json", '{"Mass": 0.6, "Hernia": 0.5}')
    return run(predictions=predictions, labels=labels, thresholds=thresholds).evaluation


def test_figures_by_hand(small: Evaluation) -> None:
    mass = small.findings[0]
    # 0.9 and 0.8 win 4 pairs each, 0.6 wins 3 and ties one, 0.2 wins one: 12.5 of 16.
    assert (mass.finding, mass.n_positive, mass.n_positive_patients, mass.n_negative_patients) == ("Mass", 4, 4, 4)
    assert mass.auroc == 12.5 / 16
    # Recall rises at 0.9, 0.8, {0.6, 0.6} and 0.2, with precisions 1, 1, 3/4 and 4/7.
    assert mass.auprc == pytest.approx((1 + 1 + 3 / 4 + 4 / 7) / 4)
    errors = (0.1, 0.2, 0.4, 0.4, 0.6, 0.3, 0.8, 0.1)
    assert mass.brier == pytest.approx(sum(e * e for e in errors) / 8)
    point = mass.operating_point
    assert point is not None
    assert (point.threshold, point.sensitivity.value, point.specificity.value) == (0.6, 3 / 4, 3 / 4)
    assert mass.auroc_interval is not None
    assert mass.auroc_interval[0] < 12.5 / 16 < mass.auroc_interval[1]
    assert mass.undefined == {}


def test_what_is_undefined_is_named_and_in_no_mean(small: Evaluation) -> None:
    by_name = {row.finding: row for row in small.findings}
    hernia, edema = by_name["Hernia"], by_name["Edema"]
    assert (hernia.auroc, hernia.auprc, edema.auroc, edema.auprc) == (None, None, None, 1.0)
    assert hernia.undefined["auroc"] == "no image shows the finding"
    assert edema.undefined["auroc"] == "every image shows the finding"
    assert hernia.operating_point is not None
    assert (hernia.operating_point.sensitivity.value, hernia.operating_point.specificity.value) == (None, 0.0)
    assert hernia.undefined["sensitivity"] == "no image shows the finding"
    assert (small.mean_auroc, small.n_counted) == (12.5 / 16, 1)
    assert small.mean_auroc_interval == pytest.approx(by_name["Mass"].auroc_interval)
    assert set(small.left_out) == {"Hernia", "Edema"}
    assert "over 1 of 3 findings, without Edema, Hernia" in as_text.mean_line(small)
    text = "\n".join(as_text.undefined_lines(small))
    assert "Hernia: auroc, auroc interval, auprc, roc, sensitivity undefined, no image shows the finding" in text
    # The JSON holds null, never NaN, and can be read again.
    content = small.model_dump_json()
    assert "NaN" not in content
    assert Evaluation.model_validate_json(content) == small


def test_no_finding_defined_leaves_no_mean(tmp_path: Path) -> None:
    predictions = write(tmp_path / "p.csv", "image,prob_Mass\na,0.1\nb,0.2\n")
    labels = write(tmp_path / "l.csv", "image,patient,Mass\na,1,0\nb,2,0\n")
    result = run(predictions=predictions, labels=labels).evaluation
    assert (result.mean_auroc, result.mean_auroc_interval, result.n_counted) == (None, None, 0)
    assert result.undefined["mean_auroc"] == "no finding has an AUROC"


def test_one_positive_patient_leaves_an_area_without_interval(tmp_path: Path) -> None:
    predictions = write(tmp_path / "p.csv", "image,score_Mass\na,3\nb,2\nc,1\nd,2.5\n")
    labels = write(tmp_path / "l.csv", "image,patient,Mass\na,1,1\nb,1,1\nc,2,0\nd,3,0\n")
    result = run(predictions=predictions, labels=labels).evaluation
    mass = result.findings[0]
    assert (mass.auroc, mass.auroc_interval, mass.brier, mass.reliability) == (3 / 4, None, None, ())
    assert mass.undefined == {
        "auroc_interval": "all images with the finding are of one patient",
        "brier": "the scores are neither probabilities nor logits",
        "ece": "the scores are neither probabilities nor logits",
    }
    assert result.mean_auroc_interval is None
    assert result.undefined == {"mean_auroc_interval": "no interval of Mass"}


def test_subgroups_say_where_there_are_too_few(small: Evaluation, rng: np.random.Generator, tmp_path: Path) -> None:
    groups = {group.name: group for group in small.subgroups}
    assert list(groups) == ["sex F", "age 40 to 59", "view not stated"]
    assert groups["sex F"].findings[0].why_not == "not assessable: 4 positive patients, needed 20"
    names = [f"{i},{i}" for i in range(80)]
    scores = rng.random(80)
    predictions = write(tmp_path / "p2.csv", "image,prob_Mass\n" + "\n".join(f"{i},{s}" for i, s in enumerate(scores)))
    # Women: 20 with, 20 without. Men: 19 with, 21 without.
    sexes = ["F" if i < 40 else "M" for i in range(80)]
    truth = [i % 2 == 0 and i != 40 for i in range(80)]
    rows = [f"{n},{int(y)},{s}" for n, y, s in zip(names, truth, sexes, strict=True)]
    labels = write(tmp_path / "l2.csv", "image,patient,Mass,sex\n" + "\n".join(rows))
    groups = {g.name: g for g in run(predictions=predictions, labels=labels).evaluation.subgroups}
    women, men = groups["sex F"].findings[0], groups["sex M"].findings[0]
    wins = sum(scores[i] > scores[j] for i in range(0, 40, 2) for j in range(1, 40, 2))
    assert women.auroc == pytest.approx(wins / 400)
    assert (men.auroc, men.n_positive_patients) == (None, 19)


def test_published_predictions_equal_scikit_learn(real_root: Path) -> None:
    from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

    from chexnet_deploy.datasets.predictions import read_predictions
    from chexnet_deploy.datasets.table import read_labels

    predictions = real_root / "predictions" / "reproduce_chexnet_test.csv"
    labels = real_root / "Data_Entry_2017_v2020.csv"
    if not predictions.is_file():
        pytest.skip("NOT RUN: no published predictions beside the images")
    start_s = process_time()
    result = run(predictions=predictions, labels=labels).evaluation
    assert process_time() - start_s < 15  # 2.5 s on one quiet core
    table = read_predictions(predictions, read_labels(labels))
    for c, row in enumerate(result.findings):
        truth, scores = table.truth[:, c], table.scores[:, c]
        assert row.auroc == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
        assert row.auprc == pytest.approx(average_precision_score(truth, scores), abs=1e-12)
        assert row.brier == pytest.approx(brier_score_loss(truth, scores), abs=1e-12)
    assert result.n_images == 11_627
    assert any("reproduce-chexnet's test list" in sentence for sentence in result.patients_note)


def test_a_bundle_and_its_logits_in_a_csv_give_the_same_figures(
    bundles: dict[str, Bundle], phantom: ChestXray14, phantom_root: Path, tmp_path: Path
) -> None:
    bundle = bundles["fp32"]
    images = LabelledImages.of(phantom.split("test"), bundle.manifest.findings)
    session = open_session(bundle, provider="cpu")
    logits = score_files({"x": session}, images.paths, bundle.manifest.preprocessing)["x"]
    session.close()
    write_predictions(tmp_path / "logits.csv", images, bundle.manifest.findings, logits)
    thresholds = write(tmp_path / "t.json", json.dumps(dict(bundle.manifest.operating_points)))
    ours = run(engine=bundle.path, data=phantom_root, provider="cpu").evaluation
    theirs = run(predictions=tmp_path / "logits.csv", data=phantom_root, thresholds=thresholds).evaluation
    assert ours.findings == theirs.findings
    assert ours.subgroups == theirs.subgroups
    assert ours.mean_auroc_interval == theirs.mean_auroc_interval
    assert (ours.bundle_id, theirs.bundle_id) == (bundle.id, None)


def test_training_patients_are_refused_and_train_is_said(phantom: ChestXray14, phantom_root: Path) -> None:
    test_patient = phantom.split("test")[0].patient

    class Stop(Exception):
        pass

    class Manifest(SimpleNamespace):
        @property
        def findings(self) -> object:
            raise Stop  # got past the guard

    manifest: Any = Manifest(trained_on=PatientSet.of([test_patient]))
    bundle = Bundle(Path("x"), manifest, "0" * 64)
    with pytest.raises(DatasetError, match="1 of 40 patients that the model was trained on"):
        run_engine(bundle, EvaluationRequest(engine=Path("x"), data=phantom_root), quiet)
    with pytest.raises(Stop):
        run_engine(bundle, EvaluationRequest(engine=Path("x"), data=phantom_root, split="train"), quiet)


def test_any_findings_are_measured_on_their_labels_and_without_patients_nothing_has_an_interval(tmp_path: Path) -> None:
    predictions = write(
        tmp_path / "p.csv",
        "image,prob_Lung Lesion,prob_Mass,prob_Hernia\n" + "".join(f"{i},{(i + 1) / 10},0.5,0.5\n" for i in range(6)),
    )
    rows = zip(("1", "", "0", "1", "", "1"), (0, 1, 0, 1, 0, 1), strict=True)
    table = "image;ward;lung_lesion;Mass;Fracture\n" + "".join(f"{i};W;{a};{b},0;1\n" for i, (a, b) in enumerate(rows))
    found = run(predictions=predictions, labels=write(tmp_path / "l.csv", table)).evaluation
    lesion, mass = sorted(found.findings, key=lambda row: row.finding)[::-1]
    assert (lesion.finding, lesion.n_positive, mass.finding, mass.n_positive) == ("lung_lesion", 3, "Mass", 3)
    # Of the four images labelled 1, 0, 1, 1 with rising scores, two of three pairs are won.
    assert lesion.auroc == pytest.approx(2 / 3)
    assert (lesion.auroc_interval, found.mean_auroc_interval) == (None, None)
    assert "of unknown patients; labels of l.csv" in found.data
    assert any("all images are taken as one patient's" in sentence for sentence in found.patients_note)
    assert found.notes == (
        "Not predicted: Fracture.",
        "Predicted, but not labelled in l.csv: Hernia.",
        "Measured on the images labelled for them, fewer than all 6: lung_lesion 4.",
    )


def test_the_training_split_is_said_to_be_known(bundles: dict[str, Bundle], phantom_root: Path) -> None:
    train = run(engine=bundles["fp32"].path, data=phantom_root, split="train", provider="cpu").evaluation
    assert "the model was trained on such patients" in train.patients_note[0]
    val = run(engine=bundles["fp32"].path, data=phantom_root, split="val", provider="cpu").evaluation
    assert "chosen on validation patients" in val.patients_note[0]


def test_predictions_are_narrowed_by_split_and_list(
    phantom: ChestXray14, phantom_root: Path, phantom_predictions: Path, tmp_path: Path
) -> None:
    options = {"predictions": phantom_predictions, "data": phantom_root}
    assert run(**options).evaluation.n_images == len(phantom.radiographs)
    test = run(**options, split="test").evaluation
    assert test.n_images == len(phantom.split("test"))
    assert any(sentence.startswith("All ") for sentence in test.patients_note)
    names = [radiograph.image for radiograph in phantom.split("test")]
    few = write(tmp_path / "few.txt", "\n".join(names[:5]))
    assert run(**options, split="test", images=few).evaluation.n_images == 5
    stranger = write(tmp_path / "stranger.txt", phantom.split("val")[0].image)
    with pytest.raises(DatasetError, match="without a prediction of a test image"):
        run(**options, split="test", images=stranger)


def make_labels(reads: list[list[int]]) -> ExpertLabels:
    """Five readers' reads of Mass, the last three those whose majority counts; other findings never present."""
    answers = np.zeros((5, len(reads[0]), len(FINDINGS)), np.bool_)
    answers[:, :, FINDINGS.index("Mass")] = np.array(reads, np.bool_)
    n_images = len(reads[0])
    return ExpertLabels(
        images=tuple(f"{i:08d}_000.png" for i in range(n_images)),
        patients=np.arange(n_images),
        readers=("1", "2", *MAJORITY_READERS),
        reads=answers,
        majority=answers[2:].sum(axis=0) >= 2,
    )


def make_scores(names: list[str], scores: list[float]) -> LabelledScores:
    n = len(names)
    return LabelledScores(
        names=tuple(names),
        findings=("Mass", "Nodule"),
        scores=np.array([[s, 0.5] for s in scores]),
        kind="probability",
        truth=np.zeros((n, 2), np.bool_),
        is_labelled=np.ones((n, 2), np.bool_),
        patients=np.array([int(name[:8]) for name in names]),
        sex=("F",) * n,
        age_years=np.full(n, 50.0),
        view=("PA",) * n,
        unlabelled_findings=(),
        ignored=(),
        n_not_predicted=0,
    )


def test_the_reader_study_by_hand() -> None:
    # On the first four images; the fifth has reads and no score. The majority calls 0 and 1.
    labels = make_labels([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 1], [1, 1, 0, 0, 1], [1, 0, 0, 0, 0]])
    scored = make_scores([f"{i:08d}_000.png" for i in (3, 2, 1, 0, 9)], [0.1, 0.7, 0.3, 0.9, 0.2])
    found = compare_with_readers(scored, labels, [Threshold(finding="Mass", probability=0.5)], thresholds_from="hand")
    assert (found.n_read, found.n_images, found.n_patients) == (5, 4, 4)
    assert found.left_out["Nodule"] == "no threshold is known"
    assert found.left_out["Hernia"] == "not scored"
    assert [study.protocol for study in found.studies] == ["readers and model", "readers only", "majority"]
    # The model calls 0 and 2, the majority 0 and 1: F1 = 2 / (2 + 1 + 1).
    majority = found.studies[2].findings[0]
    assert majority.f1["model"].value == 0.5
    assert majority.f1["1"].value == 4 / 5
    assert majority.f1["2"].value == 2 / 3
    roc = found.roc[0]
    assert {p.rater: (p.false_positive_rate, p.sensitivity) for p in roc.points} == {
        "1": (0.5, 1.0),
        "2": (0.0, 0.5),
        "model": (0.5, 0.5),
    }
    assert roc.auroc == 3 / 4  # of the four pairs, 0.9 wins two and 0.3 one
    assert as_text.short_names(found) == {"1": "R1", "2": "R2"} | {
        r: f"R{i}" for i, r in enumerate(MAJORITY_READERS, 3)
    }


def test_a_finding_that_readers_did_not_read_is_named() -> None:
    scored = replace(
        make_scores(["00000000_000.png", "00000001_000.png"], [0.9, 0.1]), findings=("Mass", "Lung Opacity")
    )
    points = [Threshold(finding=name, probability=0.5) for name in scored.findings]
    found = compare_with_readers(scored, make_labels([[1, 0]] * 5), points, thresholds_from="hand")
    assert (found.left_out["Lung Opacity"], found.left_out["Nodule"]) == ("not read by them", "not scored")
    assert [threshold.finding for threshold in found.thresholds] == ["Mass"]


def test_readers_without_a_common_image_or_a_threshold() -> None:
    labels = make_labels([[1, 0]] * 5)
    with pytest.raises(DatasetError, match="none of the 2 expert-read images among the 1 scored"):
        compare_with_readers(make_scores(["00000009_000.png"], [0.5]), labels, [], thresholds_from="hand")
    with pytest.raises(DatasetError, match="--thresholds FILE"):
        compare_with_readers(make_scores(["00000000_000.png"], [0.5]), labels, [], thresholds_from="hand")


def test_thresholds_are_chosen_on_other_patients() -> None:
    labels = make_labels([[1, 0]] * 5)  # patients 0 and 1
    patients = np.array([0, 2, 2, 3, 4])
    assert tuning_rows(patients, labels, {4}).tolist() == [False, True, True, True, False]
    # At 0.3 and above: 2 hits and 1 false alarm, F1 = 4/5; at 0.6: 1 hit, 2/3; at 0.1: 4/6.
    values = np.array([[0.6, 0.1], [0.4, 0.2], [0.3, 0.3], [0.1, 0.4]])
    truth = np.array([[1, 0], [0, 0], [1, 0], [0, 0]], np.bool_)
    (chosen,) = choose_thresholds(values, truth, ("Mass", "Hernia"))
    assert chosen == Threshold(finding="Mass", probability=0.3, f1=0.8, n_positive=2)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "Expecting value"),
        ("[0.5]", "list"),
        ("{}", "without thresholds"),
        ('{"Masss": 0.5}', "'Masss'"),
        ('{"Mass": 50}', "50 for Mass; needed a probability"),
        ('{"Mass": "0.5"}', "'0.5' for Mass"),
        ('{"Mass": true}', "True for Mass"),
        ('{"Mass": NaN}', "nan for Mass"),
    ],
)
def test_a_wrong_file_of_thresholds(tmp_path: Path, text: str, found: str) -> None:
    with pytest.raises(SpecError, match=found):
        read_thresholds(write(tmp_path / "t.json", text), ("Mass", "Nodule"), are_probabilities=True)


def test_thresholds_of_a_file_keep_the_findings_order(tmp_path: Path) -> None:
    path = write(tmp_path / "t.json", '{"Nodule": 2.5, "Mass": 0}')
    read = read_thresholds(path, ("Mass", "Nodule"), are_probabilities=False)
    assert [(t.finding, t.probability, t.f1) for t in read] == [("Mass", 0.0, None), ("Nodule", 2.5, None)]
    with pytest.raises(SpecError, match="No such file"):
        read_thresholds(tmp_path / "none.json", ("Mass",), are_probabilities=True)


class FixedMap:
    """A predictor whose map is brightest in the upper left of its four cells."""

    def predict(self, gray: object) -> Prediction:
        return Prediction({"Mass": 0.7}, {}, {"Mass": np.array([[1.0, 0.0], [0.0, 0.0]], np.float32)})


def draw_gray(path: Path, side_px: int) -> Path:
    from PIL import Image

    Image.fromarray(np.arange(side_px**2, dtype=np.uint32).reshape(side_px, side_px).astype(np.uint8)).save(path)
    return path


def make_radiograph(image: str, path: Path) -> Radiograph:
    return Radiograph(image, int(image[:8]), frozenset(), 50, "F", "PA", path)


def test_maps_against_boxes_by_hand(tmp_path: Path) -> None:
    radiographs = [make_radiograph(f"{i:08d}_000.png", draw_gray(tmp_path / f"{i}.png", 64)) for i in range(3)]
    radiographs.append(make_radiograph("00000003_000.png", draw_gray(tmp_path / "3.png", 32)))
    boxes = {
        "00000000_000.png": (Box("Mass", 8.0, 8.0, 16.0, 16.0),),  # round the brightest cell's middle, (16, 16)
        "00000001_000.png": (Box("Mass", 40.0, 40.0, 16.0, 16.0), Box("Nodule", 0.0, 0.0, 9.0, 9.0)),
        "00000003_000.png": (Box("Mass", 0.0, 0.0, 9.0, 9.0),),
    }
    images = LabelledImages.of(radiographs)
    record, maps = localize(FixedMap(), images, boxes, ("Mass", "Hernia"), on_images=lambda done, total: None)  # type: ignore[arg-type]
    assert (record.n_images, record.n_left_out, record.width_px) == (2, 1, 64)
    (mass,) = record.summary.findings
    assert (mass.finding, mass.n_images, mass.n_boxes, mass.pointing_accuracy) == ("Mass", 2, 2, 0.5)
    assert record.summary.without_boxes == ("Hernia",)
    assert record.summary.tolerance_px == 15 * 64 / 1024
    # The map falls from 1 at 16 px to 0 at 48 px in each direction: 180/255 and more is a corner of less than 26 px.
    assert record.images[0].iobb[0] == pytest.approx(16 * 16 / 25**2, rel=0.1)
    assert record.images[1].iou == (0.0,)
    assert [each.scored.image for each in choose_pictures(maps)["Mass"]] == ["00000000_000.png", "00000001_000.png"]
    assert "1 more are left out" in as_text.localization_line(record)


def test_boxes_of_another_size_are_refused(tmp_path: Path) -> None:
    radiograph = make_radiograph("00000000_000.png", draw_gray(tmp_path / "0.png", 64))
    shrunken = {radiograph.image: (Box("Mass", 500.0, 500.0, 100.0, 100.0),)}
    with pytest.raises(DatasetError, match="1024 x 1024 px as NIH ships them"):
        localize(FixedMap(), LabelledImages.of([radiograph]), shrunken, ("Mass",), on_images=lambda done, total: None)  # type: ignore[arg-type]
    with pytest.raises(DatasetError, match="none of the 1 images has a box"):
        localize(FixedMap(), LabelledImages.of([radiograph]), {}, ("Mass",), on_images=lambda done, total: None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, "neither an engine nor predictions"),
        ({"engine": "b", "predictions": "p"}, "both an engine and predictions"),
        ({"engine": "b"}, "--data ROOT"),
        ({"engine": "b", "data": "d", "labels": "l"}, "--labels belongs to --predictions"),
        ({"predictions": "p"}, "--labels CSV, or --data ROOT"),
        ({"predictions": "p", "labels": "l", "has_localization": True}, "Give a bundle"),
        ({"predictions": "p", "labels": "l", "threads": 1}, "predictions run nothing"),
        ({"predictions": "p", "labels": "l", "trust": "t"}, "--trust says which bundles may run"),
        ({"predictions": "p", "labels": "l", "provider": "cuda"}, "predictions run nothing"),
        ({"predictions": "p", "labels": "l", "split": "test"}, "--split needs a split"),
        ({"predictions": "p", "labels": "l", "readers": "r"}, "--thresholds FILE"),
        ({"engine": "b", "data": "d", "readers": "r", "split": "val"}, "official test list alone"),
    ],
)
def test_options_that_contradict(options: dict[str, object], found: str) -> None:
    with pytest.raises(SpecError, match=found):
        EvaluationRequest(**{k: Path(v) if v in tuple("bpldr") else v for k, v in options.items()})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def written(
    bundles: dict[str, Bundle], phantom_root: Path, phantom_readers: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Evaluation, Path]:
    """An evaluation with every part, and its page."""
    done = run(
        engine=bundles["fp32"].path, data=phantom_root, readers=phantom_readers, has_localization=True, provider="cpu"
    )
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_html(path, done)
    return done.evaluation, path


def test_axe_finds_nothing_in_the_page(written: tuple[Evaluation, Path], browser: Browser) -> None:
    browser.open(written[1].as_uri())
    browser.run("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert browser.violations() == []
    assert browser.complaints == []


def test_the_page_holds_every_part(written: tuple[Evaluation, Path]) -> None:
    evaluation, path = written
    page = path.read_text()
    root = assert_accessible(page)
    assert root.find("h1")[0].text.startswith("Mean AUROC 0.")
    assert "Published before: other split, not comparable" in page
    assert "<td>0.9248</td>" in page  # CheXNet's cardiomegaly
    for row in evaluation.findings:
        assert f'<th scope="row">{row.finding}</th>' in page
        assert f'alt="{row.finding}: ROC curve and reliability"' in page
    for heading in (
        "Summary",
        "Beside radiologists",
        "Finding by finding",
        "Subgroups",
        "Where the model looks",
        "Methods",
    ):
        assert f"<h2>{heading}</h2>" in page
    for work in ("DeLong ER", "Sun X, Xu W", "Obuchowski NA", "Rajpurkar P", "Nabulsi Z", "Wang X", "Zhang J"):
        assert work in page
    assert "activation maps with boxes" in page
    assert [fold for fold in root.find("details") if "open" in fold.attributes] == []
    assert evaluation.readers is not None
    assert evaluation.readers.thresholds_from == "the bundle's own operating points, chosen on validation patients"
    assert page.count("<caption>F1 ") == 3


def test_methods_say_only_what_was_done(small: Evaluation) -> None:
    text = " ".join(small.methods)
    assert "t.json" in text
    assert "Nabulsi" not in text
    assert "[Zhang 2018]" not in text
    assert "1 of 3 findings" in text


def test_readers_need_thresholds_that_a_bundle_may_lack(
    bundles: dict[str, Bundle], phantom_root: Path, phantom_readers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundles["fp32"]
    bare = bundle.manifest.model_copy(update={"operating_points": {}})
    monkeypatch.setattr(Bundle, "open", lambda path, trust: Bundle(path, bare, bundle.id))
    with pytest.raises(SpecError, match="no operating points"):  # before any image is run
        run(engine=bundle.path, data=phantom_root, readers=phantom_readers)


def test_a_wrong_folder_of_readers_costs_no_run(phantom_root: Path, tmp_path: Path) -> None:
    with pytest.raises(ChexnetError, match="test_individual_readers"):  # looked at before the bundle
        run(engine=tmp_path, data=phantom_root, readers=tmp_path)


def test_the_papers_mean_is_the_mean_of_its_rows() -> None:
    # Its text and the reproductions give .8414 for CheXNet, .8027 for Yao et al. and .7381 for Wang et al.
    means = np.mean(list(as_text.AUROC.values()), axis=0)
    np.testing.assert_allclose(means, [0.7381, 0.8027, 0.8414], atol=6e-5)
    assert list(as_text.AUROC) == list(FINDINGS)
