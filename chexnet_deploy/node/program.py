"""What `chexnet-deploy node` does: read the configuration, then run the node, or print its unit."""

import sys
from pathlib import Path

from chexnet_deploy.bundle import Bundle
from chexnet_deploy.errors import NodeError
from chexnet_deploy.node.config import read_config
from chexnet_deploy.node.service import run_node
from chexnet_deploy.node.systemd import unit
from chexnet_deploy.signing.trust import read_trust


def run(path: Path) -> int:
    """Run a node until SIGTERM and return the exit code: 0 after an orderly end, 70 where its worker can't be started.

    Raises:
        NodeError: the configuration, its folder or the address is wrong.
        AuditError: the audit log was changed or can't be written.
    """
    config = read_config(path)
    # The configuration was checked here; the worker reads it again for itself.
    return run_node(config, [sys.executable, "-m", "chexnet_deploy.node.join", str(path.absolute())])


def print_unit(path: Path, program: Path) -> str:
    """Return a systemd unit for the node.

    Args:
        path: the configuration.
        program: this package's command line program.

    Raises:
        NodeError: the configuration is wrong, or can't be run as a service.
        BundleError, TrustError: the bundle can't be opened.
    """
    config = read_config(path)
    trust = read_trust(config.model.trust)
    manifest = Bundle.open(config.model.bundle, trust=trust).manifest
    if trust is not None and trust.floor_file is not None and config.folder not in trust.floor_file.parents:
        raise NodeError(
            f"{trust.floor_file} must be written whenever a newer release has run, and the service can write in {config.folder} "
            "alone. Give floor_file as a path in that folder."
        )
    needs_gpu = manifest.target is not None or config.model.provider == "cuda"
    return unit(config, path.absolute(), (str(program),), needs_gpu=needs_gpu)
