"""What intervals and tests of AUROC differences are worth: simulated studies whose truth is known.

    python -m benchmarks.statistics.coverage --out benchmarks/results/coverage-cpu.json      about three minutes on one core

Two models score the same images of the same patients. Within a class their scores are bivariate normal, so an area is
Phi(distance / sqrt(2)) exactly; patients have one to many images whose labels and scores go together. Each scenario is
drawn once with equal models, which gives power, and once with a candidate worse by exactly the margin, which gives the
type I error. The coverage bar holds for both. A plain Wald interval (normal quantiles) on the same variance stands beside.
"""

import math
from pathlib import Path
from statistics import NormalDist, median
from time import perf_counter
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from benchmarks.common import RESULTS
from chexnet_deploy.evaluation.machine import Machine, describe_machine
from chexnet_deploy.inputs import ReportRecord
from chexnet_deploy.metrics.delong import compare_all, compare_areas
from chexnet_deploy.metrics.intervals import ALPHA, PairedDifference
from chexnet_deploy.terminal import run_program

COVERAGE_BAR = (0.94, 0.96)
TYPE_I_BAR = 0.03
N_TEST_IMAGES, N_TEST_PATIENTS, N_FINDINGS = 25_596, 2_797, 14  # ChestX-ray14's official test split

app = typer.Typer(add_completion=False)
Study = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_], NDArray[np.int64]]


class Scenario(ReportRecord):
    """How studies are drawn.

    Attributes:
        area: true AUROC of the reference.
        margin: the largest loss accepted; the candidate's true loss in the type I studies.
        correlation: of the two models' scores within a class.
        positive_patients: fewest and most with the finding on at least one image; on every other image of theirs by the
            toss of a coin.
        images_per_patient: mean of a geometric number, at least one.
        within_patient: correlation of one model's scores between images of a patient.
        is_gross: the loss comes from a few positives scored as if negative, not from a shift of all.
    """

    name: str
    area: float
    margin: float
    correlation: float
    n_patients: int
    positive_patients: tuple[int, int]
    images_per_patient: float = 4.0
    within_patient: float = 0.5
    is_gross: bool = False


SCENARIOS = (
    Scenario(
        name="200 positive patients",
        area=0.80,
        margin=0.005,
        correlation=0.99,
        n_patients=600,
        positive_patients=(200, 200),
    ),
    Scenario(
        name="200, area 0.98", area=0.98, margin=0.005, correlation=0.999, n_patients=600, positive_patients=(200, 200)
    ),
    Scenario(
        name="20-30 positive patients",
        area=0.80,
        margin=0.005,
        correlation=0.999,
        n_patients=300,
        positive_patients=(20, 30),
    ),
    Scenario(
        name="20-30, area 0.98", area=0.98, margin=0.005, correlation=0.999, n_patients=300, positive_patients=(20, 30)
    ),
    Scenario(
        name="20-30, area 0.98, noisy",
        area=0.98,
        margin=0.005,
        correlation=0.955,
        n_patients=300,
        positive_patients=(20, 30),
    ),
    Scenario(
        name="20-30, area 0.98, one image each",
        area=0.98,
        margin=0.005,
        correlation=0.999,
        n_patients=300,
        positive_patients=(20, 30),
        images_per_patient=1.0,
    ),
    Scenario(
        name="20-30, area 0.75, noisy",
        area=0.75,
        margin=0.01,
        correlation=0.98,
        n_patients=300,
        positive_patients=(20, 30),
    ),
    Scenario(
        name="rare finding",
        area=0.91,
        margin=0.02,
        correlation=0.995,
        n_patients=1000,
        positive_patients=(20, 30),
        images_per_patient=3.0,
    ),
    Scenario(
        name="exactly 20 positive patients",
        area=0.90,
        margin=0.01,
        correlation=0.99,
        n_patients=200,
        positive_patients=(20, 20),
        images_per_patient=2.0,
        within_patient=0.8,
    ),
    Scenario(
        name="few negatives",
        area=0.85,
        margin=0.01,
        correlation=0.99,
        n_patients=60,
        positive_patients=(25, 25),
        images_per_patient=2.0,
        within_patient=0.7,
    ),
    Scenario(
        name="200, gross failures",
        area=0.80,
        margin=0.01,
        correlation=0.999,
        n_patients=600,
        positive_patients=(200, 200),
        is_gross=True,
    ),
)


