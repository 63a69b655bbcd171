import argparse
import json
import os
import pickle
import re
import runpy
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from datetime import datetime
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from chexnet_deploy.bundle.probe import draw_probe_pixels
from chexnet_deploy.datasets.findings import FINDINGS
from chexnet_deploy.errors import CheckpointError
from chexnet_deploy.export.from_torch import import_legacy as legacy
from chexnet_deploy.export.from_torch import legacy_file
from chexnet_deploy.export.from_torch.checkpoint import read_checkpoint
from chexnet_deploy.export.from_torch.import_legacy import import_legacy, load_imagenet_backbone, read_findings
from chexnet_deploy.export.from_torch.legacy_forms import FORMS, LegacyForm
from chexnet_deploy.export.from_torch.model import CheXNet, Normalise
from chexnet_deploy.files import sha256_hex
from chexnet_deploy.images.preprocessing import Preprocessing

Weights = dict[str, torch.Tensor]


class Evil:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.canary),)


class Named:
    """Pickled as a call of what it is given."""

    def __init__(self, call: Callable[..., object]) -> None:
        self.call = call

    def __reduce__(self) -> tuple[object, ...]:
        return self.call, ()


class Settings(dict):  # type: ignore[type-arg]
    """A dict with attributes, as EasyDict and Lightning's AttributeDict are."""


class Phase(Enum):
    TRAIN = 1


class Canary:
    """Would tell if a file's reader made one."""

    made = False

    def __init__(self) -> None:
        self.name = "x"

    def __setstate__(self, state: object) -> None:
        Canary.made = True


@pytest.fixture(scope="module")
def ours(checkpoint_path: Path) -> Weights:
    """A CheXNet's weights by our names, which are torchvision's; do not change them in place."""
    return load_file(checkpoint_path)


def as_torch_03(weights: Weights, prefix: str) -> Weights:
    """Name weights as arnoweng's and zoogzog's files do: module.densenet121.….denselayer1.norm.1.bias, no counters."""
    old = {}
    for name, tensor in weights.items():
        if name.endswith("num_batches_tracked"):
            continue
        dotted = re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", name)
        old[prefix + dotted.replace("classifier.", "classifier.0.")] = tensor
    return OrderedDict(old)


