"""The guard's accounts: who gives way where places or memory run out, and what a deadline ends."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from chexnet_deploy.serving.http.config import MIB, ServeConfig
from chexnet_deploy.serving.http.limits import Address, Guard

BIG = 3 * MIB // 4


@dataclass
class Peer:
    """A transport as far as the guard looks."""

    address: Address
    n_unread: int = 0
    is_aborted: bool = False

    def get_extra_info(self, name: str) -> Address:
        assert name == "peername"
        return self.address

    def get_write_buffer_size(self) -> int:
        return self.n_unread

    def abort(self) -> None:
        self.is_aborted = True


@dataclass
class Door:
    """A guard with one MiB and eight places."""

    receive_s: float = 10.0
    answer_s: float = 30.0
    ended: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = ServeConfig(
            Path("none"),
            max_body_mib=1,
            max_held_mib=1,
            max_connections=8,
            receive_s=self.receive_s,
            answer_s=self.answer_s,
        )
        self.guard = Guard(config, self.ended.append)
        self._port = 0

    def enter(self, host: str = "10.0.0.1") -> Peer:
        self._port += 1
        peer = Peer((host, self._port))
        assert self.guard.entered(peer) == peer.address  # type: ignore[arg-type]  # a transport as far as is looked
        return peer

    def answer(self, peer: Peer, n_unread: int = 0) -> None:
        number = self.guard.begin(peer.address)
        self.guard.received(peer.address)
        peer.n_unread = n_unread
        self.guard.answered(peer.address, number)

    async def watch(self, seconds: float) -> None:
        watching = asyncio.ensure_future(self.guard.watch())
        await asyncio.sleep(seconds)
        watching.cancel()


def test_an_older_body_gives_way_to_a_newer() -> None:
    door = Door()
    old, new = door.enter(), door.enter()
    assert door.guard.hold(old.address, BIG)
    assert door.guard.hold(new.address, BIG)
    assert (old.is_aborted, new.is_aborted) == (True, False)
    assert door.guard.held_bytes == BIG
    assert door.ended == ["gave-way"]


def test_a_body_that_is_answered_gives_way_to_none() -> None:
    door = Door()
    old, new = door.enter(), door.enter()
    assert door.guard.hold(old.address, BIG)
    number = door.guard.begin(old.address)
    door.guard.received(old.address)
    assert not door.guard.hold(new.address, BIG)
    assert not old.is_aborted
    door.guard.answered(old.address, number)
    assert door.guard.hold(new.address, BIG)


def test_an_answer_that_is_not_read_counts_and_gives_way() -> None:
    door = Door()
    reader, sender = door.enter(), door.enter()
    door.answer(reader, n_unread=BIG)
    assert door.guard.held_bytes == BIG
    assert door.guard.hold(sender.address, BIG)
    assert reader.is_aborted


def test_an_answer_beyond_all_memory_is_ended() -> None:
    door = Door()
    reader = door.enter()
    door.answer(reader, n_unread=MIB + 1)
    assert reader.is_aborted
    assert door.guard.held_bytes == 0


def test_a_slow_reader_is_ended_and_a_quick_one_is_not() -> None:
    door = Door(answer_s=0.2)
    slow, quick = door.enter(), door.enter()
    door.answer(slow, n_unread=1000)
    door.answer(quick, n_unread=1000)
    quick.n_unread = 0
    asyncio.run(door.watch(0.7))
    assert (slow.is_aborted, quick.is_aborted) == (True, False)
    assert door.guard.held_bytes == 0
    assert door.ended == ["deadline"]


def test_between_requests_a_connection_lives_longer_than_within_one() -> None:
    door = Door(receive_s=0.2)
    idle, silent = door.enter(), door.enter()
    door.answer(idle)
    asyncio.run(door.watch(0.7))
    assert (idle.is_aborted, silent.is_aborted) == (False, True)


@pytest.mark.parametrize("crowd", [8, 12])
def test_the_peer_with_most_connections_makes_room(crowd: int) -> None:
    door = Door()
    lone = door.enter("10.0.0.2")
    many = [door.enter("10.0.0.1") for _ in range(crowd)]
    assert door.guard.n_connections == 8
    assert not lone.is_aborted
    assert [peer.is_aborted for peer in many] == [True] * (crowd - 7) + [False] * 7


def test_what_left_is_not_counted() -> None:
    door = Door()
    peer = door.enter()
    assert door.guard.hold(peer.address, BIG)
    door.guard.left(peer.address)
    assert (door.guard.held_bytes, door.guard.n_connections) == (0, 0)
    assert not door.guard.hold(peer.address, 1)
