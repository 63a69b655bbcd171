import dataclasses
import json
import shutil
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import chexnet_deploy.runtime.sessions.ort as ort_room
from benchmarks.rigs.plan_card import CARD, TARGET
from chexnet_deploy.bundle.bundle import MAX_MANIFEST_BYTES, Bundle
from chexnet_deploy.bundle.manifest import (
    INHERITED,
    MANIFEST,
    MANIFEST_SHA256,
    ONNX_MODEL,
    PLAN_MODEL,
    PROBE,
    Calibration,
    Changes,
    Check,
    Dialect,
    EngineCard,
    Manifest,
    Precision,
    Target,
    hash_files,
)
from chexnet_deploy.bundle.probe import Probe
from chexnet_deploy.bundle.signing.releases import Release
from chexnet_deploy.datasets.patients import PatientSet, encode_files
from chexnet_deploy.errors import BundleError, ChexnetError
from chexnet_deploy.files import sha256_hex
from chexnet_deploy.images.preprocessing import Preprocessing
from chexnet_deploy.images.scope import ScopePolicy
from chexnet_deploy.runtime.predictor import Predictor
from chexnet_deploy.runtime.sessions.open import open_session

ALL_FILES = (MANIFEST, MANIFEST_SHA256, ONNX_MODEL, PROBE)


@pytest.fixture
def copy(bundles: dict[str, Bundle], tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundles["fp32"].path, tmp_path / "fp32"))


def refusal(path: Path) -> str:
    with pytest.raises(BundleError) as caught:
        Bundle.open(path)
    message = str(caught.value)
    assert "\n" not in message.strip()
    return message


def assert_says(message: str, *parts: str) -> None:
    for part in parts:
        assert part in message
    assert any(word in message.lower() for word in ("copy", "export", "use the", "remove", "needed")), message


def flip_byte(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def seal(path: Path, raw: bytes) -> None:
    (path / MANIFEST).write_bytes(raw)
    (path / MANIFEST_SHA256).write_text(sha256_hex(raw) + "\n")


def edit(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    record = json.loads((path / MANIFEST).read_bytes())
    change(record)
    seal(path, json.dumps(record).encode())


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_untouched_copy_opens(bundles: dict[str, Bundle], tmp_path: Path, precision: str) -> None:
    original = bundles[precision]
    copied = Bundle.open(Path(shutil.copytree(original.path, tmp_path / "copy")))
    assert copied.id == original.id == sha256_hex((original.path / MANIFEST).read_bytes())
    assert copied.manifest == original.manifest
    assert copied.read_model() == (original.path / ONNX_MODEL).read_bytes()


@pytest.mark.parametrize("name", ALL_FILES)
@pytest.mark.parametrize("position", [0.0, 0.5, 0.9])
def test_flipped_byte_is_refused(copy: Path, name: str, position: float) -> None:
    flip_byte(copy / name, int(position * (copy / name).stat().st_size))
    blamed = MANIFEST if name == MANIFEST_SHA256 else name
    assert_says(refusal(copy), str(copy / blamed))


@pytest.mark.parametrize("name", [ONNX_MODEL, PROBE])
@pytest.mark.parametrize("change", ["empty", "truncated", "longer"])
def test_other_length_is_refused(copy: Path, name: str, change: str) -> None:
    content = (copy / name).read_bytes()
    (copy / name).write_bytes({"empty": b"", "truncated": content[:-1], "longer": content + b"\0"}[change])
    assert_says(refusal(copy), str(copy / name))


def test_edited_manifest_is_refused(copy: Path) -> None:
    record = json.loads((copy / MANIFEST).read_bytes())
    record["operating_points"]["Pneumonia"] = 0.99
    (copy / MANIFEST).write_text(json.dumps(record))
    assert_says(refusal(copy), str(copy / MANIFEST), "changed after it was written")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda r: r.update(surprise=1), "surprise"),
        (lambda r: r["preprocessing"].update(surprise=1), "preprocessing.surprise"),
        (lambda r: r["checks"][0].update(surprise=1), "checks.0.surprise"),
        (lambda r: r.update(schema_version=2), "schema_version"),
        (lambda r: r.update(schema_version=True), "schema_version"),
        (lambda r: r.update(precision="fp8"), "precision"),
        (lambda r: r.update(precision=32), "precision"),
        (lambda r: r.update(findings="Pneumonia"), "findings"),
        (lambda r: r.update(findings=[]), "findings"),
        (lambda r: r.update(tools=None), "tools"),
        (lambda r: r["head_bias"].__setitem__(0, "0.5"), "head_bias.0"),
        (lambda r: r["head_bias"].__setitem__(3, float("nan")), "head_bias.3"),
        (lambda r: r["head_bias"].__setitem__(3, float("inf")), "head_bias.3"),
        (lambda r: r.update(probe_max_abs_logit_error=float("nan")), "probe_max_abs_logit_error"),
        (lambda r: r.update(probe_max_abs_logit_error=float("inf")), "probe_max_abs_logit_error"),
        (lambda r: r["checks"][0].update(value=float("nan")), "checks.0.value"),
        (lambda r: r["operating_points"].update(Pneumonia=float("nan")), "operating_points.Pneumonia"),
        (lambda r: r["operating_points"].update(Pneumonia=1.5), "operating_points.Pneumonia"),
        (lambda r: r["operating_points"].update(Flu=0.5), "Flu"),
        (lambda r: r["head_bias"].pop(), "13 head biases for 14 findings"),
        (lambda r: r["findings"].__setitem__(1, r["findings"][0]), "named twice"),
        (lambda r: r["files"].update({"../evil": "0" * 64}), "../evil"),
        (lambda r: r["files"].pop(PROBE), PROBE),
        (lambda r: r["files"].update({PROBE: "0" * 63}), PROBE),
        (lambda r: r.update(ancestors=["A" * 64]), "ancestors.0"),
        (lambda r: r.update(precision="int8"), "calibration"),
        (lambda r: r.pop("head_bias"), "head_bias"),
        (lambda r: r["preprocessing"].update(resize_px=33), "preprocessing.resize_px"),
        (lambda r: r["preprocessing"].update(std=[0.0, 0.2, 0.2]), "preprocessing.std.0"),
    ],
)
def test_resealed_edit_is_refused(copy: Path, change: Callable[[dict[str, object]], object], named: str) -> None:
    edit(copy, change)
    assert_says(refusal(copy), str(copy / MANIFEST), named)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda r: r["logit_mean"].pop(), "for each finding"),
        (lambda r: r["logit_sd"].__setitem__(0, float("inf")), "logit_sd.0"),
        (lambda r: r["logit_sd"].__setitem__(0, -1.0), "logit_sd.0"),
        (lambda r: r.pop("logit_mean"), "logit_mean"),
    ],
)
def test_resealed_edit_of_the_calibration_is_refused(
    bundles: dict[str, Bundle], tmp_path: Path, change: Callable[[dict[str, object]], object], named: str
) -> None:
    copy = shutil.copytree(bundles["int8"].path, tmp_path / "int8")
    edit(copy, lambda r: change(r["calibration"]))
    assert_says(refusal(copy), str(copy / MANIFEST), named)


