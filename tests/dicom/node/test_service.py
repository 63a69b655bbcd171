"""A whole node in its own process, with a model that really answers, and DCMTK's programs as its peers."""

import json
import os
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.rigs.node_rig import NODE, SCANNER, NodeProcess, Pacs, echo_s, store, write_radiograph
from benchmarks.services.node_attack import attack
from benchmarks.services.node_kills import answer_at, kill_node
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.dicom.node.audit import read_head, verify
from chexnet_deploy.dicom.node.config import read_config
from chexnet_deploy.dicom.node.radiograph_worker import RadiographWork


def wait_until(is_so: Callable[[], bool], *, timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def audit_lines(node: NodeProcess) -> list[dict[str, object]]:
    return [json.loads(line) for line in (node.state / "audit.jsonl").read_text().splitlines()]


def audited(node: NodeProcess, event: str) -> list[dict[str, object]]:
    return [line for line in audit_lines(node) if line["event"] == event]


def is_delivered(node: NodeProcess, n_images: int) -> bool:
    """Whether so many images were answered and all their documents were taken by the destination."""
    # A kill between a line and what it is about repeats the line, and nothing else.
    answered = {line["instance"]: line for line in audited(node, "answered")}
    n_documents = sum(len(line["documents"]) for line in answered.values())  # type: ignore[misc, arg-type]
    return len(answered) == n_images and len(audited(node, "delivered")) >= n_documents > 0


def test_dcmtk_stores_an_image_and_gets_the_models_own_answer(
    node: NodeProcess, pacs: Pacs, storescu: str, echoscu: str, tmp_path: Path
) -> None:
    node.start()
    pacs.start()
    titles = ["-aet", SCANNER, "-aec", NODE, "127.0.0.1", str(node.port)]
    subprocess.run([echoscu, *titles], check=True, timeout=30)
    image = tmp_path / "image.dcm"
    write_radiograph(image, seed=7)
    sent = subprocess.run([storescu, "-v", *titles, str(image)], check=True, timeout=30, capture_output=True, text=True)
    assert "Success" in sent.stdout + sent.stderr
    wait_until(lambda: is_delivered(node, 1))
    work = RadiographWork(read_config(node.folder / "node.toml"))
    wait_until(lambda: len(pacs.received()) == 2)
    assert pacs.received() == answer_at(work, image, pacs.paths())
    work.close()
    assert [document.Modality for document in pacs.received().values()] in (["SR", "OT"], ["OT", "SR"])
    refused = subprocess.run([echoscu, "-aet", "STRANGER", *titles[2:]], capture_output=True, timeout=30)
    assert refused.returncode != 0
    assert node.stop() == 0
    (line,) = audited(node, "answered")
    assert dict(line["versions"])["bundle"] == Bundle.open(node.bundle).id  # type: ignore[call-overload]
    log = node.state / "audit.jsonl"
    assert verify(log, read_head(log.with_name("audit.jsonl.head")).hash).seq == len(audit_lines(node))


def test_answered_image_leaves_no_pixels_behind(node: NodeProcess, pacs: Pacs, tmp_path: Path) -> None:
    node.start()
    pacs.start()
    image = write_radiograph(tmp_path / "a.dcm", seed=1)
    assert store(node.port, [image]) == [0]
    wait_until(lambda: is_delivered(node, 1))
    node.stop()
    left = b"".join(path.read_bytes() for path in node.state.rglob("*") if path.is_file())
    assert bytes(image.PixelData)[:64] not in left


@pytest.mark.parametrize("explains", [True, False])
def test_refused_image_is_recorded_and_explained_in_its_study(
    node: NodeProcess, pacs: Pacs, tmp_path: Path, explains: bool
) -> None:
    node.result_settings = "" if explains else "explain_refusals = false"
    node.start()
    pacs.start()
    knee, chest = (
        write_radiograph(tmp_path / "a.dcm", seed=seed, body_part=part) for seed, part in ((1, "KNEE"), (2, "CHEST"))
    )
    assert store(node.port, [knee, chest]) == [0, 0]
    wait_until(lambda: is_delivered(node, 1))
    (line,) = audited(node, "refused")
    assert line["reason"] == "body-part"
    (said,) = [event for event in node.events() if event["event"] == "refused"]
    assert (said["instance"], said["reason"]) == (line["instance"], "body-part")
    wait_until(lambda: len(pacs.received()) == len(audited(node, "delivered")) == 2 + explains)
    explained = [document for document in pacs.received().values() if document.PatientID == "ID-1"]
    assert [
        (document.StudyInstanceUID, document.ImageComments, document.Modality) for document in explained
    ] == explains * [(knee.StudyInstanceUID, "No AI result: body-part", "OT")]


@pytest.mark.parametrize(
    ("name", "worker_reason", "n_lost"),
    [
        ("DIE", "worker-died-signal-11", 2),
        ("RAISE", "worker-failed-RuntimeError", 2),
        pytest.param("HANG", "worker-deadline", 2, marks=pytest.mark.slow),
    ],
)
def test_worker_that_is_lost_over_an_image_is_replaced_and_the_image_refused_after_two_tries(
    node: NodeProcess, pacs: Pacs, tmp_path: Path, name: str, worker_reason: str, n_lost: int
) -> None:
    node.answer_deadline_s = 2.0
    node.start()
    pacs.start()
    bad = write_radiograph(tmp_path / "bad.dcm", seed=1, name=name)
    good = write_radiograph(tmp_path / "good.dcm", seed=2)
    start_s = time.monotonic()
    assert store(node.port, [bad, good]) == [0, 0]
    assert time.monotonic() - start_s < 2.0  # the sender doesn't wait for the model
    assert echo_s(node.port) < 1.0
    wait_until(lambda: is_delivered(node, 1), timeout_s=60.0)
    (line,) = audited(node, "refused")
    assert (line["reason"], line["worker"]) == ("worker-lost", worker_reason)
    assert [event["event"] for event in node.events()].count("worker-lost") == n_lost
    wait_until(lambda: len(pacs.received()) == len(audited(node, "delivered")))
    (explained,) = [each for each in pacs.received().values() if each.PatientID == "ID-1"]
    assert explained.ImageComments == "No AI result: worker-lost"
    assert name not in node.journal.read_text()
    assert node.stop() == 0


@pytest.mark.slow
def test_image_that_hangs_once_is_answered_at_the_second_try(node: NodeProcess, pacs: Pacs, tmp_path: Path) -> None:
    node.answer_deadline_s = 2.0
    node.start()
    pacs.start()
    assert store(node.port, [write_radiograph(tmp_path / "a.dcm", seed=1, name="HANG^ONCE")]) == [0]
    wait_until(lambda: is_delivered(node, 1), timeout_s=30.0)
    (line,) = audited(node, "answered")
    assert line["worker"] == "worker-deadline"


@pytest.mark.parametrize(("name", "event"), [("BUSY^ONCE", "answered"), ("BUSY", "refused")])
def test_image_that_a_busy_machine_had_no_time_for_is_tried_again(
    node: NodeProcess, pacs: Pacs, tmp_path: Path, name: str, event: str
) -> None:
    node.start()
    pacs.start()
    images = [write_radiograph(tmp_path / "a.dcm", seed=seed, name=each) for seed, each in ((1, name), (2, "GOOD"))]
    assert store(node.port, images) == [0, 0]
    wait_until(lambda: len(audited(node, "answered")) + len(audited(node, "refused")) == 2, timeout_s=30.0)
    line = audited(node, event)[0]
    assert (line["reason"], line["worker"]) == ("busy" if event == "refused" else "", "")


def test_nothing_about_a_patient_is_in_any_output(node: NodeProcess, pacs: Pacs, storescu: str, tmp_path: Path) -> None:
    node.overrides = "\n[health]\ndrain_deadline_s = 1.0\n"
    node.start()
    name, uid = "CANARY^NAME", "1.2.826.0.1.3680043.8.498.471108154711"
    image = tmp_path / "image.dcm"
    write_radiograph(image, seed=471108154711, name=name, uid=uid)
    other = write_radiograph(tmp_path / "other.dcm", seed=471108154711, name=name, uid=uid)
    other.PixelData = other.PixelData[::-1]
    titles = ["-aet", SCANNER, "-aec", NODE, "127.0.0.1", str(node.port)]
    subprocess.run([storescu, *titles, str(image)], check=True, timeout=30, capture_output=True)
    assert store(node.port, [other]) == [0]
    wait_until(lambda: len(audited(node, "answered")) == 2)
    assert store(
        node.port, [write_radiograph(tmp_path / "bad.dcm", seed=471108154711, name=name, body_part="CANARY")]
    ) == [0]
    wait_until(lambda: bool(audited(node, "refused")))
    node.stop()  # the destination is away, so the results, which name the patient, lie in the outbox
    spoken = [node.journal, node.state / "audit.jsonl", node.state / "audit.jsonl.head"]
    for canary in ("CANARY", "471108154711", uid):
        for path in spoken:
            assert canary not in path.read_text(), path
        assert all(canary not in path.name for path in node.state.rglob("*"))
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o007 == 0 for path in (node.state, node.state / "outbox.sqlite"))


