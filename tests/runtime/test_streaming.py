import threading
import time
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.rigs.plan_card import CARD
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.datasets.chestxray14 import ChestXray14
from chexnet_deploy.errors import ImageError, ImageRefusedError, RefusalReason, SessionError
from chexnet_deploy.files import FileContent
from chexnet_deploy.images.gray import Gray
from chexnet_deploy.images.preprocessing import Pixels
from chexnet_deploy.runtime.loading import BUSY_ATTEMPTS, ImageSource, PixelLoader
from chexnet_deploy.runtime.predictor import Prediction, Predictor
from chexnet_deploy.runtime.sessions.base import Session
from chexnet_deploy.runtime.sessions.open import open_session
from chexnet_deploy.runtime.streaming import GROUP_SIZE, Flow, choose_flow, in_order, iter_groups, iter_lists

MEMORY_GROWTH_LIMIT_MIB = 8.0


class Counting:
    """A real session that counts how it is called; the sizes it takes may be narrowed."""

    def __init__(self, session: Session, batch_range: tuple[int, int] = (1, 256)) -> None:
        self.batch_range = batch_range
        self.batches: list[int] = []
        self.most_at_a_time = 0
        self._session, self._at_work, self._lock = session, 0, threading.Lock()

    def run(self, pixels: Pixels) -> tuple[np.ndarray, np.ndarray]:
        with self._lock:
            self.batches.append(len(pixels))
            self._at_work += 1
            self.most_at_a_time = max(self.most_at_a_time, self._at_work)
        time.sleep(0.002)
        try:
            return self._session.run(pixels)
        finally:
            with self._lock:
                self._at_work -= 1


@pytest.fixture(scope="module")
def session(bundles: dict[str, Bundle]) -> Iterator[Session]:
    opened = open_session(bundles["fp32"], threads=1, provider="cpu")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def paths(phantom: ChestXray14, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Eleven images; the third and the last can't be read."""
    bad = tmp_path_factory.mktemp("bad") / "bad.png"
    bad.write_bytes(b"no picture")
    good = [radiograph.path for radiograph in phantom.split("test")[:9] if radiograph.path is not None]
    return [*good[:2], bad, *good[2:], bad.with_name("absent.png")]


@settings(max_examples=30)
@given(
    delays=st.lists(st.sampled_from([0.0, 0.0, 0.001, 0.003]), max_size=20),
    workers=st.integers(1, 4),
    ahead=st.integers(1, 6),
)
def test_answers_come_in_order_and_no_more_is_begun_than_allowed(delays: list[float], workers: int, ahead: int) -> None:
    n_taken = n_answered = 0
    most_open = 0

    def items() -> Iterator[tuple[int, float]]:
        nonlocal n_taken, most_open
        for item in enumerate(delays):
            n_taken += 1
            most_open = max(most_open, n_taken - n_answered)
            yield item

    def work(item: tuple[int, float]) -> int:
        time.sleep(item[1])
        return item[0]

    answers = []
    for answer in in_order(work, items(), workers=workers, ahead=ahead):
        answers.append(answer)
        n_answered += 1
    assert answers == list(range(len(delays)))
    assert most_open <= ahead


def test_items_are_worked_on_side_by_side() -> None:
    # Each waits for two others: one after another, they would never end.
    together = threading.Barrier(3, timeout=20)
    assert len(list(in_order(lambda _: together.wait(), range(6), workers=3, ahead=3))) == 6


def test_an_error_comes_in_its_turn_and_ends_the_work() -> None:
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 3:
            raise SessionError("broken")
        return item

    answers = in_order(work, count(), workers=2, ahead=4)
    assert list(islice(answers, 3)) == [0, 1, 2]
    with pytest.raises(SessionError, match="broken"):
        next(answers)
    assert max(begun) <= 6


def test_who_stops_early_leaves_no_thread_behind() -> None:
    before = threading.active_count()
    answers = in_order(lambda item: item, count(), workers=3, ahead=6)
    assert next(answers) == 0
    answers.close()
    assert threading.active_count() == before


def test_lists_of_n() -> None:
    assert list(iter_lists(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(iter_lists([], 3)) == []


def test_the_first_batches_are_carried_alone_and_the_others_in_groups_of_eight_images() -> None:
    groups = list(iter_groups(iter_lists(range(40), 2), batch_size=2, n_single=3))
    assert [len(group) for group in groups] == [1, 1, 1, 4, 4, 4, 4, 1]
    assert [each for group in groups for batch in group for each in batch] == list(range(40))
    assert [len(group) for group in iter_groups(iter_lists(range(40), 16), batch_size=16, n_single=1)] == [1, 1, 1]


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"calls": 0}, {"calls": 3, "workers": 2}])
def test_a_flow_checks_itself(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="calls <= workers"):
        Flow(**wrong)


