"""Which images make up which step, and their pixels, read ahead of the trainer.

An epoch's order depends on the seed and the epoch alone, so a run is the same on any number of processes and goes on anywhere.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from queue import Full, Queue
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chexnet_deploy.errors import SpecError
from chexnet_deploy.images.preprocessing import Pixels
from training.augment import draw

READ_AHEAD = 4
_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class TrainingImages:
    """Images with their labels.

    Attributes:
        pixels: uint8 [M, 1, S, S], as the cache has them; may be memory-mapped.
        rows: [N] of those, the ones to train on.
        truth: float32 [N, C], 1 where the finding is present, 0 where it is absent, NaN where nobody says.
    """

    pixels: Pixels
    rows: NDArray[np.intp]
    truth: NDArray[np.float32]

    @property
    def labelled(self) -> NDArray[np.bool_]:
        """[N, C] True where the label is known."""
        return ~np.isnan(self.truth)


@dataclass(frozen=True, slots=True)
class Shard:
    """One part of a step, as large as every other: what one forward pass sees."""

    pixels: Tensor
    truth: Tensor
    draws: Tensor


def steps_per_epoch(n_images: int, batch_size: int) -> int:
    """Return how many whole batches there are.

    A last batch of one image has no variance for BatchNorm, so incomplete batches are dropped; the order is new every epoch,
    so every image has its turn.

    Raises:
        SpecError: there is none.
    """
    if n_images < batch_size:
        raise SpecError(f"{n_images} training images are fewer than one batch of {batch_size}.")
    return n_images // batch_size


def epoch_order(seed: int, epoch: int, n_images: int) -> NDArray[np.intp]:
    """Return a permutation of the images."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 1, epoch, 0])).permutation(n_images)


class ReadAhead:
    """Yields each step's shards of this process, read in a thread while the trainer computes.

    Args:
        images: to train on.
        seed: of order and augmentation.
        epoch: from 0.
        batch_size: over all processes.
        pin_memory: for copies to a GPU that don't wait.
        first_step: where a resumed epoch goes on.
        shards: parts of each batch, over all processes.
        mine: numbers of the shards that are this process's.

    Attributes:
        waited_s: how long the trainer stood waiting for images.
    """

    def __init__(
        self,
        images: TrainingImages,
        *,
        seed: int,
        epoch: int,
        batch_size: int,
        pin_memory: bool,
        first_step: int = 0,
        shards: int = 1,
        mine: range = range(1),
    ) -> None:
        self._images, self._seed, self._epoch, self._first_step = images, seed, epoch, first_step
        self._batch_size, self._shard_size, self._mine, self._pin = batch_size, batch_size // shards, mine, pin_memory
        self._order = epoch_order(seed, epoch, len(images.rows))
        self._queue: Queue[list[Shard] | Exception | None] = Queue(READ_AHEAD)
        self._stop = threading.Event()
        self.waited_s = 0.0

    def __iter__(self) -> Iterator[list[Shard]]:
        """Read ahead until the epoch ends or the loop is left."""
        reader = threading.Thread(target=self._read, name="read-ahead", daemon=True)
        reader.start()
        try:
            while True:
                start = perf_counter()
                item = self._queue.get()
                self.waited_s += perf_counter() - start
                if item is None:
                    return
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self._stop.set()
            reader.join()

    def _read(self) -> None:
        try:
            for step in range(self._first_step, steps_per_epoch(len(self._order), self._batch_size)):
                if not self._put(self._step(step)):
                    return
            self._put(None)
        except Exception as err:  # noqa: BLE001 - raised again in the trainer's thread, where it can be handled
            self._put(err)

    def _step(self, step: int) -> list[Shard]:
        chosen = self._order[step * self._batch_size : (step + 1) * self._batch_size]
        draws = draw(self._seed, self._epoch, step, self._batch_size)
        shards = []
        for number in self._mine:
            part = slice(number * self._shard_size, (number + 1) * self._shard_size)
            numbers = chosen[part]
            tensors = [
                torch.from_numpy(np.ascontiguousarray(array))
                for array in (self._images.pixels[self._images.rows[numbers]], self._images.truth[numbers], draws[part])
            ]
            if self._pin:
                tensors = [tensor.pin_memory() for tensor in tensors]
            shards.append(Shard(*tensors))
        return shards

    def _put(self, item: list[Shard] | Exception | None) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=_POLL_S)
            except Full:
                continue
            return True
        return False
