"""How often the image guard refuses radiographs as they are, and how often it lets through what it must not.

    python -m benchmarks.statistics.content_check ROOT --dicom FOLDER      writes results/input-guard.json

The score and its threshold come from train_val (training/fit_content_check.py). "train_val" below is out of fold: every
radiograph is scored by a fit that saw no image of its patient. "test" is the official test list, through `check_image` as it ships.

The committed file also says what simpler scores would let through ("other_scores") and how well left is told from right
("left_right"). Both questions are closed, and their code is gone.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Final

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image

from benchmarks.common import RESULTS, write_results
from benchmarks.statistics.not_chests import drawings, photographs, read_dicom_files
from chexnet_deploy.datasets.chestxray14 import ChestXray14
from chexnet_deploy.datasets.nih_tables import Radiograph
from chexnet_deploy.errors import ImageRefusedError
from chexnet_deploy.images import Gray, read_image
from chexnet_deploy.images.content_check import ImageGuardPolicy, Turn, check_image, score_turns
from chexnet_deploy.metrics.intervals import clustered_proportion
from chexnet_deploy.terminal import run_program
from training.fit_content_check import describe_chests, describe_drawings, fit, is_adult, out_of_fold
from training.phantoms.draw import PhantomSpec, draw_radiograph, plan_studies

ACCEPTED: Final = "accepted"
POLICY: Final = ImageGuardPolicy()
DETECTORS: Final = ((1024, 1024), (2500, 2048), (3056, 2544))

app = typer.Typer(add_completion=False)


@app.command()
def main(
    root: Annotated[Path, typer.Argument(help="ChestX-ray14: tables, split lists and images.")],
    dicom: Annotated[Path, typer.Option(help="Folder of DICOM files, chests and others.")],
    out: Annotated[Path, typer.Option(help="The JSON to write.")] = RESULTS / "input-guard.json",
) -> None:
    """Measure everything and write the JSON."""
    dataset = ChestXray14.open(root)
    train_val, test = dataset.split("train") + dataset.split("val"), dataset.split("test")
    chests, fitted_drawings = describe_chests(train_val), describe_drawings()
    scores = out_of_fold(chests, lambda ways: fit(ways, fitted_drawings))
    files, drawn = read_dicom_files(dicom), drawings() | {"photographs": photographs()}
    results = {
        "policy": POLICY.model_dump(),
        "train_val_out_of_fold": rates(train_val, [verdicts_of_scores(row) for row in scores]),
        "test": rates(test, [judge_all_turns(read(radiograph)) for radiograph in test]),
        "test_changed": changed_rates(test),
        "dicom": {name: describe(gray) for name, gray in files.items()},
        "not_chests": {kind: describe_many(grays) for kind, grays in drawn.items()},
        "phantoms": describe_many(draw_phantoms(n=200, side_px=512)),
        "milliseconds": time_checks(read(train_val[0])),
    }
    typer.echo(write_results(out, results))


def read(radiograph: Radiograph) -> Gray:
    """Return a radiograph's picture."""
    assert radiograph.path is not None  # a split holds images that are on disk
    return read_image(radiograph.path)


def verdict(gray: Gray) -> str:
    """Return "accepted" or the reason of the refusal."""
    try:
        check_image(gray, POLICY)
    except ImageRefusedError as err:
        return err.reason
    return ACCEPTED


def judge_all_turns(gray: Gray) -> list[str]:
    """Return the verdict on the picture lying in each Turn, in their order."""
    turned = [np.rot90(gray, -quarter) for quarter in range(4)]
    return [verdict(np.ascontiguousarray(way)) for way in (*turned, *(255 - way for way in turned))]