@pytest.mark.slow
def test_destination_that_comes_back_gets_everything_in_order(node: NodeProcess, pacs: Pacs, tmp_path: Path) -> None:
    node.overrides = "\n[outbox]\nfirst_retry_s = 0.2\nmax_retry_s = 0.5\n"
    node.start()
    images = [write_radiograph(tmp_path / f"{i}.dcm", seed=i) for i in range(4)]
    assert store(node.port, images) == [0] * 4
    wait_until(lambda: len(audited(node, "answered")) == 4)
    node.kill()
    node.start()
    pacs.start()
    wait_until(lambda: is_delivered(node, 4), timeout_s=60.0)
    assert node.stop() == 0
    delivered = [line["instance"] for line in audited(node, "delivered")]
    answered = list(dict.fromkeys(line["instance"] for line in audited(node, "answered")))
    assert list(dict.fromkeys(delivered)) == answered  # each image's documents together, in the order of the images
    assert sorted(delivered, key=answered.index) == delivered


def test_sigterm_finishes_what_was_acknowledged(node: NodeProcess, pacs: Pacs, tmp_path: Path) -> None:
    node.start()
    pacs.start()
    images = [write_radiograph(tmp_path / f"{i}.dcm", seed=i) for i in range(5)]
    assert store(node.port, images) == [0] * 5
    assert node.stop() == 0
    assert is_delivered(node, 5)
    assert node.events()[-1] == {**node.events()[-1], "event": "stopped", "pending": 0, "waiting": 0}


