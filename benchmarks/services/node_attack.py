"""Attack a node on loopback from many sides at once, and ask it all the while whether it is there.

    python -m benchmarks.services.node_attack     writes results/node-attack-cpu.json; exit 1 where a bar is missed

At once: 100 TCP connections that say nothing, 10 peers (each with an address of its own) that negotiate an association
and then declare a PDU of 4 GB, 10 that associate and fall silent, 10 that send a byte a second, and one that stores
300 MB. Beside them a modality sends C-ECHO, one association each, and at the end an image that must be answered.
"""

import json
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel, ConfigDict

from benchmarks.rigs.node_rig import NODE, SCANNER, NodeProcess, Pacs, echo_s, find_dcmtk, store, write_radiograph
from chexnet_deploy.dicom.node.pdu import HEADER_BYTES, PduType, write_pdv
from chexnet_deploy.evaluation.machine import describe_machine
from chexnet_deploy.terminal import run_program

RESULTS = Path(__file__).parents[1] / "results" / "node-attack-cpu.json"
COMPUTED_RADIOGRAPHY, IMPLICIT = "1.2.840.10008.5.1.4.1.1.1", "1.2.840.10008.1.2"
STORE_MIB, IDLE, DECLARING, SILENT, TRICKLING = 300, 100, 10, 10, 10
ECHO_LIMIT_S, GONE_LIMIT_S, MEMORY_LIMIT_MIB = 1.0, 10.0, 100.0

app = typer.Typer(add_completion=False)


class Attacked(BaseModel):
    """What was seen.

    Attributes:
        echoes_s: each C-ECHO during the attack, association and release included.
        gone_s: each attacker that fell silent, trickled or declared too much: from its last word to its end.
        memory_growth_mib: of the node's process, at its peak, against before the attack.
        stored_mib: of the 300 MB, what the node took before it ended the association.
    """

    model_config = ConfigDict(frozen=True)

    echoes_s: tuple[float, ...]
    gone_s: dict[str, tuple[float, ...]]
    memory_growth_mib: float
    stored_mib: float
    limit_mib: int
    image_status: int | None
    documents: int

    @property
    def misses(self) -> list[str]:
        """Return the bars that were missed."""
        slowest_gone = max(max(times) for times in self.gone_s.values())
        bars = {
            f"C-ECHO <= {ECHO_LIMIT_S} s": max(self.echoes_s) <= ECHO_LIMIT_S,
            f"attackers gone <= {GONE_LIMIT_S} s": slowest_gone <= GONE_LIMIT_S,
            f"memory <= +{MEMORY_LIMIT_MIB} MiB": self.memory_growth_mib <= MEMORY_LIMIT_MIB,
            "stored <= limit + 1 MiB": self.stored_mib <= self.limit_mib + 1.0,
            "an image after it is answered": self.image_status == 0 and self.documents >= 1,
        }
        return [bar for bar, is_met in bars.items() if not is_met]


@app.command()
def main(
    bundle: Annotated[Path, typer.Option(help="What answers.")],
    out: Annotated[Path, typer.Option(help="Results.")] = RESULTS,
) -> None:
    """Attack, print and write what was seen."""
    storescp = find_dcmtk("storescp")
    if storescp is None:
        raise typer.BadParameter("DCMTK's storescp is needed. Run: apt-get install dcmtk")
    with tempfile.TemporaryDirectory(prefix="chexnet-attack-") as name:
        attacked = attack(Path(name), bundle, storescp, seconds=12.0)
    results = {"machine": describe_machine().model_dump(), "attack": attacked.model_dump(), "misses": attacked.misses}
    out.write_text(json.dumps(results, indent=1) + "\n")
    typer.echo(
        f"{len(attacked.echoes_s)} C-ECHOs, slowest {max(attacked.echoes_s):.3f} s; memory "
        f"+{attacked.memory_growth_mib:.1f} MiB; {attacked.stored_mib:.0f} of {STORE_MIB} MiB taken; missed: {attacked.misses}"
    )
    if attacked.misses:
        raise typer.Exit(1)


def attack(folder: Path, bundle: Path, storescp: str, *, seconds: float) -> Attacked:
    """Run the whole scenario for so many seconds and return what was seen."""
    node = NodeProcess(folder / "node", bundle).start()
    pacs = Pacs(folder / "pacs", node.pacs_port, storescp).start()
    try:
        echo_s(node.port)  # the first one loads code on both sides
        before_mib = node.resident_mib()
        stop = threading.Event()
        peaks, gone, stored = _watch_memory(node, stop), _Gone(), [0]
        attackers = [
            *[_thread(lambda: _stay_idle(node.port, gone)) for _ in range(IDLE)],
            *[_thread(partial(_declare, node.port, f"127.0.1.{i + 1}", gone)) for i in range(DECLARING)],
            *[_thread(partial(_fall_silent, node.port, f"127.0.2.{i + 1}", gone)) for i in range(SILENT)],
            *[_thread(partial(_trickle, node.port, f"127.0.3.{i + 1}", gone)) for i in range(TRICKLING)],
            _thread(lambda: stored.__setitem__(0, _store_much(node.port, "127.0.4.1"))),
        ]
        echoes, end_s = [], time.monotonic() + seconds
        while time.monotonic() < end_s:
            echoes.append(echo_s(node.port))
            time.sleep(0.1)
        for attacker in attackers:
            attacker.join(60.0)
        stop.set()
        image = write_radiograph(folder / "image.dcm", seed=1)
        (status,) = store(node.port, [image])
        deadline_s = time.monotonic() + 10.0
        while not pacs.received() and time.monotonic() < deadline_s:
            time.sleep(0.05)
        return Attacked(
            echoes_s=tuple(echoes),
            gone_s=gone.times(),
            memory_growth_mib=max(peaks) - before_mib,
            stored_mib=stored[0] / 2**20,
            limit_mib=192,
            image_status=status,
            documents=len(pacs.received()),
        )
    finally:
        node.stop()
        pacs.stop()


