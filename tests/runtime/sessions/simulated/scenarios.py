"""Sessions over the simulated driver, a scenario a process: `scenarios.py BINDING NAME`. Run by ../test_simulated_driver.py."""

import ctypes
import gc
import os
import sys
import threading
from collections.abc import Callable

import numpy as np

BINDING = sys.argv[1]
if BINDING == "cuda-bindings":
    sys.modules["pycuda"] = None  # type: ignore[assignment]  # as where it isn't installed

import tensorrt

from chexnet_deploy.errors import SessionError
from chexnet_deploy.runtime.sessions import trt as trt_session
from chexnet_deploy.runtime.sessions.base import run_in_batches
from chexnet_deploy.runtime.sessions.trt import TrtSession

cuda = ctypes.CDLL("libcuda.so.1")
cuda.sim_failed.restype = ctypes.c_char_p
cuda.sim_calls.restype = ctypes.c_long
cuda.sim_fail_call.argtypes = [ctypes.c_long, ctypes.c_int]
KINDS = ("device", "host", "stream", "event", "graph", "graph exec")
PIXELS = np.zeros((8, 1, 32, 32), np.uint8)
FREES = {
    "cuMemFree_v2",
    "cuMemFreeHost",
    "cuStreamDestroy_v2",
    "cuEventDestroy_v2",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
}


def new(plan: bytes = b"plan", **options: object) -> TrtSession:
    backend = "tensorrt_rtx" if tensorrt.IS_RTX else "tensorrt"
    return TrtSession(plan, backend=backend, resize_px=32, conv_types={}, **options)  # type: ignore[arg-type]


def alive() -> dict[str, int]:
    gc.collect()
    return {kind: cuda.sim_alive(number) for number, kind in enumerate(KINDS)}


def refusal(work: Callable[[], object]) -> str:
    try:
        work()
    except SessionError as err:
        return str(err)
    raise AssertionError("nothing was refused")


def check_balance(before: dict[str, int], *, lost: int = 0, after: str = "") -> None:
    now = alive()
    excess = sum(now[kind] - before[kind] for kind in KINDS)
    assert 0 <= excess <= lost, (before, now, after)
    assert (cuda.sim_depth(), cuda.sim_refs()) == (0, 1), (cuda.sim_depth(), cuda.sim_refs())
    assert tensorrt.violations == []


NOTHING = dict.fromkeys(KINDS, 0)


def life_of_a_session() -> None:
    session = new()
    assert (session.graph_batches, session.why_no_graphs) == ((1, 4, 8), None)
    for n in (1, 3, 8):  # 3 is not captured
        logits, maps = session.run(PIXELS[:n])
        assert (logits.shape, maps.shape) == ((n, 14), (n, 14, 1, 1))
        assert set(session.stage_times_ms(PIXELS[:n])) == {"upload", "compute", "download"}
    assert cuda.sim_depth() == 0
    session.close()
    session.close()
    check_balance(NOTHING)
    assert "closed" in refusal(lambda: session.run(PIXELS))


def opened_here_closed_in_another_thread() -> None:
    for _ in range(3):
        session = new(lanes=2)
        thread = threading.Thread(target=session.close)
        thread.start()
        thread.join()
        check_balance(NOTHING)


def opened_in_another_thread() -> None:
    opened: list[TrtSession] = []
    thread = threading.Thread(target=lambda: opened.append(new()))
    thread.start()
    thread.join()
    opened[0].run(PIXELS)
    opened[0].close()
    check_balance(NOTHING)


def two_sessions_in_any_order() -> None:
    for first_closed in (0, 1):
        sessions = [new(), new(with_graphs=False)]
        for session in sessions:
            session.run(PIXELS)
        sessions[first_closed].close()
        sessions[1 - first_closed].run(PIXELS)
        sessions[1 - first_closed].close()
        check_balance(NOTHING)


def dropped_without_close() -> None:
    for _ in range(3):
        session = new(lanes=2)
        session.run(PIXELS)
        del session
        check_balance(NOTHING)


def left_open_at_exit() -> None:
    kept = new()
    kept.run(PIXELS)
    globals()["kept"] = kept


def another_context_stays_current() -> None:
    cuda.sim_push_other()
    session = new()
    assert cuda.sim_other_is_current()
    session.run(PIXELS)
    session.stage_times_ms(PIXELS)
    assert cuda.sim_other_is_current()
    session.close()
    assert cuda.sim_other_is_current()
    assert cuda.sim_depth() == 1
    cuda.sim_pop_other()
    check_balance(NOTHING)


def threads_share_lanes() -> None:
    session, wrong = new(lanes=2), []

    def work() -> None:
        try:
            for _ in range(200):
                session.run(PIXELS[:2])
        except Exception as err:  # noqa: BLE001  # shown by the assert
            wrong.append(repr(err))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    session.close()
    check_balance(NOTHING)


