"""The artefact: a verified folder of model, manifest, known answers and signature."""

from typing import TYPE_CHECKING

from chexnet_deploy import lazy_names

if TYPE_CHECKING:
    from chexnet_deploy.bundle.bundle import Bundle, find_reference
    from chexnet_deploy.bundle.manifest import Manifest, Precision
    from chexnet_deploy.bundle.signing.trust import Trust

__all__ = [
    "Bundle",
    "Manifest",
    "Precision",
    "Trust",
    "find_reference",
]

__getattr__ = lazy_names(
    __name__,
    {
        "Bundle": "bundle",
        "Manifest": "manifest",
        "Precision": "manifest",
        "Trust": "signing.trust",
        "find_reference": "bundle",
    },
)
