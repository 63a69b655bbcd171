"""The node's configuration: one TOML file, read once, that checks itself before anything listens.

Units are in the names. An unknown key, a limit that contradicts another, or a file that others may read or change where
they must not is refused with what is needed.
"""

import os
import stat
import sys
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, ValidationError, field_validator, model_validator

from chexnet_deploy.errors import NodeError
from chexnet_deploy.inputs import StrictRecord
from chexnet_deploy.runtime.sessions.open import SELF_TEST_EVERY_S

if sys.version_info >= (3, 11):
    import tomllib
else:  # the same parser, before it moved into the standard library
    import tomli as tomllib


MIB = 1024 * 1024

AeTitle = Annotated[str, StringConstraints(pattern=r"^[!-\[\]-~](?:[ -\[\]-~]{0,14}[!-\[\]-~])?$")]
"""1 to 16 printable ASCII characters without backslash, no space at either end (PS3.5 table 6.2-1)."""
_Text = Annotated[
    str, StringConstraints(pattern=r"^[!-\[\]-~](?:[ -\[\]-~]{0,62}[!-\[\]-~])?$")
]  # LO, PS3.5 section 6.2
Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0.0, le=86_400.0)]
Mib = Annotated[int, Field(ge=1, le=16 * 1024 * 1024)]
Count = Annotated[int, Field(ge=1, le=10_000)]


class Limits(StrictRecord):
    """What one peer, and all together, may take of this node.

    Attributes:
        max_waiting: connections that have not asked for an association yet; beyond it the oldest gives way. A peer is an
            address there, and later a calling AE title at an address, as many devices may stand behind one.
        max_associations: open at once; beyond it one that makes no progress gives way, and until there is one the newest
            waits, for request_deadline_s at the most.
        quiet_after_s: without progress for so long, an association may be ended to let another in; never otherwise.
        request_deadline_s: from connecting to the whole association request.
        pdu_deadline_s: from a PDU's first byte to its last, and for a peer to take what is sent to it.
        idle_s: between two PDUs.
        association_deadline_s: of a whole association.
        max_pdu_kib: of one P-DATA-TF PDU, declared to every peer.
        max_object_mib: of one data set.
        max_association_mib: of everything in one association.
    """

    max_waiting: Annotated[int, Field(ge=1, le=256)] = 64
    max_waiting_per_peer: Annotated[int, Field(ge=1, le=256)] = 16
    # Three descriptors each, and the library behind waits for them with select(), which ends at 1024.
    max_associations: Annotated[int, Field(ge=1, le=128)] = 16
    max_associations_per_peer: Annotated[int, Field(ge=1, le=128)] = 8
    quiet_after_s: Seconds = 0.5
    request_deadline_s: Seconds = 5.0
    pdu_deadline_s: Seconds = 5.0
    idle_s: Seconds = 30.0
    association_deadline_s: Seconds = 1800.0
    max_pdu_kib: Annotated[int, Field(ge=16, le=1024)] = 128
    max_object_mib: Mib = 192
    max_association_mib: Mib = 8192

    @property
    def max_pdu_bytes(self) -> int:
        """The largest P-DATA-TF PDU, without its header."""
        return self.max_pdu_kib * 1024

    @property
    def max_object_bytes(self) -> int:
        """The largest data set."""
        return self.max_object_mib * MIB

    @property
    def max_association_bytes(self) -> int:
        """The most that one association may send."""
        return self.max_association_mib * MIB


