"""What a bundle runs on here: processor, backend with its version, driver. Loads no model."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.signing.attestation import RunsOn
from chexnet_deploy.runtime.sessions.base import Provider


def processor_name() -> str:
    """Return the model of this machine's CPU, or its architecture where the system doesn't say."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def what_it_runs_on(bundle: Bundle, provider: Provider, device: int = 0) -> RunsOn:
    """Return what open_session would run a bundle on.

    Args:
        bundle: verified.
        provider: of an ONNX bundle; not "auto".
        device: the GPU's number.

    Raises:
        MissingPackageError, SessionError: it would run on a GPU, and the driver can't be asked.
    """
    here = f"{platform.system()} {platform.machine()}"
    target = bundle.manifest.target
    if target is not None:
        from chexnet_deploy.runtime.sessions.driver import open_driver
        from chexnet_deploy.runtime.sessions.trt_target import this_target
        from chexnet_deploy.runtime.sessions.trt_versions import open_tensorrt

        trt, _ = open_tensorrt(target.backend)
        found = this_target(open_driver(), target.backend, str(trt.__version__), device)
        backend = f"{found.backend} {found.tensorrt}"
        return RunsOn(processor=found.gpu, backend=backend, driver=found.driver, platform=found.platform)
    if provider == "cuda":
        from chexnet_deploy.runtime.sessions.driver import name_cuda, open_driver

        driver = open_driver()
        backend = f"onnxruntime {_version('onnxruntime-gpu', 'onnxruntime')} (cuda)"
        gpu, cuda = driver.describe(device).name, name_cuda(driver.cuda_version())
        return RunsOn(processor=gpu, backend=backend, driver=cuda, platform=here)
    names = ("openvino",) if provider == "openvino" else ("onnxruntime", "onnxruntime-gpu")
    return RunsOn(processor=processor_name(), backend=f"{names[0]} {_version(*names)}", platform=here)


def _version(*names: str) -> str:
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "of unknown version"
