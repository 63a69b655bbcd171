"""Whether operating points chosen on site keep their guarantee: simulated sites whose true rates are known.

    python -m benchmarks.statistics.on_site                    some minutes on one core
    python -m benchmarks.statistics.on_site --table            the committed results as Markdown

A patient has one image or more; the sicker have more. A patient with the finding shows it on one image at least and on each
other by the toss of a coin. Scores of a class are normal with variance 1, half of it the patient's own, so rates of a new
patient's image are integrals over one number. A site draws its patients, each patient one image, and metrics/guarantee.py
chooses; the guarantee is broken where the true rate at the threshold is below what was asked for. A site where nothing
can be guaranteed breaks nothing. Scores rounded to half a standard deviation, with ties everywhere, are the second form.
"""

import json
import math
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from statistics import NormalDist
from time import perf_counter
from typing import Annotated, Final, NamedTuple

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.common import RESULTS
from benchmarks.statistics.coverage import distance
from chexnet_deploy.bundle.site import Rate, rate_name
from chexnet_deploy.evaluation.machine import Machine, describe_machine
from chexnet_deploy.inputs import ReportRecord
from chexnet_deploy.metrics.guarantee import Cut, Shortfall, confirmed_above, draw_one_each, reached_by
from chexnet_deploy.terminal import run_program

OUT: Final = RESULTS / "on-site-cpu.json"
CONFIDENCE: Final = 0.95
HOLDS_BAR: Final = 0.935
LOSS_BAR: Final = 0.05
TARGETS: Final[dict[Rate, float]] = {"sensitivity": 0.95, "specificity": 0.9, "ppv": 0.8, "npv": 0.98}
PREVALENCES: Final = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3)
PATIENTS: Final = (100, 200, 500, 1000, 2000, 5000)
AREA: Final = 0.90
WITHIN: Final = 0.5  # share of a score's variance that is the patient's own
SHOWN: Final = 0.5  # chance of a further image of a patient with the finding to show it
STEP: Final = 0.5  # of rounded scores
LOSS_POSITIVES: Final = 300
LOSS_AREAS: Final = (0.8, 0.9, 0.95, 0.98, 0.99)
LOSS_RATES: Final = (0.8, 0.9, 0.95)

# Sickness, a standard normal number, on a grid with its density.
_SICKNESS: Final = np.linspace(-8.0, 8.0, 3201)
_WEIGHT: Final = np.exp(-(_SICKNESS**2) / 2) / np.exp(-(_SICKNESS**2) / 2).sum()
_ERFC: Final = np.vectorize(math.erfc)

app = typer.Typer(add_completion=False)


class Cell(ReportRecord):
    """What became of the sites of one kind, prevalence and size.

    Attributes:
        n_chosen: sites with an operating point.
        n_broken: of them, those whose true rate is below the target.
        holds: share of all sites whose guarantee is not broken.
        n_too_few: sites refused, as no bound can exist with so few patients.
        n_not_shown: sites refused, as the scores drawn don't show the rate at any threshold.
        median_rate: true rate at the points chosen; None without any.
    """

    rate: Rate
    prevalence: float
    n_patients: int
    is_rounded: bool
    n_chosen: int
    n_broken: int
    holds: float
    n_too_few: int
    n_not_shown: int
    median_rate: float | None


class Loss(ReportRecord):
    """Specificity at the site's true best threshold less that at the one chosen, with LOSS_POSITIVES positive patients.

    Attributes:
        least: what every bound that assumes nothing of the scores loses with as many independent images, to first order:
            the sample's share is off by 1.645 standard errors where it is to hold in 95 % of samples.
    """

    area: float
    sensitivity: float
    mean: float
    median: float
    ninetieth_percentile: float
    least: float


class Results(ReportRecord):
    """The result file."""

    machine: Machine
    n_sites: int
    seconds: float
    area: float
    targets: dict[Rate, float]
    worst: dict[Rate, float]
    missed: tuple[str, ...]
    losses: tuple[Loss, ...]
    cells: tuple[Cell, ...]


class Site(NamedTuple):
    """Patients of one site: scores, truth and lots by image, and whose image it is, each [N]."""

    scores: NDArray[np.float64]
    truth: NDArray[np.bool_]
    patients: NDArray[np.int64]
    lots: NDArray[np.uint64]


