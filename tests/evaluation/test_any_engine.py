"""Bundles, ONNX files and endpoints beside each other: one gate, one report, and the findings that all of them know."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.datasets.chestxray14 import ChestXray14
from chexnet_deploy.datasets.data_set import open_data
from chexnet_deploy.datasets.findings import FINDINGS
from chexnet_deploy.datasets.patients import PatientSet
from chexnet_deploy.errors import SpecError
from chexnet_deploy.evaluation.sources import say_who_is_known
from chexnet_deploy.export.from_torch import import_legacy
from chexnet_deploy.export.from_torch.checkpoint import read_checkpoint, write_checkpoint
from chexnet_deploy.export.from_torch.model import CheXNet
from chexnet_deploy.export.from_torch.to_onnx import export_onnx
from chexnet_deploy.images.preprocessing import Preprocessing
from chexnet_deploy.runtime.engine import find_engine
from chexnet_deploy.runtime.sessions.ort import load_onnx
from tests.command_line import assert_one_line_error, chexnet
from tests.conftest import CHECKOUT
from tests.foreign import serving, write_contract, write_onnx

Bench = Callable[..., dict]


@pytest.fixture
def bench(phantom_root: Path, tmp_path: Path) -> Bench:
    """Run bench with a spec that needs one positive patient; return its report."""

    def run(engine: object, reference: object, *words: object) -> dict:
        spec = (CHECKOUT / "engines" / "fp32.toml").read_text() + "min_positive_patients = 1\n"
        (tmp_path / "spec.toml").write_text(spec)
        out = tmp_path / f"bench-{len(list(tmp_path.iterdir()))}"
        quick = ("--min-runs", 1, "--min-duration-s", 0, "--threads", 1, "--no-html", "--spec", tmp_path / "spec.toml")
        done = chexnet(
            "bench", "--engine", engine, "--reference", reference, "--data", phantom_root, "--out", out, *words, *quick
        )
        assert done.returncode in (0, 1, 3), done.stderr
        report = json.loads((out / "report.json").read_text())
        assert done.returncode == {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}[report["verdict"]]
        return {**report, "out": out, "stdout": done.stdout}

    return run


def logits(report: dict, name: str) -> NDArray[np.float64]:
    with (report["out"] / f"logits-{name}.csv").open() as file:
        return np.array([row[1:] for row in csv.reader(file)][1:], np.float64)


def test_the_same_model_with_another_layout_range_and_score_passes(bench: Bench, tmp_path: Path) -> None:
    one = write_onnx(tmp_path / "one.onnx", 3, weight=4.0)
    # Its own gray is 0 to 255 with the channel last, and a sigmoid is inside.
    other = write_onnx(tmp_path / "other.onnx", 3, layout="NHWC", weight=4.0 / 255, tail="Sigmoid", batch=2)
    findings = ("Mass", "Edema", "Hernia")
    contract = write_contract(tmp_path / "one.toml", findings)
    changed = write_contract(tmp_path / "c.toml", findings, layout='"NHWC"', range="[0, 255]", values='"sigmoids"')
    changed.write_text(changed.read_text().replace('score = "logit"\n', ""))
    report = bench(other, one, "--contract", changed, "--reference-contract", contract)
    # Forty patients are too few for a PASS.
    assert (report["verdict"], report["findings"]) == ("INCONCLUSIVE", list(findings))
    (engine,) = report["engines"]
    assert engine["parity"]["max_abs_probability_difference"] < 1e-5
    assert engine["contract"]["input"]["layout"] == "NHWC"
    assert len({engine["bundle_id"], report["reference_id"]}) == 2
    assert engine["parity"]["findings"][0]["map_correlation_median"] is None


def test_another_model_fails_with_its_gates_named(bench: Bench, tmp_path: Path) -> None:
    files = [write_onnx(tmp_path / f"{seed}.onnx", 2, seed=seed) for seed in (0, 1)]
    report = bench(files[1], files[0], "--contract", write_contract(tmp_path / "c.toml", ("Mass", "Effusion")))
    assert report["verdict"] == "FAIL"
    assert any("AUROC difference" in reason for reason in report["engines"][0]["reasons"])
    assert any("max_abs_probability_difference" in reason for reason in report["engines"][0]["reasons"])


def test_findings_that_all_know_are_measured_and_the_others_named(bench: Bench, tmp_path: Path) -> None:
    file = write_onnx(tmp_path / "net.onnx", 4)
    # The same four outputs, called otherwise: "Mass" is the first of one and the last of the other.
    mine = write_contract(tmp_path / "mine.toml", ("Mass", "No Finding", "Edema", "Hernia"))
    theirs = write_contract(tmp_path / "theirs.toml", ("Edema", "Lung Lesion", "", "Mass"))
    report = bench(file, file, "--contract", theirs, "--reference-contract", mine)
    assert report["findings"] == ["Mass", "Edema"]
    assert [note for note in report["notes"] if not note.startswith("times: ")] == [
        "labels: not measured, as no engine knows them: Atelectasis, Cardiomegaly, Effusion, Infiltration, Nodule and 6 more.",
        "reference: not measured, as the labels or an engine lack them: No Finding, Hernia.",
        "net: not measured, as the labels or an engine lack them: Lung Lesion.",
    ]
    for note in report["notes"]:
        assert note in report["stdout"].replace("\n", " ")
    raw = load_onnx(file.read_bytes())
    ours, candidate = logits(report, "reference"), logits(report, "net")
    assert ours.shape == candidate.shape == (len(ours), 2)
    assert raw.get_outputs()[0].name == "y"
    np.testing.assert_array_less(0.0, np.abs(ours - candidate).max(axis=0))


def test_an_endpoint_gives_the_figures_of_the_file_behind_it(bench: Bench, phantom_root: Path, tmp_path: Path) -> None:
    file, contract = write_onnx(tmp_path / "net.onnx", 2), write_contract(tmp_path / "c.toml", ("Mass", "Effusion"))
    session = load_onnx(file.read_bytes())
    with serving(lambda x: session.run(None, {"x": x})[0], [-1, 1, 32, 32], 2) as server:
        report = bench(server.url, file, "--contract", contract)
        evaluated = [
            json.loads(chexnet("evaluate", place, "--contract", contract, "--data", phantom_root, "--json").stdout)
            for place in (file, server.url)
        ]
    assert report["verdict"] == "INCONCLUSIVE"  # forty patients are too few
    assert (report["engines"][0]["model_sha256"], report["engines"][0]["conv_types"]) == (None, {})
    np.testing.assert_array_equal(logits(report, "net"), logits(report, "reference"))
    assert evaluated[0]["findings"] == evaluated[1]["findings"]
    assert [each["mean_auroc"] is not None for each in evaluated] == [True, True]
    assert evaluated[1]["source"].startswith("endpoint net, with its contract id")
    assert evaluated[0]["inputs_sha256"].keys() >= {"net.onnx", "c.toml"}


def test_a_lying_endpoint_is_no_report(phantom_root: Path, tmp_path: Path) -> None:
    contract = write_contract(tmp_path / "c.toml", ("Mass", "Effusion"))
    rng = np.random.default_rng(0)
    with serving(lambda x: rng.normal(size=(len(x), 2)).astype(np.float32), [-1, 1, 32, 32], 2) as server:
        done = chexnet("evaluate", server.url, "--contract", contract, "--data", phantom_root, "--out", tmp_path / "e")
        assert_one_line_error(done, 2, server.url, "it answers otherwise", "needed the same answer")
    assert not (tmp_path / "e").exists()


def untrained(path: Path, parent: Path, findings: tuple[str, ...]) -> Path:
    """The test checkpoint with a head of other findings."""
    before = read_checkpoint(parent)
    model = CheXNet(len(findings))
    model.features.load_state_dict(before.model.features.state_dict())
    write_checkpoint(path, model, before.manifest.model_copy(update={"findings": findings, "operating_points": {}}))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("findings", "measured"),
    [((*FINDINGS[:13], "No Finding", "Hernia"), 14), (("Pneumonia",), 1)],
    ids=["15 with No Finding", "one"],
)
def test_bundles_of_other_findings(
    findings: tuple[str, ...], measured: int, bundles: dict[str, Bundle], checkpoint_path: Path, phantom_root: Path,
    bench: Bench, tmp_path: Path,
) -> None:  # fmt: skip
    bundle = export_onnx(untrained(tmp_path / "x.safetensors", checkpoint_path, findings), tmp_path / "fp32")
    report = bench(bundle.path, bundles["fp32"].path, "--provider", "cpu")
    assert len(report["findings"]) == measured
    assert "fp32: of other weights than the reference." in report["notes"]
    evaluated = json.loads(chexnet("evaluate", bundle.path, "--data", phantom_root, "--json").stdout)
    assert len(evaluated["findings"]) == measured
    assert any("No Finding" in note for note in evaluated["notes"]) == ("No Finding" in findings)


@pytest.mark.slow
def test_torchxrayvisions_18_outputs_end_to_end(
    checkpoint_path: Path, bundles: dict[str, Bundle], phantom_root: Path, bench: Bench, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import torch

    from chexnet_deploy.export.from_torch.legacy_forms import FORMS

    form = FORMS["torchxrayvision-all"]
    small = replace(form, preprocessing=Preprocessing(resize_px=32, mean=(0.5,) * 3, std=(0.5,) * 3))
    monkeypatch.setattr(import_legacy, "FORMS", {"torchxrayvision-all": small})
    model = CheXNet(18)
    model.features.load_state_dict(read_checkpoint(checkpoint_path).model.features.state_dict())
    weights = model.state_dict()
    weights["features.conv0.weight"] = weights["features.conv0.weight"].sum(dim=1, keepdim=True) / 1024
    torch.save(weights, tmp_path / "xrv.pt")
    for words in (
        ("import", tmp_path / "xrv.pt", "--out", tmp_path / "x.safetensors", "--form", "torchxrayvision-all"),
        (
            "export",
            tmp_path / "x.safetensors",
            "--out",
            tmp_path / "xrv",
            "--precision",
            "fp16",
            "--data",
            phantom_root,
        ),
    ):
        done = chexnet(*words)
        assert done.returncode == 0, done.stderr
    for name, reference in (("fp32", bundles["fp32"].path), ("fp16", tmp_path / "xrv" / "fp32")):
        done = chexnet(
            "bench", "--engine", tmp_path / "xrv" / name, "--reference", reference, "--data", phantom_root,
            "--out", tmp_path / name, "--min-runs", 1, "--min-duration-s", 0,
        )  # fmt: skip
        report = json.loads((tmp_path / name / "report.json").read_text())
        assert (done.returncode, len(report["findings"])) == (1 if name == "fp32" else 3, 14)
        assert any(
            "Lung Lesion, Fracture, Lung Opacity, Enlarged Cardiomediastinum" in note for note in report["notes"]
        )
    evaluated = json.loads(chexnet("evaluate", tmp_path / "xrv" / "fp16", "--data", phantom_root, "--json").stdout)
    assert (len(evaluated["findings"]), "Lung Lesion" in evaluated["notes"][0]) == (14, True)


@pytest.fixture(scope="module")
def real_small() -> tuple[Path, Path]:
    """Real images at 128 px, and other people's models of them."""
    shared = CHECKOUT.parent / "shared"
    data, models = shared / "chestxray14_128", shared / "models"
    if not data.is_dir() or not models.is_dir():
        pytest.skip("NOT RUN on other people's models: no shared/models and shared/chestxray14_128 beside the checkout")
    return data, models


