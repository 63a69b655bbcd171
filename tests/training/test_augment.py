import numpy as np
import torch

from training import augment as module
from training.augment import N_DRAWS, draw
from training.recipe import Augmentation

MIDDLE = 0.5  # a draw that changes nothing


def draws(**changed: float) -> torch.Tensor:
    names = ("flip", "rotation", "shift_x", "shift_y", "scale", "contrast", "brightness", "mixup")
    return torch.tensor([[changed.get(name, MIDDLE) for name in names]])


def augment(pixels: torch.Tensor, drawn: torch.Tensor, how: Augmentation) -> torch.Tensor:
    return module.augment(pixels, torch.zeros((len(pixels), 1)), drawn, how)[0]


def picture() -> torch.Tensor:
    pixels = torch.zeros((1, 1, 32, 32), dtype=torch.uint8)
    pixels[0, 0, 8, 4] = 200
    return pixels


def brightest(pixels: torch.Tensor) -> tuple[int, int]:
    row, column = divmod(int(pixels.argmax()), pixels.shape[-1])
    return row, column


def test_nothing_asked_for_changes_nothing() -> None:
    assert augment(picture(), draws(flip=0.0, rotation=1.0), Augmentation()) is not None
    assert torch.equal(augment(picture(), draws(flip=0.0, rotation=1.0), Augmentation()), picture())


def test_a_flip_is_exact() -> None:
    flipped = augment(picture(), draws(flip=0.49), Augmentation(flip_probability=0.5))
    assert (brightest(flipped), flipped.dtype) == ((8, 27), torch.uint8)
    assert torch.equal(augment(picture(), draws(flip=0.51), Augmentation(flip_probability=0.5)), picture())


def test_the_middle_of_every_draw_is_no_change() -> None:
    how = Augmentation(rotate_degrees=10.0, shift_share=0.1, scale_share=0.1, contrast_share=0.1)
    torch.testing.assert_close(augment(picture(), draws(), how), picture().float(), atol=1e-2, rtol=0)


def test_a_shift_moves_by_its_share_of_the_side() -> None:
    # A quarter of 32 px: what is shown comes from 8 px further right, so the dot leaves or moves left.
    moved = augment(picture().flip(3), draws(shift_x=1.0), Augmentation(shift_share=0.25))
    assert brightest(moved) == (8, 19)
    assert brightest(augment(picture(), draws(shift_y=1.0), Augmentation(shift_share=0.25))) == (0, 4)


def test_a_rotation_by_45_degrees_moves_a_corner_to_the_edge() -> None:
    pixels = torch.zeros((1, 1, 33, 33), dtype=torch.uint8)
    pixels[0, 0, 16 - 8, 16 - 8] = 255  # 11.3 px from the centre, up and left
    turned = augment(pixels, draws(rotation=1.0), Augmentation(rotate_degrees=45.0))
    row, column = brightest(turned)
    assert abs(np.hypot(row - 16, column - 16) - 11.3) < 1.0
    assert min(abs(row - 16), abs(column - 16)) <= 1


def test_brighter_and_more_contrast_stay_within_gray() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    lifted = augment(pixels, draws(brightness=1.0), Augmentation(contrast_share=0.1))
    assert float(lifted.max()) == 255.0
    torch.testing.assert_close(lifted[0, 0, 0, 0], torch.tensor(25.5))
    stretched = augment(pixels, draws(contrast=1.0), Augmentation(contrast_share=0.1))
    assert float(stretched[0, 0, 8, 0] - stretched[0, 0, 7, 15]) > 1.05


def test_mixup_blends_pixels_and_labels_alike() -> None:
    pixels = torch.stack([torch.zeros((1, 2, 2)), torch.full((1, 2, 2), 200.0)]).to(torch.uint8)
    truth = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    drawn = torch.cat([draws(mixup=0.5), draws(mixup=0.0)])
    mixed, labels = module.augment(pixels, truth, drawn, Augmentation(mixup_share=0.4))
    # A fifth of the other image in the first, nothing in the second.
    torch.testing.assert_close(mixed[:, 0, 0, 0], torch.tensor([40.0, 200.0]))
    torch.testing.assert_close(labels, torch.tensor([[0.8, 0.2], [0.0, 1.0]]))


def test_draws_depend_on_seed_epoch_and_step_alone() -> None:
    first = draw(3, 1, 7, 16)
    assert (first.shape, first.dtype) == ((16, N_DRAWS), np.float32)
    np.testing.assert_array_equal(first, draw(3, 1, 7, 16))
    for other in (draw(4, 1, 7, 16), draw(3, 2, 7, 16), draw(3, 1, 8, 16)):
        assert not np.array_equal(first, other)