def save(path: Path, content: object, *, is_zip: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    return path


def refusal(path: Path, form: str | None = "arnoweng", findings: tuple[str, ...] | None = None) -> str:
    out = path.parent / "refused.safetensors"
    with pytest.raises(CheckpointError) as caught:
        import_legacy(path, out, form=form, findings=findings)
    assert not out.exists()
    assert str(path) in str(caught.value)
    return str(caught.value)


def logits_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(images)


def assert_same_weights(imported: Weights, ours: Weights) -> None:
    assert imported.keys() == ours.keys()
    for name, tensor in ours.items():
        if name.endswith("num_batches_tracked"):
            assert imported[name].dtype == torch.int64
        else:
            assert torch.equal(imported[name], tensor), name


def test_the_conversion_by_hand() -> None:
    assert as_torch_03(
        {"features.denseblock1.denselayer1.norm1.bias": torch.zeros(1)}, "module.densenet121."
    ).keys() == {
        "module.densenet121.features.denseblock1.denselayer1.norm.1.bias"  # as in zoogzog/chexnet, issue 11
    }
    old = {
        "module.densenet121.features.denseblock1.denselayer1.norm.1.bias": torch.tensor(1.0),
        "module.densenet121.features.transition1.conv.weight": torch.tensor(2.0),
        "denseblock4.denselayer16.conv.2.weight": torch.tensor(3.0),
        "model.classifier.0.bias": torch.tensor(4.0),
        "classifier.weight": torch.tensor(5.0),
        "stranger.norm.1.weight": torch.tensor(6.0),
    }
    new, _ = legacy._rename(Path("x"), old)
    assert {name: float(tensor) for name, tensor in new.items()} == {
        "features.denseblock1.denselayer1.norm1.bias": 1.0,
        "features.transition1.conv.weight": 2.0,
        "features.denseblock4.denselayer16.conv2.weight": 3.0,
        "classifier.bias": 4.0,
        "classifier.weight": 5.0,
        "stranger.norm.1.weight": 6.0,
    }


@pytest.mark.parametrize(
    ("form", "wrap", "is_zip"),
    [
        # Not a zip: what torch.save wrote before 1.6. Adam's state, the epoch and the loss lie beside the weights.
        (
            "arnoweng",
            lambda w: {"state_dict": as_torch_03(w, "module.densenet121."), "epoch": 9, "best_loss": 0.1},
            False,
        ),
        ("zoogzog", lambda w: {"state_dict": as_torch_03(w, "module.densenet121."), "optimizer": {"state": {}}}, True),
        ("jrzech", lambda w: {re.sub("^classifier", "classifier.0", name): tensor for name, tensor in w.items()}, True),
    ],
)
def test_each_form_gives_our_weights_and_logits(
    ours: Weights,
    checkpoint_path: Path,
    tmp_path: Path,
    form: str,
    wrap: Callable[[Weights], dict[str, object]],
    is_zip: bool,
) -> None:
    path = save(tmp_path / "model.pth.tar", wrap(ours), is_zip=is_zip)
    made = import_legacy(path, tmp_path / "out.safetensors", form=form)
    again = read_checkpoint(tmp_path / "out.safetensors")
    assert_same_weights(again.model.state_dict(), ours)
    images = Normalise(Preprocessing())(torch.from_numpy(draw_probe_pixels(32)[:4]))
    assert torch.equal(logits_of(again.model, images), logits_of(read_checkpoint(checkpoint_path).model, images))
    manifest = again.manifest
    assert manifest.findings == FINDINGS
    assert (manifest.trained_on, manifest.split_sha256) == (None, None)
    assert (manifest.operating_points, manifest.metrics) == ({}, {})
    assert manifest.recipe == {
        "imported_from": form,
        "sha256": sha256_hex(path.read_bytes()),
        "notes": list(made.notes),
    }
    words = " ".join(made.notes)
    assert "logits are the Linear's output" in words
    assert ("num_batches_tracked" in words) is (form != "jrzech")
    assert ("not the published evaluation" in words) is (form != "jrzech")
    assert "official test" in words  # whom it was trained on
    assert again.sha256 == made.checkpoint.sha256


def test_torchxrayvision_answers_as_one_channel_in_its_range(ours: Weights, tmp_path: Path) -> None:
    theirs = CheXNet(18)
    theirs.features.conv0 = nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)
    weights = {name: tensor for name, tensor in ours.items() if not name.startswith("classifier")}
    weights["features.conv0.weight"] = ours["features.conv0.weight"].sum(1, keepdim=True) / 1024
    weights["classifier.weight"] = ours["classifier.weight"].repeat(2, 1)[:18]
    weights["classifier.bias"] = torch.linspace(-1, 1, 18)
    theirs.load_state_dict(weights)
    made = import_legacy(
        save(tmp_path / "x.pt", weights), tmp_path / "out.safetensors", form="torchxrayvision-all"
    ).checkpoint
    assert made.manifest.findings[:3] == ("Atelectasis", "Consolidation", "Infiltration")
    assert len(made.manifest.findings) == 18
    assert set(FINDINGS) <= set(made.manifest.findings)
    pixels = torch.from_numpy(draw_probe_pixels(32)[:6])
    in_their_range = (2 * pixels.float() / 255 - 1) * 1024  # torchxrayvision.datasets.normalize
    expected = logits_of(theirs, in_their_range)
    logits = logits_of(made.model, Normalise(made.manifest.preprocessing)(pixels))
    assert expected.std(dim=0).min() > 1e-4  # the images get different answers
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def beside(name: str) -> object:
    """What ordinary training scripts save beside the weights."""
    return {
        "a NumPy scalar": np.float64(0.841),
        "NumPy scalars in a list": [np.float32(0.5), np.int64(3)],
        "a NumPy array": np.arange(3.0),
        "a Namespace": argparse.Namespace(lr=np.float32(1e-4), out=Path("runs"), device=torch.device("cpu")),
        "a defaultdict": defaultdict(list, loss=[0.5]),
        "a deque": deque([1.0, 2.0], maxlen=5),
        "a dict with attributes": Settings(lr=0.1),
        "a date": datetime(2018, 1, 2),
        "an enum": Phase.TRAIN,
        "an optimiser": torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1),
        "a criterion": nn.BCELoss(),
        "the model too": nn.Sequential(nn.Linear(2, 2)),
        "an object": Canary(),
    }[name]