class _Gone:
    """How long each attacker stayed, by kind; told by threads."""

    def __init__(self) -> None:
        self._lock, self._times = threading.Lock(), dict[str, list[float]]()

    def add(self, kind: str, seconds: float) -> None:
        with self._lock:
            self._times.setdefault(kind, []).append(seconds)

    def times(self) -> dict[str, tuple[float, ...]]:
        return {kind: tuple(sorted(times)) for kind, times in self._times.items()}


def _thread(act: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def _watch_memory(node: NodeProcess, stop: threading.Event) -> list[float]:
    peaks = [0.0]

    def watch() -> None:
        while not stop.wait(0.05):
            peaks[0] = max(peaks[0], node.resident_mib())

    _thread(watch)
    return peaks


def connect(port: int, source: str) -> socket.socket:
    """Connect from one address of the loopback network."""
    connection = socket.socket()
    connection.settimeout(40.0)
    connection.bind((source, 0))
    connection.connect(("127.0.0.1", port))
    return connection


def associate(connection: socket.socket, *, calling: str = SCANNER, called: str = NODE) -> bool:
    """Negotiate an association for computed radiography; return whether it was accepted (PS3.8 section 9.3.2)."""

    def item(kind: int, content: bytes) -> bytes:
        return struct.pack(">BxH", kind, len(content)) + content

    context = struct.pack(">Bxxx", 1) + item(0x30, COMPUTED_RADIOGRAPHY.encode()) + item(0x40, IMPLICIT.encode())
    user = item(0x51, struct.pack(">I", 65536)) + item(0x52, b"1.2.3.4")
    body = struct.pack(">Hxx16s16s32x", 1, called.ljust(16).encode(), calling.ljust(16).encode())
    body += item(0x10, b"1.2.840.10008.3.1.1.1") + item(0x20, context) + item(0x50, user)
    connection.sendall(struct.pack(">BxI", PduType.ASSOCIATE_RQ, len(body)) + body)
    header = connection.recv(HEADER_BYTES, socket.MSG_WAITALL)
    if len(header) < HEADER_BYTES or header[0] != PduType.ASSOCIATE_AC:
        return False
    connection.recv(struct.unpack(">BxI", header)[1], socket.MSG_WAITALL)
    return True


def store_command() -> bytes:
    """Return the P-DATA PDU of a C-STORE-RQ for an image 1.2.3.5 (PS3.7 section 9.3.1)."""

    def element(number: int, value: bytes) -> bytes:
        return struct.pack("<HHI", 0, number, len(value)) + value

    rest = element(0x0002, COMPUTED_RADIOGRAPHY.encode() + b"\0") + element(0x0100, b"\x01\x00")
    rest += element(0x0110, b"\x01\x00") + element(0x0700, b"\x00\x00") + element(0x0800, b"\x00\x00")
    rest += element(0x1000, b"1.2.3.5\0")
    return write_pdv(1, element(0x0000, struct.pack("<I", len(rest))) + rest, is_command=True)


def _until_gone(connection: socket.socket) -> float:
    """Return how many seconds pass until the node ends a connection."""
    start = time.monotonic()
    try:
        while connection.recv(4096):
            pass
    except ConnectionError:
        pass
    return time.monotonic() - start


def _stay_idle(port: int, gone: _Gone) -> None:
    with connect(port, "127.0.0.1") as connection:
        gone.add("idle", _until_gone(connection))


def _declare(port: int, source: str, gone: _Gone) -> None:
    with connect(port, source) as connection:
        if associate(connection):
            connection.sendall(struct.pack(">BxI", PduType.P_DATA, 0xFFFFFFFF))
            gone.add("declared 4 GB", _until_gone(connection))
        else:
            gone.add("turned away", 0.0)


def _fall_silent(port: int, source: str, gone: _Gone) -> None:
    with connect(port, source) as connection:
        if associate(connection):
            connection.sendall(store_command() + struct.pack(">BxIIBB", PduType.P_DATA, 65_000, 64_996, 1, 0))
            gone.add("silent inside a PDU", _until_gone(connection))
        else:
            gone.add("turned away", 0.0)


def _trickle(port: int, source: str, gone: _Gone) -> None:
    with connect(port, source) as connection:
        start = time.monotonic()
        try:
            for byte in struct.pack(">BxI", PduType.ASSOCIATE_RQ, 200) + bytes(200):
                connection.sendall(bytes([byte]))
                time.sleep(1.0)
        except ConnectionError:
            pass
        gone.add("a byte a second", time.monotonic() - start)


def _store_much(port: int, source: str) -> int:
    """Send a data set of 300 MB; return how many of its bytes the node took."""
    piece = bytes(65_536)
    sent = 0
    with connect(port, source) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)  # what lies there was not taken by the node
        if not associate(connection):
            return 0
        connection.sendall(store_command())
        fragment = struct.pack(">BxIIBB", PduType.P_DATA, len(piece) + 6, len(piece) + 2, 1, 0) + piece
        try:
            while sent < STORE_MIB * 2**20:
                connection.sendall(fragment)
                sent += len(piece)
        except ConnectionError:
            pass
    return sent


if __name__ == "__main__":
    run_program(app)
