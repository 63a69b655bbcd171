"""The leak guard: who was trained on, what int8 was calibrated on, who is evaluated, and which known split a list is.

Works on patient numbers and files' hashes, and reads no file. The patient is the unit of training: two images of one patient
are alike, so a model has seen a patient as soon as it was trained on any of their images.
"""

import base64
import hashlib
import zlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, StringConstraints, model_validator

from chexnet_deploy.errors import DatasetError
from chexnet_deploy.files import Sha256
from chexnet_deploy.inputs import Record, name_some

MAX_PATIENT: Final = 99_999_999
"""The largest number an image name of ChestX-ray14 can hold."""
MAX_PATIENTS: Final = 1_000_000
MAX_ENCODED_CHARACTERS: Final = 32_768  # a manifest has a cap of 64 KiB, and holds other things too

_FILE_BYTES: Final = 6  # of each SHA-256: that one of 25,000 files is mistaken for one of 256 has a chance of 2 in 10^8
MAX_FILES: Final = MAX_ENCODED_CHARACTERS // 8

FileSet: TypeAlias = Annotated[
    str, StringConstraints(pattern=r"^([A-Za-z0-9+/]{8})*$", max_length=MAX_ENCODED_CHARACTERS)
]
"""A set of at most MAX_FILES files: base64 of the first 6 bytes of each one's SHA-256, ascending. It names no file or patient, and
nobody who doesn't have a file can find out that it is in it."""

KNOWN_SPLITS: Final = MappingProxyType(
    {
        # even_patients_sha256 of each list (the last is of Zech 2018); beside it the number of its even patients
        "e0df33cfa85697ab0c7af223809d8b4164da97b9942c27c7121a666d5bb4a172": "official train_val list",  # 14,011
        "0b18198c329bce9d2d56cc43e0fdf90f733a8eaf4be1ae1ef53d3d8039d4a82c": "official test list",  # 1,391
        "39341d22dca337adb1a1300e53a04c599ec7e5dba02b3e3df478623f89df518d": "this project's train split",  # 12,611
        "f8c141974a3ea53cc4981225f06aafc3e2581c9296a27f7f020a63b43e658bd1": "this project's val split",  # 1,400
        "0e8b9947ef2f3f8a6eb1e22f7156e023e89a090becb6a9a58f28da53a68af093": "reproduce-chexnet's test list",  # 3,080
    }
)
"""Fingerprint -> whose list it is."""


def patients_sha256(patients: Iterable[int]) -> str:
    r"""Return the SHA-256 of a set of patients: each number once, ascending, in decimal ASCII, followed by "\n"."""
    lines = "".join(f"{patient}\n" for patient in sorted(set(map(int, patients))))
    return hashlib.sha256(lines.encode("ascii")).hexdigest()


def even_patients_sha256(patients: Iterable[int]) -> str:
    """Return `patients_sha256` of the even numbers alone.

    The fingerprints of KNOWN_SPLITS are of these, so that a whole list and one restricted to even patients, as the
    tests have it, are recognised alike. Two lists that differ in odd patients only are not told apart.
    """
    return patients_sha256(patient for patient in map(int, patients) if patient % 2 == 0)


def recognise_split(patients: Iterable[int]) -> str | None:
    """Return whose list has these patients; None where it is no known one, as with any part of a list.

    A name for a report and no proof: odd patients are not looked at. Whether a list may be evaluated is for
    `cover_official` and `refuse_training_patients` to say; they also meet the splits that have no fingerprint here.
    """
    return KNOWN_SPLITS.get(even_patients_sha256(patients))


