"""What benchmarks share: where results lie and how they are written, the command line in a process, and its memory."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from chexnet_deploy.evaluation.machine import describe_machine

CHECKOUT: Final = Path(__file__).parents[1]
RESULTS: Final = CHECKOUT / "benchmarks" / "results"
COMMAND: Final = (sys.executable, "-m", "chexnet_deploy")


def write_results(out: Path, results: Mapping[str, object]) -> str:
    """Write results as JSON, the machine that they are of before them, and return the text."""
    text = json.dumps({"machine": describe_machine().model_dump(), **results}, indent=1)
    out.write_text(f"{text}\n")
    return text


def checkout_environment() -> dict[str, str]:
    """Return this process's environment for one that finds the checkout from any folder."""
    return {**os.environ, "PYTHONPATH": str(CHECKOUT)}


def resident_mib(pid: int | str = "self", field: str = "VmRSS") -> float:
    """Return the resident memory of a process (proc(5): VmRSS is now, VmHWM the most so far); 0 of one that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return 0.0
    _, _, after = status.partition(f"{field}:")
    return int(after.split()[0]) / 1024.0 if after else 0.0  # a zombie has none
