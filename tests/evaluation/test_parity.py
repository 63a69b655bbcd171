import math

import numpy as np
import pytest
from numpy.typing import NDArray

from chexnet_deploy.errors import MetricError
from chexnet_deploy.evaluation.parity import EXIT_CODES, ParityReport, compare
from chexnet_deploy.evaluation.spec import Gate
from chexnet_deploy.metrics.agreement import map_correlation, noise_share, rank_churn

NAMES = ("Mass", "Hernia")
POINTS = {"Mass": 0.5, "Hernia": 0.5}
# Four patients with and four without each finding; every present image scores above every absent one.
TRUTH = np.array([[True, True]] * 4 + [[False, False]] * 4)
LOGITS = np.array([[2.0, 2.0]] * 4 + [[-2.0, -2.0]] * 4, np.float32)


def gate(*, margin: float = 0.1, patients: int = 4, max_dp: float = 1.0, p999: float = 1.0, **margins: float) -> Gate:
    return Gate(
        auroc_margin={"default": margin, **margins},
        min_positive_patients=patients,
        max_abs_probability_difference=max_dp,
        p999_abs_probability_difference=p999,
        latency="not gated",
    )


def judge(
    candidate: NDArray[np.float32],
    limits: Gate,
    *,
    reference: NDArray[np.float32] = LOGITS,
    truth: NDArray[np.bool_] = TRUTH,
    patients: NDArray[np.int64] | None = None,
    points: dict[str, float] | None = None,
) -> ParityReport:
    numbers = np.arange(len(truth)) if patients is None else patients
    return compare(reference, candidate, truth, numbers, NAMES, POINTS if points is None else points, limits)


def test_identical_logits_pass_with_difference_zero() -> None:
    report = judge(LOGITS.copy(), gate(max_dp=1e-9, p999=1e-9))
    assert (report.verdict, report.reasons, report.summary) == ("PASS", (), "PASS on 2 of 2")
    assert [finding.difference for finding in report.findings] == [0.0, 0.0]
    assert (report.max_abs_logit_difference, report.max_abs_probability_difference) == (0.0, 0.0)
    assert (report.p999_abs_probability_difference, report.n_flips, report.n_decisions) == (0.0, 0, 16)
    assert (report.n_images, report.n_patients, report.n_counted) == (8, 8, 2)
    assert report.mean_auroc_reference == report.mean_auroc_candidate == 1.0


def swapped() -> NDArray[np.float32]:
    # One of four present Mass images falls below all four absent ones: 4 of 16 pairs are lost, AUROC 0.75.
    candidate = LOGITS.copy()
    candidate[0, 0] = -3.0
    return candidate


def test_a_finding_that_loses_more_than_its_margin_fails_by_name() -> None:
    report = judge(swapped(), gate(margin=0.24))
    assert report.verdict == "FAIL"
    assert report.reasons == ("Mass: AUROC difference -0.2500, margin -0.24",)
    assert [finding.verdict for finding in report.findings] == ["fail", "pass"]
    assert report.findings[0].auroc_candidate == 0.75
    assert report.mean_auroc_candidate == (0.75 + 1.0) / 2


def many(logits: NDArray[np.float32]) -> dict[str, NDArray[np.generic]]:
    """The same eight images of fifty times as many patients: differences stay, their variances shrink."""
    return {
        "candidate": np.tile(logits, (50, 1)),
        "reference": np.tile(LOGITS, (50, 1)),
        "truth": np.tile(TRUTH, (50, 1)),
    }


def test_a_loss_that_is_shown_to_be_under_the_margin_passes() -> None:
    # Of 200 positives a quarter loses every pair: the difference is a mean of -1 and 0, its standard error
    # sqrt(0.25 x 0.75 / 199) = 0.031, so a margin of 0.35 is three of them away and one of 0.27 is not.
    report = judge(**many(swapped()), limits=gate(margin=0.35))
    assert (report.verdict, report.findings[0].difference) == ("PASS", -0.25)
    low = report.findings[0].difference_low
    assert low is not None
    assert -0.35 < low <= -0.25 - 1.97 * 0.0307  # never narrower than Wald's
    assert judge(**many(swapped()), limits=gate(margin=0.27)).verdict == "INCONCLUSIVE"
    assert judge(**many(swapped()), limits=gate(margin=0.24)).verdict == "FAIL"


