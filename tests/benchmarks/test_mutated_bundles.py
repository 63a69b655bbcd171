"""A seeded sample of the ten thousand mutants, and what hypothesis makes of a small signed bundle."""

import base64
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.robustness import mutated_bundles
from benchmarks.robustness.mutations import systematic
from benchmarks.robustness.workbench import Workbench
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.manifest import MANIFEST, MANIFEST_SHA256, ONNX_MODEL, PROBE
from chexnet_deploy.bundle.signing.sign import admit_first, sign_bundle
from chexnet_deploy.bundle.signing.signatures import SIGNATURE
from chexnet_deploy.bundle.signing.trust import Trust
from chexnet_deploy.errors import BundleError, TrustError
from chexnet_deploy.files import sha256_hex
from tests.tiny import tiny_manifest

pytestmark = pytest.mark.slow

FILES = {ONNX_MODEL: bytes(range(256)) * 8, PROBE: b"p" * 300}
NAMES = (MANIFEST, MANIFEST_SHA256, SIGNATURE, ONNX_MODEL, PROBE)


def ignore(done: int) -> None:
    pass


def test_a_sample_of_all_mutants_is_refused(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    model = bundles["int8"].read_model()
    outcome = mutated_bundles.mutate(bundles["int8"].path, tmp_path, 700, seed=1, on_done=ignore)
    assert outcome.failures == ()
    assert (outcome.tried, outcome.refused, outcome.bytes_to_backends) == (700, 700, 0)
    # The spies see: untouched bundles reach both backends whole.
    assert outcome.bytes_to_backends_untouched == {"onnxruntime": len(model), "tensorrt": 100_000}
    assert len(outcome.families) == 8
    assert all(family.slowest_ms < 1000 for family in outcome.families.values())


@pytest.mark.parametrize(
    ("weakness", "family"),
    [
        ("check_manifest", "signature"),
        ("check_release", "rollback"),
    ],
)
def test_a_weakness_is_found(
    bundles: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weakness: str, family: str
) -> None:
    monkeypatch.setattr(Trust, weakness, lambda *_: ())
    monkeypatch.setattr(mutated_bundles, "random_flips", lambda *_: iter(()))
    monkeypatch.setattr(
        mutated_bundles, "systematic", lambda bench: [m for m in systematic(bench) if m.family == family][:5]
    )
    outcome = mutated_bundles.mutate(bundles["int8"].path, tmp_path, 10, seed=1, on_done=ignore)
    assert outcome.failures
    assert outcome.bytes_to_backends > 0


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workbench, Trust]:
    folder = tmp_path_factory.mktemp("small")
    keys = {role: Ed25519PrivateKey.generate() for role in ("release", "next", "former", "stranger")}
    manifest = tiny_manifest(FILES, release=mutated_bundles.RELEASE)
    path = Bundle.write(folder / "onnx", manifest, FILES[ONNX_MODEL], FILES[PROBE]).path
    sign_bundle(path, keys["release"])
    trust = mutated_bundles.trust_in(keys, folder / "floor.json")
    admit_first(path, trust)
    return Workbench(path, folder / "floor.json", {f.name: f.read_bytes() for f in path.iterdir()}, keys), trust


Edit = Callable[[bytes], bytes]


@st.composite
def edits(draw: st.DrawFn) -> Edit:
    """One change to some bytes: a flip, a cut, a run left out, doubled, moved or put in, or a word for another."""
    kind = draw(st.sampled_from(("flip", "cut", "remove", "double", "insert", "swap", "word")))
    where, length = draw(st.floats(0.0, 1.0, exclude_max=True)), draw(st.integers(1, 64))
    mask, run = draw(st.integers(1, 255)), draw(st.binary(min_size=1, max_size=16))
    old = draw(st.sampled_from((b"1", b"0", b'"', b",", b"\n", b"null", b"release", b"mutants", b"[", b"{")))
    new = draw(st.sampled_from((b"2", b"true", b"'", b" ,", b"\r\n", b"1e400", b"Release", b"[[", b"NaN", b"")))

    def edit(content: bytes) -> bytes:
        at = int(where * len(content))
        head, middle, tail = content[:at], content[at : at + length], content[at + length :]
        return {
            "flip": head + bytes([*(middle[:1] and [middle[0] ^ mask])]) + middle[1:] + tail,
            "cut": head,
            "remove": head + tail,
            "double": head + middle + middle + tail,
            "insert": head + run + middle + tail,
            "swap": head + tail + middle,
            "word": content.replace(old, new, 1),
        }[kind]

    return edit


@settings(max_examples=400, deadline=2000)
@given(st.lists(st.tuples(st.sampled_from(NAMES), edits()), min_size=1, max_size=3), st.booleans())
def test_only_the_bytes_that_were_signed_open(
    bench: tuple[Workbench, Trust], changes: list[tuple[str, Edit]], reseals: bool
) -> None:
    workbench, trust = bench
    changed = dict(workbench.pristine)
    for name, edit in changes:
        changed[name] = edit(changed[name])
    if reseals:
        changed[MANIFEST_SHA256] = f"{sha256_hex(changed[MANIFEST])}\n".encode()
    try:
        for name, content in changed.items():
            workbench.put(name, content)
        if changed == workbench.pristine:
            Bundle.open(workbench.path, trust=trust)
        else:
            with pytest.raises((BundleError, TrustError)) as caught:
                Bundle.open(workbench.path, trust=trust)
            assert "\n" not in str(caught.value)
    finally:
        workbench.undo()


@settings(max_examples=60, deadline=2000)
@given(st.binary(max_size=64).filter(lambda key: len(key) != 32))
def test_a_key_of_another_length_is_no_key(raw: bytes) -> None:
    der = bytes.fromhex("302a300506032b6570032100") + raw
    with pytest.raises(ValueError, match=r"Ed25519|64"):
        mutated_bundles.TrustedKey(name="a", public_key=base64.b64encode(der).decode())
