"""The bundle that a node's configuration names, opened with the trust it asks for."""

from chexnet_deploy.bundle import Bundle
from chexnet_deploy.node.config import Model
from chexnet_deploy.signing.trust import Trust


def read_trust(model: Model) -> Trust | None:
    """Return what the node's trust file says; None where it names none.

    Raises:
        TrustError: it can't be used.
    """
    return None if model.trust is None else Trust.read(model.trust)


def open_bundle(model: Model) -> Bundle:
    """Verify the bundle, and its signature where a trust file is named.

    Raises:
        BundleError, TrustError, MissingPackageError: see Bundle.open.
    """
    return Bundle.open(model.bundle, trust=read_trust(model))
