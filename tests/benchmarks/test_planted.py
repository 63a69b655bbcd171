"""The gate catches what has gone wrong in the field, and lets the model itself pass."""

from pathlib import Path

import pytest

from benchmarks.int8.planted import Outcome, judge_all
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
def outcomes(bundles: dict[str, Bundle], images: LabelledImages) -> dict[str, Outcome]:
    return {outcome.name: outcome for outcome in judge_all(bundles["fp32"].path.parent, images)}


@pytest.mark.slow
def test_fp32_against_itself_passes(outcomes: dict[str, Outcome]) -> None:
    assert (outcomes["fp32"].verdict, outcomes["fp32"].reasons) == ("PASS", ())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "caught_by"),
    [
        ("int8, one layer's scale x 4", "AUROC difference"),
        ("int8, confidences squashed", "max_abs_probability_difference"),
        ("int8, classes rotated", "AUROC difference"),
        ("int8, noise by slot", "invariance: an image's probability moves by"),
    ],
)
def test_a_planted_failure_fails_and_the_gate_is_named(outcomes: dict[str, Outcome], name: str, caught_by: str) -> None:
    assert outcomes[name].verdict == "FAIL"
    assert any(caught_by in reason for reason in outcomes[name].reasons), outcomes[name].reasons


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
