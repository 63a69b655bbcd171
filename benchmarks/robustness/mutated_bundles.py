"""Ten thousand ways to damage, forge, age and dress up a signed bundle: all must be refused before a backend sees a byte.

    python -m benchmarks.robustness.mutated_bundles BUNDLE [--timed BUNDLE]

Writes results/mutated-bundles.json; exit 1 on a failure.

BUNDLE, an ONNX bundle, is copied as a release and signed; a plan bundle of random bytes is signed beside it. Each mutation is
done to one of them, which Predictor.open then opens with trust, under a deadline. ONNX Runtime's and TensorRT's entries are
watched, and untouched bundles must reach them: else a count of zero would prove nothing.
"""

import base64
import itertools
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter, process_time
from types import SimpleNamespace
from typing import Annotated, Any
from unittest import mock

import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from benchmarks.common import RESULTS, write_results
from benchmarks.rigs.plan_card import CARD, TARGET
from benchmarks.robustness.mutations import Mutation, random_flips, systematic
from benchmarks.robustness.workbench import Workbench
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.manifest import PLAN_MODEL, PROBE, hash_files
from chexnet_deploy.bundle.signing.keys import public_der
from chexnet_deploy.bundle.signing.releases import Release
from chexnet_deploy.bundle.signing.sign import admit_first, sign_bundle
from chexnet_deploy.bundle.signing.trust import Trust, TrustedKey
from chexnet_deploy.errors import BundleError, SessionError, TrustError
from chexnet_deploy.inputs import ReportRecord
from chexnet_deploy.runtime.predictor import Predictor
from chexnet_deploy.runtime.sessions import trt as trt_room
from chexnet_deploy.terminal import progress, run_program

DEADLINE_S = 5.0
RELEASE = Release(line="mutants", number=5)
TRUSTED, REVOKED = ("release", "next"), ("former",)

app = typer.Typer(add_completion=False)
OnDone = Callable[[int], None]


class Family(ReportRecord):
    """What became of one kind of mutation."""

    tried: int
    refused_by: dict[str, int]
    median_ms: float
    slowest_ms: float


class Outcome(ReportRecord):
    """All mutations; they passed when nothing failed and no byte reached a backend."""

    tried: int
    refused: int
    failures: tuple[str, ...]
    bytes_to_backends: int
    bytes_to_backends_untouched: dict[str, int]
    families: dict[str, Family]


@dataclass(slots=True)
class Spy:
    """Counts the bytes that reach a backend's entry."""

    n_bytes: int = 0

    def take(self) -> int:
        """Return the count and start anew."""
        seen, self.n_bytes = self.n_bytes, 0
        return seen


class _HangError(Exception):
    pass


@app.command()
def main(
    bundle: Annotated[Path, typer.Argument(help="A small ONNX bundle to mutate.")],
    timed: Annotated[Path | None, typer.Option(help="A bundle to time verification on; default: the same.")] = None,
    n: Annotated[int, typer.Option(min=100, help="Mutations.")] = 10_000,
) -> None:
    """Mutate, measure and write the result."""
    start = perf_counter()
    with tempfile.TemporaryDirectory(prefix="chexnet-mutants-") as folder, progress() as on_phase:
        outcome = mutate(bundle, Path(folder), n, seed=0, on_done=lambda done: on_phase("mutants", done, n))
        on_phase("time", 0, 1)
        speed = time_verification(timed or bundle, Path(folder) / "timed")
        on_phase("time", 1, 1)
    results = {
        "seconds": perf_counter() - start,
        "bundle_bytes": sum(file.stat().st_size for file in bundle.iterdir()),
        **outcome.model_dump(),
        "verification": speed,
    }
    typer.echo(write_results(RESULTS / "mutated-bundles.json", results))
    if outcome.failures or outcome.bytes_to_backends:
        raise typer.Exit(1)


def mutate(bundle: Path, folder: Path, n: int, *, seed: int, on_done: OnDone) -> Outcome:
    """Do n mutations to the copies of a bundle: all systematic ones that fit in n, the rest by chance."""
    keys = {role: Ed25519PrivateKey.generate() for role in (*TRUSTED, *REVOKED, "stranger")}
    onnx, plan = lay(bundle, folder, keys)
    trust = trust_in(keys, folder / "floor.json")
    admit_first(onnx.path, trust)
    tally = _Tally(trust)
    with watched() as tally.spy:
        reached = {"onnxruntime": tally.control(onnx), "tensorrt": tally.control(plan)}
        for i, (bench, mutation) in enumerate(chosen(onnx, plan, n, random.Random(seed))):
            tally.judge(bench, mutation)
            if i % 500 == 499:  # what is put back must open, or the rest would be refused for the last one's sake
                tally.control(bench)
            on_done(i + 1)
        for bench in (onnx, plan):
            tally.control(bench)
    return tally.outcome(reached)


