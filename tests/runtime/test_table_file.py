"""A table survives whatever happens to the process that writes it; and is refused where it isn't this run's."""

import csv
import fcntl
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.datasets.findings import FINDINGS
from chexnet_deploy.errors import ImageError, MissingPackageError, TableError
from chexnet_deploy.files import FileContent
from chexnet_deploy.images.listing import ImageFiles, find_images
from chexnet_deploy.images.preprocessing import Preprocessing
from chexnet_deploy.runtime import table_file as results
from chexnet_deploy.runtime.predict_files import TableRun, _whole_batches, predict_table
from chexnet_deploy.runtime.predictor import FileAnswer, Prediction, Predictor
from chexnet_deploy.runtime.sessions.open import resolve_provider
from chexnet_deploy.runtime.table import Row, TableCard, read_back, read_card, row_bytes, row_of
from chexnet_deploy.runtime.table_file import Table, open_table
from tests.command_line import assert_one_line_error, chexnet
from tests.runtime.test_loading import manifest

PREDICT = (sys.executable, "-m", "chexnet_deploy", "predict", "--provider", "cpu")
N = 10
NAMES = tuple(f"folder/{place:02d}, a.png" for place in range(N))
CARD = TableCard(
    bundle="b" * 64,
    preprocessing=Preprocessing(),
    findings=FINDINGS,
    operating_points=dict.fromkeys(FINDINGS[:3], 0.5),
    backend="cpu",
    threads=1,
    batch_size=1,
    n_images=N,
    images_sha256="a" * 64,
)


def answer_of(place: int) -> Prediction | ImageError:
    """Every fourth image can't be read; the rest have float32 probabilities of all sizes."""
    if place % 4 == 3:
        return ImageError(f'{NAMES[place]}: found "0 bytes", or\nless; needed an image. Next: copy it again.')
    scores = np.random.default_rng(place).random(len(FINDINGS), np.float32) ** 8
    probabilities = dict(zip(FINDINGS, scores.tolist(), strict=True))
    return Prediction(probabilities, {name: probabilities[name] >= 0.5 for name in FINDINGS[:3]}, {})


def write(out: Path, card: TableCard = CARD, *, stop_after: int | None = None) -> int:
    """Write the table, or go on with it; return where it began. A run that stops does so by an error."""
    with open_table(out, card, NAMES) as table:
        start = table.n_done
        for place in range(start, N):
            if stop_after is not None and table.n_done == stop_after:
                raise KeyboardInterrupt
            table.add(row_at(place))
    return start


def row_at(place: int, *, turn: int = 0) -> Row:
    """Return an image's row; each turn's file has another size."""
    content = FileContent(1000 + turn, f"{place:064x}")
    return row_of(CARD, NAMES[place], FileAnswer(Path(NAMES[place]), answer_of(place + turn), content))


def stop(out: Path, n: int, card: TableCard = CARD) -> Path:
    with pytest.raises(KeyboardInterrupt):
        write(out, card, stop_after=n)
    return out.with_name(f"{out.name}.partial")


@dataclass(frozen=True)
class Whole:
    table: bytes
    card: bytes


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    out = tmp_path_factory.mktemp("whole") / "t.csv"
    write(out)
    assert sorted(path.name for path in out.parent.iterdir()) == ["t.csv", "t.csv.json"]
    return Whole(out.read_bytes(), out.with_name("t.csv.json").read_bytes())


def assert_whole(out: Path, whole: Whole) -> None:
    assert out.read_bytes() == whole.table
    assert out.with_name(f"{out.name}.json").read_bytes() == whole.card
    assert sorted(path.name for path in out.parent.iterdir()) == [out.name, f"{out.name}.json"]


