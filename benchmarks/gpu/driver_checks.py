"""Check runtime/sessions/driver.py on a real GPU, by each binding, beside torch. Needs no TensorRT; torch is optional."""

import ctypes
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from time import perf_counter
from typing import Any

import numpy as np

from chexnet_deploy.runtime.sessions.cuda_graphs import CudaGraph, GraphError, open_graphs
from chexnet_deploy.runtime.sessions.driver import BindingsDriver, CudaError, Driver, PycudaDriver, primary_context

BINDINGS = (("pycuda", "pycuda.driver", PycudaDriver), ("cuda-bindings", "cuda.bindings.driver", BindingsDriver))
N_CYCLES, N_CAPTURES, N_CALLS, N_BYTES = 1000, 50, 2000, 1 << 20


def check_bindings(write: Callable[[Mapping[str, Any]], None]) -> None:
    """Check each binding that imports, and write what is known after each check."""
    found: dict[str, dict[str, Any]] = {}
    torch = import_module("torch") if find_spec("torch") is not None else None
    torch = torch if torch is not None and torch.cuda.is_available() else None
    drivers: dict[str, tuple[Driver, Any]] = {}
    for name, module, kind in BINDINGS:
        found[name] = {}
        try:
            api = import_module(module)
            drivers[name] = kind(api), api
        except (ImportError, RuntimeError, CudaError) as err:
            found[name]["skipped"] = f"{type(err).__name__}: {err}"
    checks = [(name, *check) for name, (driver, _) in drivers.items() for check in _checks(driver, torch)]
    # Last, as it is known to end the capture or torch's own call.
    blocking = "capture on a blocking stream beside torch"
    checks += [
        (name, blocking, partial(_capture, driver, partial(_blocking, api), torch))
        for name, (driver, api) in drivers.items()
    ]
    for name, what, check in checks:
        try:
            found[name][what] = check()
        except Exception as err:  # noqa: BLE001 - the next check is worth having whatever became of this one
            found[name][what] = {"ok": False, "error": f"{type(err).__name__}: {err}"}
        write(found)


def _checks(driver: Driver, torch: Any) -> Iterator[tuple[str, Callable[[], Mapping[str, Any]]]]:
    yield "torch before", partial(_torch_answer, torch)
    yield "round trip", partial(_round_trip, driver)
    yield "memory over cycles", partial(_memory, driver)
    yield "another context stays current", partial(_other_context, driver)
    yield "cost", partial(_cost, driver)
    yield "capture beside torch", partial(_capture, driver, driver.open_stream, torch)
    yield "torch after", partial(_torch_answer, torch)


@contextmanager
def _buffers(driver: Driver, open_stream: Callable[[], Any]) -> Iterator[tuple[Any, Any, Any, Any]]:
    """Take a stream, two page-locked arrays and device memory, on the primary context."""
    with primary_context(driver, 0):
        stream, memory = open_stream(), driver.take_device(N_BYTES)
        given, got = driver.take_host(N_BYTES), driver.take_host(N_BYTES)
        start, end = driver.open_event(), driver.open_event()
        try:
            driver.record(start, stream)
            driver.record(end, stream)
            yield stream, memory, given, got
        finally:
            driver.wait(stream)
            driver.close_event(start)
            driver.close_event(end)
            driver.free_host(given)
            driver.free_host(got)
            driver.free_device(memory)
            driver.close_stream(stream)
            del stream, start, end  # pycuda closes them with their last reference


def _round_trip(driver: Driver) -> dict[str, Any]:
    with _buffers(driver, driver.open_stream) as (stream, memory, given, got):
        given[:] = np.arange(N_BYTES, dtype=np.uint64).astype(np.uint8)
        driver.upload(memory, given, stream)
        driver.download(got, memory, stream)
        driver.wait(stream)
        return {"ok": bool(np.array_equal(got, given)), "gpu": driver.describe(0).name, "cuda": driver.cuda_version()}


def _memory(driver: Driver) -> dict[str, Any]:
    _round_trip(driver)
    with primary_context(driver, 0):
        before, _ = driver.memory_info()
    start = perf_counter()
    for _ in range(N_CYCLES):
        _round_trip(driver)
    seconds = perf_counter() - start
    with primary_context(driver, 0):
        after, _ = driver.memory_info()
    return {"ok": before == after, "lost_bytes": before - after, "n": N_CYCLES, "ms_each": 1000.0 * seconds / N_CYCLES}


