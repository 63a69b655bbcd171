"""Every mistake a user can make at the command line: one line with the next step, the right exit code, nothing half-written."""

import json
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from PIL import Image

from chexnet_deploy.bundle.bundle import Bundle
from tests.command_line import assert_one_line_error, chexnet

SCHEMAS = Path(__file__).parents[2] / "docs" / "schemas"


def test_predict_prints_all_findings_and_draws_maps(
    bundles: dict[str, Bundle], phantom_root: Path, tmp_path: Path
) -> None:
    image = sorted((phantom_root / "images").iterdir())[0]
    done = chexnet("predict", bundles["fp32"].path, image, "--cam", tmp_path / "cam", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)[str(image)]["probabilities"]) == 14
    assert list((tmp_path / "cam").glob("*.png"))


@pytest.mark.parametrize("content", [b"", b"hello, this is text", b"\x89PNG\r\n\x1a\n truncated"])
def test_a_file_that_is_no_image(bundles: dict[str, Bundle], tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(content)
    assert_one_line_error(chexnet("predict", bundles["fp32"].path, path), 2, "x.png")


def test_a_true_colour_photo(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    photo = np.zeros((64, 64, 3), np.uint8)
    photo[..., 0] = np.arange(64, dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    assert_one_line_error(chexnet("predict", bundles["fp32"].path, tmp_path / "photo.png"), 2, "photo.png", "colour")


def test_a_bundle_with_a_flipped_byte(bundles: dict[str, Bundle], phantom_root: Path, tmp_path: Path) -> None:
    broken = tmp_path / "fp32"
    shutil.copytree(bundles["fp32"].path, broken)
    content = bytearray((broken / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (broken / "model.onnx").write_bytes(content)
    image = next((phantom_root / "images").iterdir())
    assert_one_line_error(chexnet("predict", broken, image), 2, "model.onnx does not match its manifest")


def replace_in(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def link_model(bundle: Path) -> None:
    target = bundle.parent / "elsewhere.onnx"
    (bundle / "model.onnx").rename(target)
    (bundle / "model.onnx").symlink_to(target)


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda bundle: replace_in(bundle / "manifest.json", "Hernia", "Hernias"), "manifest.json"),
        (lambda bundle: replace_in(bundle / "manifest.json", "{", '{"surprise": 1, '), "manifest.json"),
        (lambda bundle: (bundle / "probe.npz").unlink(), "probe.npz"),
        (link_model, "not a plain file"),
    ],
    ids=["edited", "unknown key", "missing file", "symlink"],
)
def test_a_bundle_that_is_not_whole(
    bundles: dict[str, Bundle], tmp_path: Path, damage: Callable[[Path], object], found: str
) -> None:
    broken = tmp_path / "fp32"
    shutil.copytree(bundles["fp32"].path, broken)
    damage(broken)
    assert_one_line_error(chexnet("inspect", broken), 2, found)


def move_a_test_image_to_train_val(root: Path) -> None:
    """Of a patient who has another image in the test list."""
    names = (root / "test_list.txt").read_text().split()
    patient = next(name[:8] for name in names if sum(other[:8] == name[:8] for other in names) > 1)
    moved = next(name for name in names if name[:8] == patient)
    (root / "test_list.txt").write_text("\n".join(name for name in names if name != moved))
    with (root / "train_val_list.txt").open("a") as file:
        file.write(f"\n{moved}\n")


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda root: replace_in(root / "Data_Entry_2017_v2020.csv", "Finding Labels", "Labels"), "Finding Labels"),
        (lambda root: replace_in(root / "Data_Entry_2017_v2020.csv", "Effusion", "Effusions"), "'Effusions'"),
        (move_a_test_image_to_train_val, "patients"),
    ],
    ids=["wrong columns", "unknown finding", "patient in two splits"],
)
def test_tables_that_contradict(
    bundles: dict[str, Bundle], phantom_root: Path, tmp_path: Path, damage: Callable[[Path], object], found: str
) -> None:
    root = tmp_path / "root"
    shutil.copytree(phantom_root, root)
    damage(root)
    assert_one_line_error(chexnet("evaluate", bundles["fp32"].path, "--data", root), 2, found)


