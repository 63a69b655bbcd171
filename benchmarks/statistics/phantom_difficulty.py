"""How much of a phantom's findings a thumbnail gives away: logistic regression on 16x16 pixels, beside CheXNet.

    python -m benchmarks.statistics.phantom_difficulty demo      reads demo/phantom and demo/bench of `make demo`

Findings that a thumbnail shows would be cartoons: the network must be far better than this on the same test patients.
"""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from benchmarks.common import RESULTS
from chexnet_deploy.datasets import FINDINGS, ChestXray14, LabelledImages
from chexnet_deploy.images.reader import read_image
from chexnet_deploy.inputs import ReportRecord
from chexnet_deploy.metrics.roc import auroc, mean_auroc
from chexnet_deploy.terminal import run_program

THUMBNAIL_PX = 16
INVERSE_PENALTIES = (0.001, 0.01, 0.1)
OUT = RESULTS / "phantom-difficulty.json"

app = typer.Typer(add_completion=False)


class Difficulty(ReportRecord):
    """CheXNet and thumbnails on the same test images; AUROCs are means over the findings."""

    n_test_images: int
    fewest_positive_patients: int
    thumbnail_mean_auroc: float
    thumbnail_auroc: dict[str, float]
    chexnet_mean_auroc: dict[str, float]


@app.command()
def main(demo: Annotated[Path, typer.Argument(help="The folder `make demo` wrote.")] = Path("demo")) -> None:
    """Measure and write the result."""
    OUT.write_text(measure_difficulty(demo).model_dump_json(indent=1) + "\n")
    typer.echo(OUT.read_text())


def measure_difficulty(demo: Path) -> Difficulty:
    """Measure thumbnails on the test patients of a demo, and read what its CheXNet reached there."""
    dataset = ChestXray14.open(demo / "phantom")
    train, test = (LabelledImages.of(dataset.split(name), FINDINGS) for name in ("train", "test"))
    areas = thumbnail_areas(train, test)
    report = json.loads((demo / "bench" / "report.json").read_text())
    return Difficulty(
        n_test_images=len(test.names),
        fewest_positive_patients=min(len(np.unique(test.patients[test.truth[:, c]])) for c in range(len(FINDINGS))),
        thumbnail_mean_auroc=mean_auroc(areas).value,
        thumbnail_auroc=areas,
        chexnet_mean_auroc={e["name"]: e["parity"]["mean_auroc_candidate"] for e in report["engines"]},
    )


def thumbnail_areas(train: LabelledImages, test: LabelledImages) -> dict[str, float]:
    """Return the test AUROC of each finding, with the penalty that is best *on the test set*: an upper bound."""
    scaler = StandardScaler()
    x_train, x_test = scaler.fit_transform(_thumbnails(train)), scaler.transform(_thumbnails(test))
    best: dict[str, float] = {}
    for penalty in INVERSE_PENALTIES:
        areas = {}
        for c, finding in enumerate(FINDINGS):
            model = LogisticRegression(C=penalty, max_iter=2000).fit(x_train, train.truth[:, c])
            areas[finding] = auroc(model.decision_function(x_test), test.truth[:, c])
        if not best or mean_auroc(areas).value > mean_auroc(best).value:
            best = areas
    return best


def _thumbnails(images: LabelledImages) -> NDArray[np.float64]:
    rows = []
    for path in images.paths:
        small = Image.fromarray(read_image(path)).resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BILINEAR)
        rows.append(np.asarray(small, np.float64).ravel())
    return np.stack(rows)


if __name__ == "__main__":
    run_program(app)
