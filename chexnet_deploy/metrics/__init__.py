"""Statistics on arrays. Knows no file and no data set."""

from typing import TYPE_CHECKING

from chexnet_deploy import lazy_names

if TYPE_CHECKING:
    from chexnet_deploy.metrics.agreement import flips
    from chexnet_deploy.metrics.delong import compare_areas
    from chexnet_deploy.metrics.intervals import clustered_proportion
    from chexnet_deploy.metrics.probabilities import brier_score
    from chexnet_deploy.metrics.roc import auroc, mean_auroc, roc_curve

__all__ = [
    "auroc",
    "brier_score",
    "clustered_proportion",
    "compare_areas",
    "flips",
    "mean_auroc",
    "roc_curve",
]

__getattr__ = lazy_names(
    __name__,
    {
        "auroc": "roc",
        "mean_auroc": "roc",
        "roc_curve": "roc",
        "compare_areas": "delong",
        "clustered_proportion": "intervals",
        "flips": "agreement",
        "brier_score": "probabilities",
    },
)
