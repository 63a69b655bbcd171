"""A DICOM node on loopback for tests and benchmarks: started as a process, fed, killed, and what its destination got.

Its worker really answers, see node_answering.py. All traffic stays on 127.0.0.0/8.
"""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, generate_uid
from pynetdicom import AE
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]  # made when it is imported

from benchmarks.common import CHECKOUT, resident_mib

# Connections are cut here all the time. What the library says of it is noise, and keeps the sockets alive by its tracebacks.
logging.getLogger("pynetdicom").setLevel(logging.CRITICAL + 1)

SCANNER, NODE, PACS = "SCANNER", "CHEXNET", "PACS"
READY_S = 60.0
SETTLED_S = 0.3  # storescp writes in place

CONFIG = """
folder = "{folder}"

[listen]
host = "127.0.0.1"
port = {port}
ae_title = "{node}"
calling_ae_titles = ["{scanner}"]
networks = ["127.0.0.0/8"]
{listen_settings}

[[destinations]]
host = "127.0.0.1"
port = {pacs_port}
ae_title = "{pacs}"
{pacs_settings}

[results]
max_pictures = {max_pictures}
{result_settings}

[device]
serial_number = "RIG-1"

[model]
bundle = "{bundle}"
answer_deadline_s = {answer_deadline_s}
{model_settings}
"""


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def find_dcmtk(program: str) -> str | None:
    """Return the path of a DCMTK program; pynetdicom installs others of the same names."""
    for folder in os.get_exec_path():
        path = Path(folder) / program
        if path.is_file() and b"$dcmtk:" in subprocess.run([path, "--version"], capture_output=True).stdout:
            return str(path)
    return None


def write_radiograph(
    path: Path, *, seed: int, name: str = "PHANTOM", body_part: str = "CHEST", side_px: int = 96, uid: str | None = None
) -> Dataset:
    """Write a synthetic computed radiograph, 12 bits in 16, and return its data set."""
    image = Dataset()
    image.SOPClassUID = ComputedRadiographyImageStorage
    image.SOPInstanceUID = uid or generate_uid(entropy_srcs=["image", str(seed)])
    image.StudyInstanceUID = generate_uid(entropy_srcs=["study", str(seed)])
    image.SeriesInstanceUID = generate_uid(entropy_srcs=["series", str(seed)])
    image.StudyDate, image.Modality, image.BodyPartExamined = "20240102", "CR", body_part
    image.ViewPosition, image.PatientAge = "PA", "060Y"
    image.PatientName, image.PatientID = name, f"ID-{seed}"
    image.Rows = image.Columns = side_px
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 12, 11, 0
    values = np.random.default_rng(seed).integers(0, 4096, (side_px, side_px), dtype=np.uint16)
    image.PixelData = values.tobytes()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID
    image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
    image.save_as(path, enforce_file_format=True)
    return image