def test_repeated_key_is_refused(copy: Path) -> None:
    raw = (copy / MANIFEST).read_bytes()
    seal(copy, raw.replace(b'"precision": "fp32"', b'"precision": "fp32", "precision": "fp32"', 1))
    assert_says(refusal(copy), str(copy / MANIFEST), "twice")


def test_repeated_nested_key_is_refused(copy: Path) -> None:
    raw = (copy / MANIFEST).read_bytes()
    seal(copy, raw.replace(b'"resize_px": 32', b'"resize_px": 32, "resize_px": 64', 1))
    assert_says(refusal(copy), str(copy / MANIFEST), "twice")


@pytest.mark.parametrize(
    "raw",
    [b"", b"null", b"[]", b"{", b"\xff\xfe", b'"text"', b"[" * 60000, b"9" * 60000, b'{"precision": "\\ud800"}'],
    ids=["zero bytes", "null", "list", "cut", "not utf-8", "string", "deep", "long number", "lone surrogate"],
)
def test_resealed_nonsense_is_refused(copy: Path, raw: bytes) -> None:
    seal(copy, raw)
    assert_says(refusal(copy), str(copy / MANIFEST))


def test_zero_byte_manifest_is_refused(copy: Path) -> None:
    (copy / MANIFEST).write_bytes(b"")
    assert_says(refusal(copy), str(copy / MANIFEST))


def test_oversized_manifest_is_refused(copy: Path) -> None:
    seal(copy, (copy / MANIFEST).read_bytes() + b" " * MAX_MANIFEST_BYTES)
    message = refusal(copy)
    assert str(copy / MANIFEST) in message
    assert str(MAX_MANIFEST_BYTES) in message


def test_manifest_of_the_largest_size_opens(copy: Path) -> None:
    raw = (copy / MANIFEST).read_bytes()
    seal(copy, raw + b" " * (MAX_MANIFEST_BYTES - len(raw)))
    Bundle.open(copy)


