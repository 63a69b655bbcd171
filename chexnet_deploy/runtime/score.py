"""Run sessions over image files: paths -> logits, in order, without the scope and content checks of `predict`.

Decodes in worker threads while the sessions run, and keeps no more than a few batches in memory. Carries labels beside
the paths, but computes no statistics.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from chexnet_deploy.images import Gray, ImageReader, Pixels, Resizing
from chexnet_deploy.runtime.loading import BUSY_ATTEMPTS, PixelLoader
from chexnet_deploy.runtime.sessions.base import Logits, Maps, Session, run_padded
from chexnet_deploy.runtime.sessions.foreign import ForeignSession
from chexnet_deploy.runtime.streaming import in_order, iter_lists

READERS = 2  # Pillow decodes without the GIL; more threads than this wait for the session on small machines
BATCH_SIZE = 16


def iter_pixels(paths: Iterable[Path], preprocessing: Resizing) -> Iterator[Pixels]:
    """Yield uint8 [1, 1, S, S] for each file, in order, decoding a little ahead; scope and content are not checked.

    Raises:
        ImageError: a file can't be read without guessing.
    """
    for (pixels,) in _iter_prepared(paths, [preprocessing]):
        yield pixels


def _iter_prepared(paths: Iterable[Path], preprocessings: Sequence[Resizing]) -> Iterator[list[Pixels]]:
    """Yield a file's pixels by each preprocessing; it is decoded once for all that want every pixel of it."""
    with ImageReader(processes=READERS) as reader:
        loaders = [PixelLoader(preprocessing, None, reader) for preprocessing in preprocessings]

        def load(path: Path) -> list[Pixels]:
            whole: Gray | None = None
            prepared = []
            for loader in loaders:
                if whole is None or loader.preprocessing.jpeg2000 is not None:
                    loaded = loader.load(path, attempts=BUSY_ATTEMPTS)
                    whole = loaded.gray if loader.preprocessing.jpeg2000 is None else whole
                    prepared.append(loaded.pixels)
                else:
                    prepared.append(loader.preprocessing(whole))
            return prepared

        yield from in_order(load, paths, workers=READERS, ahead=2 * BATCH_SIZE)


def iter_batches(pixels: Iterable[Pixels], batch_size: int = BATCH_SIZE) -> Iterator[Pixels]:
    """Yield uint8 [N, 1, S, S] with N = batch_size, the last one smaller."""
    yield from map(np.concatenate, iter_lists(pixels, batch_size))


def score_files(
    sessions: Mapping[str, Session],
    paths: Sequence[Path],
    preprocessing: Resizing | Mapping[str, Resizing],
    *,
    on_images: Callable[[int], None] | None = None,
    on_maps: Callable[[Mapping[str, Maps]], None] | None = None,
) -> dict[str, Logits]:
    """Return each session's logits [N, C] for the files; every file is decoded once for all sessions.

    Args:
        sessions: by name.
        paths: image files.
        preprocessing: of all sessions, or of each by its name.
        on_images: called after each batch with the images done.
        on_maps: called after each batch with each session's maps [n, C, h, w], which are not kept.

    Raises:
        ImageError: a file can't be read without guessing.
        SessionError: a session refused or failed, an endpoint answers the same images in two ways, or a model's logits are none.
    """
    own = preprocessing if isinstance(preprocessing, Mapping) else dict.fromkeys(sessions, preprocessing)
    different = list(dict.fromkeys(own.values()))
    collected: dict[str, list[Logits]] = {name: [] for name in sessions}
    # A served model may be changed while it is measured, or be several that answer in turns. Each batch is asked for again when the
    # next one has been, so that a change shows wherever it begins and ends, and the first one at the end.
    foreign = {name: session for name, session in sessions.items() if isinstance(session, ForeignSession)}
    first: dict[str, tuple[Pixels, Logits]] = {}
    last: dict[str, tuple[Pixels, Logits]] = {}
    done = 0
    batch_size = min([BATCH_SIZE, *(session.batch_range[1] for session in sessions.values())])
    for rows in iter_lists(_iter_prepared(paths, different), batch_size):
        batches = dict(zip(different, map(np.concatenate, zip(*rows, strict=True)), strict=True))
        maps: dict[str, Maps] = {}
        for name, session in sessions.items():
            logits, maps[name] = run_padded(session, batches[own[name]])
            collected[name].append(logits)
            if name in foreign and foreign[name].is_remote:
                if name in last:
                    foreign[name].check_again(*last[name])
                last[name] = batches[own[name]], logits
                first.setdefault(name, last[name])
        if on_maps is not None:
            on_maps(maps)
        done += len(rows)
        if on_images is not None:
            on_images(done)
    for name, answer in (*last.items(), *first.items()):
        foreign[name].check_again(*answer)
    for each in foreign.values():
        each.refuse_probabilities()
    return {name: np.concatenate(logits) for name, logits in collected.items()}
