"""No PASS, no run: what `bench` found travels with the bundle, signed, and trust may demand it of every opener."""

import base64
import hashlib
import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from benchmarks.rigs.plan_card import CARD, TARGET
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.manifest import PLAN_MODEL, PROBE, Target
from chexnet_deploy.bundle.signing.attestation import ATTESTATION, ATTESTATION_SIGNATURE, Attestation, RunsOn
from chexnet_deploy.bundle.signing.keys import public_der, sign_content
from chexnet_deploy.bundle.signing.sign import sign_bundle
from chexnet_deploy.bundle.signing.signatures import ATTESTATION_TYPE, MANIFEST_TYPE, SignatureFile
from chexnet_deploy.bundle.signing.trust import Trust
from chexnet_deploy.dicom.node.radiograph_worker import RadiographWork
from chexnet_deploy.errors import ChexnetError, SessionError, TrustError
from chexnet_deploy.export.chain import build_plan
from chexnet_deploy.runtime.predictor import Predictor
from chexnet_deploy.runtime.sessions import here as here_room
from chexnet_deploy.runtime.sessions import open as open_room
from chexnet_deploy.serving.http.config import ServeConfig
from chexnet_deploy.serving.http.loaded_model import open_engine
from chexnet_deploy.serving.triton import check_repository, write_repository
from tests.command_line import assert_one_line_error, chexnet
from tests.dicom.node.test_config import WHOLE, read
from tests.tiny import tiny_manifest, write_parent

SPEC, NEWER_SPEC = "5" * 64, "6" * 64
KEYS = {
    role: Ed25519PrivateKey.from_private_bytes(hashlib.sha256(role.encode()).digest())
    for role in ("release", "former", "stranger")
}


HERE = RunsOn(
    processor=here_room.processor_name(),
    backend=f"onnxruntime {onnxruntime.__version__}",
    platform=f"{platform.system()} {platform.machine()}",
)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_parent(tmp_path / "bundle")


@pytest.fixture
def trust_file(tmp_path: Path) -> Path:
    """Demands a PASS by one spec; the former key is revoked."""
    keys = "".join(
        f'[[keys]]\nname = "{role}"\npublic_key = "{base64.b64encode(public_der(KEYS[role])).decode()}"\n'
        f"is_revoked = {'true' if role == 'former' else 'false'}\n"
        for role in ("release", "former")
    )
    path = tmp_path / "trust.toml"
    path.write_text(f'format = 1\npassing_specs = ["{SPEC}"]\n{keys}')
    return path


def attested(bundle: Bundle, **changes: Any) -> Attestation:
    facts: dict[str, Any] = {
        "verdict": "PASS",
        "summary": "PASS on 1 of 1",
        "bundle_id": bundle.id,
        "model_sha256": bundle.model_sha256,
        "reference_id": bundle.id,
        "reference_model_sha256": "1" * 64,
        "spec_sha256": SPEC,
        "data_sha256": "2" * 64,
        "n_images": 3,
        "n_patients": 2,
        "runs_on": HERE,
        "tools": {"chexnet-deploy": "0.1.0"},
        "finished_utc": "2026-11-26T09:00:00+00:00",
    }
    return Attestation(**{**facts, **changes})


def give(bundle: Bundle, attestation: Attestation, folder: Path, key: str = "release") -> None:
    """Sign the bundle by the release key, and put a signed attestation into it."""
    file = folder / "said.json"
    file.write_bytes(attestation.to_bytes())
    sign_bundle(bundle.path, KEYS["release"])
    sign_bundle(bundle.path, KEYS[key], file)


def assert_refused(bundle: Bundle, trust_file: Path, *words: str) -> None:
    with pytest.raises(TrustError) as caught:
        Bundle.open(bundle.path, trust=Trust.read(trust_file))
    for word in words:
        assert word in str(caught.value)


# --- The form ----------------------------------------------------------------------------------------------------------


def test_the_same_facts_are_the_same_bytes() -> None:
    on = RunsOn(processor="NVIDIA L4", backend="tensorrt 10.3.0", driver="12.4", platform="Linux x86_64")
    assert json.dumps(on.model_dump(), sort_keys=True, separators=(",", ":")) == (
        '{"backend":"tensorrt 10.3.0","driver":"12.4","platform":"Linux x86_64","processor":"NVIDIA L4"}'
    )


