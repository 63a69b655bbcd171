"""A file gets one answer by every way in: the ways are compared with each other, and no answer is expected here.

An answer is the probabilities to the last digit, or a refusal's reason and message. Not every way gives both of a refusal:
tables and the command line give the message, the node the reason, the service the reason and its own fixed text.
"""

import contextlib
import csv
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("highdicom")
pytest.importorskip("pynetdicom")

from pydicom import dcmread
from pydicom.uid import CTImageStorage

from benchmarks.rigs.node_rig import write_radiograph
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.cli.main import app
from chexnet_deploy.dicom.node.config import NodeConfig
from chexnet_deploy.dicom.node.radiograph_worker import RadiographWork
from chexnet_deploy.dicom.results.reporter import Reporter
from chexnet_deploy.dicom.results.result import Device
from chexnet_deploy.dicom.results.structured_report import read_probabilities
from chexnet_deploy.errors import ChexnetError, ImageError
from chexnet_deploy.images.content_check import ImageGuardPolicy
from chexnet_deploy.images.listing import find_images
from chexnet_deploy.images.scope import ScopePolicy
from chexnet_deploy.runtime.predict_files import predict_table
from chexnet_deploy.runtime.predictor import Prediction, Predictor
from chexnet_deploy.runtime.table import Row
from chexnet_deploy.serving.http.refusals import IMAGE_REFUSALS
from tests.conftest import CHECKOUT
from tests.serving.running import Running

CASES = Path(os.environ.get("CHEXNET_CASES", CHECKOUT.parent / "shared" / "cases"))
HOW = ("--threads", "1", "--provider", "cpu")
SOURCE_HEADER = "source-header"  # refused by those alone that make DICOM results


@dataclass(frozen=True)
class Answer:
    """What one way in said of one file; None where it gives no such thing."""

    probabilities: Mapping[str, float] | None = None
    reason: str | None = None
    message: str | None = None


Answers = dict[Path, Answer]


