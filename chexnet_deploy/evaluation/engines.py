"""Bench engines on this machine: parity with the fp32 model they came from, and latency, in one report with one verdict.

Draws no pages: see pages/bench_page.py. A speed is never reported without the accuracy of the same artefact beside it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.manifest import UNKNOWN
from chexnet_deploy.bundle.probe import N_PROBES
from chexnet_deploy.datasets.labelled import LabelledImages
from chexnet_deploy.errors import BundleError, OnPhase, SpecError
from chexnet_deploy.evaluation.bench_report import BenchReport, BenchRun, EngineResult
from chexnet_deploy.evaluation.invariance import InvarianceReport, measure_invariance
from chexnet_deploy.evaluation.latency import LatencyReport, measure_latency
from chexnet_deploy.evaluation.machine import describe_machine
from chexnet_deploy.evaluation.parity import compare
from chexnet_deploy.evaluation.spec import EngineSpec, LatencyGate
from chexnet_deploy.files import sha256_hex
from chexnet_deploy.images.preprocessing import Pixels
from chexnet_deploy.metrics.agreement import map_correlation
from chexnet_deploy.runtime.score import score_files
from chexnet_deploy.runtime.sessions.base import Logits, Maps, Provider, Session
from chexnet_deploy.runtime.sessions.open import check_known_answers, open_session, resolve_provider

REFERENCE = "reference"
RUNS_ON: Mapping[Provider, str] = {
    "auto": "a CPU",
    "openvino": "OpenVINO (cpu)",
    "cpu": "ONNX Runtime (cpu)",
    "cuda": "ONNX Runtime (cuda)",
}
STAGE_RUNS = 20
MIN_RUNS_FOR_P99 = 100  # a 99th percentile of fewer is their maximum, and says nothing of the hundredth


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure: rounds and seconds at the least, for each scenario and engine."""

    min_runs: int = 100
    min_duration_s: float = 3.0


def run_bench(
    engines: Sequence[tuple[Bundle, EngineSpec]],
    reference: Bundle,
    images: LabelledImages | None,
    *,
    data: str,
    patients_note: str = "",
    effort: Effort,
    threads: int | None = None,
    provider: Provider = "auto",
    on_phase: OnPhase | None = None,
) -> BenchRun:
    """Measure engines beside their reference and judge each by its spec.

    Args:
        engines: each with the spec it must pass.
        reference: their fp32 ancestor.
        images: labelled images, or None to measure speed alone.
        data: what the images are, for the report.
        patients_note: on their overlap with the training patients, for the report.
        effort: how long to measure.
        threads: CPU threads for one call; None takes all cores.
        provider: what runs the ONNX engines; the reference always runs on ONNX Runtime's CPU.
        on_phase: called with the phase's name, what is done and of how much.

    Raises:
        BundleError: the reference is not an engine's ancestor.
        SpecError: a spec is for another precision or GPU.
        SessionError: an engine refuses to run here, or answers otherwise than when it was proven.
    """
    provider = resolve_provider(provider)
    for bundle, spec in engines:
        if reference.id not in (bundle.id, *bundle.manifest.ancestors):
            raise BundleError(
                f"{reference.path} is not in the ancestry of {bundle.path}: comparing them would prove nothing."
            )
        if spec.precision is not bundle.manifest.precision:
            raise SpecError(
                f"the spec is for {spec.precision.value}, but {bundle.path} is {bundle.manifest.precision.value}. "
                f"Give the spec of that precision."
            )
        here = RUNS_ON[provider] if bundle.manifest.target is None else bundle.manifest.target.gpu
        if not spec.is_for(here):
            raise SpecError(
                f"the spec is for a GPU named {spec.gpu}, but {bundle.path} runs on {here}. Give its own spec."
            )
    names = _distinct_names([bundle for bundle, _ in engines])
    sessions: dict[str, Session] = {}
    try:
        sessions[REFERENCE] = open_session(reference, threads=threads, provider="cpu")
        for name, (bundle, _) in zip(names, engines, strict=True):
            sessions[name] = open_session(bundle, threads=threads, provider=provider)
        answers = _score(sessions, reference, images, on_phase)
        speed = _measure({name: sessions[name] for name in names}, reference, engines, effort, on_phase)
        results = tuple(
            _judge(
                name,
                bundle,
                spec,
                sessions[name],
                answers,
                images,
                measure_invariance(sessions[name], reference.read_probe().pixels, spec.batch.max),
                speed[name],
            )
            for name, (bundle, spec) in zip(names, engines, strict=True)
        )
    finally:
        for session in sessions.values():
            session.close()
    report = BenchReport(
        finished_utc=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        images_sha256=None if images is None else sha256_hex("".join(f"{n}\n" for n in images.names).encode()),
        machine=describe_machine(),
        data=data,
        patients_note=patients_note,
        threads=threads,
        provider=provider,
        reference_id=reference.id,
        findings=reference.manifest.findings,
        engines=results,
    )
    return BenchRun(report, images, answers.logits)


def _distinct_names(bundles: Sequence[Bundle]) -> list[str]:
    names = [bundle.path.resolve().name for bundle in bundles]
    if len(set(names)) < len(names) or REFERENCE in names:
        names = [f"{i}-{name}" for i, name in enumerate(names, start=1)]
    return names


@dataclass(frozen=True, slots=True)
class _Answers:
    """Outputs on the labelled images by session name; map correlations are with the reference."""

    logits: Mapping[str, Logits]
    map_correlation: Mapping[str, NDArray[np.float32]]


