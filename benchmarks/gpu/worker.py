"""One row of the GPU benchmark, in a process of its own: what crashes or hangs here costs that row alone.

    python -m benchmarks.gpu.worker TASK OUT

TASK is rows.Task as JSON. Started by __main__.py with the interpreter that has what is asked for, which may have numpy,
pydantic and TensorRT alone. OUT gets result.json, written again after every batch size, and logits.npy: float32 [N, C] of
all pixels.
"""

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any, cast

import numpy as np

from benchmarks.common import CHECKOUT
from benchmarks.gpu.measure import measure_batch, score
from benchmarks.gpu.meter import Meter
from benchmarks.gpu.rows import Task
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.errors import ChexnetError
from chexnet_deploy.evaluation.spec import BatchProfile, read_spec
from chexnet_deploy.files import write_file
from chexnet_deploy.runtime import Session, open_session

LANES = 3
LEAK_RUNS = 10_000
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG

Write = Callable[[Mapping[str, Any]], None]


def main() -> int:
    """Do the task; a mistake of the user's is one line."""
    # A benchmark that was killed must leave no process on the GPU.
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    task, out = Task(**json.loads(sys.argv[1])), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)

    def write(result: Mapping[str, Any]) -> None:
        write_file(out / "result.json", json.dumps(result).encode())

    try:
        with redirect_stdout(sys.stderr):
            _DO[task.do](task, out, write)
    except ChexnetError as err:
        print(err, file=sys.stderr)
        return 2
    return 0


def build(task: Task, out: Path, write: Write) -> None:
    """Build a plan where there is none yet."""
    from chexnet_deploy.export.tensorrt.build import build_tensorrt_plan

    bundle, plan = Bundle.open(Path(task.bundle)), Path(task.plan)
    if not plan.exists():
        low, best, high = task.profile
        spec = read_spec(bundle.manifest.precision.value)
        options = spec.build.model_copy(update={"optimization_level": task.optimization_level})
        spec = spec.model_copy(update={"batch": BatchProfile(min=low, opt=best, max=high), "build": options})
        cache: Any = {"backend": task.backend, "timing_cache": Path(task.timing_cache)}
        build_tensorrt_plan(bundle, spec, plan, **cache)
    write(_about(Bundle.open(plan)))


def plan(task: Task, out: Path, write: Write) -> None:
    """Measure a plan with and without CUDA graphs and by a bare loop, and score the pixels with it."""
    from benchmarks.gpu.bare import BareEngine
    from chexnet_deploy.runtime.sessions.trt import TrtSession

    built = Bundle.open(Path(task.plan))
    with ExitStack() as owned:
        graphs = TrtSession.open(built, lanes=LANES)
        owned.callback(graphs.close)
        plain = TrtSession.open(built, with_graphs=False)
        owned.callback(plain.close)

        bare_owned = owned.enter_context(ExitStack())

        def variants(size: int) -> dict[str, Session]:
            bare_owned.close()  # of the size before
            bare = BareEngine(built, size)
            bare_owned.callback(bare.close)
            first: dict[str, Session] = {"graphs": graphs} if size in graphs.graph_batches else {}
            return {**first, "plain": plain if first else graphs, "bare": cast(Session, bare)}

        about = {**_about(built), "why_no_graphs": graphs.why_no_graphs, "lanes": LANES}
        _measure(task, out, write, about, variants, LANES)


def onnxruntime(task: Task, out: Path, write: Write) -> None:
    """Measure ONNX Runtime on the CPU, to try the benchmark itself."""
    session = open_session(Bundle.open(Path(task.bundle)), provider="cpu")
    about = {"conv_types": dict(session.conv_types())}
    _measure(task, out, write, about, lambda size: {"plain": session}, 2)
    session.close()


def torch(task: Task, out: Path, write: Write) -> None:
    """Measure PyTorch as its best users would run it without TensorRT."""
    import torch as pytorch

    from benchmarks.gpu.torch_model import TorchModel

    model = cast(Session, TorchModel(Path(task.checkpoint), task.mode, task.device))
    form = "fp32" if task.mode.endswith("fp32") else "fp16"
    _measure(task, out, write, {"torch": pytorch.__version__, "form": form}, lambda size: {"plain": model}, 1)


