"""The C runtime of examples/embed_c against the Python runtime, on the same backend library: pixels, answers and refusals.

    python -m benchmarks.robustness.embedded_c BUNDLE... --images FOLDER     writes results/embedded-c.json
    python -m benchmarks.robustness.embedded_c BUNDLE... --images FOLDER --sanitize --out FILE

Exit 1 on a difference. Pixels are compared byte for byte, of random pictures and of every image in FOLDER; logits and maps bit for
bit, of every image; refusals by the class of the error, of the mutations of mutated_bundles.py, with trust and without. With
--sanitize all of it runs under AddressSanitizer and UndefinedBehaviorSanitizer, which end the program at the first fault.
"""

import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Annotated, Final

import numpy as np
import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from benchmarks.common import RESULTS, write_results
from benchmarks.rigs.embedded_c import EmbeddedC, Library, Spy, build, find_libraries
from benchmarks.robustness.mutated_bundles import REVOKED, TRUSTED, chosen, lay, trust_in
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.manifest import ONNX_MODEL, PLAN_MODEL
from chexnet_deploy.bundle.signing.sign import admit_first
from chexnet_deploy.bundle.signing.trust import Trust
from chexnet_deploy.bundle.site import OperatingPoints
from chexnet_deploy.errors import ChexnetError, ImageError, ImageRefusedError
from chexnet_deploy.images import Gray, Preprocessing, read_image
from chexnet_deploy.images.content_check import ImageGuardPolicy, check_image
from chexnet_deploy.images.scope import ScopePolicy
from chexnet_deploy.runtime.predictor import Prediction, Predictor
from chexnet_deploy.runtime.sessions.base import Provider
from chexnet_deploy.runtime.sessions.open import open_session
from chexnet_deploy.terminal import run_program

PROVIDERS: Final[dict[Library, Provider]] = {"openvino": "openvino", "onnxruntime": "cpu"}
_CHILD: Final = "CHEXNET_SANITIZED"

app = typer.Typer(add_completion=False)


@app.command()
def main(
    bundles: Annotated[list[Path], typer.Argument(help="ONNX bundles; the first is mutated, too.")],
    images: Annotated[Path, typer.Option(help="A folder of radiographs.")],
    sizes: Annotated[int, typer.Option(min=1, help="Random pictures.")] = 10_000,
    mutants: Annotated[int, typer.Option(min=100, help="Mutated bundles, with trust and without.")] = 2_000,
    sanitize: Annotated[bool, typer.Option("--sanitize", help="Under both sanitizers.")] = False,
    out: Annotated[Path, typer.Option(help="JSON to write.")] = RESULTS / "embedded-c.json",
) -> None:
    """Compare, print and write."""
    if sanitize and _CHILD not in os.environ:
        raise typer.Exit(_run_sanitized())
    start = perf_counter()
    with tempfile.TemporaryDirectory(prefix="chexnet-c-") as name:
        folder = Path(name)
        libraries = tuple(find_libraries())
        library = EmbeddedC(build(folder / "libchexnet.so", *libraries, sanitize=sanitize))
        paths = sorted(images.rglob("*.png"))
        results: dict[str, object] = {
            "sanitized": sanitize,
            "pixels": compare_pixels(library, sizes, paths),
            "answers": {
                f"{path.name} {Bundle.open(path).manifest.preprocessing.resize_px} px, {each}": compare_answers(
                    library, path, each, paths
                )
                for path in bundles
                for each in libraries
            },
            "content_check": compare_content_checks(library, bundles[0], folder / "guarded", paths),
            "bundles": compare_refusals(library, bundles[0], folder / "mutants", mutants, seed=0),
        }
    results["seconds"] = round(perf_counter() - start, 1)
    typer.echo(write_results(out, results))
    if _has_differences(results):
        raise typer.Exit(1)


