"""Circulating CheXNet and DenseNet-121 files of PyTorch -> this project's checkpoint.

Never guesses an order of findings, and never repairs: what does not become this project's model exactly is refused with the
difference; what was renamed, cast or left out is said. legacy_file.py reads the file, legacy_forms.py has the facts.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final, TypeAlias

import torch
from torch import Tensor

from chexnet_deploy.datasets.findings import FINDINGS
from chexnet_deploy.errors import CheckpointError
from chexnet_deploy.export.from_torch.checkpoint import (
    Checkpoint,
    CheckpointManifest,
    name_some,
    read_checkpoint,
    write_checkpoint,
)
from chexnet_deploy.export.from_torch.legacy_file import find_weights, read_bytes
from chexnet_deploy.export.from_torch.legacy_forms import FORMS, LegacyForm
from chexnet_deploy.export.from_torch.model import CheXNet
from chexnet_deploy.files import sha256_hex
from chexnet_deploy.images.preprocessing import Preprocessing
from chexnet_deploy.inputs import read_text

Weights: TypeAlias = dict[str, Tensor]

MAX_FINDINGS: Final = 256  # as a bundle's manifest
IMAGENET_FILE: Final = "https://download.pytorch.org/models/densenet121-a639ec97.pth"
IMAGENET_SHA256_START: Final = "a639ec97"  # torchvision names a file by the first digits of its SHA-256
IMAGENET_CLASSES: Final = 1000
_XRV_RANGE: Final = 1024  # torchxrayvision's pixels are -1024 to 1024

# Left in the names by DataParallel and DistributedDataParallel, torch.compile, FSDP and activation checkpointing.
_WRAPPERS: Final = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# An attribute's name, of an outer model, before this project's own: model., net., densenet121., backbone.features., ...
_FEATURE: Final = re.compile(r"((?:\w+\.)*?)(?:features\.)?((?:conv0|norm0|norm5|denseblock\d|transition\d)\..+)")
_HEAD: Final = re.compile(r"((?:\w+\.)*?)(classifier\.(?:0\.)?(?:weight|bias)|op_threshs)")
_AVERAGED: Final = "n_averaged"  # torch.optim.swa_utils.AveragedModel's count of the weights in its average
# torchvision's names until its pull request 474 of 2018: those of circulating files, and of its own densenet121 still.
_DOTTED_LAYER: Final = re.compile(r"(\.denselayer\d+\.(?:norm|conv))\.([12]\.)")
_SIGMOID_HEAD: Final = "classifier.0."  # Sequential(Linear, Sigmoid)
_COUNTER: Final = ".num_batches_tracked"
_FINDING_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_ -]{0,63}")  # pictures are named by them
_THRESHOLDS: Final = "op_threshs"  # torchxrayvision's buffer beside its weights
_FLOATS: Final = {torch.float16: "exactly", torch.bfloat16: "exactly", torch.float64: "with rounding"}


@dataclass(frozen=True, slots=True)
class LegacyImport:
    """What an import made.

    Attributes:
        checkpoint: as read back from the file written.
        notes: what was filled in and what to know; in the manifest's recipe too.
    """

    checkpoint: Checkpoint
    notes: tuple[str, ...]


def import_legacy(
    path: Path, out: Path, *, form: str | None = None, findings: tuple[str, ...] | None = None
) -> LegacyImport:
    """Convert a circulating file into a new checkpoint.

    Args:
        path: a .safetensors file, or one of torch.save, that holds weights.
        out: the .safetensors file to write; nothing may be there yet.
        form: one of FORMS.
        findings: the outputs in order, where no form fits; then ImageNet's mean and deviation at 224 px are assumed.

    Raises:
        CheckpointError: neither or both of form and findings, a file that isn't such weights, keys or shapes that differ
            from DenseNet-121's, weights that are not finite, or a place that can't be written.
    """
    chosen = _choose_form(path, form, findings)
    if out.exists() or out.is_symlink():
        raise CheckpointError(f"{out} is there already. Choose another --out, or delete it first.")
    content = read_bytes(path)
    loaded, of_file = find_weights(path, content)
    weights, notes = _rename(path, loaded)
    head = weights.get("classifier.bias")
    if head is not None and head.shape == (IMAGENET_CLASSES,):
        raise CheckpointError(
            f"{path} has {IMAGENET_CLASSES} classes, so it is an ImageNet model: usable to initialise training alone. "
            f"Needed: a file trained on radiographs; or train from this one."
        )
    if chosen.input == "gray":
        notes += (*_omit_thresholds(path, weights, chosen.findings), *_embed_gray(weights))
    model = CheXNet(len(chosen.findings))
    notes += _fill_counters(weights, model.state_dict())
    notes += _check(path, weights, model.state_dict())
    model.load_state_dict(weights)
    notes = (*chosen.notes, *of_file, *notes)
    manifest = CheckpointManifest(
        findings=chosen.findings,
        preprocessing=chosen.preprocessing,
        operating_points={},
        recipe={"imported_from": form or "findings given by hand", "sha256": sha256_hex(content), "notes": list(notes)},
        split_sha256=None,
        trained_on=None,
        metrics={},
        tools={name: version(name) for name in ("chexnet-deploy", "torch", "safetensors")},
    )
    write_checkpoint(out, model, manifest)
    return LegacyImport(read_checkpoint(out), notes)


def load_imagenet_backbone(path: Path) -> Weights:
    """Return torchvision's ImageNet weights for `CheXNet(...).features.load_state_dict`; the 1000 classes are dropped.

    Raises:
        CheckpointError: it is not torchvision's densenet121-a639ec97.pth, to the byte.
    """
    if not path.exists():
        raise CheckpointError(f"{path} is not there. Get {IMAGENET_FILE} (31 MB), and give its path.")
    content = read_bytes(path)
    found = sha256_hex(content)
    if not found.startswith(IMAGENET_SHA256_START):
        raise CheckpointError(
            f"{path} is not torchvision's densenet121: its SHA-256 begins with {found[:8]}, needed "
            f"{IMAGENET_SHA256_START}. Get {IMAGENET_FILE} (31 MB) again."
        )
    weights, _ = _rename(path, find_weights(path, content)[0])
    expected = CheXNet(IMAGENET_CLASSES).state_dict()
    _fill_counters(weights, expected)
    _check(path, weights, expected)
    return {key.removeprefix("features."): weights[key] for key in expected if key.startswith("features.")}


def read_findings(path: Path) -> tuple[str, ...]:
    """Return the names in a file, one a line, in the order of the model's outputs.

    Raises:
        DatasetError: the file can't be read.
        CheckpointError: no name, too many, one twice, or one with other characters than letters, digits, _, - and blanks.
    """
    names = tuple(line.strip() for line in read_text(path).splitlines() if line.strip())
    odd = [name for name in names if not _FINDING_NAME.fullmatch(name)]
    if odd or not 1 <= len(set(names)) == len(names) <= MAX_FINDINGS:
        raise CheckpointError(
            f"{path}: found {len(names)} names, {len(set(names))} of them different, {len(odd)} not made of letters, digits, "
            f"_, - and blanks; needed 1 to {MAX_FINDINGS}, one a line, in the order of the model's outputs."
        )
    return names


def _choose_form(path: Path, form: str | None, findings: tuple[str, ...] | None) -> LegacyForm:
    known = ", ".join(FORMS)
    if form is not None and findings is None:
        if form not in FORMS:
            raise CheckpointError(
                f"no form is named {form!r}. Forms: {known}; or give the findings by --findings FILE."
            )
        return FORMS[form]
    if form is not None or findings is None:
        raise CheckpointError(
            f"{path} doesn't say which output is which finding: found {'neither' if form is None else 'both'} of --form and "
            f"--findings, needed one. Forms: {known}; or a file of the findings in the model's order, one a line."
        )
    notes = ["the order of the findings was given by hand, and ImageNet's mean and deviation at 224 px assumed"]
    unlabelled = [name for name in findings if name not in FINDINGS]
    if unlabelled:
        notes.append(f"not findings of ChestX-ray14: {name_some(unlabelled)}")
    return LegacyForm(findings, Preprocessing(), tuple(notes))


def _rename(path: Path, loaded: Mapping[object, object]) -> tuple[Weights, tuple[str, ...]]:
    """Return the weights by torchvision's present names, and what is to be said of their names and of the head."""
    weights: Weights = {}
    origin: dict[str, str] = {}
    omitted: set[str] = set()
    for old, value in loaded.items():
        if not isinstance(old, str) or not old.isprintable() or not isinstance(value, Tensor):  # names reach terminals
            raise CheckpointError(
                f"{path}: {old!r} holds {type(value).__name__}; needed a tensor by name. Save the state_dict() alone."
            )
        if old == _AVERAGED:
            omitted.add(old)
            continue
        new = _WRAPPERS.sub("", old)
        omitted.update(_WRAPPERS.findall(old))
        if match := _FEATURE.fullmatch(new):
            new = "features." + _DOTTED_LAYER.sub(r"\1\2", match[2])
        elif match := _HEAD.fullmatch(new):
            new = match[2].replace(_SIGMOID_HEAD, "classifier.")
        if match and match[1]:
            omitted.add(match[1])
        if new in weights:
            raise CheckpointError(f"{path}: {origin[new]} and {old} are both {new}. Save one model alone.")
        # torch's safe loader makes these too; they have no values to check, or no shape.
        if value.is_meta or value.is_nested or value.layout is not torch.strided:
            raise CheckpointError(f"{path}: {old} is no plain tensor. Save the state_dict() of a model on the CPU.")
        weights[new], origin[new] = value.detach(), old
    notes = (f"of wrappers, left out: {', '.join(sorted(omitted))}",) if omitted else ()
    if _SIGMOID_HEAD in origin.get("classifier.weight", ""):
        return weights, (*notes, "the head is a Linear and a Sigmoid: logits are the Linear's output")
    return weights, (*notes, "the head is a Linear: its outputs are taken as logits, one sigmoid a finding")


