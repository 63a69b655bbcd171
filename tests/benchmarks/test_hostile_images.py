"""A seeded sample of `python -m benchmarks.robustness.hostile_images`; and its own bars, tried on what misses them."""

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.robustness import hostile_images
from benchmarks.robustness.damaged_files import damage, synthetic_seeds
from benchmarks.robustness.hostile_images import read_hostile


def ignore(phase: str, done: int, total: int) -> None:
    pass


@pytest.mark.slow
def test_hostile_images(tmp_path: Path) -> None:
    seeds = synthetic_seeds()
    outcome = read_hostile(seeds, 40 * len(seeds), seed=1, folder=tmp_path, on_phase=ignore)
    assert outcome.escaped == ()
    assert outcome.failures == ()
    assert sum(outcome.answers.values()) == 40 * len(seeds)
    # Damage is no decoration: most is refused, for many reasons, and every kind of file meets it.
    assert outcome.answers.get("read alike", 0) < 0.3 * outcome.tried
    assert len(outcome.answers) >= 8
    assert all(set(answers) - {"read alike"} for answers in outcome.by_seed.values())


def test_the_same_seed_damages_alike() -> None:
    from random import Random

    origin = synthetic_seeds()[5]
    first, again = ([damage(origin, chance) for _ in range(50)] for chance in (Random(3), Random(3)))
    assert first == again
    assert len(set(first)) > 45


def test_missed_bars_are_said() -> None:
    slow, grown = [(3.5, "decode-timeout")], 300.0
    outcome = hostile_images._judge({"png8": Counter(escaped=1)}, slow, grown, ["input 0 of png8: KeyError"], 1)
    assert len(outcome.failures) == 3
    assert outcome.slowest_s == 3.5


def test_the_cost_of_isolation_is_measured_on_equal_pictures() -> None:
    from benchmarks.robustness.dicom_isolation import measure

    costs = measure(64, 48, runs=2)
    assert len(costs) == 5
    assert all(cost.isolated_ms > 0 and cost.in_process_ms > 0 for cost in costs.values())
