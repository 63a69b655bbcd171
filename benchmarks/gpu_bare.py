"""The least that runs a plan: no checks, no pool, no graphs. What a TrtSession costs is measured against it."""

from typing import Any

import numpy as np

from chexnet_deploy.bundle import Bundle
from chexnet_deploy.preprocessing import Pixels
from chexnet_deploy.sessions import Logits, Maps
from chexnet_deploy.sessions.target import open_driver
from chexnet_deploy.sessions.tensorrt_versions import open_tensorrt

BATCH = 1


class BareEngine:
    """One execution context for batches of one image, on the primary context, which stays current.

    Args:
        plan: a plan bundle of this machine.
    """

    def __init__(self, plan: Bundle) -> None:
        assert plan.manifest.target is not None
        trt, _ = open_tensorrt(plan.manifest.target.backend)
        self._cuda = cuda = open_driver()
        self._primary: Any = cuda.Device(0).retain_primary_context()
        self._primary.push()
        runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._engine: Any = runtime.deserialize_cuda_engine(plan.read_model())
        self._execution: Any = self._engine.create_execution_context()
        self._stream: Any = cuda.Stream()
        side, n_findings = plan.manifest.preprocessing.resize_px, len(plan.manifest.findings)
        shapes = {"pixels": (BATCH, 1, side, side), "logits": (BATCH, n_findings)}
        shapes["cam"] = (BATCH, n_findings, side // 32, side // 32)
        self._host = {
            name: cuda.pagelocked_empty(shape, np.uint8 if name == "pixels" else np.float32)
            for name, shape in shapes.items()
        }
        self._device = {name: cuda.mem_alloc(array.nbytes) for name, array in self._host.items()}
        for name, memory in self._device.items():
            self._execution.set_tensor_address(name, int(memory))
        self._execution.set_input_shape("pixels", shapes["pixels"])
        self._primary.pop()

    def run(self, pixels: Pixels) -> tuple[Logits, Maps]:
        """Return views of the one pair of buffers."""
        cuda, host, device, stream = self._cuda, self._host, self._device, self._stream
        self._primary.push()
        host["pixels"][:] = pixels
        cuda.memcpy_htod_async(device["pixels"], host["pixels"], stream)
        self._execution.execute_async_v3(stream.handle)
        cuda.memcpy_dtoh_async(host["logits"], device["logits"], stream)
        cuda.memcpy_dtoh_async(host["cam"], device["cam"], stream)
        stream.synchronize()
        self._primary.pop()
        return host["logits"], host["cam"]

    def close(self) -> None:
        """Give everything back."""
        self._primary.push()
        self._execution = self._engine = None
        for memory in self._device.values():
            memory.free()
        self._device.clear()
        self._host.clear()
        self._stream = None
        self._primary.pop()
        self._primary.detach()