@pytest.mark.parametrize("kind", ["pickle", "nan", "missing key"])
def test_a_checkpoint_that_can_not_be_used(checkpoint_path: Path, tmp_path: Path, kind: str) -> None:
    import safetensors.torch
    import torch

    path = tmp_path / "x.safetensors"
    weights = safetensors.torch.load_file(checkpoint_path)
    if kind == "pickle":
        torch.save(weights, path)
        found = "pickle"
    else:
        if kind == "nan":
            weights["classifier.bias"][3] = float("nan")
        else:
            weights["classifier.offset"] = weights.pop("classifier.bias")
        with safetensors.safe_open(checkpoint_path, "pt") as original:
            safetensors.torch.save_file(weights, path, original.metadata())
        found = "classifier.bias"
    assert_one_line_error(chexnet("export", path, "--out", tmp_path / "out"), 2, found)
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up(checkpoint_path: Path, tmp_path: Path) -> None:
    def limit_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write then fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, 4 << 20))

    done = subprocess.run(
        [sys.executable, "-m", "chexnet_deploy", "export", str(checkpoint_path), "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=limit_files,
    )
    assert_one_line_error(done, 2, "File too large", "space")
    assert not list(tmp_path.rglob("*.onnx"))


def test_a_list_of_images_narrows_the_split(bundles: dict[str, Bundle], phantom_root: Path, tmp_path: Path) -> None:
    names = (phantom_root / "test_list.txt").read_text().split()
    (tmp_path / "some.txt").write_text("\n".join(names[:7]))
    command = ("evaluate", bundles["fp32"].path, "--data", phantom_root, "--images", tmp_path / "some.txt", "--json")
    assert json.loads(chexnet(*command).stdout)["n_images"] == 7
    stranger = (phantom_root / "train_val_list.txt").read_text().split()[0]
    (tmp_path / "some.txt").write_text(stranger)
    assert_one_line_error(chexnet(*command), 2, stranger, "not test images")


def test_a_wrong_data_folder(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    assert_one_line_error(chexnet("evaluate", bundles["fp32"].path, "--data", tmp_path), 2, str(tmp_path))


def test_an_unknown_precision(checkpoint_path: Path, tmp_path: Path) -> None:
    done = chexnet("export", checkpoint_path, "--out", tmp_path / "out", "--precision", "fp32,int4")
    assert_one_line_error(done, 2, "int4", "fp32, fp16, int8")
    assert not (tmp_path / "out").exists()


def test_int8_without_images(checkpoint_path: Path, tmp_path: Path) -> None:
    done = chexnet("export", checkpoint_path, "--out", tmp_path / "out", "--precision", "int8")
    assert_one_line_error(done, 2, "--data")
    assert not (tmp_path / "out").exists()


def test_calibrating_on_test_patients(checkpoint_path: Path, phantom_root: Path, tmp_path: Path) -> None:
    names = (phantom_root / "train_val_list.txt").read_text().split()[:120] + (
        phantom_root / "test_list.txt"
    ).read_text().split()[:1]
    (tmp_path / "list.txt").write_text("\n".join(names))
    done = chexnet(
        "export", checkpoint_path, "--out", tmp_path / "out", "--precision", "int8", "--data", phantom_root, "--calibration",
        tmp_path / "list.txt",
    )  # fmt: skip
    assert_one_line_error(done, 2, "training patients only")
    assert not (tmp_path / "out" / "int8").exists()


def test_a_missing_checkpoint(tmp_path: Path) -> None:
    done = chexnet("export", tmp_path / "no.safetensors", "--out", tmp_path / "out")
    assert_one_line_error(done, 2, "no.safetensors")


def test_bench_judges_three_engines_and_writes_its_report(
    bundles: dict[str, Bundle], phantom_root: Path, tmp_path: Path
) -> None:
    engines = [word for name in ("fp32", "fp16", "int8") for word in ("--engine", bundles[name].path)]
    done = chexnet(
        "bench", *engines, "--data", phantom_root, "--out", tmp_path / "b", "--min-runs", 3, "--min-duration-s", 0
    )
    # 40 test patients are too few for 20 positive ones a finding, so nothing is proven: 3, never 0.
    assert done.returncode == 3, done.stderr
    assert "INCONCLUSIVE" in done.stdout
    assert "emulated" in done.stdout
    assert "Not decided: whether fp16 and int8 may replace fp32." in done.stdout
    report = json.loads((tmp_path / "b" / "report.json").read_text())
    assert [engine["name"] for engine in report["engines"]] == ["fp32", "fp16", "int8"]
    assert report["verdict"] == "INCONCLUSIVE"
    assert report["engines"][2]["spec"]["gate"]["max_abs_probability_difference"] == 0.1
    assert report["engines"][0]["single_stream"]["p50_ms"] > 0
    jsonschema.validate(report, json.loads((SCHEMAS / "bench.json").read_text()))
    page = (tmp_path / "b" / "report.html").read_text()
    assert page.count("data:image/") >= 3
    assert "http" not in page  # self-contained: nothing is fetched
    assert (tmp_path / "b" / "logits-int8.csv").read_text().startswith("Image Index,logit_Atelectasis")


def test_a_failed_gate_exits_1(bundles: dict[str, Bundle], phantom_root: Path, tmp_path: Path) -> None:
    spec = tmp_path / "strict.toml"
    spec.write_text(
        'description = "nothing passes"\nprecision = "int8"\n[gate]\nauroc_margin = { default = 0.005 }\n'
        'max_abs_probability_difference = 1e-9\np999_abs_probability_difference = 1e-9\nlatency = "not gated"\n'
    )
    done = chexnet(
        "bench", "--engine", bundles["int8"].path, "--data", phantom_root, "--spec", spec, "--out", tmp_path / "b", "--no-html",
        "--min-runs", 1, "--min-duration-s", 0,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "limit 1e-09" in done.stdout


def test_evaluate_counts_its_findings(bundles: dict[str, Bundle], phantom_root: Path) -> None:
    done = chexnet("evaluate", bundles["fp32"].path, "--data", phantom_root, "--json")
    result = json.loads(done.stdout)
    assert result["n_patients"] == 40
    assert result["n_counted"] == sum(row["auroc"] is not None for row in result["findings"])


def test_evaluate_predictions_beside_readers_and_write_a_page(
    phantom_root: Path, phantom_predictions: Path, phantom_readers: Path, tmp_path: Path
) -> None:
    command = ("evaluate", "--predictions", phantom_predictions, "--data", phantom_root)
    done = chexnet(*command, "--readers", phantom_readers, "--out", tmp_path / "e")
    assert done.returncode == 0, done.stderr
    assert "95 % interval" in done.stdout
    for words in ("F1 each rater against each other", "F1 against the readers only", "F1 against the majority"):
        assert words in done.stdout
    assert "neither list" in done.stdout  # whose patients these are
    report = json.loads((tmp_path / "e" / "report.json").read_text())
    jsonschema.validate(report, json.loads((SCHEMAS / "evaluation.json").read_text()))
    assert report["n_images"] > report["readers"]["n_images"] == report["readers"]["n_read"] > 40
    assert "have no expert reads and are not in the official test list" in report["readers"]["thresholds_from"]
    page = (tmp_path / "e" / "report.html").read_text()
    assert 'src="http' not in page
    assert done.stdout.strip().endswith("report.html")


def test_evaluate_localization_and_no_page(bundles: dict[str, Bundle], phantom_root: Path, tmp_path: Path) -> None:
    command = ("evaluate", bundles["fp32"].path, "--data", phantom_root, "--localization", "--out", tmp_path / "e")
    done = chexnet(*command, "--no-html", "--json")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "e").iterdir()] == ["report.json"]
    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / "e" / "report.json").read_text())
    assert report["localization"]["n_images"] > 0
    assert_one_line_error(chexnet(*command), 2, "there already")


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ((), "neither an engine nor predictions"),
        (("FP32",), "--data ROOT"),
        (("FP32", "--predictions", "CSV", "--data", "ROOT"), "needed one of them"),
        (("FP32", "--data", "ROOT", "--labels", "TABLE"), "--labels belongs to --predictions"),
        (("FP32", "--data", "ROOT", "--readers", "ROOT"), "test_individual_readers.csv"),
        (("FP32", "--data", "ROOT", "--thresholds", "TABLE"), "JSON object"),
        (("--predictions", "CSV"), "--labels CSV"),
        (("--predictions", "TABLE", "--labels", "TABLE"), "Data_Entry_2017_v2020.csv"),
        (("--predictions", "CSV", "--labels", "nothing.csv"), "nothing.csv"),
        (("--predictions", "CSV", "--labels", "TABLE", "--readers", "READERS"), "--thresholds FILE"),
        (("--predictions", "CSV", "--labels", "TABLE", "--localization"), "activation maps"),
    ],
)
def test_evaluate_refuses_options_that_do_not_fit(
    bundles: dict[str, Bundle],
    phantom_root: Path,
    phantom_predictions: Path,
    phantom_readers: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    found: str,
) -> None:
    places = {
        "FP32": bundles["fp32"].path,
        "ROOT": phantom_root,
        "TABLE": phantom_root / "Data_Entry_2017_v2020.csv",
        "CSV": phantom_predictions,
        "READERS": phantom_readers,
    }
    done = chexnet("evaluate", *(places.get(word, word) for word in arguments), "--out", tmp_path / "e")
    assert_one_line_error(done, 2, found)
    assert not (tmp_path / "e").exists()


