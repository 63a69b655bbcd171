"""Options and arguments that several commands share."""

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from chexnet_deploy.errors import SpecError

if TYPE_CHECKING:
    from chexnet_deploy.bundle.manifest import Dialect, Precision
    from chexnet_deploy.bundle.signing.trust import Trust


class ProviderName(str, Enum):
    """What runs an ONNX bundle."""

    AUTO = "auto"
    OPENVINO = "openvino"
    CPU = "cpu"
    CUDA = "cuda"


BundleArgument = Annotated[Path, typer.Argument(help="A bundle.")]
ContractOption = Annotated[
    Path | None, typer.Option("--contract", help="TOML: what a model that is no bundle takes and answers.")
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
TrustOption = Annotated[
    Path | None,
    typer.Option(
        "--trust", help="Trust file: open only bundles signed by a key in it, not too old, with the PASS it needs."
    ),
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads for one call; default: all cores.")]
OnProvider = Annotated[
    ProviderName,
    typer.Option(
        help="What runs an ONNX bundle: OpenVINO, ONNX Runtime on the cpu or on cuda; never another. "
        "auto is OpenVINO where it is installed, else cpu."
    ),
]


def read_trust(path: Path | None) -> "Trust | None":
    """Return what --trust names.

    Raises:
        TrustError: it can't be used.
    """
    from chexnet_deploy.bundle.signing import trust

    return trust.read_trust(path)


def parse_precisions(text: str) -> tuple["Precision", ...]:
    """Return the precisions a comma-separated list names, fp32 first and always.

    Raises:
        SpecError: an unknown precision.
    """
    from chexnet_deploy.bundle.manifest import Precision

    known = [precision.value for precision in Precision]
    wanted = [name.strip() for name in text.split(",")]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise SpecError(f"no precision named {', '.join(map(repr, unknown))}. There are {', '.join(known)}.")
    return tuple(precision for precision in Precision if precision is Precision.FP32 or precision.value in wanted)


def parse_dialects(text: str) -> tuple["Dialect", ...]:
    """Return the forms of int8 that a comma-separated list names.

    Raises:
        SpecError: an unknown form, or one twice.
    """
    from chexnet_deploy.bundle.manifest import Dialect

    known: tuple[Dialect, ...] = get_args(Dialect)
    wanted = [name.strip() for name in text.split(",")]
    if any(wanted.count(name) > 1 for name in wanted) or set(wanted) - set(known):
        raise SpecError(f"got int8 dialects {text!r}, needed some of {', '.join(known)}, each once.")
    return tuple(name for name in known if name in wanted)


DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data", help="Labelled images: ChestX-ray14's folder, a CSV or Parquet table, or a TOML that describes one."
    ),
]
ImagesOption = Annotated[Path | None, typer.Option("--images", help="Only the images this list names, one a line.")]
