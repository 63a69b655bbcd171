"""The queue beside which the service's times are read: answers that books have, or a hand can follow."""

import numpy as np
import pytest

from benchmarks.services.queue_model import ideal_latencies_ms
from benchmarks.services.serving_client import due_times_s
from chexnet_deploy.serving.http.batching import BatchPlan

SINGLE = BatchPlan((1,), (10.0,), is_invariant=True)


def test_at_even_distances_below_capacity_nobody_waits() -> None:
    assert ideal_latencies_ms(SINGLE, [0.0, 0.0125, 0.025]) == pytest.approx([10.0, 10.0, 10.0])


def test_who_comes_at_once_is_answered_one_after_another_or_together() -> None:
    assert ideal_latencies_ms(SINGLE, [0.0, 0.0, 0.0]) == pytest.approx([10.0, 20.0, 30.0])
    # Two of 8 ms each together; the third came too late for them.
    pairs = BatchPlan((1, 2), (10.0, 8.0), is_invariant=True)
    assert ideal_latencies_ms(pairs, [0.0, 0.0, 0.001]) == pytest.approx([16.0, 16.0, 25.0])
    assert ideal_latencies_ms(pairs, [0.0, 0.0, 0.001], slowdown=2.0) == pytest.approx([32.0, 32.0, 51.0])


def test_at_random_moments_it_is_the_queue_m_d_1() -> None:
    # At a load of r the mean wait is r / (2 (1 - r)) service times (Pollaczek and Khinchine): 2 at 0.8.
    latencies_ms = ideal_latencies_ms(SINGLE, due_times_s(rate=80.0, seconds=5000.0, seed=1))
    assert latencies_ms.mean() == pytest.approx(30.0, rel=0.05)
    # Its 99th percentile, which the benchmark's own words name, is 11 service times.
    assert float(np.percentile(latencies_ms, 99)) == pytest.approx(110.0, rel=0.1)


def test_even_moments_are_even_and_random_ones_the_seeds() -> None:
    assert due_times_s(rate=4.0, seconds=1.0, seed=None) == pytest.approx([0.25, 0.5, 0.75, 1.0])
    moments_s = due_times_s(rate=100.0, seconds=10.0, seed=3)
    assert moments_s == due_times_s(rate=100.0, seconds=10.0, seed=3) == sorted(moments_s)
    assert len(moments_s) == pytest.approx(1000, abs=100)
