"""What a bench says in words: each verdict, each next step, and what it does not say."""

import pytest

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.evaluation.bench_report import BenchReport, EngineResult
from chexnet_deploy.evaluation.bench_words import headline, next_step, next_steps, not_measured
from chexnet_deploy.evaluation.engines import Effort, run_bench
from chexnet_deploy.evaluation.spec import read_spec


@pytest.fixture(scope="module")
def report(bundles: dict[str, Bundle]) -> BenchReport:
    """Speed alone of fp32 and int8."""
    engines = [(bundles[name], read_spec(name)) for name in ("fp32", "int8")]
    effort = Effort(min_runs=1, min_duration_s=0.0)
    return run_bench(engines, bundles["fp32"], None, data="no images", effort=effort, provider="cpu").report


def judged(report: BenchReport, **verdicts: str) -> BenchReport:
    """Return the report with an engine of each name and verdict, the first one the slowest."""
    engines = []
    for i, (name, verdict) in enumerate(verdicts.items()):
        own = {"bundle_id": report.reference_id} if name == "fp32" else {}
        speed = report.engines[1].single_stream.model_copy(update={"samples_ms": (10.0 - i,)})
        update = {"name": name, "verdict": verdict, "single_stream": speed, **own}
        engines.append(report.engines[1].model_copy(update=update))
    return report.model_copy(update={"engines": tuple(engines)})


@pytest.mark.parametrize(
    ("verdicts", "words"),
    [
        ({"fp32": "PASS", "int8": "PASS"}, "int8 may replace fp32"),
        ({"int8": "FAIL"}, "int8 may not replace the reference"),
        ({"fp32": "PASS", "int8": "INCONCLUSIVE"}, "Not decided: whether int8 may replace fp32"),
        ({"a": "PASS", "b": "FAIL", "c": "PASS", "d": "PASS"}, "a, c and d may replace the reference; b may not"),
        ({"a": "FAIL", "b": "INCONCLUSIVE"}, "a may not replace the reference; b: not decided"),
        ({"fp32": "PASS"}, "Only fp32 itself was measured"),
        ({"fp32": "INCONCLUSIVE", "int8": "INCONCLUSIVE"}, "Not decided: whether int8 may replace fp32"),
        # The reference's own file that answers otherwise here is judged as any other.
        ({"fp32": "FAIL"}, "fp32 may not replace the reference"),
    ],
)
def test_the_headline(report: BenchReport, verdicts: dict[str, str], words: str) -> None:
    assert headline(judged(report, **verdicts)) == words


def step(report: BenchReport, name: str) -> str:
    return next_step(next(engine for engine in report.engines if engine.name == name), report)


def test_what_fails_is_replaced_by_the_fastest_that_passes(report: BenchReport) -> None:
    several = judged(report, fp32="PASS", a="PASS", b="PASS", c="FAIL")
    assert step(several, "c") == "Take b, which passes and is the fastest that does."
    assert step(judged(report, fp32="PASS", a="PASS", c="FAIL"), "c") == "Take a, which passes."
    assert step(judged(report, fp32="PASS", c="FAIL"), "c") == "Keep fp32."
    assert step(judged(report, a="INCONCLUSIVE"), "a") == "Give labelled images by --data."


def test_what_is_alike_is_said_once(report: BenchReport) -> None:
    reason = "accuracy was not measured: no labelled images were given (--data)"
    found = ("a and b", "INCONCLUSIVE", reason, "Give labelled images by --data.")
    assert next_steps(judged(report, fp32="INCONCLUSIVE", a="INCONCLUSIVE", b="INCONCLUSIVE")) == [found]


@pytest.mark.parametrize(
    ("verdicts", "verdict"),
    [
        # Too few patients to prove that a file equals itself say nothing of int8.
        ({"fp32": "INCONCLUSIVE", "int8": "PASS"}, "PASS"),
        ({"fp32": "PASS", "int8": "INCONCLUSIVE"}, "INCONCLUSIVE"),
        ({"fp32": "INCONCLUSIVE"}, "INCONCLUSIVE"),
        ({"fp32": "FAIL", "int8": "PASS"}, "FAIL"),
    ],
)
def test_the_references_own_file_decides_only_where_it_is_alone_or_fails(
    report: BenchReport, verdicts: dict[str, str], verdict: str
) -> None:
    assert judged(report, **verdicts).verdict == verdict


def test_what_was_not_measured_is_said(report: BenchReport) -> None:
    (fp32, int8) = report.engines
    found = dict(not_measured(report))
    assert found["Accuracy"] == "no labelled images were given"
    assert found["A GPU"].startswith("every engine ran on ")
    assert found["A limit on the latency of every engine"] == "none is set"
    gate = int8.spec.gate.model_copy(update={"latency": "unproven"})
    unproven: EngineResult = int8.model_copy(
        update={"spec": int8.spec.model_copy(update={"gate": gate}), "conv_types": {}}
    )
    found = dict(
        not_measured(report.model_copy(update={"engines": (fp32, unproven), "notes": ("int8: of other weights",)}))
    )
    assert found["Latency of int8"] == "nobody has measured its limits yet"
    assert found["The type int8 computes in"] == "the backend does not show it"
    assert found["int8"] == "of other weights"