def test_too_few_patients_are_inconclusive_and_the_number_that_would_do_is_said() -> None:
    # By Wald's statistic (2.80 standard deviations of 0.433 / room of 0.10)^2 * 4/3 = 196 positive patients in all. Ours also
    # doubts how strongly four patients show a difference.
    report = judge(swapped(), gate(margin=0.35))
    assert (report.verdict, report.summary) == ("INCONCLUSIVE", "INCONCLUSIVE, 1 of 2 findings")
    assert report.findings[0].verdict == "inconclusive"
    needed = report.findings[0].n_more_patients
    assert needed == 334
    assert f"about {needed} more positive patients would decide it" in report.reasons[0]


def test_each_finding_has_its_own_margin() -> None:
    assert judge(**many(swapped()), limits=gate(margin=0.1, Mass=0.4)).verdict == "PASS"
    assert judge(**many(swapped()), limits=gate(margin=0.4, Mass=0.1)).verdict == "FAIL"


def test_a_better_candidate_passes() -> None:
    data = many(swapped())
    data["reference"], data["candidate"] = data["candidate"], data["reference"]
    report = judge(**data, limits=gate(margin=0.01))
    assert (report.verdict, report.findings[0].difference) == ("PASS", 0.25)


def test_one_positive_patient_leaves_the_variance_undefined_and_says_so() -> None:
    numbers = np.array([7, 7, 7, 7, 1, 2, 3, 4])
    report = judge(LOGITS, gate(patients=1), patients=numbers)
    assert report.findings[0].verdict == "not assessable"
    assert "variance is undefined" in str(report.findings[0].why_not_assessable)
    assert (report.findings[0].difference_low, report.mean_difference_low) == (None, None)
    assert report.verdict == "INCONCLUSIVE"