@dataclass(frozen=True, slots=True)
class Coverage:
    """How evaluated images lie over the official lists.

    Attributes:
        n_train_val, n_test, n_unlisted: images whose patient is in that list, or in neither.
        n_train_val_patients, n_test_patients, n_unlisted_patients: patients of these images.
    """

    n_train_val: int
    n_test: int
    n_unlisted: int
    n_train_val_patients: int
    n_test_patients: int
    n_unlisted_patients: int

    @property
    def is_official_test(self) -> bool:
        """True where every image is of an official test patient: only then may a result be called one on that split."""
        return self.n_test > 0 and self.n_train_val == self.n_unlisted == 0

    def in_words(self) -> str:
        """Return one sentence for a report."""
        if self.is_official_test:
            return (
                f"All {self.n_test:,} images are of patients in the data folder's test list ({self.n_test_patients:,})."
            )
        return (
            f"By the data folder's lists {self.n_train_val:,} images are of {self.n_train_val_patients:,} train_val patients, "
            f"{self.n_test:,} of {self.n_test_patients:,} test patients, {self.n_unlisted:,} of "
            f"{self.n_unlisted_patients:,} in neither list: the result is not comparable with one on the test list, "
            f"and a model trained on the train_val list has seen its patients."
        )


def cover_official(
    patients: NDArray[np.int64], *, train_val_patients: Collection[int], test_patients: Collection[int]
) -> Coverage:
    """Count evaluated images by official list.

    Args:
        patients: [N] of each evaluated image.
        train_val_patients: of the official list, or as much of it as is at hand.
        test_patients: likewise.

    Raises:
        DatasetError: a patient is in both lists.
    """
    both = set(train_val_patients) & set(test_patients)
    if both:
        raise DatasetError(
            f"Found patients {name_some(sorted(both))} in both official lists; needed each in one. Next: restore the lists."
        )
    in_train_val = np.isin(patients, np.fromiter(train_val_patients, np.int64))
    in_test = np.isin(patients, np.fromiter(test_patients, np.int64))
    groups = (patients[in_train_val], patients[in_test], patients[~in_train_val & ~in_test])
    images = (int(group.size) for group in groups)
    return Coverage(*images, *(int(np.unique(group).size) for group in groups))


