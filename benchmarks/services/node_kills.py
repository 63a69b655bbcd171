"""SIGKILL a node again and again while it receives, answers and sends; nothing that it acknowledged may be lost.

    python -m benchmarks.services.node_kills --bundle BUNDLE     writes results/node-kills-cpu.json; exit 1 where anything was lost

A modality stores one synthetic image after another, each with a UID of its own, and sends again what was not acknowledged,
as modalities do. At a random moment the node is killed, and started again. In the end every image that was ever
acknowledged must have its report and its pictures at the destination (DCMTK's storescp), each equal, element by element,
to what is answered without a node; and the audit log must be whole.
"""

import contextlib
import os
import random
import shutil
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from pydicom import Dataset, dcmread
from pydicom.filebase import DicomBytesIO

from benchmarks.common import RESULTS, write_results
from benchmarks.rigs.node_rig import NodeProcess, Pacs, find_dcmtk, store, write_radiograph
from chexnet_deploy.dicom.node.audit import read_head, verify
from chexnet_deploy.dicom.node.config import read_config
from chexnet_deploy.dicom.node.radiograph_worker import RadiographWork
from chexnet_deploy.inputs import ReportRecord
from chexnet_deploy.terminal import progress, run_program

LONGEST_LIFE_S = 0.8  # after the node is ready: some dozens of images
PATIENCE_S = 60.0  # without another document

app = typer.Typer(add_completion=False)


class Survived(ReportRecord):
    """What was seen.

    Attributes:
        acknowledged: images that were answered with status 0000, once or more.
        lost: of these, without all their documents in the end.
        wrong: documents at the destination that differ from those made without a node, or belong to no image.
        cut_transfers: images whose association broke off before the answer.
        statuses: how often each C-STORE status came.
    """

    kills: int
    acknowledged: int
    lost: tuple[str, ...]
    wrong: tuple[str, ...]
    cut_transfers: int
    statuses: dict[str, int]
    audit_lines: int
    seconds: float

    @property
    def is_whole(self) -> bool:
        """Whether nothing was lost."""
        return not self.lost and not self.wrong and self.acknowledged > self.kills // 2


