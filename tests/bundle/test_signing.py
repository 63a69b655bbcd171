"""Who may vouch for a bundle, and what becomes of everybody else's."""

import base64
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import chexnet_deploy.runtime.sessions.ort as ort_room
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.manifest import MANIFEST, MANIFEST_SHA256, ONNX_MODEL, PROBE
from chexnet_deploy.bundle.signing import releases as release_room
from chexnet_deploy.bundle.signing.keys import (
    fingerprint,
    is_encrypted,
    load_private_key,
    make_private_key,
    public_der,
    read_key_file,
    sign_content,
    verify_content,
)
from chexnet_deploy.bundle.signing.releases import Release, raise_floor, read_floor, start_floor
from chexnet_deploy.bundle.signing.sign import admit_first, sign_bundle
from chexnet_deploy.bundle.signing.signatures import MANIFEST_TYPE, SIGNATURE, Signature, SignatureFile, message_to_sign
from chexnet_deploy.bundle.signing.trust import Trust, TrustedKey
from chexnet_deploy.errors import BundleError, ChexnetError, MissingPackageError, SessionError, TrustError
from chexnet_deploy.files import sha256_hex
from chexnet_deploy.runtime.predictor import Predictor
from chexnet_deploy.runtime.sessions.open import open_session
from tests.command_line import chexnet
from tests.tiny import tiny_manifest

# RFC 8032, section 7.1, TEST 1: the secret key and its public key.
SEED = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"
PUBLIC = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
# The same key as OpenSSL 3.0 writes it: `openssl pkey -pubout`, and `openssl pkey -pubout -outform DER | sha256sum`.
PUBLIC_BASE64 = "MCowBQYDK2VwAyEA11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo="
FINGERPRINT = "06e3fd8fda29bb60ab59557de61edb0aecdb231134be30e75b455f8e1b792fa9"
MANIFEST_BYTES = b'{"schema_version": 1}\n'  # 22 bytes; the type has 47
MESSAGE = b'DSSEv1 47 application/vnd.chexnet-deploy.manifest.v1+json 22 {"schema_version": 1}\n'
# openssl pkeyutl -sign -inkey KEY.pem -rawin -in MESSAGE
SIGNED = (
    "e6a71ade6230ff58d9656c159cdc0668d395f833ab6531d1ad42b73033bde83b"
    "c97590ae777955d36f1b22ab2841dd070cd2716ac5ca271d50b2170f0dfa520e"
)

FILES = {ONNX_MODEL: b"m" * 5000, PROBE: b"p" * 1000}
RELEASE = Release(line="chexnet-adult", number=5)
ROLES = ("release", "next", "former", "stranger")


@pytest.fixture(scope="module")
def keys() -> dict[str, Ed25519PrivateKey]:
    return {role: Ed25519PrivateKey.from_private_bytes(hashlib.sha256(role.encode()).digest()) for role in ROLES}


def listed(name: str, key: Ed25519PrivateKey, *, is_revoked: bool = False) -> TrustedKey:
    return TrustedKey(name=name, public_key=base64.b64encode(public_der(key)).decode(), is_revoked=is_revoked)


@pytest.fixture
def trust(keys: dict[str, Ed25519PrivateKey]) -> Trust:
    return Trust(keys=tuple(listed(role, keys[role], is_revoked=role == "former") for role in ROLES[:3]))


@pytest.fixture
def floored(trust: Trust, tmp_path: Path) -> Trust:
    return trust.model_copy(update={"line": RELEASE.line, "floor_file": tmp_path / "floor.json"})


def write_tiny(path: Path, number: int | None = RELEASE.number, line: str = RELEASE.line) -> Bundle:
    release = None if number is None else Release(line=line, number=number)
    return Bundle.write(path, tiny_manifest(FILES, release=release), FILES[ONNX_MODEL], FILES[PROBE])


def assert_refused(path: Path, trust: Trust, *words: str, error: type[ChexnetError] = TrustError) -> None:
    with pytest.raises(error) as caught:
        Bundle.open(path, trust=trust)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