class PatientSet(Record):
    """A set of patients small enough for a manifest, and exact: no patient is in it by chance.

    It can be read back, so numbers that identify a person don't belong in it; those of ChestX-ray14 are pseudonyms.

    Attributes:
        n_patients: how many.
        sha256: `patients_sha256` of them.
        encoded: base64 of the zlib-compressed bitmap: bit p (most significant bit of byte p // 8 first) is patient p.
    """

    n_patients: Annotated[int, Field(ge=1, le=MAX_PATIENTS)]
    sha256: Sha256
    encoded: Annotated[str, Field(max_length=MAX_ENCODED_CHARACTERS)]

    @classmethod
    def of(cls, patients: Collection[int]) -> "PatientSet":
        """Encode patients.

        Raises:
            DatasetError: there are none, a number is negative or above MAX_PATIENT, or the set would not fit.
        """
        numbers = np.unique(np.fromiter(patients, np.int64))
        if not 1 <= numbers.size <= MAX_PATIENTS or numbers[0] < 0 or numbers[-1] > MAX_PATIENT:
            found = f"{numbers.size:,} patients, {numbers[0]} to {numbers[-1]}" if numbers.size else "no patient"
            raise DatasetError(
                f"Found {found}; needed 1 to {MAX_PATIENTS:,}, numbered 0 to {MAX_PATIENT}. "
                f"Next: number the patients so."
            )
        bitmap = np.zeros(int(numbers[-1]) // 8 + 1, np.uint8)
        np.bitwise_or.at(bitmap, numbers // 8, (128 >> numbers % 8).astype(np.uint8))
        encoded = base64.b64encode(zlib.compress(bitmap.tobytes(), 9)).decode("ascii")
        if len(encoded) > MAX_ENCODED_CHARACTERS:
            raise DatasetError(
                f"Found {numbers.size:,} patients that take {len(encoded):,} characters; needed at most "
                f"{MAX_ENCODED_CHARACTERS:,}. Next: number the patients consecutively."
            )
        return cls(n_patients=int(numbers.size), sha256=patients_sha256(numbers.tolist()), encoded=encoded)

    def patients(self) -> frozenset[int]:
        """Return the numbers."""
        return frozenset(_decode(self.encoded).tolist())

    @model_validator(mode="after")
    def _is_consistent(self) -> "PatientSet":
        numbers = _decode(self.encoded)
        if numbers.size != self.n_patients or patients_sha256(numbers.tolist()) != self.sha256:
            raise ValueError("the patients encoded are not those that n_patients and sha256 say")
        return self


def refuse_training_patients(evaluated: Iterable[int], trained_on: PatientSet | None, *, purpose: str) -> str:
    """Refuse patients that the model was trained on; return what can be said of the others, for a report.

    Args:
        evaluated: patients about to be used.
        trained_on: out of the model's manifest; None where it says nothing, which the sentence returned admits.
        purpose: what they are used for, e.g. "evaluation" or "choosing thresholds".

    Raises:
        DatasetError: a patient was trained on.
    """
    numbers = set(map(int, evaluated))
    if trained_on is None:
        return (
            f"The model doesn't say whom it was trained on: nothing shows that these {len(numbers):,} patients are new."
        )
    seen = numbers & trained_on.patients()
    if seen:
        raise DatasetError(
            f"Found {len(seen):,} of {len(numbers):,} patients that the model was trained on, e.g. {name_some(sorted(seen))}; "
            f"needed none for {purpose}. Next: take patients of another split. Patients are known "
            f"by number alone: of another data set than the model's, they only share numbers; number them otherwise. "
            f"Images named as ChestX-ray14's (00000002_000.png) say their patient by name: name those otherwise too."
        )
    n_strangers = sum(number > MAX_PATIENT for number in numbers)
    if n_strangers:
        return (
            f"The model was trained on patients of another data set; whether {n_strangers:,} of these {len(numbers):,} are "
            f"among them is not known. Make sure that they are not."
        )
    return f"None of the {len(numbers):,} patients is among the {trained_on.n_patients:,} the model was trained on."


def encode_files(sha256s: Iterable[Sha256]) -> FileSet:
    """Return the set of the files with these hashes."""
    return base64.b64encode(b"".join(sorted(map(_first_bytes, sha256s)))).decode("ascii")


def refuse_calibration_files(evaluated: Mapping[str, Sha256], calibrated_on: FileSet | None, *, purpose: str) -> str:
    """Refuse images that set a model's int8 ranges; return what can be said of the others, for a report.

    Args:
        evaluated: name -> SHA-256 of the files about to be used.
        calibrated_on: out of the model's manifest; None where it says nothing, which the sentence returned admits.
        purpose: as of refuse_training_patients.

    Raises:
        DatasetError: an image was calibrated on.
    """
    if calibrated_on is None:
        return "The model doesn't say which images set its int8 ranges: nothing shows that none of these did."
    raw = base64.b64decode(calibrated_on)
    known = {raw[i : i + _FILE_BYTES] for i in range(0, len(raw), _FILE_BYTES)}
    used = [name for name, sha256 in evaluated.items() if _first_bytes(sha256) in known]
    if used:
        raise DatasetError(
            f"Found {len(used):,} of {len(evaluated):,} images that set the model's int8 ranges, e.g. {name_some(used)}; needed "
            f"none for {purpose}. Next: give the table that `export` had, with its split, or a list of the others by --images."
        )
    return f"None of the {len(evaluated):,} images is among the {len(known):,} that set int8's ranges."


def _first_bytes(sha256: Sha256) -> bytes:
    return bytes.fromhex(sha256)[:_FILE_BYTES]


def _decode(encoded: str) -> NDArray[np.int64]:
    limit_bytes = MAX_PATIENT // 8 + 1
    try:
        # A limit, since a few bytes can decompress to gigabytes.
        decompressor = zlib.decompressobj()
        packed = decompressor.decompress(base64.b64decode(encoded, validate=True), limit_bytes)
    except (ValueError, zlib.error) as err:
        raise ValueError(f"the patients can't be decoded: {err}") from err
    if not decompressor.eof or decompressor.unused_data:
        raise ValueError("the patients can't be decoded: cut off, too many, or followed by something else")
    bitmap = np.frombuffer(packed, np.uint8)
    places = np.flatnonzero(bitmap)
    if places.size > MAX_PATIENTS:
        raise ValueError(f"more than {MAX_PATIENTS:,} patients")
    rows, bits = np.nonzero(np.unpackbits(bitmap[places]).reshape(-1, 8))
    numbers: NDArray[np.int64] = places[rows] * 8 + bits
    return numbers
