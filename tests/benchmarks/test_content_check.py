"""The input guard's benchmark: its two ways to judge agree, and its counts can be checked by hand."""

import numpy as np

from benchmarks.statistics.content_check import (
    ACCEPTED,
    describe_many,
    draw_phantoms,
    judge_all_turns,
    rates,
    verdicts_of_scores,
)
from chexnet_deploy.datasets.nih_tables import Radiograph
from chexnet_deploy.images.content_check import Turn, score_turns

REASONS = [ACCEPTED, *(turn.value for turn in Turn if turn is not Turn.UPRIGHT)]


def radiograph(patient: int, age_years: int) -> Radiograph:
    return Radiograph(
        image=f"{patient:08d}_000.png",
        patient=patient,
        findings=frozenset(),
        age_years=age_years,
        sex="F",
        view="PA",
        path=None,
    )


def test_scores_and_pixels_give_one_verdict() -> None:
    """A phantom laid in each way, and pictures of nothing."""
    grays = draw_phantoms(n=3, side_px=256)
    grays += [np.random.default_rng(seed).integers(0, 256, (256, 256), np.uint8) for seed in range(2)]
    for i, gray in enumerate(grays):
        judged = judge_all_turns(gray)
        assert verdicts_of_scores(np.array(list(score_turns(gray).values()))) == judged
        assert judged == (REASONS if i < 3 else ["not-a-frontal-chest"] * 8)


def test_rates_by_hand() -> None:
    """Of four, one adult is refused upright, and one child inverted is let through."""
    rows = [list(REASONS) for _ in range(4)]
    rows[0][0] = "not-a-frontal-chest"
    inverted = list(Turn).index(Turn.INVERTED)
    rows[3][inverted] = ACCEPTED
    rows[1][inverted] = "upside-down"  # refused, but not for what it is
    found = rates([radiograph(patient, age) for patient, age in enumerate((40, 50, 60, 4))], rows)
    assert found["falsely_refused"]["value"] == 1 / 4  # type: ignore[index]
    assert found["falsely_refused_adults"]["value"] == 1 / 3  # type: ignore[index]
    assert found["falsely_refused_why"] == {"not-a-frontal-chest": 1}
    assert found["inverted"]["refused"]["value"] == 3 / 4  # type: ignore[index]
    assert found["inverted"]["refused_for_this_reason"]["value"] == 2 / 4  # type: ignore[index]
    assert found["upside-down"]["refused"]["value"] == 1  # type: ignore[index]


def test_counts_of_pictures() -> None:
    blank, phantom = np.zeros((256, 256), np.uint8), draw_phantoms(n=1, side_px=256)[0]
    found = describe_many([blank, phantom, np.rot90(phantom)])
    assert (found["n"], found["accepted"], found["accepted_in_any_turn"]) == (3, 1, 2)
    assert found["verdicts"] == {"blank": 1, ACCEPTED: 1, "turned-counterclockwise": 1}