def _score(
    sessions: Mapping[str, Session],
    reference: Bundle,
    images: LabelledImages | None,
    on_phase: OnPhase | None,
) -> _Answers:
    if images is None:
        return _Answers({}, {})
    n_images = len(images.paths)
    correlations: dict[str, list[NDArray[np.float32]]] = {name: [] for name in sessions if name != REFERENCE}

    def on_maps(maps: Mapping[str, Maps]) -> None:
        for name, parts in correlations.items():
            parts.append(map_correlation(maps[REFERENCE], maps[name]))

    def on_images(done: int) -> None:
        if on_phase is not None:
            on_phase("accuracy", done, n_images)

    preprocessing = reference.manifest.preprocessing
    logits = score_files(sessions, images.paths, preprocessing, on_images=on_images, on_maps=on_maps)
    return _Answers(logits, {name: np.concatenate(parts) for name, parts in correlations.items()})


def _measure(
    sessions: Mapping[str, Session],
    reference: Bundle,
    engines: Sequence[tuple[Bundle, EngineSpec]],
    effort: Effort,
    on_phase: OnPhase | None,
) -> dict[str, tuple[LatencyReport, LatencyReport]]:
    probe = reference.read_probe().pixels
    offline_batch = min(min(spec.batch.max for _, spec in engines), N_PROBES)
    offline_runs = max(1, effort.min_runs // offline_batch)

    def on_round(phase: str, least: int) -> Callable[[int], None]:
        def report(done: int) -> None:
            if on_phase is not None:
                on_phase(phase, done, max(done, least))

        return report

    single = measure_latency(
        sessions,
        probe[:1],
        "single_stream",
        min_runs=effort.min_runs,
        min_duration_s=effort.min_duration_s,
        on_round=on_round("batch 1", effort.min_runs),
    )
    offline = measure_latency(
        sessions,
        probe[:offline_batch],
        "offline",
        min_runs=offline_runs,
        min_duration_s=effort.min_duration_s,
        on_round=on_round(f"batch {offline_batch}", offline_runs),
    )
    return {name: (single[name], offline[name]) for name in sessions}


def _judge(
    name: str,
    bundle: Bundle,
    spec: EngineSpec,
    session: Session,
    answers: _Answers,
    images: LabelledImages | None,
    invariance: InvarianceReport,
    speed: tuple[LatencyReport, LatencyReport],
) -> EngineResult:
    manifest = bundle.manifest
    parity = None
    failures: list[str] = []
    doubts: list[str] = []
    if images is None:
        doubts.append("accuracy was not measured: no labelled images were given (--data)")
    else:
        parity = compare(
            answers.logits[REFERENCE],
            answers.logits[name],
            images.truth,
            images.patients,
            manifest.findings,
            manifest.operating_points,
            spec.gate,
            labelled=images.labelled,
            groups=images.groups,
            map_correlation=answers.map_correlation[name],
        )
        (failures if parity.verdict == "FAIL" else doubts).extend(parity.reasons)
    spread, limit = invariance.max_abs_probability_difference, spec.gate.invariance_abs_probability_difference
    if not spread <= limit:
        failures.append(
            f"invariance: an image's probability moves by {spread:.4f} with slot, batch or thread, limit {limit}"
        )
    if spec.gate.latency == "unproven":
        doubts.append("latency: this spec's limits have not been measured on its target yet")
    elif isinstance(spec.gate.latency, LatencyGate):
        limits = (
            ("p50", speed[0].p50_ms, spec.gate.latency.p50_ms),
            ("p99", speed[0].p99_ms, spec.gate.latency.p99_ms),
        )
        if len(speed[0].samples_ms) < MIN_RUNS_FOR_P99:
            doubts.append(f"p99 of {len(speed[0].samples_ms)} runs; needed {MIN_RUNS_FOR_P99}. Give --min-runs")
        failures += [f"{which} {value:.2f} ms, limit {most} ms" for which, value, most in limits if not value <= most]
    conv_types = dict(session.conv_types())
    if conv_types.get(UNKNOWN):
        doubts.append(f"precision: the layer table does not show which type {conv_types[UNKNOWN]} convolutions run in")
    native = conv_types.get(manifest.precision.type_name, 0)
    # What an int8 form leaves in floating point is meant to be float: half of all in the mixed one.
    promised = sum(conv_types.values()) - len(manifest.float_convolutions)
    return EngineResult(
        name=name,
        bundle_id=bundle.id,
        model_sha256=manifest.files[manifest.model_name],
        precision=manifest.precision,
        dialect=manifest.dialect,
        conv_types=conv_types,
        is_emulated=2 * native < promised,
        known_answer_error=check_known_answers(session, bundle, n_probes=N_PROBES),
        target=manifest.target,
        card=manifest.engine,
        spec=spec,
        parity=parity,
        invariance=invariance,
        single_stream=speed[0],
        offline=speed[1],
        stage_times_ms=_stage_times_ms(session, bundle.read_probe().pixels[:1]),
        verdict="FAIL" if failures else "INCONCLUSIVE" if doubts else "PASS",
        reasons=(*failures, *doubts),
    )


def _stage_times_ms(session: Session, pixels: Pixels) -> dict[str, float]:
    runs = [session.stage_times_ms(pixels) for _ in range(STAGE_RUNS)]
    return {name: float(np.median([run[name] for run in runs])) for name in runs[0]}
