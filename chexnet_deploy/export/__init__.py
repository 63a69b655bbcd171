"""Checkpoint -> fp32 -> fp16 and int8 -> TensorRT plan. Each step meets the next through a bundle on disk."""

from typing import TYPE_CHECKING

from chexnet_deploy import lazy_names

if TYPE_CHECKING:
    from chexnet_deploy.export.chain import build_plan, export_bundles, import_checkpoint
    from chexnet_deploy.export.quantize.quantize import to_fp16, to_int8

__all__ = [
    "build_plan",
    "export_bundles",
    "import_checkpoint",
    "to_fp16",
    "to_int8",
]

__getattr__ = lazy_names(
    __name__,
    {
        "export_bundles": "chain",
        "import_checkpoint": "chain",
        "build_plan": "chain",
        "to_fp16": "quantize.quantize",
        "to_int8": "quantize.quantize",
    },
)
