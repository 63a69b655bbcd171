"""Take CheXNet from PyTorch weights to a scanner and prove at every step that nothing was lost.

The runtime is `Predictor`: open a bundle, hand it radiographs, get named probabilities. It needs numpy, pillow and pydantic,
and a backend when a bundle is opened.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chexnet_deploy.bundle import Bundle
    from chexnet_deploy.errors import ChexnetError, ImageError
    from chexnet_deploy.findings import FINDINGS
    from chexnet_deploy.images import read_image
    from chexnet_deploy.manifest import Manifest, Precision
    from chexnet_deploy.predictor import Prediction, Predictor, draw_cam
    from chexnet_deploy.preprocessing import Preprocessing
    from chexnet_deploy.sessions import open_session
    from chexnet_deploy.signing.trust import Trust

__version__ = "0.1.0"

__all__ = [
    "FINDINGS",
    "Bundle",
    "ChexnetError",
    "ImageError",
    "Manifest",
    "Precision",
    "Prediction",
    "Predictor",
    "Preprocessing",
    "Trust",
    "draw_cam",
    "open_session",
    "read_image",
]

# A name's module is imported when the name is first used (PEP 562): numpy and pydantic's schemas take half a second on a
# small box, and `chexnet-deploy --help` or a caller that wants one error class needs neither.
_HOMES = {
    "FINDINGS": "findings",
    "Bundle": "bundle",
    "ChexnetError": "errors",
    "ImageError": "errors",
    "Manifest": "manifest",
    "Precision": "manifest",
    "Prediction": "predictor",
    "Predictor": "predictor",
    "Preprocessing": "preprocessing",
    "Trust": "signing.trust",
    "draw_cam": "predictor",
    "open_session": "sessions",
    "read_image": "images",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
