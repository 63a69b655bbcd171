"""Measure whether an image gets the same answer in any slot of a batch, at any batch size, and from several threads.

Plans have been published whose answers depend on the slot, and on what lies in the others.
Knows no labels and no verdicts; the limit is in the spec's gate.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from chexnet_deploy.images.preprocessing import Pixels
from chexnet_deploy.inputs import AnyFloat, MeasuredRecord
from chexnet_deploy.runtime.sessions.base import Logits, Session, sigmoid

THREADS = 4
EVERY_SIZE_TO = 8  # then doubled up to the session's largest: a fault of one kernel shows at a power of two


class Spread(MeasuredRecord):
    """The largest differences between answers that should be the same."""

    max_abs_logit_difference: AnyFloat
    max_abs_probability_difference: AnyFloat


class InvarianceReport(MeasuredRecord):
    """One session; each spread is against the same image alone in a batch of one.

    Attributes:
        slots: the image in every slot of batches of itself, of each of `batch_sizes`.
        neighbours: images in a batch of each other, in several orders.
        threads: images one by one, from several threads at once.
    """

    batch_sizes: tuple[int, ...]
    n_images: int
    n_threads: int
    slots: Spread
    neighbours: Spread
    threads: Spread

    @property
    def max_abs_probability_difference(self) -> float:
        """The largest of the three."""
        return max(each.max_abs_probability_difference for each in (self.slots, self.neighbours, self.threads))


@dataclass(frozen=True, slots=True)
class Repeated:
    """An image's logits, and what they should be: those of the image alone in a batch of one. Both [M, C]."""

    got: Logits
    wanted: Logits


@dataclass(frozen=True, slots=True)
class RepeatedAnswers:
    """The same images asked again in other batches; see InvarianceReport."""

    batch_sizes: tuple[int, ...]
    n_images: int
    slots: Repeated
    neighbours: Repeated
    alone: Logits


def repeat_in_batches(session: Session, pixels: Pixels, max_batch: int) -> RepeatedAnswers:
    """Ask a session for the same images alone, in every slot of batches of themselves, and beside each other.

    Args:
        session: open; takes batches of one.
        pixels: uint8 [N, 1, S, S], several different images.
        max_batch: largest batch to try, where the session takes it.

    Raises:
        SessionError: as Session.run.
    """
    largest = min(max_batch, session.batch_range[1])
    sizes = [n for n in range(1, largest + 1) if n <= EVERY_SIZE_TO or n & (n - 1) == 0 or n == largest]
    n = min(len(pixels), largest)
    alone = np.concatenate([session.run(pixels[i : i + 1])[0] for i in range(n)])
    copies = np.concatenate([session.run(np.repeat(pixels[:1], size, axis=0))[0] for size in sizes])
    orders = [np.roll(np.arange(n), shift) for shift in (0, 1, n // 2)] + [np.arange(n)[::-1]]
    mixed = np.concatenate([session.run(pixels[order])[0] for order in orders])
    return RepeatedAnswers(
        batch_sizes=tuple(sizes),
        n_images=n,
        slots=Repeated(copies, np.repeat(alone[:1], len(copies), axis=0)),
        neighbours=Repeated(mixed, alone[np.concatenate(orders)]),
        alone=alone,
    )


def measure_invariance(session: Session, pixels: Pixels, max_batch: int) -> InvarianceReport:
    """Measure how far one image's answers spread, in batches and from several threads.

    Args:
        session: see repeat_in_batches.
        pixels: likewise.
        max_batch: likewise.

    Raises:
        SessionError: as Session.run.
    """
    again = repeat_in_batches(session, pixels, max_batch)
    with ThreadPoolExecutor(THREADS) as pool:
        jobs = [pixels[i : i + 1] for i in range(again.n_images)]
        threaded = np.concatenate([logits for logits, _ in pool.map(session.run, jobs)])
    return InvarianceReport(
        batch_sizes=again.batch_sizes,
        n_images=again.n_images,
        n_threads=THREADS,
        slots=_spread(again.slots),
        neighbours=_spread(again.neighbours),
        threads=_spread(Repeated(threaded, again.alone)),
    )


def _spread(answers: Repeated) -> Spread:
    got, wanted = answers.got, answers.wanted
    return Spread(
        max_abs_logit_difference=float(np.abs(got - wanted).max()),
        max_abs_probability_difference=float(np.abs(sigmoid(got) - sigmoid(wanted)).max()),
    )