@pytest.mark.slow
@pytest.mark.dataset
def test_somebody_elses_int8_beside_its_float_form(real_small: tuple[Path, Path], tmp_path: Path) -> None:
    data, models = real_small
    findings = (
        *("No Finding", "Infiltration", "Atelectasis", "Effusion", "Nodule", "Pneumothorax", "Mass", "Consolidation"),
        *("Pleural_Thickening", "Cardiomegaly", "Emphysema", "Fibrosis", "Edema", "Pneumonia", "Hernia"),
    )
    contract = write_contract(tmp_path / "c.toml", findings, size="224", range="[0, 1]\nmean = [0.485]\nstd = [0.229]")
    places = [models / f"mobilenetv3_nih_{name}.onnx" for name in ("int8", "fp32_rebuilt")]
    done = chexnet(
        "bench", "--engine", places[0], "--reference", places[1], "--contract", contract, "--spec", "int8",
        "--data", data, "--out", tmp_path / "bench", "--min-runs", 5, "--min-duration-s", 0,
    )  # fmt: skip
    report = json.loads((tmp_path / "bench" / "report.json").read_text())
    parity = report["engines"][0]["parity"]
    assert done.returncode == 1
    assert (parity["mean_auroc_candidate"], parity["mean_auroc_reference"]) == pytest.approx((0.734, 0.730), abs=6e-4)
    assert "Cardiomegaly: AUROC difference" in done.stdout
    assert "max_abs_probability_difference" in done.stdout
    contract.write_text(contract.read_text().replace('score = "logit"', 'score = "softmax"'))
    evaluated = json.loads(chexnet("evaluate", places[0], "--contract", contract, "--data", data, "--json").stdout)
    assert evaluated["mean_auroc"] == pytest.approx(0.728, abs=6e-4)


