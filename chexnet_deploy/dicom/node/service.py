"""The node as one process: read the configuration, put the parts together, run until told to stop, stop in order."""

import fcntl
import os
import resource
import signal
import ssl
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import TextIO

from chexnet_deploy import __version__
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.signing.trust import read_trust
from chexnet_deploy.dicom.node.audit import AuditLog
from chexnet_deploy.dicom.node.config import Destination, NodeConfig, check_private, read_config
from chexnet_deploy.dicom.node.connection import Address, End
from chexnet_deploy.dicom.node.control import Control
from chexnet_deploy.dicom.node.inbox import ANSWERED, Kept, Pseudonyms, Spool, Verdict
from chexnet_deploy.dicom.node.listener import Guard
from chexnet_deploy.dicom.node.log import Journal, silence_libraries
from chexnet_deploy.dicom.node.outbox import Entry, Outbox
from chexnet_deploy.dicom.node.processing import WORKER_LOST, Processing
from chexnet_deploy.dicom.node.storage_scp import Scp
from chexnet_deploy.dicom.node.storage_scu import Delivery, Sender
from chexnet_deploy.dicom.node.systemd import Notifier, unit
from chexnet_deploy.dicom.node.tls import open_context
from chexnet_deploy.dicom.node.worker_process import Worker
from chexnet_deploy.errors import AuditError, NodeError

AUDIT_LOG = "audit.jsonl"
LOCK = "node.lock"
EXIT_OK, EXIT_FAILED = 0, 70
_EXIT_TERMINATED = 128 + signal.SIGTERM
_LOOK_EVERY_S = 0.05
_STOP_S = 1.0  # for a thread that may be inside one attempt


class Node:
    """Everything a node consists of, from `start` to `stop`.

    Args:
        worker_command: a program that calls worker.serve.

    Attributes:
        address: what it listens on, once it does.
    """

    def __init__(self, config: NodeConfig, worker_command: Sequence[str], notifier: Notifier, journal: Journal) -> None:
        self._config, self._notifier, self._journal = config, notifier, journal
        self._lock = _take_folder(config.folder)
        pseudonyms = Pseudonyms.open(config.folder)
        self._audit = AuditLog.open(config.folder / AUDIT_LOG)
        self._spool = Spool.open(config.folder, config.spool, pseudonyms)
        self._outbox = Outbox.open(config.folder, config.outbox)
        self._senders = [
            Sender(
                self._outbox,
                to,
                config.listen.ae_title,
                config.outbox.send_timeout_s,
                journal,
                self._record_delivery,
                _tls(config, is_server=False) if to.tls else None,
            )
            for to in config.destinations
        ]
        model = config.model
        self._processing = Processing(
            Worker(worker_command, start_deadline_s=model.start_deadline_s, answer_deadline_s=model.answer_deadline_s),
            self._spool,
            self._outbox,
            self._audit,
            pseudonyms,
            destinations=[to.ae_title for to in config.destinations],
            health=config.health,
            max_failed_starts=model.max_failed_starts,
            notifier=notifier,
            journal=journal,
            on_put=self._wake_senders,
        )
        scp = Scp(config.listen, config.limits, self._spool, self._record_kept, lambda: self._audit.is_writable)
        self._guard = Guard(
            config.listen, config.limits, self._spool, scp.hand_over, self._note_end, _tls(config, is_server=True)
        )
        self._pseudonyms = pseudonyms
        self._control = Control(config.folder, {"status": lambda _: self._status(), "resend": self._resend})
        self.address: Address | None = None

    def run(self, stop: threading.Event) -> int:
        """Work until `stop` is set; return the exit code."""
        self._audit.append("started", {"node": __version__, "config": self._config.listen.ae_title})
        self._control.start()
        self._processing.start()
        while not self._processing.is_ready:
            if stop.wait(_LOOK_EVERY_S) or self._processing.has_failed:
                return self._end(0.0)
        for sender in self._senders:
            sender.start()
        self.address = self._guard.start()
        self._notifier.say("READY=1", f"STATUS=listening as {self._config.listen.ae_title}")
        self._journal.say("ready", host=self.address[0], port=self.address[1])
        while not stop.wait(_LOOK_EVERY_S) and not self._processing.has_failed:
            pass
        self._notifier.say("STOPPING=1", "STATUS=finishing what was begun")
        return self._end(self._config.health.drain_deadline_s)

    def _end(self, drain_s: float) -> int:
        """Finish what was acknowledged while the time lasts; what is left is on disk and goes on at the next start."""
        deadline_s = monotonic() + drain_s
        if self.address is not None:
            self._guard.stop_listening()
            self._wait_while(lambda: self._guard.n_associations > 0, deadline_s)
            self._guard.stop()
        if self._processing.is_ready:
            self._wait_while(lambda: self._spool.n_pending > 0, deadline_s)
            self._wait_while(lambda: self._outbox.counts().waiting > 0, deadline_s)
        self._processing.stop(_STOP_S)
        if self.address is not None:
            for sender in self._senders:
                sender.stop(_STOP_S)
        left = self._outbox.counts()
        try:
            self._audit.append("stopped", {"pending": self._spool.n_pending, "waiting": left.waiting})
        except AuditError as err:
            self._journal.say("audit-disk", error=type(err).__name__)
        self._journal.say("stopped", pending=self._spool.n_pending, waiting=left.waiting, parked=left.parked)
        return EXIT_FAILED if self._processing.has_failed else EXIT_OK

    def _wait_while(self, is_busy: Callable[[], bool], deadline_s: float) -> None:
        while is_busy() and monotonic() < deadline_s and not self._processing.has_failed:
            threading.Event().wait(_LOOK_EVERY_S)

    def _record_kept(self, kept: Kept) -> Verdict:
        """Record what became of an image before its sender is told; what can't be recorded isn't acknowledged."""
        if kept.verdict is Verdict.NO_ROOM:
            self._journal.say("no-room")
            return kept.verdict
        try:
            self._audit.append(
                "received", {"verdict": kept.verdict, "instance": kept.instance, "data_set": kept.data_set}
            )
        except AuditError:
            self._journal.say("audit-disk")
            return Verdict.NO_ROOM
        self._processing.wake()
        return kept.verdict

    def _record_delivery(self, entry: Entry, destination: Destination, delivery: Delivery) -> None:
        self._audit.append(
            "delivered" if delivery.state == "sent" else "parked",
            {
                "instance": entry.source.split("-")[1],
                "destination": destination.ae_title,
                "reason": delivery.reason,
            },
        )

    def _status(self) -> dict[str, object]:
        """Return what waits, what was refused or failed, and why."""
        refused = self._spool.counts()
        answered, failed = refused.pop(ANSWERED, 0), refused.pop(WORKER_LOST, 0)
        return {
            "is_ready": self._processing.is_ready,
            "images": {
                "waiting": self._spool.n_pending,
                "answered": answered,
                "refused": dict(refused),
                "failed": {WORKER_LOST: failed} if failed else {},
            },
            "destinations": {
                to.ae_title: self._outbox.destinations().get(to.ae_title, {}) for to in self._config.destinations
            },
        }

    def _resend(self, uid: str) -> dict[str, int]:
        """Send what was sent about an image again; where nothing of it is kept, let the image be answered when it comes again."""
        instance = self._pseudonyms.instance(uid)
        self._audit.append("resend", {"instance": instance})
        n_documents = self._outbox.resend(instance)
        self._wake_senders()
        return {"documents": n_documents, "forgotten": 0 if n_documents else self._spool.forget(instance)}

    def _note_end(self, end: End) -> None:
        words = {**end._asdict(), "not_accepted": " ".join(end.not_accepted)}
        self._journal.say("connection-ended", **{name: word for name, word in words.items() if word})

    def _wake_senders(self) -> None:
        for sender in self._senders:
            sender.wake()