def legacy_stream_works_while_graphs_are_captured() -> None:
    session = new()  # the stand-in puts work on the legacy stream whenever it is executed, captured or not
    session.run(PIXELS)
    assert session.why_no_graphs is None
    assert cuda.sim_capture_errors() == 0
    session.close()
    check_balance(NOTHING)


def _calls_of_a_life() -> int:
    start = cuda.sim_calls()
    _live()
    return int(cuda.sim_calls() - start)


def _live() -> None:
    session = new()
    try:
        session.run(PIXELS[:3])
        session.run(PIXELS[:4])
    finally:
        session.close()


def each_call_fails_in_turn() -> None:
    new().close()  # the primary context is retained
    n_calls, refused = _calls_of_a_life(), 0
    assert n_calls > 60, n_calls
    for n in range(n_calls):
        before = alive()
        cuda.sim_fail_call(n, 0)
        try:
            _live()
        except SessionError:
            refused += 1
        failed = cuda.sim_failed().decode()
        cuda.sim_fail_call(-1, 0)
        assert failed, n
        check_balance(before, lost=int(failed in FREES), after=f"call {n}, {failed}, failed")
    # What is left is capture, which falls back, and freeing, which goes on, and asking for the current context.
    assert refused > n_calls // 3, (refused, n_calls)


def the_gpu_fails_for_good() -> None:
    session = new()
    cuda.sim_fail_call(0, 1)
    assert "GPU failed" in refusal(lambda: session.run(PIXELS))
    assert "can't be trusted" in refusal(lambda: session.run(PIXELS))
    session.close()  # nothing can be freed, and the run has said so
    cuda.sim_fail_call(-1, 0)
    assert cuda.sim_depth() == 0


def out_of_memory_at_each_allocation() -> None:
    first = new()
    before = alive()
    n_allocations = sum(before[kind] for kind in ("device", "host"))
    for lanes in (1, 2):
        for n in range(n_allocations):
            cuda.sim_allow_allocations(n)
            said = refusal(lambda lanes=lanes: new(lanes=lanes))  # type: ignore[misc]
            assert "MiB are free" in said or "memory for the weights" in said, said
            cuda.sim_allow_allocations(-1)
            check_balance(before)
    cuda.sim_allow_allocations(n_allocations)  # enough to run, too little for a graph
    slow = new()
    cuda.sim_allow_allocations(-1)
    assert slow.graph_batches == ()
    assert "OUT_OF_MEMORY" in str(slow.why_no_graphs)
    slow.run(PIXELS)
    slow.close()
    first.close()
    check_balance(NOTHING)


def a_plan_that_is_refused() -> None:
    said = refusal(lambda: new(b"damaged"))
    assert "refuses this plan: Serialization assertion failed. Build it again" in said, said
    check_balance(NOTHING)


def tensorrt_for_another_driver() -> None:
    said = refusal(new)
    assert "supports CUDA 12.4: CUDA initialization failure with error: 35" in said, said
    assert "chexnet-deploy[gpu-cu12]" in said, said


def a_plan_that_cannot_be_captured() -> None:
    session = new()
    assert "can't be captured" in str(session.why_no_graphs)
    session.run(PIXELS)
    session.close()
    check_balance(NOTHING)


def profiles_not_shared() -> None:
    session = new()  # graphs want contexts of their own; running goes on without
    assert session.graph_batches == ()
    assert "refuses the shape" in str(session.why_no_graphs)
    session.run(PIXELS)
    session.close()
    check_balance(NOTHING)


def integrated_gpu_copies_nothing() -> None:
    session = new()
    session.run(PIXELS)
    assert alive()["device"] == 2  # weights and activations
    session.close()
    assert cuda.sim_copies() == 0
    check_balance(NOTHING)


def smallest_batch_is_eight() -> None:
    session = new()
    assert session.batch_range == (8, 16)
    logits, maps = run_in_batches(session, PIXELS[:3])
    assert (len(logits), len(maps)) == (3, 3)
    session.close()


def after_a_fork() -> None:
    session = new()
    child = os.fork()
    if child == 0:
        said = refusal(lambda: session.run(PIXELS))
        session.close()
        del session
        sys.exit(0 if "before a fork" in said and cuda.sim_refs() == 1 and cuda.sim_alive(0) > 0 else 9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    session.run(PIXELS)
    session.close()
    check_balance(NOTHING)


def nothing_is_registered_for_exit_twice() -> None:
    import atexit

    before = atexit._ncallbacks()
    for _ in range(20):
        new().close()
    assert atexit._ncallbacks() == before


if __name__ == "__main__":
    assert trt_session.open_driver().binding == BINDING
    globals()[sys.argv[2]]()
