"""Which radiographs a model is asked about: decided by its manifest, refused by name."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from benchmarks.rigs.synthetic_dicom import make_dicom
from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.bundle.manifest import Manifest
from chexnet_deploy.errors import ImageRefusedError, RefusalReason, SpecError
from chexnet_deploy.images.dicom.decoder import Decoder
from chexnet_deploy.images.dicom.header import read_header
from chexnet_deploy.images.scope import ScopePolicy, check_scope, find_scope_faults, read_scope
from chexnet_deploy.runtime.predictor import Predictor
from chexnet_deploy.runtime.sessions.open import open_session


def faults(scope: ScopePolicy | None = None, **edits: Any) -> list[RefusalReason]:
    return list(find_scope_faults(read_header("x", make_dicom(edits=edits)), scope or ScopePolicy()))


def test_an_adults_frontal_chest_is_in_scope() -> None:
    assert faults() == []
    assert faults(Modality="DX", BodyPartExamined="THORAX", ViewPosition="AP", PatientAge="018Y") == []


@pytest.mark.parametrize(
    ("edits", "reason"),
    [
        ({"PatientSpeciesDescription": "Canine"}, RefusalReason.SPECIES),
        ({"Modality": "MG"}, RefusalReason.MODALITY),
        ({"Modality": None}, RefusalReason.MODALITY),
        ({"BodyPartExamined": "HAND"}, RefusalReason.BODY_PART),
        ({"BodyPartExamined": ""}, RefusalReason.BODY_PART),
        ({"ViewPosition": "LL"}, RefusalReason.VIEW),
        ({"ViewPosition": ""}, RefusalReason.VIEW),
        ({"PatientAge": "017Y"}, RefusalReason.AGE),
        ({"PatientAge": "006M"}, RefusalReason.AGE),
        ({"PatientAge": "121Y"}, RefusalReason.AGE),
        ({"PatientAge": "8Y"}, RefusalReason.AGE),
        ({"PatientAge": "ABC"}, RefusalReason.AGE),
        ({"PatientOrientation": ["P", "F"], "ViewPosition": ""}, RefusalReason.VIEW),
    ],
)
def test_out_of_the_default_scope(edits: dict[str, Any], reason: RefusalReason) -> None:
    assert faults(**edits) == [reason]


def test_all_faults_are_named_the_most_telling_first() -> None:
    header = read_header("x.dcm", make_dicom(edits={"Modality": "MG", "ViewPosition": "", "PatientAge": "005Y"}))
    with pytest.raises(ImageRefusedError) as caught:
        check_scope("x.dcm", header, ScopePolicy())
    assert caught.value.reason is RefusalReason.MODALITY
    assert str(caught.value).startswith(
        "x.dcm: found modality MG, view not given, a patient age outside 18 to 120 years; needed CR/DX of CHEST/THORAX, PA/AP"
    )


def test_the_policy_decides_what_unknown_means() -> None:
    unknown = {"BodyPartExamined": "", "ViewPosition": "", "PatientAge": None, "PatientBirthDate": None}
    assert faults(**unknown) == [RefusalReason.BODY_PART, RefusalReason.VIEW]
    assert faults(ScopePolicy(accepts_unknown_body_part=True, accepts_unknown_view=True), **unknown) == []
    assert RefusalReason.AGE in faults(ScopePolicy(accepts_unknown_age=False), **unknown)


def test_an_age_that_cannot_be_read_is_not_repeated() -> None:
    header = read_header("x", make_dicom(edits={"PatientAge": "1ABC"}))
    with pytest.raises(
        ImageRefusedError, match=r"age that can't be read \(nnnD, nnnW, nnnM, nnnY or years can\)"
    ) as caught:
        check_scope("x", header, ScopePolicy(age_years=(0, 150)))
    assert "1ABC" not in str(caught.value)


def test_a_lateral_is_none_of_the_unknown_views() -> None:
    lateral = {"ViewPosition": None, "PatientOrientation": ["A", "F"]}
    assert faults(ScopePolicy(accepts_unknown_view=True), **lateral) == [RefusalReason.VIEW]


def test_a_wider_scope() -> None:
    scope = ScopePolicy(modalities=("CR", "DX", "RF"), views=("PA", "AP", "LL"), age_years=(0, 120))
    assert faults(scope, Modality="RF", ViewPosition="LL", PatientAge="003D") == []


@pytest.mark.parametrize(
    "edits",
    [{"age_years": (18, 17)}, {"views": ()}, {"modalities": ("dx",)}, {"age_years": (-1, 5)}, {"unknown": True}],
)
def test_a_scope_checks_itself(edits: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ScopePolicy(**edits)


def test_values_that_are_no_code_are_not_repeated() -> None:
    content = make_dicom().replace(b"CS\2\0PA", b"CS\2\0^a")
    with pytest.raises(ImageRefusedError, match="view not given") as caught:
        check_scope("x", read_header("x", content), ScopePolicy())
    assert caught.value.reason is RefusalReason.VIEW


def test_the_manifest_carries_the_scope(bundles: dict[str, Bundle]) -> None:
    manifest = bundles["fp32"].manifest
    assert manifest.scope is None
    scoped = manifest.model_copy(update={"scope": ScopePolicy(age_years=(0, 120))})
    assert Manifest.model_validate_json(scoped.to_json(), strict=True).scope == ScopePolicy(age_years=(0, 120))


def test_export_writes_the_scope_into_every_bundle(checkpoint_path: Path, tmp_path: Path) -> None:
    from chexnet_deploy.bundle.manifest import Precision
    from chexnet_deploy.export.chain import export_bundles

    (tmp_path / "scope.toml").write_text('views = ["PA"]\nage_years = [21, 90]\n')
    scope = read_scope(tmp_path / "scope.toml")
    assert scope == ScopePolicy(views=("PA",), age_years=(21, 90))
    made = export_bundles(
        checkpoint_path,
        tmp_path / "bundles",
        (Precision.FP32, Precision.FP16),
        data_root=None,
        calibration_list=None,
        n_calibration_images=100,
        dialects=("typed",),
        on_phase=lambda phase, done, total: None,
        scope=scope,
    )
    assert [bundle.manifest.scope for bundle in made] == [scope, scope]


@pytest.mark.parametrize("text", ["view = ['PA']", "views = [1]", "age_years = [30, 20]", "views =", "age_years = 18"])
def test_a_scope_file_that_is_wrong(tmp_path: Path, text: str) -> None:
    (tmp_path / "scope.toml").write_text(text)
    with pytest.raises(SpecError, match=r"scope\.toml"):
        read_scope(tmp_path / "scope.toml")


def test_the_predictor_refuses_what_is_out_of_scope(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    adult, child = tmp_path / "adult.dcm", tmp_path / "child.dcm"
    adult.write_bytes(make_dicom())
    child.write_bytes(make_dicom(edits={"PatientAge": "005Y"}))
    bundle = bundles["fp32"]
    with Predictor.open(bundle.path) as predictor, Decoder() as decoder:
        expected = predictor.predict(decoder.decode(adult).gray)
        assert predictor.predict(adult).probabilities == expected.probabilities
        with pytest.raises(ImageRefusedError) as caught:
            predictor.predict(child)
        assert caught.value.reason is RefusalReason.AGE
    manifest = bundle.manifest.model_copy(update={"scope": ScopePolicy(age_years=(0, 120))})
    with Predictor(open_session(bundle), manifest) as predictor:
        assert predictor.predict(child).probabilities