class World:
    """The true rates of images of new patients at a threshold."""

    def __init__(self, prevalence: float, area: float) -> None:
        further = _further_images(_SICKNESS)
        shown = SHOWN + (1 - SHOWN) * -np.expm1(-further) / further  # of a positive patient's images, that drawn
        self._positive = prevalence * shown
        self._has_negative = 1 - prevalence * np.exp(-further * (1 - SHOWN))  # else all their images show it
        self._mean = math.sqrt(WITHIN) * _SICKNESS
        self._distance = distance(area)

    def sensitivity(self, threshold: float) -> float:
        """Return the chance of a positive image to lie at or above it."""
        return NormalDist().cdf(self._distance - threshold)

    def specificity(self, threshold: float) -> float:
        """Return the chance of a negative image to lie below it."""
        weight = _WEIGHT * self._has_negative
        return 1 - float(weight @ self._above(threshold, 0.0) / weight.sum())

    def ppv(self, threshold: float) -> float:
        """Return the chance of an image above it to be positive."""
        positive, negative = self._called(threshold)
        return positive / (positive + negative)

    def npv(self, threshold: float) -> float:
        """Return the chance of an image below it to be negative."""
        positive, negative = self._called(threshold)
        share = float(_WEIGHT @ self._positive)
        return (1 - share - negative) / (1 - positive - negative)

    def _called(self, threshold: float) -> tuple[float, float]:
        positive = _WEIGHT @ (self._positive * self._above(threshold, self._distance))
        negative = _WEIGHT @ ((1 - self._positive) * self._above(threshold, 0.0))
        return float(positive), float(negative)

    def _above(self, threshold: float, mean: float) -> NDArray[np.float64]:
        z = (threshold - mean - self._mean) / math.sqrt(1 - WITHIN)
        return np.asarray(_ERFC(z / math.sqrt(2)) / 2)


def draw(prevalence: float, n_patients: int, area: float, generator: np.random.Generator) -> Site:
    """Draw a site's patients."""
    sickness = generator.standard_normal(n_patients)
    n_images = 1 + generator.poisson(_further_images(sickness))
    patients = np.repeat(np.arange(n_patients), n_images)
    is_ill = generator.random(n_patients) < prevalence
    truth = is_ill[patients] & (generator.random(len(patients)) < SHOWN)
    sure = np.cumsum(n_images) - n_images + generator.integers(n_images)
    truth[sure[is_ill]] = True
    own = generator.standard_normal(len(patients))
    scores = math.sqrt(WITHIN) * sickness[patients] + math.sqrt(1 - WITHIN) * own + distance(area) * truth
    return Site(scores, truth, patients, generator.integers(2**63, size=len(patients), dtype=np.uint64))


def choose(site: Site, rate: Rate, target: float) -> Cut | Shortfall:
    """Choose as `chexnet-deploy calibrate` does; the threshold is of the scores as they are, not negated."""
    is_monotone = rate in ("sensitivity", "specificity")
    rows = np.flatnonzero(site.truth == (rate == "sensitivity")) if is_monotone else np.arange(len(site.truth))
    rows = rows[draw_one_each(site.patients[rows], site.lots[rows])]
    sign = 1.0 if rate in ("sensitivity", "ppv") else -1.0
    scores, is_right = sign * site.scores[rows], site.truth[rows] == (rate == "ppv")
    found = (
        reached_by(scores, target, CONFIDENCE) if is_monotone else confirmed_above(scores, is_right, target, CONFIDENCE)
    )
    return found if isinstance(found, Shortfall) else Cut(sign * found.threshold, found.n_patients, found.n_wrong)


def true_rate(world: World, rate: Rate, threshold: float, step: float) -> float:
    """Return the rate of new patients; of scores rounded to `step`, 0 for none, a threshold stands for the edge beside it."""
    # Sensitivity counts scores at the threshold as called, specificity as not called; PPV and NPV leave them out.
    edge = {"sensitivity": -0.5, "specificity": 0.5, "ppv": 0.5, "npv": -0.5}[rate] * step
    rates: dict[Rate, Callable[[float], float]] = {
        "sensitivity": world.sensitivity,
        "specificity": world.specificity,
        "ppv": world.ppv,
        "npv": world.npv,
    }
    return rates[rate](threshold + edge)


def simulate(prevalence: float, n_patients: int, *, is_rounded: bool, n_sites: int, seed: Sequence[int]) -> list[Cell]:
    """Return the cells of one prevalence and size."""
    generator, world, step = np.random.default_rng(seed), World(prevalence, AREA), STEP if is_rounded else 0.0
    found: dict[Rate, list[float | Shortfall]] = {rate: [] for rate in TARGETS}
    for _ in range(n_sites):
        site = draw(prevalence, n_patients, AREA, generator)
        if is_rounded:
            site = site._replace(scores=np.round(site.scores / STEP) * STEP)
        for rate, target in TARGETS.items():
            cut = choose(site, rate, target)
            found[rate].append(cut if isinstance(cut, Shortfall) else true_rate(world, rate, cut.threshold, step))
    cells = []
    for rate, each in found.items():
        truths = np.array([value for value in each if not isinstance(value, Shortfall)])
        n_too_few = sum(isinstance(value, Shortfall) and value.is_certain for value in each)
        n_broken = int((truths < TARGETS[rate]).sum())
        cells.append(
            Cell(
                rate=rate,
                prevalence=prevalence,
                n_patients=n_patients,
                is_rounded=is_rounded,
                n_chosen=truths.size,
                n_broken=n_broken,
                holds=1 - n_broken / n_sites,
                n_too_few=n_too_few,
                n_not_shown=n_sites - truths.size - n_too_few,
                median_rate=float(np.median(truths)) if truths.size else None,
            )
        )
    return cells


