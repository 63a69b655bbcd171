"""Take CheXNet from PyTorch weights to a scanner and prove at every step that nothing was lost.

The runtime is `Predictor`: open a bundle, hand it radiographs, get named probabilities. It needs numpy, pillow and pydantic,
and a backend when a bundle is opened.
"""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chexnet_deploy.bundle.bundle import Bundle
    from chexnet_deploy.bundle.manifest import Manifest, Precision
    from chexnet_deploy.bundle.signing.trust import Trust
    from chexnet_deploy.datasets.findings import FINDINGS
    from chexnet_deploy.errors import ChexnetError, ImageError
    from chexnet_deploy.images.preprocessing import Preprocessing
    from chexnet_deploy.images.reader import read_image
    from chexnet_deploy.runtime.predictor import Prediction, Predictor, draw_cam
    from chexnet_deploy.runtime.sessions.open import open_session

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


def lazy_names(package: str, homes: Mapping[str, str]) -> Callable[[str], object]:
    """Return a package's `__getattr__` that imports a name's module when the name is first used (PEP 562).

    numpy and pydantic's schemas take half a second on a small box, and `chexnet-deploy --help` or a caller that wants one error
    class needs neither.

    Args:
        package: its dotted name.
        homes: the module in it, by public name.
    """

    def get(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value: object = getattr(import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return get


__getattr__ = lazy_names(
    __name__,
    {
        "FINDINGS": "datasets.findings",
        "Bundle": "bundle.bundle",
        "ChexnetError": "errors",
        "ImageError": "errors",
        "Manifest": "bundle.manifest",
        "Precision": "bundle.manifest",
        "Prediction": "runtime.predictor",
        "Predictor": "runtime.predictor",
        "Preprocessing": "images.preprocessing",
        "Trust": "bundle.signing.trust",
        "draw_cam": "runtime.predictor",
        "open_session": "runtime.sessions.open",
        "read_image": "images.reader",
    },
)
