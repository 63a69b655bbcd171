"""What `bench` leaves behind: attestations that open a bundle, and the worst of several builds.

There is no TensorRT here, so each build is a copy of its bundle, one of them off.
"""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.manifest import ONNX_MODEL, PROBE, hash_files
from chexnet_deploy.bundle.signing.attestation import Attestation
from chexnet_deploy.evaluation.spec import EngineSpec
from chexnet_deploy.export.tensorrt import build
from tests.command_line import assert_one_line_error, chexnet

SHIFT = 0.01  # logits: 0.0025 of a probability at the most


def copy_of(parent: Bundle, spec: EngineSpec, out: Path, **_: object) -> Bundle:
    """Stands for a build; the second adds SHIFT to every logit."""
    shift = np.float32(SHIFT if out.name.endswith("-2") else 0.0)
    model = onnx.load_from_string(parent.read_model())
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "model.classifier.bias")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + shift, bias.name))
    content, probe = model.SerializeToString(), parent.read_probe_bytes()
    manifest = parent.manifest.child(
        parent.id,
        files=hash_files({ONNX_MODEL: content, PROBE: probe}),
        checks=(),
        probe_max_abs_logit_error=float(shift),
        head_bias=tuple(float(np.float32(value) + shift) for value in parent.manifest.head_bias),
    )
    return Bundle.write(out, manifest, content, probe)


def test_the_worst_of_three_builds_decides(
    bundles: dict[str, Bundle], phantom_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "build_tensorrt_plan", copy_of)
    out = tmp_path / "bench"
    few = ("--min-runs", "1", "--min-duration-s", "0", "--no-html")
    done = chexnet(
        "bench", "--engine", bundles["fp32"].path, "--builds", "3", "--data", phantom_root, "--out", out, *few
    )
    assert done.returncode == 1, done.stderr
    report = json.loads((out / "report.json").read_text())
    verdicts = {engine["name"]: engine["verdict"] for engine in report["engines"]}
    # Of the forty test patients no finding can be judged, so that what is the same is not shown to be so.
    assert verdicts == {"fp32-1": "INCONCLUSIVE", "fp32-2": "FAIL", "fp32-3": "INCONCLUSIVE"}
    assert report["verdict"] == "FAIL"
    assert sorted(path.name for path in (tmp_path / "bench-plans").iterdir() if path.is_dir()) == list(verdicts)
    # Each build has an attestation of its own.
    for name, verdict in verdicts.items():
        said = Attestation.parse((out / f"attestation-{name}.json").read_bytes(), name)
        assert (said.verdict, said.bundle_id) == (verdict, Bundle.open(tmp_path / "bench-plans" / name).id)
        assert said.reference_id == bundles["fp32"].id


def test_builds_are_judged_by_no_reference_that_trust_refuses(
    bundles: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "build_tensorrt_plan", copy_of)
    bundle, key, trust = (tmp_path / name for name in ("fp32", "key.pem", "trust.toml"))
    shutil.copytree(bundles["fp32"].path, bundle)
    trust.write_text(f"format = 1\n{chexnet('keygen', key).stdout}")
    assert chexnet("sign", bundle, "--key", key).returncode == 0
    words = ("--engine", bundle, "--builds", "1", "--trust", trust, "--out", tmp_path / "bench")
    done = chexnet("bench", *words, "--reference", bundles["fp32"].path)
    assert_one_line_error(done, 2, f"{bundles['fp32'].path} is not signed")


def test_beside_itself_a_bundle_gets_no_attestation(
    bundles: dict[str, Bundle], phantom_root: Path, tmp_path: Path
) -> None:
    """Every bundle passes beside itself, which says nothing of the model it was made of; nor do patients whom both know."""
    fp16, fp32 = bundles["fp16"].path, bundles["fp32"].path
    few = ("--min-runs", "1", "--min-duration-s", "0", "--no-html", "--data", phantom_root)
    for name, reference, split in (("itself", fp16, "test"), ("known", fp32, "train"), ("parent", fp32, "test")):
        chexnet("bench", "--engine", fp16, "--reference", reference, "--out", tmp_path / name, "--split", split, *few)
        assert (tmp_path / name / "report.json").exists()
    assert [path.parent.name for path in tmp_path.rglob("attestation-*.json")] == ["parent"]


SPEC = """\
description = "lenient enough for forty patients"
precision = "fp32"
[gate]
auroc_margin = { default = 0.5 }
min_positive_patients = 2
max_abs_probability_difference = 1e-4
p999_abs_probability_difference = 1e-4
flip_share = 0.01
latency = "not gated"
"""


def test_from_bench_to_a_bundle_that_opens_by_its_pass_alone(
    bundles: dict[str, Bundle], phantom_root: Path, tmp_path: Path
) -> None:
    bundle, out, spec, key = (tmp_path / name for name in ("fp32", "bench", "spec.toml", "key.pem"))
    shutil.copytree(bundles["fp32"].path, bundle)
    spec.write_text(SPEC)
    keys = chexnet("keygen", key).stdout
    trust = tmp_path / "trust.toml"
    # The same file as `sha256sum` names it.
    trust.write_text(f'format = 1\npassing_specs = ["{hashlib.sha256(SPEC.encode()).hexdigest()}"]\n{keys}')
    image = next((phantom_root / "images").iterdir())
    assert chexnet("sign", bundle, "--key", key).returncode == 0
    assert_one_line_error(chexnet("predict", bundle, image, "--trust", trust), 2, "holds no signed attestation")
    few = ("--min-runs", "1", "--min-duration-s", "0", "--no-html")
    done = chexnet(
        "bench", "--engine", bundle, "--data", phantom_root, "--spec", spec, "--out", out, "--trust", trust, *few
    )
    assert done.returncode == 0, done.stdout
    assert chexnet("sign", bundle, "--key", key, "--attestation", out / "attestation-fp32.json").returncode == 0
    predicted = chexnet("predict", bundle, image, "--trust", trust)
    assert predicted.returncode in (0, 3), predicted.stderr  # 3: a phantom that is refused as no chest
    said = Attestation.parse((bundle / "attestation.json").read_bytes(), "x")
    assert (said.verdict, said.n_patients) == ("PASS", 40)
    trust.write_text(trust.read_text().replace(said.spec_sha256, "0" * 64))
    assert_one_line_error(chexnet("predict", bundle, image, "--trust", trust), 2, "needed one by 000000000000")


def test_without_a_gpu_it_says_what_is_missing(bundles: dict[str, Bundle], tmp_path: Path, without_gpu: None) -> None:
    done = chexnet("bench", "--engine", bundles["fp32"].path, "--builds", "2", "--out", tmp_path / "bench")
    assert_one_line_error(done, 2)
    assert not (tmp_path / "bench").exists()
