"""Checkpoints: one safetensors file that carries its own manifest, so that the two can't be parted.

Never unpickles: a pickled checkpoint can run code when it is loaded.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch

from chexnet_deploy.datasets.patients import PatientSet
from chexnet_deploy.errors import CheckpointError
from chexnet_deploy.export.from_torch.model import CheXNet
from chexnet_deploy.files import FirstFormat, Sha256, sha256_hex, write_file
from chexnet_deploy.images.preprocessing import Preprocessing

_METADATA_KEY = "chexnet_deploy"
_PICKLE_STARTS = (
    *(bytes([0x80, protocol]) for protocol in range(2, 6)),
    b"PK\x03\x04",
)  # bare; torch.save's zip of them
_NAMED_IN_ERRORS = 4


class CheckpointManifest(BaseModel):
    """What a checkpoint says of its weights.

    Attributes:
        findings: names of the head's outputs, in order.
        operating_points: probability thresholds by finding, chosen on validation patients.
        recipe: the training recipe as read from its TOML.
        split_sha256: hash of the image names in each split it was trained with; None where nobody knows any more.
        trained_on: the patients whose images the weights were fitted to, before this run too; None where nobody knows any more.
        started_from: hash of the checkpoint that training started from; None where it was another start.
        taught_by: hash of the teacher whose answers it learnt; None where it learnt labels alone.
        metrics: of the validation patients; None where undefined.
        tools: version of each tool that took part.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: FirstFormat = 1
    findings: Annotated[tuple[str, ...], Field(min_length=1)]
    preprocessing: Preprocessing
    operating_points: dict[str, Annotated[float, Field(ge=0.0, le=1.0)]]
    recipe: dict[str, JsonValue]
    split_sha256: Sha256 | None
    trained_on: PatientSet | None = None
    started_from: Sha256 | None = None
    taught_by: Sha256 | None = None
    metrics: dict[str, float | None]
    tools: dict[str, str]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint as read.

    Attributes:
        model: with the weights loaded, in eval mode, on the CPU.
        manifest: what it says of itself.
        sha256: of the file.
    """

    model: CheXNet
    manifest: CheckpointManifest
    sha256: str


def write_checkpoint(path: Path, model: CheXNet, manifest: CheckpointManifest) -> None:
    """Write weights and manifest as one file, complete or not at all.

    Raises:
        CheckpointError: the disk is full or read-only.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    content = safetensors_torch.save(weights, metadata={_METADATA_KEY: manifest.model_dump_json()})
    try:
        write_file(path, content)
    except OSError as err:
        raise CheckpointError(
            f"{path} could not be written: {err.strerror}. What was there before is unchanged."
        ) from err


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint that `python -m training` or `chexnet-deploy import` wrote.

    Raises:
        CheckpointError: not safetensors, no manifest, keys or shapes that don't fit, or weights that are not finite.
    """
    try:
        content = path.read_bytes()
    except OSError as err:
        raise CheckpointError(
            f"{path} can't be read: {err.strerror}. Give the .safetensors file of a training run."
        ) from err
    try:
        weights = safetensors_torch.load(content)
    except (SafetensorError, ValueError, KeyError) as err:
        # Only now: a sound file may begin with these bytes too, as it begins with its header's length.
        if content.startswith(_PICKLE_STARTS):
            raise CheckpointError(
                f"{path} is a pickled checkpoint, and loading one can run code, so it was not opened. "
                f"Needed: a .safetensors file written by python -m training, or made of this one by chexnet-deploy import."
            ) from err
        raise CheckpointError(f"{path} is not a safetensors file ({err}). Copy it again, or train again.") from err
    manifest = _read_manifest(path, content)
    model = CheXNet(len(manifest.findings))
    _check_weights(path, weights, model)
    model.load_state_dict(weights)
    return Checkpoint(model.eval(), manifest, sha256_hex(content))


def has_manifest(content: bytes) -> bool:
    """Return whether a sound safetensors file is a checkpoint of this project's, as against weights alone."""
    return _METADATA_KEY in _metadata(content)


def _metadata(content: bytes) -> dict[str, str]:
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata: dict[str, str] = header.get("__metadata__", {})
    return metadata


def _read_manifest(path: Path, content: bytes) -> CheckpointManifest:
    raw = _metadata(content).get(_METADATA_KEY)
    if raw is None:
        raise CheckpointError(
            f"{path} carries no chexnet-deploy manifest, so its findings and preprocessing are unknown. "
            f"Needed: a file written by python -m training, or made of this one by chexnet-deploy import."
        )
    try:
        return CheckpointManifest.model_validate_json(raw, strict=True)
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path}: manifest: {where}: {first['msg']}. Use the version that wrote it.") from err


def _check_weights(path: Path, weights: dict[str, torch.Tensor], model: CheXNet) -> None:
    expected = model.state_dict()
    missing, extra = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or extra:
        raise CheckpointError(
            f"{path} does not fit DenseNet-121: missing {name_some(missing)}; not expected {name_some(extra)}. "
            f"Rename the keys to torchvision's densenet121 names, or train again."
        )
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape or tensor.dtype != expected[name].dtype:
            raise CheckpointError(
                f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}, needed {expected[name].dtype} "
                f"{list(expected[name].shape)}. Check the number of findings, or train again."
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: {name} holds NaN or infinity. Use an earlier checkpoint.")


def name_some(names: list[str]) -> str:
    """Return the first few names and how many more there are."""
    if not names:
        return "nothing"
    more = f" and {len(names) - _NAMED_IN_ERRORS} more" if len(names) > _NAMED_IN_ERRORS else ""
    return ", ".join(names[:_NAMED_IN_ERRORS]) + more
