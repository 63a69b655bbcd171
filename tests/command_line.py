"""The command line as tests call it: in this process, which has loaded what a new one would load again for each call."""

import io
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest import mock

from chexnet_deploy.cli.main import main


def chexnet(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run one command and return its exit code and what it printed.

    Bundles run in ONNX Runtime unless a provider is named: OpenVINO compiles a model ten times as long.
    """
    words = [*map(str, arguments)]
    if words[0] in ("predict", "bench", "evaluate", "calibrate") and not {"--provider", "--predictions"} & set(words):
        words += ["--provider", "cpu"]
    out, err, on_interrupt = io.StringIO(), io.StringIO(), signal.getsignal(signal.SIGINT)
    code: object = 0
    try:
        with redirect_stdout(out), redirect_stderr(err), mock.patch.object(sys, "argv", ["chexnet-deploy", *words]):
            main()
    except SystemExit as ended:
        code = ended.code
    finally:
        signal.signal(signal.SIGINT, on_interrupt)
    assert isinstance(code, int)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def assert_one_line_error(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    complaint = done.stderr.strip().splitlines()[-1]
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in complaint