def measure_loss(area: float, sensitivity: float, n_sites: int, seed: Sequence[int]) -> Loss:
    """Return what a guaranteed sensitivity costs of specificity, with LOSS_POSITIVES positive patients."""
    generator, world = np.random.default_rng(seed), World(0.0, area)
    normal, gap = NormalDist(), distance(area)

    def specificity_at(rate: float) -> float:
        return world.specificity(gap - normal.inv_cdf(rate))

    losses = []
    for _ in range(n_sites):
        # With prevalence 1 every patient is positive.
        cut = choose(draw(1.0, LOSS_POSITIVES, area, generator), "sensitivity", sensitivity)
        assert isinstance(cut, Cut)
        losses.append(specificity_at(sensitivity) - world.specificity(cut.threshold))
    error = math.sqrt(sensitivity * (1 - sensitivity) / LOSS_POSITIVES)
    return Loss(
        area=area,
        sensitivity=sensitivity,
        mean=float(np.mean(losses)),
        median=float(np.median(losses)),
        ninetieth_percentile=float(np.quantile(losses, 0.9)),
        least=specificity_at(sensitivity) - specificity_at(sensitivity + normal.inv_cdf(CONFIDENCE) * error),
    )


def markdown(results: Results) -> str:
    """Return the tables of docs/on-site.md."""
    lines = [
        "| rate | holds, worst of the cells | cells with a choice | sites refused for too few | not shown |",
        "|---|---|---|---|---|",
    ]
    for rate, target in results.targets.items():
        cells = [cell for cell in results.cells if cell.rate == rate]
        n = results.n_sites * len(cells)
        lines.append(
            f"| {rate_name(rate)} {100 * target:g} % | {100 * results.worst[rate]:.1f} % "
            f"| {sum(cell.n_chosen > 0 for cell in cells)} of {len(cells)} "
            f"| {100 * sum(cell.n_too_few for cell in cells) / n:.0f} % "
            f"| {100 * sum(cell.n_not_shown for cell in cells) / n:.0f} % |"
        )
    lines += [
        "",
        f"| AUROC | {' | '.join(f'sensitivity {100 * rate:g} %' for rate in LOSS_RATES)} |",
        "|---|" + "---|" * len(LOSS_RATES),
    ]
    for area in LOSS_AREAS:
        row = [loss for loss in results.losses if loss.area == area]
        lines.append(f"| {area:g} | {' | '.join(f'{100 * each.mean:.1f} ({100 * each.least:.1f})' for each in row)} |")
    return "\n".join(lines)


def _further_images(sickness: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean number of images beside the first."""
    return np.asarray(1.5 * np.exp(0.5 * sickness))


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = OUT,
    sites: Annotated[int, typer.Option(min=100, help="Simulated sites of each cell.")] = 1000,
    table: Annotated[
        bool, typer.Option("--table", help="Print the committed results as Markdown; simulate nothing.")
    ] = False,
) -> None:
    """Simulate and write the result."""
    if table:
        typer.echo(markdown(Results.model_validate_json(OUT.read_text())))
        return
    start = perf_counter()
    cells = list[Cell]()
    for place, (prevalence, n_patients, is_rounded) in enumerate(product(PREVALENCES, PATIENTS, (False, True))):
        fresh = simulate(prevalence, n_patients, is_rounded=is_rounded, n_sites=sites, seed=(1, place))
        cells += fresh
        typer.echo(
            f"{prevalence:6.3f} {n_patients:5} {'rounded' if is_rounded else '       '} "
            + "  ".join(f"{cell.rate} {cell.n_chosen:4} chosen {cell.holds:.3f}" for cell in fresh)
        )
    losses = [
        measure_loss(area, rate, sites, (2, place))
        for place, (area, rate) in enumerate(product(LOSS_AREAS, LOSS_RATES))
    ]
    missed = [
        f"{cell.rate}, prevalence {cell.prevalence:g}, {cell.n_patients} patients: holds in {100 * cell.holds:.1f} %"
        for cell in cells
        if cell.holds < HOLDS_BAR
    ] + [
        f"sensitivity {each.sensitivity:g}, AUROC {each.area:g}: {100 * each.mean:.1f} points of specificity lost"
        for each in losses
        if each.mean > LOSS_BAR
    ]
    results = Results(
        machine=describe_machine(),
        n_sites=sites,
        seconds=perf_counter() - start,
        area=AREA,
        targets=TARGETS,
        worst={rate: min(cell.holds for cell in cells if cell.rate == rate) for rate in TARGETS},
        missed=tuple(missed),
        losses=tuple(losses),
        cells=tuple(cells),
    )
    out.write_text(results.model_dump_json(indent=1) + "\n")
    typer.echo(json.dumps({"seconds": results.seconds, "worst": results.worst, "missed": missed}, indent=1))
    typer.echo(markdown(results))


if __name__ == "__main__":
    run_program(app)
