"""Thirty-eight faults planted in real bundles: does the gate find each at a small size, by what, and how small may it be?

    python -m benchmarks.int8.planted BUNDLES --data ROOT

Each fault of faults.py is judged as `bench` judges, beside fp32, by the shipped spec of the form it is planted in. Where it is
found at its small size, smaller ones are tried, each half of the one before; else larger ones. The forms themselves must not fail,
or finding faults would be easy.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import numpy as np
import onnx
import typer

from benchmarks.common import RESULTS
from benchmarks.int8.faults import FAULTS, Fault, pixels_of, slot_noise
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.datasets import ChestXray14, LabelledImages
from chexnet_deploy.evaluation.invariance import measure_invariance
from chexnet_deploy.evaluation.machine import Machine, describe_machine
from chexnet_deploy.evaluation.parity import compare
from chexnet_deploy.evaluation.spec import EngineSpec, read_spec
from chexnet_deploy.images.gray import Gray
from chexnet_deploy.images.preprocessing import Pixels
from chexnet_deploy.images.reader import read_image
from chexnet_deploy.inputs import ReportRecord
from chexnet_deploy.runtime.sessions.base import Logits, Session, run_in_batches
from chexnet_deploy.runtime.sessions.ort import OrtSession
from chexnet_deploy.terminal import run_program

MAX_HALVINGS, MAX_DOUBLINGS = 3, 2
FORMS: Final = ("int8-cpu", "fp16")

app = typer.Typer(add_completion=False)


class Finding(ReportRecord):
    """What the gate said of one fault at one size.

    Attributes:
        found_by: gates that failed; AUROC with the number of findings that lost their margin.
        measured: by the name of its limit.
    """

    size: float
    verdict: str
    found_by: tuple[str, ...]
    measured: dict[str, float]


class Outcome(ReportRecord):
    """One fault at all sizes that were tried, the small one first.

    Attributes:
        smallest_found: None where no size was found.
        largest_missed: None where none was missed.
    """

    name: str
    form: str
    unit: str
    tried: tuple[Finding, ...]
    smallest_found: float | None
    largest_missed: float | None


class Results(ReportRecord):
    """All outcomes on one machine."""

    machine: Machine
    data: str
    without_fault: dict[str, Finding]
    n_found_small: int
    outcomes: tuple[Outcome, ...]


@app.command()
def main(
    bundles: Annotated[Path, typer.Argument(help="Folder with fp32, fp16 and int8-cpu.")],
    data: Annotated[Path, typer.Option(help="Labelled images in ChestX-ray14's layout.")],
    every: Annotated[int, typer.Option(min=1, help="Take every so many-th patient, where time is short.")] = 1,
    out: Annotated[Path, typer.Option(help="Results.")] = RESULTS / "planted-cpu.json",
) -> None:
    """Plant each fault at each size, judge it beside fp32, and print what found it."""
    listed = ChestXray14.open(data).split("test")
    patients = sorted({radiograph.patient for radiograph in listed})[::every]
    chosen = [radiograph for radiograph in listed if radiograph.patient in set(patients)]
    images = LabelledImages.of(chosen, Bundle.open(bundles / "fp32").manifest.findings)
    judge = Judge.of(bundles, images)
    without_fault = {form: judge.judge(judge.answers[form], form, 0.0, judge.sessions[form]) for form in FORMS}
    outcomes = []
    for fault in FAULTS:
        outcomes.append(search(judge, fault))
        small = outcomes[-1].tried[0]
        typer.echo(
            f"{fault.name}: {small.verdict} at {small.size:g} {' '.join(small.found_by)}; found down to "
            f"{outcomes[-1].smallest_found}, missed at {outcomes[-1].largest_missed}"
        )
    results = Results(
        machine=describe_machine(),
        data=f"{len(images.names)} test images of {len(set(images.patients.tolist()))} patients",
        without_fault=without_fault,
        n_found_small=sum(outcome.tried[0].verdict == "FAIL" for outcome in outcomes),
        outcomes=tuple(outcomes),
    )
    out.write_text(results.model_dump_json(indent=1) + "\n")
    typer.echo(markdown_table(results))


def markdown_table(results: Results) -> str:
    """Return the table of engines/README.md: one row a fault."""
    rows = [
        "| fault | size | at its small size | found by | smallest found | largest missed |",
        "|---|---|---|---|---|---|",
    ]
    for each in results.outcomes:
        small = each.tried[0]
        ends = ("" if size is None else f"{size:.3g}" for size in (each.smallest_found, each.largest_missed))
        name = each.name if each.form == FORMS[0] else f"{each.name} ({each.form})"
        rows.append(
            f"| {name} | {each.unit} | {small.size:g}: {small.verdict} | {', '.join(small.found_by)} | {' | '.join(ends)} |"
        )
    n = len(results.outcomes)
    rows += [
        "",
        f"{results.n_found_small} of {n} found at their small size, on {results.data}. {results.machine.processor}.",
    ]
    return "\n".join(rows)


def search(judge: "Judge", fault: Fault) -> Outcome:
    """Judge a fault at its small size, then at smaller or larger ones until the verdict changes."""
    tried = [judge.plant(fault, fault.small)]
    was_found = tried[0].verdict == "FAIL"
    for _ in range(0 if fault.is_whole else MAX_HALVINGS if was_found else MAX_DOUBLINGS):
        size = tried[-1].size / 2 if was_found else tried[-1].size * 2
        size = float(int(size)) if fault.is_counted else size
        if not size or (size > 1 and fault.unit == "blend") or (size > 1 and fault.unit.startswith("share")):
            break
        tried.append(judge.plant(fault, size))
        if (tried[-1].verdict == "FAIL") != was_found:
            break
    found = [each.size for each in tried if each.verdict == "FAIL"]
    missed = [each.size for each in tried if each.verdict != "FAIL"]
    return Outcome(
        name=fault.name,
        form=fault.form,
        unit=fault.unit,
        tried=tuple(tried),
        smallest_found=min(found, default=None),
        largest_missed=max(missed, default=None),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Judge:
    """Everything that no fault changes: fp32's answers, the forms and theirs, the pictures and their pixels."""

    fp32: Bundle
    images: LabelledImages
    grays: tuple[Gray, ...]
    pixels: Pixels
    folder: Path
    sessions: dict[str, Session]
    answers: dict[str, Logits]

    @classmethod
    def of(cls, bundles: Path, images: LabelledImages) -> "Judge":
        """Read the pictures and run fp32 and each form on them."""
        fp32 = Bundle.open(bundles / "fp32")
        grays = tuple(read_image(path) for path in images.paths)
        pixels = np.concatenate([fp32.manifest.preprocessing(gray) for gray in grays])
        judge = cls(fp32, images, grays, pixels, bundles, {}, {})
        for form in ("fp32", *FORMS):
            judge.sessions[form] = judge.open(Bundle.open(bundles / form).read_model())
            judge.answers[form] = run_in_batches(judge.sessions[form], pixels)[0]
        return judge

    def open(self, model: bytes) -> Session:
        """Open a model in ONNX Runtime, on one core: more of them wait for each other on a busy machine."""
        return OrtSession(model, self.fp32.manifest.preprocessing.resize_px, threads=1)

    def plant(self, fault: Fault, size: float) -> Finding:
        """Return what the gate says of a fault of that size."""
        if fault.in_answers is not None:
            return self.judge(fault.in_answers(self.answers[fault.form], size), fault.form, size)
        if fault.in_picture is not None:
            side = self.fp32.manifest.preprocessing.resize_px
            pixels = pixels_of(self.grays, side, fault.in_picture, size)
            return self.judge(run_in_batches(self.sessions[fault.form], pixels)[0], fault.form, size)
        assert fault.in_graph is not None
        model = onnx.load_from_string(Bundle.open(self.folder / fault.form).read_model())
        fault.in_graph(model, size)
        session = self.open(model.SerializeToString())
        try:
            answers, _ = run_in_batches(session, self.pixels)
            # Nothing else moves with the batch, and looking for it takes as long as a third of the images.
            return self.judge(answers, fault.form, size, session if fault.in_graph is slot_noise else None)
        finally:
            session.close()

    def judge(self, answers: Logits, form: str, size: float, session: Session | None = None) -> Finding:
        """Hold answers to the form's spec as `bench` does; with a session, that one's invariance too."""
        spec, manifest = _spec_of(form), self.fp32.manifest
        report = compare(
            self.answers["fp32"],
            answers,
            self.images.truth,
            self.images.patients,
            manifest.findings,
            manifest.operating_points,
            spec.gate,
        )
        found_by = [each.gate for each in report.gates if each.verdict == "fail"]
        measured = {each.gate: each.value for each in report.gates if each.value is not None}
        if n_lost := sum(finding.verdict == "fail" for finding in report.findings):
            found_by.insert(0, f"AUROC of {n_lost}")
        if session is not None:
            pixels = self.fp32.read_probe().pixels
            spread = measure_invariance(session, pixels, spec.batch.max).max_abs_probability_difference
            measured["invariance"] = spread
            if not spread <= spec.gate.invariance_abs_probability_difference:
                found_by.append("invariance")
        verdict = "FAIL" if found_by else report.verdict
        return Finding(size=size, verdict=verdict, found_by=tuple(found_by), measured=measured)


def _spec_of(form: str) -> EngineSpec:
    return read_spec(form.split("-")[0])


if __name__ == "__main__":
    run_program(app)
