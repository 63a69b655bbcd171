"""Results of bench: the schema of report.json, rows for the screen, and the CSV of logits."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import computed_field

from chexnet_deploy.bundle.manifest import EngineCard, Precision, Target
from chexnet_deploy.datasets.labelled import LabelledImages
from chexnet_deploy.evaluation.dicom_times import STAGES, DicomTimes
from chexnet_deploy.evaluation.invariance import InvarianceReport
from chexnet_deploy.evaluation.latency import LatencyReport
from chexnet_deploy.evaluation.machine import Machine
from chexnet_deploy.evaluation.parity import ParityReport, Verdict
from chexnet_deploy.evaluation.spec import EngineSpec
from chexnet_deploy.inputs import ReportRecord
from chexnet_deploy.runtime.contract import Contract
from chexnet_deploy.runtime.sessions.base import Logits, Provider


def print_bench(report: "BenchReport", page: Path) -> None:
    """Print the tables, every reason why not PASS, what may replace what, and where the whole report lies."""
    import typer

    from chexnet_deploy.evaluation.bench_words import evidence, headline
    from chexnet_deploy.terminal import print_table

    print_table(summary_rows(report))
    if limits := limit_rows(report):
        print_table(limits)
    if times := dicom_rows(report):
        print_table(times)
    typer.echo(evidence(report))
    for note in report.notes:
        typer.echo(note)
    for result in report.judged:
        for reason in result.reasons:
            typer.echo(f"{result.name}: {reason}")
    typer.echo(f"{headline(report)}.")
    typer.echo(f"{report.verdict}  {page}")


class EngineResult(ReportRecord):
    """One engine.

    Attributes:
        bundle_id: a bundle's; of another engine the SHA-256 of its contract with its model's hash, or with its URL.
        contract: of an engine that is no bundle.
        model_sha256: of the model file; None for an endpoint, behind which anything may run.
        precision: the spec's.
        dialect: None for an engine that is no bundle.
        conv_types: convolutions by the type they really ran in; empty for an endpoint, where nobody can know.
        is_emulated: of those not meant to stay in floating point fewer than half ran in the engine's own precision, so its
            speed says nothing of that precision.
        known_answer_error: largest |logit difference| to the fp32 model on all 32 probes; None for an engine that is no bundle.
        target: of a plan, the machine it was built on and for.
        card: of a plan, what the builder made.
        spec: what it had to pass, with every limit.
        stage_times_ms: median times of one image in each stage, where the backend tells them apart.
        dicom: from DICOM files to reports; None where none were given.
        invariance: how far one image's answers spread over slots, batch sizes and threads.
        parity: None where no labelled images were given; the verdict is then never PASS.
    """

    name: str
    bundle_id: str
    contract: Contract | None = None
    model_sha256: str | None
    precision: Precision
    dialect: str | None
    conv_types: dict[str, int]
    is_emulated: bool
    known_answer_error: float | None
    target: Target | None = None
    card: EngineCard | None = None
    spec: EngineSpec
    parity: ParityReport | None
    invariance: InvarianceReport | None = None
    single_stream: LatencyReport
    offline: LatencyReport
    stage_times_ms: dict[str, float] = {}
    dicom: DicomTimes | None = None
    verdict: Verdict
    reasons: tuple[str, ...]


class BenchReport(ReportRecord):
    """All engines of one run, measured in turns on one machine.

    Attributes:
        finished_utc: when, ISO 8601.
        data: what the images are, in words.
        patients_note: a sentence on their overlap with the training patients, and of the images with those that set int8 ranges.
        provider: what ran the ONNX engines; the reference always runs on ONNX Runtime's CPU.
        reference_id: as EngineResult.bundle_id.
        reference_contract: as EngineResult.contract.
        findings: that were measured: those that all engines and the labels know.
        notes: sentences on what was not measured, on what disturbed it, and which engines are of other weights.
        images_sha256: hash of the names of the images, one a line, in the order they were run; None without images.
    """

    schema_version: int = 1
    finished_utc: str
    machine: Machine
    data: str
    patients_note: str = ""
    images_sha256: str | None
    threads: int | None
    provider: Provider = "cpu"
    reference_id: str
    reference_contract: Contract | None = None
    findings: tuple[str, ...]
    notes: tuple[str, ...] = ()
    engines: tuple[EngineResult, ...]

    @computed_field  # type: ignore[prop-decorator]  # pydantic's own advice for mypy
    @property
    def verdict(self) -> Verdict:
        """The worst of the engines that are judged."""
        verdicts = {engine.verdict for engine in self.judged}
        return "FAIL" if "FAIL" in verdicts else "INCONCLUSIVE" if "INCONCLUSIVE" in verdicts else "PASS"

    @property
    def judged(self) -> tuple[EngineResult, ...]:
        """All engines but the reference's own file: too few patients to prove that it equals itself say nothing of the others."""
        return tuple(engine for engine in self.engines if not self.is_reference(engine)) or self.engines

    def is_reference(self, engine: EngineResult) -> bool:
        """Say whether an engine is the reference's own file; one that fails beside it is judged as any other."""
        return engine.bundle_id == self.reference_id and engine.verdict != "FAIL"

    def verdict_of(self, engine: EngineResult) -> str:
        """Return an engine's verdict in words, with the findings it rests on or what stands against it."""
        if self.is_reference(engine):
            return "the reference itself"
        parity = engine.parity
        return engine.verdict if parity is None or parity.verdict != engine.verdict else parity.summary


