"""Which GPU and driver this is. Looks before TensorRT does: on a machine without a driver its Runtime ends the process."""

import logging
import platform
from types import ModuleType

from chexnet_deploy.errors import MissingPackageError, SessionError
from chexnet_deploy.manifest import Target
from chexnet_deploy.sessions.tensorrt_versions import Backend

_LOG = logging.getLogger(__name__)


def open_driver() -> ModuleType:
    """Import and start pycuda's driver API.

    Raises:
        MissingPackageError: pycuda is not installed.
        SessionError: there is no NVIDIA driver or no GPU.
    """
    try:
        import pycuda.driver as cuda
    except ModuleNotFoundError as err:
        raise MissingPackageError("pycuda is not installed. Run: pip install 'chexnet-deploy[gpu]'") from err
    except ImportError as err:  # pycuda is linked against the driver's libcuda
        raise SessionError(
            f"no NVIDIA driver was found ({err}). Plans are built and run on the GPU they are for. "
            "Run: chexnet-deploy doctor"
        ) from err
    try:
        cuda.init()
        n_gpus = cuda.Device.count()
    except cuda.Error as err:
        raise SessionError(f"the NVIDIA driver does not start: {err}. Run: nvidia-smi") from err
    if n_gpus == 0:
        raise SessionError("no NVIDIA GPU was found. Plans are built and run on the GPU they are for.")
    return cuda  # type: ignore[no-any-return]  # pycuda has no types


def this_target(cuda: ModuleType, backend: Backend, tensorrt: str, device: int = 0) -> Target:
    """Return what a plan built here will be valid for.

    Args:
        cuda: from open_driver.
        backend: which TensorRT builds it.
        tensorrt: its version.
        device: the GPU's number.
    """
    gpu = cuda.Device(device)
    major, minor = gpu.compute_capability()
    driver = cuda.get_driver_version()  # of CUDA, as 12040 for 12.4
    return Target(
        gpu=gpu.name(),
        compute_capability=f"{major}.{minor}",
        backend=backend,
        tensorrt=tensorrt,
        driver=f"{driver // 1000}.{driver % 1000 // 10}",
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
