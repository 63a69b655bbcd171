"""Operating points chosen on one half of real patients and looked at on the other half: as often right as the theory says?

    python -m benchmarks.statistics.on_site_real BUNDLE --data ROOT       the validation patients of ChestX-ray14

Patients are halved at random many times. What a half's threshold does on as many new patients is known exactly, whatever the
scores: misses are beta-binomial (the order statistic's rate is Beta(wrong + 1, patients - wrong)). So the share of halvings
whose other half falls short of the target, by its own chance too, has an expectation, which stands beside it.
"""

from pathlib import Path
from typing import Annotated, Final

import numpy as np
import typer
from scipy.stats import betabinom

from benchmarks.common import RESULTS, write_results
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.site import Rate
from chexnet_deploy.evaluation.request import EvaluationRequest
from chexnet_deploy.evaluation.sources import run_engine
from chexnet_deploy.metrics.guarantee import Cut, draw_one_each, fewest_patients, reached_by
from chexnet_deploy.runtime.sessions.base import sigmoid
from chexnet_deploy.terminal import run_program

OUT: Final = RESULTS / "on-site-real.json"
CONFIDENCE: Final = 0.95
TARGETS: Final[dict[Rate, float]] = {"sensitivity": 0.9, "specificity": 0.9}

app = typer.Typer(add_completion=False)


@app.command()
def main(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    data: Annotated[Path, typer.Option(help="ChestX-ray14.")],
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = OUT,
    halvings: Annotated[int, typer.Option(min=10, help="Random halves of each finding's patients.")] = 1000,
) -> None:
    """Run the bundle on validation patients, halve them, and write the result."""
    opened = Bundle.open(bundle)
    request = EvaluationRequest(engine=bundle, data=data, split="val", provider="cpu")
    labelled = run_engine(opened, request, lambda phase, done, total: None).labelled
    probabilities, generator = sigmoid(labelled.scores), np.random.default_rng(0)
    lots = generator.integers(2**63, size=len(labelled.names), dtype=np.uint64)
    rows = []
    for rate, target in TARGETS.items():
        needed = fewest_patients(target, CONFIDENCE)
        for c, finding in enumerate(labelled.findings):
            of_class = np.flatnonzero(labelled.truth[:, c] == (rate == "sensitivity"))
            drawn = of_class[draw_one_each(labelled.patients[of_class], lots[of_class])]
            if drawn.size // 2 < needed:
                continue
            scores = probabilities[drawn, c] if rate == "sensitivity" else -probabilities[drawn, c]
            seen, expected = [], []
            for _ in range(halvings):
                order = generator.permutation(drawn.size)
                first, second = scores[order[: drawn.size // 2]], scores[order[drawn.size // 2 :]]
                cut = reached_by(first, target, CONFIDENCE)
                assert isinstance(cut, Cut)  # there are enough
                seen.append(float((second >= cut.threshold).mean()))
                most = int((1 - target) * second.size + 1e-9)
                n_below = cut.n_wrong + 1, first.size - cut.n_wrong
                expected.append(float(betabinom.sf(most, second.size, *n_below)))
            below = float(np.mean([share < target for share in seen]))
            rows.append(
                {
                    "rate": rate,
                    "target": target,
                    "finding": finding,
                    "patients_of_each_half": drawn.size // 2,
                    "mean_of_other_half": float(np.mean(seen)),
                    "other_half_below_target": below,
                    "expected_below_target": float(np.mean(expected)),
                }
            )
            typer.echo(rows[-1])
    write_results(
        out,
        {
            "bundle": opened.id,
            "images": len(labelled.names),
            "patients": np.unique(labelled.patients).size,
            "halvings": halvings,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    run_program(app)