@dataclass(frozen=True, slots=True)
class ShownMaps:
    """One radiograph's activation maps of one finding.

    Attributes:
        row: of the image among the labelled ones.
        maps: float32 [h, w] each, by engine name, beside "reference"; those that have none are left out.
    """

    row: int
    finding: str
    maps: Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class BenchRun:
    """A report with the scores it was made from; `logits` are by engine name, beside "reference".

    Attributes:
        shown: for pictures: the surest true positives of the reference, one a finding, the surest first.
    """

    report: BenchReport
    images: LabelledImages | None
    logits: Mapping[str, Logits]
    shown: tuple[ShownMaps, ...] = ()


def summary_rows(report: BenchReport) -> list[dict[str, str]]:
    """Return one row an engine, as text: accuracy and speed side by side."""
    rows = []
    for engine in report.engines:
        parity = engine.parity
        mark = " emulated" if engine.is_emulated else ""
        accuracy = "not measured", "not measured", "not measured"
        if parity is not None:
            mean = "undefined" if parity.mean_auroc_candidate is None else f"{parity.mean_auroc_candidate:.4f}"
            accuracy = (
                f"{mean} over {parity.n_counted}",
                f"{parity.max_abs_probability_difference:.4f}",
                f"{parity.n_flips} of {parity.n_decisions}",
            )
        rows.append(
            {
                "engine": engine.name,
                "mean AUROC": accuracy[0],
                "max |Δp|": accuracy[1],
                "flips": accuracy[2],
                "p50 ms": f"{engine.single_stream.p50_ms:.2f}{mark}",
                "p99 ms": f"{engine.single_stream.p99_ms:.2f}{mark}",
                "images/s": f"{engine.offline.images_per_s:.1f}{mark}",
                "verdict": report.verdict_of(engine),
            }
        )
    return rows


def limit_rows(report: BenchReport) -> list[dict[str, str]]:
    """Return one row a limit and engine, as text; none where accuracy was not measured."""
    return [
        {
            "engine": engine.name,
            "limit": each.gate,
            "measured (95 %)": each.measured,
            "worst finding": each.finding or "",
            "at": "not gated" if each.limit is None else f"{each.limit:g}",
            "verdict": "" if each.limit is None else "not measured" if each.value is None else each.verdict,
        }
        for engine in report.engines
        if engine.parity is not None
        for each in engine.parity.gates
    ]


def dicom_rows(report: BenchReport) -> list[dict[str, str]]:
    """Return one row an engine and kind of DICOM files, as text: median / 99th percentile of each stage."""
    return [
        {
            "engine": engine.name,
            "DICOM to report": f"{each.kind}, {each.megapixels:.1f} MP",
            **{f"{name} ms": f"{each.p50_ms[name]:.1f} / {each.p99_ms[name]:.1f}" for name in (*STAGES, "total")},
            "after idle": f"{each.after_idle_p50_ms['total']:.1f}",
            "p99 / model": f"{each.p99_over_model_p50:.1f}",
            "at most": f"{limits[each.kind]:g}" if each.kind in limits else "not gated",
        }
        for engine in report.engines
        if engine.dicom is not None
        for limits in (engine.spec.gate.dicom_p99_over_model_p50 or {},)
        for each in engine.dicom.kinds
    ]


def write_predictions(path: Path, images: LabelledImages, findings: Sequence[str], logits: Logits) -> None:
    """Write one row an image: its name and the logits, so that every statistic can be computed again."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")  # quotes a name that holds a comma
        writer.writerow(("Image Index", *(f"logit_{finding}" for finding in findings)))
        for name, row in zip(images.names, np.asarray(logits, np.float32), strict=True):
            writer.writerow((name, *(repr(float(value)) for value in row)))
