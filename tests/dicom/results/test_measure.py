"""`bench --dicom`: the times are those of the code that answers, and what can't be measured is refused."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread

from benchmarks.rigs.node_rig import write_radiograph
from benchmarks.rigs.synthetic_dicom import compress
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.dicom.results import measure, reporter
from chexnet_deploy.dicom.results.measure import DicomFolder
from chexnet_deploy.errors import ImageError
from chexnet_deploy.evaluation.dicom_times import STAGES, DicomTimes
from chexnet_deploy.evaluation.engines import Effort
from chexnet_deploy.images.dicom import decoder
from chexnet_deploy.images.dicom.process import DecodingProcess
from chexnet_deploy.images.preprocessing import Preprocessing, Reduction
from chexnet_deploy.runtime.sessions.open import open_session
from chexnet_deploy.runtime.sessions.ort import OrtSession
from tests.command_line import assert_one_line_error, chexnet
from tests.foreign import write_contract, write_onnx

J2K = "1.2.840.10008.1.2.4.90"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two uncompressed chests and one in JPEG 2000; a knee, a PNG and a text, which have no answer."""
    place = tmp_path_factory.mktemp("dicom")
    for name, seed in (("a", 1), ("b", 2)):
        write_radiograph(place / f"{name}.dcm", seed=seed, side_px=192)
    (place / "packed").mkdir()
    write_radiograph(place / "packed" / "c.dcm", seed=3, side_px=192)
    (place / "packed" / "c.dcm").write_bytes(compress((place / "packed" / "c.dcm").read_bytes(), J2K))
    write_radiograph(place / "knee.dcm", seed=4, body_part="KNEE")
    (place / "d.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (place / "e.txt").write_text("no image")
    return place


@pytest.fixture(autouse=True)
def _no_idling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "IDLE_S", 0.0)


def run(place: Path, bundle: Bundle, min_runs: int = 4) -> DicomTimes:
    session = open_session(bundle, provider="cpu")
    try:
        return DicomFolder.open(place).measure(bundle, session, Effort(min_runs, 0.0), None)
    finally:
        session.close()


def test_each_kind_is_measured_in_turn_and_what_has_no_answer_is_counted(
    bundles: dict[str, Bundle], folder: Path
) -> None:
    found = run(folder, bundles["fp32"])
    assert {each.kind: each.n_files for each in found.kinds} == {"uncompressed": 2, "jpeg2000": 1}
    assert found.refused == {"not-dicom": 1, "body-part": 1}
    for each in found.kinds:
        assert tuple(each.stages_ms) == tuple(each.after_idle_ms) == STAGES
        assert {len(values) for values in each.stages_ms.values()} == {4}
        assert {len(values) for values in each.after_idle_ms.values()} == {measure.IDLES}
        assert each.megapixels == pytest.approx(192 * 192 / 1e6)


def test_seconds_of_each_kind_are_a_least(bundles: dict[str, Bundle], folder: Path) -> None:
    session = open_session(bundles["fp32"], provider="cpu")
    found = DicomFolder.open(folder).measure(bundles["fp32"], session, Effort(1, 0.2), None)
    session.close()
    assert all(sum(map(sum, each.stages_ms.values())) >= 200.0 for each in found.kinds)


@pytest.mark.parametrize(
    ("stage", "owner", "name"),
    [
        ("header", decoder, "read_header"),
        ("decode", DecodingProcess, "decode"),
        ("resize", Preprocessing, "__call__"),
        ("model", OrtSession, "run"),
        ("report", reporter, "build_files"),
    ],
)
def test_what_takes_a_second_longer_shows_in_its_own_stage_alone(
    bundles: dict[str, Bundle], folder: Path, monkeypatch: pytest.MonkeyPatch, stage: str, owner: object, name: str
) -> None:
    now_s, whole = 0.0, getattr(owner, name)

    def slower(*arguments: Any, **options: Any) -> Any:
        nonlocal now_s
        now_s += 1.0
        return whole(*arguments, **options)

    monkeypatch.setattr(owner, name, slower)
    monkeypatch.setattr(measure, "perf_counter", lambda: now_s)
    (packed,) = run(folder / "packed", bundles["fp32"], min_runs=1).kinds
    assert packed.p50_ms == {**dict.fromkeys(STAGES, 0.0), stage: 1000.0, "total": 1000.0}