def run_node(config: NodeConfig, worker_command: Sequence[str], stream: TextIO = sys.stderr) -> int:
    """Run a node in this process until SIGTERM or SIGINT; a second one ends it at once.

    Returns:
        the exit code: 0 after an orderly end, 70 where the worker can't be started.

    Raises:
        NodeError: the folder, the address or a file in the folder is wrong.
        AuditError: the audit log was changed or can't be written.
    """
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would hold images
    journal = Journal(stream)
    silence_libraries(journal)
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            os._exit(_EXIT_TERMINATED)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    return Node(config, worker_command, Notifier.take(), journal).run(stop)


def _tls(config: NodeConfig, *, is_server: bool) -> ssl.SSLContext | None:
    if config.tls is None or (is_server and not config.listen.tls):
        return None
    return open_context(config.tls, is_server=is_server)


def _take_folder(folder: Path) -> int:
    """Make the folder where there is none, and keep every other node out of it until this process ends."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_private(folder)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as err:
        raise NodeError(f"another node uses {folder}. Stop it, or give this one a folder of its own.") from err
    except OSError as err:
        raise NodeError(f"{folder} can't be used: {err.strerror}. Check folder in the configuration.") from err
    return handle


def run(path: Path) -> int:
    """Run a node until SIGTERM and return the exit code: 0 after an orderly end, 70 where its worker can't be started.

    Raises:
        NodeError: the configuration, its folder or the address is wrong.
        AuditError: the audit log was changed or can't be written.
    """
    config = read_config(path)
    # The configuration was checked here; the worker reads it again for itself.
    return run_node(config, [sys.executable, "-m", "chexnet_deploy.dicom.node.radiograph_worker", str(path.absolute())])


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