def test_only_the_canonical_form_is_read(bundle: Bundle) -> None:
    content = attested(bundle).to_bytes()
    assert Attestation.parse(content, "x") == attested(bundle)
    assert content.startswith(b'{"bundle_id":"')
    assert b": " not in content.replace(b"Intel: ", b"")
    spaced = json.dumps(json.loads(content)).encode()
    for other in (spaced, content + b"\n", content.replace(b'"PASS"', b'"pass"', 1), b"[]", b"\xff"):
        with pytest.raises(TrustError):
            Attestation.parse(other, "x")
    with pytest.raises(TrustError):  # of two equal keys JSON's readers take the last
        Attestation.parse(content[:-1] + b',"verdict":"PASS"}', "x")


# --- What opens --------------------------------------------------------------------------------------------------------


def test_a_pass_opens_the_bundle_and_says_so(bundle: Bundle, trust_file: Path, tmp_path: Path) -> None:
    give(bundle, attested(bundle), tmp_path)
    opened = Bundle.open(bundle.path, trust=Trust.read(trust_file))
    assert opened.attestation == attested(bundle)
    assert opened.id == bundle.id  # an attestation changes no id
    assert Bundle.open(bundle.path).attestation is None  # nobody asked
    said = chexnet("verify", bundle.path, "--trust", trust_file)
    assert (said.returncode, "PASS on 1 of 1 on " in said.stdout) == (0, True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"verdict": "FAIL", "summary": "FAIL by flip_share"}, ("attested as FAIL by flip_share", "needed a PASS")),
        ({"verdict": "INCONCLUSIVE", "summary": "INCONCLUSIVE"}, ("INCONCLUSIVE", "needed a PASS")),
        ({"spec_sha256": NEWER_SPEC}, ("by the spec 666666666666", "needed one by 555555555555")),
    ],
)
def test_what_is_no_pass_by_that_spec_is_refused(
    bundle: Bundle, trust_file: Path, tmp_path: Path, changes: dict[str, str], words: tuple[str, ...]
) -> None:
    give(bundle, attested(bundle, **changes), tmp_path)
    assert_refused(bundle, trust_file, *words)


def test_a_bundle_without_attestation_is_refused(bundle: Bundle, trust_file: Path) -> None:
    sign_bundle(bundle.path, KEYS["release"])
    assert_refused(bundle, trust_file, "holds no signed attestation", "chexnet-deploy bench")


@pytest.mark.parametrize("old", [b'"verdict":"FAIL"', b'"n_images":3', b'"finished_utc":"2026'])
def test_an_edited_attestation_is_refused(bundle: Bundle, trust_file: Path, tmp_path: Path, old: bytes) -> None:
    give(bundle, attested(bundle, verdict="FAIL", summary="FAIL"), tmp_path)
    place = bundle.path / ATTESTATION
    edited = place.read_bytes().replace(
        old, old.replace(b"FAIL", b"PASS").replace(b"3", b"4").replace(b"2026", b"2027")
    )
    assert edited != place.read_bytes()
    place.write_bytes(edited)
    assert_refused(bundle, trust_file, "the signature by release is not for this attestation")


def test_the_attestation_of_another_bundle_is_refused(bundle: Bundle, trust_file: Path, tmp_path: Path) -> None:
    other = write_parent(tmp_path / "other", operating_points={"Mass": 0.5})
    give(other, attested(other), tmp_path)
    sign_bundle(bundle.path, KEYS["release"])
    for name in (ATTESTATION, ATTESTATION_SIGNATURE):
        shutil.copyfile(other.path / name, bundle.path / name)
    assert_refused(bundle, trust_file, f"is of the bundle {other.id[:12]}", bundle.id[:12])
    with pytest.raises(TrustError, match="is of the bundle"):  # `sign` doesn't put it there either
        sign_bundle(bundle.path, KEYS["release"], other.path / ATTESTATION)