def test_an_engine_that_was_trained_on_these_patients_is_refused(
    bundles: dict[str, Bundle], phantom: ChestXray14, tmp_path: Path
) -> None:
    """Also beside a model that doesn't say whom it was trained on: it would look better than that one."""
    source = bundles["fp32"]
    trained_on = PatientSet.of([phantom.split("test")[0].patient])
    knowing = Bundle.write(
        tmp_path / "knowing",
        source.manifest.model_copy(update={"trained_on": trained_on}),
        source.read_model(),
        source.read_probe_bytes(),
    )
    file, contract = write_onnx(tmp_path / "net.onnx", 2), write_contract(tmp_path / "c.toml", ("Mass", "Edema"))
    done = chexnet(
        "bench", "--engine", knowing.path, "--reference", file, "--contract", contract, "--data", phantom.root,
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert_one_line_error(done, 2, "Found 1 of 40 patients that the model was trained on")


@pytest.mark.parametrize(
    "command",
    [
        ("bench", "--engine", "BUNDLE", "--out", "OUT"),
        ("evaluate", "BUNDLE", "--out", "OUT"),
        ("calibrate", "BUNDLE", "--sensitivity", "0.6"),
    ],
)
def test_images_that_set_the_ranges_are_refused(
    bundles: dict[str, Bundle], phantom: ChestXray14, tmp_path: Path, command: tuple[str, ...]
) -> None:
    """A table without the split that `export` had makes all of them test images."""
    images = {each.image: each.path for name in ("train", "test") for each in phantom.split(name)}
    table = tmp_path / "all.csv"
    table.write_text("image,Mass\n" + "".join(f"{path},{i % 2}\n" for i, path in enumerate(images.values())))
    places = {"BUNDLE": bundles["int8-cpu"].path, "OUT": tmp_path / "out"}
    done = chexnet(*(places.get(word, word) for word in command), "--data", table)
    assert_one_line_error(done, 2, f"Found 100 of {len(images)} images that set the model's int8 ranges", "Next:")


def test_the_report_says_that_no_image_set_the_ranges(bundles: dict[str, Bundle], phantom: ChestXray14) -> None:
    images = open_data(phantom.root).require("test")
    engines = [bundles[name] for name in ("fp32", "int8", "int8-cpu")]
    n = len(images.names)
    assert say_who_is_known(engines, images, "test") == (
        "The model doesn't say whom it was trained on: nothing shows that these 40 patients are new. "
        f"None of the {n} images is among the 100 that set int8's ranges."
    )
    last = engines.pop()
    assert last.manifest.calibration is not None
    silent = last.manifest.calibration.model_copy(update={"image_files": None})
    engines.append(Bundle(last.path, last.manifest.model_copy(update={"calibration": silent}), last.id))
    said = say_who_is_known(engines, images, "test")
    assert "int8: None of the" in said
    assert "int8-cpu: The model doesn't say which images set its int8 ranges" in said


def test_refusals_say_what_is_missing(bundles: dict[str, Bundle], phantom: ChestXray14, tmp_path: Path) -> None:
    file, contract = write_onnx(tmp_path / "net.onnx", 2), write_contract(tmp_path / "c.toml", ("Mass", "Edema"))
    strange = write_contract(tmp_path / "s.toml", ("Lung Lesion", "Fracture"))
    fp32, data, misspelt = bundles["fp32"].path, ("--data", phantom.root), tmp_path / "misspelt.toml"
    misspelt.write_text((CHECKOUT / "engines" / "fp32.toml").read_text().replace("0.001 }", "0.001, Hernya = 0.02 }"))
    as_bundle = ("--engine", fp32, "--reference", file)
    for words, found in (
        (("--engine", file, "--reference", fp32), "no contract; needed a TOML"),
        (("--engine", file, "--contract", contract), "found no --reference"),
        (("--engine", file, "--contract", contract, "--reference", fp32), "found no --spec"),
        (("--engine", fp32, "--contract", contract), "for bundles, which say what they take themselves"),
        (
            (*as_bundle, "--reference-contract", strange, *data),
            "no finding that all engines know (net: Lung Lesion, Fracture; ",
        ),
        (
            (*as_bundle, "--contract", contract, "--spec", misspelt),
            "an auroc_margin for Hernya, found in no model here",
        ),
        ((*as_bundle, "--contract", contract, "--trust", tmp_path / "t"), "t is missing"),
        (("--engine", tmp_path / "no.onnx", "--reference", fp32, "--contract", contract, "--spec", "fp32"), "no.onnx"),
        (("--engine", file, "--reference", fp32, "--contract", contract, "--spec", "l4-int8"), "runs on ONNX Runtime"),
        ((*as_bundle, "--contract", tmp_path / "no.toml"), "can't be read"),
    ):
        done = chexnet("bench", *words, "--out", tmp_path / "out")
        assert done.returncode == 2, words
        complaint = " ".join(done.stderr.split())
        assert any(each in complaint for each in found.split("|")), complaint
        assert not (tmp_path / "out").exists()


def test_a_batch_that_is_open_outside_alone_says_what_to_do(phantom_root: Path, tmp_path: Path) -> None:
    """torch.onnx.export of a model that calls view(1, -1) takes any batch, and fails on more than one image."""
    model = onnx.load(str(write_onnx(tmp_path / "net.onnx", 2)))
    flatten = next(node for node in model.graph.node if node.op_type == "Flatten")
    flatten.op_type = "Reshape"
    flatten.input.append("shape")
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 64]), "shape"))
    onnx.save(model, str(tmp_path / "net.onnx"))
    contract = write_contract(tmp_path / "c.toml", ("Mass", "Edema"))
    done = chexnet("evaluate", tmp_path / "net.onnx", "--contract", contract, "--data", phantom_root)
    assert_one_line_error(
        done, 2, "found no answer to a batch of 4, needed one. Export it with its batch open throughout"
    )


