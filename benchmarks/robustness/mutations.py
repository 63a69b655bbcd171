"""What a hostile or failing hand can do to a signed bundle: the mutations of mutated_bundles.py, each undone afterwards.

Mutations are made from the bundle as it is, so a bundle with other files or fields gives others. Knows nothing of how
bundles are verified, beside the names and forms of their files.
"""

import json
import os
import random
import socket
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.robustness.workbench import Workbench
from chexnet_deploy.bundle.manifest import MANIFEST, MANIFEST_SHA256, Manifest, hash_files
from chexnet_deploy.bundle.signing.keys import fingerprint, public_der, sign_content
from chexnet_deploy.bundle.signing.releases import Release
from chexnet_deploy.bundle.signing.signatures import MANIFEST_TYPE, SIGNATURE, Signature, SignatureFile, message_to_sign
from chexnet_deploy.files import sha256_hex

PAGE_BYTES = 4096
Make: TypeAlias = Callable[[Path], object]
"""Puts something at a path where nothing is."""
_ORDER = 2**252 + 27742317777372353535851937790883648493  # of Ed25519's base point (RFC 8032, section 5.1)


@dataclass(frozen=True, slots=True)
class Mutation:
    """One thing done to a bundle.

    Attributes:
        family: what kind of thing.
        name: which one, for a person.
        apply: does it; Workbench.undo takes it back.
    """

    family: str
    name: str
    apply: Callable[[Workbench], object]


def systematic(bench: Workbench) -> Iterator[Mutation]:
    """Yield every mutation that needs no chance."""
    yield from truncations(bench)
    yield from flips_of_small_files(bench)
    yield from resealed_edits(bench)
    yield from signatures(bench)
    yield from rollbacks(bench)
    yield from other_kinds_of_file(bench)
    yield from stowaways()


def random_flips(bench: Workbench, chance: random.Random) -> Iterator[Mutation]:
    """Yield changed bytes in the two large files, without end."""
    names = sorted(set(bench.pristine) - {MANIFEST, MANIFEST_SHA256, SIGNATURE})
    while True:
        for name in names:
            at, mask = chance.randrange(len(bench.pristine[name])), chance.randrange(1, 256)
            yield _flip("changed byte of a large file", name, at, mask)


def truncations(bench: Workbench) -> Iterator[Mutation]:
    """Cut files at every 4 KiB, and small ones at every byte or eighth byte."""
    for name, content in bench.pristine.items():
        step = {SIGNATURE: 1, MANIFEST_SHA256: 1, MANIFEST: 8}.get(name, PAGE_BYTES)
        for length in range(0, len(content), step):
            yield Mutation("truncation", f"{name} at {length}", partial(Workbench.cut, name=name, length=length))


def flips_of_small_files(bench: Workbench) -> Iterator[Mutation]:
    """Flip every bit of the signature and of manifest.sha256, and one of each byte of the manifest."""
    for name in (SIGNATURE, MANIFEST_SHA256):
        for at in range(len(bench.pristine[name])):
            for bit in range(8):
                yield _flip("flipped bit", name, at, 1 << bit)
    for at in range(len(bench.manifest)):
        yield _flip("flipped bit", MANIFEST, at, 1 << (at % 8))


def resealed_edits(bench: Workbench) -> Iterator[Mutation]:
    """Edit each field of the manifest and make its hashes anew, which needs no key."""
    record = json.loads(bench.manifest)
    for path, value in _fields(record):
        for word, edited in _other_values(value):
            yield _reseal(f"{'.'.join(map(str, path))} {word}", _edited(record, path, edited))
    yield _reseal("unknown field", json.dumps({**record, "surprise": 1}).encode())
    yield _reseal("other spacing", json.dumps(record).encode())
    yield _reseal("repeated key", bench.manifest.replace(b'"precision"', b'"precision": "fp32", "precision"', 1))
    yield _reseal("deep nesting", b"[" * 60000)
    yield _reseal("too large", bench.manifest + b" " * 65536)
    yield _reseal("not UTF-8", b"\xff\xfe" + bench.manifest)
    yield _reseal("NaN", bench.manifest.replace(b'"head_bias": [', b'"head_bias": [NaN,', 1))
    for name in record["files"]:
        changed = bench.pristine[name][:-1] + bytes([bench.pristine[name][-1] ^ 1])
        files = {**record["files"], **hash_files({name: changed})}
        yield _reseal(f"changed {name} with its hash", _edited(record, ("files",), files), {name: changed})


