"""Strangers' CSV files: what is read, and what is refused with which words."""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from chexnet_deploy.datasets.chestxray14 import ChestXray14, truth
from chexnet_deploy.datasets.csv_rows import read_names
from chexnet_deploy.datasets.findings import FINDINGS
from chexnet_deploy.datasets.predictions import LabelledScores, read_predictions
from chexnet_deploy.datasets.table import read_labels
from chexnet_deploy.errors import DatasetError
from chexnet_deploy.metrics.roc import auroc

IMAGES = ("00000002_000.png", "00000004_000.png", "00000004_001.png")
NIH = """\
Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position
00000002_000.png,No Finding,0,2,80,M,PA
00000004_000.png,Mass|Pleural_Thickening,0,4,041Y,F,AP
00000004_001.png,Mass,1,4,41,F,AP
"""
WIDE_LABELS = """\
image,Patient ID,Mass,pleural thickening,sex,age,view
00000002_000.png,2,0,0,male,80,PA
00000004_000.png,4,1,1,Female,41,ap
00000004_001.png,4,1,0,,,
"""
WIDE = """\
Image Index,prob_Mass,prob_Pleural_Thickening
00000002_000.png,0.1,0.2
00000004_000.png,0.7,0.6
00000004_001.png,0.8,0.3
"""
LONG = """\
image,finding,score
00000002_000.png,Mass,0.1
00000004_000.png,Pleural Thickening,0.6
00000004_000.png,Mass,0.7
00000002_000.png,Pleural Thickening,0.2
00000004_001.png,Mass,0.8
00000004_001.png,Pleural Thickening,0.3
"""

Read: TypeAlias = Callable[..., LabelledScores]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def _read(predictions: str, labels: str = NIH) -> LabelledScores:
        (tmp_path / "predictions.csv").write_text(predictions, encoding="utf-8", newline="")
        (tmp_path / "labels.csv").write_text(labels, encoding="utf-8", newline="")
        return read_predictions(tmp_path / "predictions.csv", read_labels(tmp_path / "labels.csv"))

    return _read


STATUS = """\
image,status,prob_Mass,prob_Pleural_Thickening,reason
00000002_000.png,ok,0.1,0.2,
00000004_000.png,quarantined,,,found 0 bytes
00000004_001.png,ok,0.8,0.3,
"""


@pytest.mark.parametrize(
    ("predictions", "n"),
    [
        (STATUS, 1),
        (STATUS.replace("image,status", "Image Index,Status"), 1),
        (STATUS.replace("00000002_000.png,ok,0.1,0.2", "nobody_knows.png,quarantined,,"), 2),  # needs no label either
        ("image,status,finding,score\n00000004_001.png,ok,Mass,0.8\n00000002_000.png,quarantined,,\n", 1),
        (STATUS.replace("quarantined,,", "ok,0.5,0.5"), 0),
    ],
)
def test_quarantined_images_are_left_out_and_counted(read: Read, predictions: str, n: int) -> None:
    scores = read(predictions)
    assert scores.n_quarantined == n
    assert "00000004_001.png" in scores.names
    assert len(scores.names) == len(predictions.splitlines()) - 1 - n
    assert scores.n_not_predicted == 3 - len(scores.names)


@pytest.mark.parametrize(
    ("predictions", "found"),
    [
        (STATUS.replace("quarantined", "ok"), "found the score '' of Mass"),  # a hole is still a hole
        (STATUS.replace("status", "state"), "found the score '' of Mass"),
        (
            STATUS.replace("ok,0.1,0.2", "quarantined,,").replace("ok,0.8,0.3", "quarantined,,"),
            "predict quarantined all 3 images",
        ),
    ],
)
def test_holes_and_nothing_at_all_are_refused(read: Read, predictions: str, found: str) -> None:
    with pytest.raises(DatasetError, match=found):
        read(predictions)


@pytest.mark.parametrize("labels", [NIH, WIDE_LABELS])
@pytest.mark.parametrize("predictions", [WIDE, LONG])
def test_wide_and_long_say_the_same(read: Read, predictions: str, labels: str) -> None:
    table = read(predictions, labels)
    assert table.names == IMAGES
    assert table.findings == ("Mass", "Pleural_Thickening")
    assert table.scores.tolist() == [[0.1, 0.2], [0.7, 0.6], [0.8, 0.3]]
    assert table.truth.tolist() == [[False, False], [True, True], [True, False]]
    assert table.patients.tolist() == [2, 4, 4]
    assert (table.scores.dtype, table.truth.dtype, table.patients.dtype) == (np.float64, np.bool_, np.int64)
    assert (table.kind, table.ignored, table.unlabelled_findings, table.n_not_predicted) == ("probability", (), (), 0)


