from pathlib import Path

import pytest

from chexnet_deploy.bundle.manifest import Precision
from chexnet_deploy.errors import SpecError
from chexnet_deploy.evaluation.spec import BatchProfile, EngineSpec, LatencyGate, read_spec, spec_names
from chexnet_deploy.inputs import read_toml

GOOD = """\
description = "a test"
precision = "fp16"

[gate]
auroc_margin = { default = 0.005, Hernia = 0.02 }
max_abs_probability_difference = 0.1
p999_abs_probability_difference = 0.05
latency = "unproven"
"""


def parse(folder: Path, text: str) -> EngineSpec:
    path = folder / "engine.toml"
    path.write_text(text)
    return read_spec(str(path))


def test_a_spec_says_what_its_file_says(tmp_path: Path) -> None:
    spec = parse(tmp_path, GOOD)
    assert spec.precision is Precision.FP16
    assert spec.batch == BatchProfile(min=1, opt=1, max=16)
    assert spec.gate.latency == "unproven"
    assert (spec.gate.margin_of("Hernia"), spec.gate.margin_of("Mass")) == (0.02, 0.005)
    assert spec.gate.min_positive_patients == 20


def test_latency_limits_are_a_table(tmp_path: Path) -> None:
    spec = parse(tmp_path, GOOD.replace('latency = "unproven"', "latency = { p50_ms = 5.0, p99_ms = 8.0 }"))
    assert spec.gate.latency == LatencyGate(p50_ms=5.0, p99_ms=8.0)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("description", "colour = 1\ndescription", "colour"),
        ("max_abs_prob", "speed = 1\nmax_abs_prob", "gate.speed"),
        ("default = 0.005, ", "", "default"),
        ("default = 0.005", "default = 0.0", "auroc_margin"),
        ("default = 0.005", "default = nan", "auroc_margin"),
        ("[gate]", "[build]\ndla_core = 0\n[gate]", "DLA is not supported"),
        ("difference = 0.1", "difference = 1.5", "max_abs_probability_difference"),
        ('"fp16"', '"fp8"', "precision"),
        ('"unproven"', '"fast"', "latency"),
        ('"unproven"', "{ p50_ms = 0.0, p99_ms = 1.0 }", "latency"),
        ('"unproven"', "{ p50_ms = inf, p99_ms = inf }", "latency"),
        ("[gate]", "[batch]\nmin = 4\nopt = 2\n[gate]", "min <= opt <= max"),
        ("[gate]", "[batch]\nopt = 32\n[gate]", "min <= opt <= max"),
        ("[gate]", "[batch]\nmin = 0\n[gate]", "batch.min"),
        ("[gate]", "[gate", "not TOML"),
    ],
)
def test_a_wrong_spec_is_refused_with_its_place(tmp_path: Path, old: str, new: str, named: str) -> None:
    assert old in GOOD
    with pytest.raises(SpecError) as caught:
        parse(tmp_path, GOOD.replace(old, new, 1))
    assert named in str(caught.value)
    assert "engine.toml" in str(caught.value)


def test_a_margin_may_be_of_any_models_finding_and_of_no_others(tmp_path: Path) -> None:
    gate = parse(tmp_path, GOOD.replace("Hernia", '"Lung Opacity"')).gate
    assert (gate.margin_of("Lung Opacity"), gate.margin_of("Hernia")) == (0.02, 0.005)
    gate.refuse_strangers(("Lung Opacity", "Mass"))
    with pytest.raises(
        SpecError, match="an auroc_margin for Lung Opacity, found in no model here; needed names out of Mass"
    ):
        gate.refuse_strangers(("Mass",))


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(SpecError, match=r"no spec named 'fp8'.*fp16.*fp32.*int8"):
        read_spec("fp8")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="can't be read"):
        read_spec(str(tmp_path / "none.toml"))


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "engine.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(SpecError, match="not TOML"):
        read_toml(path)


@pytest.mark.parametrize("precision", Precision)
def test_every_precision_has_a_shipped_spec(precision: Precision) -> None:
    assert precision.value in spec_names()
    assert read_spec(precision.value).precision is precision


@pytest.mark.parametrize("name", spec_names())
def test_every_shipped_spec_parses(name: str) -> None:
    gate = read_spec(name).gate
    assert gate.p999_abs_probability_difference <= gate.max_abs_probability_difference
