import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import minimize_scalar
from sklearn.metrics import roc_auc_score

from benchmarks.statistics.coverage import SCENARIOS, Scenario, draw, simulate
from chexnet_deploy.errors import MetricError
from chexnet_deploy.metrics.delong import compare_all, compare_areas, estimate_area
from chexnet_deploy.metrics.intervals import (
    AreaEstimate,
    PairedDifference,
    patients_needed,
    student_t_quantile,
    student_t_tail,
)
from chexnet_deploy.metrics.roc import auroc, mean_auroc

Floats = NDArray[np.float64]
# One image: a score of each model, coarse enough to tie; whether the finding is present; whose image it is.
STUDIES = st.lists(
    st.tuples(st.integers(-3, 3), st.integers(-3, 3), st.booleans(), st.integers(0, 7)), min_size=4, max_size=40
)


def read(rows: list[tuple[int, int, bool, int]]) -> tuple[Floats, Floats, NDArray[np.bool_], NDArray[np.int64]]:
    reference, candidate, truth, patients = zip(*rows, strict=True)
    return np.array(reference, float), np.array(candidate, float), np.array(truth), np.array(patients)


def wins(scores: Floats, truth: NDArray[np.bool_]) -> Floats:
    """Every positive against every negative: 1, 1/2 or 0."""
    difference = scores[truth][:, None] - scores[~truth][None, :]
    return (np.sign(difference) + 1) / 2


def obuchowski(kernel: Floats, truth: NDArray[np.bool_], patients: NDArray[np.int64]) -> float:
    """Equations of Obuchowski 1997, patient by patient, of any [M, N] kernel: one model's wins or a difference of two."""
    area, v10, v01 = kernel.mean(), kernel.mean(1), kernel.mean(0)
    m_total, n_total = kernel.shape
    everyone = np.unique(patients)
    x = np.array([(v10[patients[truth] == i] - area).sum() for i in everyone])
    y = np.array([(v01[patients[~truth] == i] - area).sum() for i in everyone])
    i10, i01, i_all = len(np.unique(patients[truth])), len(np.unique(patients[~truth])), len(everyone)
    s10 = i10 / ((i10 - 1) * m_total) * (x**2).sum()
    s01 = i01 / ((i01 - 1) * n_total) * (y**2).sum()
    s11 = i_all / (i_all - 1) * (x * y).sum()
    return float(s10 / m_total + s01 / n_total + 2 * s11 / (m_total * n_total))


def study(
    n_patients: int, seed: int = 0, loss: float = 0.0
) -> tuple[Floats, Floats, NDArray[np.bool_], NDArray[np.int64]]:
    """Three images of each patient, a third of the patients with the finding on some."""
    rng = np.random.default_rng(seed)
    patients = np.repeat(np.arange(n_patients), 3)
    truth = (rng.random(3 * n_patients) < 0.6) & (patients % 3 == 0)
    reference = rng.normal(size=n_patients)[patients] + rng.normal(size=3 * n_patients) + 2 * truth
    candidate = reference + 0.3 * rng.normal(size=3 * n_patients) - loss * truth
    return reference, candidate, truth, patients


def test_five_images_of_four_patients_by_hand() -> None:
    # Patient 1 has a positive (0.9) and a negative (0.4) image, patient 2 a positive (0.5), 3 and 4 a negative (0.5, 0.1).
    # Wins of 0.9: 1, 1, 1; of 0.5: 1, 1/2, 1. So V10 = 1, 5/6 and V01 = 1, 3/4, 1 around an area of 11/12.
    # S10 = 2/(1*2) * (1/12^2 + 1/12^2) = 1/72;  S01 = 3/(2*3) * (1/12^2 + 1/6^2 + 1/12^2) = 1/48
    # S11 = 4/3 * (1/12 * 1/12) = 1/108, of patient 1 alone
    estimate = estimate_area(
        np.array([0.9, 0.5, 0.4, 0.5, 0.1]), np.array([True, True, False, False, False]), np.array([1, 2, 1, 3, 4])
    )
    assert estimate.area == pytest.approx(11 / 12, abs=1e-15)
    assert estimate.variance == pytest.approx((1 / 72) / 2 + (1 / 48) / 3 + 2 * (1 / 108) / 6, abs=1e-15)
    assert (estimate.n_positive, estimate.n_positive_patients, estimate.n_negative_patients) == (2, 2, 3)


