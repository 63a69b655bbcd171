"""What a busy machine refused may be sent again; the client is told so."""

import pytest

from benchmarks.rigs.synthetic_dicom import make_dicom
from chexnet_deploy.errors import ImageRefusedError, RefusalReason
from chexnet_deploy.images.preprocessing import Preprocessing
from chexnet_deploy.images.reader import ImageReader
from chexnet_deploy.images.scope import ScopePolicy
from chexnet_deploy.runtime.loading import PixelLoader
from chexnet_deploy.serving.http.predict import _prepare
from chexnet_deploy.serving.http.refusals import RequestError


@pytest.mark.parametrize(
    ("reason", "status"),
    [(RefusalReason.BUSY, 503), (RefusalReason.DECODE_TIMEOUT, 422), (RefusalReason.DECODE_FAILED, 422)],
)
def test_only_a_busy_machine_is_to_be_asked_again(
    monkeypatch: pytest.MonkeyPatch, reason: RefusalReason, status: int
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ImageRefusedError(reason, "the file's own words")

    monkeypatch.setattr(PixelLoader, "read", refuse)
    with ImageReader() as reader, pytest.raises(RequestError) as caught:
        _prepare(make_dicom(), {}, 10**6, PixelLoader(Preprocessing(), ScopePolicy(), reader))
    assert (caught.value.status, caught.value.reason) == (status, reason.value)
    assert "own words" not in str(caught.value)