@app.command()
def main(
    bundle: Annotated[Path, typer.Option(help="What answers.")],
    kills: Annotated[int, typer.Option(min=1, help="How many.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    out: Annotated[Path, typer.Option(help="Results.")] = RESULTS / "node-kills-cpu.json",
) -> None:
    """Kill, count and write what was seen."""
    storescp = find_dcmtk("storescp")
    if storescp is None:
        raise typer.BadParameter("DCMTK's storescp is needed. Run: apt-get install dcmtk")
    with tempfile.TemporaryDirectory(prefix="chexnet-kills-") as name, progress() as on_phase:
        survived = kill_node(
            Path(name), bundle, storescp, kills=kills, seed=seed, on_done=lambda done: on_phase("killed", done, kills)
        )
    write_results(out, {"survived": survived.model_dump()})
    typer.echo(
        f"{survived.kills} kills, {survived.cut_transfers} inside a transfer; {survived.acknowledged} images "
        f"acknowledged, {len(survived.lost)} lost, {len(survived.wrong)} wrong documents; {survived.audit_lines} audit lines whole"
    )
    if not survived.is_whole:
        raise typer.Exit(1)


class _Modality:
    """Sends one image after another, and each again until it is acknowledged."""

    def __init__(self, folder: Path, port: int) -> None:
        self._folder, self._port = folder, port
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.n_cut = 0
        self.acknowledged: dict[str, int] = {}  # UID to seed
        self.statuses: dict[str, int] = {}

    def start(self) -> None:
        self._folder.mkdir()
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(60.0)

    def path(self, seed: int) -> Path:
        return self._folder / f"{seed}.dcm"

    def _run(self) -> None:
        seed = 0
        while not self._stop.is_set():
            image = write_radiograph(self.path(seed), seed=seed)
            while not self._stop.is_set():
                if self._send(image):
                    self.acknowledged[str(image.SOPInstanceUID)] = seed
                    break
                time.sleep(0.02)
            seed += 1

    def _send(self, image: Dataset) -> bool:
        statuses = store(self._port, [image])
        self.n_cut += statuses == [None]
        for status in statuses:
            if status is not None:
                self.statuses[f"{status:04x}"] = self.statuses.get(f"{status:04x}", 0) + 1
        return statuses == [0]


def kill_node(
    folder: Path, bundle: Path, storescp: str, *, kills: int, seed: int, on_done: Callable[[int], None]
) -> Survived:
    """Kill a node so often at random moments and return what came of it."""
    start_s = time.monotonic()
    moments = random.Random(seed)
    node = NodeProcess(folder / "node", bundle)
    pacs = Pacs(folder / "pacs", node.pacs_port, storescp).start()
    modality = _Modality(folder / "images", node.port)
    try:
        node.start()
        modality.start()
        for i in range(kills):
            time.sleep(moments.uniform(0.0, LONGEST_LIFE_S))
            node.kill()
            node.start()
            on_done(i + 1)
        modality.stop()
        settle(node, lambda: len(pacs.paths()))
        node.stop()
        lost, wrong = _compare(modality, pacs, node)
        head = verify(node.state / "audit.jsonl", read_head(node.state / "audit.jsonl.head").hash)
    finally:
        node.kill()
        pacs.stop()
    return Survived(
        kills=kills,
        acknowledged=len(modality.acknowledged),
        lost=tuple(lost),
        wrong=tuple(wrong),
        cut_transfers=modality.n_cut,
        statuses=modality.statuses,
        audit_lines=head.seq,
        seconds=time.monotonic() - start_s,
    )


def settle(node: NodeProcess, count: Callable[[], int]) -> None:
    """Wait until the node has nothing left to do, or what its destination has grows no more."""
    n_before, changed_s = -1, time.monotonic()
    while not _is_settled(node) and time.monotonic() < changed_s + PATIENCE_S:
        if (n_now := count()) != n_before:
            n_before, changed_s = n_now, time.monotonic()
        time.sleep(0.5)
    time.sleep(0.5)  # the destination may be writing the last one


def _is_settled(node: NodeProcess) -> bool:
    """Whether the node has nothing left to answer or to send."""
    waiting = "SELECT count(*) FROM entry WHERE state = 'waiting'"
    if any((node.state / "received").iterdir()):
        return False
    # Read as it lies on disk: the node has the file for itself.
    copy = node.folder / "outbox-copy"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for path in node.state.glob("outbox.sqlite*"):
        shutil.copy(path, copy)
    with contextlib.closing(sqlite3.connect(copy / "outbox.sqlite")) as connection:
        return bool(connection.execute(waiting).fetchone() == (0,))


def answer_at(work: RadiographWork, image: Path, received: Mapping[str, Path]) -> dict[str, Dataset]:
    """Return the documents that an image is answered with, without a node, by SOP Instance UID.

    They bear the time of the image's arrival, which is taken from the report among those received.
    """
    report, *_ = _documents(work, image)
    if report in received:
        found = dcmread(received[report])
        moment = found.ContentDate + found.ContentTime
        arrived_s = datetime.strptime(moment, "%Y%m%d%H%M%S.%f").astimezone().timestamp()
        os.utime(image, (arrived_s, arrived_s))
    return _documents(work, image)


def _documents(work: RadiographWork, image: Path) -> dict[str, Dataset]:
    documents = [dcmread(DicomBytesIO(document)) for document in work.answer(image).documents]
    return {str(document.SOPInstanceUID): document for document in documents}


def _compare(modality: _Modality, pacs: Pacs, node: NodeProcess) -> tuple[list[str], list[str]]:
    """Return the images without all their documents, and the documents that differ from those made without a node."""
    work = RadiographWork(read_config(node.folder / "node.toml"))
    received = pacs.paths()
    lost: list[str] = []
    right: set[str] = set()
    seeds = dict(modality.acknowledged)
    # The last image may have arrived although its sender was stopped before the answer.
    newest = max(seeds.values(), default=-1) + 1
    if modality.path(newest).exists():
        seeds[str(dcmread(modality.path(newest)).SOPInstanceUID)] = newest
    for uid, seed in seeds.items():
        documents = answer_at(work, modality.path(seed), received)
        right |= {
            name for name, document in documents.items() if name in received and dcmread(received[name]) == document
        }
        if uid in modality.acknowledged and not set(documents) <= set(received):
            lost.append(uid)
    work.close()
    return lost, sorted(set(received) - right)


if __name__ == "__main__":
    run_program(app)