def test_second_sigterm_ends_it_at_once(node: NodeProcess, tmp_path: Path) -> None:
    node.start()  # no destination: the results can't be sent, so a drain takes its whole deadline
    assert store(node.port, [write_radiograph(tmp_path / "a.dcm", seed=1)]) == [0]
    assert node.process is not None
    node.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert node.process.poll() is None
    node.process.send_signal(signal.SIGTERM)
    assert node.process.wait(2.0) == 128 + signal.SIGTERM


def test_systemd_hears_of_readiness_life_and_stopping(node: NodeProcess, tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        manager.settimeout(20.0)
        node.environment["NOTIFY_SOCKET"] = path
        node.overrides = "\n[health]\nself_test_every_s = 0.3\n"
        node.start()
        heard = [manager.recv(4096).decode().split("\n")[0] for _ in range(4)]
        # The first self-test comes before readiness; then only tests that were answered.
        assert heard == ["WATCHDOG=1", "READY=1", "WATCHDOG=1", "WATCHDOG=1"]
        (worker,) = workers(node)
        os.kill(worker, signal.SIGSTOP)  # hung: no word until it is found out and replaced
        manager.settimeout(1.5)
        assert set(rest(manager)) <= {b"WATCHDOG=1"}  # what was said before, and then nothing
        os.kill(worker, signal.SIGCONT)
        manager.settimeout(20.0)
        assert manager.recv(4096) == b"WATCHDOG=1"
        assert node.stop() == 0
        while not (word := manager.recv(4096)).startswith(b"STOPPING=1"):
            assert word == b"WATCHDOG=1"


def rest(channel: socket.socket) -> list[bytes]:
    heard = []
    try:
        while True:
            heard.append(channel.recv(4096))
    except TimeoutError:
        return heard


def workers(node: NodeProcess) -> list[int]:
    assert node.process is not None
    return [
        int(word)
        for task in Path(f"/proc/{node.process.pid}/task").iterdir()
        for word in (task / "children").read_text().split()
    ]


def test_killed_node_takes_its_worker_with_it(node: NodeProcess) -> None:
    node.start()
    (worker,) = workers(node)
    node.kill()
    wait_until(lambda: not Path(f"/proc/{worker}/stat").exists(), timeout_s=5.0)


def test_worker_that_cannot_start_ends_the_node_with_70(node: NodeProcess) -> None:
    node.bundle = node.folder / "absent"
    with pytest.raises(RuntimeError, match="worker-failed-BundleError"):
        node.start()
    assert node.process is not None
    assert node.process.wait(10.0) == 70


def test_full_audit_log_stops_acknowledging_until_there_is_room(node: NodeProcess, pacs: Pacs, tmp_path: Path) -> None:
    node.overrides = "\n[health]\nself_test_every_s = 0.5\n"
    node.start()
    pacs.start()
    head = node.state / "audit.jsonl.head"
    head.unlink()
    head.mkdir()  # a head can't be put there, as on a full disk
    image = write_radiograph(tmp_path / "a.dcm", seed=1)
    assert store(node.port, [image]) == [0xA700]
    assert store(node.port, [image]) == [0xA700]
    assert not pacs.received()
    head.rmdir()
    wait_until(lambda: is_delivered(node, 1))  # it was kept all the same
    assert store(node.port, [image]) == [0]
    head.unlink()
    head.mkdir()
    assert store(node.port, [image]) == [0xA700]  # nothing is left to do by which the node would notice room again
    head.rmdir()
    wait_until(lambda: store(node.port, [image]) == [0])
    assert node.stop() == 0
    assert verify(node.state / "audit.jsonl", read_head(head).hash).seq == len(audit_lines(node))


def test_second_node_in_a_folder_is_refused(node: NodeProcess) -> None:
    node.start()
    second = NodeProcess(node.folder, node.bundle)
    with pytest.raises(RuntimeError, match="another node uses"):
        second.start()
    assert second.process is not None
    assert second.process.wait(10.0) != 0
    assert echo_s(node.port) < 1.0


def test_log_cut_short_while_the_node_was_down_is_refused(node: NodeProcess) -> None:
    node.start()
    node.stop()
    log = node.state / "audit.jsonl"
    log.write_bytes(log.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(RuntimeError, match="Lines were cut off"):
        node.start()


@pytest.mark.slow
def test_attacked_from_many_sides_it_answers(bundles: dict[str, Bundle], storescp: str, tmp_path: Path) -> None:
    attacked = attack(tmp_path, bundles["fp32"].path, storescp, seconds=8.0)
    assert attacked.misses == []
    assert len(attacked.echoes_s) > 20
    assert len(attacked.gone_s["declared 4 GB"]) == 10


@pytest.mark.slow
def test_ten_kills_lose_nothing(bundles: dict[str, Bundle], storescp: str, tmp_path: Path) -> None:
    survived = kill_node(tmp_path, bundles["fp32"].path, storescp, kills=10, seed=1, on_done=lambda done: None)
    assert (survived.lost, survived.wrong) == ((), ())
    assert survived.is_whole