def signatures(bench: Workbench) -> Iterator[Mutation]:
    """Sign with what isn't trusted, sign other bytes, and write right signatures in other forms."""
    manifest, key = bench.manifest, bench.keys["release"]
    own = fingerprint(public_der(key))
    right = SignatureFile.parse(bench.pristine[SIGNATURE], SIGNATURE).signatures[0]
    edited = manifest.replace(b'"precision"', b' "precision"', 1)
    for roles in (("stranger",), ("former",), ("former", "stranger")):
        yield Mutation("signature", f"by {roles}", partial(_present, manifest=manifest, roles=roles))
        yield Mutation("signature", f"by {roles}, edited", partial(_present, manifest=edited, roles=roles))
    wrong = {
        "of the bare manifest": key.sign(manifest),
        "of its hash": key.sign(sha256_hex(manifest).encode()),
        "of another type": key.sign(
            message_to_sign(manifest, MANIFEST_TYPE).replace(b"manifest.v1", b"manifest.v2", 1)
        ),
        "of a longer manifest": key.sign(message_to_sign(manifest + b"\n", MANIFEST_TYPE)),
        "of another bundle": key.sign(message_to_sign(edited, MANIFEST_TYPE)),
        "of a stranger under a trusted name": bench.keys["stranger"].sign(message_to_sign(manifest, MANIFEST_TYPE)),
        "of the former key under a trusted name": bench.keys["former"].sign(message_to_sign(manifest, MANIFEST_TYPE)),
        "of zeros": bytes(64),
        "of ones": b"\xff" * 64,
        "with R of the identity": bytes([1]) + bytes(63),
        "with S + L": _plus_order(bytes.fromhex(right.ed25519)),
        "with its halves swapped": bytes.fromhex(right.ed25519)[32:] + bytes.fromhex(right.ed25519)[:32],
    }
    for name, content in wrong.items():
        broken = Signature(key=own, ed25519=content.hex())
        yield _sig(name, SignatureFile.of((broken,)).to_bytes())
        beside = SignatureFile.of((broken, sign_content(bench.keys["next"], manifest, MANIFEST_TYPE)))
        yield _sig(f"{name}, beside a right one", beside.to_bytes())
    for name, content in _other_forms(bench.pristine[SIGNATURE], right):
        yield _sig(name, content)


def rollbacks(bench: Workbench) -> Iterator[Mutation]:
    """Present older releases, other lines and none, rightly signed; and take the floor away."""
    now = Manifest.model_validate_json(bench.manifest, strict=True)
    assert now.release is not None
    others = [Release(line=now.release.line, number=n) for n in range(1, now.release.number)]
    others += [Release(line=line, number=now.release.number + 1) for line in ("other", f"{now.release.line}-x")]
    for release in (*others, None):
        old = now.model_copy(update={"release": release}).to_json()
        for role in ("release", "next"):
            yield Mutation("rollback", f"{release} by {role}", partial(_present, manifest=old, roles=(role,)))
    for number in ("0", "-1", "1e2", '"9"', "true", "2147483648"):
        odd = bench.manifest.replace(f'"number": {now.release.number}'.encode(), f'"number": {number}'.encode(), 1)
        yield Mutation("rollback", f"number {number}", partial(_present, manifest=odd, roles=("release",)))
    floor = json.loads(bench.floor.read_bytes())
    raised = {**floor, "release": {**floor["release"], "number": now.release.number + 1}}
    foreign = {**floor, "release": {**floor["release"], "line": "other"}}
    contents = [b"", b"{}", b"[]", b"\0" * 20, b" " * 2000, json.dumps(raised).encode(), json.dumps(foreign).encode()]
    for content in contents:
        yield Mutation("rollback", f"floor of {content[:30]!r}", partial(Workbench.set_floor, make=_writer(content)))
    right = bench.floor.read_bytes()
    kinds: dict[str, Make] = {
        "gone": _nothing,
        "folder": Path.mkdir,
        "pipe": os.mkfifo,
        "writable by all": _writer(right, mode=0o666),
    }
    for name, make in kinds.items():
        yield Mutation("rollback", f"floor {name}", partial(Workbench.set_floor, make=make))


