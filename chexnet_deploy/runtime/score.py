"""Run sessions over image files: paths -> logits, in order, without the scope and content checks of `predict`.

Decodes in worker threads while the sessions run, and keeps no more than a few batches in memory. Carries labels beside
the paths, but computes no statistics.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from chexnet_deploy.images import ImageReader, Pixels, Preprocessing
from chexnet_deploy.runtime.loading import BUSY_ATTEMPTS, PixelLoader
from chexnet_deploy.runtime.sessions.base import Logits, Maps, Session, run_padded
from chexnet_deploy.runtime.streaming import in_order, iter_lists

READERS = 2  # Pillow decodes without the GIL; more threads than this wait for the session on small machines
BATCH_SIZE = 16


def iter_pixels(paths: Iterable[Path], preprocessing: Preprocessing) -> Iterator[Pixels]:
    """Yield uint8 [1, 1, S, S] for each file, in order, decoding a little ahead; scope and content are not checked.

    Raises:
        ImageError: a file can't be read without guessing.
    """
    with ImageReader(processes=READERS) as reader:
        loader = PixelLoader(preprocessing, None, reader)

        def load(path: Path) -> Pixels:
            return loader.load(path, attempts=BUSY_ATTEMPTS).pixels

        yield from in_order(load, paths, workers=READERS, ahead=2 * BATCH_SIZE)


def iter_batches(pixels: Iterable[Pixels], batch_size: int = BATCH_SIZE) -> Iterator[Pixels]:
    """Yield uint8 [N, 1, S, S] with N = batch_size, the last one smaller."""
    yield from map(np.concatenate, iter_lists(pixels, batch_size))


def score_files(
    sessions: Mapping[str, Session],
    paths: Sequence[Path],
    preprocessing: Preprocessing,
    *,
    on_images: Callable[[int], None] | None = None,
    on_maps: Callable[[Mapping[str, Maps]], None] | None = None,
) -> dict[str, Logits]:
    """Return each session's logits [N, C] for the files; every file is decoded once for all sessions.

    Args:
        sessions: by name; all take the same pixels.
        paths: image files.
        preprocessing: from the manifest.
        on_images: called after each batch with the images done.
        on_maps: called after each batch with each session's maps [n, C, h, w], which are not kept.

    Raises:
        ImageError: a file can't be read without guessing.
        SessionError: a session refused or failed.
    """
    collected: dict[str, list[Logits]] = {name: [] for name in sessions}
    done = 0
    batch_size = min([BATCH_SIZE, *(session.batch_range[1] for session in sessions.values())])
    for batch in iter_batches(iter_pixels(paths, preprocessing), batch_size):
        maps: dict[str, Maps] = {}
        for name, session in sessions.items():
            logits, maps[name] = run_padded(session, batch)
            collected[name].append(logits)
        if on_maps is not None:
            on_maps(maps)
        done += len(batch)
        if on_images is not None:
            on_images(done)
    return {name: np.concatenate(logits) for name, logits in collected.items()}