# --- What is signed, and with what -------------------------------------------------------------------------------------


def test_known_answer() -> None:
    key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(SEED))
    assert public_der(key)[-32:].hex() == PUBLIC
    assert base64.b64encode(public_der(key)).decode() == PUBLIC_BASE64
    assert fingerprint(public_der(key)) == FINGERPRINT
    assert message_to_sign(MANIFEST_BYTES, MANIFEST_TYPE) == MESSAGE
    assert sign_content(key, MANIFEST_BYTES, MANIFEST_TYPE) == Signature(key=FINGERPRINT, ed25519=SIGNED)
    trusted = TrustedKey(name="RFC 8032", public_key=PUBLIC_BASE64)
    assert (trusted.raw.hex(), trusted.fingerprint) == (PUBLIC, FINGERPRINT)


def test_the_file_is_what_this_says() -> None:
    content = (
        f'{{\n  "format": 1,\n  "signatures": [\n    {{\n      "key": "{FINGERPRINT}",\n'
        f'      "ed25519": "{SIGNED}"\n    }}\n  ]\n}}\n'
    ).encode()
    file = SignatureFile.parse(content, SIGNATURE)
    assert file.signatures == (Signature(key=FINGERPRINT, ed25519=SIGNED),)
    assert file.to_bytes() == content


