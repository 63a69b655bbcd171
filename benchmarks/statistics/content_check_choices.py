"""What else was tried for the image guard: simpler scores, and telling left from right.

Every score gets its threshold by the same rule (the strictest that refuses no adult of train_val out of fold), so what tells
them apart is how much else they let through at that price.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from chexnet_deploy.datasets.nih_tables import Radiograph
from chexnet_deploy.images.content_check import edge_directions, mirrored, thumbnail
from chexnet_deploy.images.gray import Gray
from chexnet_deploy.images.reader import read_image
from chexnet_deploy.metrics.intervals import clustered_proportion
from training.fit_content_check import PENALTY, Chests, Fit, all_ways, choose_min_score, fit, is_adult, out_of_fold

TEMPLATE_PX = 16
Ways: TypeAlias = NDArray[np.float64]


def compare_scores(
    radiographs: Sequence[Radiograph], chests: Chests, fitted_drawings: Ways, others: Sequence[Gray]
) -> dict[str, object]:
    """Return, for each score, the turned radiographs of train_val and the pictures of no chest that it would accept.

    Args:
        radiographs: of train_val.
        chests: the same, described.
        fitted_drawings: what the shipped score was fitted to.
        others: pictures of no chest.
    """
    adults = np.array([is_adult(radiograph) for radiograph in radiographs])
    grays = Chests(np.array([[_gray_ways(gray) for gray in map(read, radiographs)]]), chests.patients)
    grays_of_others = np.array([_gray_ways(gray) for gray in others])
    edges_of_others = np.array([all_ways(gray) for gray in others])
    edges = Chests(chests.ways[:1], chests.patients)
    mean_edges = edges.ways.mean(axis=(0, 1, 2))
    centred = Chests(_unit(edges.ways - mean_edges), chests.patients)
    return {
        "correlation with the mean 16 x 16 picture": _judge(grays, adults, grays_of_others, _mean_upright),
        "correlation with the mean edge directions": _judge(
            centred, adults, _unit(edges_of_others - mean_edges), _mean_upright
        ),
        "ridge regression on the 16 x 16 picture": _judge(grays, adults, grays_of_others, _fit_to_turns),
        "ridge regression on edge directions": _judge(edges, adults, edges_of_others, _fit_to_turns),
        "the same with varied radiographs and drawings, as shipped": _judge(
            chests, adults, edges_of_others, lambda ways: fit(ways, fitted_drawings)
        ),
    }


def read(radiograph: Radiograph) -> Gray:
    """Return a radiograph's picture."""
    assert radiograph.path is not None  # a split holds images that are on disk
    return read_image(radiograph.path)


def _gray_ways(gray: Gray) -> Ways:
    """Return [8, 256]: the standardised, left-right symmetric thumbnail righted from every way to lie."""
    values = np.asarray(Image.fromarray(gray).resize((TEMPLATE_PX, TEMPLATE_PX), Image.Resampling.BOX), np.float64)
    values = (values - values.mean()) / (values.std() or 1.0) / TEMPLATE_PX
    turned = [np.rot90((values + values[:, ::-1]) / 2, quarter) for quarter in range(4)]
    return np.array([way.ravel() for way in (*turned, *(-way for way in turned))])


def _unit(ways: Ways) -> Ways:
    unit: Ways = ways / np.linalg.norm(ways, axis=-1, keepdims=True)
    return unit


def _mean_upright(ways: Ways) -> Fit:
    return Fit(ways.reshape(-1, *ways.shape[-2:])[:, 0].mean(axis=0), 0.0)


def _fit_to_turns(ways: Ways) -> Fit:
    """Fit to radiographs alone: upright against the other ways."""
    return fit(ways, ways.reshape(-1, *ways.shape[-2:])[:, 1:])


def _judge(chests: Chests, adults: NDArray[np.bool_], others: Ways, fitted: Callable[[Ways], Fit]) -> dict[str, object]:
    scores = out_of_fold(chests, fitted)
    min_score = choose_min_score(scores[adults, 0])
    of_others = fitted(chests.ways).scores(others)
    best, best_of_others = scores.max(axis=1), of_others.max(axis=1)
    return {
        "min_score": min_score,
        "children_refused": int((scores[~adults, 0] < min_score).sum()),
        "radiographs_accepted_turned": int(((scores[:, 0] < best) & (best >= min_score)).sum()),
        "n_not_chests": len(others),
        "not_chests_accepted": int(((of_others[:, 0] == best_of_others) & (best_of_others >= min_score)).sum()),
        "not_chests_accepted_in_any_turn": int((best_of_others >= min_score).sum()),
    }


def mirror_accuracy(train_val: Sequence[Radiograph], test: Sequence[Radiograph]) -> dict[str, object]:
    """Return how often a ridge fit on the difference between left and right knows a radiograph from its mirror image.

    The guard doesn't try, and this is why. A picture and its mirror image have scores of opposite sign.
    """
    learnt, judged = (_left_right(radiographs) for radiographs in (train_val, test))
    out = out_of_fold(learnt, _fit_sides)[:, 0] > 0
    return {
        "train_val_out_of_fold": asdict(clustered_proportion(out, learnt.patients)),
        "test": asdict(clustered_proportion(_fit_sides(learnt.ways).scores(judged.ways[0])[:, 0] > 0, judged.patients)),
    }


def _left_right(radiographs: Sequence[Radiograph]) -> Chests:
    """Return [1, N, 2, 512]: edges less those of the mirror image, and the reverse."""
    edges = [edge_directions(thumbnail(read(radiograph))) for radiograph in radiographs]
    sides = np.array([(one - mirrored(one)).ravel() for one in edges])
    patients = np.array([radiograph.patient for radiograph in radiographs], np.int64)
    return Chests(np.stack([sides, -sides], axis=1)[np.newaxis], patients)


def _fit_sides(ways: Ways) -> Fit:
    rows = ways[0, :, 0]
    gram = rows.T @ rows / len(rows) + PENALTY * np.eye(rows.shape[1])
    return Fit(np.linalg.solve(gram, rows.mean(axis=0)), 0.0)
