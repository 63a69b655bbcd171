"""A circulating file of weights -> tensors by the names it has; .safetensors, and what torch.save writes.

Never runs code out of a file: torch's safe loader (`weights_only=True`) reads it, always. An object of a class that loader
doesn't know (a Namespace, a NumPy scalar, a pickled model) is replaced by an empty stand-in: nothing is imported, and
nothing of it is kept.
"""

import io
import pickle
import re
import sys
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeGuard

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch
from torch import Tensor

from chexnet_deploy.errors import CheckpointError
from chexnet_deploy.export.from_torch.checkpoint import has_manifest, name_some

MAX_FILE_BYTES: Final = 512 * 2**20  # with Adam's two moments a DenseNet-121 has 84 MB, 168 MB in float64
_MAX_CLASSES: Final = 64  # that stand-ins are made for; a pickled DenseNet-121 has a dozen
_FIRST_LAYER: Final = "conv0.weight"
# What ordinary files keep beside their weights from Python's own library. Its other names are of no use but to run code.
_DATA_MODULES: Final = frozenset(
    {"argparse", "collections", "datetime", "decimal", "enum", "fractions", "functools", "pathlib", "types", "uuid"}
)
_DATA_BUILTINS: Final = frozenset(
    {"bool", "dict", "float", "frozenset", "int", "list", "range", "slice", "str", "tuple"}
)
_UNKNOWN_CLASS: Final = re.compile(r"GLOBAL ([\w.]+)")
_NOT_FILLED: Final = re.compile(r"Can only (SETITEM|append|extend).* got <class '([\w.]+)'>")