def compare_pixels(library: EmbeddedC, n: int, paths: Sequence[Path], *, seed: int = 0) -> dict[str, int]:
    """Compare pixels of n random pictures, of sides from one pixel on, and of files, with Preprocessing's."""
    rng, differences = np.random.default_rng(seed), 0
    for i in range(n):
        gray, side_px = draw_picture(rng, i), 32 * int(rng.integers(1, 12))
        differences += not np.array_equal(Preprocessing(resize_px=side_px)(gray)[0, 0], library.resize(gray, side_px))
    for path in paths:
        gray = read_image(path)
        differences += any(
            not np.array_equal(Preprocessing(resize_px=side_px)(gray)[0, 0], library.resize(gray, side_px))
            for side_px in (224, 320)
        )
    return {"pictures": n, "files": len(paths), "differences": differences}


def draw_picture(rng: np.random.Generator, i: int) -> Gray:
    """Return noise, black on white, or one gray, of small, ordinary, tall and wide sides in turns."""
    height, width = (
        int(rng.integers(1, top)) for top in ((80, 80), (700, 700), (1500, 12), (12, 1500), (1500, 1500))[i % 5]
    )
    gray: Gray = rng.integers(0, 256, (height, width), dtype=np.uint8)
    if i % 7 == 0:
        gray = np.where(gray > 250, 255, 0).astype(np.uint8)
    if i % 11 == 0:
        gray[:] = gray[0, 0]
    return gray


def compare_answers(library: EmbeddedC, path: Path, name: Library, paths: Sequence[Path]) -> dict[str, object]:
    """Compare logits and maps bit for bit, and decisions; probabilities may differ in the last bits, as libraries' exp do."""
    bundle, differences, furthest = Bundle.open(path), 0, 0.0
    session = open_session(bundle, provider=PROVIDERS[name])
    points = OperatingPoints.of(bundle.manifest, None)
    with library.open(path, name) as embedded:
        assert embedded.id == bundle.id
        for file in paths:
            gray = read_image(file)
            logits, maps = session.run(bundle.manifest.preprocessing(gray))
            expected = Prediction.of(logits[0], maps[0], bundle.manifest.findings, points)
            answer = embedded.predict(gray)
            present = tuple(int(expected.present[f]) if f in points.findings else -1 for f in embedded.findings)
            same = answer.logits.tobytes() == logits.tobytes() and answer.maps.tobytes() == maps.tobytes()
            differences += not (same and answer.present == present)
            by_hand = np.array(list(expected.probabilities.values()))
            furthest = max(furthest, float(np.abs(by_hand - answer.probabilities).max()))
    session.close()
    return {"files": len(paths), "differences": differences, "furthest_probability": furthest}


