import os
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from chexnet_deploy.bundle.bundle import Bundle, find_reference
from chexnet_deploy.datasets.chestxray14 import ChestXray14
from chexnet_deploy.datasets.labelled import LabelledImages
from chexnet_deploy.errors import BundleError, ImageRefusedError, RefusalReason, SpecError
from chexnet_deploy.evaluation import entry_points
from chexnet_deploy.evaluation.bench_report import BenchReport, summary_rows
from chexnet_deploy.evaluation.engines import Effort, run_bench
from chexnet_deploy.evaluation.latency import WARMUP_RUNS, LatencyReport, measure_latency
from chexnet_deploy.evaluation.machine import OtherPrograms, describe_machine
from chexnet_deploy.evaluation.request import EvaluationRequest
from chexnet_deploy.evaluation.spec import EngineSpec, LatencyGate, read_spec
from chexnet_deploy.images.content_check import ImageGuardPolicy
from chexnet_deploy.images.preprocessing import Pixels
from chexnet_deploy.images.scope import ScopePolicy
from chexnet_deploy.runtime.predictor import Predictor
from chexnet_deploy.runtime.sessions.base import Logits, Maps
from chexnet_deploy.runtime.sessions.ort import OrtSession

PIXELS = np.zeros((4, 1, 32, 32), np.uint8)
QUICK = Effort(min_runs=2, min_duration_s=0.0)


class FakeSession:
    batch_range = (1, 16)

    def __init__(self, name: str, calls: list[str], seconds: float = 0.0) -> None:
        self.name, self.calls, self.seconds = name, calls, seconds

    def run(self, pixels: Pixels) -> tuple[Logits, Maps]:
        self.calls.append(self.name)
        time.sleep(self.seconds)
        return np.zeros((len(pixels), 1), np.float32), np.zeros((len(pixels), 1, 1, 1), np.float32)

    def conv_types(self) -> Mapping[str, int]:
        return {"float32": 1}

    def close(self) -> None:
        self.calls.append(f"close {self.name}")


def test_sessions_warm_up_and_then_take_turns() -> None:
    calls: list[str] = []
    sessions = {name: FakeSession(name, calls) for name in "ab"}
    rounds: list[int] = []
    reports = measure_latency(
        sessions, {"a": PIXELS, "b": PIXELS}, "offline", min_runs=5, min_duration_s=0.0, on_round=rounds.append
    )
    assert calls == ["a"] * WARMUP_RUNS + ["b"] * WARMUP_RUNS + ["a", "b"] * 5
    assert rounds == [1, 2, 3, 4, 5]
    for report in reports.values():
        assert (len(report.samples_ms), report.batch_size, report.warmup_runs) == (5, 4, WARMUP_RUNS)
        assert report.scenario == "offline"


def test_the_fastest_session_gets_enough_time_too() -> None:
    calls: list[str] = []
    sessions = {"slow": FakeSession("slow", calls, 0.01), "fast": FakeSession("fast", calls, 0.002)}
    one = dict.fromkeys(sessions, PIXELS[:1])
    reports = measure_latency(sessions, one, "single_stream", min_runs=1, min_duration_s=0.02)
    assert len(reports["slow"].samples_ms) == len(reports["fast"].samples_ms) >= 2
    assert all(sum(report.samples_ms) >= 20.0 for report in reports.values())
    assert min(reports["slow"].samples_ms) >= 10.0 > 2.0


def test_percentiles_and_throughput_by_hand() -> None:
    report = LatencyReport(
        scenario="offline", batch_size=8, warmup_runs=3, samples_ms=tuple(float(i) for i in range(101))
    )
    # 0..100 ms: the q-th percentile is q. 101 runs of 8 images in 5050 ms.
    assert (report.p50_ms, report.p90_ms, report.p99_ms) == pytest.approx((50.0, 90.0, 99.0))
    assert report.images_per_s == pytest.approx(808 / 5.05)


def test_a_percentile_between_two_samples_is_interpolated() -> None:
    report = LatencyReport(scenario="single_stream", batch_size=1, warmup_runs=3, samples_ms=(30.0, 10.0))
    assert (report.p50_ms, report.p90_ms) == pytest.approx((20.0, 28.0))
    assert report.images_per_s == pytest.approx(50.0)


def test_a_report_without_samples_is_refused() -> None:
    with pytest.raises(ValidationError):
        LatencyReport(scenario="offline", batch_size=1, warmup_runs=3, samples_ms=())


@pytest.fixture(scope="module")
def images(phantom: ChestXray14, bundles: dict[str, Bundle]) -> LabelledImages:
    return LabelledImages.of(phantom.split("test"), bundles["fp32"].manifest.findings)


