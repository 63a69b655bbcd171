"""Orthanc on loopback as the archive on both sides of a node: it sends studies, takes results, and shows by REST what it has.

All traffic stays on 127.0.0.0/8; what it stores lies in the folder that it is given.
"""

import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from pydicom import Dataset, dcmread

from benchmarks.rigs.node_rig import NODE, PACS, SCANNER, NodeProcess, free_port, wait_for_port

READY_S = 60.0
SENDING_S = 120.0


def find_orthanc() -> str | None:
    """Return Orthanc's path; a system's own programs may be outside a user's PATH."""
    return shutil.which("Orthanc") or shutil.which("Orthanc", path="/usr/sbin:/usr/local/sbin")


@dataclass
class Orthanc:
    """The archive that a node's configuration calls PACS; it sends to the node as SCANNER.

    Attributes:
        folder: for its configuration, store and log.
        node: whom it sends to, and whose destination it is.
    """

    folder: Path
    node: NodeProcess
    program: str
    http_port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Orthanc":
        """Start it and wait until it answers."""
        self.folder.mkdir(exist_ok=True)
        config = self.folder / "orthanc.json"
        store = str(self.folder / "store")
        to_node = {"AET": NODE, "Host": "127.0.0.1", "Port": self.node.port, "LocalAet": SCANNER}
        config.write_text(
            json.dumps(
                {
                    "StorageDirectory": store,
                    "IndexDirectory": store,
                    "Plugins": [],
                    "HttpPort": self.http_port,
                    "RemoteAccessAllowed": False,
                    "AuthenticationEnabled": False,
                    "DicomPort": self.node.pacs_port,
                    "DicomAet": PACS,
                    "DicomCheckCalledAet": True,
                    "DicomModalities": {"node": to_node},
                    "OverwriteInstances": True,  # as where a header is corrected in place
                }
            )
        )
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen([self.program, str(config)], stdout=log, stderr=log)
        wait_for_port(self.http_port, timeout_s=READY_S)
        wait_for_port(self.node.pacs_port, timeout_s=READY_S)
        return self

    def stop(self) -> None:
        """End it."""
        assert self.process is not None
        self.process.terminate()
        self.process.wait(30.0)

    def upload(self, content: bytes) -> None:
        """Put a DICOM file into the archive; one of the same UIDs replaces the one that was there."""
        self._ask("/instances", content)

    def send(self, identifiers: Sequence[str]) -> bool:
        """C-STORE studies or instances to the node over one association; return whether all of it was taken."""
        wanted = json.dumps({"Resources": list(identifiers), "Synchronous": True, "Timeout": int(SENDING_S)}).encode()
        try:
            return int(self._ask("/modalities/node/store", wanted)["FailedInstancesCount"]) == 0
        except HTTPError:  # the association was rejected, or broke off
            return False

    def find(self, study_uid: str) -> str:
        """Return the archive's own identifier of a study.

        Raises:
            LookupError: it has none of this UID, or several.
        """
        query = {"Level": "Study", "Query": {"StudyInstanceUID": study_uid}}
        found = self._ask("/tools/find", json.dumps(query).encode())
        if len(found) != 1:
            raise LookupError(f"{len(found)} studies of one UID")
        return str(found[0])

    def instances(self, study: str) -> dict[str, str]:
        """Return the archive's own identifiers of what a study holds, by SOP Instance UID."""
        return {
            each["MainDicomTags"]["SOPInstanceUID"]: each["ID"] for each in self._ask(f"/studies/{study}/instances")
        }

    def read(self, instance: str) -> Dataset:
        """Return a stored object."""
        return dcmread(BytesIO(self._fetch(f"/instances/{instance}/file")))

    @property
    def n_instances(self) -> int:
        """How many objects it has."""
        return int(self._ask("/statistics")["CountInstances"])

    def _ask(self, path: str, content: bytes | None = None) -> Any:
        return json.loads(self._fetch(path, content))

    def _fetch(self, path: str, content: bytes | None = None) -> bytes:
        with urlopen(Request(f"http://127.0.0.1:{self.http_port}{path}", content), timeout=SENDING_S) as answer:
            body: bytes = answer.read()
            return body
