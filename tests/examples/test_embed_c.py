"""The C runtime answers and refuses as the Python runtime does, on the same backend library, clean under both sanitizers."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from benchmarks.rigs.embedded_c import SANITIZERS, EmbeddedC, NotBuiltError, Spy, build, find_libraries
from benchmarks.robustness import embedded_c
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.manifest import MANIFEST, MANIFEST_SHA256, ONNX_MODEL, PROBE, hash_files
from chexnet_deploy.bundle.probe import Probe
from chexnet_deploy.bundle.signing.keys import public_der
from chexnet_deploy.bundle.signing.releases import Release
from chexnet_deploy.bundle.signing.sign import admit_first, sign_bundle
from chexnet_deploy.bundle.signing.trust import Trust, TrustedKey
from chexnet_deploy.bundle.site import site_path
from chexnet_deploy.datasets.chestxray14 import ChestXray14
from chexnet_deploy.errors import BundleError, ChexnetError, ImageError, SessionError, TrustError
from chexnet_deploy.files import sha256_hex
from chexnet_deploy.images.preprocessing import Reduction
from chexnet_deploy.images.reader import read_image
from chexnet_deploy.images.scope import ScopePolicy
from chexnet_deploy.runtime.predictor import Predictor
from tests.benchmarks.test_mutated_bundles import Edit, edits

CHECKOUT = Path(__file__).parents[2]


def built(out: Path, *libraries: embedded_c.Library, source: Path | None = None, sanitize: bool = False) -> Path:
    """Build, or say that the test did not run."""
    try:
        return build(out, *libraries, source=source, sanitize=sanitize)
    except NotBuiltError as err:
        pytest.skip(f"NOT RUN on examples/embed_c: {err}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("c")


@pytest.fixture(scope="module")
def library(folder: Path) -> EmbeddedC:
    return EmbeddedC(built(folder / "libchexnet.so", *find_libraries()))


@pytest.fixture(scope="module")
def images(phantom: ChestXray14) -> list[Path]:
    return [radiograph.path for radiograph in phantom.split("test")[:5] if radiograph.path is not None]


def test_two_gray_pixels_by_hand(library: EmbeddedC) -> None:
    # 0 and 200 side by side, stretched 16 times: pixel x lies at (x + 0.5) / 16 - 0.5, between them from 8 to 23.
    pixels = library.resize(np.array([[0, 200]], np.uint8), 32)
    assert pixels[0, :8].tolist() == [0] * 8
    assert pixels[0, 24:].tolist() == [200] * 8
    assert pixels[31, 8:24].tolist() == [round(200 * ((x + 0.5) / 16 - 0.5)) for x in range(8, 24)]


def test_pixels_are_preprocessings(library: EmbeddedC) -> None:
    assert embedded_c.compare_pixels(library, 400, [], seed=3) == {"pictures": 400, "files": 0, "differences": 0}


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("form", ["fp32", "int8-cpu"])
def test_answers_are_the_python_runtimes(
    library: EmbeddedC, bundles: dict[str, Bundle], images: list[Path], name: embedded_c.Library, form: str
) -> None:
    if name not in find_libraries():
        pytest.skip(f"NOT RUN on {name}: its package has no C library here")
    answers = embedded_c.compare_answers(library, bundles[form].path, name, images)
    assert answers["differences"] == 0
    assert answers["furthest_probability"] < 1e-6  # type: ignore[operator]


@pytest.mark.slow
def test_refusals_of_a_sample_of_mutants_are_the_python_runtimes(
    library: EmbeddedC, bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    outcome = embedded_c.compare_refusals(library, bundles["int8"].path, tmp_path, 100, seed=1)
    assert outcome["which"] == []
    assert outcome["bytes_to_backends_with_trust"] == 0
    answers = outcome["python_answers"]
    assert isinstance(answers, dict)
    assert {"with trust: TrustError", "with trust: BundleError", "without trust: opened"} <= set(answers)


@pytest.fixture(scope="module")
def small(bundles: dict[str, Bundle], folder: Path) -> Bundle:
    """A manifest with all that one can say, over a model of five bytes."""
    source = bundles["int8"]
    model, probe = b"model", source.read_probe_bytes()
    calibration = source.manifest.calibration
    assert calibration is not None
    reduction = Reduction(halvings=1, max_gray_change=9)
    changes = {
        "preprocessing": source.manifest.preprocessing.model_copy(update={"jpeg2000": reduction}),
        "files": hash_files({ONNX_MODEL: model, PROBE: probe}),
        "calibration": calibration.model_copy(update={"activations": calibration.activations[:2]}),
        "float_convolutions": ("a",),
        "weakest_convolutions": {"a": 0.5},
        "release": Release(line="x", number=3),
        "scope": ScopePolicy(),
    }
    return Bundle.write(folder / "small", source.manifest.model_copy(update=changes), model, probe)


@settings(max_examples=300, deadline=None)
@given(st.lists(edits(), min_size=1, max_size=3))
def test_edited_manifests_are_read_as_python_reads_them(library: EmbeddedC, small: Bundle, changes: list[Edit]) -> None:
    manifest = small.manifest.to_json()
    for edit in changes:
        manifest = edit(manifest)
    assert answer_of_both(library, small, manifest) in (("BundleError",) * 2, ("opened",) * 2)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"x"', '"\\u0078"'),  # the same
        ('"x"', '"\\ud83d\\ude00"'),  # one character, and no line
        ('"number": 3', '"number": 3.0'),  # no whole number
        ('"number": 3', '"number": 03'),
        ('"resize_px": 32', '"resize_px": 33'),
        ('"resize_px": 32', '"resize_px": true'),
        ('"schema_version": 1', '"schema_version": 1.0'),
        ('"schema_version": 1', '"schema_version": true'),
        ('"precision"', '"target": null, "precision"'),  # a key twice
        ('"scope": {', '"scope": {"age_years": [3, 2], '),
        ('"a": 0.5', '"a": 1e400'),
        ('"a": 0.5', '"a": 0.5, "\\u0061": 0.5'),
        ('"head_bias": [', '"head_bias": [1, '),
        ('"image_files": "', '"image_files": "AbC+/019'),
        ('"image_files": "', '"image_files": "AbC+/01'),
        ('"image_files": "', '"image_files": "AbC+/01-'),
        ('"image_files": "', '"image_files": "AbC+/01\\u00e9'),
        ('"image_files": "', f'"image_files": "{"A" * 32768}'),
    ],
)
def test_fine_points_of_json(library: EmbeddedC, small: Bundle, old: str, new: str) -> None:
    manifest = small.manifest.to_json().decode()
    assert manifest.count(old) == 1
    python, c = answer_of_both(library, small, manifest.replace(old, new).encode())
    assert python == c


def npz(save: Callable[..., None], **arrays: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    save(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda probe: npz(np.savez, **asdict(probe)), "opened"),  # not packed
        (lambda probe: npz(np.savez_compressed, **dict(reversed(asdict(probe).items()))), "opened"),
        (lambda probe: b"x" + probe.to_bytes(), "BundleError"),
        (lambda probe: probe.to_bytes() + b"x", "BundleError"),
        (lambda probe: probe.to_bytes()[:-1] + b"\1", "BundleError"),  # says that a comment follows
        (lambda probe: npz(np.savez, **asdict(probe), extra=np.zeros(1)), "BundleError"),
        (lambda probe: replace(probe, logits=probe.logits.astype(">f4")).to_bytes(), "BundleError"),
        (
            lambda probe: npz(np.savez, **{**asdict(probe), "logits": np.asfortranarray(probe.logits)}),
            "BundleError",
        ),
        (lambda probe: replace(probe, logits=np.asfortranarray(probe.logits)).to_bytes(), "opened"),  # written in C's
    ],
)
def test_known_answers_are_read_as_python_reads_them(
    library: EmbeddedC, small: Bundle, change: Callable[[Probe], bytes], expected: str
) -> None:
    before = small.read_probe_bytes()
    content = change(Probe.from_bytes(before))
    files = {**small.manifest.files, PROBE: sha256_hex(content)}
    try:
        (small.path / PROBE).write_bytes(content)
        manifest = small.manifest.model_copy(update={"files": files}).to_json()
        assert answer_of_both(library, small, manifest) == (expected, expected)
    finally:
        (small.path / PROBE).write_bytes(before)


def answer_of_both(library: EmbeddedC, bundle: Bundle, manifest: bytes) -> tuple[str, str]:
    """Seal a manifest and open it; the model's bytes coming to a backend count as opened."""
    (bundle.path / MANIFEST).write_bytes(manifest)
    (bundle.path / MANIFEST_SHA256).write_text(f"{sha256_hex(manifest)}\n")
    spy, python = Spy(ONNX_MODEL), "opened"
    try:
        Bundle.open(bundle.path).read_probe()
    except ChexnetError as err:
        python = type(err).__name__
    with pytest.raises(ChexnetError) as caught, library.open(bundle.path, spy):
        pass
    assert "\n" not in str(caught.value)
    return python, "opened" if spy.n_bytes else caught.type.__name__


