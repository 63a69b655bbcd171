"""How often does the gate fail an engine that is fine? Two hundred draws of patients for each of several honest pairs.

    python -m benchmarks.statistics.self_comparisons BUNDLES --data ROOT

Patients are drawn with replacement, as many as there are; one drawn twice counts as two. A model beside itself must never FAIL.
So must two runs of one model by two backends, which differ in the last bits, and the shipped forms beside fp32.
"""

from collections import Counter
from pathlib import Path
from typing import Annotated, Final

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.common import RESULTS
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.manifest import Manifest
from chexnet_deploy.datasets import ChestXray14, LabelledImages
from chexnet_deploy.evaluation.machine import Machine, describe_machine
from chexnet_deploy.evaluation.parity import compare
from chexnet_deploy.evaluation.spec import Gate, read_spec
from chexnet_deploy.inputs import ReportRecord
from chexnet_deploy.runtime.score import score_files
from chexnet_deploy.runtime.sessions.base import Logits, Provider
from chexnet_deploy.runtime.sessions.open import open_session
from chexnet_deploy.terminal import print_table, run_program

RUNS: Final[tuple[tuple[str, Provider], ...]] = (
    ("fp32", "cpu"),
    ("fp16", "cpu"),
    ("int8-cpu", "cpu"),
    ("int8-cpu", "openvino"),
)
PAIRS: Final = (
    ("fp32", "fp32 on cpu", "fp32 on cpu"),
    ("fp16", "fp32 on cpu", "fp16 on cpu"),
    ("int8", "fp32 on cpu", "int8-cpu on cpu"),
    ("int8", "int8-cpu on cpu", "int8-cpu on openvino"),
)

app = typer.Typer(add_completion=False)


class Comparison(ReportRecord):
    """One pair over all draws.

    Attributes:
        on_all: the verdict on the patients as they are.
        verdicts: how many draws had each.
        kept_from_pass: how many draws each gate kept from PASS; AUROC stands for its margins.
    """

    spec: str
    reference: str
    candidate: str
    on_all: str
    verdicts: dict[str, int]
    kept_from_pass: dict[str, int]


class Results(ReportRecord):
    """All pairs on one machine."""

    machine: Machine
    data: str
    n_draws: int
    comparisons: tuple[Comparison, ...]


@app.command()
def main(
    bundles: Annotated[Path, typer.Argument(help="Folder with fp32, fp16 and int8-cpu.")],
    data: Annotated[Path, typer.Option(help="Labelled images in ChestX-ray14's layout.")],
    draws: Annotated[int, typer.Option(min=1, help="Draws of patients for each pair.")] = 200,
    out: Annotated[Path, typer.Option(help="Results.")] = RESULTS / "self-comparisons.json",
) -> None:
    """Compare each pair on every draw, and count the verdicts."""
    opened = {name: Bundle.open(bundles / name) for name, _ in RUNS}
    manifest = opened["fp32"].manifest
    images = LabelledImages.of(ChestXray14.open(data).split("test"), manifest.findings)
    sessions = {f"{name} on {provider}": open_session(opened[name], provider=provider) for name, provider in RUNS}
    answers = score_files(sessions, images.paths, manifest.preprocessing)
    comparisons = tuple(
        compare_draws(name, pair, answers, images.truth, images.patients, manifest, draws) for name, *pair in PAIRS
    )
    words = f"{len(images.names)} test images of {len(set(images.patients.tolist()))} patients"
    results = Results(machine=describe_machine(), data=words, n_draws=draws, comparisons=comparisons)
    out.write_text(results.model_dump_json(indent=1) + "\n")
    print_table([{k: str(v) for k, v in each.model_dump().items()} for each in comparisons])


def compare_draws(
    spec: str,
    pair: list[str],
    answers: dict[str, Logits],
    truth: NDArray[np.bool_],
    patients: NDArray[np.int64],
    manifest: Manifest,
    n_draws: int,
) -> Comparison:
    """Return how the candidate of a pair fares by a spec on draws of patients."""
    reference, candidate = (answers[name] for name in pair)
    gate: Gate = read_spec(spec).gate
    rng = np.random.default_rng(0)
    verdicts: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    on_all = ""
    for i in range(n_draws + 1):
        rows, whose = (np.arange(len(patients)), patients) if i == 0 else draw_patients(patients, rng)
        report = compare(
            reference[rows], candidate[rows], truth[rows], whose, manifest.findings, manifest.operating_points, gate
        )
        if i == 0:
            on_all = report.summary
            continue
        verdicts[report.verdict] += 1
        kept.update(each.gate for each in report.gates if each.verdict in ("fail", "inconclusive"))
        kept["AUROC"] += any(finding.verdict in ("fail", "inconclusive") for finding in report.findings)
    return Comparison(
        spec=spec,
        reference=pair[0],
        candidate=pair[1],
        on_all=on_all,
        verdicts={name: verdicts[name] for name in ("PASS", "INCONCLUSIVE", "FAIL")},
        kept_from_pass={name: n for name, n in sorted(kept.items()) if n},
    )


def draw_patients(patients: NDArray[np.int64], rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows of as many patients drawn with replacement, and whose each is; each draw is a patient of its own."""
    index = np.unique(patients, return_inverse=True)[1]
    rows_of = [np.flatnonzero(index == patient) for patient in range(int(index.max()) + 1)]
    drawn = rng.integers(len(rows_of), size=len(rows_of))
    rows = np.concatenate([rows_of[patient] for patient in drawn])
    return rows, np.repeat(np.arange(len(drawn)), [len(rows_of[patient]) for patient in drawn])


if __name__ == "__main__":
    run_program(app)
