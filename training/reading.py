"""Read many image files as pixels, in order, by processes.

Processes and not threads: reading a PNG holds the GIL in part (on two cores two processes read 1.92 times as fast as one,
two threads 1.87 times; by Amdahl's law more cores pull these apart), and a decoder that crashes takes no one else along.
Knows nothing of data sets or caches.
"""

import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TypeAlias

from chexnet_deploy.errors import ImageError
from chexnet_deploy.images.preprocessing import Pixels, Preprocessing
from chexnet_deploy.images.reader import read_image
from chexnet_deploy.runtime.streaming import usable_cores

Answer: TypeAlias = tuple[list[Pixels], list[str | None]]
"""[1, 1, S, S] of each image that can be read; then for each image, in order, why it can't be, or None."""

_AHEAD = 4  # batches for each worker, so that none waits for the slowest


def read_batch(paths: Sequence[Path], preprocessing: Preprocessing) -> Answer:
    """Read some images here and now."""
    images: list[Pixels] = []
    reasons: list[str | None] = []
    for path in paths:
        try:
            images.append(preprocessing(read_image(path)))
            reasons.append(None)
        except ImageError as err:
            reasons.append(str(err).removeprefix(f"{path}: "))
    return images, reasons


def read_batches(
    batches: Sequence[Sequence[Path]], preprocessing: Preprocessing, workers: int | None
) -> Generator[Answer, None, None]:
    """Yield every batch's answer in order, a little ahead of who takes them; close it to end the workers.

    Args:
        batches: files, in parts that are worth a trip to a worker.
        preprocessing: how.
        workers: processes; None for one a core, 1 for none beside this.

    Raises:
        BrokenProcessPool: a worker died.
    """
    n_workers = min(workers or usable_cores(), len(batches))
    if n_workers <= 1:
        for batch in batches:
            yield read_batch(batch, preprocessing)
        return
    # A fork would copy torch's threads half alive, so the workers start afresh.
    pool = ProcessPoolExecutor(n_workers, mp_context=get_context("spawn"), initializer=_start_worker)
    pending: deque[Future[Answer]] = deque()
    remaining = iter(batches)
    try:
        for batch in islice(remaining, _AHEAD * n_workers):
            pending.append(pool.submit(read_batch, batch, preprocessing))
        while pending:
            yield pending.popleft().result()
            pending.extend(pool.submit(read_batch, batch, preprocessing) for batch in islice(remaining, 1))
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it: after its SIGKILL nobody else would tell a worker to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None  # this runs in a child

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
