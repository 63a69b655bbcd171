"""Time sessions for one row: GPU time by its own clock, host array to host array on one lane, and several lanes in flight."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import numpy as np

from benchmarks.gpu.meter import Meter
from benchmarks.gpu.rows import Task
from chexnet_deploy.evaluation.latency import MIN_RUNS_FOR_P99, LatencyReport, measure_latency
from chexnet_deploy.images.preprocessing import Pixels
from chexnet_deploy.runtime.sessions.base import Logits, Session

STAGE_RUNS, LANES_IN_FLIGHT = 50, (2, 3)
MAX_KEPT_SAMPLES = 1000
OnEntry = Callable[[int, Mapping[str, Any]], None]


def measure_batch(
    sessions: Mapping[str, Session], batch: Pixels, task: Task, meter: Meter, lanes: int
) -> dict[str, Any]:
    """Measure all sessions in turns on one batch; what is sustained or in flight, with the first alone.

    Args:
        sessions: by variant, the best first.
        batch: uint8 [N, 1, S, S].
        task: how long to measure.
        meter: watches the GPU meanwhile.
        lanes: that the first session has.
    """
    size, best = len(batch), next(iter(sessions.values()))
    for session in sessions.values():  # the clock has risen when the window opens
        _run_for(session, batch, task.min_s)
    with meter:
        scenario: Any = "single_stream" if size == 1 else "offline"
        runs = task.min_runs if size == 1 else max(5, task.min_runs // 2)
        reports = measure_latency(
            sessions, dict.fromkeys(sessions, batch), scenario, min_runs=runs, min_duration_s=task.min_s
        )
        stages = {name: _stages_ms(session, batch, task.min_runs) for name, session in sessions.items()}
    entry: dict[str, Any] = {"clocks": meter.as_dict()}
    entry["variants"] = {name: {**_summary(report), "stages_ms": stages[name]} for name, report in reports.items()}
    entry["in_flight_images_per_s"] = {
        str(n): in_flight(best, batch, n, 2 * task.min_s) for n in LANES_IN_FLIGHT if n <= lanes
    }
    if task.sustained_s and size == max(task.batches):
        entry["sustained"] = _sustained(best, batch, task.sustained_s, meter)
    if size == 1:
        time.sleep(task.idle_s)
        entry["after_idle_ms"] = {name: 1000.0 * _run_for(session, batch, 0.0)[0] for name, session in sessions.items()}
    return entry


def in_flight(session: Session, batch: Pixels, n_threads: int, seconds: float) -> float:
    """Return images a second from as many threads, each with a lane of its own: copies and kernels overlap."""
    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(session.run, [batch] * n_threads))
        start = time.perf_counter()
        runs = sum(n for _, n in pool.map(lambda _: _run_for(session, batch, seconds), range(n_threads)))
        return len(batch) * runs / (time.perf_counter() - start)


def score(session: Session, pixels: Pixels, size: int) -> Logits:
    """Return the logits of all pixels in batches of one size; the last is filled up, as another size is another kernel."""
    parts = []
    for i in range(0, len(pixels), size):
        batch = np.resize(pixels[i : i + size], (size, *pixels.shape[1:]))
        parts.append(np.array(session.run(batch)[0]))
    return np.concatenate(parts)[: len(pixels)]


def _sustained(session: Session, batch: Pixels, seconds: float, meter: Meter) -> dict[str, Any]:
    """Return speed and energy of a window long enough for the board's counter, and the power it draws at rest."""
    with meter:
        taken, runs = _run_for(session, batch, seconds)
    said, n_images = meter.as_dict(), len(batch) * runs
    power = said["power_w"]
    with meter:
        time.sleep(seconds / 5)
    return {
        **said,
        "images_per_s": n_images / taken,
        "mj_per_image": None if power is None else 1000.0 * power * taken / n_images,
        "idle_w": meter.reading.power_w,
    }


def _stages_ms(session: Session, batch: Pixels, min_runs: int) -> dict[str, float]:
    """Return the median of each stage on the GPU's own clock; nothing where a session can't tell."""
    if not hasattr(session, "stage_times_ms"):
        return {}
    samples = [session.stage_times_ms(batch) for _ in range(min(min_runs, STAGE_RUNS) + 3)][3:]
    return {stage: median(sample[stage] for sample in samples) for stage in samples[0]}


def _summary(report: LatencyReport) -> dict[str, Any]:
    samples = report.samples_ms
    return {
        "p50_ms": report.p50_ms,
        "p90_ms": report.p90_ms,
        # Of fewer runs it would be their maximum.
        "p99_ms": report.p99_ms if len(samples) >= MIN_RUNS_FOR_P99 else None,
        "images_per_s": report.images_per_s,
        "n_runs": len(samples),
        "samples_ms": [round(ms, 4) for ms in samples[:MAX_KEPT_SAMPLES]],
    }


def _run_for(session: Session, batch: Pixels, seconds: float) -> tuple[float, int]:
    start, runs = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds or runs == 0:
        session.run(batch)
        runs += 1
    return max(elapsed, time.perf_counter() - start), runs