@pytest.mark.parametrize(
    ("name", "class_name"),
    [
        ("a NumPy scalar", "numpy.dtype"),
        ("NumPy scalars in a list", "numpy.dtype"),
        ("a NumPy array", "numpy.ndarray"),
        ("a Namespace", "argparse.Namespace"),
        ("a defaultdict", "collections.defaultdict"),
        ("a deque", "collections.deque"),
        ("a dict with attributes", "Settings"),
        ("a date", "datetime.datetime"),
        ("an enum", "Phase"),
        ("an optimiser", "torch.optim.sgd.SGD"),
        ("an object", "Canary"),
        ("a criterion", "torch.nn.modules.loss.BCELoss"),
        ("the model too", "torch.nn.modules.linear.Linear"),
    ],
)
@pytest.mark.parametrize("is_zip", [True, False])
def test_what_lies_beside_the_weights_is_not_loaded(tmp_path: Path, name: str, class_name: str, is_zip: bool) -> None:
    weights = {"features.conv0.weight": torch.arange(3.0)}
    path = save(tmp_path / "x.pt", {"best": beside(name), "state_dict": weights}, is_zip=is_zip)
    if isinstance(beside(name), nn.Module) and not is_zip:
        assert "holds a pickled model" in refusal(path)  # torch before 1.6 wrote each module's source code too
        return
    found, notes = legacy_file.find_weights(path, path.read_bytes())
    assert list(found) == ["features.conv0.weight"]
    assert torch.equal(found["features.conv0.weight"], torch.arange(3.0))
    (note,) = notes
    assert note.startswith("beside the weights lie objects that were not loaded: ")
    assert class_name in note
    assert not Canary.made


def test_a_namespace_and_a_score_beside_the_weights_are_imported(ours: Weights, tmp_path: Path) -> None:
    content = {"args": beside("a Namespace"), "best": np.float64(0.84), "state_dict": ours}
    made = import_legacy(save(tmp_path / "x.pt", content), tmp_path / "out.safetensors", form="jrzech")
    assert_same_weights(made.checkpoint.model.state_dict(), ours)
    assert "not loaded: argparse.Namespace, numpy" in " ".join(made.notes)


