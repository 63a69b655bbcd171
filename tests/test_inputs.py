"""What records refuse, and what is said where an optional package is missing."""

import math

import pytest
from pydantic import ValidationError

from chexnet_deploy.errors import MissingPackageError, require
from chexnet_deploy.inputs import Record, StrictRecord


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
