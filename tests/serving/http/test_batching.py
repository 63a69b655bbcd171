"""The lane: what waits is joined, what is late is dropped, nobody gets another's answer or another's fault."""

import threading
from time import monotonic, sleep

import numpy as np
import pytest

from chexnet_deploy.errors import ServeError, SessionError
from chexnet_deploy.images.preprocessing import Pixels
from chexnet_deploy.runtime.sessions.base import Logits, Maps
from chexnet_deploy.serving.http import batching
from chexnet_deploy.serving.http.batching import BatchPlan, DeadlineError, Lane, measure_plan
from chexnet_deploy.serving.http.config import ServeConfig
from chexnet_deploy.serving.http.refusals import RequestError
from chexnet_deploy.serving.http.service import Admission

FOREVER_S = float("inf")
PLAN = BatchPlan((1, 2, 4), (4.0, 3.0, 2.0), is_invariant=True)


class SumSession:
    """Answers with each image's sum, once it may; 255 in the first pixel makes a run fail."""

    def __init__(self, *, lowest: int = 1, slot_noise: float = 0.0, image_s: float = 0.0) -> None:
        self.batch_range = (lowest, 64)
        self.sizes: list[int] = []
        self.checks: list[bool] = []
        self.probe = 0
        self.may_run = threading.Event()
        self.may_run.set()
        self._slot_noise, self._image_s = slot_noise, image_s

    def run(self, pixels: Pixels) -> tuple[Logits, Maps]:
        self.may_run.wait()
        self.sizes.append(len(pixels))
        sleep(self._image_s * len(pixels))
        if (pixels[:, 0, 0, 0] == 255).any():
            raise SessionError("a fault")
        sums = pixels.reshape(len(pixels), -1).sum(axis=1, dtype=np.float32)[:, None]
        sums = sums + self._slot_noise * np.arange(len(pixels), dtype=np.float32)[:, None]
        return sums, sums[:, :, None, None]

    def conv_types(self) -> dict[str, int]:
        return {}

    def stage_times_ms(self, pixels: Pixels) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass


def images(*values: int) -> Pixels:
    return np.array(values, np.uint8)[:, None, None, None] * np.ones((1, 1, 2, 2), np.uint8)


def open_lane(
    session: SumSession, plan: BatchPlan = PLAN, window_s: float = 0.0, check_every_s: float = FOREVER_S
) -> Lane:
    return Lane(
        session,
        plan,
        window_s=window_s,
        on_run=lambda n, infer_s: None,
        check=lambda: session.run(images(session.probe)),
        check_every_s=check_every_s,
        on_check=session.checks.append,
    )


def test_what_waits_is_joined_and_everyone_gets_their_own() -> None:
    session = SumSession()
    lane = open_lane(session)
    session.may_run.clear()
    first = lane.submit(images(1), FOREVER_S)
    while lane.n_images:  # until the lane has taken it
        sleep(0.001)
    others = [lane.submit(images(*values), FOREVER_S) for values in ((2,), (3, 4), (5,), (6,))]
    assert lane.n_images == 5
    session.may_run.set()
    assert first.result(10).logits.tolist() == [[4.0]]
    assert [f.result(10).logits.ravel().tolist() for f in others] == [[8.0], [12.0, 16.0], [20.0], [24.0]]
    assert session.sizes == [1, 4, 1]
    assert others[0].result().queue_s > 0.0
    lane.close()


def test_an_idle_lane_waits_for_nobody() -> None:
    lane = open_lane(SumSession(), window_s=5.0)
    began_s = monotonic()
    lane.submit(images(1), FOREVER_S).result(10)
    assert monotonic() - began_s < 2.0
    lane.close()


def test_what_is_late_is_dropped_before_it_runs() -> None:
    session = SumSession()
    lane = open_lane(session)
    with pytest.raises(DeadlineError):
        lane.submit(images(1), monotonic() - 1.0).result(10)
    assert session.sizes == []
    lane.close()


def test_one_images_fault_stays_its_own() -> None:
    session = SumSession()
    lane = open_lane(session)
    session.may_run.clear()
    lane.submit(images(1), FOREVER_S)
    while lane.n_images:
        sleep(0.001)
    bad, good = lane.submit(images(255), FOREVER_S), lane.submit(images(3), FOREVER_S)
    session.may_run.set()
    with pytest.raises(SessionError, match="a fault"):
        bad.result(10)
    assert good.result(10).logits.tolist() == [[12.0]]
    with pytest.raises(SessionError):
        lane.submit(images(255), FOREVER_S).result(10)
    assert not lane.is_failing  # as it still gives its known answer
    session.probe = 255
    with pytest.raises(SessionError):
        lane.submit(images(255), FOREVER_S).result(10)
    assert lane.is_failing
    lane.close()