@dataclass
class NodeProcess:
    """A node in a process of its own.

    Attributes:
        folder: for its configuration, state and journal; survives kills.
        listen_settings: TOML for its [listen]; the others likewise.
        overrides: TOML appended to the configuration.
    """

    folder: Path
    bundle: Path
    answer_deadline_s: float = 20.0
    max_pictures: int = 1
    model_settings: str = ""
    result_settings: str = ""
    listen_settings: str = ""
    pacs_settings: str = ""
    overrides: str = ""
    port: int = field(default_factory=free_port)
    pacs_port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def state(self) -> Path:
        """The node's own folder."""
        return self.folder / "state"

    @property
    def journal(self) -> Path:
        """Everything that the node printed, over all its lives."""
        return self.folder / "journal"

    def start(self) -> "NodeProcess":
        """Start it and wait until it is ready."""
        self.folder.mkdir(exist_ok=True)
        config = self.folder / "node.toml"
        config.write_text(
            CONFIG.format(
                folder=self.state,
                port=self.port,
                pacs_port=self.pacs_port,
                bundle=self.bundle,
                node=NODE,
                scanner=SCANNER,
                pacs=PACS,
                answer_deadline_s=self.answer_deadline_s,
                max_pictures=self.max_pictures,
                model_settings=self.model_settings,
                result_settings=self.result_settings,
                listen_settings=self.listen_settings,
                pacs_settings=self.pacs_settings,
            )
            + self.overrides
        )
        config.chmod(0o600)
        worker = [sys.executable, "-m", "benchmarks.rigs.node_answering", str(config)]
        n_before = len(self.events())
        with self.journal.open("ab") as journal:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.rigs.node_run", str(config), *worker],
                cwd=CHECKOUT,
                stdout=journal,
                stderr=journal,
                env={**os.environ, **self.environment},
            )
        deadline = time.monotonic() + READY_S
        while "ready" not in [event["event"] for event in self.events()[n_before:]]:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the node didn't get ready: {self.journal.read_text()[-2000:]}")
            time.sleep(0.02)
        return self

    def events(self) -> list[dict[str, object]]:
        """Return what the journal holds; a line being written is left for later."""
        if not self.journal.exists():
            return []
        lines = self.journal.read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines if line.startswith("{")]

    def resident_mib(self) -> float:
        """Return the node's resident memory, without its worker's."""
        assert self.process is not None
        return resident_mib(self.process.pid)

    def kill(self) -> None:
        """SIGKILL."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; return the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60.0)


@dataclass
class Pacs:
    """DCMTK's storescp as the node's destination."""

    folder: Path
    port: int
    program: str
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Pacs":
        """Start it; it writes each object into its folder, whole, under its UID."""
        self.folder.mkdir(exist_ok=True)
        command = [self.program, "--aetitle", PACS, "--output-directory", str(self.folder), str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for_port(self.port)
        return self

    def stop(self) -> None:
        """End it."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def paths(self) -> dict[str, Path]:
        """Return the files it has, by SOP Instance UID, which storescp puts behind the kind of object."""
        return {path.name.split(".", 1)[1]: path for path in self.folder.iterdir()}

    def received(self) -> dict[str, Dataset]:
        """Return what it has, by SOP Instance UID; a file that it may be writing still is left for later."""
        found: dict[str, Dataset] = {}
        for path in self.folder.iterdir():
            if time.time() - path.stat().st_mtime < SETTLED_S:
                continue
            dataset = dcmread(path)
            found[str(dataset.SOPInstanceUID)] = dataset
        return found


def wait_for_port(port: int, *, timeout_s: float = 10.0) -> None:
    """Wait until something listens."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1.0).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def store(port: int, datasets: Sequence[Dataset], *, calling: str = SCANNER) -> list[int | None]:
    """Send data sets over one association and return each one's status.

    None stands where no answer came; the list is empty where nobody let us in.
    """
    application = AE(calling)
    application.acse_timeout = application.dimse_timeout = application.network_timeout = 30
    kinds = dict.fromkeys((each.SOPClassUID, each.file_meta.TransferSyntaxUID) for each in datasets)
    for sop_class, syntax in kinds:
        application.add_requested_context(sop_class, syntax)
    association = application.associate("127.0.0.1", port, ae_title=NODE)
    statuses: list[int | None] = []
    if not association.is_established:
        return statuses
    for dataset in datasets:
        try:
            statuses.append(association.send_c_store(dataset).get("Status"))
        except (RuntimeError, ValueError):
            statuses.append(None)
    if association.is_established:
        association.release()
    return statuses


def echo_s(port: int, *, source: str = "127.0.0.1", attempts: int = 1) -> float:
    """Return how many seconds a C-ECHO takes, association and release included; infinity where it fails."""
    start = time.perf_counter()
    for _ in range(attempts):
        application = AE(SCANNER)
        application.acse_timeout = application.dimse_timeout = application.network_timeout = 10
        application.add_requested_context(Verification)
        association = application.associate("127.0.0.1", port, ae_title=NODE, bind_address=(source, 0))
        if association.is_established:
            status = association.send_c_echo().get("Status")
            association.release()
            if status == 0x0000:
                return time.perf_counter() - start
    return float("inf")