def test_the_columns_and_one_row_by_hand(whole: Whole) -> None:
    header, first, *_ = whole.table.decode().splitlines()
    assert header.split(",")[:3] == ["image", "status", "prob_Atelectasis"]
    assert header.split(",")[15:] == [
        "prob_Hernia", "present_Atelectasis", "present_Cardiomegaly", "present_Effusion", "bundle",
        "file_bytes", "file_sha256", "reason",
    ]  # fmt: skip
    answer = answer_of(0)
    assert isinstance(answer, Prediction)
    assert first.startswith('"folder/00, a.png",ok,')
    rows = list(csv.DictReader(whole.table.decode().splitlines()))
    assert len(rows) == N
    for name in FINDINGS:
        assert np.float32(rows[0][f"prob_{name}"]) == np.float32(answer.probabilities[name])  # not a bit is lost
        assert len(rows[0][f"prob_{name}"]) <= len("0.123456789e-05")
    assert rows[0]["present_Effusion"] == str(int(answer.probabilities["Effusion"] >= 0.5))
    assert (rows[0]["bundle"], rows[0]["reason"]) == ("b" * 64, "")
    assert (rows[1]["file_bytes"], rows[1]["file_sha256"]) == ("1000", f"{1:064x}")


def test_a_quarantined_row_says_why_on_one_line_without_the_path(whole: Whole) -> None:
    row = list(csv.DictReader(whole.table.decode().splitlines()))[3]
    assert row["status"] == "quarantined"
    assert row["reason"] == 'found "0 bytes", or\\nless; needed an image. Next: copy it again.'
    assert {row[f"prob_{name}"] for name in FINDINGS} == {""}
    assert row["bundle"] == "b" * 64


def test_the_card_binds_the_table(whole: Whole, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_bytes(whole.card)
    card = read_card(tmp_path / "t.json")
    assert card is not None
    assert card.begun == CARD
    assert card.n_quarantined == 2  # places 3 and 7
    assert card.preprocessing == CARD.preprocessing
    assert card.table_sha256 == hashlib.sha256(whole.table).hexdigest()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_cut_at_any_byte_it_goes_on_to_the_same_bytes(whole: Whole, tmp_path: Path, data: st.DataObject) -> None:
    out = tmp_path / "cut" / "t.csv"
    shutil.rmtree(out.parent, ignore_errors=True)
    batch_size = data.draw(st.sampled_from([1, 3, 4]), "batch size")
    card = CARD.model_copy(update={"batch_size": batch_size})
    rows = stop(out, data.draw(st.integers(1, N - 1), "rows"), card)
    length = data.draw(st.integers(0, rows.stat().st_size), "bytes")
    os.truncate(rows, length)
    start = write(out, card)
    n_whole_rows = max(0, whole.table[:length].count(b"\n") - 1)
    assert start == n_whole_rows - n_whole_rows % batch_size
    assert out.read_bytes() == whole.table
    assert not rows.exists()


def test_all_rows_and_no_table_yet_needs_no_row_more(whole: Whole, tmp_path: Path) -> None:
    out = tmp_path / "t.csv"
    card = CARD.model_copy(update={"batch_size": 4})  # ten is no multiple of four
    rows = stop(out, 1, card)
    rows.write_bytes(whole.table)
    assert write(out, card) == N


def test_a_whole_table_is_taken_as_done(whole: Whole, tmp_path: Path) -> None:
    out = tmp_path / "t.csv"
    assert write(out) == 0
    assert write(out) == N
    with open_table(out, CARD, NAMES) as table:
        assert (table.n_done, table.n_quarantined) == (N, 2)
    assert_whole(out, whole)


def test_nothing_is_left_where_no_row_was_written(tmp_path: Path) -> None:
    stop(tmp_path / "below" / "t.csv", 0)
    assert list((tmp_path / "below").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"bundle": "c" * 64}, "bundle bbbbbbbbbbbb"),
        ({"preprocessing": Preprocessing(resize_px=320)}, "preprocessing"),
        ({"images_sha256": "c" * 64}, "images sha256"),
        ({"threads": 2}, "threads 1; this run has 2"),
        ({"backend": "openvino"}, "backend cpu"),
        ({"batch_size": 2}, "batch size 1"),
        ({"operating_points": {}}, "operating points"),
    ],
)
@pytest.mark.parametrize("n", [4, None], ids=["begun", "whole"])
def test_another_run_is_refused(tmp_path: Path, change: dict[str, Any], found: str, n: int | None) -> None:
    out = tmp_path / "t.csv"
    if n is None:
        write(out)
    else:
        stop(out, n)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(TableError, match=f"begun with {found}"):
        write(out, CARD.model_copy(update=change))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda rows: edit(rows, "image,status", "picture,status"), "row 1: found another header"),
        (lambda rows: edit(rows, "folder/01", "folder/07"), "row 3: found the image 'folder/07, a.png'"),
        (lambda rows: edit(rows, "b" * 64, "c" * 64), "row 2: found a row of another form or bundle"),
        (lambda rows: edit(rows, ",ok,", ",fine,"), "row 2: found a row of another form"),
        (lambda rows: edit(rows, ",ok,", ",ok,,"), "row 2: found a row of another form"),
        (lambda rows: edit(rows, '"folder/00, a.png",ok', '"folder/00, a.png"ok'), "row 2: found a broken row"),
        (lambda rows: rows.write_bytes(rows.read_bytes()[:-1] + b"\xff\n"), "row 5: found a broken row"),
        (lambda rows: rows.with_name("t.csv.json").unlink(), "without its card"),
        (lambda rows: rows.with_name("t.csv.json").write_text("{}"), "no card of a table"),
    ],
)  # fmt: skip
def test_changed_rows_are_refused_and_left_alone(tmp_path: Path, damage: Callable[[Path], object], found: str) -> None:
    rows = stop(tmp_path / "t.csv", 4)
    damage(rows)
    before = rows.read_bytes()
    with pytest.raises(TableError, match=found):
        write(tmp_path / "t.csv")
    assert rows.read_bytes() == before