def test_sex_age_and_view_come_along_and_what_is_not_said_is_unknown(read: Read) -> None:
    official, wide = read(WIDE), read(WIDE, WIDE_LABELS)
    assert (official.sex, official.view) == (("M", "F", "F"), ("PA", "AP", "AP"))
    assert official.age_years.tolist() == [80, 41, 41]
    assert (wide.sex, wide.view) == (("M", "F", "unknown"), ("PA", "AP", "unknown"))
    assert wide.age_years.tolist()[:2] == [80, 41]
    assert math.isnan(wide.age_years[2])
    bare = read(WIDE, "image,Mass\n" + "".join(f"{name},1\n" for name in IMAGES))
    assert (set(bare.sex), set(bare.view)) == ({"unknown"}, {"unknown"})
    assert np.isnan(bare.age_years).all()


@pytest.mark.parametrize(
    "header",
    [
        "image,Mass,Pleural_Thickening",
        "Image ID,MASS,pleural thickening",
        "filename,pred_mass,pred_PleuralThickening",
        "image_name,Mass_prob,Pleural_Thickening_prob",
        "\ufeffImage Index,p_Mass,p_Pleural-Thickening",
    ],
)
def test_columns_are_found_by_name(read: Read, header: str) -> None:
    table = read(WIDE.replace(WIDE.splitlines()[0], header))
    assert table.findings == ("Mass", "Pleural_Thickening")
    assert table.scores[1].tolist() == [0.7, 0.6]


def test_every_finding_is_found_with_blank_and_underscore_and_comes_in_canonical_order(read: Read) -> None:
    names = [finding.replace("_", " ").lower() for finding in reversed(FINDINGS)]
    table = read(f"image,{','.join(names)}\n{IMAGES[0]},{','.join(str(n / 20) for n in range(14))}\n")
    assert table.findings == FINDINGS
    assert table.scores[0].tolist() == [n / 20 for n in reversed(range(14))]
    assert table.n_not_predicted == 2


@pytest.mark.parametrize(
    ("column", "score", "kind"),
    [
        ("prob_Mass", 0.5, "probability"),
        ("Mass", 0.5, "probability"),
        ("Mass", -2.5, "score"),
        ("logit_Mass", 0.5, "logit"),
        ("Mass_logit", -3, "logit"),
        ("score_Mass", 7, "score"),
    ],
)
def test_the_kind_of_score_is_told(read: Read, column: str, score: float, kind: str) -> None:
    assert read(f"image,{column}\n{IMAGES[0]},{score}\n").kind == kind
    if column.startswith(("logit", "prob")):
        word = column.split("_")[0]
        assert read(f"image,finding,{word}\n{IMAGES[0]},Mass,{score}\n").kind == kind


def test_what_is_left_out_is_named(read: Read) -> None:
    table = read(f",Image Index,label_Mass,Mass,Edema,Fracture\n0,{IMAGES[0]},1,0.5,0.5,0.5\n", WIDE_LABELS)
    assert (table.findings, table.unlabelled_findings, table.ignored) == (
        ("Mass",),
        ("Edema",),
        ("label_Mass", "Fracture"),
    )
    long = read(f"image,class,prob\n{IMAGES[0]},No Finding,0.5\n{IMAGES[0]},Mass,0.25\n")
    assert (long.scores.tolist(), long.ignored) == ([[0.25]], ("No Finding",))


def test_one_class_only_is_left_to_the_statistics(read: Read) -> None:
    table = read(f"image,Hernia\n{IMAGES[0]},0.5\n")
    assert not table.truth.any()
    assert math.isnan(auroc(table.scores[:, 0], table.truth[:, 0]))


