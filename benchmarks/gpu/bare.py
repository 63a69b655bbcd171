"""The least that runs a plan: no checks, no pool, no graphs. What a TrtSession costs is measured against it."""

from contextlib import ExitStack

import numpy as np

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.images.preprocessing import Pixels
from chexnet_deploy.runtime.sessions.base import Logits, Maps
from chexnet_deploy.runtime.sessions.driver import open_driver, primary_context
from chexnet_deploy.runtime.sessions.trt_plan import INPUT, OUTPUTS, Plan
from chexnet_deploy.runtime.sessions.trt_versions import open_tensorrt


class BareEngine:
    """One execution context and one stream like a session's, for batches of one size.

    Args:
        bundle: a plan bundle of this machine.
        batch: the size.
    """

    def __init__(self, bundle: Bundle, batch: int) -> None:
        assert bundle.manifest.target is not None
        self._driver = driver = open_driver()
        trt, family = open_tensorrt(bundle.manifest.target.backend)
        with primary_context(driver, 0), ExitStack() as owned:
            self._plan = Plan(trt, family, bundle.read_model(), driver.cuda_version())
            owned.callback(self._plan.close)
            self._stream = driver.open_stream()
            owned.callback(driver.close_stream, self._stream)
            self._memory = driver.take_device(self._plan.activation_bytes)
            owned.callback(driver.free_device, self._memory)
            self._execution = self._plan.open_execution(int(self._memory))
            self._host, self._device = {}, {}
            for name, shape in self._plan.shapes.items():
                dtype, wanted = np.dtype(np.uint8 if name == INPUT else np.float32), (batch, *shape[1:])
                host = driver.take_host(int(np.prod(wanted)) * dtype.itemsize)
                owned.callback(driver.free_host, host)
                self._device[name] = driver.take_device(host.nbytes)
                owned.callback(driver.free_device, self._device[name])
                self._host[name] = host.view(dtype).reshape(wanted)
                self._execution.set_tensor_address(name, int(self._device[name]))
            self._execution.set_input_shape(INPUT, self._host[INPUT].shape)
            owned.callback(self._drop_execution)
            self._owned = owned.pop_all()

    def run(self, pixels: Pixels) -> tuple[Logits, Maps]:
        """Return views of the one pair of buffers."""
        driver, host, device, stream = self._driver, self._host, self._device, self._stream
        with primary_context(driver, 0):
            host[INPUT][:] = pixels
            driver.upload(device[INPUT], host[INPUT], stream)
            self._execution.execute_async_v3(driver.stream_handle(stream))
            for name in OUTPUTS:
                driver.download(host[name], device[name], stream)
            driver.wait(stream)
        return host["logits"], host["cam"]

    def close(self) -> None:
        """Give everything back."""
        with primary_context(self._driver, 0):
            self._owned.close()
            self._stream = self._memory = None  # pycuda closes a stream with its last reference
            self._host.clear()
            self._device.clear()

    def _drop_execution(self) -> None:
        self._execution = None