class Rates(ReportRecord):
    """Shares of one scenario's studies; the Monte Carlo standard error is 0.002 with 10,000.

    Attributes:
        coverage_equal: 95 % intervals that hold the true difference where it is 0.
        coverage_worse: where it is -margin.
        type_i_error: non-inferior at one-sided 0.025 where the candidate is worse by the margin.
        power: non-inferior where the models are equal.
        wald_*: the same of difference +- 1.96 standard errors.
        area_coverage: 95 % intervals of the reference's area that hold it.
        variance_ratio: mean estimated variance of the difference over its variance between studies, equal models.
        mean_difference_worse: between studies where the truth is -margin.
    """

    coverage_equal: float
    coverage_worse: float
    type_i_error: float
    power: float
    wald_coverage_equal: float
    wald_coverage_worse: float
    wald_type_i_error: float
    wald_power: float
    area_coverage: float
    variance_ratio: float
    mean_difference_worse: float

    @property
    def shortfalls(self) -> list[str]:
        """The bars missed, in words."""
        low, high = COVERAGE_BAR
        missed = [
            f"coverage {100 * share:.2f} % {where}"
            for where, share in (("of equal models", self.coverage_equal), ("at the margin", self.coverage_worse))
            if not low <= share <= high
        ]
        return missed + ([f"type I {100 * self.type_i_error:.2f} %"] if self.type_i_error > TYPE_I_BAR else [])


class Speed(ReportRecord):
    """All findings of the official test split's size, two models, clustered by patient, on one core.

    Attributes:
        bootstrap_s: scikit-learn's areas over resampled patients, 2000 times; extrapolated from 100.
    """

    n_images: int
    n_patients: int
    n_findings: int
    compare_all_s: float
    bootstrap_s: float


class Coverage(ReportRecord):
    """The result file."""

    machine: Machine
    n_studies: int
    seconds: float
    scenarios: dict[str, Scenario]
    rates: dict[str, Rates]
    shortfalls: dict[str, list[str]]
    speed: Speed


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = RESULTS / "coverage-cpu.json",
    studies: Annotated[int, typer.Option(min=100, help="Simulated studies of each scenario and truth.")] = 10_000,
) -> None:
    """Simulate, print a table and write the result."""
    start = perf_counter()
    rates = {}
    typer.echo(f"{'scenario':<34}  cover =  cover -m  type I   power | Wald: cover =  cover -m  type I   power")
    for number, scenario in enumerate(SCENARIOS):
        found = rates[scenario.name] = simulate(scenario, studies, seed=number)
        cells = [found.coverage_equal, found.coverage_worse, found.type_i_error, found.power]
        plain = [found.wald_coverage_equal, found.wald_coverage_worse, found.wald_type_i_error, found.wald_power]
        text = "  ".join(f"{100 * cell:7.2f}" for cell in cells)
        typer.echo(f"{scenario.name:<34}  {text} |     {'  '.join(f'{100 * cell:7.2f}' for cell in plain)}")
    result = Coverage(
        machine=describe_machine(),
        n_studies=studies,
        seconds=perf_counter() - start,
        scenarios={scenario.name: scenario for scenario in SCENARIOS},
        rates=rates,
        shortfalls={name: found.shortfalls for name, found in rates.items() if found.shortfalls},
        speed=measure_speed(),
    )
    out.write_text(result.model_dump_json(indent=1) + "\n")
    for name, missed in result.shortfalls.items():
        typer.echo(f"misses a bar: {name}: {', '.join(missed)}")
    speed = result.speed
    typer.echo(f"compare_all {speed.compare_all_s:.3f} s, scikit-learn's bootstrap {speed.bootstrap_s:.0f} s")


def simulate(scenario: Scenario, n_studies: int, seed: int) -> Rates:
    """Return how often intervals and tests are right in one scenario."""
    generator = np.random.default_rng(seed)
    equal, worse = (
        [compare_areas(*draw(scenario, loss, generator)) for _ in range(n_studies)] for loss in (0.0, scenario.margin)
    )
    margin = scenario.margin
    p_equal, p_worse = _p(equal, 0.0), _p(worse, margin)
    wald_equal, wald_worse = _wald_p(equal, 0.0), _wald_p(worse, margin)
    intervals = np.array([found.reference.interval() for found in equal])
    differences = np.array([found.difference for found in equal])
    return Rates(
        coverage_equal=_held(p_equal),
        coverage_worse=_held(p_worse),
        type_i_error=float((p_worse < ALPHA).mean()),
        power=float((_p(equal, margin) < ALPHA).mean()),
        wald_coverage_equal=_held(wald_equal),
        wald_coverage_worse=_held(wald_worse),
        wald_type_i_error=float((wald_worse < ALPHA).mean()),
        wald_power=float((_wald_p(equal, margin) < ALPHA).mean()),
        area_coverage=float(((intervals[:, 0] <= scenario.area) & (scenario.area <= intervals[:, 1])).mean()),
        variance_ratio=float(np.mean([found.variance for found in equal]) / differences.var()),
        mean_difference_worse=float(np.mean([found.difference for found in worse])),
    )


