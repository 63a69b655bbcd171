"""The machine that figures were measured on, as reports name it."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from chexnet_deploy.inputs import ReportRecord


class Machine(ReportRecord):
    """Where the figures were measured."""

    processor: str
    cores: int
    system: str
    packages: dict[str, str]


def describe_machine() -> Machine:
    """Return what this machine is, without anything that names its owner."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        processor = models[0] if models else processor
    packages = {}
    for name in ("chexnet-deploy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "numpy", "pillow"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return Machine(
        processor=processor,
        cores=os.cpu_count() or 1,
        system=f"{platform.system()} {platform.machine()}",
        packages=packages,
    )
