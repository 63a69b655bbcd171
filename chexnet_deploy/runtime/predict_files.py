"""Predictions of many files: on the screen, as maps, or into a table that resumes after a crash."""

from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TypeAlias

from PIL import Image

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.errors import ImageError, OnPhase
from chexnet_deploy.files import new_folder
from chexnet_deploy.images.listing import ImageFiles
from chexnet_deploy.runtime.predictor import Prediction, Predictor, draw_cam
from chexnet_deploy.runtime.sessions.base import Provider
from chexnet_deploy.runtime.sessions.open import resolve_provider
from chexnet_deploy.runtime.streaming import choose_flow, usable_cores
from chexnet_deploy.runtime.table import Row, TableCard
from chexnet_deploy.runtime.table_file import open_table

MakeRows: TypeAlias = Callable[[Bundle, ImageFiles, TableCard, int], Generator[Row]]
"""Yields the rows of a table's images in order, from a place on."""


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
        for name, (path, answer) in zip(images.names, answers, strict=True):
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
) -> tuple[int, int]:
    """Write the findings in all images into one table, or go on with it; return its rows and those quarantined.

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
    card = TableCard(
        bundle=bundle.id,
        preprocessing=bundle.manifest.preprocessing,
        findings=bundle.manifest.findings,
        operating_points=bundle.manifest.operating_points,
        backend=provider if target is None else target.backend,
        threads=threads,
        batch_size=choose_flow(bundle.manifest, threads=threads, provider=provider, cores=usable_cores()).batch_size,
        n_images=len(images.names),
        images_sha256=images.sha256,
    )
    with ExitStack() as stack:
        table = stack.enter_context(open_table(out, card, images.names))
        on_phase("predict", table.n_done, card.n_images)
        if table.n_done < card.n_images and elsewhere is not None:
            for row in stack.enter_context(closing(elsewhere(bundle, images, card, table.n_done))):
                table.add_row(row)
                on_phase("predict", table.n_done, card.n_images)
        elif table.n_done < card.n_images:
            predictor = stack.enter_context(open_predictor(bundle, images, threads=threads, provider=provider))
            answers = stack.enter_context(closing(predictor.predict_stream(images.paths(table.n_done))))
            for path, answer in answers:
                _refuse_lone(images, answer)
                table.add(path, answer)
                on_phase("predict", table.n_done, card.n_images)
        return table.n_done, table.n_quarantined


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
