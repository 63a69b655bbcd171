"""Receive images: negotiate associations and answer C-ECHO and C-STORE, behind the guard.

pynetdicom does what the standard says about associations and messages. It never listens: each connection is handed to it
by the guard as one end of a socket pair, with the peer's address, so nobody can go around the guard. Data sets don't pass
through it either, see connection.py; what it gets in place of one is a token. Listening itself, with its own chunked receive
and 16 associations, it let 44 of 88 C-ECHOs fail under the attack of benchmarks/services/node_attack.py, which lets none fail here.
"""

import socket
from collections.abc import Callable
from io import BytesIO
from typing import Final, cast

from pydicom.uid import (
    JPEG2000,
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
)
from pynetdicom import AE, evt
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]  # made when it is imported

from chexnet_deploy.dicom.node.config import Limits, Listen
from chexnet_deploy.dicom.node.connection import Address
from chexnet_deploy.dicom.node.inbox import DROPPED_SOP_CLASSES, Kept, Spool, Verdict

SOP_CLASSES: Final = (
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    SecondaryCaptureImageStorage,
)
"""What is taken and answered; of Secondary Captures those of a radiograph's modality, see inbox.py. What is taken beside it and
dropped is there too."""
TRANSFER_SYNTAXES: Final = (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    JPEGLosslessSV1,
    JPEGLossless,
    RLELossless,
    JPEGBaseline8Bit,
    JPEG2000,
    JPEGLSNearLossless,
)
"""What the decoder reads, lossless first: the first that a peer offers is taken. Deflated is left out: 65 KB of it can be
67 MB of elements."""
_NEGOTIATION_S = 5.0

OnKept = Callable[[Kept], Verdict]
"""Called with what became of each image, before the peer is told; returns what to tell."""


class Scp:
    """The DICOM side of receiving.

    Args:
        on_kept: see OnKept.
        is_open: asked before an image is kept; False answers A700.
    """

    def __init__(
        self, listen: Listen, limits: Limits, spool: Spool, on_kept: OnKept, is_open: Callable[[], bool]
    ) -> None:
        self._spool, self._on_kept, self._is_open = spool, on_kept, is_open
        application = AE(listen.ae_title)
        application.require_called_aet = True
        application.require_calling_aet = list(listen.calling_ae_titles)
        application.maximum_pdu_size = limits.max_pdu_bytes
        application.acse_timeout = _NEGOTIATION_S
        # The guard bounds numbers and silence; a second opinion here would only cut off what the guard allows.
        application.network_timeout = None
        application.maximum_associations = 8 * limits.max_associations
        for sop_class in (*SOP_CLASSES, *DROPPED_SOP_CLASSES):
            application.add_supported_context(sop_class, list(TRANSFER_SYNTAXES))
        application.add_supported_context(Verification)
        self._server = application.make_server(
            ("127.0.0.1", 0), evt_handlers=[(evt.EVT_C_STORE, self._on_store), (evt.EVT_C_ECHO, lambda event: 0x0000)]
        )
        # It was bound because the library knows no other way; from here on connections come by hand_over alone.
        cast(socket.socket, self._server.socket).close()

    def hand_over(self, connection: socket.socket, peer: Address) -> None:
        """Serve a connection in threads of its own, which end with it."""
        self._server.finish_request(connection, peer)

    def _on_store(self, event: evt.Event) -> int:
        token = cast(BytesIO, cast(C_STORE, event.request).DataSet)
        incoming = self._spool.take(token.getvalue())
        if incoming is None:  # the guard gave it up in the meantime; nobody is there to read this
            return Verdict.NO_ROOM.status
        if not self._is_open():
            incoming.remove()
            return Verdict.NO_ROOM.status
        return self._on_kept(self._spool.keep(incoming)).status