@pytest.mark.parametrize(
    ("changes", "replaced", "found"),
    [
        ({"channels": 3}, {}, "found an input of [?, 3, 32, 32], needed [?, 1, 32, 32]"),
        ({"layout": "NHWC"}, {}, "found an input of [?, 32, 32, 1]"),
        ({}, {"size": "64"}, "needed [?, 1, 64, 64]"),
        ({"n_outputs": 3}, {}, "found an answer of float32 [4, 3], needed floats [4, 2]"),
        ({"tail": "Sqrt"}, {}, "found NaN or infinity"),
        ({"tail": "Sigmoid"}, {}, "found answers of 0 to 1 alone to 78 images, needed logits"),
        ({"tail": "Softmax"}, {"score": '"softmax"'}, "found answers of 0 to 1 alone to 78 images, needed logits"),
        ({"tail": "Abs", "weight": 400.0}, {"values": '"sigmoids"'}, "needed 0 to 1"),
        ({"tail": "Sigmoid"}, {"values": '"softmax"'}, "needed 1, as the contract calls them a softmax"),
        ({}, {"layout": '"NCHW"\nname = "pixels"'}, "found inputs 'x', and 'pixels' in the contract"),
    ],
)
def test_a_file_that_is_not_its_contracts(
    changes: dict[str, object], replaced: dict[str, str], found: str, phantom_root: Path, tmp_path: Path
) -> None:
    options = {"n_outputs": 2, **changes}
    file = write_onnx(tmp_path / "net.onnx", **options)  # type: ignore[arg-type]
    contract = write_contract(tmp_path / "c.toml", ("Mass", "Edema"), **replaced)
    if "values" in replaced:
        contract.write_text(contract.read_text().replace('score = "logit"\n', ""))
    done = chexnet("evaluate", file, "--contract", contract, "--data", phantom_root)
    assert done.returncode == 2
    assert found in " ".join(done.stderr.split())


def test_a_checkpoint_is_sent_to_export(checkpoint_path: Path) -> None:
    with pytest.raises(
        SpecError, match=f"found {checkpoint_path}, a checkpoint; needed a bundle. Run `chexnet-deploy export"
    ):
        find_engine(checkpoint_path, None)