def with_gate(precision: str, **changes: object) -> EngineSpec:
    spec = read_spec(precision)
    # Forty patients are too few to show that next to nothing flips.
    no_shares = {"flip_share": None, "likeliest_finding_agreement": None}
    return spec.model_copy(update={"gate": spec.gate.model_copy(update=no_shares | changes)})


def bench(engine: Bundle, spec: EngineSpec, reference: Bundle, images: LabelledImages | None = None) -> BenchReport:
    return run_bench([(engine, spec)], reference, images, data="phantom", effort=QUICK, provider="cpu").report


@pytest.mark.slow
def test_three_engines_side_by_side(bundles: dict[str, Bundle], images: LabelledImages) -> None:
    phases: set[str] = set()
    run = run_bench(
        [(bundle, with_gate(bundle.manifest.precision.value, min_positive_patients=1)) for bundle in bundles.values()],
        bundles["fp32"],
        images,
        data="phantom",
        effort=QUICK,
        on_phase=lambda phase, done, total: phases.add(phase),
    )
    engines = {engine.name: engine for engine in run.report.engines}
    assert list(engines) == ["fp32", "fp16", "int8", "int8-cpu"]
    assert phases == {"accuracy", "batch 1", "batch 16"}
    assert {name: engine.is_emulated for name, engine in engines.items()} == {
        "fp32": False,
        "fp16": True,
        "int8": False,
        "int8-cpu": False,
    }
    assert engines["fp32"].verdict == "PASS"
    assert engines["fp32"].parity is not None
    assert engines["fp32"].parity.max_abs_logit_difference < 1e-4
    assert run.report.verdict == ("FAIL" if "FAIL" in {e.verdict for e in engines.values()} else "PASS")
    assert set(run.logits) == {"reference", *engines}
    assert all(logits.shape == (len(images.names), 14) for logits in run.logits.values())
    assert [row["engine"] for row in summary_rows(run.report)] == list(engines)
    assert [" emulated" in row["p50 ms"] for row in summary_rows(run.report)] == [False, True, False, False]
    assert BenchReport.model_validate_json(run.report.model_dump_json()) == run.report


@pytest.mark.slow
def test_bench_and_evaluate_measure_images_that_predict_refuses(
    bundles: dict[str, Bundle], phantom: ChestXray14, tmp_path: Path
) -> None:
    fp32, path = bundles["fp32"], phantom.split("test")[0].path
    assert path is not None
    manifest = fp32.manifest.model_copy(update={"scope": ScopePolicy(picture=ImageGuardPolicy())})
    guarded = Bundle.write(tmp_path / "guarded", manifest, fp32.read_model(), fp32.read_probe_bytes())
    with Predictor.of(guarded) as predictor, pytest.raises(ImageRefusedError) as caught:
        predictor.predict(path)
    assert caught.value.reason is RefusalReason.TOO_SMALL  # phantoms have 32 px

    def measure(bundle: Bundle, name: str) -> tuple[str, BenchReport]:
        out = tmp_path / name
        report = entry_points.bench(
            [bundle.path], bundle.path, phantom.root, "test", None, "fp32", out, effort=QUICK, threads=None,
            provider="auto", with_html=True, on_phase=lambda phase, done, total: None,
        )  # fmt: skip
        return (out / "logits-reference.csv").read_text(), report

    (logits, report), (expected, _) = measure(guarded, "a"), measure(fp32, "b")
    assert logits == expected
    assert report.engines[0].parity is not None
    request = EvaluationRequest(engine=guarded.path, data=phantom.root, has_localization=True)
    entry_points.evaluate(request, tmp_path / "c", with_html=False, on_phase=lambda phase, done, total: None)


def test_without_images_nothing_passes(bundles: dict[str, Bundle]) -> None:
    report = bench(bundles["fp32"], read_spec("fp32"), bundles["fp32"])
    assert report.verdict == "INCONCLUSIVE"
    assert "accuracy was not measured" in report.engines[0].reasons[0]
    assert summary_rows(report)[0]["mean AUROC"] == "not measured"


def test_a_precision_that_the_layer_table_does_not_show_is_inconclusive(
    bundles: dict[str, Bundle], images: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OrtSession, "conv_types", lambda session: {"float32": 118, "unknown": 3})
    report = run_bench(
        [(bundles["fp32"], with_gate("fp32", min_positive_patients=1))],
        bundles["fp32"],
        images,
        data="phantom",
        effort=QUICK,
        provider="cpu",
    ).report
    assert report.verdict == "INCONCLUSIVE"
    assert report.engines[0].reasons == ("precision: the layer table does not show which type 3 convolutions run in",)


