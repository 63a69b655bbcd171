"""Predictions of many files: on the screen, as maps, or into a table that resumes after a crash."""

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

from PIL import Image

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.site import OperatingPoints
from chexnet_deploy.errors import ImageError, OnPhase
from chexnet_deploy.files import FileContent, new_folder, sha256_of_file
from chexnet_deploy.images.listing import ImageFiles
from chexnet_deploy.runtime.predictor import Prediction, Predictor, draw_cam
from chexnet_deploy.runtime.sessions.base import Provider
from chexnet_deploy.runtime.sessions.open import resolve_provider
from chexnet_deploy.runtime.streaming import choose_flow, in_order, iter_lists, usable_cores
from chexnet_deploy.runtime.table import Row, TableCard, row_of
from chexnet_deploy.runtime.table_file import Table, open_table

MakeRows: TypeAlias = Callable[[Bundle, ImageFiles, TableCard, Sequence[int]], Generator[Row]]
"""Yields the rows of a table's images at some places, in their order. Each batch is there as a whole."""

REPLACED_ROWS: Final = 10_000
"""So many rows of changed files wait in memory until they are written: a table is copied each time."""


class TableRun(NamedTuple):
    """What became of a table.

    Attributes:
        n_images: its rows.
        n_quarantined: of them, images that can't be read.
        changed: names of files whose rows were there but were done again: they changed, or couldn't be read before.
        was_whole: there was nothing to do.
        points_from: what decided, in words.
    """

    n_images: int
    n_quarantined: int
    changed: tuple[str, ...]
    was_whole: bool
    points_from: str = "bundle"


def predict_images(
    predictor: Predictor, images: ImageFiles, cam_folder: Path | None
) -> Iterator[tuple[str, Prediction | ImageError]]:
    """Yield (name, findings) for each image in order, or the ImageError that says why there are none.

    Draws the map of each finding called present (or of the likeliest) into a new folder, where one is given.

    Raises:
        ChexnetError: the session failed, the one file that was given can't be read, or two images would draw the same picture.
    """
    if cam_folder is not None:
        twice = sorted(stem for stem, count in Counter(path.stem for path in images.paths()).items() if count > 1)
        if twice:
            raise ImageError(
                f"{len(twice)} names are given twice, e.g. {twice[0]}: their pictures would be one. Run them apart."
            )
    with ExitStack() as stack:
        partial = None if cam_folder is None else stack.enter_context(new_folder(cam_folder))
        answers = stack.enter_context(
            closing(predictor.predict_stream(images.paths(), with_maps=cam_folder is not None))
        )
        for name, (path, answer, _) in zip(images.names, answers, strict=True):
            _refuse_lone(images, answer)
            if partial is not None and not isinstance(answer, ImageError):
                _draw_cams(partial, predictor, path, answer)
            yield name, answer


def predict_table(
    bundle: Bundle,
    images: ImageFiles,
    out: Path,
    *,
    threads: int | None,
    provider: Provider,
    on_phase: OnPhase,
    elsewhere: MakeRows | None = None,
) -> TableRun:
    """Write the findings in all images into one table, or go on with it; rows whose file changed are made again.

    Args:
        bundle: verified.
        images: a row for each, in order.
        out: .csv or .parquet.
        threads: CPU threads of one call; None for one where there are many images.
        provider: what runs an ONNX bundle.
        on_phase: told of every row.
        elsewhere: what makes the rows that are missing, e.g. a cluster; None for this process.

    Raises:
        ChexnetError: the bundle can't be used here, the table is another one or can't be written, or the one file that was
            given can't be read.
    """
    threads, provider, target = _threads_for(images, threads), resolve_provider(provider), bundle.manifest.target
    points = OperatingPoints.of(bundle.manifest, bundle.read_site())
    card = TableCard(
        bundle=bundle.id,
        preprocessing=bundle.manifest.preprocessing,
        findings=bundle.manifest.findings,
        operating_points=dict(points.present_at),
        absent_below={} if points.site is None else dict(points.absent_below),
        site=points.site,
        backend=provider if target is None else target.backend,
        threads=threads,
        batch_size=choose_flow(bundle.manifest, threads=threads, provider=provider, cores=usable_cores()).batch_size,
        n_images=len(images.names),
        images_sha256=images.sha256,
    )
    with ExitStack() as stack:
        table = stack.enter_context(open_table(out, card, images.names))
        changed = _find_changed(images, table, on_phase)
        again = _whole_batches(changed, card.batch_size, table.n_done)
        places = [*again, *range(table.n_done, card.n_images)]
        n_before = card.n_images - len(places)
        on_phase("predict", n_before, card.n_images)
        if places:
            make = elsewhere or _make_here(threads, provider)
            rows = stack.enter_context(closing(make(bundle, images, card, places)))
            for part in iter_lists(again, REPLACED_ROWS):
                fresh = {}
                for place in part:
                    fresh[place] = next(rows)
                    on_phase("predict", n_before := n_before + 1, card.n_images)
                table.replace(fresh)
            for row in rows:
                table.add(row)
                on_phase("predict", n_before := n_before + 1, card.n_images)
        names = tuple(images.names[place] for place in changed)
        return TableRun(table.n_done, table.n_quarantined, names, was_whole=not places, points_from=points.source)