def test_the_flow_fits_the_session(bundles: dict[str, Bundle]) -> None:
    manifest = bundles["fp32"].manifest
    # Four cores: a call on each, two calls of two threads, or one call on all; and one worker more, which may wait.
    assert choose_flow(manifest, threads=1, provider="cpu", cores=4) == Flow(1, calls=4, workers=5)
    assert choose_flow(manifest, threads=2, provider="cpu", cores=4) == Flow(1, calls=2, workers=5)
    assert choose_flow(manifest, threads=None, provider="cpu", cores=4) == Flow(1, calls=1, workers=5)
    assert choose_flow(manifest, threads=None, provider="cuda", cores=4) == Flow(16, calls=1, workers=5)
    plan = manifest.model_copy(update={"engine": CARD.model_copy(update={"batch": (1, 4, 8)})})
    assert choose_flow(plan, threads=None, provider="cpu", cores=4) == Flow(8, calls=1, workers=5)


def test_a_stream_gives_what_predict_gives_to_the_last_bit(
    bundles: dict[str, Bundle], session: Session, paths: list[Path]
) -> None:
    predictor = Predictor(session, bundles["fp32"].manifest, Flow(calls=2, workers=3))
    answers = list(predictor.predict_stream(paths))
    assert [path for path, _, _ in answers] == paths
    for path, answer, content in answers:
        assert content == (FileContent.of(path.read_bytes()) if path.exists() else None)
        if isinstance(answer, ImageError):
            assert path.name in ("bad.png", "absent.png")
        else:
            alone = predictor.predict(path)
            assert (answer.probabilities, answer.present) == (alone.probabilities, alone.present)
            assert answer.maps == {}


def test_maps_are_kept_where_they_are_asked_for(
    bundles: dict[str, Bundle], session: Session, paths: list[Path]
) -> None:
    predictor = Predictor(session, bundles["fp32"].manifest, Flow())
    (_, answer, _), *_ = predictor.predict_stream(paths[:1], with_maps=True)
    assert isinstance(answer, Prediction)
    alone = predictor.predict(paths[0])
    assert all(np.array_equal(answer.maps[finding], alone.maps[finding]) for finding in alone.maps)


def test_a_bad_file_says_why_and_keeps_nothing_alive(
    bundles: dict[str, Bundle], session: Session, paths: list[Path]
) -> None:
    predictor = Predictor(session, bundles["fp32"].manifest, Flow())
    answers = [answer for _, answer, _ in predictor.predict_stream(paths)]
    bad, absent = answers[2], answers[10]
    assert isinstance(bad, ImageError)
    assert isinstance(absent, ImageError)
    assert "neither a PNG nor a JPEG" in str(bad)
    assert "no such file" in str(absent)
    # Frames of a traceback would hold the file's bytes and pixels.
    assert (bad.__traceback__, bad.__cause__) == (None, None)


def test_batches_are_cut_by_place_so_that_a_tail_gives_the_same_bits(
    bundles: dict[str, Bundle], session: Session, paths: list[Path]
) -> None:
    counting = Counting(session)
    predictor = Predictor(counting, bundles["fp32"].manifest, Flow(batch_size=4, calls=1, workers=2))  # type: ignore[arg-type]

    def shown(start: int) -> list[object]:
        return [
            getattr(answer, "probabilities", str(answer)) for _, answer, _ in predictor.predict_stream(paths[start:])
        ]

    whole = shown(0)
    assert sorted(counting.batches) == [2, 3, 4]  # places 0-3 and 8-10 hold one bad file each
    assert shown(4) == whole[4:]
    assert shown(8) == whole[8:]


