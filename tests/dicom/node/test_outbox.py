import sqlite3
from pathlib import Path
from random import Random

import pytest

from chexnet_deploy.dicom.node.config import MIB
from chexnet_deploy.dicom.node.config import Outbox as OutboxSettings
from chexnet_deploy.dicom.node.outbox import OUTBOX, Counts, Outbox, OutboxFullError
from chexnet_deploy.dicom.node.worker import Answer
from chexnet_deploy.errors import NodeError

SETTINGS = OutboxSettings(first_retry_s=2.0, max_retry_s=60.0, max_mib=1, max_breaks=3)


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def outbox(tmp_path: Path, clock: Clock) -> Outbox:
    return Outbox.open(tmp_path, SETTINGS, clock=clock, chance=Random(0))


def drain(outbox: Outbox, destination: str) -> list[bytes]:
    sent = []
    while (entry := outbox.next_entry(destination)[0]) is not None:
        outbox.sent(entry)
        sent.append(entry.document)
    return sent


def test_each_destination_gets_everything_in_order(outbox: Outbox) -> None:
    for i in range(5):
        outbox.put(f"image-{i}", Answer((b"sr%d" % i, b"sc%d" % i)), ["A", "B"])
    expected = [b"%s%d" % (kind, i) for i in range(5) for kind in (b"sr", b"sc")]
    assert drain(outbox, "A") == expected
    assert drain(outbox, "B") == expected
    assert outbox.counts() == Counts(waiting=0, sent=20, parked=0)


def test_put_again_changes_nothing_before_or_after_sending(outbox: Outbox) -> None:
    for _ in range(2):
        outbox.put("image", Answer((b"one",)), ["A"])
    assert drain(outbox, "A") == [b"one"]
    outbox.put("image", Answer((b"one",)), ["A"])
    assert drain(outbox, "A") == []


def test_a_refusal_leaves_nothing_to_send(outbox: Outbox) -> None:
    outbox.put("image", Answer(refusal="not-a-chest"), ["A"])
    assert outbox.counts() == Counts(0, 0, 0)


def test_waits_double_up_to_the_longest_and_nothing_overtakes(outbox: Outbox, clock: Clock) -> None:
    outbox.put("first", Answer((b"first",)), ["A", "B"])
    outbox.put("second", Answer((b"second",)), ["A", "B"])
    waits = []
    for _ in range(9):
        entry, _ = outbox.next_entry("A")
        assert entry is not None
        assert entry.document == b"first"
        assert outbox.retry_later(entry, "unreachable", was_let_in=False)
        none, wait_s = outbox.next_entry("A")
        assert none is None
        waits.append(wait_s)
        clock.now_s += wait_s + 0.001
    for i, wait_s in enumerate(waits):
        longest_s = min(2.0 * 2.0**i, 60.0)
        assert longest_s / 2 <= wait_s <= longest_s
    assert len(set(waits)) == len(waits)  # jitter
    assert drain(outbox, "B") == [b"first", b"second"]  # the other destination was not held up
    assert drain(outbox, "A") == [b"first", b"second"]


def test_a_clock_set_back_holds_nothing_longer_than_the_longest_wait(outbox: Outbox, clock: Clock) -> None:
    outbox.put("image", Answer((b"x",)), ["A"])
    entry, _ = outbox.next_entry("A")
    assert entry is not None
    outbox.retry_later(entry, "unreachable", was_let_in=False)
    clock.now_s -= 30 * 365 * 86_400.0
    assert outbox.next_entry("A") == (None, SETTINGS.max_retry_s)


def test_refused_document_is_parked_and_the_next_one_goes(outbox: Outbox) -> None:
    outbox.put("poison", Answer((b"poison",)), ["A"])
    outbox.put("good", Answer((b"good",)), ["A"])
    entry, _ = outbox.next_entry("A")
    assert entry is not None
    outbox.park(entry, "status-c000")
    assert drain(outbox, "A") == [b"good"]
    assert outbox.counts() == Counts(waiting=0, sent=1, parked=1)


def test_document_that_breaks_its_destination_is_parked_at_last(outbox: Outbox, clock: Clock) -> None:
    outbox.put("poison", Answer((b"poison",)), ["A"])
    for is_kept in (True, True, False):
        clock.now_s += 100.0
        entry, _ = outbox.next_entry("A")
        assert entry is not None
        assert outbox.retry_later(entry, "broke-off", was_let_in=True) is is_kept
    assert outbox.counts() == Counts(0, 0, 1)


def test_a_week_without_a_destination_loses_nothing(tmp_path: Path, clock: Clock) -> None:
    outbox = Outbox.open(tmp_path, OutboxSettings(max_retry_s=3600.0), clock=clock, chance=Random(0))
    for i in range(20):
        outbox.put(f"image-{i:02d}", Answer((b"%02d" % i,)), ["A"])
    end_s, attempts = clock.now_s + 7 * 86_400.0, 0
    while clock.now_s < end_s:
        entry, wait_s = outbox.next_entry("A")
        if entry is not None:
            outbox.retry_later(entry, "unreachable", was_let_in=False)
            attempts += 1
        clock.now_s += wait_s + 0.001
    assert 7 * 24 <= attempts <= 2 * 7 * 24 + 20  # an hour apart, or from half of one with jitter
    clock.now_s += 3600.0
    assert drain(outbox, "A") == [b"%02d" % i for i in range(20)]