def test_a_release_that_runs_raises_the_floor_and_an_older_one_is_refused(
    library: EmbeddedC, bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    source, key = bundles["fp32"], Ed25519PrivateKey.generate()
    for number in (1, 2):
        manifest = source.manifest.model_copy(update={"release": Release(line="adult", number=number)})
        Bundle.write(tmp_path / str(number), manifest, source.read_model(), source.read_probe_bytes())
        sign_bundle(tmp_path / str(number), key)
    trust = one_key(key, tmp_path / "floor.json")
    admit_first(tmp_path / "1", trust)
    floor = tmp_path / "floor.json"
    with library.open(tmp_path / "2", "onnxruntime", trust=trust):
        assert floor.read_bytes() == b'{"format":1,"release":{"line":"adult","number":2}}\n'
    assert sorted(path.name for path in tmp_path.iterdir()) == [".floor.json.lock", "1", "2", "floor.json"]
    with pytest.raises(TrustError, match="older than 2"), library.open(tmp_path / "1", "onnxruntime", trust=trust):
        pass
    with pytest.raises(TrustError, match="older"):
        Predictor.open(tmp_path / "1", trust=trust)
    stranger = one_key(Ed25519PrivateKey.generate(), floor)
    with pytest.raises(TrustError, match="no trusted key"), library.open(tmp_path / "2", Spy(""), trust=stranger):
        pass


def one_key(key: Ed25519PrivateKey, floor: Path) -> Trust:
    public = base64.b64encode(public_der(key)).decode()
    return Trust(keys=(TrustedKey(name="release", public_key=public),), line="adult", floor_file=floor)


def test_a_model_that_answers_otherwise_is_refused(
    library: EmbeddedC, bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    source = bundles["fp32"]
    probe = source.read_probe()
    probe.logits[3, 0] += 0.01  # allowed is 0.002
    content = probe.to_bytes()
    files = hash_files({ONNX_MODEL: source.read_model(), PROBE: content})
    manifest = source.manifest.model_copy(update={"files": files})
    Bundle.write(tmp_path / "other", manifest, source.read_model(), content)
    with (
        pytest.raises(SessionError, match=r"known answers differ by 0\.01"),
        library.open(tmp_path / "other", "onnxruntime"),
    ):
        pass
    biases = (source.manifest.head_bias[0] + 0.1, *source.manifest.head_bias[1:])
    biased = source.manifest.model_copy(update={"head_bias": biases})
    Bundle.write(tmp_path / "biased", biased, source.read_model(), source.read_probe_bytes())
    with (
        pytest.raises(SessionError, match="maps and logits disagree"),
        library.open(tmp_path / "biased", "onnxruntime"),
    ):
        pass


def test_pictures_that_are_none_are_refused(library: EmbeddedC, bundles: dict[str, Bundle]) -> None:
    with library.open(bundles["fp32"].path, "onnxruntime") as embedded:
        with pytest.raises(ImageError, match=r"^blank: "):
            embedded.predict(np.full((64, 64), 9, np.uint8))
        with pytest.raises(ImageError, match=r"^shape: found 0 x 5 px"):
            embedded.predict(np.zeros((5, 0), np.uint8))


def test_a_site_file_is_refused_and_an_attestation_passed_over(
    library: EmbeddedC, bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(bundles["int8-cpu"].path, tmp_path / "bundle"))
    for name in ("attestation.json", "attestation.sig"):
        (bundle / name).write_text("for Python's trust files")
    with library.open(bundle, "onnxruntime"):
        pass
    site_path(bundle).write_text("{}")
    with (
        pytest.raises(BundleError, match="this runtime reads no site files"),
        library.open(bundle, "onnxruntime"),
    ):
        pass


def test_a_missing_folder_and_too_many_threads_are_named(
    library: EmbeddedC, bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    with (
        pytest.raises(BundleError, match="nothing is no bundle: No such file"),
        library.open(tmp_path / "nothing", Spy("")),
    ):
        pass
    with (
        pytest.raises(SessionError, match="got 9999 threads"),
        library.open(bundles["fp32"].path, "onnxruntime", threads=9999),
    ):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_the_example_program_leaks_nothing_and_prints_the_probabilities(
    bundles: dict[str, Bundle], images: list[Path], folder: Path, name: embedded_c.Library
) -> None:
    source = CHECKOUT / "examples" / "embed_c" / "main.c"
    program = built(folder / f"embed-{name}", name, source=source, sanitize=True)
    Image.open(images[0]).convert("L").save(folder / "a.pgm")
    environment = {**os.environ, "TBB_ENABLE_SANITIZERS": "1"}
    command = [program, bundles["fp32"].path, folder / "a.pgm"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    printed = dict(re.findall(r"^  (\w+) +(0\.\d{4})", done.stdout, flags=re.MULTILINE))
    with Predictor.open(bundles["fp32"].path, provider=embedded_c.PROVIDERS[name]) as predictor:
        expected = predictor.predict(read_image(images[0])).probabilities
    assert printed == {finding: f"{probability:.4f}" for finding, probability in expected.items()}
    refused = subprocess.run([program, folder, folder / "a.pgm"], capture_output=True, text=True, env=environment)
    assert refused.returncode == 2
    assert "manifest.json is missing" in refused.stderr


@pytest.mark.slow
def test_the_pages_program_compiles_as_cpp_and_runs(bundles: dict[str, Bundle], folder: Path, tmp_path: Path) -> None:
    page = (CHECKOUT / "docs" / "embedding.md").read_text()
    (tmp_path / "console.cpp").write_text(re.findall(r"```cpp\n(.*?)```", page, flags=re.DOTALL)[0])
    program = built(folder / "console", "openvino", source=tmp_path / "console.cpp")
    key = Ed25519PrivateKey.generate()
    shutil.copytree(bundles["fp32"].path, tmp_path / "signed")
    sign_bundle(tmp_path / "signed", key)
    public = base64.b64encode(public_der(key)).decode()
    done = subprocess.run([program, tmp_path / "signed", public], capture_output=True, text=True)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 14), done.stderr
    unsigned = subprocess.run([program, bundles["fp32"].path, public], capture_output=True, text=True)
    assert (unsigned.returncode, unsigned.stdout.count("is not signed")) == (1, 1)


@pytest.mark.slow
def test_all_of_it_is_clean_under_the_sanitizers(
    bundles: dict[str, Bundle], images: list[Path], tmp_path: Path
) -> None:
    built(tmp_path / "libchexnet.so", sanitize=True)
    arguments = [
        "--images",
        images[0].parent,
        "--sizes",
        "200",
        "--mutants",
        "100",
        "--sanitize",
        "--out",
        tmp_path / "r",
    ]
    command = [sys.executable, "-m", "benchmarks.robustness.embedded_c", bundles["int8"].path, *arguments]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "r").read_text())["sanitized"] is True


def test_the_sanitizers_see_a_fault(folder: Path) -> None:
    built(folder / "any.so", sanitize=True)
    (folder / "fault.c").write_text("int main(int n, char **a) { (void)a; int x[2] = {0}; return x[n + 1]; }\n")
    subprocess.run(["cc", *SANITIZERS, folder / "fault.c", "-o", folder / "fault"], check=True)
    assert subprocess.run([folder / "fault"], capture_output=True).returncode != 0