def test_more_rows_than_images_are_refused(whole: Whole, tmp_path: Path) -> None:
    rows = stop(tmp_path / "t.csv", 4)
    rows.write_bytes(whole.table + whole.table.splitlines(keepends=True)[1])
    with pytest.raises(TableError, match="more rows than the 10 images"):
        write(tmp_path / "t.csv")


@pytest.mark.parametrize("kind", ["a stranger", "a folder", "changed"])
def test_a_table_that_is_there_is_not_written_over(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "t.csv"
    if kind == "a folder":
        out.mkdir()
    elif kind == "a stranger":
        out.write_text("mine")
    else:
        write(out)
        edit(out, "ok", "OK")
    with pytest.raises(TableError, match="changed after it was written" if kind == "changed" else "there already"):
        write(out)
    assert out.is_dir() or out.read_text()
    assert not list(tmp_path.glob("*.partial"))


def test_another_name_and_another_place_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"needed \.csv or \.parquet"):
        write(tmp_path / "t.xlsx")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(TableError, match="can't be written"):
        write(tmp_path / "file" / "t.csv")


def test_two_processes_do_not_write_one_table(tmp_path: Path) -> None:
    rows = stop(tmp_path / "t.csv", 4)
    with rows.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(TableError, match="another process"):
            write(tmp_path / "t.csv")
    assert write(tmp_path / "t.csv") == 4