@pytest.mark.parametrize("name", ALL_FILES)
def test_missing_file_is_refused(copy: Path, name: str) -> None:
    (copy / name).unlink()
    assert_says(refusal(copy), str(copy / name), "missing")


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", PLAN_MODEL])
def test_extra_file_is_refused(copy: Path, name: str) -> None:
    (copy / name).write_bytes(b"")
    assert_says(refusal(copy), str(copy), name)


def test_extra_directory_is_refused(copy: Path) -> None:
    (copy / "more").mkdir()
    assert_says(refusal(copy), "more")


@pytest.mark.parametrize("name", ALL_FILES)
def test_symlink_is_refused(copy: Path, tmp_path: Path, name: str) -> None:
    (copy / name).rename(tmp_path / name)
    (copy / name).symlink_to(tmp_path / name)
    assert_says(refusal(copy), str(copy / name), "not a plain file")


@pytest.mark.parametrize("name", ALL_FILES)
def test_directory_in_place_of_a_file_is_refused(copy: Path, name: str) -> None:
    (copy / name).unlink()
    (copy / name).mkdir()
    assert_says(refusal(copy), str(copy / name), "not a plain file")


def test_missing_directory_is_refused(tmp_path: Path) -> None:
    assert_says(refusal(tmp_path / "none"), str(tmp_path / "none"), "found nothing")


def test_file_as_path_is_refused(copy: Path) -> None:
    assert_says(refusal(copy / ONNX_MODEL), str(copy / ONNX_MODEL), "found a file")


def test_empty_directory_is_refused(tmp_path: Path) -> None:
    assert_says(refusal(tmp_path), MANIFEST)


TAMPERINGS: dict[str, Callable[[Path], object]] = {
    "model": lambda path: flip_byte(path / ONNX_MODEL, 1000),
    "probe": lambda path: flip_byte(path / PROBE, 1000),
    "manifest": lambda path: flip_byte(path / MANIFEST, 20),
    "resealed": lambda path: edit(path, lambda record: record.update(surprise=1)),
    "extra": lambda path: (path / "extra").touch(),
    "missing": lambda path: (path / PROBE).unlink(),
}


@pytest.mark.parametrize("tampering", TAMPERINGS)
def test_tampered_bundle_never_reaches_onnx_runtime(
    copy: Path, monkeypatch: pytest.MonkeyPatch, tampering: str
) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        pytest.fail("a tampered bundle reached ONNX Runtime")

    monkeypatch.setattr(ort_room.OrtSession, "open", fail)
    monkeypatch.setattr(ort_room.ort, "InferenceSession", fail)
    TAMPERINGS[tampering](copy)
    with pytest.raises(BundleError):
        Predictor.open(copy, provider="cpu")


def test_model_changed_after_open_never_reaches_onnx_runtime(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(copy)
    flip_byte(copy / ONNX_MODEL, 1000)
    monkeypatch.setattr(ort_room.ort, "InferenceSession", lambda *_a, **_k: pytest.fail("reached ONNX Runtime"))
    with pytest.raises(BundleError, match=r"model\.onnx does not match"):
        open_session(bundle, provider="cpu")


def test_probe_changed_after_open_is_refused(copy: Path) -> None:
    bundle = Bundle.open(copy)
    flip_byte(copy / PROBE, 1000)
    with pytest.raises(BundleError, match=r"probe\.npz does not match"):
        open_session(bundle, provider="cpu")


def test_write_refuses_an_existing_path(bundles: dict[str, Bundle], copy: Path, tmp_path: Path) -> None:
    bundle = bundles["fp32"]
    model, probe = bundle.read_model(), bundle.read_probe_bytes()
    empty, file = tmp_path / "empty", tmp_path / "file"
    empty.mkdir()
    file.write_text("mine")
    for path in (copy, empty, file):
        with pytest.raises(BundleError, match="is there already"):
            Bundle.write(path, bundle.manifest, model, probe)
    assert Bundle.open(copy).id == bundle.id
    assert not list(empty.iterdir())
    assert file.read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "fp32"]