def test_known_answers_are_asked_for_on_a_timer_and_while_they_are_wrong_nobody_is_answered() -> None:
    session = SumSession()
    lane = open_lane(session, check_every_s=0.02)

    def wait_for(check: bool) -> None:
        end_s = monotonic() + 30.0
        while not session.checks or session.checks[-1] is not check:
            assert monotonic() < end_s
            sleep(0.005)

    wait_for(True)  # nobody has asked for anything yet
    session.probe = 255
    wait_for(False)
    assert lane.is_failing
    with pytest.raises(SessionError, match="known answers are wrong"):
        lane.submit(images(1), FOREVER_S).result(10)  # though this one would run
    session.probe = 0
    wait_for(True)
    assert lane.submit(images(1), FOREVER_S).result(10).logits.tolist() == [[4.0]]
    lane.close()


def test_a_busy_lane_asks_for_them_too() -> None:
    session = SumSession(image_s=0.01)
    lane = open_lane(session, BatchPlan((1,), (1.0,), is_invariant=True), check_every_s=0.05)
    for future in [lane.submit(images(1), FOREVER_S) for _ in range(30)]:
        future.result(30)
    assert len(session.checks) >= 3
    lane.close()


def test_a_session_that_takes_no_small_batch_gets_copies_and_their_answers_are_dropped() -> None:
    session = SumSession(lowest=4)
    lane = open_lane(session, measure_plan(session, images(1, 2), 16))
    assert lane.submit(images(7), FOREVER_S).result(10).logits.tolist() == [[28.0]]
    assert session.sizes == [4]
    lane.close()


def test_closing_answers_what_waits_and_takes_nothing_more() -> None:
    session = SumSession()
    lane = open_lane(session)
    waiting = [lane.submit(images(n), FOREVER_S) for n in range(5)]
    lane.close()
    assert [f.result(0).logits.item() for f in waiting] == [0.0, 4.0, 8.0, 12.0, 16.0]
    with pytest.raises(SessionError):
        lane.submit(images(1), FOREVER_S)


class TimedSession(SumSession):
    """Takes as long as it says, by a clock of its own: 1 s at the runs whose numbers are `slow_at`."""

    def __init__(self, *, batch_s: float = 0.0, image_s: float = 0.0, slow_at: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.now_s = 0.0
        self._takes = lambda n: batch_s + image_s * n + 1.0 * (len(self.sizes) in slow_at)

    def run(self, pixels: Pixels) -> tuple[Logits, Maps]:
        self.now_s += self._takes(len(pixels))
        return super().run(pixels)


@pytest.mark.parametrize(
    ("session", "sizes"),
    [
        # Nothing an image: each larger batch is far cheaper per image.
        (TimedSession(batch_s=0.03), (1, 2, 4, 8)),
        # Nothing a run: no batch gains.
        (TimedSession(image_s=0.02), (1,)),
        # After 8 images alone the sizes 1, 2, 4, 8 are run, again and again: a moment decides nothing.
        (TimedSession(batch_s=0.02, slow_at=(10, 11)), (1, 2, 4, 8)),
    ],
)
def test_the_plan_keeps_sizes_that_gain(
    session: TimedSession, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "monotonic", lambda: session.now_s)
    assert measure_plan(session, images(1, 2, 3), 8).sizes == sizes


def test_no_batch_is_made_where_it_changes_answers() -> None:
    plan = measure_plan(SumSession(slot_noise=1e-3), images(1, 2, 3), 8)
    assert (plan.sizes, plan.is_invariant) == ((1,), False)


def test_the_plan_says_how_many_to_run() -> None:
    assert [PLAN.size_for(n) for n in (0, 1, 2, 3, 4, 100)] == [1, 1, 2, 2, 4, 4]


def test_admission_is_exact() -> None:
    admission = Admission(3)
    with admission.admit(2):
        assert not admission.is_full
        with pytest.raises(RequestError) as caught:
            admission.admit(2).__enter__()
        assert caught.value.status == 503
        with admission.admit(1):
            assert admission.is_full
    assert admission.n_images == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": -1},
        {"name": "a/b"},
        {"window_ms": float("nan")},
        {"max_batch": 65},
        {"max_held_mib": 1},
        {"deadline_s": 0.0},
        {"self_test_s": -1.0},
    ],
)
def test_wrong_options_are_refused(wrong: dict, tmp_path) -> None:
    with pytest.raises(ServeError, match="--"):
        ServeConfig(tmp_path, **wrong)