def _other_context(driver: Driver) -> dict[str, Any]:
    """Make another context current, as another library may, and look whether work through the driver leaves it so."""
    cuda, other, dropped = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(), ctypes.c_void_p()
    code = cuda.cuCtxCreate_v2(ctypes.byref(other), 0, 0)
    if code:
        return {"ok": False, "error": f"cuCtxCreate gave {code}"}
    try:
        before = _current(cuda)
        inside = _round_trip(driver)["ok"]
        after = _current(cuda)
    finally:
        cuda.cuCtxPopCurrent_v2(ctypes.byref(dropped))
        cuda.cuCtxDestroy_v2(other)
    return {"ok": inside and before == after == other.value, "left_on_the_thread": _current(cuda)}


def _current(cuda: ctypes.CDLL) -> int | None:
    context = ctypes.c_void_p()
    cuda.cuCtxGetCurrent(ctypes.byref(context))
    return context.value


def _cost(driver: Driver) -> dict[str, float]:
    """Return microseconds of one change of context, and of one asynchronous copy's call."""
    with _buffers(driver, driver.open_stream) as (stream, memory, given, _):
        start = perf_counter()
        for _ in range(N_CALLS):
            with primary_context(driver, 0):
                pass
        pushed = perf_counter() - start
        part, copied = given[:4096], 0.0
        for _ in range(N_CALLS // 100):
            start = perf_counter()
            for _ in range(100):  # fewer than the driver's queue holds
                driver.upload(memory, part, stream)
            copied += perf_counter() - start
            driver.wait(stream)
    return {"push_and_pop_us": 1e6 * pushed / N_CALLS, "copy_call_us": 1e6 * copied / N_CALLS}


def _torch_answer(torch: Any) -> dict[str, Any]:
    if torch is None:
        return {"skipped": "torch with CUDA is not installed"}
    answer = int(torch.arange(100_001, device="cuda").sum().item())
    return {"ok": answer == 5_000_050_000, "torch": torch.__version__}


def _capture(driver: Driver, open_stream: Callable[[], Any], torch: Any) -> dict[str, Any]:
    """Capture and launch copies again and again, while another thread works on torch's legacy stream."""
    ended, ready, torch_errors, runs = threading.Event(), threading.Event(), list[str](), [0]

    def work() -> None:
        while not ended.is_set():
            try:
                total = (torch.ones(1000, device="cuda") + 1).sum().item()
                if total != 2000.0:
                    torch_errors.append(f"answered {total}")
            except RuntimeError as err:
                torch_errors.append(str(err).splitlines()[0])
            runs[0] += 1
            ready.set()

    thread = threading.Thread(target=work, daemon=True)
    if torch is not None:
        thread.start()
        ready.wait(60)
    try:
        errors = _capture_copies(driver, open_stream)
    finally:
        ended.set()
        if torch is not None:
            thread.join()
    said = {"n": N_CAPTURES, "n_errors": len(errors), "errors": errors[:3]}
    if torch is not None:
        said |= {"torch_runs": runs[0], "n_torch_errors": len(torch_errors), "torch_errors": torch_errors[:3]}
    return {"ok": not errors and not torch_errors, **said}


def _capture_copies(driver: Driver, open_stream: Callable[[], Any]) -> list[str]:
    api, errors = open_graphs(), []
    with _buffers(driver, open_stream) as (stream, memory, given, got):

        def copies() -> None:
            driver.upload(memory, given, stream)
            driver.download(got, memory, stream)

        for i in range(N_CAPTURES):
            given[:], got[:] = i + 1, 0
            try:
                graph = CudaGraph(api, driver.stream_handle(stream), copies)
                graph.launch()
                driver.wait(stream)
                graph.free()
                if not (got == i + 1).all():
                    errors.append(f"launch {i} copied something else")
            except (GraphError, CudaError) as err:
                errors.append(str(err))
    return errors


def _blocking(api: Any) -> Any:
    return api.Stream(0) if hasattr(api, "Stream") else api.cuStreamCreate(0)[1]
