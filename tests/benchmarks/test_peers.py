"""The arithmetic, tables and figures of the int8 benchmarks; what they measure is in benchmarks/results."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from benchmarks.cpu.peers_engines import Engine, time_in_turns
from benchmarks.cpu.peers_models import published_order, torch_logits
from benchmarks.cpu.peers_page import OURS_INT8, Results, Row, draw, markdown_table, times_faster
from benchmarks.int8.accuracy import Accuracy, Against, signal_db
from benchmarks.int8.quantisers import Results as QuantiserResults
from benchmarks.int8.quantisers import Row as QuantiserRow
from benchmarks.int8.quantisers import markdown_table as quantisers_table
from benchmarks.int8.recipes import StaticOpenvino, without_equalising, without_gptq
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.probe import draw_probe_pixels
from chexnet_deploy.evaluation.machine import Machine
from chexnet_deploy.export.from_torch.checkpoint import read_checkpoint
from chexnet_deploy.export.from_torch.model import DeployGraph
from chexnet_deploy.export.quantize.graph_edits import weights_of
from chexnet_deploy.export.quantize.qdq import convolutions
from chexnet_deploy.export.quantize.variants import Calibrated, Prepared, calibrate, choose_integers
from chexnet_deploy.images.preprocessing import Pixels
from chexnet_deploy.runtime.sessions.base import run_in_batches
from chexnet_deploy.runtime.sessions.ort import OrtSession

pytestmark = pytest.mark.slow

MACHINE = Machine(processor="a processor", cores=2, system="Linux", packages={})
SLIGHT = Accuracy(
    mean_auroc=0.7495,
    mean_auroc_change=-0.0005,
    worst_finding="Mass",
    worst_auroc_change=-0.002,
    max_abs_probability_difference=0.0123,
    flips_share=0.0125,
    noise_mean=0.02,
    noise_worst=0.031,
    signal_db=34.04,
)
OURS = Row(engine=OURS_INT8, accuracy=SLIGHT, ms_per_image={1: (2.0, 4.0, 3.0), 16: (1.0, 1.0)})
TORCH = Row(engine="torch, eager", accuracy=None, ms_per_image={1: (10.0, 12.0, 9.0), 16: (8.0, 6.0)})
PEER = Row(engine="a peer", accuracy=SLIGHT, ms_per_image={1: (5.0, 5.0, 5.0), 16: (2.0, 2.0)})


@pytest.fixture
def results() -> Results:
    return Results(
        machine=MACHINE,
        packages={"openvino": "2026.4.1"},
        resize_px=224,
        threads=2,
        n_calibration_images=256,
        n_test_images=400,
        fp32_mean_auroc=0.75,
        nncf_with_open_batch=0.9,
        rows=(
            TORCH,
            Row(engine="torch.compile", accuracy=None, ms_per_image={}, note="does not compile here"),
            PEER,
            OURS,
        ),
    )


@pytest.fixture(scope="module")
def pixels() -> Pixels:
    return draw_probe_pixels(32)


@pytest.fixture(scope="module")
def calibrated(bundles: dict[str, Bundle], pixels: Pixels) -> Calibrated:
    return calibrate(onnx.load_from_string(bundles["fp32"].read_model()), "cpu", pixels)


@pytest.fixture(scope="module")
def usual(calibrated: Calibrated) -> Prepared:
    return choose_integers(calibrated)


def weight_name(calibrated: Calibrated, conv: str) -> str:
    return str(next(node.input[1] for node in convolutions(calibrated.graph) if conv in node.name))


def test_a_ratio_is_the_median_of_the_rounds_own_ratios() -> None:
    # 10/2, 12/4, 9/3: not 10/3, the ratio of the medians.
    assert times_faster(OURS, TORCH, 1) == 3.0
    assert times_faster(OURS, TORCH, 16) == 7.0
    assert times_faster(OURS, TORCH, 4) is None


def test_the_table_says_speed_beside_accuracy_and_what_did_not_run(results: Results) -> None:
    table = markdown_table(results)
    assert "| torch, eager | 10.0 (least 9.0) | 3.00 x | 7.0 (least 6.0) | 7.00 x | the reference |  |  |" in table
    assert "| torch.compile | does not compile here | | | | | | |" in table
    assert "| ours, int8 | 3.0 (least 2.0) |  | 1.0 (least 1.0) |  | -0.0005 | 0.0123 | 2 % (3.1 %) |" in table
    assert "(logit noise 90 %)" in table
    assert "AVX2" not in table
    assert "without VNNI" in markdown_table(results.model_copy(update={"avx2": (PEER, OURS)}))


def test_results_survive_json(results: Results) -> None:
    assert Results.model_validate_json(results.model_dump_json()) == results


def test_the_figure_names_every_engine_that_has_an_accuracy(results: Results, tmp_path: Path) -> None:
    import matplotlib as mpl

    with mpl.rc_context({"svg.fonttype": "none"}):
        draw(results, tmp_path / "peers.svg")
    svg = (tmp_path / "peers.svg").read_text()
    assert svg.count("a peer") == svg.count(OURS_INT8) == 2  # one for each batch size
    assert "torch, eager" not in svg


def test_engines_take_turns_and_each_is_run_once_untimed() -> None:
    seen: list[tuple[str, int]] = []
    pixels = np.zeros((40, 1, 32, 32), np.uint8)
    engines = [
        Engine(name, {batch: lambda part, name=name: seen.append((name, len(part))) for batch in (1, 16)})  # type: ignore[misc]
        for name in "ab"
    ]
    samples = time_in_turns([*engines, Engine("absent", {})], pixels, {1: 8, 16: 3}, settle_s=0.0)
    turns = [(seen[i], seen[i + 1]) for i in range(0, len(seen), 2)]
    assert all(untimed == timed for untimed, timed in turns)
    rounds = [(turns[i][0][0], turns[i + 1][0][0]) for i in range(0, len(turns), 2)]
    assert set(rounds) == {("a", "b"), ("b", "a")}  # nobody always follows the same one
    assert [{batch: len(times) for batch, times in each.items()} for each in samples] == [{1: 8, 16: 3}] * 2 + [{}]


def test_the_published_order_is_the_same_network(checkpoint_path: Path, pixels: Pixels) -> None:
    checkpoint = read_checkpoint(checkpoint_path)
    published = published_order(checkpoint.model)
    names = [
        [name for name, _ in model.features.transition1.named_children()] for model in (published, checkpoint.model)
    ]
    assert names == [["norm", "relu", "conv", "pool"], ["norm", "relu", "pool", "conv"]]
    theirs, ours = (
        torch_logits(DeployGraph(model, checkpoint.manifest.preprocessing).eval(), pixels)
        for model in (published, checkpoint.model)
    )
    np.testing.assert_allclose(theirs, ours, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(published.parameters(), checkpoint.model.parameters(), strict=True))


def test_openvino_with_a_fixed_batch_answers_a_batch_that_is_not_full(
    bundles: dict[str, Bundle], pixels: Pixels
) -> None:
    model = bundles["fp32"].read_model()
    fixed = StaticOpenvino(model, 32, batch=8, piece=4, streams=2, threads=2)
    expected = run_in_batches(OrtSession(model, 32), pixels[:11])[0]
    np.testing.assert_allclose(fixed.answer(pixels[:11]), expected, atol=1e-4)


def test_without_gptq_each_weight_is_rounded_to_the_nearest(calibrated: Calibrated, usual: Prepared) -> None:
    plain = choose_integers(without_gptq(calibrated))
    name = weight_name(calibrated, "denselayer2/conv1")
    how = plain.weights[name]
    weight = weights_of(plain.graph)[name].astype(np.float64)
    nearest = np.rint(weight / np.asarray(how.scale, np.float64).reshape(-1, 1, 1, 1))
    assert how.steps is not None
    # All but those that two neighbours share 16 bits with.
    assert (how.steps == nearest).mean() > 0.99
    learned = usual.weights[name].steps
    assert learned is not None
    assert (learned != how.steps).mean() > 0.05


def test_without_equalising_every_channel_keeps_its_size(calibrated: Calibrated, usual: Prepared) -> None:
    flat = without_equalising(calibrated)
    assert all(np.ptp(values) == 0.0 for values in flat.seen.high.values())
    name = weight_name(calibrated, "denselayer2/conv1")
    before, after = weights_of(calibrated.graph)[name], weights_of(choose_integers(flat).graph)[name]
    np.testing.assert_array_equal(before, after)
    assert not np.array_equal(before, weights_of(usual.graph)[name])


def test_signal_in_decibels() -> None:
    reference = np.array([[1.0, 11.0], [-1.0, 9.0]], np.float32)  # variance 1 within each finding
    assert signal_db(reference, reference + np.float32(0.1)) == pytest.approx(20.0, abs=1e-4)
    assert signal_db(reference, reference) is None


def test_the_table_of_recipes_spans_the_draws_and_names_what_was_not_measured() -> None:
    def row(name: str, noise: float) -> QuantiserRow:
        found = SLIGHT.model_copy(update={"noise_mean": noise, "worst_finding": None, "worst_auroc_change": None})
        return QuantiserRow(recipe=name, runs_in="OpenVINO", n_calibration_images=64, seconds=1.0, accuracy=found)

    against = Against(ours="ours", mean_difference=0.001, low=-0.002, high=0.004, n_not_inferior=12, n_assessable=13)
    results = QuantiserResults(
        machine=MACHINE,
        packages={},
        resize_px=64,
        n_test_images=700,
        n_test_patients=300,
        fp32_mean_auroc=0.8,
        rows=(
            QuantiserRow(
                recipe="x", runs_in="y", n_calibration_images=9, seconds=1.0, accuracy=SLIGHT, against=against
            ),
            QuantiserRow(recipe="gone", runs_in="y", n_calibration_images=9, why_not="it failed"),
            row("ours, draw 1", 0.01),
            row("ours, draw 2", 0.03),
        ),
    )
    table = quantisers_table(results)
    assert (
        "| x | y | -0.0005 | Mass -0.0020 | 0.012 | 1.25 % | 2.0 % (3.1 %) | 34.0 dB | +0.0010 (-0.0020 to +0.0040) | 12 of 13 |"
        in table
    )
    assert "| gone | y | not measured: it failed |" in table
    assert "| ours, 2 random draws | OpenVINO | -0.0005 to -0.0005 | none |" in table
    assert "1.0 to 3.0 % (3.1 to 3.1 %)" in table
