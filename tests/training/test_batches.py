import threading

import numpy as np
import pytest

from chexnet_deploy.errors import SpecError
from training.batches import ReadAhead, Shard, TrainingImages, epoch_order, steps_per_epoch


def images(n: int) -> TrainingImages:
    """Image i is gray i, and stands at place 2 i of an array that holds others too."""
    pixels = np.zeros((2 * n, 1, 32, 32), np.uint8)
    pixels[::2] = np.arange(n, dtype=np.uint8)[:, None, None, None]
    return TrainingImages(pixels, np.arange(0, 2 * n, 2), np.arange(n, dtype=np.float32)[:, None])


def read(first_step: int = 0, shards: int = 1, mine: range = range(1), epoch: int = 0) -> list[list[Shard]]:
    ahead = ReadAhead(
        images(22),
        seed=5,
        epoch=epoch,
        first_step=first_step,
        batch_size=8,
        shards=shards,
        mine=mine,
        pin_memory=False,
    )
    return list(ahead)


def numbers(steps: list[list[Shard]]) -> list[list[int]]:
    return [[int(value) for shard in step for value in shard.truth[:, 0]] for step in steps]


def test_every_image_once_an_epoch_but_the_last_few() -> None:
    steps = numbers(read())
    assert [len(step) for step in steps] == [8, 8]
    assert len({number for step in steps for number in step}) == 16
    assert steps == [epoch_order(5, 0, 22)[:8].tolist(), epoch_order(5, 0, 22)[8:16].tolist()]
    assert numbers(read(epoch=1)) != steps


def test_pixels_and_labels_stay_together() -> None:
    for step in read():
        for shard in step:
            assert shard.pixels[:, 0, 0, 0].tolist() == shard.truth[:, 0].tolist()


def test_an_epoch_goes_on_where_it_was_left() -> None:
    assert numbers(read(first_step=1)) == numbers(read())[1:]


def test_processes_share_the_same_batches() -> None:
    both = numbers(read(shards=2, mine=range(2)))
    first, second = (numbers(read(shards=2, mine=range(rank, rank + 1))) for rank in (0, 1))
    assert both == numbers(read())
    assert [a + b for a, b in zip(first, second, strict=True)] == both
    one, two = read(shards=2, mine=range(1)), read()
    assert (one[0][0].draws == two[0][0].draws[:4]).all()


def test_a_loop_that_is_left_stops_its_reader() -> None:
    before = threading.active_count()
    for _ in ReadAhead(
        images(22), seed=5, epoch=0, first_step=0, batch_size=2, shards=1, mine=range(1), pin_memory=False
    ):
        break
    assert threading.active_count() == before


def test_what_fails_in_the_reader_is_raised_in_the_loop() -> None:
    broken = TrainingImages(np.zeros((1, 1, 32, 32), np.uint8), np.arange(22), np.zeros((22, 1), np.float32))
    with pytest.raises(IndexError):
        list(ReadAhead(broken, seed=5, epoch=0, first_step=0, batch_size=8, shards=1, mine=range(1), pin_memory=False))


def test_fewer_images_than_a_batch_are_refused() -> None:
    assert steps_per_epoch(33, 16) == 2
    with pytest.raises(SpecError, match="fewer than one batch of 16"):
        steps_per_epoch(15, 16)