def test_an_unproven_latency_is_inconclusive(bundles: dict[str, Bundle], images: LabelledImages) -> None:
    spec = with_gate("fp32", min_positive_patients=1, latency="unproven")
    report = bench(bundles["fp32"], spec, bundles["fp32"], images)
    assert (report.verdict, len(report.engines[0].reasons)) == ("INCONCLUSIVE", 1)
    assert "have not been measured" in report.engines[0].reasons[0]


def test_too_slow_fails_by_percentile(bundles: dict[str, Bundle], images: LabelledImages) -> None:
    spec = with_gate("fp32", min_positive_patients=1, latency=LatencyGate(p50_ms=1e-6, p99_ms=1e6))
    report = bench(bundles["fp32"], spec, bundles["fp32"], images)
    assert report.verdict == "FAIL"
    failure, doubt = report.engines[0].reasons
    assert failure.startswith("p50")
    # A 99th percentile of so few runs proves nothing; it is said even where it is within its limit.
    assert doubt.startswith("p99 of ")


def test_fast_enough_passes(bundles: dict[str, Bundle], images: LabelledImages) -> None:
    spec = with_gate("fp32", min_positive_patients=1, latency=LatencyGate(p50_ms=1e6, p99_ms=1e6))
    effort = Effort(min_runs=100, min_duration_s=0.0)
    run = run_bench([(bundles["fp32"], spec)], bundles["fp32"], images, data="phantom", effort=effort)
    assert (run.report.verdict, run.report.engines[0].reasons) == ("PASS", ())


def test_a_stranger_is_no_reference(bundles: dict[str, Bundle]) -> None:
    with pytest.raises(BundleError, match="not in the ancestry"):
        bench(bundles["int8"], read_spec("int8"), bundles["fp16"])


def test_a_spec_of_another_precision_is_refused(bundles: dict[str, Bundle]) -> None:
    with pytest.raises(SpecError, match="the spec is for int8"):
        bench(bundles["fp16"], read_spec("int8"), bundles["fp32"])


def test_a_spec_of_a_gpu_is_refused_on_a_cpu(bundles: dict[str, Bundle]) -> None:
    with pytest.raises(SpecError, match=r"H200, but .* ONNX Runtime \(cpu\)"):
        bench(bundles["int8"], read_spec("h200-int8"), bundles["fp32"])


def test_the_reference_is_found_beside_its_engine(bundles: dict[str, Bundle]) -> None:
    assert {find_reference(bundle).id for bundle in bundles.values()} == {bundles["fp32"].id}


def test_the_machine_is_described() -> None:
    machine = describe_machine()
    assert machine.cores >= 1
    assert {"numpy", "onnxruntime"} <= set(machine.packages)


def test_what_other_programs_take_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In four seconds of two cores this process is at work for one, and the cores for three and a half: 2.5 of 8."""
    second, now_s, own_s = os.sysconf("SC_CLK_TCK"), 0.0, 0.0
    monkeypatch.setattr("chexnet_deploy.evaluation.machine.CORE_TIMES", tmp_path / "stat")
    monkeypatch.setattr("chexnet_deploy.evaluation.machine.monotonic", lambda: now_s)
    monkeypatch.setattr("chexnet_deploy.evaluation.machine.process_time", lambda: own_s)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 2}, raising=False)

    def write(*ticks: int) -> None:
        lines = [f"cpu{core} {' '.join(map(str, ticks))} 0 0" for core in (0, 2)]
        (tmp_path / "stat").write_text(
            "\n".join(["cpu 1 1", lines[0], f"cpu1 {second * 99} 0 0 0 0 0 0 0 0 0", lines[1], "intr 5"])
        )

    write(0, 0, 0, 0, 0, 0, 0, 0)
    others = OtherPrograms()
    now_s, own_s = 4.0, 1.0
    # Of each core: a second of programs, half of the system, and a quarter stolen; idle and waiting count for nothing.
    write(second, 0, second // 2, second * 2, second // 4, 0, 0, second // 4)
    assert others.share() == pytest.approx((3.5 - 1.0) / 8.0)
    (tmp_path / "stat").unlink()
    assert others.share() is None


def test_what_made_the_times_longer_is_said(bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OtherPrograms, "share", lambda self: 0.38)
    monkeypatch.setattr("chexnet_deploy.evaluation.engines.resolve_provider", lambda provider: "cpu")
    fp32 = bundles["fp32"]
    report = run_bench([(fp32, read_spec("fp32"))], fp32, None, data="none", effort=Effort(1, 0.0)).report
    busy, slower = report.notes
    assert "other programs took 38% of the cores" in busy
    assert "pip install 'chexnet-deploy[openvino]'" in slower
