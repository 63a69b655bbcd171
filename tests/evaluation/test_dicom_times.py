"""From a DICOM file to its report: the arithmetic of the stages, and what the spec makes of it."""

import pytest

from chexnet_deploy.evaluation.dicom_times import STAGES, DicomKind, DicomTimes, KindTimes, judge_dicom


def times(kind: DicomKind, n: int = 100, model_ms: float = 10.0) -> KindTimes:
    """Return n images whose stages take 1, 20, 3, `model_ms` and 6 ms, but the last one's decoding 120 ms."""
    stages_ms = dict(zip(STAGES, ((each,) * n for each in (1.0, 20.0, 3.0, model_ms, 6.0)), strict=True))
    stages_ms["decode"] = (*stages_ms["decode"][:-1], 120.0)
    after_idle_ms = dict.fromkeys(STAGES, (2.0, 4.0, 9.0))
    return KindTimes(kind=kind, n_files=1, megapixels=4.0, stages_ms=stages_ms, after_idle_ms=after_idle_ms)


def folder(*kinds: KindTimes) -> DicomTimes:
    return DicomTimes(idle_s=5.0, refused={}, kinds=kinds)


def test_a_total_is_that_of_one_image_and_not_of_the_stages_percentiles() -> None:
    found = times("jpeg2000")
    assert found.p50_ms == {"header": 1.0, "decode": 20.0, "resize": 3.0, "model": 10.0, "report": 6.0, "total": 40.0}
    # Of 100 images the 99th percentile lies at 98.01 of their places 0 to 99, a hundredth of the way to the slowest.
    assert found.p99_ms["decode"] == pytest.approx(21.0)
    assert found.p99_ms["total"] == pytest.approx(41.0)
    assert found.p99_over_model_p50 == pytest.approx(4.1)
    assert found.after_idle_p50_ms["total"] == 20.0


@pytest.mark.parametrize(
    ("limits", "failures", "doubts"),
    [
        (None, [], []),
        ({"jpeg2000": 4.2}, [], []),
        (
            {"jpeg2000": 4.0},
            ["DICOM to report, jpeg2000: p99 41.0 ms is 4.1 times the model's median, limit 4"],
            [],
        ),
        # A kind without files says nothing, beside one that has some.
        ({"jpeg2000": 5.0, "rle": 1.0}, [], []),
        ({"rle": 1.0}, [], ["DICOM to report: no file of rle was measured. Give --dicom"]),
    ],
)
def test_limits_are_multiples_of_the_models_own_median(
    limits: dict[DicomKind, float] | None, failures: list[str], doubts: list[str]
) -> None:
    assert judge_dicom(folder(times("uncompressed"), times("jpeg2000")), limits) == (failures, doubts)


def test_a_limit_without_files_or_with_few_images_is_not_decided() -> None:
    nothing = ["DICOM to report: no file of uncompressed was measured. Give --dicom"]
    assert judge_dicom(None, {"uncompressed": 20.0}) == ([], nothing)
    few = ["DICOM to report, uncompressed: p99 of 99 runs; needed 100. Give --min-runs"]
    assert judge_dicom(folder(times("uncompressed", 99)), {"uncompressed": 20.0}) == ([], few)
    # What is too slow fails however few there are.
    failures, doubts = judge_dicom(folder(times("uncompressed", 99, model_ms=1.0)), {"uncompressed": 20.0})
    assert (len(failures), doubts) == (1, few)


def test_a_model_that_takes_no_time_keeps_no_limit() -> None:
    failures, _ = judge_dicom(folder(times("rle", model_ms=1e-9)), {"rle": 1e6})
    assert len(failures) == 1
