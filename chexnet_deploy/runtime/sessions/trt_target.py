"""Which GPU and driver this is, and whether a plan was built for it. Loads no plan."""

import logging
import platform

from chexnet_deploy.bundle.manifest import Target
from chexnet_deploy.errors import SessionError
from chexnet_deploy.runtime.sessions.driver import CudaError, Driver, name_cuda
from chexnet_deploy.runtime.sessions.trt_versions import Backend

_LOG = logging.getLogger(__name__)


def this_target(driver: Driver, backend: Backend, tensorrt: str, device: int = 0) -> Target:
    """Return what a plan built here will be valid for.

    Args:
        driver: from open_driver.
        backend: which TensorRT builds it.
        tensorrt: its version.
        device: the GPU's number.

    Raises:
        SessionError: there is no GPU of that number, or the driver does not answer.
    """
    try:
        n_gpus = driver.count_gpus()
        if not 0 <= device < n_gpus:
            raise SessionError(
                f"there is no GPU {device}; this machine has {n_gpus}, numbered from 0. Give one of them."
            )
        gpu, cuda = driver.describe(device), driver.cuda_version()
    except CudaError as err:
        raise SessionError(f"the NVIDIA driver does not answer: {err}. Run: nvidia-smi") from err
    return Target(
        gpu=gpu.name,
        compute_capability=gpu.compute_capability,
        backend=backend,
        tensorrt=tensorrt,
        driver=name_cuda(cuda),
        platform=f"{platform.system()} {platform.machine()}",
    )


def refuse_other_target(built_for: Target, here: Target, path: str) -> None:
    """Refuse a plan made elsewhere, before a byte of it reaches TensorRT.

    A newer driver is logged and allowed: the known answers, which follow, decide. The GPU is compared by its name and not
    by its UUID: a plan serves every GPU of the model it was built on.

    Raises:
        SessionError: names what differs and the next step.
    """
    differ = [
        f"{name} {getattr(built_for, name)}, here {getattr(here, name)}"
        for name in ("gpu", "compute_capability", "backend", "tensorrt", "platform")
        if getattr(built_for, name) != getattr(here, name)
    ]
    if _numbers(here.driver) < _numbers(built_for.driver):
        differ.append(f"driver's CUDA {built_for.driver}, here the older {here.driver}")
    elif here.driver != built_for.driver:
        _LOG.warning(
            "%s was built with the driver of CUDA %s, here is the newer %s; its known answers decide.",
            path,
            built_for.driver,
            here.driver,
        )
    if differ:
        raise SessionError(
            f"{path} was built for another machine: {'; '.join(differ)}. Engines do not move between machines. "
            f"Build it here from its ONNX bundle: chexnet-deploy build"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