@given(STUDIES)
def test_equals_scikit_learn_and_the_equations_patient_by_patient(rows: list[tuple[int, int, bool, int]]) -> None:
    reference, candidate, truth, patients = read(rows)
    if truth.all() or not truth.any():
        return
    found = compare_areas(reference, candidate, truth, patients)
    assert found.reference.area == pytest.approx(roc_auc_score(truth, reference), abs=1e-12)
    assert found.candidate.area == pytest.approx(roc_auc_score(truth, candidate), abs=1e-12)
    if found.reference.n_patients < 2:
        assert math.isnan(found.variance)
        return
    kernels = wins(reference, truth), wins(candidate, truth)
    expected = [obuchowski(k, truth, patients) for k in (*kernels, kernels[1] - kernels[0])]
    variances = [found.reference.variance, found.candidate.variance, found.variance]
    assert variances == pytest.approx([max(e, 0.0) for e in expected], abs=1e-10)
    assert estimate_area(reference, truth, patients) == found.reference


@given(STUDIES)
def test_with_one_image_a_patient_it_is_plain_delong(rows: list[tuple[int, int, bool, int]]) -> None:
    reference, candidate, truth, _ = read(rows)
    if min(truth.sum(), (~truth).sum()) < 2:
        return
    kernel = wins(candidate, truth) - wins(reference, truth)
    plain = kernel.mean(1).var(ddof=1) / truth.sum() + kernel.mean(0).var(ddof=1) / (~truth).sum()
    found = compare_areas(reference, candidate, truth, np.arange(len(truth)))
    assert found.variance == pytest.approx(plain, abs=1e-12)


def test_patients_with_more_images_leave_fewer_degrees_of_freedom() -> None:
    # Negatives alike, so only five positive patients vary. With 2, 1, 1, 1, 1 images they weigh 3, 1, 1, 1, 1:
    # as much as 7^2 / 13 equal patients, less one.
    scores = np.array([1.0, 2, -1, 1, -1, 1, 0, 0, 0])
    truth = np.arange(9) < 6
    estimate = estimate_area(scores, truth, np.array([1, 1, 2, 3, 4, 5, 6, 7, 8]))
    assert estimate.degrees_of_freedom == pytest.approx(49 / 13 - 1, abs=1e-12)
    assert estimate_area(scores, truth, np.arange(9)).degrees_of_freedom == pytest.approx(5, abs=1e-12)


def test_copies_of_an_image_add_no_information() -> None:
    reference, candidate, truth, patients = study(30)
    once = compare_areas(reference, candidate, truth, patients)
    thrice = compare_areas(*(np.repeat(a, 3) for a in (reference, candidate, truth, patients)))
    assert thrice.variance == pytest.approx(once.variance, rel=1e-12)


def test_models_that_rank_alike_differ_by_zero_exactly() -> None:
    reference, _, truth, patients = study(30)
    found = compare_areas(reference, np.exp(reference), truth, patients)
    assert (found.difference, found.variance, found.interval()) == (0.0, 0.0, (0.0, 0.0))
    assert found.non_inferiority_p(0.005) == 0.0
    assert found.non_inferiority_p(0.0) == 1.0  # equal is not better


def test_a_difference_without_variance_is_not_certain() -> None:
    # The reference separates 4 + 4 patients; the candidate says the same of everyone. No patient differs from another.
    truth = np.arange(8) < 4
    found = compare_areas(truth.astype(float), np.zeros(8), truth, np.arange(8))
    assert (found.difference, found.variance, found.degrees_of_freedom) == (-0.5, 0.0, 3.0)
    lower, upper = found.interval()
    assert lower == -1.0
    assert upper > 0.2  # standard error 1/2, as 4 patients worth -1 to 1 each have at most, not 0
    assert found.non_inferiority_p(0.005) > 0.5


def test_one_positive_patient_has_an_area_without_variance() -> None:
    found = compare_areas(
        np.array([0.9, 0.8, 0.3, 0.1]),
        np.array([0.9, 0.2, 0.3, 0.1]),
        np.array([True, True, False, False]),
        np.array([5, 5, 6, 7]),
    )
    assert (found.reference.area, found.candidate.area) == (1.0, 0.75)
    assert found.reference.n_positive_patients == 1
    undefined = (found.variance, *found.interval(), *found.reference.interval(), found.non_inferiority_p(0.1))
    assert all(math.isnan(value) for value in undefined)
    assert patients_needed(found, 0.1) is None


@pytest.mark.parametrize("present", [True, False])
def test_one_class_only_is_undefined(present: bool) -> None:
    estimate = estimate_area(np.array([0.1, 0.9, 0.5]), np.full(3, present), np.arange(3))
    assert math.isnan(estimate.area)
    assert math.isnan(estimate.variance)


