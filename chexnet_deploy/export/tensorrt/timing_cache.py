"""TensorRT's timing cache on disk, with what it was measured on; another machine's timings would choose wrong kernels.

A file is one line of JSON, then TensorRT's own bytes. A cache is only ever a shortcut: what does not match is left aside
with a message, never used and never an error.
"""

import json
from pathlib import Path

from chexnet_deploy.bundle.manifest import Target
from chexnet_deploy.evaluation.spec import EngineSpec
from chexnet_deploy.files import sha256_hex, write_file


def cache_key(model_sha256: str, target: Target, spec: EngineSpec) -> str:
    """Return a hash of all that timings depend on: model, TensorRT, GPU, driver, and how the spec builds."""
    parts = {
        "model": model_sha256,
        "target": target.model_dump(),
        "precision": spec.precision.value,
        "batch": spec.batch.model_dump(),
        "build": spec.build.model_dump(),
    }
    return sha256_hex(json.dumps(parts, sort_keys=True).encode())


def read_cache(path: Path, key: str) -> tuple[bytes, str | None]:
    """Return the cache's bytes, or none and why it was left aside; a file that is not there needs no reason."""
    try:
        header, _, content = path.read_bytes().partition(b"\n")
        stored = json.loads(header)
        made_for, digest = stored["key"], stored["sha256"]
    except FileNotFoundError:
        return b"", None
    except (OSError, ValueError, KeyError, TypeError):
        return b"", f"timing cache {path} can't be read and was not used"
    if made_for != key:
        return b"", f"timing cache {path} is of another model, GPU, TensorRT or spec and was not used"
    if digest != sha256_hex(content):
        return b"", f"timing cache {path} is damaged and was not used"
    return content, None


def write_cache(path: Path, key: str, content: bytes) -> None:
    """Write the cache in one step.

    Raises:
        OSError: as the system does.
    """
    header = json.dumps({"key": key, "sha256": sha256_hex(content)})
    write_file(path, header.encode() + b"\n" + content)
