"""What AUROC can't see has limits of its own, with intervals clustered by patient."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from chexnet_deploy.evaluation.gates import GateResult
from chexnet_deploy.evaluation.parity import ParityReport, compare
from chexnet_deploy.evaluation.spec import Gate

NAMES = ("Mass", "Hernia")
POINTS = {"Mass": 0.5, "Hernia": 0.5}
N = 400


def gate(**limits: float) -> Gate:
    return Gate(
        auroc_margin={"default": 0.5},
        min_positive_patients=4,
        max_abs_probability_difference=1.0,
        p999_abs_probability_difference=1.0,
        latency="not gated",
        **limits,  # type: ignore[arg-type]
    )


def logits(flipped: int = 0, of: int = 0) -> NDArray[np.float32]:
    """Mass is likelier on every image; the first `flipped` images answer the other way about finding `of`."""
    answers = np.array([[0.5, 0.2], [-0.2, -0.5]] * (N // 2), np.float32)
    answers[:flipped, of] *= -1
    return answers


def judge(
    candidate: NDArray[np.float32], limits: Gate, *, images_each: int = 1, points: dict[str, float] = POINTS
) -> ParityReport:
    truth = np.array([[True, True], [False, False]] * (N // 2))
    return compare(logits(), candidate, truth, np.arange(N) // images_each, NAMES, points, limits)


def result(report: ParityReport, name: str) -> GateResult:
    (found,) = (each for each in report.gates if each.gate == name)
    return found


def test_flips_are_a_share_of_all_decisions() -> None:
    # 8 of 400 images answer otherwise on one of two findings: 8 of 800 decisions, 0.01.
    report = judge(logits(8, 1), gate(flip_share=0.03))
    flips = result(report, "flip_share")
    assert (flips.value, flips.verdict, report.verdict, report.reasons) == (0.01, "pass", "PASS", ())
    # Wilson's interval of 8 of 800 by hand: (0.01 + 0.0024 -/+ 0.0073) / 1.0048.
    assert flips.low == pytest.approx(0.005, abs=3e-4)
    assert flips.high == pytest.approx(0.0197, abs=3e-4)


def test_a_share_beyond_its_limit_fails_and_one_whose_interval_reaches_it_is_inconclusive() -> None:
    failed = judge(logits(8, 1), gate(flip_share=0.009))
    assert (failed.verdict, failed.summary) == ("FAIL", "FAIL by flip_share")
    assert failed.reasons[0].startswith("flip_share 0.0100 (0.0051 to 0.0")
    assert failed.reasons[0].endswith("limit 0.009")
    doubtful = judge(logits(8, 1), gate(flip_share=0.015))
    assert (doubtful.verdict, doubtful.summary) == ("INCONCLUSIVE", "INCONCLUSIVE by flip_share")
    # Wilson's interval ends at 0.015 where t² / n is 0.005² / (0.015 * 0.985): of 2274 decisions, two a patient.
    more = result(doubtful, "flip_share").n_more_patients
    assert more == pytest.approx(1.965**2 * 0.015 * 0.985 / 0.005**2 / 2 - 400, rel=0.02)
    assert f"about {more} more patients would decide it" in doubtful.reasons[0]


def test_images_of_one_patient_widen_the_interval() -> None:
    alone = result(judge(logits(8, 1), gate()), "flip_share")
    by_eight = result(judge(logits(8, 1), gate(), images_each=8), "flip_share")
    assert alone.value == by_eight.value == 0.01
    assert alone.high is not None
    assert by_eight.high is not None
    assert by_eight.high > 2 * alone.high  # all eight flips are one patient's


def test_no_flip_is_not_certainty() -> None:
    # 400 patients, two decisions each: t² / (800 + t²) with t = 1.963.
    flips = result(judge(logits(), gate(flip_share=0.001)), "flip_share")
    assert (flips.value, flips.low, flips.verdict) == (0.0, 0.0, "inconclusive")
    assert flips.high == pytest.approx(1.963**2 / (800 + 1.963**2), abs=1e-5)


def test_without_operating_points_nothing_can_flip() -> None:
    report = judge(logits(8, 1), gate(flip_share=0.001), points={})
    assert (result(report, "flip_share").value, result(report, "flip_share").measured) == (None, "undefined")
    assert report.verdict == "PASS"


def test_agreement_of_the_likeliest_finding() -> None:
    # The first 40 images find Hernia likelier: 20 of those that were positive flip to below, 20 to above.
    candidate = logits()
    candidate[:40] = candidate[:40, ::-1]
    report = judge(candidate, gate(likeliest_finding_agreement=0.95))
    same = result(report, "likeliest_finding_agreement")
    assert (same.value, same.verdict) == (0.9, "fail")
    assert report.reasons == (f"likeliest_finding_agreement 0.9000 ({same.low:.4f} to {same.high:.4f}), limit 0.95",)
    assert judge(candidate, gate(likeliest_finding_agreement=0.85)).verdict == "PASS"
    assert judge(candidate, gate(likeliest_finding_agreement=0.89)).verdict == "INCONCLUSIVE"


def test_as_many_more_patients_as_it_says_decide() -> None:
    """None that differs: t² / (n + t²) is below 0.03 from 127 patients on."""

    def alike(n: int) -> GateResult:
        truth, numbers = np.array([[True, True], [False, False]] * (n // 2)), np.arange(n)
        limits = gate(likeliest_finding_agreement=0.97)
        return result(
            compare(logits()[:n], logits()[:n], truth, numbers, NAMES, POINTS, limits), "likeliest_finding_agreement"
        )

    few = alike(30)
    assert few.n_more_patients is not None
    assert (few.verdict, alike(126).verdict, alike(128).verdict) == ("inconclusive", "inconclusive", "pass")
    assert 96 <= few.n_more_patients <= 106  # t is larger of few patients
    assert alike(30 + 2 * (few.n_more_patients // 2)).verdict == "pass"


def test_growth_of_the_calibration_error_names_the_finding() -> None:
    # All answers on Hernia are raised by 2 logits: probabilities of 0.38 and 0.55 become 0.82 and 0.90.
    candidate = logits() + np.array([0.0, 2.0], np.float32)
    report = judge(candidate, gate(calibration_error_growth=0.05))
    growth = result(report, "calibration_error_growth")
    assert (growth.finding, growth.verdict, report.verdict) == ("Hernia", "fail", "FAIL")
    assert report.findings[1].calibration_growth == growth.value
    assert report.findings[0].calibration_growth == 0.0
    assert "calibration_error_growth" in report.reasons[0]
    assert " of Hernia, limit 0.05" in report.reasons[0]


def test_limits_that_are_not_declared_are_measured_all_the_same() -> None:
    report = judge(logits(20, 0), gate())
    undeclared = [each.gate for each in report.gates if each.verdict == "not gated"]
    assert undeclared == [
        "logit_noise_share",
        "flip_share",
        "likeliest_finding_agreement",
        "calibration_error_growth",
    ]
    assert result(report, "flip_share").value == 0.025
    assert report.verdict == "PASS"


def test_answers_that_are_not_finite_are_neither_decisions_nor_likeliest() -> None:
    candidate = logits()
    candidate[:4, 0] = math.nan
    report = judge(candidate, gate(likeliest_finding_agreement=0.5))
    assert result(report, "likeliest_finding_agreement").value == 0.99
    assert result(report, "flip_share").value == 2 / 800  # two of the four were positive
    assert report.reasons[0] == "the candidate answered with NaN or infinity"


def test_one_patient_has_no_interval_and_so_no_pass() -> None:
    flips = result(judge(logits(1, 1), gate(flip_share=0.5), images_each=N), "flip_share")
    assert (flips.low, flips.high, flips.verdict, flips.n_more_patients) == (None, None, "inconclusive", None)
