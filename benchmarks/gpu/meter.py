"""What the GPU does while something is timed on it: clocks, throttle reasons, power and memory, by NVML.

A timing taken while the GPU throttled says little of the engine, so every reading says whether it did. Every query is
optional: Jetson's NVML starts and has no clocks, and without nvidia-ml-py nothing is watched.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from time import perf_counter
from typing import Any

import numpy as np

CLOCK_CHANGE_LIMIT = 0.05
SAMPLE_S = 0.05  # each query holds a lock of the driver
# NVML's bits of what is no throttling: an idle GPU, and clocks that an administrator chose.
HARMLESS_REASONS = 0x1 | 0x2
POWER_CAP = 0x4  # normal for a GPU that works at its limit


@dataclass(frozen=True, slots=True)
class Reading:
    """One timed window; None where the GPU does not say.

    Attributes:
        sm_mhz: 5th and 95th percentile of the multiprocessors' clock: a boost of one sample says nothing.
        reasons: NVML's clocks event reasons, all that were seen.
        power_w: mean, of the whole board.
        energy_j: by the board's own counter.
        memory_mib: used on the whole board at the end.
    """

    sm_mhz: tuple[int, int] | None
    reasons: int | None
    power_w: float | None
    energy_j: float | None
    memory_mib: float | None

    @property
    def is_power_limited(self) -> bool:
        """The board's power limit held the clock down, which is how it is meant to run."""
        return bool((self.reasons or 0) & POWER_CAP)

    @property
    def why_invalid(self) -> str | None:
        """Why timings in this window say little, or None."""
        throttled = (self.reasons or 0) & ~(HARMLESS_REASONS | POWER_CAP)
        if throttled:
            return f"throttle reasons 0x{throttled:x}"
        if self.sm_mhz is not None and not self.is_power_limited:
            low, high = self.sm_mhz
            if high - low > CLOCK_CHANGE_LIMIT * high:
                return f"the clock moved between {low} and {high} MHz"
        return None


def percentiles(mhz: Sequence[int]) -> tuple[int, int] | None:
    """Return the 5th and the 95th percentile of samples, or None without any."""
    return (int(np.percentile(mhz, 5)), int(np.percentile(mhz, 95))) if mhz else None


class Meter:
    """Watches one GPU between `with` and its end; then `reading` holds what it saw.

    Args:
        device: the GPU's number; None watches nothing.

    Attributes:
        why_blind: why nothing is watched; None where something is.
    """

    def __init__(self, device: int | None = 0) -> None:
        self._nvml: Any = None
        self.why_blind: str | None = "no GPU is used" if device is None else None
        self.reading = Reading(None, None, None, None, None)
        if device is None:
            return
        try:
            import pynvml

            try:
                pynvml.nvmlInit()
                self._handle = pynvml.nvmlDeviceGetHandleByIndex(device)
                self._nvml = pynvml
            except pynvml.NVMLError as err:
                self.why_blind = f"NVML does not start: {err}"
        except ImportError:
            self.why_blind = "nvidia-ml-py is not installed"

    def __enter__(self) -> "Meter":
        self._stop = threading.Event()
        self._clocks: list[int] = []
        self._milliwatts: list[int] = []
        self._reasons: list[int] = []
        self._start, self._start_mj = perf_counter(), self._ask("nvmlDeviceGetTotalEnergyConsumption")
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        end_mj, seconds = self._ask("nvmlDeviceGetTotalEnergyConsumption"), perf_counter() - self._start
        energy = None if self._start_mj is None or end_mj is None else (end_mj - self._start_mj) / 1000.0
        power = mean(self._milliwatts) / 1000.0 if self._milliwatts else None
        memory = self._ask("nvmlDeviceGetMemoryInfo")
        self.reading = Reading(
            percentiles(self._clocks),
            int(np.bitwise_or.reduce(self._reasons)) if self._reasons else None,
            power if energy is None else energy / seconds,
            energy,
            None if memory is None else memory.used / (1 << 20),
        )

    def as_dict(self) -> Mapping[str, Any]:
        """Return the reading for JSON, with what it means."""
        said = self.reading
        note = self.why_blind or ("power-limited" if said.is_power_limited else None)
        return {**asdict(said), "invalid": said.why_invalid, "note": note}

    def _watch(self) -> None:
        while True:
            for kept, name, more in (
                (self._clocks, "nvmlDeviceGetClockInfo", (1,)),  # NVML_CLOCK_SM
                (self._milliwatts, "nvmlDeviceGetPowerUsage", ()),
                (self._reasons, "nvmlDeviceGetCurrentClocksThrottleReasons", ()),
            ):
                value = self._ask(name, *more)
                if value is not None:
                    kept.append(value)
            if self._stop.wait(SAMPLE_S):
                return

    def _ask(self, name: str, *more: int) -> Any:
        if self._nvml is None:
            return None
        try:
            return getattr(self._nvml, name)(self._handle, *more)
        except self._nvml.NVMLError:
            return None
