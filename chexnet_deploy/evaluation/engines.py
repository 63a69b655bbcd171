"""Bench engines on this machine: parity with their reference, and latency, in one report with one verdict.

Draws no pages: see pages/bench_page.py. A speed is never reported without the accuracy of the same artefact beside it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TypeAlias, TypeGuard

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.manifest import UNKNOWN
from chexnet_deploy.bundle.probe import N_PROBES
from chexnet_deploy.datasets.csv_rows import letters_of
from chexnet_deploy.datasets.labelled import LabelledImages
from chexnet_deploy.errors import BundleError, OnPhase, SpecError
from chexnet_deploy.evaluation.bench_report import BenchReport, BenchRun, EngineResult, ShownMaps
from chexnet_deploy.evaluation.dicom_times import DicomTimes, judge_dicom
from chexnet_deploy.evaluation.invariance import InvarianceReport, measure_invariance
from chexnet_deploy.evaluation.latency import MIN_RUNS_FOR_P99, LatencyReport, measure_latency
from chexnet_deploy.evaluation.machine import OtherPrograms, describe_machine
from chexnet_deploy.evaluation.parity import compare
from chexnet_deploy.evaluation.spec import EngineSpec, LatencyGate
from chexnet_deploy.files import sha256_hex
from chexnet_deploy.images.preprocessing import Pixels
from chexnet_deploy.inputs import name_some
from chexnet_deploy.metrics.agreement import map_correlation
from chexnet_deploy.runtime.engine import Engine, open_engine, probe_pixels, resizing_of
from chexnet_deploy.runtime.score import score_files
from chexnet_deploy.runtime.sessions.base import Logits, Maps, Provider, Session
from chexnet_deploy.runtime.sessions.open import check_known_answers, resolve_provider

REFERENCE = "reference"
RUNS_ON: Mapping[Provider, str] = {
    "auto": "a CPU",
    "openvino": "OpenVINO (cpu)",
    "cpu": "ONNX Runtime (cpu)",
    "cuda": "ONNX Runtime (cuda)",
}
STAGE_RUNS = 20
BUSY_SHARE = 0.05
"""Of the cores' time; above, times of other programs are in those of the engines."""
N_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure: rounds and seconds at the least, for each scenario and engine."""

    min_runs: int = 100
    min_duration_s: float = 3.0


MeasureDicom: TypeAlias = Callable[[Bundle, Session, Effort, OnPhase | None], DicomTimes]
"""See dicom/results/measure.py, which this package does not know."""


def run_bench(
    engines: Sequence[tuple[Engine, EngineSpec]],
    reference: Engine,
    images: LabelledImages | None,
    *,
    data: str,
    patients_note: str = "",
    effort: Effort,
    measure_dicom: MeasureDicom | None = None,
    threads: int | None = None,
    provider: Provider = "auto",
    on_phase: OnPhase | None = None,
) -> BenchRun:
    """Measure engines beside their reference and judge each by its spec, on the findings that all of them and the labels know.

    Args:
        engines: each with the spec it must pass.
        reference: of a bundle its fp32 ancestor, or a model of its own.
        images: labelled images, or None to measure speed alone.
        data: what the images are, for the report.
        patients_note: on their overlap with the training patients, for the report.
        effort: how long to measure.
        measure_dicom: measures bundles from DICOM files to reports too.
        threads: CPU threads for one call; None takes all cores.
        provider: what runs the ONNX engines, see open_engine; a reference always runs on ONNX Runtime's CPU.
        on_phase: called with the phase's name, what is done and of how much.

    Raises:
        BundleError: the reference is of an engine's own family, and not its ancestor.
        DatasetError: no image is labelled for a finding that all know.
        SpecError: a spec is for another precision, GPU or finding; the engines have no finding in common; or an engine is no
            bundle, and DICOM files are to be measured.
        SessionError: an engine refuses to run here, or answers otherwise than when it was proven.
    """
    for engine, spec in engines:
        _refuse_mismatch(engine, spec, reference, provider)
        spec.gate.refuse_strangers({*engine.findings, *reference.findings})
        if measure_dicom is not None and not isinstance(engine, Bundle):
            raise SpecError(
                f"{engine.place} is no bundle, and --dicom measures what the DICOM node runs, bundles. Bench it without --dicom."
            )
    findings = tuple(f for f in reference.findings if all(f in engine.findings for engine, _ in engines))
    labelled = () if images is None else images.findings
    if images is not None:
        if not findings:
            known = "; ".join(
                f"{each.name}: {name_some(each.findings)}" for each in (reference, *(e for e, _ in engines))
            )
            raise SpecError(
                f"found no finding that all engines know ({known}); needed one of the same name. Next: write it in the contract "
                f"as the other writes it, or compare models of the same findings."
            )
        images = images.for_findings(images.shared_with(findings))
        findings = images.findings
    names = _distinct_names([engine for engine, _ in engines])
    everyone = {REFERENCE: reference, **dict(zip(names, (engine for engine, _ in engines), strict=True))}
    sessions: dict[str, Session] = {}
    try:
        for name, engine in everyone.items():
            sessions[name] = open_engine(engine, threads=threads, provider="cpu" if name == REFERENCE else provider)
        answers = _score(sessions, everyone, images, on_phase)
        shown = _look(sessions, everyone, images, answers.logits)
        others = OtherPrograms()
        speed = _measure(sessions, everyone, engines, effort, on_phase)
        is_remote = any(not isinstance(engine, Bundle) and engine.model is None for engine in everyone.values())
        taken = 0.0 if is_remote else others.share() or 0.0  # a server may be on this machine
        dicom = {
            name: measure_dicom(engine, sessions[name], effort, on_phase)
            for name, engine in everyone.items()
            if measure_dicom is not None and name != REFERENCE and isinstance(engine, Bundle)
        }
        results = tuple(
            _judge(
                name,
                engine,
                spec,
                sessions[name],
                reference,
                answers,
                images,
                measure_invariance(sessions[name], probe_pixels(engine), spec.batch.max),
                speed[name],
                dicom.get(name),
            )
            for name, (engine, spec) in zip(names, engines, strict=True)
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
        provider=resolve_provider(provider),
        reference_id=reference.id,
        reference_contract=None if isinstance(reference, Bundle) else reference.contract,
        findings=findings,
        notes=(*_notes(everyone, labelled, findings), *_notes_on_times(everyone, taken, provider)),
        engines=results,
    )
    return BenchRun(report, images, answers.logits, shown)


def _refuse_mismatch(engine: Engine, spec: EngineSpec, reference: Engine, provider: Provider) -> None:
    if not isinstance(engine, Bundle):
        here = str(engine.place) if engine.model is None else RUNS_ON["cpu" if provider == "auto" else provider]
    else:
        manifest = engine.manifest
        here = RUNS_ON[resolve_provider(provider)] if manifest.target is None else manifest.target.gpu
        if spec.precision is not manifest.precision:
            raise SpecError(
                f"the spec is for {spec.precision.value}, but {engine.path} is {manifest.precision.value}. "
                f"Give the spec of that precision."
            )
        if _is_of_family(engine, reference) and reference.id not in (engine.id, *manifest.ancestors):
            raise BundleError(
                f"{reference.name} is not in the ancestry of {engine.path}, but of the same weights: comparing them would prove "
                f"nothing. Give their fp32 bundle."
            )
    if not spec.is_for(here):
        raise SpecError(f"the spec is for a GPU named {spec.gpu}, but {engine.name} runs on {here}. Give its own spec.")


def _is_of_family(engine: Bundle, reference: Engine) -> TypeGuard[Bundle]:
    return isinstance(reference, Bundle) and reference.manifest.checkpoint_sha256 == engine.manifest.checkpoint_sha256


def _notes(everyone: Mapping[str, Engine], labelled: Sequence[str], findings: Sequence[str]) -> tuple[str, ...]:
    """Return a sentence for the labels and the engines whose findings are not measured, and for each engine of other weights."""
    notes = []
    known = {letters_of(finding) for engine in everyone.values() for finding in engine.findings}
    left = [finding for finding in labelled if letters_of(finding) not in known]
    if left:
        notes.append(f"labels: not measured, as no engine knows them: {name_some(left)}.")
    lacking: dict[tuple[str, ...], list[str]] = {}
    for name, engine in everyone.items():
        lacking.setdefault(tuple(each for each in engine.findings if each not in findings), []).append(name)
    for missing, names in lacking.items():
        if missing:
            notes.append(
                f"{', '.join(names)}: not measured, as the labels or an engine lack them: {', '.join(missing)}."
            )
    for name, engine in everyone.items():
        if isinstance(engine, Bundle) and not _is_of_family(engine, everyone[REFERENCE]):
            notes.append(f"{name}: of other weights than the reference.")
    return tuple(notes)


def _notes_on_times(everyone: Mapping[str, Engine], taken: float, provider: Provider) -> Iterator[str]:
    if taken >= BUSY_SHARE:
        yield f"times: other programs took {taken:.0%} of the cores while they were measured; measure on a quiet machine."
    on_onnx = any(isinstance(engine, Bundle) and engine.manifest.target is None for engine in everyone.values())
    if on_onnx and provider == "auto" and resolve_provider(provider) == "cpu":
        yield "times: ONNX Runtime's; OpenVINO is faster on a CPU. Install it: pip install 'chexnet-deploy[openvino]'."


def _distinct_names(engines: Sequence[Engine]) -> list[str]:
    names = [engine.name for engine in engines]
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
    everyone: Mapping[str, Engine],
    images: LabelledImages | None,
    on_phase: OnPhase | None,
) -> _Answers:
    """Return the answers of the images' findings, in their order."""
    if images is None:
        return _Answers({}, {})
    n_images = len(images.paths)
    columns = {name: [engine.findings.index(f) for f in images.findings] for name, engine in everyone.items()}
    correlations: dict[str, list[NDArray[np.float32]]] = {name: [] for name in sessions if name != REFERENCE}

    def on_maps(maps: Mapping[str, Maps]) -> None:
        wanted = maps[REFERENCE][:, columns[REFERENCE]]
        for name, parts in correlations.items():
            got = maps[name][:, columns[name]]
            is_alike = got.size > 0 and got.shape == wanted.shape  # an engine may have none, or of another grid
            parts.append(map_correlation(wanted, got) if is_alike else np.full(got.shape[:2], np.nan, np.float32))

    def on_images(done: int) -> None:
        if on_phase is not None:
            on_phase("accuracy", done, n_images)

    resizing = {name: resizing_of(engine) for name, engine in everyone.items()}
    logits = score_files(sessions, images.paths, resizing, on_images=on_images, on_maps=on_maps)
    return _Answers(
        {name: values[:, columns[name]] for name, values in logits.items()},
        {name: np.concatenate(parts) for name, parts in correlations.items()},
    )


