"""Say what this machine can run, and what to install for the rest. Of what it looks for it imports the driver's binding alone."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chexnet_deploy.cli.options import JsonFlag, TrustOption, read_trust
from chexnet_deploy.cli.printing import print_record
from chexnet_deploy.errors import MissingPackageError, SessionError, SpecError
from chexnet_deploy.terminal import print_json

if TYPE_CHECKING:
    from chexnet_deploy.runtime.sessions.driver import Driver

app = typer.Typer()

_TENSORRT = ("tensorrt", "tensorrt_cu12", "tensorrt_cu13", "tensorrt_rtx_cu12", "tensorrt_rtx_cu13")
_BINDINGS = ("pycuda", "cuda-bindings")


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
    from chexnet_deploy.runtime.sessions.driver import CudaError, open_driver

    found = {package: _version(package) for package in (*_TENSORRT, *_BINDINGS)}
    if find_spec("tensorrt") is not None and not any(found[package] for package in _TENSORRT):
        found["tensorrt"] = "of unknown version"  # as Debian's packages install it on Jetson
    have = [f"{package} {number}" for package, number in found.items() if number is not None]
    try:
        driver = open_driver()
        have.insert(0, _describe(driver))
        step = _missing_tensorrt(driver, found)
    except MissingPackageError:
        step = "pip install cuda-bindings, with which this program asks for the driver, and run it again"
    except (SessionError, CudaError):
        step = "an NVIDIA GPU and its driver, which does not answer here; if there is one: nvidia-smi"
    return Ability(
        "build and run TensorRT engines",
        is_ready=not step,
        found=", ".join(have) or "nothing",
        next_step=f"needs {step}" if step else "",
    )


def _describe(driver: "Driver") -> str:
    from chexnet_deploy.runtime.sessions.driver import name_cuda

    gpus = ", ".join(driver.describe(device).name for device in range(driver.count_gpus()))
    return f"{gpus} (driver for CUDA {name_cuda(driver.cuda_version())}, by {driver.binding})"


def _missing_tensorrt(driver: "Driver", found: dict[str, str | None]) -> str:
    """Return the line that installs what this driver can run; nothing where it is there."""
    from chexnet_deploy.runtime.sessions.driver import CUDA_13

    is_13 = driver.cuda_version() >= CUDA_13
    if any(found[package] for package in ("tensorrt", "tensorrt_rtx_cu12")):
        return ""
    if found["tensorrt_cu12"] or (is_13 and (found["tensorrt_cu13"] or found["tensorrt_rtx_cu13"])):
        return ""
    if driver.describe(0).is_integrated:
        return "JetPack's own TensorRT: python3 -m venv --system-site-packages .venv  (docs/embedding.md)"
    extra = "gpu-cu13" if is_13 else "gpu-cu12"
    why = (
        " (what is installed is for CUDA 13, which this driver can't run)"
        if found["tensorrt_cu13"] or found["tensorrt_rtx_cu13"]
        else ""
    )
    return f"pip install 'chexnet-deploy[{extra}]'{why}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@app.command(epilog="Example: chexnet-deploy inspect bundles/int8")
def inspect(
    path: Annotated[
        Path, typer.Argument(help="A bundle, a .safetensors checkpoint, or a model repository for Triton.")
    ],
    trust: TrustOption = None,
) -> None:
    """Verify a bundle, a checkpoint or a Triton model repository and print what it is as JSON."""
    if path.suffix == ".safetensors":
        if trust is not None:
            raise SpecError("checkpoints aren't signed, and --trust is for bundles. Omit it.")
        from chexnet_deploy.export.chain import import_to_onnx

        print_record(import_to_onnx().read_checkpoint(path).manifest)
        return
    from chexnet_deploy.bundle.bundle import Bundle
    from chexnet_deploy.serving.triton import check_repository, is_repository

    if is_repository(path):
        models = check_repository(path, trust=read_trust(trust))
        print_json({m.name: {"device": m.device, "versions": {v: b.id for v, b in m.versions.items()}} for m in models})
        return
    bundle = Bundle.open(path, trust=read_trust(trust))
    site = bundle.read_site()
    beside = {} if site is None else {"site": site.model_dump(mode="json")}
    print_record(bundle.manifest, id=bundle.id, **beside)


@app.command(epilog="Example: chexnet-deploy doctor --json")
def doctor(as_json: JsonFlag = False) -> None:
    """Say what this machine can run, and what to install for the rest."""
    from dataclasses import asdict

    abilities = examine()
    if as_json:
        print_json([asdict(ability) for ability in abilities])
        return
    for ability in abilities:
        typer.echo(f"{'yes' if ability.is_ready else 'no ':3}  {ability.name}: {ability.found}")
        if ability.next_step:
            typer.echo(f"     {ability.next_step}")