def test_what_cannot_be_ranked_or_paired_is_refused() -> None:
    reference, candidate, truth, patients = study(6)
    with pytest.raises(MetricError, match="1 of 18 scores are NaN"):
        compare_areas(reference, np.where(np.arange(18) == 7, np.nan, candidate), truth, patients)
    with pytest.raises(MetricError, match="same N"):
        compare_areas(reference, candidate[:-1], truth, patients)
    with pytest.raises(MetricError, match="same N"):
        estimate_area(reference, truth, patients[:-1])
    with pytest.raises(MetricError, match="same N"):
        estimate_area(reference[:0], truth[:0], patients[:0])
    with pytest.raises(MetricError, match="True or False"):
        estimate_area(reference, truth.astype(int), patients)
    with pytest.raises(MetricError, match="needed a fraction"):
        compare_areas(reference, candidate, truth, patients).interval(95)


def test_infinity_is_a_rank_like_any_other() -> None:
    scores, truth = np.array([np.inf, 0.5, -np.inf, 0.5]), np.array([True, True, False, False])
    assert estimate_area(scores, truth, np.arange(4)).area == 3.5 / 4


def pair(area: float, difference: float, standard_error: float, freedom: float, area_error: float) -> PairedDifference:
    reference = AreaEstimate(area, area_error**2, freedom, 50, 40, 200)
    return PairedDifference(reference, replace(reference, area=area + difference), standard_error**2, freedom)


def test_at_an_area_of_one_half_the_interval_is_students() -> None:
    # t(0.975, 10) = 2.228 in every table
    lower, upper = pair(0.5, 0.0, 0.01, 10, 0.05).interval()
    assert (lower, upper) == (pytest.approx(-0.02228, abs=1e-5), pytest.approx(0.02228, abs=1e-5))


def test_near_one_a_small_loss_is_trusted_less_than_a_small_gain() -> None:
    """Few positives may hold no hard case, and then show little of a loss."""
    found = pair(0.98, 0.0, 0.002, 20, 0.01)
    assert found.interval()[0] < -2.086 * 0.002
    assert found.interval()[1] > 2.086 * 0.002
    few_errors = pair(0.98, 0.0, 0.002, 20, 0.0001)
    assert few_errors.interval() == (pytest.approx(-2.086 * 0.002, rel=1e-3), pytest.approx(2.086 * 0.002, rel=1e-3))


@pytest.mark.parametrize(("difference", "margin"), [(-0.002, 0.02), (-0.02, 0.03), (0.001, 0.01), (-0.012, 0.005)])
def test_the_p_value_is_that_of_the_stated_statistic(difference: float, margin: float) -> None:
    found = pair(0.95, difference, 0.004, 15, 0.02)
    z = stats.norm.ppf(0.95 + difference / 2)
    dispersion = (0.02 * z / stats.norm.pdf(z)) ** 2
    noise = max(0.004**2 - dispersion * max(difference**2 - 0.004**2, 0), 0.004**2 / 4)
    square = minimize_scalar(
        lambda u: u**2 + (difference + margin * np.exp(u * np.sqrt(dispersion))) ** 2 / noise, bounds=(-8, 8)
    ).fun
    expected = stats.t.sf(np.copysign(np.sqrt(square), difference + margin), 15)
    assert found.non_inferiority_p(margin) == pytest.approx(expected, rel=2e-3)


@given(
    area=st.floats(0.55, 0.99),
    difference=st.floats(-0.05, 0.005),
    error=st.floats(1e-4, 0.05),
    freedom=st.floats(1, 500),
    area_error=st.floats(1e-3, 0.1),
    margin=st.floats(0.001, 0.1),
)
@settings(max_examples=60)
def test_the_interval_and_the_test_decide_alike(
    area: float, difference: float, error: float, freedom: float, area_error: float, margin: float
) -> None:
    found = pair(area, difference, error, freedom, area_error)
    lower, upper = found.interval()
    assert -1 <= lower <= difference + 1e-12
    assert difference - 1e-12 <= upper <= 1
    if abs(lower + margin) > 1e-9:
        assert (lower > -margin) == (found.non_inferiority_p(margin) < 0.025)


def test_an_area_s_interval_stays_inside_0_and_1() -> None:
    reference, _, truth, patients = study(40)
    estimate = estimate_area(reference, truth, patients)
    lower, upper = estimate.interval()
    assert 0 < lower < estimate.area < upper < 1
    assert estimate.interval(0.8)[0] > lower