def other_kinds_of_file(bench: Workbench) -> Iterator[Mutation]:
    """Put links, pipes, folders and the like in each file's place."""
    for name, content in bench.pristine.items():
        outside = bench.path.with_name(f"outside-{name}")
        outside.write_bytes(content)
        kinds: dict[str, Make] = {
            "gone": _nothing,
            "empty": Path.touch,
            "symlink": partial(Path.symlink_to, target=outside),
            "relative symlink": partial(Path.symlink_to, target=f"../{outside.name}"),
            "dangling symlink": partial(Path.symlink_to, target="nothing"),
            "symlink to itself": partial(Path.symlink_to, target=name),
            "symlink to a device": partial(Path.symlink_to, target="/dev/zero"),
            "hard link": partial(Path.hardlink_to, target=outside),
            "pipe": os.mkfifo,
            "folder": Path.mkdir,
            "full folder": _make_full_folder,
            "socket": _bind,
            "sparse": _make_sparse,
            "upper case": partial(_write_upper_case, content=content),
            "longer": _writer(content + b"\0"),
            "newline more": _writer(content + b"\n"),
            "twice": _writer(content + content),
        }
        if os.geteuid() == 0:
            kinds["device"] = partial(os.mknod, mode=stat.S_IFCHR | 0o600, device=os.makedev(1, 5))  # /dev/zero
        for kind, make in kinds.items():
            yield Mutation("other kind of file", f"{name}: {kind}", partial(_replace, name=name, make=make))


def stowaways() -> Iterator[Mutation]:
    """Put something beside the files that no manifest names."""
    names = [
        *("notes.txt", ".hidden", ".git", ".gitignore", "__pycache__", "plugin.so", "model.onnx.data", "model.engine"),
        *("Manifest.json", "MANIFEST.JSON", "Model.onnx", "model.onnx ", "model.onnx.", "model.onnx\n", "a.sig~"),
        *("manifest.sig.bak", "manifest.json.sig", ".manifest.sig.partial-x", "probe.npz.tmp", "PROBE.NPZ", "x" * 255),
        *("..data", "...", " ", "\x1b[2J", "model\u200b.onnx", "manife\u017ft.json", os.fsdecode(b"\xff\xfe.onnx")),
    ]
    kinds: dict[str, Make] = {
        "file": Path.touch,
        "folder": _make_full_folder,
        "symlink": partial(Path.symlink_to, target="/"),
        "pipe": os.mkfifo,
    }
    for name in names:
        for kind, make in kinds.items():
            yield Mutation("stowaway", f"{kind} {name!a}", partial(Workbench.add, name=name, make=make))
    yield Mutation("stowaway", "a thousand files", _add_a_thousand)


