"""Bundle -> session -> prediction: what a scanner embeds. Needs numpy, pillow, pydantic and one backend."""

from typing import TYPE_CHECKING

from chexnet_deploy import lazy_names

if TYPE_CHECKING:
    from chexnet_deploy.runtime.predict_files import predict_images, predict_table
    from chexnet_deploy.runtime.predictor import Prediction, Predictor, draw_cam
    from chexnet_deploy.runtime.sessions.base import Session
    from chexnet_deploy.runtime.sessions.open import open_session

__all__ = [
    "Prediction",
    "Predictor",
    "Session",
    "draw_cam",
    "open_session",
    "predict_images",
    "predict_table",
]

__getattr__ = lazy_names(
    __name__,
    {
        "open_session": "sessions.open",
        "Session": "sessions.base",
        "Predictor": "predictor",
        "Prediction": "predictor",
        "draw_cam": "predictor",
        "predict_images": "predict_files",
        "predict_table": "predict_files",
    },
)