def test_write_gives_back_the_same_bundle(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    bundle = bundles["int8"]
    path = tmp_path / "new" / "deep" / "int8"
    written = Bundle.write(path, bundle.manifest, bundle.read_model(), bundle.read_probe_bytes())
    assert (written.id, written.path, written.manifest) == (bundle.id, path, bundle.manifest)
    for name in ALL_FILES:
        assert (path / name).read_bytes() == (bundle.path / name).read_bytes()


def test_write_refuses_a_manifest_that_open_would_refuse(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    bundle = bundles["fp32"]
    manifest = bundle.manifest.model_copy(update={"tools": {"torch": "x" * MAX_MANIFEST_BYTES}})
    with pytest.raises(BundleError, match=str(MAX_MANIFEST_BYTES)):
        Bundle.write(tmp_path / "new", manifest, bundle.read_model(), bundle.read_probe_bytes())
    assert not list(tmp_path.iterdir())


def test_probe_refuses_pickles_and_other_shapes(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    probe = bundles["fp32"].read_probe()
    np.savez(tmp_path / "evil.npz", pixels=np.array([{}], dtype=object), logits=probe.logits, cam=probe.cam)
    for content in (
        (tmp_path / "evil.npz").read_bytes(),
        b"text",
        dataclasses.replace(probe, cam=probe.cam[:-1]).to_bytes(),
        probe.to_bytes()[:-100],
    ):
        with pytest.raises(ChexnetError, match=r"probe\.npz"):
            Probe.from_bytes(content)


ZEROS = Probe(
    np.zeros((32, 1, 32, 32), np.uint8), np.zeros((32, 1), np.float32), np.zeros((32, 1, 1, 1), np.float32)
).to_bytes()


def test_probe_refuses_other_answers() -> None:
    probe = Probe.from_bytes(ZEROS)
    for logits in (np.full((32, 1), np.nan, np.float32), np.zeros((32, 1)), np.zeros(32, np.float32)):
        # Every answer differs by NaN from NaN, which is not more than any limit.
        with pytest.raises(BundleError, match=r"probe\.npz holds"):
            Probe.from_bytes(dataclasses.replace(probe, logits=logits).to_bytes())


@pytest.mark.parametrize(
    ("in_directory", "in_front", "new"),
    [
        (8, 6, b"\x01"),  # encrypted
        (10, 8, b"\x63"),  # a packing that nobody knows
        (10, 8, b"\x0e"),  # LZMA, which it isn't
        (None, 64, b"\xff" * 8),  # no deflate stream
    ],
)
def test_probe_refuses_what_its_readers_have_no_common_error_for(
    in_directory: int | None, in_front: int, new: bytes
) -> None:
    content = bytearray(ZEROS)
    content[in_front : in_front + len(new)] = new
    if in_directory is not None:
        at = ZEROS.index(b"PK\1\2") + in_directory
        content[at : at + len(new)] = new
    with pytest.raises(BundleError, match=r"probe\.npz does not hold"):
        Probe.from_bytes(bytes(content))


def test_probe_refuses_no_bytes() -> None:
    with pytest.raises(BundleError, match=r"probe\.npz"):
        Probe.from_bytes(b"")


_hashes = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
_finite = st.floats(allow_nan=False, allow_infinity=False)
_fraction = st.floats(0.0, 1.0)
_text = st.text(max_size=12)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    findings = tuple(draw(st.lists(_text, min_size=1, max_size=5, unique=True)))
    precision = draw(st.sampled_from(Precision))
    is_int8 = precision is Precision.INT8
    target = draw(
        st.none()
        | st.builds(
            Target,
            gpu=_text,
            compute_capability=_text,
            backend=st.sampled_from(("tensorrt", "tensorrt_rtx")),
            tensorrt=_text,
            driver=st.from_regex(r"[0-9]{1,2}\.[0-9]", fullmatch=True),
            platform=_text,
        )
    )
    card = st.builds(
        EngineCard,
        build_s=_finite,
        plan_bytes=st.integers(0, 2**40),
        batch=st.tuples(*[st.integers(1, 512)] * 3),
        conv_types=st.dictionaries(_text, st.integers(0, 200), max_size=3),
        fallbacks=st.lists(_text, max_size=2).map(tuple),
        n_kernels=st.integers(0, 500),
        n_reformats=st.integers(0, 500),
        bytes_per_image=st.none() | st.integers(0, 2**40),
        activation_bytes=st.integers(0, 2**40),
        warnings=st.lists(_text, max_size=2).map(tuple),
    )
    return Manifest(
        precision=precision,
        dialect=draw(st.sampled_from(get_args(Dialect))) if is_int8 else "float",
        findings=findings,
        preprocessing=Preprocessing(
            resize_px=32 * draw(st.integers(1, 32)),
            mean=draw(st.tuples(_fraction, _fraction, _fraction)),
            std=draw(st.tuples(*[st.floats(0.0, 1.0, exclude_min=True)] * 3)),
        ),
        head_bias=tuple(draw(st.lists(_finite, min_size=len(findings), max_size=len(findings)))),
        operating_points=draw(st.dictionaries(st.sampled_from(findings), _fraction)),
        files={ONNX_MODEL if target is None else PLAN_MODEL: draw(_hashes), PROBE: draw(_hashes)},
        checkpoint_sha256=draw(_hashes),
        ancestors=tuple(draw(st.lists(_hashes, max_size=3))),
        calibration=draw(
            st.builds(
                Calibration,
                list_sha256=_hashes,
                n_images=st.integers(1, 2**70),
                image_files=st.none() | st.sets(_hashes).map(encode_files),
                estimator=_text,
                logit_mean=st.tuples(*[_finite] * len(findings)),
                logit_sd=st.tuples(*[_fraction] * len(findings)),
            )
            if is_int8
            else st.none()
        ),
        probe_max_abs_logit_error=draw(st.floats(0.0, allow_infinity=False)),
        checks=tuple(draw(st.lists(st.builds(Check, name=_text, value=_finite, limit=_finite), max_size=3))),
        tools=draw(st.dictionaries(_text, _text, max_size=3)),
        float_convolutions=tuple(draw(st.lists(_text, max_size=2))) if is_int8 else (),
        trained_on=draw(st.none() | st.sets(st.integers(0, 5000), min_size=1, max_size=50).map(PatientSet.of)),
        target=target,
        engine=None if target is None else draw(card),
    )


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(manifests())
def test_manifest_survives_json(manifest: Manifest) -> None:
    assert Manifest.model_validate_json(manifest.to_json(), strict=True) == manifest


PARENT = Manifest(
    precision=Precision.FP32,
    findings=("Mass", "Hernia"),
    preprocessing=Preprocessing(resize_px=64),
    head_bias=(0.5, -0.5),
    operating_points={"Mass": 0.25},
    files={ONNX_MODEL: "0" * 64, PROBE: "1" * 64},
    checkpoint_sha256="2" * 64,
    ancestors=("3" * 64,),
    probe_max_abs_logit_error=0.125,
    checks=(Check(name="x", value=0.0, limit=1.0),),
    tools={"torch": "1"},
    release=Release(line="chexnet-adult", number=3),
    trained_on=PatientSet.of([1, 2]),
    scope=ScopePolicy(age_years=(0, 120)),
)


def test_a_child_inherits_each_field_or_is_given_it() -> None:
    given = {name for name, each in signature(Manifest.child).parameters.items() if each.kind is each.KEYWORD_ONLY}
    kinds = [{"schema_version", "ancestors"}, set(INHERITED), given, set(Changes.__annotations__)]
    assert set.union(*kinds) == set(Manifest.model_fields)
    assert sum(map(len, kinds)) == len(Manifest.model_fields)  # none is of two kinds


def test_a_child_says_of_the_weights_what_its_parent_says() -> None:
    files, check = {PLAN_MODEL: "4" * 64, PROBE: "1" * 64}, Check(name="y", value=0.5, limit=1.0)
    child = PARENT.child(
        "5" * 64, files=files, checks=(check,), probe_max_abs_logit_error=0.5, target=TARGET, engine=CARD
    )
    new = {"files": files, "checks": (check,), "probe_max_abs_logit_error": 0.5, "target": TARGET, "engine": CARD}
    assert dict(child) == {**dict(PARENT), **new, "ancestors": ("3" * 64, "5" * 64)}
    assert Manifest.model_validate_json(child.to_json(), strict=True) == child


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"target": TARGET}, "files must be model.plan"),
        ({"precision": Precision.INT8}, "an int8 model has a calibration"),
        ({"head_bias": (0.0,)}, "1 head biases for 2 findings"),
        ({"probe_max_abs_logit_error": -1.0}, "probe_max_abs_logit_error"),
        ({"findings": ("Mass", "Other")}, r"a child inherits \['findings'\]"),
        ({"ancestors": ()}, r"a child inherits \['ancestors'\]"),
    ],
)
def test_a_child_that_is_no_manifest_is_refused(changes: dict[str, Any], why: str) -> None:
    given = {"files": PARENT.files, "checks": (), "probe_max_abs_logit_error": 0.0}
    with pytest.raises(ValueError, match=why):
        PARENT.child("5" * 64, **{**given, **changes})


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(manifests(), st.binary(max_size=50), st.binary(max_size=50))
def test_written_bundle_opens(
    tmp_path_factory: pytest.TempPathFactory, manifest: Manifest, model: bytes, probe: bytes
) -> None:
    path = tmp_path_factory.mktemp("written") / "bundle"
    manifest = manifest.model_copy(update={"files": hash_files({manifest.model_name: model, PROBE: probe})})
    written = Bundle.write(path, manifest, model, probe)
    assert written.manifest == manifest
    assert written.read_model() == model
    assert written.read_probe_bytes() == probe