def _find_changed(images: ImageFiles, table: Table, on_phase: OnPhase) -> list[int]:
    """Return the places of rows that are done, but not of the file that is there now."""

    def is_same(pair: tuple[Path, FileContent | None]) -> bool:
        path, content = pair
        return content is not None and _holds(path, content)

    changed = []
    pairs = zip(images.paths(), table.contents(), strict=False)  # there may be more images than rows
    with closing(in_order(is_same, pairs, workers=usable_cores(), ahead=64)) as are_same:
        for place, same in enumerate(are_same):
            if not same:
                changed.append(place)
            on_phase("compare files", place + 1, table.n_done)
    return changed


def _holds(path: Path, content: FileContent) -> bool:
    try:
        return path.stat().st_size == content.n_bytes and sha256_of_file(path) == content.sha256
    except OSError:
        return False


def _whole_batches(places: Sequence[int], batch_size: int, n_done: int) -> list[int]:
    """Return the places with those that share a batch: on a GPU an answer's last bit may depend on them."""
    starts = sorted({place - place % batch_size for place in places})
    return [place for start in starts for place in range(start, min(start + batch_size, n_done))]


def _make_here(threads: int | None, provider: Provider) -> MakeRows:
    def make(bundle: Bundle, images: ImageFiles, card: TableCard, places: Sequence[int]) -> Generator[Row]:
        paths = (images.root / images.names[place] for place in places)
        with (
            open_predictor(bundle, images, threads=threads, provider=provider) as predictor,
            closing(predictor.predict_stream(paths)) as answers,
        ):
            card.refuse_other_site(predictor.points)
            for place, done in zip(places, answers, strict=True):
                _refuse_lone(images, done.answer)
                yield row_of(card, images.names[place], done)

    return make


def open_predictor(bundle: Bundle, images: ImageFiles, *, threads: int | None, provider: Provider) -> Predictor:
    """Open a bundle for these images: one answers soonest with all cores at work on it, many with a core each.

    Raises:
        SessionError, MissingPackageError: see open_session.
    """
    return Predictor.of(bundle, threads=_threads_for(images, threads), provider=provider)


def _threads_for(images: ImageFiles, threads: int | None) -> int | None:
    return 1 if threads is None and len(images.names) > 1 else threads


def _refuse_lone(images: ImageFiles, answer: Prediction | ImageError) -> None:
    """Refuse the one file that was given, where it can't be read: a table of nothing helps nobody."""
    if images.is_one_file and isinstance(answer, ImageError):
        raise answer


def _draw_cams(folder: Path, predictor: Predictor, path: Path, prediction: Prediction) -> None:
    gray = predictor.loader.read(path)
    likeliest = max(prediction.probabilities, key=prediction.probabilities.__getitem__)
    for finding in [name for name, is_there in prediction.present.items() if is_there] or [likeliest]:
        Image.fromarray(draw_cam(gray, prediction.maps[finding])).save(folder / f"{path.stem}_{finding}.png")
