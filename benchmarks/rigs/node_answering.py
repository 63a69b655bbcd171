"""A node's own worker that can be told to misbehave: it hangs, dies, fails or is busy on images of patients who are named so.

python -m benchmarks.rigs.node_answering CONFIG
"""

import os
import signal
import sys
import time
from pathlib import Path

from pydicom import dcmread

from chexnet_deploy.dicom.node.config import read_config
from chexnet_deploy.dicom.node.radiograph_worker import RadiographWork
from chexnet_deploy.dicom.node.worker import Answer, serve
from chexnet_deploy.errors import RefusalReason


class MisbehavingWork(RadiographWork):
    """Answers as a node does, unless the patient's name says otherwise."""

    def answer(self, path: Path) -> Answer:
        """Do what the patient's name says, or answer."""
        name = str(dcmread(path, stop_before_pixels=True).PatientName)
        misbehave(name, path)
        if name == "BUSY" or (name == "BUSY^ONCE" and is_first_time(path)):
            return Answer(refusal=RefusalReason.BUSY.value)
        return super().answer(path)


def is_first_time(path: Path) -> bool:
    """Say whether no image of this node was asked about before."""
    marker = path.parents[1] / "misbehaved-once"
    is_first = not marker.exists()
    marker.touch()
    return is_first


def misbehave(name: str, path: Path) -> None:
    """Do what the patient's name says."""
    if name == "HANG":
        time.sleep(3600)
    if name == "HANG^ONCE" and is_first_time(path):
        time.sleep(3600)
    if name == "DIE":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "RAISE":
        raise RuntimeError(f"{name} is quoted in this message")


if __name__ == "__main__":
    serve(lambda: MisbehavingWork(read_config(Path(sys.argv[1]))))
