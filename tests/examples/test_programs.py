"""Each program of examples/ does what its first sentence says, in at most 40 lines."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.rigs.synthetic_dicom import make_dicom
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.datasets.findings import FINDINGS
from tests.command_line import chexnet
from tests.foreign import write_contract, write_onnx

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_there_are_five_and_each_is_short() -> None:
    lines = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert len(lines) == 5
    assert max(lines.values()) <= 40, lines


@pytest.mark.slow
def test_export_and_prove(checkpoint_path: Path, phantom_root: Path, tmp_path: Path) -> None:
    done = run("export_and_prove.py", checkpoint_path, phantom_root, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    # Forty phantom patients are too few to prove parity.
    assert done.stdout.splitlines()[-1] == f"INCONCLUSIVE  {tmp_path}/out/bench/report.html"
    fp32, int8 = (Bundle.open(tmp_path / "out" / "bundles" / name) for name in ("fp32", "int8"))
    assert int8.manifest.ancestors == (fp32.id,)
    assert (tmp_path / "out" / "bench" / "report.html").is_file()


def test_embed(bundles: dict[str, Bundle], phantom_root: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "int8-cpu"
    shutil.copytree(bundles["int8-cpu"].path, bundle)
    (tmp_path / "trust.toml").write_text(chexnet("keygen", tmp_path / "key.pem").stdout)
    radiograph = sorted((phantom_root / "images").iterdir())[0]
    arguments = (bundle, tmp_path / "trust.toml")
    unsigned = run("embed.py", *arguments, radiograph, tmp_path / "out")
    assert (unsigned.returncode, unsigned.stderr[:16]) == (1, "out of service: ")
    chexnet("sign", bundle, "--key", tmp_path / "key.pem")
    done = run("embed.py", *arguments, radiograph, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    present = [line.split()[0] for line in done.stdout.splitlines() if line.endswith("  present")]
    assert [line.split()[0] for line in done.stdout.splitlines()] == [*FINDINGS]
    assert sorted(path.stem for path in (tmp_path / "out").iterdir()) == sorted(present) != []
    (tmp_path / "text.png").write_text("no image")
    refused = run("embed.py", *arguments, tmp_path / "text.png", tmp_path / "other")
    assert (refused.returncode, refused.stderr[:20]) == (1, "refused, unreadable:")


@pytest.mark.slow
def test_gate_in_ci(bundles: dict[str, Bundle], phantom_root: Path, tmp_path: Path) -> None:
    spec = (
        'description = "{}"\nprecision = "int8"\n[gate]\nauroc_margin = {{ default = 0.005 }}\n'
        'max_abs_probability_difference = {}\np999_abs_probability_difference = {}\nlatency = "not gated"\n'
    )
    for limit, code, start in ((1.0, 3, "::warning title=int8 INCONCLUSIVE::"), (1e-9, 1, "::error title=int8 FAIL::")):
        (tmp_path / f"{code}.toml").write_text(spec.format("limit", limit, limit))
        done = run("gate_in_ci.py", bundles["int8"].path, phantom_root, tmp_path / f"{code}.toml", tmp_path / f"{code}")
        assert done.returncode == code, done.stderr
        assert done.stdout.startswith(start)
    done = run("gate_in_ci.py", bundles["int8"].path, phantom_root, tmp_path / "none.toml", tmp_path / "none")
    assert (done.returncode, done.stdout[:9]) == (2, "::error::")


@pytest.mark.slow
def test_judge_foreign_onnx(bundles: dict[str, Bundle], phantom_root: Path, tmp_path: Path) -> None:
    model = write_onnx(tmp_path / "theirs.onnx", 2)
    contract = write_contract(tmp_path / "contract.toml", ("Effusion", "Mass"))
    done = run("judge_foreign_onnx.py", model, contract, bundles["fp32"].path, phantom_root, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    rows = [line.split(",") for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == ["finding", "Effusion", "Mass"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (effusion, _) = report["engines"][0]["parity"]["findings"]
    assert rows[1][1:4] == [
        str(effusion["n_positive_patients"]),
        f"{effusion['auroc_reference']:.4f}",
        f"{effusion['auroc_candidate']:.4f}",
    ]


def test_dicom_folder_to_table(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    folder, gray = tmp_path / "study", np.arange(64 * 64, dtype=np.uint32).reshape(64, 64).astype(np.uint8)
    folder.mkdir()
    (folder / "a.dcm").write_bytes(make_dicom(gray))
    (folder / "b.dcm").write_bytes(make_dicom(gray, {"PatientAge": "003Y", "PatientBirthDate": None}))
    (folder / "c.dcm").write_bytes(b"no image")
    Image.fromarray(gray).save(folder / "d.png")
    done = run("dicom_folder_to_table.py", bundles["int8-cpu"].path, folder, tmp_path / "findings.csv")
    assert done.returncode == 0, done.stderr
    with (tmp_path / "findings.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert [row["file"] for row in rows] == ["a.dcm", "b.dcm", "c.dcm", "d.png"]
    assert [row["refused"] for row in rows] == ["", "age", "unreadable", ""]
    assert [row["StudyInstanceUID"] for row in rows] == ["1.2.3.2", "1.2.3.2", "", ""]
    assert [row["StudyDate"] for row in rows[:2]] == ["20200102"] * 2
    assert all(rows[0][finding] == rows[3][finding] != "" for finding in FINDINGS)  # the same picture
    assert {rows[1][finding] for finding in FINDINGS} == {""}