def _look(
    sessions: Mapping[str, Session],
    everyone: Mapping[str, Engine],
    images: LabelledImages | None,
    logits: Mapping[str, Logits],
) -> tuple[ShownMaps, ...]:
    """Return the maps of the reference's surest true positives; a run over so few images again is cheaper than all maps kept."""
    if images is None:
        return ()
    sureness = np.where(images.truth, logits[REFERENCE], -np.inf)
    best = [(sureness[:, c].max(), int(sureness[:, c].argmax()), finding) for c, finding in enumerate(images.findings)]
    chosen = sorted((each for each in best if each[0] > -np.inf), reverse=True)[:N_SHOWN]
    collected: dict[str, list[Maps]] = {name: [] for name in sessions}

    def on_maps(maps: Mapping[str, Maps]) -> None:
        for name, values in maps.items():
            collected[name].append(values)

    if chosen:
        resizing = {name: resizing_of(engine) for name, engine in everyone.items()}
        score_files(sessions, [images.paths[row] for _, row, _ in chosen], resizing, on_maps=on_maps)
    maps = {name: np.concatenate(values) for name, values in collected.items() if values and values[0].size}
    return tuple(
        ShownMaps(
            row, finding, {name: values[i, everyone[name].findings.index(finding)] for name, values in maps.items()}
        )
        for i, (_, row, finding) in enumerate(chosen)
    )


