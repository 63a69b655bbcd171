"""Circulating CheXNet and DenseNet-121 files of PyTorch -> this project's checkpoint.

Never runs code out of a file (`weights_only=True`, always), never guesses an order of findings, and never repairs: what
does not become this project's model exactly is refused with the difference. legacy_forms.py has the facts.
"""

import io
import pickle
import re
import warnings
import zipfile
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
from chexnet_deploy.export.from_torch.legacy_forms import FORMS, LegacyForm
from chexnet_deploy.export.from_torch.model import CheXNet
from chexnet_deploy.files import sha256_hex
from chexnet_deploy.images.preprocessing import Preprocessing
from chexnet_deploy.inputs import read_text

Weights: TypeAlias = dict[str, Tensor]

MAX_FILE_BYTES: Final = 512 * 2**20  # with Adam's two moments a DenseNet-121 has 84 MB
MAX_FINDINGS: Final = 256  # as a bundle's manifest
IMAGENET_FILE: Final = "https://download.pytorch.org/models/densenet121-a639ec97.pth"
IMAGENET_SHA256_START: Final = "a639ec97"  # torchvision names a file by the first digits of its SHA-256
IMAGENET_CLASSES: Final = 1000
_XRV_RANGE: Final = 1024  # torchxrayvision's pixels are -1024 to 1024

_CONTAINERS: Final = ("state_dict", "model_state_dict")
_WRAPPERS: Final = re.compile(r"(?:(?:module|model|densenet121)\.)+")  # DataParallel; an attribute of the whole model
# torchvision's names until its pull request 474 of 2018: those of circulating files, and of its own densenet121 still.
_DOTTED_LAYER: Final = re.compile(r"(\.denselayer\d+\.(?:norm|conv))\.([12]\.)")
_BARE_FEATURE: Final = re.compile(r"(?:conv0|norm0|norm5|denseblock\d|transition\d)\.")
_SIGMOID_HEAD: Final = "classifier.0."  # Sequential(Linear, Sigmoid)
_COUNTER: Final = ".num_batches_tracked"
_FINDING_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_ -]{0,63}")  # pictures are named by them
_NAMED_GLOBAL: Final = re.compile(r"GLOBAL ([\w.]+)")


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
        path: a file of torch.save that holds weights.
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
    content = _read_bytes(path)
    weights, notes = _rename(path, _load_weights(path, content, chosen.pickled_model))
    head = weights.get("classifier.bias")
    if head is not None and head.shape == (IMAGENET_CLASSES,):
        raise CheckpointError(
            f"{path} has {IMAGENET_CLASSES} classes, so it is an ImageNet model: usable to initialise training alone. "
            f"Needed: a file trained on radiographs; or train from this one."
        )
    if chosen.input == "gray":
        notes += _embed_gray(weights)
    model = CheXNet(len(chosen.findings))
    notes += _fill_counters(weights, model.state_dict())
    _check(path, weights, model.state_dict())
    model.load_state_dict(weights)
    notes = (*chosen.notes, *notes)
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
    content = _read_bytes(path)
    found = sha256_hex(content)
    if not found.startswith(IMAGENET_SHA256_START):
        raise CheckpointError(
            f"{path} is not torchvision's densenet121: its SHA-256 begins with {found[:8]}, needed "
            f"{IMAGENET_SHA256_START}. Get {IMAGENET_FILE} (31 MB) again."
        )
    weights, _ = _rename(path, _load_weights(path, content, ""))
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


def _read_bytes(path: Path) -> bytes:
    try:
        n_bytes = path.stat().st_size
        content = path.read_bytes() if n_bytes <= MAX_FILE_BYTES else b""
        if zipfile.is_zipfile(io.BytesIO(content)):
            # torch.save stores uncompressed, but torch.load inflates: a small file could fill the memory.
            n_bytes = sum(entry.file_size for entry in zipfile.ZipFile(io.BytesIO(content)).infolist())
    except OSError as err:
        raise CheckpointError(f"{path} can't be read: {err.strerror}. Give a file of torch.save.") from err
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as err:
        raise CheckpointError(f"{path} is a damaged archive ({err}). Copy it again.") from err
    if n_bytes > MAX_FILE_BYTES:
        raise CheckpointError(
            f"{path} holds {n_bytes:,} bytes, more than the {MAX_FILE_BYTES:,} that a DenseNet-121 can need. Check it."
        )
    return content


def _load_weights(path: Path, content: bytes, pickled_model: str) -> Mapping[object, object]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the pickle's age; whether it is understood is checked below
            loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as err:  # a damaged or hostile file makes the unpickler raise anything
        raise _explain(path, content, err, pickled_model) from err
    for key in _CONTAINERS:
        if isinstance(loaded, Mapping) and key in loaded:
            loaded = loaded[key]
            break
    if not isinstance(loaded, Mapping) or not any(isinstance(value, Tensor) for value in loaded.values()):
        inside = (
            f"a dict of {name_some(sorted(map(repr, loaded)))}"
            if isinstance(loaded, Mapping)
            else type(loaded).__name__
        )
        raise CheckpointError(
            f"{path} holds {inside}; needed weights by name, alone or under {' or '.join(_CONTAINERS)}. "
            f"Save the model's state_dict() by torch.save, and import that."
        )
    return loaded