def test_what_contradicts_the_bundle_or_itself_is_not_signed(bundle: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "said.json"
    for changes, found in (
        ({"model_sha256": "3" * 64}, "is of another model file"),
        ({"n_images": 0, "n_patients": 0}, "a PASS needs images"),
        ({"n_patients": 4}, "no more patients than these"),
        ({"data_sha256": None}, "a PASS needs images"),
    ):
        file.write_bytes(attested(bundle).model_copy(update=changes).to_bytes())
        with pytest.raises(TrustError, match=found):
            sign_bundle(bundle.path, KEYS["release"], file)


def test_an_attestation_that_nobody_trusted_signed_is_refused(bundle: Bundle, trust_file: Path, tmp_path: Path) -> None:
    give(bundle, attested(bundle), tmp_path, key="stranger")
    assert_refused(bundle, trust_file, "the attestation is signed by", "(unknown)")
    (bundle.path / ATTESTATION_SIGNATURE).unlink()
    assert_refused(bundle, trust_file, "holds no signed attestation")
    give(bundle, attested(bundle), tmp_path, key="former")
    assert_refused(bundle, trust_file, "former (revoked)")


def test_a_signature_of_a_manifest_is_none_of_an_attestation(bundle: Bundle, trust_file: Path, tmp_path: Path) -> None:
    give(bundle, attested(bundle), tmp_path)
    as_manifest = sign_content(KEYS["release"], attested(bundle).to_bytes(), MANIFEST_TYPE)
    (bundle.path / ATTESTATION_SIGNATURE).write_bytes(SignatureFile.of((as_manifest,)).to_bytes())
    assert_refused(bundle, trust_file, "is not for this attestation")


def test_signing_a_bundle_vouches_for_no_attestation_that_came_with_it(bundle: Bundle, trust_file: Path) -> None:
    (bundle.path / ATTESTATION).write_bytes(attested(bundle).to_bytes())
    sign_bundle(bundle.path, KEYS["release"])
    assert not (bundle.path / ATTESTATION_SIGNATURE).exists()
    assert_refused(bundle, trust_file, "holds no signed attestation")


def test_a_newer_attestation_drops_the_signatures_of_the_older(
    bundle: Bundle, trust_file: Path, tmp_path: Path
) -> None:
    give(bundle, attested(bundle, verdict="FAIL", summary="FAIL"), tmp_path, key="stranger")
    give(bundle, attested(bundle), tmp_path)
    signed = SignatureFile.parse((bundle.path / ATTESTATION_SIGNATURE).read_bytes(), "x")
    assert signed.signatures == (sign_content(KEYS["release"], attested(bundle).to_bytes(), ATTESTATION_TYPE),)
    give(bundle, attested(bundle), tmp_path, key="stranger")  # the same again, by another key: both stay
    assert len(SignatureFile.parse((bundle.path / ATTESTATION_SIGNATURE).read_bytes(), "x").signatures) == 2
    assert Bundle.open(bundle.path, trust=Trust.read(trust_file)).attestation is not None


# --- On this machine ---------------------------------------------------------------------------------------------------


def _by_predictor(bundle: Path, trust: Path, folder: Path) -> None:
    Predictor.open(bundle, trust=Trust.read(trust), provider="cpu")


def _by_service(bundle: Path, trust: Path, folder: Path) -> None:
    open_engine(ServeConfig(bundle, trust=trust, provider="cpu"), *([lambda *_: None] * 3))


def _by_node(bundle: Path, trust: Path, folder: Path) -> None:
    text = WHOLE.replace('"/opt/chexnet/bundle"', f'"{bundle}"\nprovider = "cpu"\ntrust = "{trust}"')
    RadiographWork(read(folder, text))


OPENERS = (_by_predictor, _by_service, _by_node)


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("field", ["processor", "backend", "driver", "platform"])
def test_a_pass_elsewhere_is_refused_before_the_model_is_read(
    bundle: Bundle, trust_file: Path, tmp_path: Path, opener: Callable[[Path, Path, Path], None], field: str
) -> None:
    elsewhere = HERE.model_copy(update={field: "another"})
    give(bundle, attested(bundle, runs_on=elsewhere), tmp_path)
    with pytest.raises(TrustError, match=f"has its PASS elsewhere: {field} another, here "):
        opener(bundle.path, trust_file, tmp_path)


@pytest.mark.parametrize("opener", OPENERS)
def test_a_pass_here_gets_to_the_backend(
    bundle: Bundle, trust_file: Path, tmp_path: Path, opener: Callable[[Path, Path, Path], None]
) -> None:
    give(bundle, attested(bundle), tmp_path)
    with pytest.raises(SessionError):  # of an empty model; trust has let it through
        opener(bundle.path, trust_file, tmp_path)


def test_the_command_line_obeys(bundle: Bundle, trust_file: Path, tmp_path: Path) -> None:
    elsewhere = HERE.model_copy(update={"processor": "another"})
    give(bundle, attested(bundle, runs_on=elsewhere), tmp_path)
    (tmp_path / "image.png").write_bytes(b"")
    done = chexnet("predict", bundle.path, tmp_path / "image.png", "--trust", trust_file)
    assert_one_line_error(done, 2, "has its PASS elsewhere")
    give(bundle, attested(bundle, verdict="FAIL", summary="FAIL"), tmp_path)
    for command in ("predict", "inspect", "verify", "evaluate"):
        more = {"predict": (tmp_path / "image.png",), "evaluate": ("--data", tmp_path)}.get(command, ())
        assert_one_line_error(chexnet(command, bundle.path, *more, "--trust", trust_file), 2, "needed a PASS")


def test_a_triton_repository_takes_the_attestation_along(bundle: Bundle, trust_file: Path, tmp_path: Path) -> None:
    give(bundle, attested(bundle), tmp_path)
    (model,) = write_repository(tmp_path / "models", [Bundle.open(bundle.path, trust=Trust.read(trust_file))])
    assert check_repository(tmp_path / "models", trust=Trust.read(trust_file))[0].name == model.name
    (signed,) = (tmp_path / "models").rglob(ATTESTATION_SIGNATURE)
    signed.unlink()
    with pytest.raises(TrustError, match="holds no signed attestation"):
        check_repository(tmp_path / "models", trust=Trust.read(trust_file))


def test_building_asks_for_no_pass(bundle: Bundle, trust_file: Path, tmp_path: Path, without_gpu: None) -> None:
    sign_bundle(bundle.path, KEYS["release"])
    with pytest.raises(ChexnetError) as caught:  # for want of a GPU
        build_plan(bundle.path, tmp_path / "plan", "fp32", trust=Trust.read(trust_file), on_phase=lambda *_: None)
    assert not isinstance(caught.value, TrustError)


@pytest.mark.parametrize(
    ("field", "value"), [("gpu", "NVIDIA L40"), ("tensorrt", "10.8.0"), ("driver", "12.8"), ("backend", "tensorrt_rtx")]
)
def test_a_plan_with_the_pass_of_another_gpu_or_driver_is_refused(
    trust_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: str
) -> None:
    """The driver's and TensorRT's answers are given: no plan is read, so none need be there."""
    files = {PLAN_MODEL: b"plan", PROBE: b"probe"}
    plan = Bundle.write(
        tmp_path / "plan", tiny_manifest(files, target=TARGET, engine=CARD), files[PLAN_MODEL], files[PROBE]
    )

    def of(target: Target) -> RunsOn:
        backend = f"{target.backend} {target.tensorrt}"
        return RunsOn(processor=target.gpu, backend=backend, driver=target.driver, platform=target.platform)

    give(plan, attested(plan, runs_on=of(TARGET)), tmp_path)
    opened = Bundle.open(plan.path, trust=Trust.read(trust_file))
    monkeypatch.setattr(open_room, "what_it_runs_on", lambda *_: of(TARGET.model_copy(update={field: value})))
    with pytest.raises(TrustError, match="has its PASS elsewhere") as caught:
        open_room.open_session(opened, provider="cpu")
    assert value in str(caught.value)


def test_the_processor_is_named_as_the_system_names_it() -> None:
    cpuinfo = Path("/proc/cpuinfo").read_text()
    assert here_room.processor_name() in cpuinfo or "model name" not in cpuinfo