def _measure(
    sessions: Mapping[str, Session],
    everyone: Mapping[str, Engine],
    engines: Sequence[tuple[Engine, EngineSpec]],
    effort: Effort,
    on_phase: OnPhase | None,
) -> dict[str, tuple[LatencyReport, LatencyReport]]:
    timed = {name: session for name, session in sessions.items() if name != REFERENCE}
    probes = {name: probe_pixels(everyone[name]) for name in timed}
    offline_batch = min(min(spec.batch.max for _, spec in engines), N_PROBES)
    offline_runs = max(1, effort.min_runs // offline_batch)

    def on_round(phase: str, least: int) -> Callable[[int], None]:
        def report(done: int) -> None:
            if on_phase is not None:
                on_phase(phase, done, max(done, least))

        return report

    single = measure_latency(
        timed,
        {name: pixels[:1] for name, pixels in probes.items()},
        "single_stream",
        min_runs=effort.min_runs,
        min_duration_s=effort.min_duration_s,
        on_round=on_round("batch 1", effort.min_runs),
    )
    offline = measure_latency(
        timed,
        {name: pixels[:offline_batch] for name, pixels in probes.items()},
        "offline",
        min_runs=offline_runs,
        min_duration_s=effort.min_duration_s,
        on_round=on_round(f"batch {offline_batch}", offline_runs),
    )
    return {name: (single[name], offline[name]) for name in timed}


def _judge(
    name: str,
    engine: Engine,
    spec: EngineSpec,
    session: Session,
    reference: Engine,
    answers: _Answers,
    images: LabelledImages | None,
    invariance: InvarianceReport,
    speed: tuple[LatencyReport, LatencyReport],
    dicom: DicomTimes | None,
) -> EngineResult:
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
            images.findings,
            reference.operating_points,
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
    slow, unsure = judge_dicom(dicom, spec.gate.dicom_p99_over_model_p50)
    failures += slow
    doubts += unsure
    conv_types = dict(session.conv_types())
    if conv_types.get(UNKNOWN):
        doubts.append(f"precision: the layer table does not show which type {conv_types[UNKNOWN]} convolutions run in")
    # What an int8 form leaves in floating point is meant to be float: half of all in the mixed one.
    manifest = engine.manifest if isinstance(engine, Bundle) else None
    promised = sum(conv_types.values()) - (0 if manifest is None else len(manifest.float_convolutions))
    native = conv_types.get(spec.precision.type_name, 0)
    return EngineResult(
        name=name,
        bundle_id=engine.id,
        contract=None if isinstance(engine, Bundle) else engine.contract,
        model_sha256=engine.model_sha256,
        precision=spec.precision,
        dialect=None if manifest is None else manifest.dialect,
        conv_types=conv_types,
        is_emulated=2 * native < promised,
        known_answer_error=check_known_answers(session, engine, n_probes=N_PROBES)
        if isinstance(engine, Bundle)
        else None,
        target=None if manifest is None else manifest.target,
        card=None if manifest is None else manifest.engine,
        spec=spec,
        parity=parity,
        invariance=invariance,
        single_stream=speed[0],
        offline=speed[1],
        stage_times_ms=_stage_times_ms(session, probe_pixels(engine)[:1]),
        dicom=dicom,
        verdict="FAIL" if failures else "INCONCLUSIVE" if doubts else "PASS",
        reasons=(*failures, *doubts),
    )


def _stage_times_ms(session: Session, pixels: Pixels) -> dict[str, float]:
    runs = [session.stage_times_ms(pixels) for _ in range(STAGE_RUNS)]
    return {name: float(np.median([run[name] for run in runs])) for name in runs[0]}