class Listen(StrictRecord):
    """Where and for whom this node listens.

    Attributes:
        calling_ae_titles: who may send; an AE title is no proof of identity, but keeps a wrong device out.
        networks: addresses that may connect, e.g. "10.20.0.0/16"; all others are cut off at once.
        tls: by [tls], and no connection without; the port that is registered for it is 2762.
    """

    host: str = "0.0.0.0"
    port: Port = 11112
    ae_title: AeTitle
    calling_ae_titles: Annotated[tuple[AeTitle, ...], Field(min_length=1)]
    networks: Annotated[tuple[str, ...], Field(min_length=1)]
    tls: bool = False

    @field_validator("calling_ae_titles", "networks", mode="before")
    @classmethod
    def _from_array(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _are_addresses(self) -> "Listen":
        ip_address(self.host)  # a name could resolve to another interface tomorrow
        for network in self.networks:
            ip_network(network)
        return self

    def may_connect(self, peer: str) -> bool:
        """Whether an address is in one of the networks."""
        address = ip_address(peer.partition("%")[0])
        return any(address in ip_network(network) for network in self.networks)


class Spool(StrictRecord):
    """Disk space for images that were acknowledged and not answered yet.

    Attributes:
        max_mib: of all of them.
        min_free_mib: of the disk; below it every image is refused with status A700.
        remember: how many answered images are known again when they are sent again.
    """

    max_mib: Mib = 20_480
    min_free_mib: Mib = 5_120
    remember: Annotated[int, Field(ge=100, le=1_000_000)] = 100_000


class Outbox(StrictRecord):
    """Results that wait for their destination.

    Attributes:
        max_mib: of all of them; beyond it no further image is read until a destination takes some.
        first_retry_s: after the first failure; doubled after each, with jitter, up to max_retry_s.
        send_timeout_s: for a destination to answer.
        remember: how many documents that were sent are known still, and not sent again.
        keep_mib: of documents that were sent, for `node resend`; beyond it the oldest go, 0 keeps none.
        max_breaks: an object whose sending broke off so often, though the destination let us in, is parked.
    """

    max_mib: Mib = 4_096
    first_retry_s: Seconds = 2.0
    max_retry_s: Seconds = 300.0
    send_timeout_s: Seconds = 30.0
    remember: Annotated[int, Field(ge=100, le=1_000_000)] = 20_000
    keep_mib: Annotated[int, Field(ge=0, le=16 * 1024 * 1024)] = 1_024
    max_breaks: Count = 10


class Destination(StrictRecord):
    """Who gets the results; with tls, by [tls]."""

    host: Annotated[str, StringConstraints(min_length=1, max_length=253)]
    port: Port
    ae_title: AeTitle
    tls: bool = False


class Tls(StrictRecord):
    """Certificates of this node and its peers, PEM files; see tls.py.

    Attributes:
        certificate: this node's, and those between it and its authority.
        key: its private key, its owner's alone.
        authorities: whose certificates a peer's must be of; or the peers' own.
    """

    certificate: Path
    key: Path
    authorities: Path

    @field_validator("certificate", "key", "authorities", mode="before")
    @classmethod
    def _from_text(cls, value: object) -> object:
        return Path(value) if isinstance(value, str) else value


class Model(StrictRecord):
    """What answers.

    Attributes:
        bundle: a folder that export or build wrote.
        trust: a trust file; the bundle runs only if it is signed by a key in it, of a release not too old.
        provider: what runs an ONNX bundle; see open_session. "cpu" is the one whose memory can be kept from being written and
            run: OpenVINO, like CUDA, compiles kernels when it starts.
        start_deadline_s: for the worker to load it and give the known answers.
        answer_deadline_s: for one image; a worker that takes longer is killed and the image tried once more.
        max_failed_starts: in a row; then the node ends with exit code 70 for its supervisor to decide.
    """

    bundle: Path
    trust: Path | None = None
    provider: Literal["cpu", "openvino", "cuda"] = "cpu"
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    start_deadline_s: Seconds = 60.0
    answer_deadline_s: Seconds = 20.0
    max_failed_starts: Annotated[int, Field(ge=1, le=100)] = 3

    @field_validator("bundle", "trust", mode="before")
    @classmethod
    def _from_text(cls, value: object) -> object:
        return Path(value) if isinstance(value, str) else value


class Device(StrictRecord):
    """What results say of the machine that made them (PS3.3 C.7.5.1).

    Attributes:
        serial_number: of this installation.
    """

    serial_number: _Text
    manufacturer: _Text = "chexnet-deploy"
    model_name: _Text = "chexnet-deploy node"


class Results(StrictRecord):
    """What is sent beside the structured report, which names every finding.

    Attributes:
        max_pictures: activation maps of findings that are present, the most probable first; 0 sends the report alone.
        explain_refusals: a Secondary Capture in the study says why an image has no result; without it only the log does.
    """

    max_pictures: Annotated[int, Field(ge=0, le=14)] = 3
    explain_refusals: bool = True


class Health(StrictRecord):
    """How the node proves that it lives.

    Attributes:
        self_test_every_s: the worker answers the known images so often; only that feeds systemd's watchdog.
        drain_deadline_s: after SIGTERM.
        max_memory_mib: of node and worker together, for the generated unit.
    """

    self_test_every_s: Seconds = SELF_TEST_EVERY_S
    drain_deadline_s: Seconds = 25.0
    max_memory_mib: Annotated[int, Field(ge=512)] = 4096


class NodeConfig(StrictRecord):
    """Everything a node is told.

    Attributes:
        folder: for images, results, the audit log and the node's key; on one file system, its owner's alone (mode 0700).
    """

    folder: Path
    listen: Listen
    limits: Limits = Limits()
    spool: Spool = Spool()
    outbox: Outbox = Outbox()
    destinations: Annotated[tuple[Destination, ...], Field(min_length=1)]
    tls: Tls | None = None
    model: Model
    device: Device
    results: Results = Results()
    health: Health = Health()

    @field_validator("folder", mode="before")
    @classmethod
    def _from_text(cls, value: object) -> object:
        return Path(value) if isinstance(value, str) else value

    @field_validator("destinations", mode="before")
    @classmethod
    def _from_array(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "NodeConfig":
        if not all(path.is_absolute() for path in (self.folder, *self.read_paths)):
            raise ValueError(
                "folder and the paths of [model] and [tls] must be absolute: a service has no working directory"
            )
        if (self.tls is not None) != any((self.listen.tls, *(d.tls for d in self.destinations))):
            raise ValueError(
                "[tls] is there for listen.tls or a destination's tls, one of them true; give both or neither"
            )
        if len({d.ae_title for d in self.destinations}) < len(self.destinations):
            raise ValueError("two destinations have the same ae_title")
        if self.outbox.first_retry_s > self.outbox.max_retry_s:
            raise ValueError("outbox.first_retry_s is above outbox.max_retry_s")
        arriving_mib = self.limits.max_associations * self.limits.max_object_mib
        # Space is looked at when an image begins; what has begun by then must still fit.
        if self.spool.min_free_mib < arriving_mib:
            raise ValueError(
                f"spool.min_free_mib is {self.spool.min_free_mib}, but limits.max_associations x limits.max_object_mib = "
                f"{arriving_mib} MiB can be arriving at once; raise the one or lower the others"
            )
        return self

    @property
    def read_paths(self) -> tuple[Path, ...]:
        """What the node reads beside its own folder."""
        tls = () if self.tls is None else (self.tls.certificate, self.tls.key, self.tls.authorities)
        return (self.model.bundle, *([self.model.trust] if self.model.trust else []), *tls)

    @property
    def watchdog_s(self) -> float:
        """How long the time between two self-tests can be while all is well.

        The worst is an image that hangs twice, and once more while it is explained, with a restart of the worker after each,
        and then a slow self-test.
        """
        model = self.model
        return self.health.self_test_every_s + 4 * model.answer_deadline_s + 3 * model.start_deadline_s


def read_config(path: Path) -> NodeConfig:
    """Read a node's configuration.

    Raises:
        NodeError: unreadable, not TOML, writable by others, or a field is unknown, missing or out of range.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = tomllib.loads(file.read().decode("utf-8-sig"))  # editors on Windows put a mark first
    except OSError as err:
        raise NodeError(f"{path} can't be read: {err.strerror}. Check the path.") from err
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise NodeError(f"{path} is not TOML: {err}. Correct that line.") from err
    if not stat.S_ISREG(mode) or mode & 0o022:
        raise NodeError(f"{path} has mode {stat.S_IMODE(mode):04o}: others may change it. Run: chmod go-w {path}")
    try:
        return NodeConfig.model_validate(content)
    except ValidationError as err:
        complaints = [f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in err.errors()]
        raise NodeError(f"{path}: {'; '.join(complaints[:5])}. docs/dicom-node.md has the fields.") from err


def check_private(path: Path) -> None:
    """Refuse a file or folder that others than its owner may read or change.

    Raises:
        NodeError: its mode is too wide, or it is somebody else's.
    """
    status = path.stat()
    if status.st_mode & 0o077 or status.st_uid != os.geteuid():
        raise NodeError(
            f"{path} has mode {stat.S_IMODE(status.st_mode):04o} and owner {status.st_uid}; "
            f"it must be this node's alone. Run: chown {os.geteuid()} {path} && chmod go-rwx {path}"
        )
