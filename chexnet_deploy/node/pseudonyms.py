"""Names that only this node can lead back to an image.

A plain SHA-256 of an image, or of its SOP Instance UID, is no secret: whoever has the image, or a public data set it came
from, can look it up in a log. Under a key that never leaves the node (HMAC, RFC 2104) a log alone says nothing, while the
hospital, which has both the key and the image, can still prove which image a line is about.
"""

import hashlib
import hmac
import os
from pathlib import Path

from chexnet_deploy.errors import NodeError
from chexnet_deploy.files import fsync_path
from chexnet_deploy.node.config import check_private

KEY_FILE = "node.key"
_KEY_BYTES = 32


class Pseudonyms:
    """The node's key, in use.

    Args:
        key: 32 bytes.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    @classmethod
    def open(cls, folder: Path) -> "Pseudonyms":
        """Read the node's key; make it where the folder has none yet.

        Raises:
            NodeError: others may read it, or it is not a key.
        """
        path = folder / KEY_FILE
        if not path.exists():
            partial = folder / f".{KEY_FILE}.partial"
            partial.unlink(missing_ok=True)
            handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                os.write(handle, os.urandom(_KEY_BYTES))
                os.fsync(handle)
            finally:
                os.close(handle)
            partial.rename(path)
            fsync_path(folder)
        check_private(path)
        key = path.read_bytes()
        if len(key) != _KEY_BYTES:
            raise NodeError(f"{path} has {len(key)} bytes, a key has {_KEY_BYTES}. Restore it from a backup.")
        return cls(key)

    def name(self, kind: str, value: bytes) -> str:
        """Return 64 hexadecimal digits for a value, other ones for another kind of value."""
        return hmac.new(self._key, kind.encode() + b"\0" + value, hashlib.sha256).hexdigest()
