"""Fit the score of the image guard: `python -m training.fit_content_check ROOT` writes chexnet_deploy/input_guard.json again.

Ridge regression (Hoerl & Kennard 1970) on edge directions: +1 for a radiograph of train_val as it is, -1 for the same lying in
the seven other ways and for drawings that are no chest. Never opens an image of the test list, nor a real picture of
anything else: whether the guard refuses a hip was not learnt from hips.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Final, NamedTuple

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from chexnet_deploy.datasets.chestxray14 import ChestXray14
from chexnet_deploy.datasets.nih_tables import Radiograph
from chexnet_deploy.files import write_file
from chexnet_deploy.images import content_check as input_guard
from chexnet_deploy.images.content_check import Edges, GuardWeights, edge_directions, mirrored, righted, thumbnail
from chexnet_deploy.images.gray import Gray
from chexnet_deploy.images.reader import read_image
from chexnet_deploy.terminal import run_program

WEIGHTS: Final = Path(input_guard.__file__).with_name(input_guard.WEIGHTS_FILE)
SEED: Final = 14
CANVAS_PX: Final = 128
N_VARIATIONS: Final = 4
N_DRAWINGS: Final = 600
PENALTY: Final = 0.03
"""Of the squared weights. 0.01 and 0.1 refuse the same radiographs but one."""
N_FOLDS: Final = 10
ADULT_YEARS: Final = 18
SOURCE: Final = (
    "Edge directions of ChestX-ray14's train_val radiographs (NIH Clinical Center; Wang et al. 2017, CVPR) and of drawings; "
    "a linear fit over all of them, no image"
)

Ways: Final = len(input_guard.Turn)
app = typer.Typer(add_completion=False)


class Fit(NamedTuple):
    """A linear score: edges @ weights + bias."""

    weights: NDArray[np.float64]
    bias: float

    def scores(self, ways: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return [N, 8] of [N, 8, 512]."""
        return ways @ self.weights + self.bias


class Chests(NamedTuple):
    """Radiographs as the fit takes them.

    Attributes:
        ways: [1 + N_VARIATIONS, N, 8, 512]; the first are the radiographs themselves, then each varied.
        patients: [N].
    """

    ways: NDArray[np.float64]
    patients: NDArray[np.int64]


@app.command()
def main(
    root: Annotated[Path, typer.Argument(help="ChestX-ray14: tables, split lists and images.")],
    out: Annotated[Path, typer.Option(help="The file to write.")] = WEIGHTS,
) -> None:
    """Fit on train_val and print the strictest score that refuses none of its adults out of fold."""
    dataset = ChestXray14.open(root)
    radiographs = dataset.split("train") + dataset.split("val")
    chests, drawings = describe_chests(radiographs), describe_drawings()
    scores = out_of_fold(chests, lambda ways: fit(ways, drawings))
    write_file(out, as_json(fit(chests.ways, drawings), radiographs).encode("ascii"))
    typer.echo(f"{out}: {len(radiographs)} radiographs of {len(np.unique(chests.patients))} patients")
    # CheXNet is for adults, and small children, whole bodies on the film, score lowest of all.
    adults = scores[[is_adult(radiograph) for radiograph in radiographs], 0]
    typer.echo(f"lowest scores of {len(adults)} adults out of fold: {np.sort(adults)[:5].round(3).tolist()}")
    typer.echo(f"min_score: {choose_min_score(adults)}")


def is_adult(radiograph: Radiograph) -> bool:
    """Say whether the patient is 18 or older."""
    return radiograph.age_years >= ADULT_YEARS


def describe_chests(radiographs: Sequence[Radiograph]) -> Chests:
    """Return edge directions of radiographs in all eight ways, as they are and varied."""
    rng = np.random.default_rng([SEED, 0])
    rows: list[list[NDArray[np.float64]]] = [[] for _ in range(1 + N_VARIATIONS)]
    for radiograph in radiographs:
        assert radiograph.path is not None  # a split holds images that are on disk
        gray = read_image(radiograph.path)
        rows[0].append(all_ways(gray))
        canvas = Image.fromarray(gray).resize((CANVAS_PX, CANVAS_PX), Image.Resampling.BOX)
        for row in rows[1:]:
            row.append(all_ways(vary(canvas, rng)))
    return Chests(np.array(rows), np.array([radiograph.patient for radiograph in radiographs], np.int64))


def describe_drawings() -> NDArray[np.float64]:
    """Return [N_DRAWINGS, 8, 512] of clouds and of shapes, two to one."""
    rng = np.random.default_rng([SEED, 1])
    drawings = [draw_shapes(rng) if i % 3 == 0 else draw_clouds(rng, rng.uniform(0.8, 3.2)) for i in range(N_DRAWINGS)]
    return np.array([all_ways(drawing) for drawing in drawings])


def all_ways(gray: Gray) -> NDArray[np.float64]:
    """Return [8, 512]: the edges righted from every way to lie, each the mean of itself and its mirror image."""
    edges = edge_directions(thumbnail(gray))
    symmetric: Edges = (edges + mirrored(edges)) / 2
    return np.array([way.ravel() for way in righted(symmetric)])


