"""Say what this machine can run, and what to install for the rest. Imports none of what it looks for."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Ability:
    """One thing the package can do, and whether it can here.

    Attributes:
        next_step: what to install; empty where nothing is missing.
    """

    name: str
    is_ready: bool
    found: str
    next_step: str


def examine() -> list[Ability]:
    """Return what works here."""
    return [
        _needs("run ONNX bundles on the CPU", ("onnxruntime",), "cpu"),
        _needs("run ONNX bundles fastest on a CPU", ("openvino",), "openvino"),
        _needs("read DICOM", ("pydicom", "python-gdcm"), "dicom"),
        _needs("HTML reports", ("matplotlib", "jinja2"), "report"),
        _needs("sign and verify bundles", ("cryptography",), "signing"),
        _needs("tables as Parquet", ("pyarrow",), "table"),
        _needs("export and quantise", ("torch", "onnx", "safetensors", "onnxruntime"), "export"),
        _tensorrt(),
    ]


def _needs(name: str, packages: tuple[str, ...], extra: str) -> Ability:
    found = {package: _version(package) for package in packages}
    missing = [package for package, number in found.items() if number is None]
    have = ", ".join(f"{package} {number}" for package, number in found.items() if number is not None)
    step = f"pip install 'chexnet-deploy[{extra}]'  (missing: {', '.join(missing)})" if missing else ""
    return Ability(name, not missing, have or "nothing", step)


def _tensorrt() -> Ability:
    gpus = Path("/proc/driver/nvidia/gpus")
    n_gpus = len(list(gpus.iterdir())) if gpus.is_dir() else 0
    found = {package: _version(package) for package in ("tensorrt", "tensorrt_rtx_cu13", "pycuda")}
    have = ", ".join(f"{package} {number}" for package, number in found.items() if number is not None)
    steps = []
    if not n_gpus:
        steps.append("an NVIDIA GPU and its driver")
    if found["tensorrt"] is None and found["tensorrt_rtx_cu13"] is None:
        steps.append("pip install 'chexnet-deploy[gpu]'")
    elif found["pycuda"] is None:
        steps.append("pip install pycuda")
    return Ability(
        "build and run TensorRT engines",
        is_ready=not steps,
        found=f"{n_gpus} NVIDIA GPU(s)" + (f", {have}" if have else ""),
        next_step=f"needs {' and '.join(steps)}" if steps else "",
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
