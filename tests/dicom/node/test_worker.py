"""The worker process, asked by the pipes that the node asks it by."""

import json
import subprocess
import sys

WORK = """
import gc
from chexnet_deploy.dicom.node.worker import Answer, serve

class Work:
    versions = {}
    loaded = [[] for _ in range(100_000)]

    def self_test(self):
        pass

    def answer(self, path):
        return Answer(refusal=f"frozen-{gc.get_freeze_count()}")

serve(Work)
"""


def test_what_is_loaded_is_kept_from_the_garbage_collector() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WORK], input='{"ask": "answer", "path": "a.dcm"}\n', capture_output=True, text=True
    )
    ready, answer = map(json.loads, done.stdout.splitlines())
    assert ready == {"ready": {}}
    # Else a full collection would look at all of it while an image waits.
    assert int(answer["refusal"].removeprefix("frozen-")) > 100_000