def test_perfect_separation_is_not_certainty() -> None:
    # 20 of 20 patients: Wilson's lower bound n / (n + t^2) with t(0.975, 19) = 2.093
    truth = np.arange(60) < 20
    lower, upper = estimate_area(truth.astype(float), truth, np.arange(60)).interval()
    assert lower == pytest.approx(20 / (20 + 2.093**2), abs=1e-4)
    assert upper == pytest.approx(1.0, abs=1e-15)


def test_all_findings_at_once_are_the_findings_one_by_one() -> None:
    reference, candidate, truth, patients = study(30)
    scores = np.stack([reference, candidate, -reference], 1), np.stack([candidate, reference, candidate], 1)
    labels = np.stack([truth, truth, patients == 3], 1)
    together = compare_all(*scores, labels, patients)
    for c in range(3):
        apart = compare_areas(scores[0][:, c], scores[1][:, c], labels[:, c], patients)
        assert repr(together.findings[c]) == repr(apart)
    # The third has one positive patient, so no variance; the mean says that it leaves it out.
    assert (together.counted, together.left_out) == ((0, 1), (2,))
    assert together.mean is not None
    # The second is the first with the models swapped: what one gains the other loses, patient by patient.
    assert together.mean.difference == pytest.approx(0.0, abs=1e-15)
    assert together.mean.variance == pytest.approx(0.0, abs=1e-20)


def test_a_mean_over_copies_of_a_finding_is_that_finding() -> None:
    reference, candidate, truth, patients = study(30)
    alone = compare_areas(reference, candidate, truth, patients)
    mean = compare_all(*(np.stack([a] * 3, 1) for a in (reference, candidate, truth)), patients).mean
    assert mean is not None
    assert mean.difference == pytest.approx(alone.difference, abs=1e-15)
    assert mean.variance == pytest.approx(alone.variance, rel=1e-12)


def test_a_mean_over_independent_findings_has_a_third_of_their_variance() -> None:
    # 1000 patients with one image each: covariances between unrelated findings nearly vanish.
    rng = np.random.default_rng(1)
    truth = rng.random((1000, 3)) < 0.4
    reference = rng.normal(size=(1000, 3)) + truth
    together = compare_all(reference, reference + rng.normal(size=(1000, 3)), truth, np.arange(1000))
    assert together.mean is not None
    average = sum(finding.variance for finding in together.findings) / 3
    assert together.mean.variance == pytest.approx(average / 3, rel=0.1)
    assert together.mean.degrees_of_freedom > 1000  # three findings' patients
    areas = {str(c): auroc(reference[:, c], truth[:, c]) for c in range(3)}
    assert together.mean.reference.area == pytest.approx(mean_auroc(areas).value, abs=1e-15)


def test_nothing_counted_has_no_mean() -> None:
    found = compare_all(np.zeros((4, 1)), np.zeros((4, 1)), np.ones((4, 1), bool), np.arange(4))
    assert (found.mean, found.counted, found.left_out) == (None, (), (0,))


def bootstrap_difference(
    reference: Floats, candidate: Floats, truth: NDArray[np.bool_], patients: NDArray[np.int64], n: int, seed: int = 0
) -> Floats:
    """Differences of areas over n draws of the patients: a slow check that assumes no formula."""
    n_patients = len(np.unique(patients))
    times = np.random.default_rng(seed).multinomial(n_patients, np.full(n_patients, 1 / n_patients), size=n)
    draws = (np.repeat(np.arange(len(truth)), drawn[patients]) for drawn in times)
    return np.array([auroc(candidate[i], truth[i]) - auroc(reference[i], truth[i]) for i in draws])


def test_bootstrap_counts_a_patient_drawn_twice_twice() -> None:
    reference, candidate, truth, patients = study(8, seed=3)
    scores = np.round(reference), np.round(candidate)  # with ties
    times = np.random.default_rng(7).multinomial(8, np.full(8, 1 / 8), size=5)
    for found, drawn in zip(bootstrap_difference(*scores, truth, patients, 5, seed=7), times, strict=True):
        pairs = np.outer(drawn[patients[truth]], drawn[patients[~truth]])
        with np.errstate(invalid="ignore"):  # nan where a class is not drawn
            areas = [(wins(model, truth) * pairs).sum() / pairs.sum() for model in scores]
        assert found == pytest.approx(areas[1] - areas[0], abs=1e-15, nan_ok=True)


