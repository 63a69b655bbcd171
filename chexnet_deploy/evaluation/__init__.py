"""How good, how fast, and as good as the parent? With the declared gates, and pages."""

from typing import TYPE_CHECKING

from chexnet_deploy import lazy_names

if TYPE_CHECKING:
    from chexnet_deploy.evaluation.entry_points import bench, evaluate
    from chexnet_deploy.evaluation.spec import EngineSpec, Gate, read_spec

__all__ = [
    "EngineSpec",
    "Gate",
    "bench",
    "evaluate",
    "read_spec",
]

__getattr__ = lazy_names(
    __name__,
    {"bench": "entry_points", "evaluate": "entry_points", "EngineSpec": "spec", "Gate": "spec", "read_spec": "spec"},
)
