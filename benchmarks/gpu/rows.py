"""The rows of the GPU benchmark, the most important first, each a task for a process of its own. Starts nothing."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from chexnet_deploy.bundle.bundle import Bundle

PRECISION_ORDER = ("fp16", "int8", "fp32")
# The image that a radiographer waits for, and throughput: a plan for one batch size alone is tuned for it.
TWO_PLANS = (("single", (1, 1, 1), (1,)), ("offline", (128, 128, 128), (128,)))
ONE_PLAN = (("dynamic", (1, 128, 128), (1, 128, 8, 32)),)
SUSTAINED_S = 10.0


@dataclass(frozen=True, slots=True)
class Task:
    """What a worker does; paths are text, as it travels as JSON.

    Attributes:
        do: "build", "plan", "plan-checks", "onnxruntime", "torch", "ceilings", "driver-checks" or "tests".
        mode: of torch: "eager-fp32", "amp-fp16", "compile-fp16" or "autotune-fp16".
        profile: smallest, tuned-for and largest batch of the plan.
        batches: sizes to measure.
        idle_s: seconds of nothing before the one image that a radiographer waits for.
        sustained_s: how long to measure energy; 0 leaves it out.
    """

    do: str
    bundle: str = ""
    checkpoint: str = ""
    pixels: str = ""
    plan: str = ""
    timing_cache: str = ""
    backend: str = "tensorrt"
    optimization_level: int = 3
    profile: tuple[int, ...] = (1, 1, 1)
    mode: str = ""
    batches: tuple[int, ...] = ()
    device: str = "cuda"
    min_runs: int = 100
    min_s: float = 0.5
    idle_s: float = 5.0
    sustained_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Row:
    """One process.

    Attributes:
        bundle: what its answers are judged as; None where it gives none.
        spec: by whose gate; empty for that of the bundle's precision.
        needs: the row whose result it starts from.
        is_long: it builds or compiles, and has the longer deadline.
    """

    name: str
    python: str
    task: Task
    bundle: Bundle | None = None
    spec: str = ""
    needs: str | None = None
    is_long: bool = False


@dataclass(frozen=True, slots=True)
class Rows:
    """What the rows are made of.

    Attributes:
        found: bundles by name, fp32 among them.
        pythons: the interpreter for each TensorRT.
    """

    found: Mapping[str, Bundle]
    checkpoint: Path
    work: Path
    pixels: Path
    pythons: Mapping[str, str]
    optimization_level: int
    is_quick: bool

    def on_gpu(self) -> Iterator[Row]:
        """Yield all rows: first those that need no TensorRT."""
        yield Row("driver-checks", sys.executable, self._task("driver-checks"))
        yield Row("ceilings", sys.executable, self._task("ceilings", checkpoint=str(self.checkpoint)))
        yield self._torch("compile-fp16", (1, 128), sustained_s=SUSTAINED_S, is_long=True)
        yield self._torch("eager-fp32", (1, 128))
        yield self._torch("amp-fp16", (1, 128))
        precisions = {name: bundle.manifest.precision.value for name, bundle in self.found.items()}
        names = sorted(self.found, key=lambda name: PRECISION_ORDER.index(precisions[name]))
        for kind, profile, batches in ONE_PLAN if self.is_quick else TWO_PLANS:
            for backend in self.pythons:
                for name in names:
                    yield from self._plan(backend, name, kind, profile, batches)
        for backend in self.pythons:
            for name in names:
                yield self._checks(backend, name, "dynamic" if self.is_quick else "single")
        yield Row("tests", sys.executable, self._task("tests"), is_long=True)
        yield self._torch("autotune-fp16", (128,), is_long=True)

    def on_cpu(self) -> Iterator[Row]:
        """Yield rows that try the benchmark itself without a GPU."""

        def quick(row: Row) -> Row:
            task = replace(
                row.task, device="cpu", min_runs=5, min_s=0.0, idle_s=0.1, sustained_s=row.task.sustained_s / 50
            )
            return replace(row, task=task)

        yield quick(Row("ceilings", sys.executable, self._task("ceilings", checkpoint=str(self.checkpoint))))
        yield quick(self._torch("eager-fp32", (1, 2), sustained_s=SUSTAINED_S))
        for name, bundle in self.found.items():
            task = self._task("onnxruntime", bundle=str(bundle.path), pixels=str(self.pixels))
            yield quick(Row(f"onnxruntime-cpu-{name}", sys.executable, replace(task, batches=(1, 2)), bundle))

    def _task(self, do: str, *, bundle: str = "", checkpoint: str = "", pixels: str = "") -> Task:
        return Task(do, bundle, checkpoint, pixels)

    def _torch(self, mode: str, batches: Sequence[int], *, sustained_s: float = 0.0, is_long: bool = False) -> Row:
        task = self._task("torch", checkpoint=str(self.checkpoint), pixels=str(self.pixels))
        task = replace(task, mode=mode, batches=tuple(batches), sustained_s=sustained_s)
        return Row(f"torch-{mode}", sys.executable, task, self.found["fp32"], mode[-4:], is_long=is_long)

    def _plan(
        self, backend: str, name: str, kind: str, profile: tuple[int, ...], batches: tuple[int, ...]
    ) -> Iterator[Row]:
        row, bundle = self._plan_name(backend, name, kind), self.found[name]
        task = replace(
            self._task("build", bundle=str(bundle.path), pixels=str(self.pixels)),
            plan=self._plan_path(backend, name, kind),
            timing_cache=str(self.work / f"{row}.timing-cache"),
            backend=backend,
            optimization_level=self.optimization_level,
            profile=profile,
        )
        yield Row(f"{row}-build", self.pythons[backend], task, is_long=True)
        seconds = SUSTAINED_S if kind != "single" and bundle.manifest.precision.value != "fp32" else 0.0
        task = replace(task, do="plan", batches=batches, sustained_s=seconds)
        yield Row(row, self.pythons[backend], task, bundle, needs=f"{row}-build")

    def _checks(self, backend: str, name: str, kind: str) -> Row:
        row = self._plan_name(backend, name, kind)
        task = replace(self._task("plan-checks"), plan=self._plan_path(backend, name, kind), backend=backend)
        return Row(f"{row}-checks", self.pythons[backend], task, needs=f"{row}-build")

    def _plan_name(self, backend: str, name: str, kind: str) -> str:
        level = "" if self.optimization_level == 3 else f"-level{self.optimization_level}"
        return f"{backend}-{name}-{kind}{level}"

    def _plan_path(self, backend: str, name: str, kind: str) -> str:
        return str(self.work / "plans" / f"{self._plan_name(backend, name, kind)}-{self.found[name].id[:12]}")
