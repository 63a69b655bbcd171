"""Carry many images through one session: decoding, computing and naming overlap, in order, in constant memory.

Each worker thread carries a batch from its files to its findings, out of step with the others, so that one decodes while
another computes; Pillow and the backends both let go of Python's lock. Knows no files and no findings: see predictor.py.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Final, TypeVar

from chexnet_deploy.bundle.manifest import Manifest
from chexnet_deploy.runtime.sessions.base import Provider

Item = TypeVar("Item")
Answer = TypeVar("Answer")

CUDA_BATCH_SIZE: Final = 16
GROUP_SIZE: Final = 8
"""Images that a worker decodes one after another, and then computes: what either needs stays in the core's cache. Eight are carried
8 % faster than one by one; more are no faster."""


@dataclass(frozen=True, slots=True)
class Flow:
    """How images move through a session.

    Attributes:
        batch_size: images in one call of the session.
        calls: calls of the session at a time; every session may be called from several threads.
        workers: threads; at the most so many groups of GROUP_SIZE images are being decoded or computed, and as many more are
            begun or done.
    """

    batch_size: int = 1
    calls: int = 1
    workers: int = 2

    def __post_init__(self) -> None:
        if self.batch_size < 1 or not 1 <= self.calls <= self.workers:
            raise ValueError(f"need batch_size >= 1 and 1 <= calls <= workers, got {self}")


def choose_flow(manifest: Manifest, *, threads: int | None, provider: Provider, cores: int) -> Flow:
    """Return how images move fastest through the session of a bundle.

    A plan takes its largest batch, for which it has the memory already. A CPU takes images one by one: larger batches are
    no faster there, and an image's answer then can't depend, in its last bit, on what else lies in the batch.

    Args:
        manifest: the bundle's.
        threads: CPU threads of one call, as the session was opened with; None for all cores.
        provider: what runs an ONNX bundle.
        cores: of this machine.
    """
    # One worker more than cores: while one waits for the disk, all cores have work.
    workers = cores + 1
    if manifest.engine is not None:
        return Flow(batch_size=manifest.engine.batch[2], workers=workers)
    if provider == "cuda":
        return Flow(batch_size=CUDA_BATCH_SIZE, workers=workers)
    return Flow(calls=max(1, cores // (cores if threads is None else threads)), workers=workers)


def usable_cores() -> int:
    """Return how many cores this process may run on; a container may have fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(work: Callable[[Item], Answer], items: Iterable[Item], *, workers: int, ahead: int) -> Generator[Answer]:
    """Yield work(item) for each item, in order, while threads work on the next ones.

    Items are taken as answers are asked for. An error of `work` is raised in its item's turn; no work is begun after it, or
    after the caller stops.

    Args:
        work: called in a thread.
        items: may be endless.
        workers: threads.
        ahead: items at the most that are begun or done before their answer is asked for.
    """
    remaining = iter(items)
    pool = ThreadPoolExecutor(workers)
    try:
        pending = deque(pool.submit(work, item) for item in islice(remaining, ahead))
        while pending:
            yield pending.popleft().result()
            pending.extend(pool.submit(work, item) for item in islice(remaining, 1))
    finally:
        pool.shutdown(cancel_futures=True)


def iter_groups(batches: Iterable[list[Item]], *, batch_size: int, n_single: int) -> Iterator[list[list[Item]]]:
    """Yield the first batches alone, so that of a few images every worker has some, and then as many as make GROUP_SIZE images."""
    remaining = iter(batches)
    for batch in islice(remaining, n_single):
        yield [batch]
    yield from iter_lists(remaining, max(1, GROUP_SIZE // batch_size))


def iter_lists(items: Iterable[Item], n: int) -> Iterator[list[Item]]:
    """Yield the items n at a time, the last ones fewer."""
    remaining = iter(items)
    while part := list(islice(remaining, n)):
        yield part
