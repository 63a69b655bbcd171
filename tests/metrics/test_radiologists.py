"""Reader study: three protocols by hand, as a slow loop has them, and undefined where undefined."""

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import f1_score

from chexnet_deploy.datasets.findings import FINDINGS
from chexnet_deploy.datasets.radiologist_labels import MAJORITY_READERS, ExpertLabels
from chexnet_deploy.errors import MetricError
from chexnet_deploy.metrics.f1 import Estimate, expected_undefined_share, resample_units
from chexnet_deploy.metrics.radiologists import (
    Answers,
    ReaderStudy,
    majority_protocol,
    paper_protocol,
    readers_only_protocol,
)


def answers(model: str | None, patients: tuple[int, ...] | None = None, **readers: str) -> Answers:
    """Answers for one finding, an image a character: "1" is positive."""
    reads = np.array([[[c == "1"] for c in row] for row in readers.values()])
    numbers = np.array(patients or range(reads.shape[1]), np.int64)
    decisions = None if model is None else np.array([[c == "1"] for c in model])
    return Answers(("Mass",), numbers, tuple(readers), reads, decisions)


def random_answers(rng: np.random.Generator, n_images: int = 12, prevalence: float = 0.25) -> Answers:
    draw = rng.random((4, n_images, 3)) < prevalence
    patients = np.sort(rng.integers(0, 2 * n_images // 3, n_images))
    return Answers(("Mass", "Nodule", "Edema"), patients, ("a", "b", "c"), draw[:3], draw[3])


def values(study: ReaderStudy, c: int = 0) -> dict[str, float | None]:
    row = study.findings[c]
    more = {} if row.difference is None else {"difference": row.difference.value}
    return {name: e.value for name, e in row.f1.items()} | {"readers": row.mean_of_readers.value} | more


FOUR = answers("1110", a="1100", b="1010")  # F1(a, b) = 2/4, F1(a, model) = F1(b, model) = 4/5


def test_paper_protocol_by_hand() -> None:
    study = paper_protocol(FOUR, n_resamples=10)
    assert values(study) == pytest.approx({"a": 0.65, "b": 0.65, "model": 0.8, "readers": 0.65, "difference": 0.15})
    assert study.findings[0].n_positive == {"a": 2, "b": 2, "model": 3}
    assert (study.protocol, study.unit) == ("readers and model", "image")


def test_readers_only_by_hand() -> None:
    study = readers_only_protocol(FOUR, n_resamples=10)
    assert values(study) == pytest.approx({"a": 0.5, "b": 0.5, "model": 0.8, "readers": 0.5, "difference": 0.3})
    assert (study.protocol, study.unit) == ("readers only", "patient")


def test_majority_by_hand_scores_only_who_did_not_vote() -> None:
    given = answers("1110", a="1100", b="1010", c="1100", d="1000")
    majority = np.array([[True], [True], [False], [False]])
    study = majority_protocol(given, majority, ("a", "b", "c"), n_resamples=10)
    assert values(study) == pytest.approx({"d": 2 / 3, "model": 0.8, "readers": 2 / 3, "difference": 0.8 - 2 / 3})
    assert study.findings[0].n_positive == {"d": 1, "model": 3, "majority": 2}


def test_readers_alone() -> None:
    study = paper_protocol(replace(FOUR, decisions=None), n_resamples=10)
    assert values(study) == pytest.approx({"a": 0.5, "b": 0.5, "readers": 0.5})
    assert study.findings[0].difference is None
    assert study.mean.difference is None


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_f1_is_scikit_learns(rows: list[tuple[bool, bool]]) -> None:
    a, b = np.array(rows).T
    pair = Answers(("Mass",), np.arange(len(rows)), ("a", "b"), np.stack([a, b])[:, :, None])
    expected = f1_score(a, b, zero_division=np.nan)
    found = paper_protocol(pair, n_resamples=1).findings[0].f1["a"].value
    assert found is None if math.isnan(expected) else found == pytest.approx(expected, abs=1e-15)


def slow_study(
    given: Answers, panels: dict[str, tuple[str, ...]], label: NDArray[np.bool_] | None, unit: str, n: int, seed: int
) -> dict[str, list[list[float]]]:
    """Name -> a list for each finding: the value on all images, then on each resample. One loop at a time."""
    raters = dict(zip(given.readers, given.reads, strict=True))
    if given.decisions is not None:
        raters["model"] = given.decisions
    if label is not None:
        raters["majority"] = label
    groups = [[i] for i in range(len(given.patients))]
    if unit == "patient":
        groups = [[i for i, p in enumerate(given.patients) if p == q] for q in sorted(set(given.patients.tolist()))]
    drawn = np.concatenate(list(resample_units(len(groups), n, seed)))
    samples = [range(len(groups)), *drawn.tolist()]
    found: dict[str, list[list[float]]] = {}
    for c in range(len(given.findings)):
        scores: dict[str, list[float]] = {}
        for sample in samples:
            rows = [i for g in sample for i in groups[g]]
            for name, panel in panels.items():
                f1s = [f1_score(raters[j][rows, c], raters[name][rows, c], zero_division=np.nan) for j in panel]
                scores.setdefault(name, []).append(sum(f1s) / len(f1s))
        names = [name for name in panels if name != "model"]
        means = [sum(row) / len(names) for row in zip(*(scores[name] for name in names), strict=True)]
        scores["readers"] = means
        scores["difference"] = [m - r for m, r in zip(scores["model"], means, strict=True)]
        for name, column in scores.items():
            found.setdefault(name, []).append(column)
    return found


def check(estimate: Estimate | None, column: list[float]) -> None:
    assert estimate is not None
    point, samples = column[0], np.array(column[1:])
    share = np.isnan(samples).mean()
    assert estimate.undefined_share == share
    assert estimate.value == (None if math.isnan(point) else pytest.approx(point, abs=1e-12))
    low, high = np.nanquantile(samples, (0.025, 0.975)) if share < 1 else (math.nan, math.nan)
    if share > 0.05 or not low < high:
        assert (estimate.low, estimate.high) == (None, None)
    else:
        assert (estimate.low, estimate.high) == (pytest.approx(low, abs=1e-12), pytest.approx(high, abs=1e-12))


PAPER = {"a": ("b", "c", "model"), "b": ("a", "c", "model"), "c": ("a", "b", "model"), "model": ("a", "b", "c")}
READERS_ONLY = {"a": ("b", "c"), "b": ("a", "c"), "c": ("a", "b"), "model": ("a", "b", "c")}


@pytest.mark.parametrize("prevalence", [0.15, 0.5])  # at 0.15 some F1s are undefined
@pytest.mark.parametrize("protocol", ["readers and model", "readers only", "majority"])
def test_equals_a_slow_loop_over_the_same_resamples(rng: np.random.Generator, protocol: str, prevalence: float) -> None:
    made = random_answers(rng, prevalence=prevalence)
    label = made.reads[:2].all(axis=0)
    options: dict[str, Any] = {"n_resamples": 60, "seed": 3}
    if protocol == "readers and model":
        study, panels, unit = paper_protocol(made, **options), PAPER, "image"
    elif protocol == "readers only":
        study, panels, unit = readers_only_protocol(made, **options), READERS_ONLY, "patient"
    else:
        study, unit = majority_protocol(made, label, ("a", "b"), **options), "patient"
        panels = {"c": ("majority",), "model": ("majority",)}
    slow = slow_study(made, panels, label, unit, 60, 3)
    for c, row in enumerate(study.findings):
        for name, estimate in row.f1.items():
            check(estimate, slow[name][c])
        check(row.mean_of_readers, slow["readers"][c])
        check(row.difference, slow["difference"][c])
    counted = [c for c, name in enumerate(made.findings) if name not in study.mean.left_out]
    assert study.mean.n_counted == len(counted)
    for name, estimate in study.mean.f1.items():
        columns = [slow[name][c] for c in counted] or [[math.nan] * 61]
        check(estimate, np.mean(columns, axis=0).tolist())


def test_a_seed_repeats_and_is_recorded(rng: np.random.Generator) -> None:
    made = random_answers(rng, prevalence=0.5)
    first, again, other = (paper_protocol(made, n_resamples=50, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert (first.seed, other.seed) == (1, 2)


# Undefined is named


def test_no_positive_at_all_is_undefined() -> None:
    study = paper_protocol(answers("000", a="000", b="000"), n_resamples=20)
    estimate = study.findings[0].f1["model"]
    assert estimate == Estimate(value=None, low=None, high=None, undefined_share=1.0)
    assert study.findings[0].difference == estimate
    assert (study.mean.n_counted, list(study.mean.left_out)) == (0, ["Mass"])
    assert study.mean.mean_of_readers == estimate


def test_one_undefined_label_makes_the_mean_over_labels_undefined() -> None:
    study = readers_only_protocol(answers("11", a="00", b="00", c="10"), n_resamples=20)
    assert values(study)["a"] is None  # F1(a, b) is 0/0, F1(a, c) is 0
    assert values(study)["c"] == 0.0
    assert values(study)["readers"] is None
    assert study.findings[0].difference is not None
    assert study.findings[0].difference.value is None


def test_undefined_share_of_one_positive_image_in_four() -> None:
    study = paper_protocol(answers(None, a="1000", b="1000"))
    estimate = study.findings[0].f1["a"]
    assert estimate.value == 1.0
    assert estimate.undefined_share == pytest.approx(expected_undefined_share(1, 4), abs=0.015)  # (3/4)^4 = .316
    assert (estimate.low, estimate.high) == (None, None)
    assert "above 5%" in study.mean.left_out["Mass"]


def test_a_label_without_a_positive_gets_no_interval_and_no_place_in_a_mean() -> None:
    given = answers("1" * 20, a="1" * 20, b="0" * 20, c="0" * 20, d="0" * 20)
    study = majority_protocol(given, np.zeros((20, 1), np.bool_), ("b", "c", "d"), n_resamples=50)
    # F1 is 0, never undefined; 0 to 0 would look like certainty
    assert study.findings[0].f1["model"] == Estimate(value=0.0, low=None, high=None, undefined_share=0.0)
    assert "no positive image" in study.mean.left_out["Mass"]


def test_json_round_trip(rng: np.random.Generator) -> None:
    study = paper_protocol(random_answers(rng), n_resamples=20)
    assert ReaderStudy.model_validate_json(study.model_dump_json()) == study


# Refused


@pytest.mark.parametrize(
    "change",
    [
        {"reads": np.zeros((2, 3, 1), np.bool_)},  # a reader's answer is missing
        {"decisions": np.zeros((3, 1), np.bool_)},
        {"decisions": np.zeros((4, 1), np.float32)},  # probabilities, not decisions
        {"decisions": np.zeros((1, 4, 1), np.bool_)},
        {"patients": np.zeros(0, np.int64), "reads": np.zeros((2, 0, 1), np.bool_), "decisions": None},
        {"readers": ("a", "a")},
        {"readers": ("a", "model")},
        {"readers": ("a",), "reads": np.zeros((1, 4, 1), np.bool_)},
    ],
)
def test_answers_that_do_not_fit_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(MetricError, match=r"(?s)found .*; needed .*Next: "):
        replace(FOUR, **change)


@pytest.mark.parametrize(
    ("shape", "voters"), [((3, 1), ("a",)), ((4, 1), ("a", "b")), ((4, 1), ("z",)), ((4, 2), ("a",))]
)
def test_a_majority_that_does_not_fit_is_refused(shape: tuple[int, int], voters: tuple[str, ...]) -> None:
    with pytest.raises(MetricError, match=r"(?s)found .*; needed .*Next: "):
        majority_protocol(FOUR, np.zeros(shape, np.bool_), voters)


def test_no_resample_is_refused() -> None:
    with pytest.raises(MetricError, match="found 0 resamples"):
        paper_protocol(FOUR, n_resamples=0)


# Size of the real study


def test_the_whole_study_takes_less_than_five_seconds(rng: np.random.Generator) -> None:
    draw = rng.random((6, 386, 14)) < 0.1
    made = Answers(FINDINGS, np.arange(386) // 2, tuple("abcde"), draw[:5], draw[5])
    start_s = time.process_time()  # not wall time: other work on the machine must not fail this
    paper_protocol(made)
    readers_only_protocol(made)
    assert time.process_time() - start_s < 5  # about 0.5 s


@pytest.mark.dataset
def test_real_readers(real_root: Path) -> None:
    labels = ExpertLabels.open(real_root / "expert_labels")
    made = Answers(FINDINGS, labels.patients, labels.readers, labels.reads)
    study = paper_protocol(made)
    for c, row in enumerate(study.findings):
        for r, reader in enumerate(labels.readers):
            f1s = [f1_score(labels.reads[j, :, c], labels.reads[r, :, c]) for j in range(5) if j != r]
            assert row.f1[reader].value == pytest.approx(np.mean(f1s), abs=1e-12)
    assert set(study.mean.left_out) == {"Hernia"}  # reader 4343883996 sees none, 4343880271 one
    majority = majority_protocol(made, labels.majority, MAJORITY_READERS)
    assert tuple(majority.mean.f1) == ("4343880271", "4343882583")
    assert "no positive image" in majority.mean.left_out["Pneumonia"]
