"""The leak guard on patients counted by hand, and on the official lists where they are at hand."""

import base64
import csv
import hashlib
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from chexnet_deploy.datasets.chestxray14 import ChestXray14
from chexnet_deploy.datasets.nih_tables import patient_of
from chexnet_deploy.datasets.patients import (
    KNOWN_SPLITS,
    MAX_ENCODED_CHARACTERS,
    MAX_PATIENT,
    Coverage,
    PatientSet,
    cover_official,
    encode_files,
    even_patients_sha256,
    patients_sha256,
    recognise_split,
    refuse_calibration_files,
    refuse_training_patients,
)
from chexnet_deploy.errors import DatasetError
from chexnet_deploy.files import sha256_hex


@pytest.mark.parametrize(
    ("name", "patient"),
    [
        ("00000002_000.png", 2),
        ("00030805_012.png", 30_805),
        ("2_000.png", None),
        ("a.png", None),
        ("00000002_000.jpg", None),
        ("x00000002_000.png", None),
        ("00000002_000.png\n", None),
        ("\u0660" * 7 + "\u0662_000.png", None),  # digits, but not ASCII's
    ],
)
def test_the_patient_in_a_name(name: str, patient: int | None) -> None:
    assert patient_of(name) == patient


def test_a_fingerprint_is_of_the_set_and_not_of_its_order() -> None:
    expected = hashlib.sha256(b"2\n4\n10\n").hexdigest()
    assert patients_sha256([10, 4, 2, 4]) == patients_sha256(np.array([2, 4, 10])) == expected
    assert even_patients_sha256([1, 2, 3, 4, 10]) == expected
    assert patients_sha256([2, 4]) != expected
    assert patients_sha256([24, 10]) != patients_sha256([2, 410])
    assert patients_sha256([]) == hashlib.sha256(b"").hexdigest()


def test_a_list_that_is_no_known_one_is_not_recognised() -> None:
    assert recognise_split([2, 4, 10]) is None
    assert recognise_split([]) is None


def test_images_are_counted_by_official_list() -> None:
    patients = np.array([2, 2, 4, 6, 6, 6, 9], np.int64)
    coverage = cover_official(patients, train_val_patients={2, 4, 8}, test_patients={6})
    assert coverage == Coverage(3, 3, 1, 2, 1, 1)
    assert not coverage.is_official_test
    assert "3 images are of 2 train_val patients, 3 of 1 test patients, 1 of 1 in neither" in (coverage.in_words())
    only_test = cover_official(patients[3:6], train_val_patients={2, 4, 8}, test_patients={6})
    assert only_test.is_official_test
    assert only_test.in_words() == "All 3 images are of patients in the data folder's test list (1)."
    assert not cover_official(patients[3:], train_val_patients={2, 4, 8}, test_patients={6}).is_official_test
    assert not cover_official(patients[:0], train_val_patients={2}, test_patients={6}).is_official_test
    assert cover_official(patients, train_val_patients=(), test_patients=()).n_unlisted == 7
    with pytest.raises(DatasetError, match="patients 4 in both official lists"):
        cover_official(patients, train_val_patients={2, 4}, test_patients={4, 6})


def test_a_patient_set_is_a_bitmap() -> None:
    # Patients 1 and 10 are bit 1 of byte 0 and bit 2 of byte 1.
    encoded = PatientSet.of([10, 1, 10])
    assert zlib.decompress(base64.b64decode(encoded.encoded)) == bytes([0b0100_0000, 0b0010_0000])
    assert (encoded.n_patients, encoded.sha256) == (2, hashlib.sha256(b"1\n10\n").hexdigest())
    assert encoded.patients() == {1, 10}


@given(st.sets(st.integers(0, 40_000), min_size=1, max_size=200))
def test_a_patient_set_comes_back_exactly(patients: set[int]) -> None:
    encoded = PatientSet.of(patients)
    assert encoded.patients() == patients
    assert PatientSet.model_validate_json(encoded.model_dump_json(), strict=True) == encoded


def test_the_whole_data_set_s_training_patients_fit_a_manifest(rng: np.random.Generator) -> None:
    # As many as the official train list has: about nine in eleven of 30,805.
    patients = rng.choice(np.arange(1, 30_806), 25_200, replace=False)
    encoded = PatientSet.of(patients.tolist())
    assert len(encoded.encoded) < 5200
    assert encoded.patients() == set(patients.tolist())


def test_the_largest_number_is_taken_and_what_does_not_fit_refused(rng: np.random.Generator) -> None:
    assert PatientSet.of([MAX_PATIENT]).patients() == {MAX_PATIENT}
    for patients in ([], [-1], [MAX_PATIENT + 1]):
        with pytest.raises(DatasetError, match="needed 1 to 1,000,000, numbered 0 to 99999999"):
            PatientSet.of(patients)
    with pytest.raises(DatasetError, match=f"needed at most {MAX_ENCODED_CHARACTERS:,}"):
        PatientSet.of(rng.integers(0, MAX_PATIENT, 30_000).tolist())


