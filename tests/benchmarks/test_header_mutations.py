"""A seeded sample of `python -m benchmarks.robustness.header_mutations`, and its judges, tried on what can be checked by hand."""

from pathlib import Path
from random import Random

import numpy as np
import pytest

from benchmarks.robustness import dicom_oracle as oracle
from benchmarks.robustness import header_mutations
from benchmarks.robustness.header_mutations import MUTATIONS, VARIATIONS, Case, read_mutated, read_sound
from chexnet_deploy.images.dicom.decoder import Decoder

needs_tools = pytest.mark.skipif(
    bool(oracle.missing_tools()),
    reason="NOT RUN against DCMTK and dicom3tools: install Debian's packages of these names",
)


def ignore(phase: str, done: int, total: int) -> None:
    pass


@needs_tools
def test_changed_headers(tmp_path: Path) -> None:
    outcome = read_mutated(40, seed=1, folder=tmp_path, on_phase=ignore)
    assert outcome.wrong == ()
    assert outcome.tried == sum(outcome.answers.values()) == 40
    assert outcome.answers["read alike"] >= 8
    assert len(outcome.answers) >= 5  # refused for several reasons
    assert len(outcome.by_family) >= len(MUTATIONS) - 1


@needs_tools
def test_sound_variations(tmp_path: Path) -> None:
    outcome = read_sound(12, seed=1, folder=tmp_path, on_phase=ignore)
    assert outcome.wrong == ()
    assert outcome.answers["read alike"] >= 6
    assert set(outcome.by_family) <= set(VARIATIONS)


@needs_tools
def test_a_wrong_picture_and_a_wrong_yes_are_seen(tmp_path: Path) -> None:
    words = np.arange(48 * 40, dtype=np.uint16).reshape(48, 40)
    case = Case(words=words, edits={"BitsStored": 12, "HighBit": 11}, orientation="L\\H")
    gray = np.floor(words / 1919 * 255 + 0.5).astype(np.uint8)  # not turned
    (tmp_path / "x.dcm").write_bytes(case.content())
    assert header_mutations._judge(case, gray, tmp_path / "x.dcm").startswith("wrong: off by 2")
    assert header_mutations._judge(case, np.flipud(gray), tmp_path / "x.dcm") == "read alike"
    case.edits |= {"PatientBirthDate": "19600102"}
    case.age = "8Y"
    with Decoder() as decoder:
        assert header_mutations._answer(case, decoder, tmp_path / "x.dcm") == "refused, age"


def test_the_oracle_turns_by_the_letters_at_the_edges() -> None:
    picture = np.array([[1, 2], [3, 4]])
    assert oracle.turn_upright(picture, "L\\F").tolist() == [[1, 2], [3, 4]]
    assert oracle.turn_upright(picture, "R\\F").tolist() == [[2, 1], [4, 3]]
    assert oracle.turn_upright(picture, "L\\H").tolist() == [[3, 4], [1, 2]]
    assert oracle.turn_upright(picture, "F\\R").tolist() == [[3, 1], [4, 2]]  # the head was on the left
    assert oracle.turn_upright(picture, "F\\L").tolist() == [[1, 3], [2, 4]]
    assert [oracle.can_upright(said) for said in ("l \\f", "", "LA\\F", "A\\F", "LH\\FL", "L")] == [True] * 3 + [
        False
    ] * 3


def test_the_same_seed_changes_alike() -> None:
    chests = header_mutations._draw_chests()

    def made() -> list[bytes]:
        chance, contents = Random(3), []
        for change in MUTATIONS.values():
            case = header_mutations._begin(chests, chance)
            change(case, chance)
            contents.append(case.content())
        return contents

    assert made() == made()