def _other_forms(content: bytes, right: Signature) -> Iterator[tuple[str, bytes]]:
    record: dict[str, Any] = json.loads(content)
    upper = {"key": right.key, "ed25519": right.ed25519.upper()}
    yield "upper-case digits", _pretty({**record, "signatures": [upper]})
    yield "other order", _pretty({"signatures": record["signatures"], "format": 1})
    yield "same key twice", _pretty({**record, "signatures": record["signatures"] * 2})
    yield "no signatures", _pretty({**record, "signatures": []})
    yield "nine signatures", _pretty({**record, "signatures": record["signatures"] * 9})
    yield "more in it", _pretty({**record, "surprise": 1})
    yield "no format", _pretty({"signatures": record["signatures"]})
    for value in (0, 2, "1", True, None, 1.0):
        yield f"format {value!r}", _pretty({**record, "format": value})
    yield "compact", json.dumps(record).encode()
    yield "CRLF", content.replace(b"\n", b"\r\n")
    yield "space more", content + b" "
    yield "BOM", b"\xef\xbb\xbf" + content
    yield "UTF-16", content.decode().encode("utf-16")
    yield "repeated key", content.replace(b'"format": 1', b'"format": 1, "format": 1')
    for junk in (b"", b"\0", b"null", b"[]", b"{}", b'"text"', b"[" * 4000, b"9" * 4096, b"{" * 5000, b"\xff" * 100):
        yield f"{junk[:8]!r}", junk


def _other_values(value: object) -> Iterator[tuple[str, object]]:
    others: tuple[object, ...] = (None, "", "x", 0, -1, 0.5, 1e308, True, [], {}, "../model.onnx", "0" * 64)
    for other in others:
        if other != value or type(other) is not type(value):
            yield f"= {other!r}", other
    if isinstance(value, str):
        yield "longer", value + " "
    if isinstance(value, int | float):
        yield "greater", value + 1
    if isinstance(value, list) and len(value) > 1:
        yield "turned", [*value[1:], value[0]]
        yield "shorter", value[:-1]


def _fields(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], object]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in pairs:
        # Of long lists the first two: the rest differs in its numbers only.
        if isinstance(key, str) or key < 2:
            yield (*path, key), below
            yield from _fields(below, (*path, key))


def _edited(record: dict[str, Any], path: tuple[str | int, ...], value: object) -> bytes:
    copy = json.loads(json.dumps(record))
    place: Any = copy
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return _pretty(copy)


def _pretty(record: object) -> bytes:
    return (json.dumps(record, indent=2) + "\n").encode()


def _plus_order(signature: bytes) -> bytes:
    """Return the other encoding of the same signature, which RFC 8032 forbids (section 5.1.7)."""
    scalar = int.from_bytes(signature[32:], "little") + _ORDER
    return signature[:32] + scalar.to_bytes(32, "little")


def _present(bench: Workbench, manifest: bytes, roles: tuple[str, ...]) -> None:
    """Put another manifest, rightly sealed and signed."""
    bench.seal(manifest)
    bench.sign(*roles, manifest=manifest)


def _flip(family: str, name: str, at: int, mask: int) -> Mutation:
    return Mutation(family, f"{name} byte {at} ^ {mask}", partial(Workbench.flip, name=name, at=at, mask=mask))


def _sig(name: str, content: bytes) -> Mutation:
    return Mutation("signature", name, partial(Workbench.put, name=SIGNATURE, content=content))


def _reseal(name: str, manifest: bytes, files: dict[str, bytes] | None = None) -> Mutation:
    def apply(bench: Workbench) -> None:
        bench.seal(manifest)
        for file, content in (files or {}).items():
            bench.put(file, content)

    return Mutation("resealed edit", name, apply)


def _replace(bench: Workbench, name: str, make: Make) -> None:
    bench.add(name.upper(), _nothing)  # so that it is removed, where `make` makes it
    bench.replace(name, make)


def _add_a_thousand(bench: Workbench) -> None:
    for i in range(1000):
        bench.add(str(i), Path.touch)


def _writer(content: bytes, mode: int = 0o644) -> Make:
    def write(path: Path) -> None:
        path.write_bytes(content)
        path.chmod(mode)

    return write


def _nothing(path: Path) -> None:
    pass


def _make_full_folder(path: Path) -> None:
    path.mkdir()
    (path / "config").write_text("[core]\n")


def _make_sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**40)


def _write_upper_case(path: Path, content: bytes) -> None:
    path.with_name(path.name.upper()).write_bytes(content)


def _bind(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # a socket's path may have 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(before)