def draw(scenario: Scenario, loss: float, generator: np.random.Generator) -> Study:
    """Return one study: scores of the reference and the candidate, truth and patients, each [N]."""
    images = generator.geometric(1 / scenario.images_per_patient, scenario.n_patients)
    patients = np.repeat(np.arange(scenario.n_patients), images)
    fewest, most = scenario.positive_patients
    ill = generator.choice(scenario.n_patients, generator.integers(fewest, most + 1), replace=False)
    truth = np.isin(patients, ill) & (generator.random(len(patients)) < 0.5)
    truth[(np.cumsum(images) - images + generator.integers(images))[ill]] = True

    def noise() -> NDArray[np.float64]:
        shared = generator.standard_normal(scenario.n_patients)[patients]
        own = generator.standard_normal(len(patients))
        return math.sqrt(scenario.within_patient) * shared + math.sqrt(1 - scenario.within_patient) * own

    first, r = noise(), scenario.correlation
    second = r * first + math.sqrt(1 - r**2) * noise()
    if not scenario.is_gross:
        return first + distance(scenario.area) * truth, second + distance(scenario.area - loss) * truth, truth, patients
    # A positive scored as a negative wins half of its pairs, so this share of them costs exactly the loss.
    is_lost = generator.random(len(patients)) < loss / (scenario.area - 0.5)
    second = np.where(truth & is_lost, noise(), second + distance(scenario.area) * truth)
    return first + distance(scenario.area) * truth, second, truth, patients


def distance(area: float) -> float:
    """Return how far apart two normal classes of unit variance are for that area."""
    return math.sqrt(2) * NormalDist().inv_cdf(area)


def measure_speed() -> Speed:
    """Time `compare_all` on as many images as the official test split has, beside a bootstrap with scikit-learn."""
    generator = np.random.default_rng(0)
    patients = np.sort(generator.integers(N_TEST_PATIENTS, size=N_TEST_IMAGES))
    # From Hernia, 0.3 % of the images, to Infiltration, 24 %.
    truth = generator.random((N_TEST_IMAGES, N_FINDINGS)) < np.geomspace(0.003, 0.24, N_FINDINGS)
    reference = (generator.standard_normal(truth.shape) + truth).astype(np.float32)
    candidate = (reference + 0.03 * generator.standard_normal(truth.shape)).astype(np.float32)
    times = []
    for _ in range(11):
        start = perf_counter()
        compare_all(reference, candidate, truth, patients)
        times.append(perf_counter() - start)
    images_of = np.split(np.arange(N_TEST_IMAGES), np.searchsorted(patients, np.arange(1, N_TEST_PATIENTS)))
    start = perf_counter()
    for _ in range(100):
        drawn = np.concatenate([images_of[i] for i in generator.integers(N_TEST_PATIENTS, size=N_TEST_PATIENTS)])
        for c in range(N_FINDINGS):
            for scores in (reference, candidate):
                roc_auc_score(truth[drawn, c], scores[drawn, c])
    return Speed(
        n_images=N_TEST_IMAGES,
        n_patients=N_TEST_PATIENTS,
        n_findings=N_FINDINGS,
        compare_all_s=median(times),
        bootstrap_s=20 * (perf_counter() - start),
    )


def _p(found: list[PairedDifference], margin: float) -> NDArray[np.float64]:
    """Return p-values against a true difference of -margin."""
    # 0 +- 0, of equal rankings, holds a true difference of 0, though it shows no superiority.
    return np.array(
        [0.5 if margin == each.variance == each.difference == 0 else each.non_inferiority_p(margin) for each in found]
    )


def _wald_p(found: list[PairedDifference], margin: float) -> NDArray[np.float64]:
    z = [(each.difference + margin) / math.sqrt(each.variance) for each in found if each.variance > 0]
    without = [0.5 if margin == each.difference == 0 else 0.0 for each in found if each.variance == 0]
    return np.array([1 - NormalDist().cdf(value) for value in z] + without)


def _held(p: NDArray[np.float64]) -> float:
    """Return the share of 95 % intervals that hold the truth, from one-sided p-values against it."""
    return float(((p >= ALPHA) & (p <= 1 - ALPHA)).mean())


if __name__ == "__main__":
    run_program(app)
