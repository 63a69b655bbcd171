"""After a fork each process decodes for itself: never another's pixels, and nobody waits for ever."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.rigs.synthetic_dicom import WORDS, make_dicom

SYNTAXES = ("1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.70")
SET_UP = """
import multiprocessing, os, sys, threading
from pathlib import Path
import numpy as np
from chexnet_deploy.images.dicom.decoder import Decoder
from chexnet_deploy.images.reader import ImageReader

folder = Path(sys.argv[1])
patients = sorted(folder.glob("*.dcm"))
expected = [np.load(path.with_suffix(".npy")) for path in patients]

def read_all(reader, first, n=40):
    for i in range(first, first + n):
        at = i % len(patients)
        if not np.array_equal(reader.read(patients[at]), expected[at]):
            return 1
    return 0

def end(reader, first):
    code = read_all(reader, first)
    reader.close()
    os._exit(code)

def fork(reader, first):
    child = os.fork()
    if child == 0:
        end(reader, first)
    return child

def wait(children):
    for child in children:
        _, status = os.waitpid(child, 0)
        assert status == 0, status
"""


def read_gray(words: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """Without a window from the darkest to the brightest."""
    low, high = int(words.min()), int(words.max())
    return np.floor((words.astype(float) - low) / (high - low) * 255 + 0.5).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six compressed radiographs of as many patients, each with the picture that it is."""
    place = tmp_path_factory.mktemp("patients")
    for i in range(6):
        words = np.roll(WORDS, 7 * i, axis=1)
        (place / f"{i}.dcm").write_bytes(make_dicom(words, syntax=SYNTAXES[i % 3]))
        np.save(place / f"{i}.npy", read_gray(words))
    return place


@pytest.mark.parametrize(
    "work",
    [
        pytest.param(
            "reader = ImageReader(); read_all(reader, 0); children = [fork(reader, i) for i in range(3)]\n"
            "assert read_all(reader, 1) == 0; wait(children)\nassert read_all(reader, 2) == 0",
            id="os.fork",
        ),
        pytest.param(
            "reader = ImageReader(); children = [fork(reader, i) for i in range(2)]\nwait(children)",
            id="before anything was read",
        ),
        pytest.param(
            "reader = ImageReader(processes=2); reader.decoder.warm_up()\n"
            "children = [fork(reader, i) for i in range(2)]\nwait(children)\nassert read_all(reader, 0) == 0",
            id="warm, with a spare",
        ),
        pytest.param(
            "reader = ImageReader(); read_all(reader, 0)\n"
            "workers = [multiprocessing.get_context('fork').Process(target=end, args=(reader, i)) for i in range(3)]\n"
            "for worker in workers: worker.start()\n"
            "assert read_all(reader, 0) == 0\n"
            "for worker in workers: worker.join(); assert worker.exitcode == 0",
            id="multiprocessing",
        ),
        pytest.param(
            "reader = ImageReader(processes=2); is_over = threading.Event()\n"
            "def go_on(first):\n"
            "    while not is_over.is_set():\n"
            "        assert read_all(reader, first, 5) == 0\n"
            "threads = [threading.Thread(target=go_on, args=(i,)) for i in range(4)]\n"
            "for thread in threads: thread.start()\n"
            "for i in range(4): wait([fork(reader, i)])\n"
            "is_over.set()\n"
            "for thread in threads: thread.join()",
            id="while threads decode",
        ),
        pytest.param(
            "reader = ImageReader(); read_all(reader, 0); child = os.fork()\n"
            "if child == 0:\n"
            "    wait([fork(reader, 1)]); end(reader, 2)\n"
            "wait([child])\nassert read_all(reader, 0) == 0",
            id="a fork's fork",
        ),
    ],
)
def test_each_process_decodes_for_itself(folder: Path, work: str) -> None:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", SET_UP + work, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