def test_inspect_prints_a_verified_manifest(bundles: dict[str, Bundle], checkpoint_path: Path) -> None:
    assert json.loads(chexnet("inspect", bundles["int8"].path).stdout)["ancestors"] == [bundles["fp32"].id]
    assert json.loads(chexnet("inspect", checkpoint_path).stdout)["preprocessing"]["resize_px"] == 32


def test_doctor_names_what_is_missing() -> None:
    abilities = json.loads(chexnet("doctor", "--json").stdout)
    assert [a["is_ready"] for a in abilities if a["name"].startswith("run ONNX")] == [True, True]
    assert all(a["next_step"] for a in abilities if not a["is_ready"])


@pytest.mark.parametrize("kind", ["there already", "a file above it"])
def test_results_go_to_a_new_place_or_nowhere(bundles: dict[str, Bundle], tmp_path: Path, kind: str) -> None:
    taken = tmp_path / "taken"
    if kind == "there already":
        taken.mkdir()
        out = taken
    else:
        taken.write_text("mine")
        out = taken / "below"
    image = tmp_path / "x.png"
    Image.fromarray(np.arange(64 * 64, dtype=np.uint32).reshape(64, 64).astype(np.uint8)).save(image)
    for command in (
        ("bench", "--engine", bundles["fp32"].path, "--out", out),
        ("predict", bundles["fp32"].path, image, "--cam", out),
    ):
        assert_one_line_error(chexnet(*command), 2, str(taken), "another folder")
    assert taken.is_file() or not list(taken.iterdir())


