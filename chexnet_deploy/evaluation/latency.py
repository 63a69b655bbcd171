"""Measure how long Sessions take to answer.

Knows nothing of the model, the images or accuracy: see parity.py for those. Scenario names are MLPerf's: single-stream is
one image after another, offline is the largest batch after the largest batch. Several sessions are measured in turns, so
that a machine that slows down slows all of them, and their ratios hold.
"""

from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, computed_field

from chexnet_deploy.images.preprocessing import Pixels
from chexnet_deploy.inputs import ReportRecord
from chexnet_deploy.runtime.sessions.base import Session

WARMUP_RUNS = 3
MIN_RUNS_FOR_P99 = 100  # a 99th percentile of fewer is their maximum, and says nothing of the hundredth


class LatencyReport(ReportRecord):
    """One scenario of one session; times in host milliseconds, arrays in to arrays out.

    Attributes:
        samples_ms: every run, in the order they were made; a run answers a whole batch.
    """

    scenario: Literal["single_stream", "offline"]
    batch_size: Annotated[int, Field(ge=1)]
    warmup_runs: int
    samples_ms: Annotated[tuple[float, ...], Field(min_length=1)]

    def percentile_ms(self, q: float) -> float:
        """Return the q-th percentile, 0..100, by linear interpolation."""
        return float(np.percentile(self.samples_ms, q))

    @computed_field  # type: ignore[prop-decorator]  # pydantic's own advice for mypy
    @property
    def p50_ms(self) -> float:
        """Median."""
        return self.percentile_ms(50)

    @computed_field  # type: ignore[prop-decorator]  # pydantic's own advice for mypy
    @property
    def p90_ms(self) -> float:
        """What MLPerf's single-stream scenario reports."""
        return self.percentile_ms(90)

    @computed_field  # type: ignore[prop-decorator]  # pydantic's own advice for mypy
    @property
    def p99_ms(self) -> float:
        """What a radiographer waits for once in a hundred images."""
        return self.percentile_ms(99)

    @computed_field  # type: ignore[prop-decorator]  # pydantic's own advice for mypy
    @property
    def images_per_s(self) -> float:
        """All images over all time."""
        return self.batch_size * len(self.samples_ms) * 1000.0 / sum(self.samples_ms)


def measure_latency(
    sessions: Mapping[str, Session],
    pixels: Mapping[str, Pixels],
    scenario: Literal["single_stream", "offline"],
    *,
    min_runs: int,
    min_duration_s: float,
    on_round: Callable[[int], None] | None = None,
) -> dict[str, LatencyReport]:
    """Run each session in turn until each has both enough runs and enough time.

    Args:
        sessions: by name.
        pixels: by the same names, uint8 [N, 1, S, S], one batch of the same N for all.
        scenario: what this batch size stands for.
        min_runs: rounds at the least.
        min_duration_s: seconds for each session at the least.
        on_round: called after each round with the rounds made.
    """
    for name, session in sessions.items():
        for _ in range(WARMUP_RUNS):
            session.run(pixels[name])
    samples_ms: dict[str, list[float]] = {name: [] for name in sessions}
    rounds = 0
    while rounds < min_runs or any(sum(samples) < min_duration_s * 1000.0 for samples in samples_ms.values()):
        for name, session in sessions.items():
            start = perf_counter()
            session.run(pixels[name])  # returns host memory, so the backend has finished
            samples_ms[name].append((perf_counter() - start) * 1000.0)
        rounds += 1
        if on_round is not None:
            on_round(rounds)
    return {
        name: LatencyReport(
            scenario=scenario, batch_size=len(pixels[name]), warmup_runs=WARMUP_RUNS, samples_ms=tuple(samples)
        )
        for name, samples in samples_ms.items()
    }
