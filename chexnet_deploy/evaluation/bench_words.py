"""A bench in words: what may replace what, what to do next, and what was not measured. Computes nothing."""

from collections.abc import Callable, Sequence
from typing import Final

from chexnet_deploy.evaluation.bench_report import BenchReport, EngineResult
from chexnet_deploy.evaluation.parity import ParityReport, Verdict
from chexnet_deploy.inputs import name_some

MOST_BY_NAME: Final = 3
"""Findings that are each named with their own reason."""


def headline(report: BenchReport) -> str:
    """Return what may replace what, e.g. "fp16 and int8 may replace fp32; int8-cpu may not"."""
    reference = reference_name(report)
    judged = [engine for engine in report.engines if not report.is_reference(engine)]
    passed, failed, open_ = (
        [engine.name for engine in judged if engine.verdict == verdict] for verdict in ("PASS", "FAIL", "INCONCLUSIVE")
    )
    if not judged:
        return f"Only {reference} itself was measured"
    if not passed and not failed:
        return f"Not decided: whether {_join(open_)} may replace {reference}"
    parts = []
    if passed:
        parts.append(f"{_join(passed)} may replace {reference}")
    if failed:
        parts.append(f"{_join(failed)} may not" + ("" if passed else f" replace {reference}"))
    if open_:
        parts.append(f"{_join(open_)}: not decided")
    return "; ".join(parts)


def reference_name(report: BenchReport) -> str:
    """Return the name by which the reference was measured too, or "the reference"."""
    return next((engine.name for engine in report.engines if report.is_reference(engine)), "the reference")


def evidence(report: BenchReport) -> str:
    """Return on whose images the verdict rests."""
    if report.images_sha256 is None:
        return "No labelled images were given: only speed was measured."
    return f"Measured on {report.data}. {report.patients_note}".strip()


def same_file(engine: EngineResult) -> str:
    """Return how the reference's own file answered, in one line."""
    parity = engine.parity
    if parity is None:
        return f"{engine.name}: the same file as the reference."
    gap = parity.max_abs_probability_difference
    alike = "identical to the bit" if parity.max_abs_logit_difference == 0.0 else f"probabilities within {gap:.1g}"
    return f"{engine.name}: the same file as the reference, {alike}."


def next_steps(report: BenchReport) -> list[tuple[str, Verdict, str, str]]:
    """Return for the engines that do not pass: their names, verdict, reason, and what to do; alike ones together."""
    alike: dict[tuple[Verdict, str, str], list[str]] = {}
    for engine in report.judged:
        if engine.verdict != "PASS":
            more = f" (and {len(engine.reasons) - 1} more)" if len(engine.reasons) > 1 else ""
            found = engine.verdict, engine.reasons[0] + more, next_step(engine, report)
            alike.setdefault(found, []).append(engine.name)
    return [(_join(names), *found) for found, names in alike.items()]


def next_step(engine: EngineResult, report: BenchReport) -> str:
    """Return what to do about an engine that does not pass."""
    if engine.verdict == "FAIL":
        passing = [each for each in report.judged if each.verdict == "PASS"]
        if not passing:
            return f"Keep {reference_name(report)}."
        fastest = min(passing, key=lambda each: each.single_stream.p50_ms)
        return f"Take {fastest.name}, which passes{' and is the fastest that does' if len(passing) > 1 else ''}."
    parity = engine.parity
    if parity is None:
        return "Give labelled images by --data."
    if not parity.n_assessable:
        n = engine.spec.gate.min_positive_patients
        return f"Measure on more images: at least {n} patients with a finding are needed to judge it."
    more = [(row.n_more_patients or 0, row.finding) for row in parity.findings if row.verdict == "inconclusive"]
    more += [(gate.n_more_patients or 0, "") for gate in parity.gates if gate.verdict == "inconclusive"]
    if more:
        n, finding = max(more)
        about = f": about {n:,} more{f' with {finding}' if finding else ''}" if n else ""
        return f"Measure on more patients{about}."
    if engine.spec.gate.latency == "unproven":
        return "Measure the spec's latency limits on its target, and write them into the spec."
    return "Remove the reason, and run bench again."


def not_measured(report: BenchReport) -> list[tuple[str, str]]:
    """Return what this bench says nothing of, each with its reason."""
    found = []
    if report.images_sha256 is None:
        found.append(("Accuracy", "no labelled images were given"))
    if report.provider != "cuda" and all(engine.target is None for engine in report.engines):
        found.append(("A GPU", f"every engine ran on {report.machine.processor}"))

    def add(what: str, why: str, is_so: Callable[[EngineResult], bool]) -> None:
        if names := [engine.name for engine in report.engines if is_so(engine)]:
            whose = "every engine" if 1 < len(names) == len(report.engines) else _join(names)
            found.append((what.format(whose), why))

    add("Speed of {}", "its convolutions ran as float here", lambda engine: engine.is_emulated)
    add("Latency of {}", "nobody has measured its limits yet", lambda engine: engine.spec.gate.latency == "unproven")
    add("A limit on the latency of {}", "none is set", lambda engine: engine.spec.gate.latency == "not gated")
    add("The type {} computes in", "the backend does not show it", lambda engine: not engine.conv_types)
    found += _dicom_not_measured(report)
    compared = [engine.parity for engine in report.engines if engine.parity is not None]
    if compared:
        found += _findings_not_measured(compared)
    add(
        "Activation maps of {}",
        "none, or of another grid than the reference's",
        lambda engine: (
            engine.parity is not None and all(row.map_correlation_median is None for row in engine.parity.findings)
        ),
    )
    return [*found, *((name, why) for name, _, why in (note.rstrip(".").partition(": ") for note in report.notes))]


def _dicom_not_measured(report: BenchReport) -> list[tuple[str, str]]:
    """Return the DICOM files that no engine took, and the kinds that have a limit and no file."""
    found = {}
    for engine in report.engines:
        if engine.dicom is None:
            continue
        if engine.dicom.refused:
            why = ", ".join(f"{reason} {n:,}" for reason, n in engine.dicom.refused.items())
            found["Files of --dicom that are refused"] = why
        limited = engine.spec.gate.dicom_p99_over_model_p50 or {}
        for kind in sorted(set(limited) - {each.kind for each in engine.dicom.kinds}):
            found[f"DICOM to report, {kind}"] = "there was no such file"
    return list(found.items())


def _findings_not_measured(compared: Sequence[ParityReport]) -> list[tuple[str, str]]:
    found = []
    why_not = {
        row.finding: row.why_not_assessable for parity in compared for row in parity.findings if row.why_not_assessable
    }
    if len(why_not) > MOST_BY_NAME:
        found.append((f"{len(why_not)} findings", f"too few patients: {name_some(list(why_not))}"))
    else:
        found += why_not.items()
    rows = compared[0].findings
    if without := [row.finding for row in rows if row.operating_point is None]:
        on = "" if len(without) == len(rows) else f" on {name_some(without)}"
        found.append((f"Decisions{on}", "the reference has no operating point"))
    if small := [group.group for group in compared[0].subgroups if not group.n_assessable]:
        found.append((f"Patients of {_join(small)}", "too few for any finding"))
    if not compared[0].subgroups:
        found.append(("Groups of patients", "the labels name none"))
    return found


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
