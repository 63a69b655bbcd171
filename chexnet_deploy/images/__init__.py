"""A radiograph's file -> gray -> pixels, or a refusal: PNG, JPEG and DICOM; upright frontal chests alone."""

from typing import TYPE_CHECKING

from chexnet_deploy import lazy_names

if TYPE_CHECKING:
    from chexnet_deploy.images.gray import Gray
    from chexnet_deploy.images.listing import find_images
    from chexnet_deploy.images.preprocessing import Pixels, Preprocessing, Resizing
    from chexnet_deploy.images.reader import ImageReader, read_image
    from chexnet_deploy.images.scope import ScopePolicy

__all__ = [
    "Gray",
    "ImageReader",
    "Pixels",
    "Preprocessing",
    "Resizing",
    "ScopePolicy",
    "find_images",
    "read_image",
]

__getattr__ = lazy_names(
    __name__,
    {
        "Gray": "gray",
        "Pixels": "preprocessing",
        "Preprocessing": "preprocessing",
        "Resizing": "preprocessing",
        "ImageReader": "reader",
        "read_image": "reader",
        "find_images": "listing",
        "ScopePolicy": "scope",
    },
)