def test_patients_without_numbers_are_hashed_and_kept_apart(read: Read) -> None:
    labels = "image,patient,Mass\na,P-1,0\nb,P-2,1\nc,P-1,1\nd,12.0,0\n"
    table = read("image,Mass\na,1\nb,2\nc,3\nd,4\n", labels)
    # sha256("P-1") read by hand: first 8 bytes, shifted right by two bits, and the bit above set
    expected = int(hashlib.sha256(b"P-1").hexdigest()[:16], 16) // 4 + 2**62
    assert table.patients[0] == table.patients[2] == expected
    assert len(set(table.patients.tolist())) == 3
    assert table.patients[3] == int(hashlib.sha256(b"12").hexdigest()[:16], 16) // 4 + 2**62  # pandas writes 12 as 12.0


def test_the_patient_is_read_off_an_nih_name_where_the_labels_have_none(read: Read) -> None:
    assert read(WIDE, "image,Mass\n" + "".join(f"{name},1\n" for name in IMAGES)).patients.tolist() == [2, 4, 4]


def test_windows_separators_are_those_of_the_labels(tmp_path: Path) -> None:
    """The same table written on Windows names its images with backslashes, in each of the files that name them."""
    (tmp_path / "p.csv").write_text("image,prob_Mass\nscans\\a.png,0.9\nscans/b.png,0.1\n")
    (tmp_path / "l.csv").write_text("image,patient,Mass\nscans/a.png,A,1\nscans\\b.png,B,0\n")
    (tmp_path / "list.txt").write_text("scans\\b.png\r\n")
    scored = read_predictions(tmp_path / "p.csv", read_labels(tmp_path / "l.csv"))
    assert (scored.names, scored.truth.tolist()) == (("scans/a.png", "scans/b.png"), [[True], [False]])
    assert read_names(tmp_path / "list.txt") == ("scans/b.png",)


def test_commas_at_the_end_of_lines_mean_nothing(read: Read) -> None:
    assert read(WIDE.replace("\n", ",\n"), NIH).scores.shape == (3, 2)
    assert read(WIDE, NIH.replace("Position\n", "Position,\n")).scores.shape == (3, 2)
    assert read(WIDE, NIH.replace("Position\n", "Position\n\n")).scores.shape == (3, 2)


LABELS = "image,patient,Mass\na,1,0\nb,2,1\n"


