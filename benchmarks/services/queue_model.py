"""What the lane's rule comes to on a machine that never hesitates: the queue beside which the service's times are read.

Nothing is random but the arrivals: a batch takes what it took when it was measured. What a service takes beyond this is its
machine's and its own hesitation, e.g. the garbage collector, and what both leave waiting. With batches of one, this is the queue
D/D/1 for arrivals at even distances, and M/D/1 at random moments.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.serving.http.batching import BatchPlan


def ideal_latencies_ms(plan: BatchPlan, arrivals_s: Sequence[float], *, slowdown: float = 1.0) -> NDArray[np.float64]:
    """Return the time from each arrival to its answer.

    Args:
        plan: batch sizes with the time of each; see BatchPlan.
        arrivals_s: rising.
        slowdown: of every batch, e.g. by HTTP on the same cores.
    """
    run_ms = {size: slowdown * size * ms for size, ms in zip(plan.sizes, plan.ms_per_image, strict=True)}
    arrivals_ms = np.asarray(arrivals_s, np.float64) * 1000.0
    answered_ms, free_ms, first = np.empty_like(arrivals_ms), 0.0, 0
    while first < len(arrivals_ms):
        begin_ms = max(free_ms, float(arrivals_ms[first]))
        n_waiting = int(np.searchsorted(arrivals_ms, begin_ms, side="right")) - first
        size = plan.size_for(n_waiting)
        free_ms = begin_ms + run_ms[size]
        answered_ms[first : first + size] = free_ms
        first += size
    return answered_ms - arrivals_ms
