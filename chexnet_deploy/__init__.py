"""Take CheXNet from PyTorch weights to a scanner and prove at every step that nothing was lost.

The runtime is `Predictor`: open a bundle, hand it radiographs, get named probabilities. Importing this package needs
numpy, pillow and pydantic; a backend is imported when a bundle is opened.
"""

from chexnet_deploy.bundle import Bundle, Manifest, Precision
from chexnet_deploy.errors import ChexnetError
from chexnet_deploy.findings import FINDINGS
from chexnet_deploy.images import read_image
from chexnet_deploy.predictor import Prediction, Predictor, draw_cam
from chexnet_deploy.preprocessing import Preprocessing
from chexnet_deploy.sessions import open_session

__version__ = "0.1.0"

__all__ = [
    "FINDINGS",
    "Bundle",
    "ChexnetError",
    "Manifest",
    "Precision",
    "Prediction",
    "Predictor",
    "Preprocessing",
    "draw_cam",
    "open_session",
    "read_image",
]
