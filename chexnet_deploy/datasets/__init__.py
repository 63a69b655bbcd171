"""ChestX-ray14, and anyone's tables: labels, patients, splits, predictions."""

from typing import TYPE_CHECKING

from chexnet_deploy import lazy_names

if TYPE_CHECKING:
    from chexnet_deploy.datasets.chestxray14 import ChestXray14
    from chexnet_deploy.datasets.data_set import DataSet, open_data
    from chexnet_deploy.datasets.findings import FINDINGS
    from chexnet_deploy.datasets.labelled import LabelledImages
    from chexnet_deploy.datasets.predictions import read_predictions

__all__ = [
    "FINDINGS",
    "ChestXray14",
    "DataSet",
    "LabelledImages",
    "open_data",
    "read_predictions",
]

__getattr__ = lazy_names(
    __name__,
    {
        "FINDINGS": "findings",
        "ChestXray14": "chestxray14",
        "DataSet": "data_set",
        "LabelledImages": "labelled",
        "open_data": "data_set",
        "read_predictions": "predictions",
    },
)
