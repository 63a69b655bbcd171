"""Options and arguments that several commands share."""

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from chexnet_deploy.signing.trust import Trust


class ProviderName(str, Enum):
    """What runs an ONNX bundle."""

    AUTO = "auto"
    OPENVINO = "openvino"
    CPU = "cpu"
    CUDA = "cuda"


BundleArgument = Annotated[Path, typer.Argument(help="A bundle.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
TrustOption = Annotated[
    Path | None,
    typer.Option("--trust", help="Trust file: open only bundles signed by a key in it, of a release not too old."),
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
    from chexnet_deploy.signing import trust

    return trust.read_trust(path)