@pytest.fixture(scope="module")
def bundle(bundles: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """One that looks at pictures too, if small ones."""
    made = bundles["fp32"]
    scope = ScopePolicy(picture=ImageGuardPolicy(min_side_px=32, min_score=-100.0))
    manifest = made.manifest.model_copy(update={"scope": scope})
    path = tmp_path_factory.mktemp("scoped") / "fp32"
    return Bundle.write(path, manifest, made.read_model(), made.read_probe().to_bytes())


@pytest.fixture(scope="module")
def files(phantom_root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A few files of every fate, and those of shared/cases where they are; none of them empty."""
    folder = tmp_path_factory.mktemp("files")
    phantom = sorted((phantom_root / "images").glob("*.png"))[0]
    gray = np.asarray(Image.open(phantom))
    shutil.copy(phantom, folder / "phantom.png")
    (folder / "truncated.png").write_bytes(phantom.read_bytes()[:-20])
    (folder / "text.png").write_text("this is no picture\n")
    Image.fromarray(gray).save(folder / "phantom.jpg")
    Image.fromarray(np.stack([gray, gray, 255 - gray], axis=-1)).save(folder / "colour.png")
    Image.fromarray(np.rot90(gray, 2)).save(folder / "upside_down.png")
    Image.fromarray(np.zeros_like(gray)).save(folder / "black.png")
    Image.fromarray(gray[:, :16]).save(folder / "narrow.png")
    for name, changes in {
        "chest": {},
        "no_study": {"StudyInstanceUID": None},
        "no_result_is_filed_under": {"SOPClassUID": CTImageStorage},
        "nor_under_this_black_one": {"SOPClassUID": CTImageStorage, "PixelData": bytes(2 * gray.size)},
        "man": {"PatientSpeciesDescription": "Man"},
        "dog": {"PatientSpeciesDescription": "Canis lupus familiaris"},
        "hand": {"BodyPartExamined": "HAND"},
        "child": {"PatientAge": "003Y"},
        "lateral": {"ViewPosition": "LL"},
        "short": {"PixelData": bytes(10)},
    }.items():
        path = folder / f"{name}.dcm"
        image = write_radiograph(path, seed=1, side_px=gray.shape[0])
        image.PixelData = gray.astype("<u2").tobytes()
        image.BitsStored, image.HighBit = 8, 7
        for keyword, value in changes.items():
            if value is None:
                delattr(image, keyword)
            else:
                setattr(image, keyword, value)
        image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID
        image.save_as(path, enforce_file_format=True)
    (folder / "cut.dcm").write_bytes((folder / "chest.dcm").read_bytes()[:-100])
    (folder / "no_preamble.dcm").write_bytes((folder / "chest.dcm").read_bytes()[132:])
    cases = sorted(path for path in CASES.rglob("*") if path.is_file() and path.suffix not in (".md", ".toml", ".txt"))
    return [path for path in (*sorted(folder.iterdir()), *cases) if path.stat().st_size]


@pytest.fixture(scope="module")
def predicted(bundle: Bundle, files: list[Path]) -> Answers:
    """What Predictor.predict says of each file: what the other ways are compared with."""
    with Predictor.of(bundle, threads=1, provider="cpu") as predictor:
        return {path: told(path, lambda path=path: predictor.predict(path)) for path in files}  # type: ignore[misc]


def told(path: Path, predict: Callable[[], Prediction]) -> Answer:
    try:
        return Answer(predict().probabilities)
    except ImageError as err:
        return Answer(None, err.reason.value, plain(path, str(err)))


def plain(path: Path, message: str) -> str:
    """Return a refusal's words without what it calls the file."""
    for name in (str(path), "the image", "the DICOM object"):
        message = message.removeprefix(f"{name}: ")
    return message


def differences(expected: Answers, found: Answers, *parts: str) -> dict[str, list[object]]:
    """Return what differs, by file: in the probabilities and in those parts of a refusal that this way gives."""
    return {
        str(path): [getattr(expected[path], part), getattr(answer, part)]
        for path, answer in found.items()
        for part in ("probabilities", *parts)
        if getattr(expected[path], part) != getattr(answer, part)
    }


def test_files_of_both_fates_are_compared(predicted: Answers) -> None:
    assert sum(answer.probabilities is not None for answer in predicted.values()) >= 2
    assert len({answer.reason for answer in predicted.values()} - {None}) >= 5
    if not CASES.is_dir():
        pytest.skip("NOT RUN on the case files: set CHEXNET_CASES to a folder of them")


def test_bytes_are_answered_as_the_file(bundle: Bundle, files: list[Path], predicted: Answers) -> None:
    with Predictor.of(bundle, threads=1, provider="cpu") as predictor:
        found = {
            path: told(path, lambda path=path: predictor.predict(path.read_bytes()))  # type: ignore[misc]
            for path in files
        }
    assert differences(predicted, found, "reason", "message") == {}


def test_a_stream_is_answered_as_each_file(bundle: Bundle, files: list[Path], predicted: Answers) -> None:
    found = {}
    with Predictor.of(bundle, threads=1, provider="cpu") as predictor:
        for path, answer, _ in predictor.predict_stream(files):
            if isinstance(answer, ImageError):
                found[path] = Answer(None, answer.reason.value, plain(path, str(answer)))
            else:
                found[path] = Answer(answer.probabilities)
    assert differences(predicted, found, "reason", "message") == {}


def chexnet(*arguments: object) -> str:
    """Run the command line in this process; return what it prints on standard output."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        app([*map(str, arguments)], standalone_mode=False)
    return printed.getvalue()


@pytest.mark.slow
def test_the_command_line_answers_one_file_as_the_predictor(
    bundle: Bundle, files: list[Path], predicted: Answers
) -> None:
    found = {}
    for path in files:
        try:
            (answer,) = json.loads(chexnet("predict", bundle.path, path, "--json", *HOW)).values()
            found[path] = Answer(answer["probabilities"])
        except ChexnetError as err:
            found[path] = Answer(None, None, plain(path, str(err)))
    assert differences(predicted, found, "message") == {}


def test_the_command_line_answers_many_files_as_the_predictor(
    bundle: Bundle, files: list[Path], predicted: Answers
) -> None:
    answers = json.loads(chexnet("predict", bundle.path, *files, "--json", *HOW))
    found = {
        path: Answer(answers[str(path)].get("probabilities"), None, plain(path, answers[str(path)]["quarantined"]))
        if "quarantined" in answers[str(path)]
        else Answer(answers[str(path)]["probabilities"])
        for path in files
    }
    assert differences(predicted, found, "message") == {}


@pytest.fixture(scope="module")
def table(bundle: Bundle, files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("table") / "table.csv"
    chexnet("predict", bundle.path, *files, "--out", out, *HOW)
    return out.read_bytes()


def test_a_table_answers_as_the_predictor(bundle: Bundle, files: list[Path], predicted: Answers, table: bytes) -> None:
    expected = {  # a table's probabilities are float32's shortest digits, and its message is one line
        path: Answer(
            None
            if answer.probabilities is None
            else {k: float(np.float32(p)) for k, p in answer.probabilities.items()},
            None,
            answer.message,
        )
        for path, answer in predicted.items()
    }
    found = {}
    for path, row in zip(files, csv.DictReader(io.StringIO(table.decode())), strict=True):
        assert row["image"] == str(path)
        if row["status"] == "ok":
            findings = bundle.manifest.findings
            found[path] = Answer({finding: float(np.float32(row[f"prob_{finding}"])) for finding in findings})
        else:
            found[path] = Answer(None, None, row["reason"])
    assert differences(expected, found, "message") == {}


def test_a_ray_worker_makes_the_tables_rows(
    bundle: Bundle, files: list[Path], table: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    import pyarrow as pa

    from chexnet_deploy.serving.ray import worker

    class Worker(worker.Worker):
        """Is closed here, where Ray would end its process."""

        def close(self) -> None:
            assert self._predictor is not None
            self._predictor.close()

    # The counter of attempts without a cluster around it: calls are answered here.
    attempts = worker.Attempts()
    counter = SimpleNamespace(begin=SimpleNamespace(remote=attempts.begin), end=SimpleNamespace(remote=attempts.end))
    monkeypatch.setattr(worker.ray, "get", lambda answer: answer)
    monkeypatch.chdir(tmp_path)

    def rows(bundle: Bundle, images: Any, card: Any, _start: int) -> Iterator[Any]:
        job = worker.Job(
            folder=tmp_path,
            bundle=bundle.path,
            root=images.root,
            trust=None,
            card=card,
            cores=1,
            versions=worker.package_versions(),
        )
        names = [os.fsencode(name) for name in images.names]
        block = pa.table({"place": range(len(names)), "name": names}, schema=worker.BLOCK)
        with contextlib.closing(Worker(job, counter)) as worker_here:
            answered = worker_here(block)
        for line, is_quarantined in zip(answered["line"].to_pylist(), answered["quarantined"].to_pylist(), strict=True):
            yield Row(line, is_quarantined)

    out = tmp_path / "table.csv"
    predict_table(
        bundle,
        find_images(files),
        out,
        threads=1,
        provider="cpu",
        on_phase=lambda phase, done, total: None,
        elsewhere=rows,
    )
    assert out.read_bytes() == table


def test_the_service_answers_as_the_predictor(
    bundle: Bundle, files: list[Path], predicted: Answers, tmp_path: Path
) -> None:
    service = Running([str(bundle.path), *HOW], tmp_path / "log")
    try:
        service.wait_for_log("ready: ")
        found = {}
        for path in files:
            answer = service.json("POST", "/predict", path.read_bytes())
            found[path] = Answer(answer.get("probabilities"), answer.get("reason"), answer.get("error"))
    finally:
        service.stop()
    texts = {reason.value: text for reason, text in IMAGE_REFUSALS.items()}
    expected = {
        path: Answer(answer.probabilities, answer.reason, None if answer.reason is None else texts[answer.reason])
        for path, answer in predicted.items()
    }
    assert differences(expected, found, "reason", "message") == {}


@pytest.fixture(scope="module")
def node_answers(bundle: Bundle, files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """What the node's worker says of each file with a preamble: the node writes one into all that it keeps."""
    config = NodeConfig.model_validate(
        {
            "folder": str(tmp_path_factory.mktemp("node")),
            "listen": {"host": "127.0.0.1", "port": 11112, "ae_title": "NODE", "calling_ae_titles": ["SCANNER"]}
            | {"networks": ["127.0.0.0/8"]},
            "destinations": [{"host": "127.0.0.1", "port": 11113, "ae_title": "PACS"}],
            "model": {"bundle": str(bundle.path), "threads": 1},
            "device": {"serial_number": "1"},
        }
    )
    work = RadiographWork(config)
    try:
        found = {}
        for path in files:
            if path.read_bytes()[128:132] == b"DICM":
                answer = work.answer(path)
                probabilities = None
                if not answer.refusal:  # else they say in the study why there is no result
                    probabilities = read_probabilities(dcmread(io.BytesIO(answer.documents[0])))
                found[path] = Answer(probabilities, answer.refusal or None)
        return found
    finally:
        work.close()


def test_the_node_answers_as_the_predictor(predicted: Answers, node_answers: Answers) -> None:
    assert any(answer.probabilities for answer in node_answers.values())
    unfiled = {path for path, answer in node_answers.items() if answer.reason == SOURCE_HEADER}
    assert {path.stem for path in unfiled if CASES not in path.parents} == {"no_result_is_filed_under"}
    assert all(predicted[path].probabilities for path in unfiled), unfiled  # what a picture is refused for comes first
    found = {path: answer for path, answer in node_answers.items() if answer.reason != SOURCE_HEADER}
    assert differences(predicted, found, "reason") == {}


def test_dicom_results_are_of_the_nodes_answers(
    bundle: Bundle, predicted: Answers, node_answers: Answers, tmp_path: Path
) -> None:
    found = {}
    with Predictor.of(bundle, threads=1, provider="cpu") as predictor:
        reporter = Reporter(bundle, predictor, Device("1"), max_pictures=0)
        for path in node_answers:
            now = datetime.now().astimezone()
            found[path] = told(path, lambda path=path, now=now: reporter.report(path, now).prediction)  # type: ignore[misc]
    assert differences(node_answers, found, "reason") == {}
    refused = {path: a for path, a in found.items() if a.reason not in (None, SOURCE_HEADER)}
    assert differences(predicted, refused, "message") == {}