def _omit_thresholds(path: Path, weights: Weights, findings: tuple[str, ...]) -> tuple[str, ...]:
    """Leave torchxrayvision's thresholds out; where it has none for a finding, that output was never trained."""
    thresholds = weights.pop(_THRESHOLDS, None)
    if thresholds is None:
        return ()
    if thresholds.shape != (len(findings),) or not thresholds.is_floating_point():
        raise CheckpointError(
            f"{path}: {_THRESHOLDS} is {_describe(thresholds)}, needed one number for each of {len(findings)} findings. "
            f"Check the --form."
        )
    untrained = [name for name, known in zip(findings, thresholds.isfinite().tolist(), strict=True) if not known]
    if untrained:
        raise CheckpointError(
            f"{path} has no threshold for {name_some(untrained)}, so it was never trained on them and is another of "
            f"torchxrayvision's models. Needed: its weights named all."
        )
    return (
        f"its {_THRESHOLDS} are left out: torchxrayvision rescales probabilities by them, so they are no operating points "
        f"of this model's probabilities, and it has none",
    )


def _embed_gray(weights: Weights) -> tuple[str, ...]:
    """Let the first of three channels in -1..1 do what one channel in -1024..1024 did; exact, 1024 being a power of 2."""
    kernel = weights.get("features.conv0.weight")
    if kernel is None or kernel.shape != (64, 1, 7, 7) or kernel.dtype not in {torch.float32, *_FLOATS}:
        return ()  # the check that follows names the difference
    embedded = torch.zeros(64, 3, 7, 7, dtype=torch.promote_types(kernel.dtype, torch.float32))
    embedded[:, :1] = kernel * _XRV_RANGE
    weights["features.conv0.weight"] = embedded
    return ("its one input channel became the first of three, and its pixel range part of the first convolution",)


