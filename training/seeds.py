"""How much two trainings of one recipe differ that differ in their seed alone: the yardstick for what quantising may change.

Zech et al. 2019 (arXiv 1912.03606) found CheXNets whose predictions for one patient differ widely between seeds.
"""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from chexnet_deploy.datasets.data_set import open_data
from chexnet_deploy.export.from_torch.checkpoint import Checkpoint, read_checkpoint
from chexnet_deploy.export.from_torch.model import Normalise
from chexnet_deploy.files import write_file
from chexnet_deploy.metrics.agreement import observed_quantile
from chexnet_deploy.metrics.roc import auroc
from chexnet_deploy.runtime.sessions.base import sigmoid
from training.batches import TrainingImages
from training.recipe import Recipe
from training.train import BEST, CACHE, Options, read_images, validation_logits

SEED_NOISE = "seed_noise.json"


class FindingNoise(BaseModel):
    """One finding over the runs; AUROCs on validation patients, None where one class is missing."""

    model_config = ConfigDict(frozen=True)

    finding: str
    aurocs: tuple[float, ...] | None
    auroc_mean: float | None
    auroc_sd: float | None


class SeedNoise(BaseModel):
    """Runs of one recipe side by side.

    Attributes:
        mean_auroc_sd: standard deviation over runs of the mean AUROC over defined findings.
        median_abs_probability_difference: between two runs, over images, findings and pairs of runs; so are the next two.
        flip_share: of decisions at each run's own operating points that differ between two runs.
    """

    model_config = ConfigDict(frozen=True)

    seeds: tuple[int, ...]
    n_images: int
    findings: tuple[FindingNoise, ...]
    mean_auroc_sd: float | None
    median_abs_probability_difference: float
    p999_abs_probability_difference: float
    max_abs_probability_difference: float
    flip_share: float | None


def measure_seed_noise(root: Path, recipe: Recipe, out: Path, seeds: Sequence[int], options: Options) -> SeedNoise:
    """Compare finished runs in `out`/seed-S on the validation patients, and write seed_noise.json.

    Args:
        root: ChestX-ray14 on disk.
        recipe: of all runs, but for the seed.
        out: the runs' folder.
        seeds: two at the least.
        options: of the runs.

    Raises:
        DatasetError, CheckpointError: the data or a run can't be read.
    """
    val = read_images(open_data(root), recipe, options.cache or out / CACHE)["val"]
    checkpoints = [read_checkpoint(out / f"seed-{seed}" / BEST) for seed in seeds]
    probabilities = np.stack([_probabilities(checkpoint, val) for checkpoint in checkpoints])
    areas = {
        name: [auroc(run[val.labelled[:, c], c], val.truth[val.labelled[:, c], c] > 0) for run in probabilities]
        for c, name in enumerate(recipe.findings)
    }
    defined = {name: values for name, values in areas.items() if not np.isnan(values).any()}
    gaps = np.concatenate([np.abs(a - b).ravel() for a, b in combinations(probabilities, 2)])
    noise = SeedNoise(
        seeds=tuple(seeds),
        n_images=len(val.rows),
        findings=tuple(_noise_of(name, defined.get(name)) for name in recipe.findings),
        mean_auroc_sd=stdev(mean(run) for run in zip(*defined.values(), strict=True)) if defined else None,
        median_abs_probability_difference=float(np.median(gaps)),
        p999_abs_probability_difference=observed_quantile(gaps, 0.999),
        max_abs_probability_difference=float(gaps.max()),
        flip_share=_flip_share(checkpoints, probabilities, recipe.findings),
    )
    write_file(out / SEED_NOISE, (noise.model_dump_json(indent=1) + "\n").encode())
    return noise


def _probabilities(checkpoint: Checkpoint, val: TrainingImages) -> NDArray[np.float32]:
    normalise = Normalise(checkpoint.manifest.preprocessing)
    return sigmoid(validation_logits(checkpoint.model.eval(), normalise, val, torch.device("cpu")))


def _noise_of(name: str, areas: list[float] | None) -> FindingNoise:
    if areas is None:
        return FindingNoise(finding=name, aurocs=None, auroc_mean=None, auroc_sd=None)
    return FindingNoise(finding=name, aurocs=tuple(areas), auroc_mean=mean(areas), auroc_sd=stdev(areas))


def _flip_share(
    checkpoints: Sequence[Checkpoint], probabilities: NDArray[np.float32], findings: Sequence[str]
) -> float | None:
    shared = [c for c, name in enumerate(findings) if all(name in x.manifest.operating_points for x in checkpoints)]
    if not shared:
        return None
    decisions = [
        run[:, shared] >= [checkpoint.manifest.operating_points[findings[c]] for c in shared]
        for checkpoint, run in zip(checkpoints, probabilities, strict=True)
    ]
    return float(np.mean([(a != b).mean() for a, b in combinations(decisions, 2)]))