def trust_in(keys: dict[str, Ed25519PrivateKey], floor: Path) -> Trust:
    """Return trust in the keys of the roles that are trusted; the revoked one is listed as such."""
    listed = tuple(
        TrustedKey(name=role, public_key=base64.b64encode(public_der(keys[role])).decode(), is_revoked=role in REVOKED)
        for role in (*TRUSTED, *REVOKED)
    )
    return Trust(keys=listed, line=RELEASE.line, floor_file=floor)


@dataclass(slots=True)
class _Tally:
    trust: Trust
    spy: Spy = field(default_factory=Spy)
    n_bytes: int = 0
    failures: list[str] = field(default_factory=list)
    times_ms: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, Counter[str]] = field(default_factory=dict)

    def control(self, bench: Workbench) -> int:
        """Open the untouched bundle and return how many bytes reached its backend."""
        try:
            Predictor.open(bench.path, trust=self.trust, threads=1).close()
        except SessionError as err:
            if "refuses this plan" not in str(err):  # the recording TensorRT's answer
                raise
        return self.spy.take()

    def judge(self, bench: Workbench, mutation: Mutation) -> None:
        """Do one mutation, open the bundle, note what came of it, and put everything back."""
        self.errors.setdefault(mutation.family, Counter())
        try:
            mutation.apply(bench)
            start = perf_counter()
            answer = self._open(bench.path)
            self.times_ms.setdefault(mutation.family, []).append(1000.0 * (perf_counter() - start))
        finally:
            bench.undo()
        reached = self.spy.take()
        self.n_bytes += reached
        if answer in (BundleError.__name__, TrustError.__name__) and not reached:
            self.errors[mutation.family][answer] += 1
        else:
            self.failures.append(f"{bench.path.name}, {mutation.family}, {mutation.name}: {answer}, {reached} bytes")

    def _open(self, path: Path) -> str:
        try:
            with _deadline():
                Predictor.open(path, trust=self.trust, threads=1).close()
        except Exception as err:  # noqa: BLE001 - whatever comes is what is measured
            return type(err).__name__
        return "accepted"

    def outcome(self, reached: dict[str, int]) -> Outcome:
        """Return what came of all of them."""
        families = {
            name: Family(
                tried=len(times),
                refused_by=dict(self.errors[name]),
                median_ms=median(times),
                slowest_ms=max(times),
            )
            for name, times in self.times_ms.items()
        }
        tried = sum(family.tried for family in families.values())
        return Outcome(
            tried=tried,
            refused=tried - len(self.failures),
            failures=tuple(self.failures),
            bytes_to_backends=self.n_bytes,
            bytes_to_backends_untouched=reached,
            families=families,
        )


class _Logger:
    """Stands for TensorRT's base class of loggers."""


@contextmanager
def watched() -> Iterator[Spy]:
    """Count what reaches ONNX Runtime and OpenVINO, which go on as ever, and TensorRT, of which a recorder takes the place.

    So the TensorRT entry is watched on machines without a GPU too.
    """
    spy, real = Spy(), import_module("onnxruntime").InferenceSession

    def make_session(model: bytes, *arguments: Any, **options: Any) -> Any:
        spy.n_bytes += len(model)
        return real(model, *arguments, **options)

    read_model = import_module("openvino").Core.read_model

    def read(core: Any, model: bytes, *arguments: Any, **options: Any) -> Any:
        spy.n_bytes += len(model)
        return read_model(core, model, *arguments, **options)

    def deserialize(plan: bytes) -> None:
        spy.n_bytes += len(plan)

    runtime = SimpleNamespace(deserialize_cuda_engine=deserialize)
    tensorrt = SimpleNamespace(
        __name__="watched", __version__=TARGET.tensorrt, ILogger=_Logger, Runtime=lambda log: runtime
    )
    driver = mock.MagicMock(binding="watched")
    with ExitStack() as stack:
        stack.enter_context(mock.patch("onnxruntime.InferenceSession", make_session))
        stack.enter_context(mock.patch("openvino.Core.read_model", read))
        stack.enter_context(mock.patch.object(trt_room, "open_driver", return_value=driver))
        stack.enter_context(mock.patch.object(trt_room, "open_tensorrt", return_value=(tensorrt, None)))
        stack.enter_context(mock.patch.object(trt_room, "this_target", return_value=TARGET))
        yield spy