def _fill_counters(weights: Weights, expected: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Set BatchNorm's counters of batches to 0 where a file has none, as torch before 0.4, or rounded them; eval uses none."""
    counters = {key for key in weights if key.endswith(_COUNTER)}
    wrong = {key for key in counters if weights[key].shape == () and weights[key].dtype in {torch.float32, *_FLOATS}}
    if counters and not wrong:
        return ()
    zeros = {key: tensor for key, tensor in expected.items() if key.endswith(_COUNTER)}
    weights.update({key: tensor for key, tensor in zeros.items() if key in wrong or not counters})
    found = "of floating point" if wrong else "missing, as in files of torch 0.3"
    return (f"num_batches_tracked was {found}, and set to 0; predictions don't depend on it",)


def _check(path: Path, weights: Weights, expected: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Refuse what isn't the model, and cast what is of another precision; return what was cast."""
    missing, extra = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    other = [
        f"{key} is {_describe(weights[key])}, needed {_describe(tensor)}"
        for key, tensor in expected.items()
        if key in weights
        and not (
            weights[key].shape == tensor.shape
            and (weights[key].dtype == tensor.dtype or (tensor.is_floating_point() and weights[key].dtype in _FLOATS))
        )
    ]
    if missing or extra or other:
        raise CheckpointError(
            f"{path} is not DenseNet-121 with {len(expected['classifier.bias'])} outputs: {len(missing)} keys missing: "
            f"{name_some(missing)}; {len(extra)} not expected: {name_some(extra)}; {len(other)} of another shape or type: "
            f"{name_some(other)}. Check the --form or --findings, or what the file is of."
        )
    # Only now: a tensor of a few bytes can claim any shape.
    cast = Counter(tensor.dtype for tensor in weights.values() if tensor.dtype in _FLOATS)
    for key, tensor in weights.items():
        weights[key] = tensor.to(expected[key].dtype)
        if not torch.isfinite(weights[key]).all():
            raise CheckpointError(
                f"{path}: {key} holds NaN or infinity in {_name(tensor.dtype)}. Use an earlier checkpoint."
            )
    return tuple(f"{n} tensors were {_name(dtype)}, and cast to float32 {_FLOATS[dtype]}" for dtype, n in cast.items())


def _describe(tensor: Tensor) -> str:
    return f"{_name(tensor.dtype)} {list(tensor.shape)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