def packed(content: bytes) -> str:
    return base64.b64encode(content).decode()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_patients": 3}, "not those that n_patients and sha256 say"),
        ({"sha256": "0" * 64}, "not those that n_patients and sha256 say"),
        ({"encoded": packed(zlib.compress(bytes([0b0110_0000])))}, "not those that"),
        ({"encoded": "not base64"}, "can't be decoded"),
        ({"encoded": packed(b"no zlib")}, "can't be decoded"),
        ({"encoded": packed(zlib.compress(b"@ ")[:-3])}, "cut off"),
        ({"encoded": packed(zlib.compress(b"@ ") + b"more")}, "followed by something else"),
        ({"encoded": packed(zlib.compress(bytes(20_000_000)))}, "too many"),
        ({"encoded": packed(zlib.compress(b"\xff" * 2_000_000))}, "more than 1,000,000 patients"),
        ({"encoded": "A" * (MAX_ENCODED_CHARACTERS + 1)}, "at most"),
        ({"extra": 1}, "not permitted"),
    ],
)
def test_a_damaged_patient_set_is_refused(change: dict[str, object], words: str) -> None:
    good = PatientSet.of([1, 10]).model_dump()
    with pytest.raises(ValidationError, match=words):
        PatientSet.model_validate({**good, **change})


def test_patients_trained_on_are_refused() -> None:
    trained_on = PatientSet.of([2, 4, 8])
    with pytest.raises(DatasetError) as refusal:
        refuse_training_patients(np.array([2, 3, 8, 8]), trained_on, purpose="evaluation")
    assert str(refusal.value) == (
        "Found 2 of 3 patients that the model was trained on, e.g. 2, 8; needed none for evaluation. "
        "Next: take patients of another split. Patients are known by number alone: of another data set than the model's, "
        "they only share numbers; number them otherwise. "
        "Images named as ChestX-ray14's (00000002_000.png) say their patient by name: name those otherwise too."
    )
    words = refuse_training_patients([1, 3, 3], trained_on, purpose="choosing thresholds")
    assert words == "None of the 2 patients is among the 3 the model was trained on."


def test_a_model_that_does_not_say_is_not_taken_for_clean() -> None:
    words = refuse_training_patients([1, 3], None, purpose="evaluation")
    assert words == "The model doesn't say whom it was trained on: nothing shows that these 2 patients are new."


def test_files_calibrated_on_are_refused() -> None:
    hashes = {f"{i}.png": sha256_hex(bytes([i])) for i in range(6)}
    known = encode_files(list(hashes.values())[:3])
    assert (len(known), encode_files([])) == (24, "")
    with pytest.raises(DatasetError) as refusal:
        refuse_calibration_files(hashes, known, purpose="evaluation")
    assert str(refusal.value) == (
        "Found 3 of 6 images that set the model's int8 ranges, e.g. 0.png, 1.png, 2.png; needed none for evaluation. "
        "Next: give the table that `export` had, with its split, or a list of the others by --images."
    )
    others = {name: hashes[name] for name in ("3.png", "5.png")}
    words = refuse_calibration_files(others, known, purpose="evaluation")
    assert words == "None of the 2 images is among the 3 that set int8's ranges."
    assert "doesn't say which images" in refuse_calibration_files(others, None, purpose="evaluation")


def test_the_phantom_s_splits_pass_and_its_training_split_does_not(phantom: ChestXray14) -> None:
    patients = {name: set(map(patient_of, names)) for name, names in phantom.listed.items()}
    trained_on = PatientSet.of(patients["train"])
    for name in ("val", "test"):
        assert "None of the" in refuse_training_patients(patients[name], trained_on, purpose="evaluation")
    with pytest.raises(DatasetError, match=f"Found {len(patients['train'])} of {len(patients['train'])} patients"):
        refuse_training_patients(patients["train"], trained_on, purpose="evaluation")
    assert all(recognise_split(numbers) is None for numbers in patients.values())


@pytest.mark.dataset
def test_the_official_lists_and_an_independent_reproduction_s_are_recognised(real_root: Path) -> None:
    dataset = ChestXray14.open(real_root)
    listed = {name: [patient_of(image) for image in names] for name, names in dataset.listed.items()}
    train_val = {p for name in ("train", "val") for p in listed[name] if p is not None}
    test = {p for p in listed["test"] if p is not None}
    assert recognise_split(train_val) == "official train_val list"
    assert recognise_split(test) == "official test list"
    assert recognise_split(test | {1, 3}) == "official test list"  # odd patients are not looked at
    assert recognise_split(sorted(test)[:-1]) is None
    assert recognise_split(p for p in listed["train"] if p is not None) == "this project's train split"
    assert recognise_split(p for p in listed["val"] if p is not None) == "this project's val split"
    path = real_root / "predictions" / "reproduce_chexnet_test.csv"
    if not path.exists():
        pytest.skip("NOT RUN on published predictions: the folder has none")
    with path.open(newline="") as file:
        names = [row["Image Index"] for row in csv.DictReader(file)]
    patients = np.array([patient_of(name) for name in names], np.int64)
    assert recognise_split(patients) == "reproduce-chexnet's test list"
    coverage = cover_official(patients, train_val_patients=train_val, test_patients=test)
    # Nine in ten of its patients are ones that a model with the official split is trained on.
    assert coverage == Coverage(9080, 2547, 0, 2789, 291, 0)
    assert not coverage.is_official_test
    assert len(KNOWN_SPLITS) == 5


def test_a_table_s_own_patients_are_not_said_to_be_new() -> None:
    said = refuse_training_patients([1 << 62, 8], PatientSet.of([7]), purpose="evaluation")
    assert "whether 1 of these 2 are among them is not known" in said
    with pytest.raises(DatasetError, match="Found 1 of 2 patients that the model was trained on"):
        refuse_training_patients([1 << 62, 7], PatientSet.of([7]), purpose="evaluation")