def compare_content_checks(library: EmbeddedC, path: Path, folder: Path, paths: Sequence[Path]) -> dict[str, object]:
    """Compare what is refused of radiographs, as they are, turned, negative, faint and cut, by a bundle that guards."""
    source, policy = Bundle.open(path), ImageGuardPolicy()
    manifest = source.manifest.model_copy(update={"scope": ScopePolicy(picture=policy)})
    Bundle.write(folder, manifest, source.read_model(), source.read_probe_bytes())
    edits: tuple[Callable[[Gray], NDArray[np.uint8]], ...] = (
        lambda gray: gray,
        np.rot90,
        lambda gray: gray[::-1, ::-1],
        lambda gray: np.rot90(gray, -1),
        lambda gray: 255 - gray,
        lambda gray: gray // 32 + 100,
        lambda gray: gray // 8 * 8,
        lambda gray: gray[:, : gray.shape[1] // 2],
        lambda gray: gray[:200, :200],
        lambda gray: np.where(gray > 200, 255, gray // 64).astype(np.uint8),
    )
    reasons: Counter[str] = Counter()
    differences = 0
    with library.open(folder, "onnxruntime") as embedded:
        for i, file in enumerate(paths):
            gray = np.ascontiguousarray(edits[i % len(edits)](read_image(file)))
            expected = "accepted"
            try:
                check_image(gray, policy)
            except ImageRefusedError as err:
                expected = err.reason.value
            found = "accepted"
            try:
                embedded.predict(gray)
            except ImageError as err:
                found = str(err).split(":")[0]
            reasons[expected] += 1
            differences += found != expected
    return {"files": len(paths), "by_reason": dict(reasons.most_common()), "differences": differences}


def compare_refusals(library: EmbeddedC, bundle: Path, folder: Path, n: int, *, seed: int) -> dict[str, object]:
    """Open n mutants by both runtimes, with trust and without; the same class of error, or both open them.

    A plan's mutants get to the C runtime's backend or they don't: no TensorRT runs here.
    """
    keys = {role: Ed25519PrivateKey.generate() for role in (*TRUSTED, *REVOKED, "stranger")}
    onnx, plan = lay(bundle, folder, keys)
    trust = trust_in(keys, folder / "floor.json")
    admit_first(onnx.path, trust)
    for bench, file in ((onnx, ONNX_MODEL), (plan, PLAN_MODEL)):  # else nothing would be proven
        spy = Spy(file)
        _answer_of_c(library, bench.path, spy, trust)
        assert spy.n_bytes == len(bench.pristine[file])
    answers: Counter[str] = Counter()
    differences: list[str] = []
    bytes_to_backends = 0
    for bench, mutation in chosen(onnx, plan, n, random.Random(seed)):
        try:
            mutation.apply(bench)
            for asked in (trust, None):
                if bench is plan:
                    python, spy = _answer_of_bundle(bench.path, asked), Spy(PLAN_MODEL)
                    embedded = _answer_of_c(library, bench.path, spy, asked)
                    embedded = "opened" if spy.n_bytes else embedded
                else:
                    python = _answer_of_python(bench.path, asked)
                    embedded = _answer_of_c(library, bench.path, "onnxruntime", asked)
                    spy = Spy(ONNX_MODEL)
                    if asked is not None:
                        _answer_of_c(library, bench.path, spy, asked)
                bytes_to_backends += 0 if asked is None else spy.n_bytes
                answers[f"{'without' if asked is None else 'with'} trust: {python}"] += 1
                if python != embedded:
                    differences.append(f"{bench.path.name}, {mutation.family}, {mutation.name}: {python}, C {embedded}")
        finally:
            bench.undo()
    return {
        "mutants": n,
        "python_answers": dict(sorted(answers.items())),
        "bytes_to_backends_with_trust": bytes_to_backends,
        "differences": len(differences),
        "which": differences[:20],
    }


def _answer_of_python(path: Path, trust: Trust | None) -> str:
    return _answer_of(lambda: Predictor.open(path, trust=trust, threads=1, provider="cpu").close())


def _answer_of_bundle(path: Path, trust: Trust | None) -> str:
    return _answer_of(lambda: Bundle.open(path, trust=trust).read_probe())


def _answer_of_c(library: EmbeddedC, path: Path, backend: Library | Spy, trust: Trust | None) -> str:
    def opened() -> None:
        with library.open(path, backend, trust=trust, threads=1):
            pass

    return _answer_of(opened)


def _answer_of(call: Callable[[], object]) -> str:
    try:
        call()
    except ChexnetError as err:
        return type(err).__name__
    return "opened"


def _has_differences(record: object) -> bool:
    if not isinstance(record, dict):
        return False
    return bool(record.get("differences")) or any(_has_differences(each) for each in record.values())


def _run_sanitized() -> int:
    """Run this command again with the sanitizer loaded before Python; Python's own leaks are not looked for."""
    compiler = shutil.which("cc") or "gcc"
    # The second, else the sanitizer finds no way to throw the exceptions of libraries that Python loads later.
    names = ("libasan.so", "libstdc++.so.6")
    finds = [[compiler, f"-print-file-name={name}"] for name in names]
    found = [subprocess.run(find, check=True, capture_output=True, text=True).stdout.strip() for find in finds]
    environment = {
        **os.environ,
        _CHILD: "1",
        "LD_PRELOAD": ":".join(found),
        "ASAN_OPTIONS": "detect_leaks=0",
        "TBB_ENABLE_SANITIZERS": "1",  # or OpenVINO's threads are loaded in a way that the sanitizer refuses
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [sys.executable, "-m", "benchmarks.robustness.embedded_c", *sys.argv[1:]]
    return subprocess.run(command, env=environment).returncode


if __name__ == "__main__":
    run_program(app)