def test_two_images_of_one_name_would_share_a_picture(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    images = [tmp_path / folder / "a.png" for folder in ("first", "second")]
    done = chexnet("predict", bundles["fp32"].path, *images, "--cam", tmp_path / "cam")
    assert_one_line_error(done, 2, "given twice, e.g. a")
    assert not (tmp_path / "cam").exists()


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("bench", "--engine", "FP32", "--images", "x.txt"), "--data"),
        (("inspect", "PARENT"), "folder of bundles"),
        (("inspect", "a" * 300), "too long"),
        (("predict", "FP32", "x.png", "--threads", "100000"), "cores of this machine"),
    ],
)
def test_likely_slips(bundles: dict[str, Bundle], arguments: tuple[str, ...], found: str) -> None:
    places = {"FP32": bundles["fp32"].path, "PARENT": bundles["fp32"].path.parent}
    assert_one_line_error(chexnet(*(places.get(word, word) for word in arguments)), 2, found)


def test_a_calibration_list_is_checked_before_anything_is_made(
    checkpoint_path: Path, phantom_root: Path, tmp_path: Path
) -> None:
    (tmp_path / "list.txt").write_text((phantom_root / "train_val_list.txt").read_text().split()[0])
    command = (
        "export",
        checkpoint_path,
        "--out",
        tmp_path / "out",
        "--data",
        phantom_root,
        "--calibration",
        tmp_path / "list.txt",
    )
    assert_one_line_error(chexnet(*command, "--precision", "int8"), 2, "needed 64 to 4,096")
    assert_one_line_error(chexnet(*command, "--precision", "fp16"), 2, "for int8 alone")
    assert not (tmp_path / "out").exists()


def test_an_unknown_option_exits_2() -> None:
    assert chexnet("bench", "--enginee", "x").returncode == 2