def test_idling_comes_before_each_kinds_image(
    bundles: dict[str, Bundle], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    idled: list[float] = []
    monkeypatch.setattr(measure, "IDLE_S", 7.0)
    monkeypatch.setattr(measure, "sleep", idled.append)
    assert run(folder, bundles["fp32"], min_runs=1).idle_s == 7.0
    assert idled == [7.0] * 2 * measure.IDLES


def test_jpeg_2000_that_is_decoded_smaller_is_a_kind_of_its_own(folder: Path, tmp_path: Path) -> None:
    packed, reduced = tmp_path / "c.dcm", Preprocessing(resize_px=32, jpeg2000=Reduction(halvings=1, max_gray_change=9))
    shutil.copy(folder / "packed" / "c.dcm", packed)
    # Without a window its gray levels depend on the whole picture, and it is decoded whole.
    assert set(DicomFolder.open(tmp_path)._by_kind(reduced)) == {"jpeg2000"}
    dataset = dcmread(packed)
    dataset.WindowCenter, dataset.WindowWidth = 2048, 4096
    dataset.save_as(packed)
    assert set(DicomFolder.open(tmp_path)._by_kind(reduced)) == {"jpeg2000-reduced"}
    assert set(DicomFolder.open(tmp_path)._by_kind(Preprocessing(resize_px=32))) == {"jpeg2000"}


@pytest.mark.parametrize("left", ["d.png", "knee.dcm"])
def test_a_folder_without_a_radiograph_that_is_answered_is_refused(
    bundles: dict[str, Bundle], folder: Path, tmp_path: Path, left: str
) -> None:
    shutil.copy(folder / left, tmp_path)
    with pytest.raises(
        ImageError, match=r"found no DICOM radiograph that can be answered .* needed at least one\. Next:"
    ):
        run(tmp_path, bundles["fp32"])


SPEC = """\
description = "of a scanner"
precision = "fp32"
[batch]
max = 2
[gate]
auroc_margin = { default = 0.5 }
max_abs_probability_difference = 1e-4
p999_abs_probability_difference = 1e-4
latency = "not gated"
dicom_p99_over_model_p50 = { uncompressed = 1.01, jpeg-ls = 5 }
"""
FEW = ("--min-runs", "2", "--min-duration-s", "0")


def test_bench_writes_the_stages_and_judges_them(bundles: dict[str, Bundle], folder: Path, tmp_path: Path) -> None:
    out, spec = tmp_path / "bench", tmp_path / "spec.toml"
    spec.write_text(SPEC)
    done = chexnet(
        "bench", "--engine", bundles["fp32"].path, "--dicom", folder, "--spec", spec, "--out", out, "--json", *FEW
    )
    assert done.returncode == 1, done.stderr
    report = json.loads((out / "report.json").read_text())
    assert json.loads(done.stdout) == report
    (engine,) = report["engines"]
    assert {each["kind"] for each in engine["dicom"]["kinds"]} == {"uncompressed", "jpeg2000"}
    assert any(reason.startswith("DICOM to report, uncompressed: p99 ") for reason in engine["reasons"])
    page = (out / "report.html").read_text()
    for words in ("From a DICOM file to its report", "jpeg2000, 0.0 MP", "not gated", "there was no such file"):
        assert words in page
    assert "body-part 1" in page


def test_what_is_no_bundle_and_what_is_no_folder_are_refused(
    bundles: dict[str, Bundle], folder: Path, tmp_path: Path
) -> None:
    model, contract = write_onnx(tmp_path / "net.onnx", 2), write_contract(tmp_path / "c.toml", ("Mass", "Edema"))
    out = tmp_path / "bench"
    arguments = ("bench", "--engine", bundles["fp32"].path, "--out", out, *FEW, "--dicom")
    assert_one_line_error(chexnet(*arguments, tmp_path / "nothing"), 2, "nothing", "Next:")
    (tmp_path / "empty").mkdir()
    assert_one_line_error(chexnet(*arguments, tmp_path / "empty"), 2, "empty", "found no file", "needed")
    foreign = ("--engine", model, "--contract", contract, "--reference", bundles["fp32"].path, "--spec", "fp32")
    assert_one_line_error(
        chexnet("bench", *foreign, "--out", out, *FEW, "--dicom", folder), 2, "is no bundle", "--dicom"
    )
    assert not out.exists()


def test_without_its_packages_it_says_which_to_install(
    bundles: dict[str, Bundle], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "highdicom", None)
    done = chexnet("bench", "--engine", bundles["fp32"].path, "--dicom", folder, "--out", tmp_path / "bench", *FEW)
    assert_one_line_error(done, 2, "highdicom", "chexnet-deploy[dicom-out]")
