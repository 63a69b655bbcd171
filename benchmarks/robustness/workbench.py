"""One signed bundle on disk that is changed and put back: what mutations.py works on."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from chexnet_deploy.bundle.manifest import MANIFEST, MANIFEST_SHA256
from chexnet_deploy.bundle.signing.keys import sign_content
from chexnet_deploy.bundle.signing.signatures import MANIFEST_TYPE, SIGNATURE, SignatureFile
from chexnet_deploy.files import sha256_hex


@dataclass(slots=True)
class Workbench:
    """A bundle and its floor file, with the keys that play a part.

    Attributes:
        path: the bundle.
        floor: the floor file that its trust names.
        pristine: its files' bytes.
        keys: private keys by role: "release" and "next" are trusted, "former" is revoked, "stranger" is unknown.
    """

    path: Path
    floor: Path
    pristine: dict[str, bytes]
    keys: dict[str, Ed25519PrivateKey]
    _undo: list[Callable[[], object]] = field(default_factory=list)

    @property
    def manifest(self) -> bytes:
        """The bytes of manifest.json."""
        return self.pristine[MANIFEST]

    def put(self, name: str, content: bytes) -> None:
        """Replace a file's bytes."""
        (self.path / name).write_bytes(content)
        self._undo.append(lambda: self._restore(name))

    def flip(self, name: str, at: int, mask: int) -> None:
        """Change the bits of one byte, in place."""

        def change() -> None:
            with (self.path / name).open("r+b") as file:
                file.seek(at)
                (old,) = file.read(1)
                file.seek(at)
                file.write(bytes([old ^ mask]))

        change()
        self._undo.append(change)

    def cut(self, name: str, length: int) -> None:
        """Cut a file short, in place."""
        os.truncate(self.path / name, length)

        def append() -> None:
            with (self.path / name).open("ab") as file:
                file.write(self.pristine[name][length:])

        self._undo.append(append)

    def replace(self, name: str, make: Callable[[Path], object]) -> None:
        """Put something else in a file's place."""
        (self.path / name).unlink()
        self._undo.append(lambda: self._restore(name))
        make(self.path / name)

    def add(self, name: str, make: Callable[[Path], object]) -> None:
        """Put something beside the files."""
        self._undo.append(lambda: _remove(self.path / name))
        make(self.path / name)

    def seal(self, manifest: bytes) -> None:
        """Put another manifest with its right hash, as anybody can."""
        self.put(MANIFEST, manifest)
        self.put(MANIFEST_SHA256, f"{sha256_hex(manifest)}\n".encode())

    def sign(self, *roles: str, manifest: bytes | None = None) -> None:
        """Put the signatures of these keys."""
        signed = tuple(sign_content(self.keys[role], manifest or self.manifest, MANIFEST_TYPE) for role in roles)
        self.put(SIGNATURE, SignatureFile.of(signed).to_bytes())

    def set_floor(self, make: Callable[[Path], object]) -> None:
        """Put something else in the floor file's place."""
        kept = self.floor.read_bytes()
        self.floor.unlink()

        def undo() -> None:
            _remove(self.floor)
            self.floor.write_bytes(kept)

        self._undo.append(undo)
        make(self.floor)

    def undo(self) -> None:
        """Put everything back."""
        while self._undo:
            self._undo.pop()()

    def _restore(self, name: str) -> None:
        _remove(self.path / name)
        (self.path / name).write_bytes(self.pristine[name])


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
