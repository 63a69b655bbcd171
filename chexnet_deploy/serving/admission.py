"""How many images may be in the house: admitted and not answered yet."""

from collections.abc import Iterator
from contextlib import contextmanager

from chexnet_deploy.serving.refusals import Fault, busy


class Admission:
    """Count images in and out; for one event loop.

    Args:
        limit: images.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.n_images = 0

    @contextmanager
    def admit(self, n: int) -> Iterator[None]:
        """Hold places for n images.

        Raises:
            RequestError: 503, there are not as many free.
        """
        if self.n_images + n > self._limit:
            raise busy(Fault.BUSY, f"{self.n_images} images wait, at most {self._limit} may. Try again later.")
        self.n_images += n
        try:
            yield
        finally:
            self.n_images -= n

    @property
    def is_full(self) -> bool:
        """True where not even one more image would be admitted."""
        return self.n_images >= self._limit
