"""Real DICOM files where there are any, and one decoder for all tests of a file."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from chexnet_deploy.images.dicom.decoder import Decoder

CHECKOUT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def real_dicom() -> Path:
    """Open DICOM samples: CHEXNET_DICOM, or shared/dicom beside the checkout."""
    root = Path(os.environ.get("CHEXNET_DICOM", CHECKOUT.parent / "shared" / "dicom"))
    if not root.is_dir():
        pytest.skip("NOT RUN on real DICOM files: set CHEXNET_DICOM to a folder of them")
    return root


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder() as opened:
        yield opened
