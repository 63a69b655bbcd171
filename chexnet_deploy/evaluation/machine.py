"""The machine that figures were measured on, as reports name it."""

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import monotonic, process_time
from typing import Final

from chexnet_deploy.inputs import ReportRecord
from chexnet_deploy.runtime.sessions.here import processor_name

CORE_TIMES: Final = Path("/proc/stat")


class Machine(ReportRecord):
    """Where the figures were measured."""

    processor: str
    cores: int
    system: str
    packages: dict[str, str]


def describe_machine() -> Machine:
    """Return what this machine is, without anything that names its owner."""
    packages = {}
    for name in ("chexnet-deploy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "numpy", "pillow"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return Machine(
        processor=processor_name(),
        cores=os.cpu_count() or 1,
        system=f"{platform.system()} {platform.machine()}",
        packages=packages,
    )


class OtherPrograms:
    """What other programs, and other virtual machines, take of the cores that this process may use. Known on Linux alone."""

    def __init__(self) -> None:
        self._before = self._look()

    def share(self) -> float | None:
        """Return their share of the cores' time since this was made, 0..1; None where the system doesn't say."""
        n_cores, busy_s, own_s, now_s = self._look()
        if not n_cores:
            return None
        _, busy_before_s, own_before_s, then_s = self._before
        taken_s = (busy_s - busy_before_s) - (own_s - own_before_s)
        return min(1.0, max(0.0, taken_s / (n_cores * (now_s - then_s))))

    @staticmethod
    def _look() -> tuple[int, float, float, float]:
        """Return the cores; seconds that they were at work, or taken away; those that were this process's; and the time."""
        n_cores, ticks = 0, 0
        with suppress(OSError, AttributeError):  # neither is there on other systems
            mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
            for line in CORE_TIMES.read_text().splitlines():
                name, *numbers = line.split()
                if name in mine:
                    user, nice, system, _idle, _wait, interrupt, soft_interrupt, stolen = map(int, numbers[:8])
                    n_cores, ticks = n_cores + 1, ticks + user + nice + system + interrupt + soft_interrupt + stolen
        return n_cores, ticks / os.sysconf("SC_CLK_TCK") if n_cores else 0.0, process_time(), monotonic()
