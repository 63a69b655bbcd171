"""The smallest manifest that says all it must, and a parent of such a kind: no model runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.manifest import ONNX_MODEL, PROBE, Manifest, Precision, hash_files
from chexnet_deploy.bundle.probe import N_PROBES, Probe
from chexnet_deploy.images.preprocessing import Preprocessing


def tiny_manifest(files: Mapping[str, bytes], **changes: Any) -> Manifest:
    """Fp32, one finding, nothing known beside it."""
    least: dict[str, Any] = {
        "precision": Precision.FP32,
        "findings": ("Mass",),
        "preprocessing": Preprocessing(),
        "head_bias": (0.0,),
        "operating_points": {},
        "files": hash_files(files),
        "checkpoint_sha256": "0" * 64,
        "probe_max_abs_logit_error": 0.0,
        "tools": {},
    }
    return Manifest(**{**least, **changes})


def write_parent(path: Path, **changes: Any) -> Bundle:
    """An empty model of 32 px whose known answers are zero."""
    pixels, logits = np.zeros((N_PROBES, 1, 32, 32), np.uint8), np.zeros((N_PROBES, 1), np.float32)
    probe = Probe(pixels, logits, np.zeros((N_PROBES, 1, 1, 1), np.float32)).to_bytes()
    files = {ONNX_MODEL: b"", PROBE: probe}
    return Bundle.write(path, tiny_manifest(files, preprocessing=Preprocessing(resize_px=32), **changes), b"", probe)