def ceilings(task: Task, out: Path, write: Write) -> None:
    """Measure the rates that bound any engine here, and give the per-layer bound by form and batch size."""
    import torch as pytorch

    from benchmarks.gpu.roofline import conv_costs, forms, least_ms, measure_copy, measure_node_us, measure_product
    from chexnet_deploy.export.from_torch.checkpoint import read_checkpoint

    loaded = read_checkpoint(Path(task.checkpoint))
    side_px = loaded.manifest.preprocessing.resize_px
    costs = conv_costs(loaded.model, pytorch.zeros(1, 3, side_px, side_px))
    on_gpu = task.device == "cuda"
    copy = measure_copy(task.device, (1 << 30) if on_gpu else (1 << 24))
    pytorch.backends.cuda.matmul.allow_tf32 = False  # float32 plans have none either
    rates, errors = {}, {}
    for name, dtype in (("fp32", pytorch.float32), ("fp16", pytorch.float16), ("int8", pytorch.int8)):
        try:
            rates[name] = measure_product(task.device, dtype, 8192 if on_gpu else 256)
        except RuntimeError as err:  # an operation that this torch lacks here
            errors[name] = str(err)
    write(
        {
            "gmacs_per_image": sum(cost.macs for cost in costs) / 1e9,
            "elements_per_image": sum(cost.inputs + cost.outputs for cost in costs),
            "copy_bytes_per_s": copy,
            "operations_per_s": rates,
            "graph_node_us": measure_node_us() if on_gpu else None,
            "per_layer_bound_ms": {
                name: {str(batch): least_ms(costs, batch, copy, form) for batch in (1, 8, 32, 128)}
                for name, form in forms(rates).items()
            },
            "errors": errors,
        }
    )


def driver_checks(task: Task, out: Path, write: Write) -> None:
    """Check runtime/sessions/driver.py on this GPU by each binding, beside torch."""
    from benchmarks.gpu.driver_checks import check_bindings

    check_bindings(write)


def plan_checks(task: Task, out: Path, write: Write) -> None:
    """Does the plan answer alike in every slot, batch size and thread, and does it leak?"""
    from benchmarks.gpu.plan_checks import invariance, memory_growth

    bundle = Bundle.open(Path(task.plan))
    result: dict[str, Any] = {"invariance": invariance(bundle).model_dump()}
    write(result)
    write({**result, "growth": memory_growth(bundle, LEAK_RUNS)})


def tests(task: Task, out: Path, write: Write) -> None:
    """Run the tests that need a GPU; one that can't run is a failure."""
    import pytest

    os.environ["CHEXNET_REQUIRE_GPU"] = "1"
    options = ("-m", "gpu", "-q", "-p", "no:cacheprovider", "--rootdir", str(CHECKOUT), str(CHECKOUT / "tests"))
    code = int(pytest.main([*options]))
    write({"exit_code": code})
    if code:
        raise ChexnetError(f"pytest ended with {code}. Read {out}.log")


_DO: Mapping[str, Callable[[Task, Path, Write], None]] = {
    "build": build,
    "plan": plan,
    "onnxruntime": onnxruntime,
    "torch": torch,
    "ceilings": ceilings,
    "driver-checks": driver_checks,
    "plan-checks": plan_checks,
    "tests": tests,
}


def _about(built: Bundle) -> dict[str, Any]:
    manifest = built.manifest
    assert manifest.engine is not None
    assert manifest.target is not None
    form = "mixed" if manifest.dialect == "mixed" else manifest.precision.value
    return {
        "form": form,
        "dialect": manifest.dialect,
        "engine": manifest.engine.model_dump(mode="json"),
        "target": manifest.target.model_dump(),
        "known_answer_error": manifest.probe_max_abs_logit_error,
    }


def _measure(
    task: Task,
    out: Path,
    write: Write,
    about: Mapping[str, Any],
    variants: Callable[[int], dict[str, Session]],
    lanes: int,
) -> None:
    """Measure at each batch size, then score all pixels with the best variant of the largest."""
    pixels = np.load(task.pixels)
    meter = Meter(0 if task.device == "cuda" else None)
    batches: dict[str, Any] = {}
    for size in task.batches:
        batch = np.resize(pixels, (size, *pixels.shape[1:]))
        sessions = variants(size)
        batches[str(size)] = measure_batch(sessions, batch, task, meter, lanes)
        write({**about, "batches": batches})
        if size == max(task.batches):
            best = next(iter(sessions.values()))
    np.save(out / "logits.npy", score(best, pixels, max(task.batches)))


if __name__ == "__main__":
    sys.exit(main())
