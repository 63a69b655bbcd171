"""The machine that figures were measured on, as reports name it."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

from chexnet_deploy.inputs import ReportRecord
from chexnet_deploy.runtime.sessions.here import processor_name


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