@pytest.mark.parametrize(
    "nest",
    [
        lambda w: {"net": w, "acc": 0.9},
        lambda w: {"checkpoint": {"model": w}},
        lambda w: {"model": w, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
        lambda w: {"weights": w, "metrics": {"auroc": torch.tensor(0.8)}},
    ],
)
def test_weights_are_found_by_their_names(tmp_path: Path, nest: Callable[[object], object]) -> None:
    weights = {"module.features.conv0.weight": torch.zeros(1)}
    path = save(tmp_path / "x.pt", nest(weights))
    assert legacy_file.find_weights(path, path.read_bytes())[0].keys() == weights.keys()


def test_of_several_models_none_is_chosen(tmp_path: Path) -> None:
    weights = {"features.conv0.weight": torch.zeros(1)}
    message = refusal(save(tmp_path / "x.pt", {"state_dict": weights, "ema": dict(weights)}))
    assert "holds 2 models: ['state_dict'], ['ema']" in message
    assert "torch.load(FILE, weights_only=False)['state_dict'], 'weights.pth')" in message


@pytest.mark.parametrize(
    ("rename", "omitted"),
    [
        (lambda name: f"_orig_mod.{name}", "_orig_mod."),
        (lambda name: f"module._orig_mod.{name}", "_orig_mod., module."),
        (lambda name: f"_orig_mod.module.{name}", "_orig_mod., module."),
        (lambda name: f"model.densenet121._orig_mod.{name}", "_orig_mod., model.densenet121."),
        (lambda name: f"net.{name}", "net."),
        (lambda name: name.replace("features.", "features.module."), "module."),
        (lambda name: name.replace("features.", "features._orig_mod."), "_orig_mod."),
        (lambda name: name.replace("features.", "backbone."), "backbone."),
        (lambda name: name.replace("features.", "features.0."), "features.0."),
        (lambda name: name.replace("denseblock2.", "denseblock2._checkpoint_wrapped_module."), "_checkpoint_wrapped"),
    ],
)
def test_what_wrappers_put_before_the_names_is_left_out_and_said(
    ours: Weights, rename: Callable[[str], str], omitted: str
) -> None:
    new, notes = legacy._rename(Path("x"), {rename(name): tensor for name, tensor in ours.items()})
    assert new.keys() == ours.keys()
    assert all(new[name] is tensor or torch.equal(new[name], tensor) for name, tensor in ours.items())
    assert f"of wrappers, left out: {omitted}" in notes[0]


def test_an_averaged_model_is_taken_without_its_count(ours: Weights) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(nn.Linear(1, 1)).state_dict()
    assert "n_averaged" in averaged  # torch still calls it so
    weights = {"n_averaged": averaged["n_averaged"], **{f"module.{name}": tensor for name, tensor in ours.items()}}
    new, notes = legacy._rename(Path("x"), weights)
    assert new.keys() == ours.keys()
    assert notes[0] == "of wrappers, left out: module., n_averaged"


def test_two_models_under_two_prefixes_are_refused() -> None:
    both = {"student.features.conv0.weight": torch.zeros(1), "teacher.features.conv0.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"student\..* and teacher\..* are both features.conv0.weight. Save one"):
        legacy._rename(Path("x"), both)


@pytest.mark.parametrize(
    ("cast", "said"),
    [
        (
            lambda name, w: w.half() if w.is_floating_point() else w,
            "606 tensors were float16, and cast to float32 exactly",
        ),
        (lambda name, w: w.bfloat16(), "606 tensors were bfloat16, and cast to float32 exactly"),  # the counters too
        (lambda name, w: w.double(), "606 tensors were float64, and cast to float32 with rounding"),
        (lambda name, w: w.half() if "conv" in name else w, "120 tensors were float16, and cast to float32 exactly"),
    ],
)
def test_other_precisions_are_cast_and_said(
    ours: Weights, tmp_path: Path, cast: Callable[[str, torch.Tensor], torch.Tensor], said: str
) -> None:
    weights = {name: cast(name, tensor) for name, tensor in ours.items()}
    made = import_legacy(save(tmp_path / "x.pt", weights), tmp_path / "out.safetensors", form="jrzech")
    assert said in made.notes
    for name, tensor in made.checkpoint.model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, weights[name].float()), name
    counted = weights["features.norm0.num_batches_tracked"].dtype == torch.int64
    assert any("num_batches_tracked was of floating point, and set to 0" in note for note in made.notes) is not counted


def test_a_number_too_large_for_its_type_is_refused(ours: Weights, tmp_path: Path) -> None:
    weights = dict(ours)
    weights["features.norm0.running_var"] = torch.full((64,), 1e5).half()
    assert "features.norm0.running_var holds NaN or infinity in float16" in refusal(save(tmp_path / "x.pt", weights))
    weights["features.norm0.running_var"] = torch.full((64,), 1e300, dtype=torch.float64)
    assert "features.norm0.running_var holds NaN or infinity in float64" in refusal(save(tmp_path / "x.pt", weights))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w, "taken as logits"),
        (lambda w: {f"module.{name}": tensor for name, tensor in w.items()}, "of wrappers, left out: module."),
        (lambda w: {name: tensor.half() for name, tensor in w.items()}, "were float16"),
        (lambda w: as_torch_03(w, "densenet121."), "num_batches_tracked was missing"),
    ],
)
def test_plain_safetensors_are_imported(
    ours: Weights, tmp_path: Path, change: Callable[[Weights], Weights], said: str
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(change(ours), path, metadata={"format": "pt"})
    made = import_legacy(path, tmp_path / "out.safetensors", findings=FINDINGS)
    assert said in " ".join(made.notes)
    assert made.checkpoint.model.classifier.weight.shape == (14, 1024)


def test_a_safetensors_file_cut_short_is_called_damaged(ours: Weights, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(ours, path)
    for kept in (1000, path.stat().st_size - 1):
        (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:kept])
        assert "is a damaged .safetensors file" in refusal(tmp_path / "cut.safetensors")


def xrv(ours: Weights, thresholds: torch.Tensor) -> Weights:
    weights = {name: tensor for name, tensor in ours.items() if not name.startswith("classifier")}
    weights["features.conv0.weight"] = ours["features.conv0.weight"][:, :1]
    return {
        **weights,
        "classifier.weight": torch.zeros(18, 1024),
        "classifier.bias": torch.zeros(18),
        "op_threshs": thresholds,
    }


def test_torchxrayvisions_thresholds_are_no_operating_points(ours: Weights, tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", xrv(ours, torch.linspace(0.01, 0.2, 18)))
    made = import_legacy(path, tmp_path / "out.safetensors", form="torchxrayvision-all")
    assert made.checkpoint.manifest.operating_points == {}
    assert "op_threshs are left out: torchxrayvision rescales probabilities by them" in " ".join(made.notes)
    half = {
        f"model.{name}": w.half() if w.is_floating_point() else w
        for name, w in xrv(ours, torch.full((18,), 0.1)).items()
    }
    again = import_legacy(save(path, half), tmp_path / "half.safetensors", form="torchxrayvision-all")
    kernel = again.checkpoint.model.features.conv0.weight
    # Times 1024 in float32, not in float16, which would end at 65504.
    assert torch.equal(kernel[:, :1], ours["features.conv0.weight"][:, :1].half().float() * 1024)


@pytest.mark.parametrize(
    ("thresholds", "named"),
    [
        # As torchxrayvision's weights named nih have: it knows 14 of the 18.
        (
            torch.tensor([0.1] * 14 + [float("nan")] * 4),
            "no threshold for Lung Lesion, Fracture, Lung Opacity, Enlarged",
        ),
        (torch.full((14,), 0.1), "op_threshs is float32 [14], needed one number for each of 18 findings"),
        (torch.full((18,), 1), "op_threshs is int64 [18], needed one number"),
    ],
)
def test_thresholds_of_another_model_are_refused(
    ours: Weights, tmp_path: Path, thresholds: torch.Tensor, named: str
) -> None:
    assert named in refusal(save(tmp_path / "x.pt", xrv(ours, thresholds)), "torchxrayvision-all")


def test_a_torchscript_archive_is_refused_with_the_next_step(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "x.pt")
    assert "torch.jit.load(FILE).state_dict()" in refusal(tmp_path / "x.pt")


def test_findings_by_hand(ours: Weights, tmp_path: Path) -> None:
    order = tmp_path / "findings.txt"
    order.write_text(
        "\ufeffHernia\r\n\r\n" + "\r\n".join(FINDINGS[:12]) + "\r\nPleural Thickening\r\n", encoding="utf-8"
    )
    findings = read_findings(order)
    assert findings == ("Hernia", *FINDINGS[:12], "Pleural Thickening")
    made = import_legacy(save(tmp_path / "x.pt", ours), tmp_path / "out.safetensors", findings=findings)
    assert made.checkpoint.manifest.findings == findings
    assert made.checkpoint.manifest.recipe["imported_from"] == "findings given by hand"
    words = " ".join(made.notes)
    assert "assumed" in words
    assert "not findings of ChestX-ray14: Pleural Thickening" in words
    assert "taken as logits" in words  # nothing says what came after a plain Linear


@pytest.mark.parametrize("lines", ["", "Mass\nMass\n", "a/b\n", "..\n", "x" * 65, "\n".join(map(str, range(257)))])
def test_wrong_findings_are_refused(tmp_path: Path, lines: str) -> None:
    (tmp_path / "findings.txt").write_text(lines)
    with pytest.raises(CheckpointError, match=r"findings\.txt: found"):
        read_findings(tmp_path / "findings.txt")


def test_the_order_of_findings_is_never_guessed(ours: Weights, tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", ours)
    assert "found neither of --form and --findings" in refusal(path, None)
    assert "arnoweng, zoogzog, jrzech, torchxrayvision-all" in refusal(path, None)
    assert "found both" in refusal(path, "arnoweng", FINDINGS)
    with pytest.raises(CheckpointError, match="no form is named 'chexnet'"):
        import_legacy(path, tmp_path / "out.safetensors", form="chexnet")


def test_nothing_is_overwritten(ours: Weights, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    out.write_text("mine")
    with pytest.raises(CheckpointError, match="is there already"):
        import_legacy(save(tmp_path / "x.pt", ours), out, form="arnoweng")
    assert out.read_text() == "mine"


@pytest.mark.parametrize("is_zip", [True, False])
def test_code_in_a_file_is_not_run(ours: Weights, tmp_path: Path, is_zip: bool) -> None:
    canary = tmp_path / "canary"
    path = save(tmp_path / "x.pt", {"state_dict": ours, "more": Evil(canary)}, is_zip=is_zip)
    assert "mkdir, and so can run code, so it was not loaded" in refusal(path)
    assert not canary.exists()
    torch.load(path, weights_only=False)
    assert canary.exists()  # so it would have


@pytest.mark.parametrize("call", [eval, exec, subprocess.Popen, pickle.loads, getattr, runpy.run_path])
def test_what_only_runs_code_is_named_and_refused(tmp_path: Path, call: Callable[..., object]) -> None:
    path = save(tmp_path / "x.pt", {"state_dict": {"conv0.weight": torch.zeros(1)}, "more": Named(call)})
    assert f"{call.__name__}, and so can run code, so it was not loaded" in refusal(path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_code_in_a_bare_pickle_is_not_run(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(pickle.dumps(Evil(tmp_path / "canary"), protocol))
    refusal(path)
    assert not (tmp_path / "canary").exists()


def test_a_pickled_model_is_refused_with_the_next_step(tmp_path: Path) -> None:
    inside = {"args": argparse.Namespace(lr=1), "criterion": nn.BCELoss(), "model": CheXNet(14), "epoch": 3}
    path = save(tmp_path / "checkpoint", inside)  # as jrzech's, and more
    message = refusal(path, "jrzech")
    assert "chexnet_deploy.export.from_torch.model.CheXNet" in message
    assert "torch.save(torch.load(FILE, weights_only=False)['model'].state_dict(), 'weights.pth')" in message
    assert "weights_only=False).state_dict()" in refusal(save(path, CheXNet(18)), "torchxrayvision-all")


def test_other_kinds_of_files_are_refused(ours: Weights, checkpoint_path: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "x.pt", ours)
    content = path.read_bytes()
    keras = b"\x89HDF\r\n\x1a\n" + bytes(100)
    for wrong in (b"", b"just some text\n" * 20, content[:-100], content[:1000], b"PK\x03\x04", keras):
        path.write_bytes(wrong)
        assert "PyTorch's" in refusal(path) if wrong is keras else "weights alone" in refusal(path)
    path.write_bytes(checkpoint_path.read_bytes())
    assert "checkpoint of chexnet-deploy already. Give it to chexnet-deploy export." in refusal(path)
    for inside in ([1, 2], {"epoch": 3}, {"state_dict": [1]}, torch.zeros(3), {}):
        assert "needed weights by name" in refusal(save(path, inside))
    assert "No such file" in refusal(tmp_path / "none.pt")
    assert "directory" in refusal(tmp_path)


def test_a_file_that_inflates_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legacy_file, "MAX_FILE_BYTES", 2**20)
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data/0", bytes(2**20))
        archive.writestr("x/data/1", bytes(1))
    assert path.stat().st_size < 2**14
    assert "holds 1,048,577 bytes, more than the 1,048,576" in refusal(path)


def test_a_file_that_is_too_large_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legacy_file, "MAX_FILE_BYTES", 999)
    assert "holds 1,000 bytes, more than the 999" in refusal(_write(tmp_path / "x.pt", bytes(1000)))


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


NAN = torch.full((1024,), float("nan"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: w.pop("features.norm5.bias"), ["1 keys missing: features.norm5.bias; 0 not expected: nothing"]),
        (lambda w: w.pop("features.norm5.num_batches_tracked"), ["1 keys missing: features.norm5.num_batches_tracked"]),
        (lambda w: w.update(surprise=torch.zeros(1)), ["0 keys missing: nothing; 1 not expected: surprise"]),
        (lambda w: [w.pop(name) for name in list(w)[5:]], ["and 718 more"]),
        (
            lambda w: w.update({"classifier.weight": torch.zeros(15, 1024), "classifier.bias": torch.zeros(15)}),
            ["with 14 outputs", "2 of another shape", "float32 [15, 1024], needed float32 [14, 1024]", "--findings"],
        ),
        (lambda w: w.update({"features.conv0.weight": torch.zeros(64, 1, 7, 7)}), ["[64, 1, 7, 7]", "[64, 3, 7, 7]"]),
        (lambda w: w.update({"classifier.bias": w["classifier.bias"].int()}), ["int32 [14], needed float32 [14]"]),
        (lambda w: w.update({"classifier.bias": torch.tensor(1.0)}), ["float32 [], needed float32 [14]"]),
        (lambda w: w.update({"classifier.bias": torch.zeros(1).expand(10**6, 10**6)}), ["[1000000, 1000000]"]),
        (lambda w: w.update({"features.norm5.weight": NAN}), ["features.norm5.weight holds NaN"]),
        (
            lambda w: w.update({"module.classifier.0.bias": torch.zeros(14)}),
            ["classifier.bias and module.classifier.0.bias"],
        ),
        (lambda w: w.update(epoch=3), ["'epoch' holds int; needed a tensor by name"]),
        (lambda w: w.update({"\x1b[2J": torch.zeros(1)}), [r"'\x1b[2J' holds Tensor; needed a tensor by name"]),
        (lambda w: w.update({7: torch.zeros(1)}), ["7 holds Tensor; needed a tensor by name"]),
        (lambda w: w.update({"classifier.bias": torch.zeros(14).to_sparse()}), ["classifier.bias is no plain tensor"]),
        (
            lambda w: w.update({"classifier.bias": torch.zeros(14, device="meta")}),
            ["classifier.bias is no plain tensor"],
        ),
        (
            lambda w: w.update({"classifier.weight": torch.zeros(1000, 1024), "classifier.bias": torch.zeros(1000)}),
            ["1000 classes, so it is an ImageNet model: usable to initialise training alone"],
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_difference(
    ours: Weights, tmp_path: Path, change: Callable[[dict[object, object]], object], named: list[str]
) -> None:
    weights: dict[object, object] = dict(ours)
    change(weights)
    message = refusal(save(tmp_path / "x.pt", {"model_state_dict": weights}))
    for words in named:
        assert words in message


def test_another_network_is_refused(tmp_path: Path) -> None:
    message = refusal(save(tmp_path / "x.pt", nn.Linear(3, 14).state_dict()))  # 727 of ours, 121 of them counters
    assert "606 keys missing: classifier.bias, " in message
    assert "2 not expected: bias, weight" in message


@pytest.fixture
def imagenet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Weights]:
    """A stand-in for torchvision's file, by its names, with its 1000 classes; and the features in it."""
    torch.manual_seed(1)
    weights = CheXNet(1000).state_dict()
    old = {name.replace("classifier.0.", "classifier."): w for name, w in as_torch_03(weights, "").items()}
    path = save(tmp_path / "densenet121.pth", OrderedDict(old), is_zip=False)
    monkeypatch.setattr(legacy, "IMAGENET_SHA256_START", sha256_hex(path.read_bytes())[:8])
    return path, weights


def test_imagenet_features_load_into_our_model(imagenet: tuple[Path, Weights]) -> None:
    path, weights = imagenet
    model = CheXNet(14)
    before = model.classifier.weight.clone()
    model.features.load_state_dict(load_imagenet_backbone(path))  # strict: no key missing, none too many
    for name, tensor in model.state_dict().items():
        if name.startswith("features."):
            assert torch.equal(tensor, weights[name]), name
    assert torch.equal(model.classifier.weight, before)


def test_another_imagenet_file_is_refused(imagenet: tuple[Path, Weights], tmp_path: Path) -> None:
    path, _ = imagenet
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(
        CheckpointError, match=r"not torchvision's densenet121.* Get https://download\.pytorch\.org/models/"
    ):
        load_imagenet_backbone(path)
    with pytest.raises(
        CheckpointError, match=r"is not there\. Get https://download\.pytorch\.org/models/densenet121-a639ec97"
    ):
        load_imagenet_backbone(tmp_path / "none.pth")


@pytest.mark.slow
def test_an_imported_model_is_exported(ours: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from chexnet_deploy.export.from_torch.to_onnx import export_onnx
    from chexnet_deploy.runtime.predictor import Predictor

    small = LegacyForm(FINDINGS, Preprocessing(resize_px=32), ())  # 224 px take half a minute more
    monkeypatch.setattr(legacy, "FORMS", {"arnoweng": small})
    path = save(tmp_path / "model.pth.tar", {"state_dict": as_torch_03(ours, "module.densenet121.")})
    made = import_legacy(path, tmp_path / "best.safetensors", form="arnoweng").checkpoint
    bundle = export_onnx(tmp_path / "best.safetensors", tmp_path / "fp32")
    assert bundle.manifest.checkpoint_sha256 == made.sha256
    assert (bundle.manifest.trained_on, bundle.manifest.operating_points) == (None, {})
    gray = np.asarray(draw_probe_pixels(32)[0, 0])
    with Predictor.open(tmp_path / "fp32") as predictor:
        probabilities = predictor.predict(gray).probabilities
    logits = logits_of(made.model, Normalise(small.preprocessing)(torch.from_numpy(gray[None, None].copy())))
    np.testing.assert_allclose(list(probabilities.values()), torch.sigmoid(logits)[0], atol=1e-5)


def test_command(ours: Weights, tmp_path: Path) -> None:
    path = save(tmp_path / "model.pth.tar", {"state_dict": as_torch_03(ours, "module.densenet121.")})

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "chexnet_deploy", "import", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    done = run(path, "--out", tmp_path / "best.safetensors", "--form", "zoogzog", "--json")
    assert done.returncode == 0, done.stderr
    assert "warning: not the published evaluation" in done.stderr
    assert json.loads(done.stdout)["sha256"] == read_checkpoint(tmp_path / "best.safetensors").sha256
    done = run(path, "--out", tmp_path / "other.safetensors")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_the_commands_help_names_every_form() -> None:
    from chexnet_deploy.cli.export import import_checkpoint

    (option,) = import_checkpoint.__annotations__["form"].__metadata__
    assert all(form in option.help for form in FORMS)


def test_every_form_is_usable() -> None:
    for form in FORMS.values():
        assert len(set(form.findings)) == len(form.findings) <= legacy.MAX_FINDINGS
        assert form.notes


def test_the_safe_loader_is_the_only_one() -> None:
    source = Path(legacy_file.__file__).read_text()
    assert source.count('torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)') == 1
    assert len(re.findall(r"(?<!_)torch\.load\(", source)) == 2  # the other is the advice in a message
    assert "torch.load(" not in Path(legacy.__file__).read_text()
    assert "pickle.load" not in source
