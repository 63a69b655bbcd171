"""Tell systemd how the service is: the protocol of sd_notify(3), which is one datagram."""

import contextlib
import os
import socket


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