def test_openssl_agrees(keys: dict[str, Ed25519PrivateKey], tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("NOT RUN against OpenSSL: there is no openssl command")
    bundle = write_tiny(tmp_path / "bundle")
    sign_bundle(bundle.path, keys["release"])
    (signature,) = SignatureFile.parse((bundle.path / SIGNATURE).read_bytes(), "").signatures
    (tmp_path / "message").write_bytes(message_to_sign((bundle.path / MANIFEST).read_bytes(), MANIFEST_TYPE))
    (tmp_path / "signature").write_bytes(bytes.fromhex(signature.ed25519))
    (tmp_path / "public.der").write_bytes(public_der(keys["release"]))
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-keyform", "DER", "-inkey", "public.der", "-rawin"]
    done = subprocess.run([*command, "-in", "message", "-sigfile", "signature"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_every_bit_of_a_signature_counts(keys: dict[str, Ed25519PrivateKey]) -> None:
    key = keys["release"]
    right = sign_content(key, MANIFEST_BYTES, MANIFEST_TYPE)
    raw = public_der(key)[-32:]
    assert verify_content(raw, right, MANIFEST_BYTES, MANIFEST_TYPE)
    for bit in range(512):
        content = bytearray(bytes.fromhex(right.ed25519))
        content[bit // 8] ^= 1 << bit % 8
        assert not verify_content(raw, Signature(key=right.key, ed25519=content.hex()), MANIFEST_BYTES, MANIFEST_TYPE)


# --- Whose signature opens a bundle ------------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", ["none", "resealed", "model and its hash", "signature of another bundle"])
@pytest.mark.parametrize("signers", [(), *((role,) for role in ROLES), ("former", "stranger")], ids="+".join)
def test_matrix_of_keys_and_edits(
    keys: dict[str, Ed25519PrivateKey], trust: Trust, tmp_path: Path, signers: tuple[str, ...], edit: str
) -> None:
    path = write_tiny(tmp_path / "bundle").path
    other = write_tiny(tmp_path / "other", number=6).path
    for role in signers:
        sign_bundle(path, keys[role])
        sign_bundle(other, keys[role])
    record = json.loads((path / MANIFEST).read_bytes())
    if edit == "signature of another bundle" and signers:
        shutil.copyfile(other / SIGNATURE, path / SIGNATURE)
    if edit == "resealed":
        record["tools"] = {"torch": "2.0"}
    if edit == "model and its hash":
        (path / ONNX_MODEL).write_bytes(b"evil")
        record["files"][ONNX_MODEL] = sha256_hex(b"evil")
    if edit in ("resealed", "model and its hash"):
        raw = json.dumps(record).encode()
        (path / MANIFEST).write_bytes(raw)
        (path / MANIFEST_SHA256).write_text(sha256_hex(raw) + "\n")
    Bundle.open(path)  # without trust, hashes are all there is
    if edit == "none" and signers and signers[0] in ("release", "next"):
        assert Bundle.open(path, trust=trust).signers == signers
    elif not signers:
        assert_refused(path, trust, "is not signed", "release or next", "chexnet-deploy sign")
    elif signers[0] in ("release", "next"):
        assert_refused(path, trust, f"signature by {signers[0]} is not for this manifest")
    else:
        assert_refused(path, trust, "former (revoked)" if "former" in signers else "unknown", "needed")


def test_signing_changes_no_id_and_no_other_file(keys: dict[str, Ed25519PrivateKey], tmp_path: Path) -> None:
    bundle = write_tiny(tmp_path / "bundle")
    before = {file.name: file.read_bytes() for file in bundle.path.iterdir()}
    signed = sign_bundle(bundle.path, keys["release"])
    after = {file.name: file.read_bytes() for file in bundle.path.iterdir()}
    assert signed.bundle.id == Bundle.open(bundle.path).id == bundle.id
    assert after.keys() - before.keys() == {SIGNATURE}
    assert {name: after[name] for name in before} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["bundle"]


def test_keys_are_changed_without_a_day_on_which_nothing_opens(
    keys: dict[str, Ed25519PrivateKey], tmp_path: Path
) -> None:
    path = write_tiny(tmp_path / "bundle").path
    old, new = listed("old", keys["release"]), listed("new", keys["next"])
    sign_bundle(path, keys["release"])
    assert sign_bundle(path, keys["next"]).n_signatures == 2
    assert sign_bundle(path, keys["next"]).n_signatures == 2  # again changes nothing
    assert Bundle.open(path, trust=Trust(keys=(old,))).signers == ("old",)
    assert set(Bundle.open(path, trust=Trust(keys=(old, new))).signers) == {"old", "new"}
    revoked = old.model_copy(update={"is_revoked": True})
    assert Bundle.open(path, trust=Trust(keys=(revoked, new))).signers == ("new",)


def test_one_wrong_signature_by_a_trusted_key_is_not_made_good_by_a_right_one(
    keys: dict[str, Ed25519PrivateKey], trust: Trust, tmp_path: Path
) -> None:
    path = write_tiny(tmp_path / "bundle").path
    raw = (path / MANIFEST).read_bytes()
    wrong = sign_content(keys["next"], raw + b" ", MANIFEST_TYPE)
    (path / SIGNATURE).write_bytes(
        SignatureFile.of((sign_content(keys["release"], raw, MANIFEST_TYPE), wrong)).to_bytes()
    )
    assert_refused(path, trust, "next is not for this manifest")


def test_a_damaged_bundle_is_not_signed(keys: dict[str, Ed25519PrivateKey], tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "bundle").path
    (path / ONNX_MODEL).write_bytes(b"x")
    with pytest.raises(BundleError, match="does not match"):
        sign_bundle(path, keys["release"])
    assert not (path / SIGNATURE).exists()


def test_a_damaged_signature_file_is_not_signed_over(keys: dict[str, Ed25519PrivateKey], tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "bundle").path
    (path / SIGNATURE).write_text("{}")
    with pytest.raises(TrustError, match="signatures"):
        sign_bundle(path, keys["release"])
    assert (path / SIGNATURE).read_text() == "{}"


def test_without_trust_a_signature_is_not_looked_at(tmp_path: Path) -> None:
    bundle = write_tiny(tmp_path / "bundle")
    (bundle.path / SIGNATURE).write_text("junk")
    opened = Bundle.open(bundle.path)
    assert (opened.id, opened.signers) == (bundle.id, ())


def test_nine_keys_are_too_many(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "bundle").path
    for _ in range(8):
        sign_bundle(path, Ed25519PrivateKey.generate())
    with pytest.raises(TrustError, match="at most 8"):
        sign_bundle(path, Ed25519PrivateKey.generate())


def test_nothing_is_parsed_before_its_signature_holds(
    keys: dict[str, Ed25519PrivateKey], trust: Trust, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny(tmp_path / "bundle").path
    sign_bundle(path, keys["stranger"])
    monkeypatch.setattr("chexnet_deploy.bundle.bundle.parse_manifest", lambda *_: pytest.fail("parsed"))
    assert_refused(path, trust, "unknown")


def test_what_is_not_trusted_never_reaches_onnx_runtime(
    bundles: dict[str, Bundle],
    keys: dict[str, Ed25519PrivateKey],
    trust: Trust,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = Path(shutil.copytree(bundles["int8"].path, tmp_path / "int8"))
    sign_bundle(path, keys["release"])
    with Predictor.open(path, trust=trust, provider="cpu"):
        pass
    sign_bundle(path, keys["stranger"])
    (path / SIGNATURE).write_bytes(
        SignatureFile.of((sign_content(keys["stranger"], (path / MANIFEST).read_bytes(), MANIFEST_TYPE),)).to_bytes()
    )
    monkeypatch.setattr(ort_room.ort, "InferenceSession", lambda *_a, **_k: pytest.fail("reached ONNX Runtime"))
    with pytest.raises(TrustError):
        Predictor.open(path, trust=trust, provider="cpu")


def test_without_cryptography_trust_refuses(trust: Trust, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiny(tmp_path / "bundle").path
    (path / SIGNATURE).write_bytes(SignatureFile.of((Signature(key="0" * 64, ed25519="0" * 128),)).to_bytes())
    monkeypatch.setitem(sys.modules, "chexnet_deploy.bundle.signing.keys", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'chexnet-deploy\[signing\]'"):
        Bundle.open(path, trust=trust)
    Bundle.open(path)


# --- Bytes verified are bytes loaded -----------------------------------------------------------------------------------


def test_what_is_swapped_while_it_is_opened_is_never_handed_out(
    keys: dict[str, Ed25519PrivateKey], trust: Trust, tmp_path: Path
) -> None:
    good, evil, path = tmp_path / "good", tmp_path / "evil", tmp_path / "bundle"
    write_tiny(good)
    sign_bundle(good, keys["release"])
    shutil.copytree(good, evil)
    (evil / ONNX_MODEL).write_bytes(b"e" * 5000)
    good.rename(path)
    stop = threading.Event()

    def swap() -> None:  # the whole folder, and the one file in it
        while not stop.is_set():
            path.rename(good)
            evil.rename(path)
            path.rename(evil)
            good.rename(path)
            (evil / ONNX_MODEL).rename(tmp_path / "model")
            (path / ONNX_MODEL).rename(evil / ONNX_MODEL)
            (tmp_path / "model").rename(path / ONNX_MODEL)
            (path / ONNX_MODEL).rename(tmp_path / "model")
            (evil / ONNX_MODEL).rename(path / ONNX_MODEL)
            (tmp_path / "model").rename(evil / ONNX_MODEL)

    swapper = threading.Thread(target=swap)
    swapper.start()
    handed, refused = 0, 0
    try:
        for _ in range(3000):
            try:
                model = Bundle.open(path, trust=trust).read_model()
            except (BundleError, TrustError):
                refused += 1
            else:
                assert model == FILES[ONNX_MODEL]
                handed += 1
    finally:
        stop.set()
        swapper.join()
    assert refused > 0
    assert handed > 0


# --- Releases ----------------------------------------------------------------------------------------------------------


def test_the_first_release_is_admitted_by_hand(
    keys: dict[str, Ed25519PrivateKey], floored: Trust, tmp_path: Path
) -> None:
    path = write_tiny(tmp_path / "bundle").path
    sign_bundle(path, keys["release"])
    assert_refused(path, floored, "floor.json is missing", "--start-floor")
    assert admit_first(path, floored).manifest.release == RELEASE
    assert Bundle.open(path, trust=floored).manifest.release == RELEASE
    with pytest.raises(TrustError, match="is there already"):
        admit_first(path, floored)


@pytest.mark.parametrize(
    ("number", "line", "words"),
    [
        (5, "chexnet-adult", None),
        (6, "chexnet-adult", None),
        (2**31 - 1, "chexnet-adult", None),
        (4, "chexnet-adult", ("chexnet-adult 4 is older than chexnet-adult 5", "floor.json")),
        (6, "chexnet-child", ("of the model line chexnet-child, needed chexnet-adult",)),
        (None, "", ("names no release", "--release")),
    ],
)
def test_older_releases_are_refused(
    keys: dict[str, Ed25519PrivateKey],
    floored: Trust,
    tmp_path: Path,
    number: int | None,
    line: str,
    words: tuple[str, ...] | None,
) -> None:
    assert floored.floor_file is not None
    start_floor(floored.floor_file, RELEASE)
    path = write_tiny(tmp_path / "bundle", number, line).path
    sign_bundle(path, keys["release"])
    if words is None:
        Bundle.open(path, trust=floored)
    else:
        assert_refused(path, floored, *words)
    assert read_floor(floored.floor_file) == RELEASE  # opening alone raises nothing


def test_the_trust_file_has_a_floor_of_its_own(
    keys: dict[str, Ed25519PrivateKey], trust: Trust, tmp_path: Path
) -> None:
    path = write_tiny(tmp_path / "bundle").path
    sign_bundle(path, keys["release"])
    Bundle.open(path, trust=trust.model_copy(update={"line": RELEASE.line, "min_release": 5}))
    assert_refused(path, trust.model_copy(update={"line": RELEASE.line, "min_release": 6}), "older", "min_release")


def as_release(bundle: Bundle, path: Path, number: int, key: Ed25519PrivateKey) -> Path:
    manifest = bundle.manifest.model_copy(update={"release": Release(line=RELEASE.line, number=number)})
    Bundle.write(path, manifest, bundle.read_model(), bundle.read_probe_bytes())
    sign_bundle(path, key)
    return path


def test_a_release_that_runs_raises_the_floor(
    bundles: dict[str, Bundle], keys: dict[str, Ed25519PrivateKey], floored: Trust, tmp_path: Path
) -> None:
    old, new = (as_release(bundles["int8"], tmp_path / f"{n}", n, keys["release"]) for n in (1, 2))
    admit_first(old, floored)
    with Predictor.open(old, trust=floored, provider="cpu"):
        pass
    Predictor.open(new, trust=floored, provider="cpu").close()
    assert floored.floor_file is not None
    assert read_floor(floored.floor_file).number == 2
    with pytest.raises(TrustError, match="older"):
        Predictor.open(old, trust=floored, provider="cpu")


def test_a_release_that_does_not_run_locks_nobody_out(
    bundles: dict[str, Bundle],
    keys: dict[str, Ed25519PrivateKey],
    floored: Trust,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old, new = (as_release(bundles["int8"], tmp_path / f"{n}", n, keys["release"]) for n in (1, 2))
    admit_first(old, floored)

    def fail(*_arguments: object, **_options: object) -> float:
        raise SessionError("known answers differ")

    with monkeypatch.context() as patch:
        patch.setattr("chexnet_deploy.runtime.sessions.known_answers.KnownAnswers.check", fail)
        with pytest.raises(SessionError):
            Predictor.open(new, trust=floored, provider="cpu")
    Predictor.open(old, trust=floored, provider="cpu").close()


def test_opening_a_session_leaves_the_floor_alone(
    bundles: dict[str, Bundle], keys: dict[str, Ed25519PrivateKey], floored: Trust, tmp_path: Path
) -> None:
    old, new = (as_release(bundles["int8"], tmp_path / f"{n}", n, keys["release"]) for n in (1, 2))
    admit_first(old, floored)
    opened = Bundle.open(new, trust=floored)
    open_session(opened, provider="cpu").close()
    assert floored.floor_file is not None
    assert read_floor(floored.floor_file).number == 1
    opened.keep_release()
    assert read_floor(floored.floor_file).number == 2


def test_a_predictor_is_not_handed_out_where_a_newer_release_has_run_meanwhile(
    bundles: dict[str, Bundle], keys: dict[str, Ed25519PrivateKey], floored: Trust, tmp_path: Path
) -> None:
    path = as_release(bundles["int8"], tmp_path / "1", 1, keys["release"])
    admit_first(path, floored)
    bundle = Bundle.open(path, trust=floored)
    assert floored.floor_file is not None
    raise_floor(floored.floor_file, Release(line=RELEASE.line, number=2))
    with pytest.raises(TrustError, match="older"):
        Predictor.of(bundle, provider="cpu")


def test_a_floor_only_rises_whoever_writes_it(tmp_path: Path) -> None:
    floor = tmp_path / "floor.json"
    start_floor(floor, Release(line="a", number=1))
    numbers = list(range(1, 101)) * 2
    random.Random(0).shuffle(numbers)
    seen: list[int] = []

    def raise_one(number: int) -> None:
        try:
            raise_floor(floor, Release(line="a", number=number))
        except TrustError as err:
            assert "older" in str(err)  # noqa: PT017 - whether it is refused depends on who came first
        seen.append(read_floor(floor).number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(raise_one, numbers))
    assert read_floor(floor).number == 100
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".floor.json.lock", "floor.json"]


def test_an_unchanged_floor_needs_no_writing(tmp_path: Path) -> None:
    floor = tmp_path / "floor.json"
    start_floor(floor, RELEASE)
    (tmp_path / ".floor.json.lock").unlink()
    before = floor.stat().st_mtime_ns
    raise_floor(floor, RELEASE)
    assert floor.stat().st_mtime_ns == before
    assert not (tmp_path / ".floor.json.lock").exists()


def test_a_lock_that_is_never_given_back_is_no_endless_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release_room, "LOCK_TIMEOUT_S", 0.05)
    floor = tmp_path / "floor.json"
    start_floor(floor, RELEASE)
    with release_room._locked(floor), pytest.raises(TrustError, match="held by another process"):
        raise_floor(floor, Release(line=RELEASE.line, number=6))


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"format": 1}', b"\xff", b'{"format": 1, "release": 5}'])
def test_a_damaged_floor_refuses(floored: Trust, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "floor.json").write_bytes(content)
    with pytest.raises(TrustError, match="is no floor file"):
        floored.check_release(RELEASE, "bundle")


def test_a_floor_that_everyone_can_write_refuses(floored: Trust, tmp_path: Path) -> None:
    start_floor(tmp_path / "floor.json", RELEASE)
    (tmp_path / "floor.json").chmod(0o666)
    with pytest.raises(TrustError, match="chmod 664"):
        floored.check_release(RELEASE, "bundle")


def test_a_floor_of_another_line_refuses(floored: Trust, tmp_path: Path) -> None:
    start_floor(tmp_path / "floor.json", Release(line="chexnet-child", number=1))
    with pytest.raises(TrustError, match="is for the model line chexnet-child"):
        floored.check_release(RELEASE, "bundle")


def test_a_floor_that_cannot_be_kept_refuses(tmp_path: Path) -> None:
    with pytest.raises(TrustError, match="can't be written"):
        start_floor(tmp_path / "none" / "floor.json", RELEASE)


@pytest.mark.slow
def test_what_is_made_of_a_release_is_of_that_release(checkpoint_path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "chexnet_deploy", "export", str(checkpoint_path), "--out", str(tmp_path / "out")]
    options = ["--precision", "fp16", "--line", "chexnet-adult", "--release", "7"]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = {name: Bundle.open(tmp_path / "out" / name).manifest.release for name in ("fp32", "fp16")}
    assert made == dict.fromkeys(("fp32", "fp16"), Release(line="chexnet-adult", number=7))


# --- Keys on disk ------------------------------------------------------------------------------------------------------


def test_a_new_key_is_for_its_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = make_private_key(tmp_path / "key.pem", None)
    finally:
        os.umask(before)
    assert (tmp_path / "key.pem").stat().st_mode & 0o777 == 0o600
    pem = read_key_file(tmp_path / "key.pem")
    assert not is_encrypted(pem)
    assert public_der(load_private_key(pem, None, "key.pem")) == public_der(made)
    with pytest.raises(TrustError, match="is there already"):
        make_private_key(tmp_path / "key.pem", None)
    assert read_key_file(tmp_path / "key.pem") == pem


def test_an_encrypted_key_needs_its_passphrase(tmp_path: Path) -> None:
    made = make_private_key(tmp_path / "key.pem", b"secret")
    pem = read_key_file(tmp_path / "key.pem")
    assert is_encrypted(pem)
    assert public_der(load_private_key(pem, b"secret", "key.pem")) == public_der(made)
    for passphrase in (None, b"", b"other"):
        with pytest.raises(TrustError, match=r"key\.pem holds no private key that opens"):
            load_private_key(pem, passphrase, "key.pem")


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o601])
def test_a_key_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    make_private_key(tmp_path / "key.pem", None)
    (tmp_path / "key.pem").chmod(mode)
    with pytest.raises(TrustError, match=f"has mode {mode:o}.*chmod 600 "):
        read_key_file(tmp_path / "key.pem")


def test_another_kind_of_key_is_refused() -> None:
    other = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with pytest.raises(TrustError, match="needed Ed25519"):
        load_private_key(other, None, "key.pem")


@pytest.mark.parametrize("content", [b"", b"text", b"-----BEGIN PRIVATE KEY-----\nMC4C\n-----END PRIVATE KEY-----\n"])
def test_no_key_at_all_is_refused(content: bytes) -> None:
    with pytest.raises(TrustError, match="holds no private key"):
        load_private_key(content, None, "key.pem")


def test_missing_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrustError, match=r"is missing.*keygen"):
        read_key_file(tmp_path / "none.pem")


# --- Trust files -------------------------------------------------------------------------------------------------------

KEY = f'[[keys]]\nname = "a"\npublic_key = "{PUBLIC_BASE64}"\n'
OTHER_DER = base64.b64encode(bytes.fromhex("302a300506032b656e032100") + bytes(32)).decode()  # X25519


def test_a_trust_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "trust.toml"
    path.write_text(f'format = 1\nline = "chexnet-adult"\nmin_release = 3\nfloor_file = "floor.json"\n{KEY}')
    trust = Trust.read(path)
    assert trust.keys == (TrustedKey(name="a", public_key=PUBLIC_BASE64, is_revoked=False),)
    assert (trust.line, trust.min_release, trust.floor_file) == ("chexnet-adult", 3, tmp_path / "floor.json")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "keys"),
        ("keys = []", "keys"),
        ("format = 2\n" + KEY, "format"),
        ('format = "1"\n' + KEY, "format"),
        ("surprise = 1\n" + KEY, "surprise"),
        ('line = "Adult"\n' + KEY, "line"),
        ('line = "a"\nmin_release = 0\n' + KEY, "min_release"),
        ('line = "a"\nmin_release = true\n' + KEY, "min_release"),
        ('line = "a"\nmin_release = "3"\n' + KEY, "min_release"),
        ('line = "a"\nmin_release = nan\n' + KEY, "min_release"),
        ("min_release = 3\n" + KEY, "no line is given"),
        ('floor_file = "f"\n' + KEY, "no line is given"),
        (KEY + KEY, "listed twice"),
        (KEY + "is_revoked = true\n", "every key is revoked"),
        (KEY + 'is_revoked = "no"\n', "is_revoked"),
        (KEY + "expires = 2030-01-01\n", "no trust file"),
        (KEY.replace("MCow", "MC!w"), "base64"),
        (KEY.replace(PUBLIC_BASE64, PUBLIC), "Ed25519"),
        (KEY.replace(PUBLIC_BASE64, OTHER_DER), "Ed25519"),
        (KEY.replace('"a"', '"a\\nb"'), "name"),
        ("[[keys", "no trust file"),
        ("a = " + "[" * 5000, "no trust file"),
    ],
)
def test_a_wrong_trust_file_is_refused(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "trust.toml"
    path.write_text(content)
    with pytest.raises(TrustError) as caught:
        Trust.read(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_trust_file_that_everyone_can_write_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trust.toml"
    path.write_text(KEY)
    path.chmod(0o646)
    with pytest.raises(TrustError, match="chmod 644"):
        Trust.read(path)


@pytest.mark.parametrize(
    "make", [os.mkfifo, Path.mkdir, lambda path: path.write_bytes(b"#" * 70000), lambda path: None]
)
def test_what_is_no_file_is_no_trust_file(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "trust.toml")
    with pytest.raises(TrustError, match=r"trust\.toml"):
        Trust.read(tmp_path / "trust.toml")


# --- The command line --------------------------------------------------------------------------------------------------


def typed(stdin: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own that is told a passphrase."""
    command = [sys.executable, "-m", "chexnet_deploy", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, input=stdin)


def test_from_a_new_key_to_a_prediction(bundles: dict[str, Bundle], phantom_root: Path, tmp_path: Path) -> None:
    image = sorted((phantom_root / "images").iterdir())[0]
    key, trust, path = tmp_path / "release-2026.pem", tmp_path / "trust.toml", tmp_path / "int8"
    shutil.copytree(bundles["int8"].path, path)
    made = chexnet("keygen", key)
    assert made.returncode == 0, made.stderr
    assert 'name = "release-2026"' in made.stdout
    trust.write_text(made.stdout)

    def assert_unsigned(*arguments: object) -> None:
        done = chexnet(*arguments, "--trust", trust)
        assert (done.returncode, done.stdout) == (2, "")
        assert "is not signed" in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr

    assert_unsigned("verify", path)
    assert_unsigned("inspect", path)
    assert_unsigned("predict", path, image)
    assert_unsigned("build", path, "--out", tmp_path / "plan")
    assert_unsigned("evaluate", path, "--data", phantom_root)
    assert_unsigned("bench", "--engine", path, "--out", tmp_path / "bench", "--no-html")
    signed = chexnet("sign", path, "--key", key)
    assert signed.returncode == 0, signed.stderr
    assert "names no release" in signed.stderr
    assert json.loads(chexnet("verify", path, "--trust", trust, "--json").stdout)["signers"] == ["release-2026"]
    assert chexnet("inspect", path, "--trust", trust).returncode == 0
    assert "Mass" in chexnet("predict", path, image, "--trust", trust).stdout
    # Its fp32 ancestor must be trusted too.
    done = chexnet("bench", "--engine", path, "--out", tmp_path / "bench", "--no-html", "--trust", trust)
    assert done.returncode == 2
    assert "signed by a trusted key" in done.stderr


def test_the_floor_at_the_command_line(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "bundle").path
    made = typed("secret\nsecret\n", "keygen", tmp_path / "key.pem", "--encrypt")
    assert made.returncode == 0, made.stderr
    trust = tmp_path / "trust.toml"
    trust.write_text(f'line = "{RELEASE.line}"\nfloor_file = "floor.json"\n{made.stdout}')
    assert typed("other\n", "sign", path, "--key", tmp_path / "key.pem").returncode == 2
    signed = typed("secret\n", "sign", path, "--key", tmp_path / "key.pem")
    assert signed.returncode == 0, signed.stderr
    assert "warning" not in signed.stderr
    assert "--start-floor" in chexnet("verify", path, "--trust", trust).stderr
    started = chexnet("verify", path, "--trust", trust, "--start-floor")
    assert f"line {RELEASE.line}, release {RELEASE.number}" in started.stdout
    assert read_floor(tmp_path / "floor.json") == RELEASE


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("inspect", "x.safetensors", "--trust", "t"), "--trust is for bundles"),
        (("inspect", "bundle", "--trust", "none.toml"), "none.toml is missing"),
        (("sign", "bundle", "--key", "none.pem"), "none.pem is missing"),
        (("export", "x.safetensors", "--out", "o", "--line", "a"), "one of --line and --release"),
        (("export", "x.safetensors", "--out", "o", "--release", "1"), "one of --line and --release"),
        (("export", "x.safetensors", "--out", "o", "--line", "A b", "--release", "1"), "--line"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    done = chexnet(*arguments)
    assert done.returncode == 2
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
