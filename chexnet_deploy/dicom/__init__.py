"""Results as DICOM, and the node that receives images and sends results."""

from typing import TYPE_CHECKING

from chexnet_deploy import lazy_names

if TYPE_CHECKING:
    from chexnet_deploy.dicom.node.service import run_node
    from chexnet_deploy.dicom.results.reporter import Reporter

__all__ = [
    "Reporter",
    "run_node",
]

__getattr__ = lazy_names(__name__, {"Reporter": "results.reporter", "run_node": "node.service"})
