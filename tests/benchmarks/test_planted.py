"""The gate catches what has gone wrong in the field, and lets the model itself pass."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.common import CHECKOUT, RESULTS
from benchmarks.int8.faults import FAULTS, Fault, slot_noise
from benchmarks.int8.planted import Judge, Results, markdown_table, search
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.datasets.chestxray14 import ChestXray14
from chexnet_deploy.datasets.labelled import LabelledImages
from chexnet_deploy.evaluation.engines import Effort, run_bench
from chexnet_deploy.evaluation.spec import read_spec
from chexnet_deploy.export.from_torch.to_onnx import export_onnx


@pytest.fixture(scope="module")
def images(phantom: ChestXray14, bundles: dict[str, Bundle]) -> LabelledImages:
    # All splits: the forty test patients are too few for any finding to be judged.
    radiographs = [radiograph for name in ("test", "val", "train") for radiograph in phantom.split(name)]
    return LabelledImages.of(radiographs, bundles["fp32"].manifest.findings)


@pytest.fixture(scope="module")
def judge(bundles: dict[str, Bundle], images: LabelledImages) -> Judge:
    return Judge.of(bundles["fp32"].path.parent, images)


def fault(name: str) -> Fault:
    (found,) = (each for each in FAULTS if each.name == name)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "found_by"),
    [
        ("classes rotated", 1.0, "AUROC of"),
        ("two classes swapped", 1.0, "AUROC of"),
        ("logits sharpened", -0.75, "max_abs_probability_difference"),
        ("one finding shifted", 1.0, "calibration_error_growth"),
        ("sigmoid twice", 1.0, "flip_share"),
        ("the answer of the image before", 0.5, "max_abs_probability_difference"),
        ("answers depend on the slot", 0.05, "invariance"),
        ("scale of an activation, late", 3.0, "logit_noise_share"),
        ("BGR for RGB", 1.0, "p999_abs_probability_difference"),
        ("display function", 1.0, "max_abs_probability_difference"),
    ],
)
def test_a_planted_fault_fails_and_the_gate_is_named(judge: Judge, name: str, size: float, found_by: str) -> None:
    said = judge.plant(fault(name), size)
    assert said.verdict == "FAIL"
    assert any(found_by in each for each in said.found_by), said


@pytest.mark.slow
def test_the_smallest_size_is_searched_by_halves(judge: Judge) -> None:
    # Alone the slot moves a probability near one half by a quarter of 15 slots' logits: 0.02 is reached at 0.0053.
    outcome = search(judge, Fault("slot", "logits a slot", 0.02, "fp16", in_graph=slot_noise))
    assert [each.size for each in outcome.tried] == [0.02 / 2**i for i in range(len(outcome.tried))]
    assert all(each.verdict == "FAIL" for each in outcome.tried[:-1])
    assert outcome.smallest_found == min(each.size for each in outcome.tried if each.verdict == "FAIL")
    assert outcome.largest_missed == max((each.size for each in outcome.tried if each.verdict != "FAIL"), default=None)


def test_the_table_is_made_from_the_committed_results() -> None:
    results = Results.model_validate_json((RESULTS / "planted-cpu.json").read_text())
    readme = (CHECKOUT / "engines" / "README.md").read_text()
    table = readme.split("<!-- python -m benchmarks.int8.planted -->\n")[1].split("<!-- end -->")[0]
    assert table.strip() == markdown_table(results)


def test_a_fault_of_size_0_is_none() -> None:
    logits = np.random.default_rng(0).normal(size=(40, 14)).astype(np.float32)
    for each in FAULTS:
        if each.in_answers is not None and not each.is_whole:
            assert np.array_equal(each.in_answers(logits, 0.0), logits), each.name


def test_a_re_export_is_the_same_bundle_and_passes(
    bundles: dict[str, Bundle], checkpoint_path: Path, images: LabelledImages, tmp_path: Path
) -> None:
    again = export_onnx(checkpoint_path, tmp_path / "again")
    assert again.id == bundles["fp32"].id
    effort = Effort(min_runs=1, min_duration_s=0.0)
    # Exactly, so both by the same backend: the reference always runs on ONNX Runtime.
    run = run_bench([(again, read_spec("fp32"))], bundles["fp32"], images, data="", effort=effort, provider="cpu")
    assert run.report.verdict == "PASS"
    assert all(finding.difference == 0.0 for finding in run.report.engines[0].parity.findings)  # type: ignore[union-attr]