def test_bootstrap_agrees_with_the_formula() -> None:
    reference, candidate, truth, patients = study(300, loss=0.1)
    formula = compare_areas(reference, candidate, truth, patients)
    resampled = bootstrap_difference(reference, candidate, truth, patients, 2000)
    # The standard deviation of 2000 draws has a relative error of 1.6 %.
    assert math.sqrt(formula.variance) == pytest.approx(resampled.std(), rel=0.06)
    assert formula.interval() == pytest.approx(tuple(np.quantile(resampled, [0.025, 0.975])), abs=2e-3)


def test_patients_needed_by_hand() -> None:
    # Standard error 0.005 with 40 positive patients and a margin of 0.005: (1.968 + 0.842)^2 = 7.90 times as many, as
    # Student's t with 39 * 7.9 degrees of freedom has its 2.5 % at 1.968.
    found = pair(0.5, 0.0, 0.005, 39, 0.05)
    assert patients_needed(found, 0.005) == math.ceil(40 * 7.895) - 40 == 276
    assert patients_needed(found, 0.02) == 0
    assert patients_needed(found, 0.0095) == 49  # 40 * ((1.988 + 0.842) * 0.005 / 0.0095)^2 = 88.7; p is 0.03 with 40
    assert patients_needed(pair(0.5, -0.005, 0.005, 39, 0.05), 0.005) is None
    assert patients_needed(pair(0.5, -0.02, 0.005, 39, 0.05), 0.005) is None


def test_student_t_as_in_tables_and_scipy() -> None:
    assert student_t_quantile(0.975, 1) == pytest.approx(12.7062047, abs=1e-6)
    assert student_t_quantile(0.975, 10) == pytest.approx(2.2281389, abs=1e-6)
    for freedom in (1.0, 1.5, 4.0, 19.3, 250.0, 2795.0):
        for probability in (0.001, 0.3, 0.5, 0.9, 0.975, 0.99999):
            expected = stats.t.ppf(probability, freedom)
            assert student_t_quantile(probability, freedom) == pytest.approx(expected, rel=1e-9, abs=1e-12)
        for t in (-3.0, 0.0, 1e-9, 0.4, 2.0, 40.0):
            assert student_t_tail(t, freedom) == pytest.approx(stats.t.sf(t, freedom), rel=1e-9)


@pytest.mark.parametrize("is_gross", [False, True])
def test_simulated_studies_have_the_areas_they_claim(is_gross: bool) -> None:
    scenario = Scenario(
        name="large",
        area=0.8,
        margin=0.02,
        correlation=0.9,
        n_patients=20_000,
        positive_patients=(8_000, 8_000),
        is_gross=is_gross,
    )
    found = compare_areas(*draw(scenario, 0.02, np.random.default_rng(0)))
    assert found.reference.area == pytest.approx(0.8, abs=4 * math.sqrt(found.reference.variance))
    assert found.difference == pytest.approx(-0.02, abs=4 * math.sqrt(found.variance))
    assert math.sqrt(found.variance) < 0.002


def test_a_candidate_at_the_margin_passes_less_often_than_by_wald() -> None:
    """A sample of benchmarks/statistics/coverage.py: 25 or so positive patients, an area of 0.98."""
    rates = simulate(next(s for s in SCENARIOS if s.name == "20-30, area 0.98"), 300, seed=0)
    assert rates.type_i_error < 0.06 < rates.wald_type_i_error
    assert rates.coverage_equal > 0.92
    assert rates.power > 0.9


def test_a_finding_is_compared_on_the_images_labelled_for_it() -> None:
    rng = np.random.default_rng(3)
    reference, candidate, truth = rng.normal(size=(60, 2)), rng.normal(size=(60, 2)), rng.random((60, 2)) < 0.4
    patients, labelled = np.arange(60) // 2, np.ones((60, 2), np.bool_)
    labelled[20:, 1] = False
    found = compare_all(reference, candidate, truth, patients, labelled).findings
    alone = [
        compare_areas(reference[:n, c], candidate[:n, c], truth[:n, c], patients[:n]) for c, n in ((0, 60), (1, 20))
    ]
    for got, wanted in zip(found, alone, strict=True):
        assert (got.reference.area, got.candidate.area) == (wanted.reference.area, wanted.candidate.area)
        assert got.variance == pytest.approx(wanted.variance, rel=1e-12)
        assert got.reference.n_positive_patients == wanted.reference.n_positive_patients
    assert np.isnan(compare_all(reference, candidate, truth, patients, labelled & False).findings[0].variance)