def vary(canvas: Image.Image, rng: np.random.Generator) -> Gray:
    """Return a radiograph turned a little, nearer or farther, off centre, with another contrast curve and margin."""
    margin = int(rng.choice([0, 0, 0, 255, 128]))
    turned = canvas.rotate(rng.uniform(-10, 10), Image.Resampling.BILINEAR, fillcolor=margin)
    width_px = CANVAS_PX * rng.uniform(0.8, 1.15)
    height_px = width_px * rng.uniform(0.9, 1.1)
    x, y = (CANVAS_PX - width_px) / 2 + rng.uniform(-10, 10), (CANVAS_PX - height_px) / 2 + rng.uniform(-10, 10)
    window = (x, y, x + width_px, y + height_px)
    size_px = (CANVAS_PX, CANVAS_PX)
    cut = turned.transform(size_px, Image.Transform.EXTENT, window, Image.Resampling.BILINEAR, fillcolor=margin)
    curve = (np.arange(256) / 255) ** math.exp(rng.uniform(-0.6, 0.6)) * 255
    varied: Gray = curve.round().astype(np.uint8)[np.asarray(cut)]
    return varied


def draw_clouds(rng: np.random.Generator, smoothness: float) -> Gray:
    """Return noise whose amplitude falls with frequency to the power of `smoothness`; 1 is like a photograph's."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(CANVAS_PX), np.fft.fftfreq(CANVAS_PX)))
    frequency[0, 0] = 1
    spectrum = np.fft.fft2(rng.standard_normal((CANVAS_PX, CANVAS_PX))) / frequency**smoothness
    values = np.fft.ifft2(spectrum).real
    low, high = np.percentile(values, [1, 99])
    clouds: Gray = (np.clip((values - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    return clouds


def draw_shapes(rng: np.random.Generator) -> Gray:
    """Return ellipses and rectangles of any gray over one another."""
    image = Image.new("L", (CANVAS_PX, CANVAS_PX), int(rng.integers(256)))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(2, 14))):
        x, y = rng.integers(0, CANVAS_PX, 2)
        half_width, half_height = rng.integers(3, 50, 2)
        corners = (int(x - half_width), int(y - half_height), int(x + half_width), int(y + half_height))
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape(corners, fill=int(rng.integers(256)))
    return np.array(image)


def fit(chests: NDArray[np.float64], drawings: NDArray[np.float64]) -> Fit:
    """Return the ridge fit; radiographs, their other ways and the drawings weigh a third each.

    Args:
        chests: [..., 8, 512], way 0 upright.
        drawings: [M, 8, 512].
    """
    n_edges = chests.shape[-1]
    ways = chests.reshape(-1, Ways, n_edges)
    groups = (ways[:, 0], ways[:, 1:].reshape(-1, n_edges), drawings.reshape(-1, n_edges))
    gram, moment = np.diag([PENALTY] * n_edges + [0.0]), np.zeros(n_edges + 1)
    for target, group in zip((1.0, -1.0, -1.0), groups, strict=True):
        rows = np.column_stack([group, np.ones(len(group))])
        gram += rows.T @ rows / len(rows)
        moment += target * rows.mean(axis=0)
    solution = np.linalg.solve(gram, moment)
    return Fit(solution[:-1], float(solution[-1]))


def out_of_fold(chests: Chests, fitted: Callable[[NDArray[np.float64]], Fit]) -> NDArray[np.float64]:
    """Return [N, 8] scores of the radiographs by fits that saw no image of the same patient."""
    names, index = np.unique(chests.patients, return_inverse=True)
    fold = (np.random.default_rng([SEED, 2]).permutation(len(names)) % N_FOLDS)[index]
    scores = np.empty(chests.ways.shape[1:3])
    for number in range(N_FOLDS):
        scores[fold == number] = fitted(chests.ways[:, fold != number]).scores(chests.ways[0, fold == number])
    return scores


def choose_min_score(upright: NDArray[np.float64]) -> float:
    """Return the strictest score of two digits that refuses none of these radiographs."""
    return math.floor(float(upright.min()) * 100) / 100


def as_json(fitted: Fit, radiographs: Sequence[Radiograph]) -> str:
    """Return the file's text: a line a direction."""
    names = "".join(f"{radiograph.image}\n" for radiograph in radiographs)
    cells = input_guard.N_CELLS**2
    stored = GuardWeights(
        name="edge-directions-1",
        source=SOURCE,
        n_images=len(radiographs),
        n_patients=len({radiograph.patient for radiograph in radiographs}),
        images_sha256=hashlib.sha256(names.encode("ascii")).hexdigest(),
        bias=round(fitted.bias, 4),
        weights=tuple(tuple(row.round(4).tolist()) for row in fitted.weights.reshape(-1, cells)),
    )
    fields = stored.model_dump(exclude={"weights"})
    head = "".join(f"{json.dumps(name)}: {json.dumps(value)},\n" for name, value in fields.items())
    rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in stored.weights)
    return f'{{\n{head}"weights": [\n{rows}\n]\n}}\n'


if __name__ == "__main__":
    run_program(app)