def test_no_difference_on_any_patient_is_zero_plus_minus_zero() -> None:
    report = judge(LOGITS * 0.99, gate(margin=0.001))
    first = report.findings[0]
    assert (first.difference_low, first.difference, first.difference_high, first.p_value) == (0.0, 0.0, 0.0, 0.0)
    assert (first.rank_churn, report.verdict) == (0.0, "PASS")
    assert first.noise_share == pytest.approx(0.01, abs=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("patients", [4, 1000])
def test_a_candidate_that_is_not_finite_never_passes(bad: float, patients: int) -> None:
    candidate = LOGITS.copy()
    candidate[3, 1] = bad
    report = judge(candidate, gate(margin=0.5, patients=patients))
    assert report.verdict == "FAIL"
    assert report.reasons[0] == "the candidate answered with NaN or infinity"
    assert report.max_abs_probability_difference == 1.0
    assert report.max_abs_logit_difference == math.inf
    if math.isnan(bad):
        assert report.findings[1].auroc_candidate is None


def test_a_finding_that_is_not_finite_leaves_the_others_their_own_intervals() -> None:
    data = many(swapped())
    whole = judge(**data, limits=gate(margin=0.35)).findings[0]
    data["candidate"][0, 1] = math.nan
    report = judge(**data, limits=gate(margin=0.35))
    mass, hernia = report.findings
    assert (report.verdict, hernia.verdict, hernia.p_value, hernia.difference_low) == ("FAIL", "fail", None, None)
    assert (mass.difference, mass.difference_low, mass.p_value) == (-0.25, whole.difference_low, whole.p_value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reference_that_is_not_finite_is_refused(bad: float) -> None:
    reference = LOGITS.copy()
    reference[0, 0] = bad
    with pytest.raises(MetricError, match="reference answered with NaN or infinity"):
        judge(LOGITS, gate(), reference=reference)


def test_positives_are_counted_by_patient() -> None:
    # Both findings have four present images, here of one patient.
    numbers = np.array([7, 7, 7, 7, 1, 2, 3, 4])
    report = judge(LOGITS, gate(patients=2), patients=numbers)
    assert [(f.n_positive, f.n_positive_patients) for f in report.findings] == [(4, 1), (4, 1)]
    assert [f.verdict for f in report.findings] == ["not assessable"] * 2
    assert (report.verdict, report.n_assessable, report.n_patients) == ("INCONCLUSIVE", 0, 5)
    assert "no finding has 2 positive patients" in report.reasons[0]
    assert report.findings[0].why_not_assessable == "1 positive patients, 2 are needed"


def test_a_finding_with_too_few_patients_is_not_judged() -> None:
    truth = TRUTH.copy()
    truth[1:4, 0] = False
    report = judge(swapped(), gate(margin=0.01, patients=4), truth=truth)
    assert [f.verdict for f in report.findings] == ["not assessable", "pass"]
    assert report.summary == "PASS on 1 of 2"


def test_a_probability_limit_fails_even_where_no_finding_is_assessable() -> None:
    assert judge(-LOGITS, gate(patients=1000, max_dp=0.5)).verdict == "FAIL"


def test_an_undefined_auroc_is_left_out_of_the_mean_and_counted() -> None:
    truth = TRUTH.copy()
    truth[:, 1] = True
    report = judge(swapped(), gate(margin=0.3), truth=truth)
    assert (report.findings[1].auroc_reference, report.findings[1].difference) == (None, None)
    assert report.findings[1].verdict == "not assessable"
    assert (report.n_counted, report.mean_auroc_reference, report.mean_auroc_candidate) == (1, 1.0, 0.75)


def test_no_defined_auroc_leaves_no_mean() -> None:
    report = judge(LOGITS, gate(), truth=np.zeros_like(TRUTH))
    assert (report.mean_auroc_reference, report.n_counted, report.verdict) == (None, 0, "INCONCLUSIVE")


def test_the_largest_probability_difference_has_a_limit() -> None:
    # Logit 0 is p = 0.5; logit ln 3 is p = 0.75. One image moves by 0.25.
    reference = LOGITS * 0.0
    candidate = reference.copy()
    candidate[5, 1] = math.log(3.0)
    limits = {"margin": 0.5, "p999": 0.3}
    report = judge(candidate, gate(max_dp=0.26, **limits), reference=reference)
    assert report.verdict != "FAIL"
    assert report.max_abs_probability_difference == pytest.approx(0.25, abs=1e-6)
    assert report.max_abs_logit_difference == pytest.approx(math.log(3.0), abs=1e-6)
    failed = judge(candidate, gate(max_dp=0.24, **limits), reference=reference)
    assert failed.reasons[0] == "max_abs_probability_difference 0.2500, limit 0.24"


@pytest.mark.parametrize(("n_moved", "expected"), [(1, 0.0), (2, 0.0), (3, 0.25)])
def test_the_999_permille_is_an_observed_value(n_moved: int, expected: float) -> None:
    # 2002 values: the quantile's place is 0.999 * 2001 = 1998.999, so value 1999 counting from 0: the third largest.
    n = 1001
    truth = np.zeros((n, 2), np.bool_)
    truth[: n // 2] = True
    reference = np.zeros((n, 2), np.float32)
    candidate = reference.copy()
    candidate[:n_moved, 0] = math.log(3.0)
    report = judge(candidate, gate(margin=0.5, p999=0.1), reference=reference, truth=truth)
    assert report.p999_abs_probability_difference == pytest.approx(expected, abs=1e-6)
    assert report.verdict == ("FAIL" if expected > 0.1 else "PASS")


def test_in_a_small_set_the_999_permille_is_the_maximum() -> None:
    candidate = LOGITS.copy()
    candidate[0, 0] = 0.0
    report = judge(candidate, gate())
    assert report.p999_abs_probability_difference == report.max_abs_probability_difference > 0.3


def test_crushed_confidences_fail_although_no_auroc_changes() -> None:
    # sigmoid(2) = 0.8808, sigmoid(1) = 0.7311: 0.1497 apart.
    report = judge(LOGITS / 2, gate(margin=1e-6, max_dp=0.1, p999=0.1))
    assert [finding.difference for finding in report.findings] == [0.0, 0.0]
    assert report.max_abs_probability_difference == pytest.approx(0.1497, abs=1e-4)
    assert report.n_flips == 0
    assert report.verdict == "FAIL"
    assert [reason.split()[0] for reason in report.reasons] == [
        "max_abs_probability_difference",
        "p999_abs_probability_difference",
    ]


def test_flips_are_counted_at_the_operating_points() -> None:
    candidate = LOGITS.copy()
    candidate[0, 0] = -0.1  # present -> absent
    candidate[7, 0] = 0.0  # p = 0.5, which is at the operating point: absent -> present
    candidate[6, 1] = 1.0  # has no operating point
    report = judge(candidate, gate(margin=0.5), points={"Mass": 0.5})
    assert [finding.n_flips for finding in report.findings] == [2, None]
    first = report.findings[0]
    assert (first.n_gained, first.n_lost, first.mcnemar_p) == (1, 1, 1.0)
    assert [finding.operating_point for finding in report.findings] == [0.5, None]
    assert (report.n_flips, report.n_decisions) == (2, 8)


@pytest.mark.parametrize(
    ("candidate", "truth", "n_patients"),
    [
        (LOGITS[:7], TRUTH, 8),
        (LOGITS[:, :1], TRUTH, 8),
        (LOGITS, TRUTH[:7], 8),
        (LOGITS, TRUTH, 7),
    ],
)
def test_shapes_that_differ_are_refused(
    candidate: NDArray[np.float32], truth: NDArray[np.bool_], n_patients: int
) -> None:
    with pytest.raises(MetricError, match="needed"):
        judge(candidate, gate(), truth=truth, patients=np.arange(n_patients))


def test_no_images_are_refused() -> None:
    with pytest.raises(MetricError, match="N > 0"):
        judge(LOGITS[:0], gate(), reference=LOGITS[:0], truth=TRUTH[:0])


def test_only_pass_exits_with_zero() -> None:
    assert EXIT_CODES == {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}


def test_a_subgroup_is_reported_with_what_it_can_show() -> None:
    data = many(swapped())
    women = np.arange(400) % 8 < 4  # all of the present images and none of the others
    half = np.arange(400) < 200
    report = compare(
        data["reference"],
        data["candidate"],
        data["truth"],
        np.arange(400),
        NAMES,
        POINTS,
        gate(margin=0.4),
        groups={"sex F": women, "first half": half, "nobody": np.zeros(400, np.bool_)},
    )
    assert [group.group for group in report.subgroups] == ["sex F", "first half"]
    women_row, half_row = report.subgroups
    assert (women_row.n_images, women_row.n_assessable, women_row.mean_difference) == (200, 0, None)
    assert (half_row.n_patients, half_row.n_assessable, half_row.mean_difference) == (200, 2, -0.125)
    assert (half_row.worst_finding, half_row.worst_difference, half_row.n_flips) == ("Mass", -0.25, 25)


def test_rank_churn_by_hand() -> None:
    order = np.array([1.0, 2.0, 3.0, 4.0])
    assert rank_churn(order, order * 10) == 0.0
    assert rank_churn(order, -order) == 0.5  # moves by 3, 1, 1 and 3 of 4 places
    assert rank_churn(order, np.array([2.0, 1.0, 3.0, 4.0])) == 0.125
    assert rank_churn(order, np.zeros(4)) == 0.25  # all tie at 2.5: moves by 1.5, 0.5, 0.5 and 1.5


def test_noise_is_measured_in_the_references_own_spread() -> None:
    reference = np.array([-1.0, 1.0, -1.0, 1.0], np.float32)
    assert noise_share(reference, reference + np.float32(0.5)) == 0.5
    assert math.isnan(noise_share(reference * 0, reference))


def test_map_correlation_by_hand() -> None:
    bump = np.zeros((1, 1, 2, 2), np.float32)
    bump[..., 0, 0] = 1.0
    elsewhere = bump[..., ::-1, ::-1]
    maps = np.concatenate([bump, bump, bump, bump * 0], axis=1)
    others = np.concatenate([bump * 3 + 1, -bump, elsewhere, bump], axis=1)
    # Centred, the bump is (3, -1, -1, -1) / 4: with itself elsewhere the product is -4/16 against 12/16.
    np.testing.assert_allclose(map_correlation(maps, others), [[1.0, -1.0, -1 / 3, np.nan]], rtol=1e-6)


def test_map_correlation_is_summarised_over_images() -> None:
    correlation = np.ones((8, 2), np.float32)
    correlation[0, 0] = 0.5
    correlation[:, 1] = np.nan
    report = compare(LOGITS, LOGITS, TRUTH, np.arange(8), NAMES, POINTS, gate(), map_correlation=correlation)
    assert [(f.map_correlation_median, f.map_correlation_p01) for f in report.findings] == [(1.0, 0.5), (None, None)]


def test_a_finding_that_nobody_labels_is_named_and_costs_the_others_nothing() -> None:
    labelled = np.ones_like(TRUTH)
    labelled[:, 1] = False
    labelled[3, 0] = False  # one of the four patients with Mass
    report = compare(LOGITS, swapped(), TRUTH, np.arange(8), NAMES, POINTS, gate(patients=3), labelled=labelled)
    mass, hernia = report.findings
    assert (mass.n_positive, mass.n_positive_patients) == (3, 3)
    assert mass.auroc_candidate == pytest.approx(8 / 12)  # the fallen one loses to all four
    assert (hernia.why_not_assessable, hernia.auroc_reference, hernia.ece_reference) == (
        "no image is labelled for it",
        None,
        None,
    )
    assert report.left_out == ("Hernia",)


def test_what_needs_labels_is_of_the_labelled_images_alone() -> None:
    """An image without a label is not one without the finding: figures are those of the others by themselves."""
    rng = np.random.default_rng(0)
    truth, numbers = rng.random((60, 2)) < 0.4, np.arange(60)
    reference = (2 * truth + rng.normal(0, 1, (60, 2))).astype(np.float32)
    candidate = reference + rng.normal(0.3, 0.2, (60, 2)).astype(np.float32)
    labelled = np.arange(60)[:, None] < np.array([30, 60])
    whole = compare(reference, candidate, truth & labelled, numbers, NAMES, POINTS, gate(), labelled=labelled)
    part = compare(reference[:30], candidate[:30], truth[:30], numbers[:30], NAMES, POINTS, gate())
    of_labels = ("n_positive", "difference", "difference_low", "p_value", "ece_reference", "ece_candidate")
    for name in (*of_labels, "calibration_growth", "calibration_growth_low", "calibration_growth_high"):
        assert getattr(whole.findings[0], name) == pytest.approx(getattr(part.findings[0], name)), name


def test_why_nothing_is_assessable_is_said_in_its_own_words() -> None:
    for changed, found in (
        ({"patients": np.zeros(8, np.int64)}, "all images are of one patient, or nobody knows whose"),
        ({"truth": np.ones_like(TRUTH)}, "AUROC parity is not shown: Mass, Hernia: one class only"),
        ({"truth": np.zeros_like(TRUTH)}, "no finding has 4 positive patients"),
    ):
        assert judge(LOGITS, gate(), **changed).reasons[0].startswith(found)  # type: ignore[arg-type]