def verdicts_of_scores(scores: NDArray[np.float64]) -> list[str]:
    """Return what `judge_all_turns` does from a radiograph's scores alone, [8]: turning a picture only exchanges them."""
    turns = tuple(Turn)
    found = []
    for quarter, negative in ((way % 4, way // 4) for way in range(8)):
        # A picture turned clockwise once more lies as its counterclockwise neighbour's score says.
        seen = [scores[(way - quarter) % 4 + 4 * ((way // 4 + negative) % 2)] for way in range(8)]
        best = int(np.argmax(seen))
        right = ACCEPTED if best == 0 else turns[best].value
        found.append(right if seen[best] >= POLICY.min_score else "not-a-frontal-chest")
    return found


def rates(radiographs: Sequence[Radiograph], verdicts: Sequence[Sequence[str]]) -> dict[str, object]:
    """Return shares with 95 % intervals clustered by patient: refused as they are, and refused in every other Turn."""
    patients = np.array([radiograph.patient for radiograph in radiographs], np.int64)
    adults = np.array([is_adult(radiograph) for radiograph in radiographs])
    refused = np.array([[word != ACCEPTED for word in row] for row in verdicts])
    named = np.array([[word == turn.value for word, turn in zip(row, Turn, strict=True)] for row in verdicts])
    found: dict[str, object] = {
        "falsely_refused": asdict(clustered_proportion(refused[:, 0], patients)),
        "falsely_refused_adults": asdict(clustered_proportion(refused[adults, 0], patients[adults])),
        "falsely_refused_why": dict(Counter(row[0] for row in verdicts if row[0] != ACCEPTED)),
    }
    for way, turn in enumerate(Turn):
        if turn is not Turn.UPRIGHT:
            found[turn.value] = {
                "refused": asdict(clustered_proportion(refused[:, way], patients)),
                "refused_for_this_reason": asdict(clustered_proportion(named[:, way], patients)),
            }
    return found


def changed_rates(radiographs: Sequence[Radiograph]) -> dict[str, object]:
    """Return the share falsely refused after changes that leave a radiograph readable."""
    patients = np.array([radiograph.patient for radiograph in radiographs], np.int64)
    changes: dict[str, Callable[[Gray], Gray]] = {
        "mirrored": lambda gray: np.ascontiguousarray(gray[:, ::-1]),
        "darker (gamma 2)": lambda gray: _gamma(gray, 2.0),
        "brighter (gamma 0.5)": lambda gray: _gamma(gray, 0.5),
        "turned by 10 degrees": lambda gray: np.asarray(Image.fromarray(gray).rotate(10, Image.Resampling.BILINEAR)),
        "cropped by 10 % a side": lambda gray: _crop(gray, 0.1),
        "black margin of 10 % a side": lambda gray: np.pad(gray, len(gray) // 10),
        "squashed to 224 x 224": lambda gray: np.asarray(
            Image.fromarray(gray).resize((224, 224), Image.Resampling.BILINEAR)
        ),
    }
    refused = np.array(
        [[verdict(change(gray)) != ACCEPTED for change in changes.values()] for gray in map(read, radiographs)]
    )
    return {name: asdict(clustered_proportion(refused[:, i], patients)) for i, name in enumerate(changes)}


def _gamma(gray: Gray, gamma: float) -> Gray:
    table = ((np.arange(256) / 255) ** gamma * 255).round().astype(np.uint8)
    changed: Gray = table[gray]
    return changed


def _crop(gray: Gray, share: float) -> Gray:
    """Cut the margins off and enlarge the rest to what it was, so that its size is not what is judged."""
    height_px, width_px = gray.shape
    window = (share * width_px, share * height_px, (1 - share) * width_px, (1 - share) * height_px)
    return np.asarray(Image.fromarray(gray).resize((width_px, height_px), Image.Resampling.BILINEAR, box=window))


def describe(gray: Gray) -> dict[str, object]:
    """Return the verdicts on one picture as it is and however it lies, with its scores."""
    scores = score_turns(gray)
    return {
        "verdict": verdict(gray),
        "accepted_turns": [
            turn.value for turn, word in zip(Turn, judge_all_turns(gray), strict=True) if word == ACCEPTED
        ],
        "score": round(scores[Turn.UPRIGHT], 3),
        "best_score": round(max(scores.values()), 3),
    }


def describe_many(grays: Sequence[Gray]) -> dict[str, object]:
    """Return how many pictures are accepted as they are, and in any Turn."""
    words = [judge_all_turns(gray) for gray in grays]
    return {
        "n": len(grays),
        "accepted": sum(row[0] == ACCEPTED for row in words),
        "accepted_in_any_turn": sum(ACCEPTED in row for row in words),
        "lowest_and_highest_score": [
            round(bound([score_turns(gray)[Turn.UPRIGHT] for gray in grays]), 3) for bound in (min, max)
        ],
        "verdicts": dict(Counter(row[0] for row in words)),
    }


def draw_phantoms(*, n: int, side_px: int) -> list[Gray]:
    """Return n phantom radiographs."""
    spec = PhantomSpec(patients=n, test_patients=0, side_px=side_px, seed=9)
    return [draw_radiograph(study, seed=spec.seed, side_px=side_px) for study in plan_studies(spec)[:n]]


def time_checks(gray: Gray) -> dict[str, float]:
    """Return the median time of `check_image` on detectors' sizes."""
    found = {}
    for height_px, width_px in DETECTORS:
        large = np.asarray(Image.fromarray(gray).resize((width_px, height_px), Image.Resampling.BICUBIC))
        seconds = []
        for _ in range(50):
            start = perf_counter()
            check_image(large, POLICY)
            seconds.append(perf_counter() - start)
        found[f"{height_px} x {width_px}"] = round(median(seconds) * 1000, 2)
    return found


if __name__ == "__main__":
    run_program(app)
