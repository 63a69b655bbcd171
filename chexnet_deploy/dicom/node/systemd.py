"""A systemd unit for a node, made from its configuration, and the notify protocol of sd_notify(3), which is one datagram.

The unit's deadlines, addresses and ceilings are the node's own. The service is started, watched and restarted, and can reach
nothing that it has no use for.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from ipaddress import ip_address
from math import ceil
from pathlib import Path

from chexnet_deploy.dicom.node.config import NodeConfig
from chexnet_deploy.errors import NodeError

_STATE = Path("/var/lib")
_STOP_SLACK_S = 10.0

# Each line takes something away that a node never needs. systemd.exec(5) says what.
_HARDENING = """
NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
PrivateUsers=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
RemoveIPC=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged
SystemCallErrorNumber=EPERM
LimitCORE=0
UMask=0077
""".strip()


def unit(config: NodeConfig, path: Path, command: tuple[str, ...], *, needs_gpu: bool) -> str:
    """Return the text of a unit file.

    Args:
        config: read from `path`.
        path: of the configuration, as the service will read it.
        command: what starts this package's command line, e.g. ("/opt/chexnet/bin/chexnet-deploy",).
        needs_gpu: the bundle runs on one.

    Raises:
        NodeError: the configuration can't be run with a user made for the occasion.
    """
    state = config.folder
    if state.parent != _STATE:
        raise NodeError(
            f"folder is {state}; a unit with a user of its own keeps its files in a folder of {_STATE}. "
            f'Write e.g. folder = "{_STATE}/chexnet-node".'
        )
    words = (*command, "node", str(path))
    if any(set(word) & set(" \t\n\"'\\%$;") for word in words):
        raise NodeError("a path with a space, quote or one of \\ % $ ; can't be used in a unit. Choose another path.")
    read = (*words, *map(str, config.read_paths))
    if any(word.startswith(("/home/", "/root/", "/run/user/", "/tmp/")) for word in read):
        raise NodeError(
            "the program, the configuration, the bundle, the trust file or a file of [tls] lies in a home or temporary folder, "
            "which the service can't see. Move it, e.g. to /opt and /etc."
        )
    drain_s = config.health.drain_deadline_s + _STOP_SLACK_S
    start_s = config.model.max_failed_starts * (config.model.start_deadline_s + 1.0) + _STOP_SLACK_S
    lines = [
        "[Unit]",
        f"Description=chexnet-deploy DICOM node {config.listen.ae_title.replace('%', '%%')}",
        "Wants=network-online.target",
        "After=network-online.target",
        "# It never gives up: a scanner's console may be out of reach for days.",
        "StartLimitIntervalSec=0",
        "",
        "[Service]",
        "Type=notify",
        "NotifyAccess=main",
        f"ExecStart={' '.join(words)}",
        f"WatchdogSec={ceil(config.watchdog_s)}",
        f"TimeoutStartSec={ceil(start_s)}",
        f"TimeoutStopSec={ceil(drain_s)}",
        "KillMode=mixed",
        "Restart=on-failure",
        "RestartSec=2",
        "DynamicUser=yes",
        f"StateDirectory={state.name}",
        "StateDirectoryMode=0700",
        f"MemoryMax={config.health.max_memory_mib}M",
        "MemorySwapMax=0",
        "TasksMax=512",
        *_devices(needs_gpu=needs_gpu, compiles=needs_gpu or config.model.provider == "openvino"),
        *_addresses(config),
        *_HARDENING.splitlines(),
        "",
        "[Install]",
        "WantedBy=multi-user.target",
    ]
    return "\n".join(lines) + "\n"


def _devices(*, needs_gpu: bool, compiles: bool) -> Iterator[str]:
    yield "DevicePolicy=closed"
    if needs_gpu:
        for group in ("nvidia", "nvidia-frontend", "nvidia-uvm", "nvidiactl", "nvidia-caps"):
            yield f"DeviceAllow=char-{group} rw"
    else:
        yield "PrivateDevices=yes"
    if not compiles:  # CUDA and OpenVINO write the kernels that they run
        yield "MemoryDenyWriteExecute=yes"


def _addresses(config: NodeConfig) -> Iterator[str]:
    try:
        peers = [str(ip_address(destination.host)) for destination in config.destinations]
    except ValueError:
        yield "# A destination is given by name, so its address can't be allowed here: addresses are not restricted."
        return
    yield "IPAddressDeny=any"
    yield f"IPAddressAllow={' '.join((*config.listen.networks, *peers))}"


class Notifier:
    """A service manager's socket, or nobody's.

    Args:
        address: a path, or an abstract name that begins with "@"; None where no service manager listens.
    """

    def __init__(self, address: str | None) -> None:
        self._address = address

    @classmethod
    def take(cls) -> "Notifier":
        """Take the address that systemd left, so that no child process speaks in our name."""
        # systemd's interface is an environment variable; it says who listens, and configures nothing.
        return cls(os.environ.pop("NOTIFY_SOCKET", None))

    def say(self, *lines: str) -> None:
        """Send e.g. "READY=1"; a manager that can't be reached is as none."""
        if self._address is None:
            return
        name = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        with channel, contextlib.suppress(OSError):
            channel.sendto("\n".join(lines).encode(), name)
