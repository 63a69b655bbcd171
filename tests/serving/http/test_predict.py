"""Compressed bodies: the limit is exact, counted after inflating, and a bomb costs no memory."""

import gzip
import tracemalloc
import zlib

import pytest

from chexnet_deploy.serving.http.predict import inflate
from chexnet_deploy.serving.http.refusals import RequestError

LIMIT = 10_000


@pytest.mark.parametrize(
    ("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress), ("GZIP", gzip.compress)]
)
def test_exactly_the_limit_is_let_through_and_one_more_is_not(encoding: str, pack: object) -> None:
    assert inflate(pack(b"x" * LIMIT), encoding, LIMIT) == b"x" * LIMIT  # type: ignore[operator]
    with pytest.raises(RequestError) as caught:
        inflate(pack(b"x" * (LIMIT + 1)), encoding, LIMIT)  # type: ignore[operator]
    assert caught.value.status == 413


def test_a_bomb_is_cut_before_it_is_unpacked() -> None:
    bomb = gzip.compress(bytes(300 * 2**20), 9)
    assert len(bomb) < 2**19
    tracemalloc.start()
    try:
        with pytest.raises(RequestError):
            inflate(bomb, "gzip", 2**20)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("body", "encoding", "status"),
    [
        (gzip.compress(b"abc", mtime=0)[:-1], "gzip", 400),
        (gzip.compress(b"abc", mtime=0)[:-9], "gzip", 400),
        (b"", "gzip", 400),
        (b"abc", "gzip", 400),
        (gzip.compress(b"abc", mtime=0) + b"x", "gzip", 400),
        (gzip.compress(b"abc", mtime=0) * 2, "gzip", 400),
        (b"abc", "br", 415),
        (b"abc", "gzip, gzip", 415),
    ],
)
def test_what_is_damaged_or_foreign_is_refused(body: bytes, encoding: str, status: int) -> None:
    with pytest.raises(RequestError) as caught:
        inflate(body, encoding, LIMIT)
    assert caught.value.status == status


def test_without_an_encoding_nothing_is_changed() -> None:
    assert inflate(b"abc", None, LIMIT) == inflate(b"abc", "identity", LIMIT) == b"abc"