class Killed(BaseException):
    """Stands for SIGKILL between two of the last steps; no code of ours catches it to go on."""


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("step", ["sha256_of_file", "write_file", "show_file", "unlink"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_any_of_the_last_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, step: str, when: str
) -> None:
    write(tmp_path / "whole" / f"t{suffix}")
    out = tmp_path / "killed" / f"t{suffix}"
    stop(out, N - 1)

    def breaking(whole_step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            if arguments and "partial-" in str(arguments[0]):
                return whole_step(*arguments, **options)
            if when == "after":
                whole_step(*arguments, **options)
            raise Killed

        return run

    with monkeypatch.context() as patch:
        if step == "unlink":
            patch.setattr(Path, step, breaking(Path.unlink))
        elif step == "write_file":  # the first call is the card of the run's beginning
            calls = iter([results.write_file, breaking(results.write_file)])
            patch.setattr(results, step, lambda *arguments: next(calls)(*arguments))
        else:
            patch.setattr(results, step, breaking(getattr(results, step)))
        with pytest.raises(Killed):
            write(out)
    assert write(out) in (N - 1, N)
    assert [path.name for path in sorted(out.parent.iterdir())] == [f"t{suffix}", f"t{suffix}.json"]
    for name in (f"t{suffix}", f"t{suffix}.json"):
        assert (out.parent / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_a_kill_left_of_a_card_is_removed(whole: Whole, tmp_path: Path) -> None:
    stop(tmp_path / "t.csv", 4)
    (tmp_path / ".t.csv.json.partial-a1b2").write_text("{")
    write(tmp_path / "t.csv")
    assert_whole(tmp_path / "t.csv", whole)


def test_parquet_has_the_rows_of_the_csv(whole: Whole, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow.parquet")
    write(tmp_path / "t.parquet")
    table = pyarrow.read_table(tmp_path / "t.parquet")
    expected = list(csv.DictReader(whole.table.decode().splitlines()))
    assert table.column_names == list(expected[0])
    for row, text in zip(table.to_pylist(), expected, strict=True):
        for name, value in row.items():
            if name.startswith("prob_"):
                assert (value is None) == (text[name] == "")
                assert value is None or np.float32(value) == np.float32(text[name])
            elif name.startswith("present_"):
                assert value == {"": None, "0": False, "1": True}[text[name]]
            elif name == "file_bytes":
                assert value == 1000
            else:
                assert (value or "") == text[name]
    assert TableCard.model_validate_json(table.schema.metadata[b"chexnet_deploy"]) == CARD
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["t.parquet", "t.parquet.json"]


def test_parquet_goes_on_too(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    write(tmp_path / "a" / "t.parquet")
    stop(tmp_path / "b" / "t.parquet", 4)
    assert write(tmp_path / "b" / "t.parquet") == 4
    for name in ("t.parquet", "t.parquet.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_without_pyarrow_parquet_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "chexnet_deploy.runtime.parquet", raising=False)
    monkeypatch.delattr("chexnet_deploy.runtime.parquet", raising=False)
    with pytest.raises(MissingPackageError, match=r"chexnet-deploy\[table\]"):
        write(tmp_path / "t.parquet")
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "t.csv")


@pytest.fixture(scope="module")
def folder(phantom_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty phantoms in two folders, among them three files that can't be read."""
    root = tmp_path_factory.mktemp("folder") / "radiographs"
    for place, image in enumerate(sorted((phantom_root / "images").iterdir())[:60]):
        target = root / ("early" if place < 30 else "late") / image.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if place % 20 == 7:
            target.write_bytes(image.read_bytes()[:-30])
        else:
            shutil.copy(image, target)
    (root / "readme.md").write_text("no image")
    return root


def test_predict_writes_a_folder_to_a_table(bundles: dict[str, Bundle], folder: Path, tmp_path: Path) -> None:
    bundle, out = bundles["fp32"], tmp_path / "t.csv"
    done = chexnet("predict", bundle.path, folder, "--out", out)
    assert done.returncode == 3, done.stderr  # done, but not for all
    assert "60 images, 3 quarantined" in done.stdout
    assert "3 of 60 images can't be read and are quarantined" in done.stderr
    assert "left out: 1" in done.stderr
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [row["image"] for row in rows] == sorted(str(p.relative_to(folder)) for p in folder.rglob("*.png"))
    assert [place for place, row in enumerate(rows) if row["status"] == "quarantined"] == [7, 27, 47]
    assert all("found a " in row["reason"] and str(tmp_path) not in row["reason"] for row in (rows[7], rows[27]))
    with Predictor.open(bundle.path, threads=1, provider="cpu") as predictor:
        for row in rows[5:7]:
            alone = predictor.predict(folder / row["image"])
            assert {name: np.float32(row[f"prob_{name}"]) for name in FINDINGS} == alone.probabilities
            assert {name: row[f"present_{name}"] == "1" for name in alone.present} == alone.present
    again = chexnet("predict", bundle.path, folder, "--out", out)
    assert (again.returncode, "already complete: 60 images, 3 quarantined" in again.stdout) == (3, True)
    labels = folder.parent / "labels.csv"  # one in three has each finding
    labels.write_text(
        "image,patient,Mass\n"
        + "".join(
            f"{row['image']},{int(Path(row['image']).name[:8])},{int(place % 3 == 0)}\n"
            for place, row in enumerate(rows)
        )
    )
    evaluated = chexnet("evaluate", "--predictions", out, "--labels", labels)
    assert evaluated.returncode == 0, evaluated.stderr
    assert "57 predicted images" in evaluated.stdout
    assert "3 images are left out: predict could not read them" in evaluated.stdout
    other = chexnet("predict", bundles["fp16"].path, folder, "--out", out)
    assert_one_line_error(other, 2, "begun with bundle", "another --out")


@pytest.mark.slow
def test_predict_killed_at_any_moment_goes_on_to_the_same_bytes(
    bundles: dict[str, Bundle], folder: Path, tmp_path: Path
) -> None:
    command = [*PREDICT, str(bundles["fp32"].path), str(folder), "--out"]
    whole, out = tmp_path / "whole" / "t.csv", tmp_path / "killed" / "t.csv"
    subprocess.run([*command, whole], capture_output=True, timeout=120)
    rows, chance = tmp_path / "killed" / "t.csv.partial", random.Random(3)
    n_killed, reached = 0, 0
    for lines in sorted(chance.sample(range(1, 60), 5)):
        with subprocess.Popen([*command, out], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and not (rows.exists() and rows.read_bytes().count(b"\n") > lines):
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
        n_killed += process.returncode == -signal.SIGKILL
        if rows.exists():
            assert rows.read_bytes().count(b"\n") >= reached  # nothing that was done is done again
            reached = rows.read_bytes().count(b"\n")
    assert n_killed >= 3
    assert subprocess.run([*command, out], capture_output=True, timeout=120).returncode == 3
    for name in ("t.csv", "t.csv.json"):
        assert (whole.parent / name).read_bytes() == (out.parent / name).read_bytes()
    assert not rows.exists()


def test_ctrl_c_says_how_to_go_on(bundles: dict[str, Bundle], folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "t.csv"
    command = [*PREDICT, str(bundles["fp32"].path), str(folder), "--out", out]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        rows = tmp_path / "t.csv.partial"
        while process.poll() is None and not (rows.exists() and rows.read_bytes().count(b"\n") > 3):
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=60)
    assert process.returncode in (130, 3), complaint  # 3 where it was quicker than the signal
    if process.returncode == 130:
        assert "interrupted; the same command goes on with" in complaint
        assert "Traceback" not in complaint
        assert rows.exists()
    assert chexnet("predict", bundles["fp32"].path, folder, "--out", out).returncode == 3


def test_a_full_disk_keeps_the_rows_that_are_done(bundles: dict[str, Bundle], folder: Path, tmp_path: Path) -> None:
    def limit_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write then fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))

    out = tmp_path / "t.csv"
    command = [*PREDICT, str(bundles["fp32"].path), str(folder), "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, preexec_fn=limit_files)
    assert_one_line_error(done, 2, "File too large", "Rows that are done are kept")
    rows = tmp_path / "t.csv.partial"
    assert rows.stat().st_size == 6000  # the last one is torn
    card = read_card(tmp_path / "t.csv.json")
    assert card is not None
    n_done, _, end = read_back(rows, card, sorted(str(p.relative_to(folder)) for p in folder.rglob("*.png")))
    assert 0 < n_done < 60
    assert end < 6000
    assert chexnet("predict", bundles["fp32"].path, folder, "--out", out).returncode == 3
    chexnet("predict", bundles["fp32"].path, folder, "--out", tmp_path / "whole.csv")
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_the_one_bad_file_that_is_given_is_an_error_and_leaves_nothing(
    bundles: dict[str, Bundle], folder: Path, tmp_path: Path
) -> None:
    bad = next(path for path in sorted(folder.rglob("*.png"))[7:8])
    done = chexnet("predict", bundles["fp32"].path, bad, "--out", tmp_path / "new" / "t.csv")
    assert_one_line_error(done, 2, bad.name, "Next:")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_bad_file_among_others_stops_nothing(bundles: dict[str, Bundle], folder: Path) -> None:
    images = sorted(folder.rglob("*.png"))[6:9]
    done = chexnet("predict", bundles["fp32"].path, *images)
    assert done.returncode == 3, done.stderr
    assert [line for line in done.stdout.splitlines() if not line.startswith(" ")] == [str(image) for image in images]
    assert f"  quarantined: {images[1]}: found" in done.stdout
    assert done.stdout.count("  Hernia") == 2
    as_json = json.loads(chexnet("predict", bundles["fp32"].path, *images, "--json").stdout)
    named = ["operating_points_from", "present", "probabilities"]
    assert [sorted(as_json[str(image)]) for image in images] == [named, ["quarantined"], named]


def test_predict_shows_the_operating_point_beside_each_probability(bundles: dict[str, Bundle], folder: Path) -> None:
    image = min(folder.rglob("*.png"))
    text = chexnet("predict", bundles["fp32"].path, image, "--threads", 1).stdout.splitlines()[1:]
    with Predictor.open(bundles["fp32"].path, threads=1, provider="cpu") as predictor:
        prediction = predictor.predict(image)
    assert len(text) == 14
    for line in text:
        name, probability, sign, point, *present = line.split()
        assert probability == f"{prediction.probabilities[name]:.4f}"
        assert (sign, point) == (">=" if prediction.present[name] else "<", "0.3000")
        assert present == (["present"] if prediction.present[name] else [])


def test_a_list_of_paths(bundles: dict[str, Bundle], folder: Path, tmp_path: Path) -> None:
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*.png"))[:3]]
    (folder / "some.txt").write_text("\n".join(names[::-1]))
    done = chexnet("predict", bundles["fp32"].path, folder / "some.txt", "--out", tmp_path / "t.csv")
    assert done.returncode == 0, done.stderr
    assert [row["image"] for row in csv.DictReader((tmp_path / "t.csv").read_text().splitlines())] == names[::-1]


def replace(out: Path, places: Sequence[int]) -> None:
    with open_table(out, CARD, NAMES) as table:
        table.replace({place: row_at(place, turn=1) for place in places})
        for place in range(table.n_done, N):
            table.add(row_at(place))


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("n", [4, None], ids=["begun", "whole"])
@pytest.mark.parametrize("places", [[0], [1, 3], [0, 1, 2, 3]])
def test_rows_of_changed_files_are_replaced_and_no_others(
    tmp_path: Path, whole: Whole, suffix: str, n: int | None, places: list[int]
) -> None:
    out = tmp_path / f"t{suffix}"
    stop(out, n) if n is not None else write(out)
    replace(out, places)
    expected = whole.table.splitlines(keepends=True)
    for place in places:
        expected[place + 1] = row_at(place, turn=1).line
    with open_table(out, CARD, NAMES) as table:
        assert list(table.contents()) == [FileContent(1000 + (i in places), f"{i:064x}") for i in range(N)]
        assert table.n_quarantined == sum(row.count(b",quarantined,") for row in expected)
        assert b"".join(row_bytes(fields) for fields in table._rows_read()) == b"".join(expected[1:])
    card = read_card(out.with_name(f"{out.name}.json"))
    assert card is not None
    assert card.table_sha256 == hashlib.sha256(out.read_bytes()).hexdigest()
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, f"{out.name}.json"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("step", ["replace", "unlink", "flock"])
@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_while_rows_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, step: str, nth: int, when: str
) -> None:
    """Whatever is left, the same run ends with the same bytes: nothing is lost but the rows of that moment."""
    for folder in ("whole", "killed"):
        write(tmp_path / folder / f"t{suffix}")
    replace(tmp_path / "whole" / f"t{suffix}", [2, 5])
    out, owner, calls = tmp_path / "killed" / f"t{suffix}", (fcntl if step == "flock" else Path), 0
    whole_step = getattr(owner, step)

    def breaking(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += "partial-" not in str(arguments[0])
        if calls == nth and when == "before":
            raise Killed
        answer = whole_step(*arguments, **options)
        if calls == nth:
            raise Killed
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(owner, step, breaking)
        try:
            replace(out, [2, 5])
        except Killed:
            pass
        else:
            assert calls < nth
    replace(out, [2, 5])
    for name in (f"t{suffix}", f"t{suffix}.json"):
        assert (out.parent / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert [path.name for path in sorted(out.parent.iterdir())] == [f"t{suffix}", f"t{suffix}.json"]


def test_what_is_replaced_is_nobody_elses(tmp_path: Path) -> None:
    write(tmp_path / "t.csv")
    with open_table(tmp_path / "t.csv", CARD, NAMES) as table:
        table.replace({0: row_at(0, turn=1)})
        with pytest.raises(TableError, match="another process"), open_table(tmp_path / "t.csv", CARD, NAMES):
            pass


class Predicted:
    """Stands for a bundle that was opened: answers with each file's first byte, and says what it was asked."""

    def __init__(self, images: ImageFiles) -> None:
        self.asked: list[int] = []
        self.images = images

    def __call__(self, bundle: object, images: ImageFiles, card: TableCard, places: Sequence[int]) -> Generator[Row]:
        self.asked += places
        for place in places:
            path = images.root / images.names[place]
            try:
                content = path.read_bytes()
            except OSError as err:
                yield row_of(card, images.names[place], FileAnswer(path, ImageError(f"{path}: {err.strerror}"), None))
                continue
            probabilities = dict.fromkeys(card.findings, content[0] / 256)
            answer = ImageError("damaged") if content == b"damaged" else Prediction(probabilities, {}, {})
            if isinstance(answer, Prediction):
                answer.present.update(dict.fromkeys(card.decided, False))
            yield row_of(card, images.names[place], FileAnswer(path, answer, FileContent.of(content)))


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[TableRun, list[int]]]:
    """Predict the folder `in`, whose files are a.png to f.png, into t.csv or t.parquet."""
    for name in "abcdef":
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{name}.png").write_bytes(name.encode() * 9)

    bundle = Bundle(tmp_path, manifest(), "b" * 64)

    def predict(suffix: str = ".csv") -> tuple[TableRun, list[int]]:
        images = find_images([tmp_path / "in"])
        predicted = Predicted(images)
        done = predict_table(
            bundle, images, tmp_path / f"t{suffix}", threads=1, provider="cpu",
            on_phase=lambda phase, done, total: None, elsewhere=predicted,
        )  # fmt: skip
        return done, predicted.asked

    return predict


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_changed_file_is_done_again_and_said(
    run: Callable[..., tuple[TableRun, list[int]]], tmp_path: Path, suffix: str
) -> None:
    first, asked = run(suffix)
    assert (first, asked) == (TableRun(6, 0, (), was_whole=False), [0, 1, 2, 3, 4, 5])
    assert run(suffix) == (TableRun(6, 0, (), was_whole=True), [])
    before = (tmp_path / f"t{suffix}").read_bytes()
    os.utime(tmp_path / "in" / "a.png")  # touched, and the same
    (tmp_path / "in" / "b.png").write_bytes(b"x" * 9)  # the same size
    (tmp_path / "in" / "e.png").write_bytes(b"y")
    assert run(suffix) == (TableRun(6, 0, ("b.png", "e.png"), was_whole=False), [1, 4])
    assert run(suffix) == (TableRun(6, 0, (), was_whole=True), [])
    (tmp_path / "in" / "b.png").write_bytes(b"b" * 9)
    (tmp_path / "in" / "e.png").write_bytes(b"e" * 9)
    run(suffix)
    assert (tmp_path / f"t{suffix}").read_bytes() == before  # as if nothing had been


def test_a_quarantined_file_is_tried_again_once_it_was_replaced(
    run: Callable[..., tuple[TableRun, list[int]]], tmp_path: Path
) -> None:
    (tmp_path / "in" / "c.png").write_bytes(b"damaged")
    (tmp_path / "in" / "d.png").unlink()
    (tmp_path / "in" / "d.png").symlink_to(tmp_path / "not there yet")
    assert run()[0].n_quarantined == 2
    # The damaged file is as it was; one that was not there is looked for each time.
    assert run() == (TableRun(6, 2, ("d.png",), was_whole=False), [3])
    (tmp_path / "in" / "c.png").write_bytes(b"c")
    (tmp_path / "not there yet").write_bytes(b"d")
    assert run() == (TableRun(6, 0, ("c.png", "d.png"), was_whole=False), [2, 3])
    assert run() == (TableRun(6, 0, (), was_whole=True), [])
    assert (tmp_path / "t.csv").read_text().count(",ok,") == 6


def test_a_file_that_changed_while_a_run_was_stopped(
    run: Callable[..., tuple[TableRun, list[int]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_add, n_added = Table.add, 0

    def stopping(table: Table, row: Row) -> None:
        nonlocal n_added
        n_added += 1
        if n_added == 4:
            raise KeyboardInterrupt
        whole_add(table, row)

    with monkeypatch.context() as patch:
        patch.setattr(Table, "add", stopping)
        with pytest.raises(KeyboardInterrupt):
            run()
    (tmp_path / "in" / "b.png").write_bytes(b"x")
    (tmp_path / "in" / "f.png").write_bytes(b"y")  # its turn hadn't come
    assert run() == (TableRun(6, 0, ("b.png",), was_whole=False), [1, 3, 4, 5])


def test_batches_that_share_a_changed_file_are_done_as_a_whole() -> None:
    assert _whole_batches([5, 6, 9], 4, 11) == [4, 5, 6, 7, 8, 9, 10]
    assert _whole_batches([0], 1, 3) == [0]
    assert _whole_batches([], 16, 3) == []


def test_pictures_and_a_table_are_made_apart(bundles: dict[str, Bundle], folder: Path, tmp_path: Path) -> None:
    done = chexnet("predict", bundles["fp32"].path, folder, "--out", tmp_path / "t.csv", "--cam", tmp_path / "cam")
    assert_one_line_error(done, 2, "--cam", "apart")


def test_a_table_is_of_the_backend_that_ran_and_not_of_auto(
    bundles: dict[str, Bundle], folder: Path, tmp_path: Path
) -> None:
    image = min(folder.rglob("*.png"))
    for provider in ("auto", "cpu"):
        done = chexnet(
            "predict", bundles["fp32"].path, image, "--out", tmp_path / f"{provider}.csv", "--provider", provider
        )
        assert done.returncode == 0, done.stderr
    cards = {name: read_card(tmp_path / f"{name}.csv.json") for name in ("auto", "cpu")}
    assert cards["auto"] is not None
    assert cards["cpu"] is not None
    assert cards["auto"].backend == resolve_provider("auto")
    assert cards["cpu"].backend == "cpu"


@pytest.mark.slow
def test_evaluate_reads_the_table(bundles: dict[str, Bundle], phantom_root: Path, tmp_path: Path) -> None:
    done = chexnet("predict", bundles["fp32"].path, phantom_root / "images", "--out", tmp_path / "t.csv")
    assert done.returncode == 0, done.stderr
    done = chexnet("evaluate", "--predictions", tmp_path / "t.csv", "--data", phantom_root, "--split", "test", "--json")
    assert done.returncode == 0, done.stderr
    theirs = json.loads(chexnet("evaluate", bundles["fp32"].path, "--data", phantom_root, "--json").stdout)
    ours = json.loads(done.stdout)
    assert ours["n_images"] == theirs["n_images"]
    for mine, bundle in zip(ours["findings"], theirs["findings"], strict=True):
        assert mine["auroc"] == pytest.approx(bundle["auroc"], abs=1e-3)
