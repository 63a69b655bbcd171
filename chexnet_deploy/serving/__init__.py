"""Bundles over HTTP, on a Ray cluster, and for Triton Inference Server."""

from typing import TYPE_CHECKING

from chexnet_deploy import lazy_names

if TYPE_CHECKING:
    from chexnet_deploy.serving.http.program import serve
    from chexnet_deploy.serving.triton import write_repository

__all__ = [
    "serve",
    "write_repository",
]

__getattr__ = lazy_names(__name__, {"serve": "http.program", "write_repository": "triton"})
