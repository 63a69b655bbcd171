"""What the benchmark of the node's way from a scanner to the archive makes of its times."""

import pytest

from benchmarks.services.node_delivery import markdown_table, summarise


def test_times_and_their_table_by_hand() -> None:
    # Of 101 times from 100 to 200 ms the median is 150, the 99th percentile 199, or 24.9 times 8 ms.
    row = summarise([70.0] * 101, [100.0 + i for i in range(101)], 8.0, 20)
    assert row["delivered"] == {"p50_ms": 150.0, "p99_ms": 199.0}
    assert row["p99_model_times"] == pytest.approx(24.9)
    machine = {"processor": "a CPU", "cores": 2}
    results = {"precision": "int8", "resize_px": 224, "n": 101, "model_p50_ms": 8.0, "machine": machine}
    table = markdown_table({**results, "kinds": {"uncompressed": row}})
    assert "| uncompressed | 70 (70) ms | 150 (199) ms | 25 |" in table
    assert "the model alone takes 8.0 ms. a CPU, 2 cores." in table