def test_no_room_takes_all_of_an_answer_or_nothing(outbox: Outbox) -> None:
    big = bytes(MIB // 2)
    outbox.put("one", Answer((big,)), ["A"])
    with pytest.raises(OutboxFullError):
        outbox.put("two", Answer((b"small", big)), ["A"])
    assert outbox.counts().waiting == 1
    drain(outbox, "A")
    outbox.put("two", Answer((b"small", big)), ["A"])
    assert outbox.counts() == Counts(waiting=2, sent=1, parked=0)


def test_what_was_put_is_there_after_opening_again(tmp_path: Path, outbox: Outbox, clock: Clock) -> None:
    outbox.put("image", Answer((b"x", b"y")), ["A"])
    entry, _ = outbox.next_entry("A")
    assert entry is not None
    outbox.sent(entry)
    outbox.close()
    again = Outbox.open(tmp_path, SETTINGS, clock=clock)
    assert drain(again, "A") == [b"y"]


def test_two_nodes_cannot_share_an_outbox(tmp_path: Path, outbox: Outbox) -> None:
    outbox.put("image", Answer((b"x",)), ["A"])
    with pytest.raises(NodeError, match="no other node"):
        Outbox.open(tmp_path, SETTINGS)


def test_damaged_file_is_refused(tmp_path: Path, outbox: Outbox) -> None:
    for i in range(50):
        outbox.put(f"image-{i}", Answer((bytes(2000),)), ["A"])
    outbox.close()
    path = tmp_path / OUTBOX
    content = bytearray(path.read_bytes())
    content[8192:12288] = bytes(4096)
    path.write_bytes(content)
    with pytest.raises(NodeError):
        Outbox.open(tmp_path, SETTINGS)


@pytest.mark.parametrize("state", ["sent", "parked", "waiting"])
def test_documents_are_sent_again_on_demand(outbox: Outbox, clock: Clock, state: str) -> None:
    for instance in ("aa", "bb"):
        outbox.put(f"01-{instance}-ff", Answer((b"%s 1" % instance.encode(), b"%s 2" % instance.encode())), ["A"])
    while (entry := outbox.next_entry("A")[0]) is not None:
        if state == "sent":
            outbox.sent(entry)
        elif state == "parked":
            outbox.park(entry, "status-c000")
        else:
            outbox.retry_later(entry, "unreachable", was_let_in=False)
    assert outbox.resend("bb") == 2
    assert outbox.resend("cc") == 0
    if state == "waiting":  # what comes before still waits its time, and nothing overtakes it
        clock.now_s += 10.0
        assert drain(outbox, "A") == [b"aa 1", b"aa 2", b"bb 1", b"bb 2"]
    else:
        assert drain(outbox, "A") == [b"bb 1", b"bb 2"]


@pytest.mark.parametrize(("keep_mib", "kept"), [(0, []), (1, [b"2", b"3"]), (2, [b"0", b"1", b"2", b"3"])])
def test_only_so_much_of_what_was_sent_is_kept(tmp_path: Path, keep_mib: int, kept: list[bytes]) -> None:
    outbox = Outbox.open(tmp_path, OutboxSettings(keep_mib=keep_mib))
    for i in range(4):
        outbox.put(f"{i}-aa-ff", Answer((b"%d" % i * (MIB // 2),)), ["A"])
    drain(outbox, "A")
    outbox.forget_sent()
    outbox.resend("aa")
    assert [document[:1] for document in drain(outbox, "A")] == kept


def test_states_are_counted_with_their_reasons(outbox: Outbox) -> None:
    outbox.put("1-aa-ff", Answer((b"x", b"y", b"z")), ["A", "B"])
    first, second = (outbox.next_entry("A")[0] for _ in range(2))
    assert first is not None
    assert first == second
    outbox.park(first, "status-a900")
    entry, _ = outbox.next_entry("A")
    assert entry is not None
    outbox.sent(entry)
    assert outbox.destinations() == {"A": {"failed status-a900": 1, "sent": 1, "waiting": 1}, "B": {"waiting": 3}}


def test_sent_documents_that_are_not_kept_leave_nothing_behind(tmp_path: Path) -> None:
    outbox = Outbox.open(tmp_path, SETTINGS.model_copy(update={"keep_mib": 0}))
    outbox.put("image", Answer((b"CANARY" * 100,)), ["A"])
    drain(outbox, "A")
    outbox.close()
    assert b"CANARY" not in (tmp_path / OUTBOX).read_bytes()


def test_forgotten_lines_are_the_oldest(tmp_path: Path) -> None:
    outbox = Outbox.open(tmp_path, SETTINGS.model_copy(update={"remember": 2}))
    for i in range(5):
        outbox.put(f"image-{i}", Answer((b"x",)), ["A"])
    drain(outbox, "A")
    outbox.forget_sent()
    assert outbox.counts().sent == 2
    outbox.close()
    with sqlite3.connect(tmp_path / OUTBOX) as connection:
        assert [row[0] for row in connection.execute("SELECT source FROM entry")] == ["image-3", "image-4"]
