"""Small text inputs (text, TOML), the base classes of checked records, and the wording of errors about them."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final, TextIO, TypeAlias

from pydantic import BaseModel, ConfigDict, ValidationError, WithJsonSchema

from chexnet_deploy.errors import DatasetError, SpecError

if sys.version_info >= (3, 11):
    import tomllib
else:  # the same parser, before it moved into the standard library
    import tomli as tomllib

IMAGE_SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".dcm")
"""What is taken out of a folder, in capitals too; a file that is named itself may be called anything."""


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a file's text, with its line ends as they are; a byte order mark is left out.

    Raises:
        DatasetError: there is no such regular file (a pipe would be waited for), or it is not readable UTF-8.
    """
    try:
        if not path.is_file():
            found = "a folder" if path.is_dir() else "no such file"
            raise DatasetError(f"{path}: found {found}; needed a text file. Next: check the path.")
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield file
    except (OSError, UnicodeDecodeError) as err:
        raise DatasetError(
            f"{path}: found {err}; needed readable UTF-8 text. Next: copy the file again, or save it as UTF-8."
        ) from err


def read_text(path: Path) -> str:
    """Return a file's text; errors as open_text."""
    with open_text(path) as file:
        return file.read()


def quote_some(names: Sequence[str]) -> str:
    """Return the first few names for a message, and how many more there are."""
    return name_some([repr(name[:60]) for name in names])


def name_some(names: Sequence[object]) -> str:
    """Return the first few names as they are, and how many more there are."""
    shown = ", ".join(str(name) for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5:,} more"


def read_toml(path: Path) -> Mapping[str, object]:
    """Read a TOML file.

    Raises:
        SpecError: missing, unreadable or not TOML.
    """
    try:
        content: Mapping[str, object] = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        return content
    except OSError as err:
        raise SpecError(f"{path} can't be read: {err.strerror}. Check the path.") from err
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise SpecError(f"{path} is not TOML: {err}. Correct that line.") from err


def describe(err: ValidationError) -> str:
    """Return pydantic's complaints as `field: reason`, the first three of them."""
    complaints = [
        f"{'.'.join(map(str, error['loc'])) or 'file'}: "
        f"{'no such field' if error['type'] == 'extra_forbidden' else error['msg']}"
        for error in err.errors()
    ]
    return "; ".join(complaints[:3]) + (f"; and {len(complaints) - 3} more" if len(complaints) > 3 else "")


class Record(BaseModel):
    """Base of what is read from a file or written to one: immutable; no unknown fields, no NaN, no infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


AnyFloat: TypeAlias = Annotated[
    float, WithJsonSchema({"anyOf": [{"type": "number"}, {"enum": ["NaN", "Infinity", "-Infinity"]}]})
]
"""A number in a MeasuredRecord that may be no finite one; JSON has no such numbers, so those are words there."""


class MeasuredRecord(Record):
    """A Record of what was measured: a report must be able to say that an engine answered with infinity."""

    model_config = ConfigDict(allow_inf_nan=True, ser_json_inf_nan="strings")


class StrictRecord(Record):
    """A Record that converts no types: the text "3" is not a number."""

    model_config = ConfigDict(strict=True)


class ReportRecord(BaseModel):
    """Base of a report with computed fields: they are written too, so an unknown field is no error when it is read again."""

    model_config = ConfigDict(frozen=True, extra="ignore")