@pytest.mark.parametrize(
    ("predictions", "labels", "words"),
    [
        ("", NIH, "found no column names; needed a header"),
        (WIDE.splitlines()[0], NIH, "found a header and no row"),
        (WIDE.replace("0.7", "nan"), NIH, "row 3: found the score 'nan' of Mass for 00000004_000.png; needed a finite"),
        (WIDE.replace("0.3", "inf"), NIH, "row 4: found the score 'inf' of Pleural_Thickening for 00000004_001.png"),
        (WIDE.replace("0.7", "high"), NIH, "the score 'high' of Mass for 00000004_000.png"),
        (WIDE.replace("0.7", "1_0"), NIH, "the score '1_0' of Mass"),
        (WIDE.replace("0.7", ""), NIH, "the score '' of Mass for 00000004_000.png"),
        (LONG.replace("0.7", "NaN"), NIH, "row 4: found the score 'NaN' of Mass for 00000004_000.png"),
        (WIDE.replace("0.7", "1.5"), NIH, "found the probability 1.5 of Mass for 00000004_000.png; needed 0 to 1"),
        (
            WIDE.replace("4_001", "4_000"),
            NIH,
            "row 4: found Mass of 00000004_000.png a second time; needed each image once",
        ),
        (LONG + LONG.splitlines()[1], NIH, "row 8: found Mass of 00000002_000.png a second time"),
        (WIDE.replace("4_001", "6_001"), NIH, "found 1 images without a row in .*labels.csv, e.g. '00000006_001.png'"),
        (WIDE.replace("prob_M", "prob_N").replace("prob_P", "x"), NIH, "needed columns named by finding"),
        (WIDE.replace("Image Index", "study"), NIH, "found the columns 'study', .*; needed an image column"),
        (WIDE.replace(",", "/"), NIH, "needed an image column"),
        (WIDE.replace("prob_Pleural_Thickening", "mass"), NIH, "'prob_Mass', 'mass'; needed one column of Mass"),
        (WIDE.replace("prob_P", "logit_P"), NIH, "needed scores of one kind"),
        (WIDE.replace("0.7,0.6", "0.7"), NIH, "row 3: found 2 fields; needed 3"),
        (WIDE.replace("0.7,0.6", "0.7,0.6,0.5"), NIH, "row 3: found 4 fields; needed 3"),
        (WIDE.replace("0.7", '"0.7'), NIH, "row 4: found a broken row .unexpected end of data"),
        (LONG.replace("score", "number"), NIH, "or two columns finding and score"),
        (LONG.replace("Mass", "Lump").replace("Pleural Thickening", "Peel"), NIH, "found the findings 'Lump', 'Peel'"),
        (LONG.rsplit("\n", 2)[0], NIH, "found no score of Pleural_Thickening for 00000004_001.png; needed all 2"),
        (LONG + "00000006_000.png,No Finding,1\n", NIH, "found no score of Mass for 00000006_000.png; needed all 2"),
        (
            WIDE,
            NIH.replace("4,041Y", "6,041Y"),
            "found patient '6' for 00000004_000.png; needed patient 4, as ChestX-ray14 names",
        ),
        (
            WIDE,
            NIH.replace("Mass\n", "Masss\n").replace("Mass,1", "Masss,1"),
            "row 4: found finding 'Masss'; needed No Finding or",
        ),
        (
            WIDE,
            WIDE_LABELS + "00000002_000.png,2,1,0,male,80,PA\n",
            "row 5: found 00000002_000.png again, with another label or attribute than in row 2",
        ),
        (
            WIDE,
            WIDE_LABELS.replace("2,0,0", "2,0,-1"),
            "row 2: found Pleural_Thickening -1, which is uncertain; needed 0, 1",
        ),
        (WIDE, WIDE_LABELS.replace("2,0,0", "2,2,0"), "row 2: found Mass '2'; needed 0, 1, -1 or nothing"),
        (
            WIDE,
            WIDE_LABELS.replace("png,2", "png,8"),
            "found patient '8' for 00000002_000.png; needed patient 2, as ChestX-ray14 names",
        ),
        (
            WIDE,
            "image,patient\n1,2\n",
            "needed a column of 0 and 1 for each finding, or one of lists, such as Finding Labels",
        ),
        (WIDE, "Note,Mass\n1,2\n", "labels.csv, row 1: found the columns 'Note', 'Mass'; needed an image column"),
        ("image,Edema\na,1\nb,2\n", LABELS, "scores Edema; .* labels Mass; needed one in common"),
        (
            "image,Mass\na,1\nb,2\n",
            LABELS.replace("a,1", "a,"),
            "row 2: found no patient for a; needed whose image it is",
        ),
    ],
)
def test_bad_input_is_one_clear_message(read: Read, predictions: str, labels: str, words: str) -> None:
    with pytest.raises(DatasetError, match=words) as refusal:
        read(predictions, labels)
    assert "Next: " in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_files_that_can_t_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such file"):
        read_labels(tmp_path / "none.csv")
    (tmp_path / "utf16.csv").write_text(WIDE, encoding="utf-16")
    with pytest.raises(DatasetError, match="UTF-8"):
        read_labels(tmp_path / "utf16.csv")


def test_labels_are_those_of_the_data_set(phantom: ChestXray14, tmp_path: Path, rng: np.random.Generator) -> None:
    radiographs = phantom.split("test")
    scores = rng.random((len(radiographs), len(FINDINGS)))
    lines = [",".join(["image", *FINDINGS])]
    lines += [",".join([r.image, *map(repr, row)]) for r, row in zip(radiographs, scores.tolist(), strict=True)]
    (tmp_path / "predictions.csv").write_text("\n".join(lines))
    table = read_predictions(tmp_path / "predictions.csv", read_labels(phantom.table))
    assert (table.scores == scores).all()
    assert (table.truth == truth(radiographs)).all()
    assert table.patients.tolist() == [r.patient for r in radiographs]


@pytest.mark.dataset
def test_an_independent_reproduction_s_predictions(real_root: Path) -> None:
    path = real_root / "predictions" / "reproduce_chexnet_test.csv"
    if not path.exists():
        pytest.skip("NOT RUN on published predictions: the folder has none")
    table = read_predictions(path, read_labels(real_root / "Data_Entry_2017_v2020.csv"))
    assert (len(table.names), table.findings, table.kind) == (11_627, FINDINGS, "probability")
    assert len(set(table.patients.tolist())) == 3080
    for c in range(len(FINDINGS)):
        expected = roc_auc_score(table.truth[:, c], table.scores[:, c])
        assert auroc(table.scores[:, c], table.truth[:, c]) == pytest.approx(expected, abs=1e-12)
