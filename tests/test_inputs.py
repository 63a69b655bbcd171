"""What records refuse, and what is said where an optional package is missing."""

import math
from pathlib import Path

import pytest
from pydantic import ValidationError

from chexnet_deploy.bundle.signing.trust import Trust
from chexnet_deploy.datasets.csv_rows import read_rows
from chexnet_deploy.dicom.node.config import read_config
from chexnet_deploy.errors import ChexnetError, MissingPackageError, require
from chexnet_deploy.evaluation.radiologists import read_thresholds
from chexnet_deploy.images.listing import find_images
from chexnet_deploy.images.scope import read_scope
from chexnet_deploy.inputs import Record, StrictRecord, read_text, read_toml


class Loose(Record):
    value: float


class Strict(StrictRecord):
    value: float


@pytest.mark.parametrize("kind", [Loose, Strict])
def test_a_record_is_immutable_and_refuses_what_it_does_not_know(kind: type[Loose] | type[Strict]) -> None:
    record = kind(value=1.0)
    with pytest.raises(ValidationError, match="frozen"):
        record.value = 2.0  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs"):
        kind.model_validate({"value": 1.0, "surprise": 1})
    for value in (math.nan, math.inf):
        with pytest.raises(ValidationError, match="finite"):
            kind(value=value)


def test_only_a_strict_record_refuses_text_for_a_number() -> None:
    assert Loose.model_validate({"value": "1"}).value == 1.0
    with pytest.raises(ValidationError, match="valid number"):
        Strict.model_validate({"value": "1"})


def test_a_missing_package_names_the_extra() -> None:
    with pytest.raises(MissingPackageError) as caught, require("export"):
        import no_such_package
    assert str(caught.value) == "no_such_package is not installed. Run: pip install 'chexnet-deploy[export]'"
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
    with pytest.raises(MissingPackageError) as caught, require("table", so="no x can be y", instead="give z"):
        import no_such_package  # noqa: F401
    assert str(caught.value) == (
        "no_such_package is not installed, so no x can be y. Run: pip install 'chexnet-deploy[table]', or give z"
    )


def test_other_errors_pass_through() -> None:
    with pytest.raises(ImportError, match="cannot import name") as caught, require("export"):
        from math import no_such_name  # noqa: F401
    assert not isinstance(caught.value, MissingPackageError)


BOM = b"\xef\xbb\xbf"


def test_a_byte_order_mark_is_left_out_of_every_text_input(tmp_path: Path) -> None:
    def written(name: str, text: str) -> Path:
        (tmp_path / name).write_bytes(BOM + text.encode())
        (tmp_path / name).chmod(0o600)
        return tmp_path / name

    assert read_toml(written("a.toml", 'x = "é"\r\n')) == {"x": "é"}
    assert read_scope(written("scope.toml", 'views = ["PA"]\n')).views == ("PA",)
    assert read_text(written("a.txt", "a.png\n")) == "a.png\n"
    assert find_images([written("list.txt", "a.png\n")]).names == ("a.png",)
    assert next(iter(read_rows(written("a.csv", "Image Index,p\nx,1\n")))).fields == ["Image Index", "p"]
    assert read_thresholds(written("t.json", '{"Mass": 0.5}'), ["Mass"], are_probabilities=True)
    for read, needed in ((Trust.read, "keys"), (read_config, "listen")):
        with pytest.raises(ChexnetError) as caught:  # of a field, so the file was read
            read(written("b.toml", "surprise = 1\n"))
        assert "surprise" in str(caught.value) or needed in str(caught.value)
        assert "TOML" not in str(caught.value)