def _explain(path: Path, content: bytes, err: Exception, pickled_model: str) -> CheckpointError:
    needed = _NAMED_GLOBAL.search(str(err))
    if isinstance(err, pickle.UnpicklingError) and needed:
        return CheckpointError(
            f"{path} is not weights alone: loading it needs {needed[1]}, and so can run code, so it was not loaded. If you "
            f"trust who made it, run this where it was made, and import what it writes: "
            f"torch.save(torch.load(FILE, weights_only=False){pickled_model}.state_dict(), 'weights.pth')"
        )
    if content.startswith(b"\x89HDF"):
        return CheckpointError(
            f"{path} is an HDF5 file, as Keras writes; its layers differ. Only PyTorch's are imported."
        )
    return CheckpointError(
        f"{path} can't be loaded as weights alone: damaged, or not PyTorch's. Needed: a file of torch.save with a state_dict; "
        f"copy it again, or save the model's state_dict() anew."
    )


def _rename(path: Path, loaded: Mapping[object, object]) -> tuple[Weights, tuple[str, ...]]:
    """Return the weights by torchvision's present names, and what is to be said of the head."""
    weights: Weights = {}
    origin: dict[str, str] = {}
    for old, value in loaded.items():
        if not isinstance(old, str) or not old.isprintable() or not isinstance(value, Tensor):  # names reach terminals
            raise CheckpointError(
                f"{path}: {old!r} holds {type(value).__name__}; needed a tensor by name. Save the state_dict() alone."
            )
        new = _DOTTED_LAYER.sub(r"\1\2", _WRAPPERS.sub("", old, count=1) if _WRAPPERS.match(old) else old)
        if _BARE_FEATURE.match(new):
            new = f"features.{new}"
        if new.startswith(_SIGMOID_HEAD):
            new = f"classifier.{new.removeprefix(_SIGMOID_HEAD)}"
        if new in weights:
            raise CheckpointError(f"{path}: {origin[new]} and {old} are both {new}. Save one model alone.")
        # torch's safe loader makes these too; they have no values to check, or no shape.
        if value.is_meta or value.is_nested or value.layout is not torch.strided:
            raise CheckpointError(f"{path}: {old} is no plain tensor. Save the state_dict() of a model on the CPU.")
        weights[new], origin[new] = value.detach(), old
    if _SIGMOID_HEAD in origin.get("classifier.weight", ""):
        return weights, ("the head is a Linear and a Sigmoid: logits are the Linear's output",)
    return weights, ("the head is a Linear: its outputs are taken as logits, one sigmoid a finding",)


def _embed_gray(weights: Weights) -> tuple[str, ...]:
    """Let the first of three channels in -1..1 do what one channel in -1024..1024 did; exact, 1024 being a power of 2."""
    kernel = weights.get("features.conv0.weight")
    if kernel is None or kernel.shape != (64, 1, 7, 7) or kernel.dtype != torch.float32:
        return ()  # the check that follows names the difference
    embedded = torch.zeros(64, 3, 7, 7)
    embedded[:, :1] = kernel * _XRV_RANGE
    weights["features.conv0.weight"] = embedded
    return ("its one input channel became the first of three, and its pixel range part of the first convolution",)


def _fill_counters(weights: Weights, expected: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Fill in BatchNorm's counters of batches where a file has none: torch before 0.4 kept none, and eval mode uses none."""
    if any(key.endswith(_COUNTER) for key in weights):
        return ()
    weights.update({key: tensor for key, tensor in expected.items() if key.endswith(_COUNTER)})
    return ("num_batches_tracked was missing, as in files of torch 0.3, and set to 0; predictions don't depend on it",)


def _check(path: Path, weights: Weights, expected: Mapping[str, Tensor]) -> None:
    missing, extra = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    other = [
        f"{key} is {_describe(weights[key])}, needed {_describe(tensor)}"
        for key, tensor in expected.items()
        if key in weights and (weights[key].shape != tensor.shape or weights[key].dtype != tensor.dtype)
    ]
    if missing or extra or other:
        raise CheckpointError(
            f"{path} is not DenseNet-121 with {len(expected['classifier.bias'])} outputs: {len(missing)} keys missing: "
            f"{name_some(missing)}; {len(extra)} not expected: {name_some(extra)}; {len(other)} of another shape or type: "
            f"{name_some(other)}. Check the --form or --findings, or what the file is of."
        )
    for key, tensor in weights.items():  # only now: a tensor of a few bytes can claim any shape
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: {key} holds NaN or infinity. Use an earlier checkpoint.")


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