class _StandIn:
    """Takes what a pickle gives an object, and keeps nothing of it but whether it is a module with parts."""

    is_model = False

    def __new__(cls, *_arguments: object) -> "_StandIn":
        return super().__new__(cls)

    def __init__(self, *_arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.is_model = isinstance(state, Mapping) and bool(state.get("_modules"))


def read_bytes(path: Path) -> bytes:
    """Return a file's bytes.

    Raises:
        CheckpointError: it can't be read, or is too large or inflates to something too large.
    """
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


def find_weights(path: Path, content: bytes) -> tuple[Mapping[Any, object], tuple[str, ...]]:
    """Return the one state_dict in a file, as saved, and what is to be said of it.

    Raises:
        CheckpointError: damaged, another kind of file, a pickled model, no state_dict or several.
    """
    if content[8:9] == b"{":  # behind the header's length, so neither torch.save's zip nor a pickle
        return _load_safetensors(path, content), ()
    loaded, classes = _load_pickle(path, content)
    inside = list(_walk(loaded, set()))
    found = [(where, value) for where, value in inside if _holds_tensors(value, _FIRST_LAYER)]
    if len(found) > 1:
        raise CheckpointError(
            f"{path} holds {len(found)} models: {name_some([where or 'at the top' for where, _ in found])}. "
            f"Needed: one. {_advise(found[0][0], 'For the first')}"
        )
    models = [(where, value) for where, value in inside if isinstance(value, _StandIn) and value.is_model]
    if not found and models:
        where, model = models[0]
        kind = f"{type(model).__module__}.{type(model).__name__}"
        raise CheckpointError(
            f"{path} holds a pickled {kind}: loading it needs that code, and so can run code, so it was not loaded. "
            f"{_advise(f'{where}.state_dict()', 'If you trust who made it')}"
        )
    # What is no DenseNet-121 at all is refused with the difference, where there are any tensors by name.
    weights = next((value for _, value in found or inside if _holds_tensors(value)), None)
    if weights is None:
        kind = (
            f"a dict of {name_some(sorted(map(repr, loaded)))}"
            if isinstance(loaded, Mapping)
            else type(loaded).__name__
        )
        raise CheckpointError(
            f"{path} holds {kind}; needed weights by name, alone or in a dict. "
            f"Save the model's state_dict() by torch.save, and import that."
        )
    notes = (f"beside the weights lie objects that were not loaded: {', '.join(classes)}",) if classes else ()
    return weights, notes


def _load_safetensors(path: Path, content: bytes) -> Mapping[Any, object]:
    try:
        weights = safetensors_torch.load(content)
    except (SafetensorError, ValueError, KeyError) as err:
        raise CheckpointError(f"{path} is a damaged .safetensors file ({err}). Copy it again.") from err
    if has_manifest(content):
        raise CheckpointError(f"{path} is a checkpoint of chexnet-deploy already. Give it to chexnet-deploy export.")
    return weights


def _load_pickle(path: Path, content: bytes) -> tuple[object, list[str]]:
    """Return what torch.save saved, and the classes whose objects are stand-ins, found one failed try at a time."""
    stand_ins: dict[str, type] = {}
    while True:
        try:
            with warnings.catch_warnings(), torch.serialization.safe_globals([(c, n) for n, c in stand_ins.items()]):
                warnings.simplefilter("ignore")  # of the pickle's age; whether it is understood is checked below
                loaded: object = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            return loaded, sorted(stand_ins)
        except Exception as err:  # a damaged or hostile file makes the unpickler raise anything
            unknown, not_filled = _UNKNOWN_CLASS.search(str(err)), _NOT_FILLED.search(str(err))
            if not isinstance(err, pickle.UnpicklingError) or len(stand_ins) == _MAX_CLASSES:
                raise _explain(path, content, err) from err
            # torch's message leaves `builtins.` away, which its list of classes needs.
            full = "" if unknown is None else unknown[1] if "." in unknown[1] else f"builtins.{unknown[1]}"
            if full and full not in stand_ins:
                if _runs_code(full):
                    raise CheckpointError(
                        f"{path} is not weights alone: loading it calls {full}, and so can run code, so it was not "
                        f"loaded. Next: ask whoever made it for the model's state_dict() alone."
                    ) from err
                module, _, name = full.rpartition(".")
                stand_ins[full] = type(name, (_StandIn,), {"__module__": module})
            elif not_filled and issubclass(stand_ins.get(not_filled[2], object), _StandIn):
                # The safe loader fills no other type than these: a defaultdict's stand-in is a dict.
                filled = OrderedDict if not_filled[1] == "SETITEM" else list
                stand_ins[not_filled[2]] = type(not_filled[2], (), {"__new__": lambda *_, filled=filled: filled()})
            else:
                raise _explain(path, content, err) from err


def _runs_code(name: str) -> bool:
    """Return whether a name of a pickle is of Python's own library, and not of what ordinary files keep."""
    module, _, rest = name.partition(".")
    if module == "builtins":
        return rest not in _DATA_BUILTINS
    module = IMPORT_MAPPING.get(module, module)  # torch.save writes Python 2's names: commands for subprocess
    return module in sys.stdlib_module_names and module not in _DATA_MODULES


def _explain(path: Path, content: bytes, err: Exception) -> CheckpointError:
    if content.startswith(b"\x89HDF"):
        return CheckpointError(
            f"{path} is an HDF5 file, as Keras writes; its layers differ. Only PyTorch's are imported."
        )
    if "TorchScript" in str(err):
        return CheckpointError(
            f"{path} is a TorchScript archive, which holds code, so it was not loaded. If you trust who made it, import what "
            f"this writes: torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')"
        )
    if "persistent_load of storage" in str(err):  # what torch before 1.6 wrote for each module of a model
        return CheckpointError(
            f"{path} holds a pickled model: loading it can run code, so it was not loaded. If you trust who made it, load it "
            f"where it was made, save the model's state_dict() alone by torch.save, and import that."
        )
    return CheckpointError(
        f"{path} can't be loaded as weights alone: damaged, or not PyTorch's. Needed: a file of torch.save with a state_dict; "
        f"copy it again, or save the model's state_dict() anew."
    )


def _advise(part: str, whether: str) -> str:
    return (
        f"{whether}, run this where it was made, and import what it writes: "
        f"torch.save(torch.load(FILE, weights_only=False){part}, 'weights.pth')"
    )


def _holds_tensors(value: object, name_end: str = "") -> TypeGuard[Mapping[Any, object]]:
    return isinstance(value, Mapping) and any(
        isinstance(key, str) and key.endswith(name_end) and isinstance(value[key], Tensor) for key in value
    )


def _walk(value: object, seen: set[int], where: str = "", levels: int = 3) -> Iterator[tuple[str, object]]:
    """Yield every value in nested dicts, each dict once, with the subscripts that lead to it."""
    yield where, value
    if levels and isinstance(value, Mapping) and id(value) not in seen:
        seen.add(id(value))
        for key, inside in value.items():
            yield from _walk(inside, seen, f"{where}[{key!r}]", levels - 1)
