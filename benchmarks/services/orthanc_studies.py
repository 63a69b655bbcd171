"""Send an archive's studies to a node, kill it in between, and look in the archive for what came of each image.

    python -m benchmarks.services.orthanc_studies --bundle BUNDLE     writes results/orthanc-cpu.json; exit 1 where one came amiss

Orthanc is the archive on both sides: it sends each study by C-STORE, as a router does, and takes the results. The studies come
as a hospital's do (KINDS): compressed, with views that are refused, sent again, with a header corrected after an answer or a
refusal, transcoded in the meantime, whole with our own results in them. In the end each image must have in its own study, by
Orthanc's REST API, one answer or one refusal for each header that was sent, and nothing twice.
"""

import collections
import json
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Annotated, Final

import typer
from pydantic import BaseModel, ConfigDict
from pydicom import Dataset
from pydicom.uid import (
    Comprehensive3DSRStorage,
    ExplicitVRLittleEndian,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from benchmarks.rigs.node_rig import NodeProcess, write_radiograph
from benchmarks.rigs.orthanc import Orthanc, find_orthanc
from benchmarks.services.node_kills import LONGEST_LIFE_S, settle
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.dicom.node.audit import read_head, verify
from chexnet_deploy.dicom.results.structured_report import read_probabilities
from chexnet_deploy.evaluation.machine import describe_machine
from chexnet_deploy.terminal import progress, run_program

RESULTS = Path(__file__).parents[1] / "results" / "orthanc-cpu.json"
MAX_PICTURES = 1  # in the rig's configuration
N_TRIES = 5  # a router's, for one study

app = typer.Typer(add_completion=False)


class Outcome(BaseModel):
    """What was seen.

    Attributes:
        kinds: how many studies of each kind.
        headers: images that were sent, a corrected one counted again.
        answered: headers that got one report.
        refused: headers that got one notice, by the reason it gives.
        amiss: what was not taken, not answered, answered twice or otherwise than was due, in words.
        sendings: how often Orthanc sent a study.
        cut_sendings: of these, those that a kill broke off or kept out.
        ends: what the node's log says of how associations ended; of a killed node's last one it can say nothing.
    """

    model_config = ConfigDict(frozen=True)

    kinds: dict[str, int]
    kills: int
    headers: int
    answered: int
    refused: dict[str, int]
    amiss: tuple[str, ...]
    sendings: int
    cut_sendings: int
    ends: dict[str, int]
    audit_lines: int
    seconds: float


@dataclass
class Study:
    """One study and what is due.

    Attributes:
        steps: what happens to it in the archive, each when the last was answered: files are put there, then it is sent whole.
        times: how often it is sent in each step.
        due: each header that was sent, as (SOP Instance UID, patient's name), and whether it must be refused.
    """

    kind: str
    uid: str
    steps: list[list[bytes]]
    times: int
    due: dict[tuple[str, str], bool]


KINDS: Final = (
    *("plain", "compressed", "two views", "two images", "refused", "sent again", "with results", "transcoded"),
    *("corrected after an answer", "corrected after a refusal"),
)


@app.command()
def main(
    bundle: Annotated[Path, typer.Option(help="What answers.")],
    studies: Annotated[int, typer.Option(min=1, help="How many.")] = 100,
    kills: Annotated[int, typer.Option(min=0, help="How many.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    out: Annotated[Path, typer.Option(help="Results.")] = RESULTS,
) -> None:
    """Send, kill, look and write what was seen."""
    program = find_orthanc()
    if program is None:
        raise typer.BadParameter("Orthanc is needed. Run: apt-get install orthanc")
    drawn = [draw_study(KINDS[i % len(KINDS)], i) for i in range(studies)]
    with tempfile.TemporaryDirectory(prefix="chexnet-orthanc-") as name, progress() as on_phase:
        outcome = send_studies(
            Path(name),
            bundle.absolute(),
            program,
            drawn,
            kills=kills,
            seed=seed,
            on_sent=lambda n, of: on_phase("sent", n, of),
        )
    results = {"machine": describe_machine().model_dump(), "outcome": outcome.model_dump()}
    out.write_text(json.dumps(results, indent=1) + "\n")
    for line in outcome.amiss:
        typer.echo(line)
    typer.echo(
        f"{studies} studies, {outcome.kills} kills: {outcome.headers} headers, {outcome.answered} answered, "
        f"{sum(outcome.refused.values())} refused, {len(outcome.amiss)} amiss; ends of associations {outcome.ends}"
    )
    if outcome.amiss:
        raise typer.Exit(1)


def send_studies(
    folder: Path,
    bundle: Path,
    program: str,
    studies: list[Study],
    *,
    kills: int,
    seed: int,
    on_sent: Callable[[int, int], None],
) -> Outcome:
    """Send studies from Orthanc to a node, killing it so often at random moments, and return what Orthanc has in the end."""
    start_s = time.monotonic()
    node = NodeProcess(folder / "node", bundle)
    orthanc = Orthanc(folder / "orthanc", node, program).start()
    router = _Router(node, orthanc, random.Random(seed))
    todo = [(step, study) for step in range(3) for study in studies if step < len(study.steps)]
    deadly = set(random.Random(seed).sample(range(len(todo)), kills))
    try:
        node.start()
        for i, (step, study) in enumerate(todo):
            if i and step > todo[i - 1][0]:
                settle(node, lambda: orthanc.n_instances)
            for content in study.steps[step]:
                orthanc.upload(content)
            for n in range(study.times):
                router.send(study.uid, is_deadly=n == 0 and i in deadly)
            on_sent(i + 1, len(todo))
        settle(node, lambda: orthanc.n_instances)
        node.stop()
        head = verify(node.state / "audit.jsonl", read_head(node.state / "audit.jsonl.head").hash)
        points = Bundle.open(bundle).manifest.operating_points
        held = [(study, _look(study, orthanc, points)) for study in studies]
    finally:
        if node.process is not None:
            node.kill()
        orthanc.stop()
    ends = collections.Counter(str(each["reason"]) for each in node.events() if each["event"] == "connection-ended")
    every = [each for _, found in held for each in found.values()]
    return Outcome(
        kinds=collections.Counter(study.kind for study in studies),
        kills=router.n_kills,
        headers=sum(len(study.due) for study in studies),
        answered=sum(len(each.reports) for each in every),
        refused=collections.Counter(reason for each in every for reason in each.refusals),
        amiss=(*router.amiss, *_answers_amiss(held), *_ends_amiss(ends, router)),
        sendings=router.n_sendings,
        cut_sendings=router.n_cut,
        ends=ends,
        audit_lines=head.seq,
        seconds=time.monotonic() - start_s,
    )


@dataclass
class _Router:
    """Sends a study until all of it was taken, as routers do; now and then the node is killed meanwhile."""

    node: NodeProcess
    orthanc: Orthanc
    moments: random.Random
    amiss: list[str] = field(default_factory=list)
    n_kills: int = 0
    n_sendings: int = 0
    n_cut: int = 0

    def send(self, study_uid: str, *, is_deadly: bool) -> None:
        """Send a whole study."""
        study = self.orthanc.find(study_uid)
        killer = threading.Timer(self.moments.uniform(0.0, LONGEST_LIFE_S), self.node.kill)
        if is_deadly:
            killer.start()
        for attempt in range(N_TRIES):
            is_taken = self.orthanc.send([study])
            self.n_sendings += 1
            self.n_cut += not is_taken
            if is_deadly and attempt == 0:
                killer.join()
                self.n_kills += 1
                self.node.start()
            if is_taken:
                return
        self.amiss.append(f"{study_uid}: the node took not all of it in {N_TRIES} tries")


def _answers_amiss(held: list[tuple[Study, dict[tuple[str, str], "_Held"]]]) -> Iterator[str]:
    for study, found in held:
        for key in {*study.due, *found}:
            complaint = found[key].complaint(is_refused=study.due[key]) if key in study.due else "was never sent"
            if complaint:
                yield f"{study.kind}, {key}: {complaint}"


def _ends_amiss(ends: Mapping[str, int], router: _Router) -> Iterator[str]:
    """Yield what the log tells otherwise than Orthanc, which releases every association that isn't cut, one or more a sending."""
    yield from (f"{n} associations ended {reason!r}" for reason, n in ends.items() if reason != "released")
    due = router.n_sendings - router.n_cut - router.n_kills
    if ends["released"] < due:
        yield f"{ends['released']} associations ended 'released', {due} or more were due"


def _image(seed: int, n: int = 0, **elements: str) -> Dataset:
    """Return the n-th radiograph of a study, with some elements changed."""
    with tempfile.TemporaryDirectory() as folder:
        image = write_radiograph(Path(folder) / "image.dcm", seed=1000 * seed + n, name=f"STUDY^{seed}")
    image.StudyInstanceUID, image.PatientID = f"1.2.826.0.1.3680043.8.498.{seed}", f"ID-{seed}"
    for keyword, value in elements.items():
        setattr(image, keyword, value)
    return image


def _file(image: Dataset, syntax: str = ExplicitVRLittleEndian) -> bytes:
    """Return the file of an image, compressed without loss where the transfer syntax says so."""
    encoded = deepcopy(image)
    if syntax != ExplicitVRLittleEndian:
        encoded.compress(syntax, generate_instance_uid=False)
    content = BytesIO()
    encoded.save_as(content, enforce_file_format=True)
    return content.getvalue()


def draw_study(kind: str, seed: int) -> Study:
    """Draw a study of a kind."""
    image, knee = _image(seed), _image(seed, BodyPartExamined="KNEE")
    corrected = _image(seed, PatientName=f"CORRECTED^{seed}")
    lateral, second = _image(seed, 1, ViewPosition="LL"), _image(seed, 2)
    steps: list[list[bytes]]
    steps, due = {
        "plain": ([[_file(image)]], [image]),
        "compressed": ([[_file(image, JPEGLSLossless)]], [image]),
        "two views": ([[_file(image), _file(lateral)]], [image, lateral]),
        "two images": ([[_file(image), _file(second)]], [image, second]),
        "refused": ([[_file(knee)]], [knee]),
        "sent again": ([[_file(image)]], [image]),
        "with results": ([[_file(image), _file(lateral)], [], []], [image, lateral]),
        "transcoded": ([[_file(image)], [_file(image, JPEGLSLossless)], [_file(image, RLELossless)]], [image]),
        "corrected after an answer": ([[_file(image)], [_file(corrected)]], [image, corrected]),
        "corrected after a refusal": ([[_file(knee)], [_file(corrected)]], [knee, corrected]),
    }[kind]
    return Study(
        kind,
        str(image.StudyInstanceUID),
        steps,
        times=3 if kind == "sent again" else 1,
        due={(str(each.SOPInstanceUID), str(each.PatientName)): each in (knee, lateral) for each in due},
    )


class _Held:
    """What the archive holds about one header.

    Attributes:
        reports: of each report, how many findings are present.
        refusals: of each notice, its reason.
        pictures: how many.
    """

    def __init__(self) -> None:
        self.reports: list[int] = []
        self.refusals: list[str] = []
        self.pictures = 0

    def complaint(self, *, is_refused: bool) -> str:
        """Return what is amiss; empty where nothing is."""
        if (len(self.reports), len(self.refusals)) != ((0, 1) if is_refused else (1, 0)):
            return f"{len(self.reports)} reports, refusals {self.refusals}, {'a refusal' if is_refused else 'a report'} was due"
        due = min(MAX_PICTURES, sum(self.reports))
        return "" if self.pictures == due else f"{self.pictures} pictures, {due} were due"


def _look(study: Study, orthanc: Orthanc, operating_points: Mapping[str, float]) -> dict[tuple[str, str], _Held]:
    """Return what the archive holds of a study beside its images, by the header that it is about."""
    found: dict[tuple[str, str], _Held] = collections.defaultdict(_Held)
    for instance in orthanc.instances(orthanc.find(study.uid)).values():
        document = orthanc.read(instance)
        if document.SOPClassUID == Comprehensive3DSRStorage:
            (series,) = document.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
            (source,) = series.ReferencedSOPSequence
            probabilities = read_probabilities(document)
            n_present = sum(probabilities[finding] >= point for finding, point in operating_points.items())
        elif document.SOPClassUID == SecondaryCaptureImageStorage:
            (source,) = document.get("SourceImageSequence") or document.ReferencedImageSequence
        else:
            continue
        held = found[str(source.ReferencedSOPInstanceUID), str(document.PatientName)]
        if document.Modality == "SR":
            held.reports.append(n_present)
        elif "SourceImageSequence" in document:
            held.pictures += 1
        else:
            held.refusals.append(document.ImageComments.removeprefix("No AI result: "))
    return found


if __name__ == "__main__":
    run_program(app)