def test_a_small_batch_is_filled_up_for_a_session_that_takes_no_smaller(
    bundles: dict[str, Bundle], session: Session, paths: list[Path]
) -> None:
    counting = Counting(session, batch_range=(4, 8))
    predictor = Predictor(counting, bundles["fp32"].manifest, Flow(batch_size=8))  # type: ignore[arg-type]
    answers = list(predictor.predict_stream(paths))
    assert len(answers) == len(paths)
    assert sorted(counting.batches) == [4, 7]  # 8 with one bad file, and 2 filled up to 4
    last = answers[9][1]
    assert isinstance(last, Prediction)
    assert last.probabilities == pytest.approx(predictor_alone(bundles, session, paths[9]), abs=1e-5)


def predictor_alone(bundles: dict[str, Bundle], session: Session, path: Path) -> dict[str, float]:
    return Predictor(session, bundles["fp32"].manifest).predict(path).probabilities


@pytest.mark.parametrize("calls", [1, 2])
def test_no_more_calls_at_a_time_than_the_flow_says(
    bundles: dict[str, Bundle], session: Session, paths: list[Path], calls: int
) -> None:
    counting = Counting(session)
    predictor = Predictor(counting, bundles["fp32"].manifest, Flow(calls=calls, workers=4))  # type: ignore[arg-type]
    list(predictor.predict_stream(paths * 3))
    assert counting.most_at_a_time == calls


@pytest.mark.parametrize("n_busy", [0, 1, BUSY_ATTEMPTS - 1, BUSY_ATTEMPTS])
def test_a_file_that_a_busy_machine_had_no_time_for_is_tried_again(
    bundles: dict[str, Bundle],
    session: Session,
    paths: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    n_busy: int,
) -> None:
    loads, whole = 0, PixelLoader.read

    def read(loader: PixelLoader, image: ImageSource, *, name: object) -> Gray:
        nonlocal loads
        loads += 1
        if loads <= n_busy:
            raise ImageRefusedError(RefusalReason.BUSY, f"{name}: found a machine too busy")
        return whole(loader, image, name=name)

    predictor = Predictor(session, bundles["fp32"].manifest, Flow())
    monkeypatch.setattr(PixelLoader, "read", read)
    ((_, answer, content),) = predictor.predict_stream(paths[:1])
    if n_busy < BUSY_ATTEMPTS:
        assert (isinstance(answer, Prediction), loads) == (True, n_busy + 1)
        assert content == FileContent.of(paths[0].read_bytes())
    else:
        assert isinstance(answer, ImageError)
        assert (answer.reason, loads) == (RefusalReason.BUSY, BUSY_ATTEMPTS)
        assert content is None  # nothing is known of the file: a table tries it again


def test_a_closed_session_stops_the_stream(bundles: dict[str, Bundle], paths: list[Path]) -> None:
    with Predictor.open(bundles["fp32"].path, threads=1, provider="cpu") as predictor:
        pass
    with pytest.raises(SessionError, match="closed"):
        next(predictor.predict_stream(paths))


def test_an_endless_stream_takes_a_few_paths_ahead(
    bundles: dict[str, Bundle], session: Session, paths: list[Path]
) -> None:
    taken = 0

    def endless() -> Iterator[Path]:
        nonlocal taken
        while True:
            taken += 1
            yield paths[0]

    predictor = Predictor(session, bundles["fp32"].manifest, Flow(batch_size=2, calls=1, workers=3))
    assert len(list(islice(predictor.predict_stream(endless()), 10))) == 10
    assert taken <= 10 + 2 * 3 * GROUP_SIZE


def test_memory_stays_flat(bundles: dict[str, Bundle], session: Session, phantom_root: Path) -> None:
    images = sorted((phantom_root / "images").iterdir()) * 5
    assert len(images) > 1000
    predictor = Predictor(session, bundles["fp32"].manifest, Flow(calls=2, workers=3))
    settled_mib = 0.0
    for place, (_, answer, _) in enumerate(predictor.predict_stream(images)):
        assert isinstance(answer, Prediction)
        if place == 300:  # every worker has had a few groups
            settled_mib = resident_mib()
    assert resident_mib() - settled_mib <= MEMORY_GROWTH_LIMIT_MIB


def resident_mib() -> float:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return float(status["VmRSS"].split()[0]) / 1024.0
