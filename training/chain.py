"""The whole chain on one data set, as the demo runs it.

train -> export fp32, fp16, int8 -> bench all three beside fp32; everything lies in one folder.
"""

from pathlib import Path

from chexnet_deploy.bundle.manifest import Precision
from chexnet_deploy.errors import OnPhase
from chexnet_deploy.evaluation import bench
from chexnet_deploy.evaluation.bench_report import BenchReport
from chexnet_deploy.evaluation.engines import Effort
from chexnet_deploy.export.chain import export_bundles
from training.recipe import read_recipe
from training.train import train

RUN, BUNDLES, BENCH = "run", "bundles", "bench"


def train_export_bench(
    data: Path,
    recipe: str,
    folder: Path,
    *,
    n_calibration_images: int,
    effort: Effort,
    on_phase: OnPhase,
) -> BenchReport:
    """Run the chain and return the report on the test patients.

    Args:
        data: in ChestX-ray14's layout.
        recipe: the name of one in training/recipes, or a path to a .toml.
        folder: gets run/, bundles/ and bench/.
        n_calibration_images: chosen from the training patients.
        effort: how long to measure speed.
        on_phase: told of every step.

    Raises:
        ChexnetError: any step refused.
    """
    best = train(data, read_recipe(recipe), folder / RUN, on_phase)
    bundles = export_bundles(
        best,
        folder / BUNDLES,
        tuple(Precision),
        data_root=data,
        calibration_list=None,
        n_calibration_images=n_calibration_images,
        dialects=("typed", "cpu"),
        on_phase=on_phase,
    )
    return bench(
        [bundle.path for bundle in bundles],
        bundles[0].path,
        data,
        "test",
        None,
        None,
        folder / BENCH,
        effort=effort,
        threads=None,
        provider="auto",
        with_html=True,
        on_phase=on_phase,
    )
