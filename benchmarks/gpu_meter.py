"""What the GPU does while something is timed on it: clocks, throttle reasons, energy and memory, by NVML.

A timing taken while the clock moved or the GPU throttled says little of the engine, so every reading says whether it did.
"""

import threading
from dataclasses import dataclass
from typing import Any

CLOCK_CHANGE_LIMIT = 0.05
SAMPLE_S = 0.02
# NVML's bits of what is no throttling: an idle GPU, and clocks that an administrator chose.
HARMLESS_REASONS = 0x1 | 0x2


@dataclass(frozen=True, slots=True)
class Reading:
    """One timed window.

    Attributes:
        sm_mhz: lowest and highest clock of the multiprocessors seen in it.
        reasons: NVML's clocks event reasons, all that were seen.
        energy_j: drawn by the whole board; None where the GPU has no counter.
        memory_mib: used on the whole board at the end.
    """

    sm_mhz: tuple[int, int]
    reasons: int
    energy_j: float | None
    memory_mib: float

    @property
    def why_invalid(self) -> str | None:
        """Why timings in this window say little, or None."""
        if self.reasons & ~HARMLESS_REASONS:
            return f"throttle reasons 0x{self.reasons & ~HARMLESS_REASONS:x}"
        low, high = self.sm_mhz
        if high - low > CLOCK_CHANGE_LIMIT * high:
            return f"the clock moved between {low} and {high} MHz"
        return None


class Meter:
    """Watches one GPU between `with` and its end; then `reading` holds what it saw.

    Args:
        device: the GPU's number.

    Raises:
        ImportError: nvidia-ml-py is not installed.
        pynvml.NVMLError: there is no driver.
    """

    def __init__(self, device: int = 0) -> None:
        import pynvml

        self._nvml: Any = pynvml
        pynvml.nvmlInit()
        self._handle = pynvml.nvmlDeviceGetHandleByIndex(device)
        self._stop = threading.Event()
        self._clocks: list[int] = []
        self._reasons = 0
        self.reading: Reading | None = None

    def __enter__(self) -> "Meter":
        self._stop.clear()
        self._clocks, self._reasons, self.reading = [], 0, None
        self._sample()
        self._start_mj = self._energy_mj()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        end_mj = self._energy_mj()
        self._sample()
        drawn = None if self._start_mj is None or end_mj is None else (end_mj - self._start_mj) / 1000.0
        memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used / (1 << 20)
        self.reading = Reading((min(self._clocks), max(self._clocks)), self._reasons, drawn, memory)

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self._sample()

    def _sample(self) -> None:
        nvml = self._nvml
        self._clocks.append(nvml.nvmlDeviceGetClockInfo(self._handle, nvml.NVML_CLOCK_SM))
        self._reasons |= nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle)

    def _energy_mj(self) -> int | None:
        try:
            energy: int = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except self._nvml.NVMLError:
            return None
        return energy
