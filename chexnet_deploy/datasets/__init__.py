"""ChestX-ray14, and anyone's tables: labels, patients, splits, predictions."""

from typing import TYPE_CHECKING

from chexnet_deploy import lazy_names

if TYPE_CHECKING:
    from chexnet_deploy.datasets.chestxray14 import ChestXray14
    from chexnet_deploy.datasets.findings import FINDINGS
    from chexnet_deploy.datasets.labelled import LabelledImages
    from chexnet_deploy.datasets.predictions import read_predictions

__all__ = [
    "FINDINGS",
    "ChestXray14",
    "LabelledImages",
    "read_predictions",
]

__getattr__ = lazy_names(
    __name__,
    {
        "FINDINGS": "findings",
        "ChestXray14": "chestxray14",
        "LabelledImages": "labelled",
        "read_predictions": "predictions",
    },
)