def lay(bundle: Path, folder: Path, keys: dict[str, Ed25519PrivateKey]) -> tuple[Workbench, Workbench]:
    """Copy a bundle as a release, put a plan of random bytes beside it, and sign both."""
    source = Bundle.open(bundle)
    model, probe = source.read_model(), source.read_probe_bytes()
    manifest = source.manifest.model_copy(update={"release": RELEASE})
    plan = random.Random(0).randbytes(100_000)
    changes = {"files": hash_files({PLAN_MODEL: plan, PROBE: probe}), "target": TARGET, "engine": CARD}
    Bundle.write(folder / "onnx", manifest, model, probe)
    Bundle.write(folder / "plan", manifest.model_copy(update=changes), plan, probe)
    benches = []
    for path in (folder / "onnx", folder / "plan"):
        sign_bundle(path, keys["release"])
        pristine = {file.name: file.read_bytes() for file in sorted(path.iterdir())}
        benches.append(Workbench(path, folder / "floor.json", pristine, keys))
    return benches[0], benches[1]


def chosen(onnx: Workbench, plan: Workbench, n: int, chance: random.Random) -> Iterator[tuple[Workbench, Mutation]]:
    """Yield n mutations: every systematic one, or of each family its share where there are more; the rest by chance."""
    # Of the plan all but what is the same in kind and long: its files are cut and flipped in the ONNX bundle already.
    kept = [(onnx, mutation) for mutation in systematic(onnx)]
    kept += [(plan, m) for m in systematic(plan) if m.family not in ("truncation", "flipped bit", "resealed edit")]
    if len(kept) > n:
        by_family: dict[str, list[tuple[Workbench, Mutation]]] = {}
        for item in kept:
            by_family.setdefault(item[1].family, []).append(item)
        share = n // len(by_family)
        kept = [item for items in by_family.values() for item in chance.sample(items, min(share, len(items)))]
    yield from kept
    flips = {bench.path: random_flips(bench, chance) for bench in (onnx, plan)}
    for bench in itertools.islice(itertools.cycle((onnx, plan)), n - len(kept)):
        yield bench, next(flips[bench.path])


@contextmanager
def _deadline() -> Iterator[None]:
    def ring(number: int, frame: object) -> None:
        raise _HangError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, DEADLINE_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def time_verification(bundle: Path, folder: Path, runs: int = 50) -> dict[str, float]:
    """Time Bundle.open of a signed copy, with and without trust in turns, and once in a new process."""
    shutil.copytree(bundle, folder / "bundle")
    key = Ed25519PrivateKey.generate()
    path = folder / "bundle"
    (path / "manifest.sig").unlink(missing_ok=True)
    sign_bundle(path, key)
    public = base64.b64encode(public_der(key)).decode()
    (folder / "trust.toml").write_text(f'[[keys]]\nname = "timed"\npublic_key = "{public}"\n')
    trust = Trust.read(folder / "trust.toml")
    times: dict[bool, list[float]] = {True: [], False: []}
    cpu: list[float] = []
    for i in range(2 * runs):
        start, cpu_start = perf_counter(), process_time()
        Bundle.open(path, trust=trust if i % 2 else None)
        times[bool(i % 2)].append(1000.0 * (perf_counter() - start))
        if i % 2:
            cpu.append(1000.0 * (process_time() - cpu_start))
    first = subprocess.run(
        [sys.executable, "-c", _FIRST, str(path), str(folder / "trust.toml")], check=True, capture_output=True
    )
    return {
        "bundle_mb": sum(file.stat().st_size for file in path.iterdir()) / 1e6,
        "with_trust_p50_ms": median(times[True]),
        "with_trust_cpu_p50_ms": median(cpu),
        "with_trust_p95_ms": quantiles(times[True], n=20)[-1],
        "without_trust_p50_ms": median(times[False]),
        "first_in_a_process_ms": float(first.stdout),
        "runs": runs,
    }


_FIRST = """
import sys
from pathlib import Path
from time import perf_counter
from chexnet_deploy.bundle import Bundle
from chexnet_deploy.bundle.signing.trust import Trust
start = perf_counter()
Bundle.open(Path(sys.argv[1]), trust=Trust.read(Path(sys.argv[2])))
print(1000.0 * (perf_counter() - start))
"""


if __name__ == "__main__":
    run_program(app)
