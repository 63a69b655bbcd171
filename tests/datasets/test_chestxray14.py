"""ChestXray14: every row is kept as written, the patient is the unit of every split, contradictions are refused."""

import hashlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chexnet_deploy.datasets.chestxray14 import ChestXray14, is_validation_patient, truth
from chexnet_deploy.datasets.csv_rows import read_names
from chexnet_deploy.datasets.data_set import open_data
from chexnet_deploy.datasets.findings import FINDINGS
from chexnet_deploy.errors import DatasetError
from chexnet_deploy.metrics.localization import Box

V2020 = "Data_Entry_2017_v2020.csv"
V2017 = "Data_Entry_2017.csv"
HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
BOX_HEADER = "Image Index,Finding Label,Bbox [x,y,w,h],,,"

# Patients 1 and 2 are in train, 7 (by its SHA-256) in val, 3 in test; 4 is in neither list.
ROWS = (
    "00000001_000.png,Cardiomegaly|Hernia,0,1,58,M,PA,2682,2749,0.143,0.143",
    "00000001_001.png,No Finding,1,1,58,M,PA,2682,2749,0.143,0.143",
    "00000002_000.png,Infiltration,0,2,81,F,AP,2500,2048,0.171,0.171",
    "00000003_000.png,Pleural_Thickening,0,3,411,F,AP,2500,2048,0.171,0.171",
    "00000004_000.png,No Finding,0,4,0,F,AP,2500,2048,0.171,0.171",
    "00000007_000.png,Mass,0,7,33,M,PA,2500,2048,0.171,0.171",
)
NAMES = tuple(row[:16] for row in ROWS)
TRAIN_VAL = ("00000007_000.png", "00000002_000.png", "00000001_001.png", "00000001_000.png")
TEST = ("00000003_000.png",)


def lines(*rows: str) -> str:
    return "".join(f"{row}\n" for row in rows)


def make(root: Path, table: str = lines(HEADER, *ROWS), images: Iterable[str] = NAMES) -> Path:
    """Write a small data set. Its images are empty files: nothing here may read them."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    (root / V2020).write_text(table)
    (root / "train_val_list.txt").write_text(lines(*TRAIN_VAL))
    (root / "test_list.txt").write_text(lines(*TEST))
    for name in images:
        (root / "images" / name).touch()
    return root


def refusal(root: Path) -> str:
    with pytest.raises(DatasetError) as caught:
        ChestXray14.open(root)
    message = str(caught.value)
    assert ": found " in message
    assert "; needed " in message
    assert ". Next: " in message
    assert "\n" not in message
    return message


def names(dataset: ChestXray14) -> dict[str, list[str]]:
    return {
        "train": [radiograph.image for radiograph in dataset.split("train")],
        "val": [radiograph.image for radiograph in dataset.split("val")],
        "test": [radiograph.image for radiograph in dataset.split("test")],
    }


SPLIT = {
    "train": ["00000002_000.png", "00000001_001.png", "00000001_000.png"],
    "val": ["00000007_000.png"],
    "test": ["00000003_000.png"],
}


def test_rows_are_kept_as_written(tmp_path: Path) -> None:
    dataset = ChestXray14.open(make(tmp_path))
    assert tuple(radiograph.image for radiograph in dataset.radiographs) == NAMES
    first, last = dataset.radiographs[0], dataset.radiographs[3]
    assert (first.patient, first.age_years, first.sex, first.view) == (1, 58, "M", "PA")
    assert first.findings == {"Cardiomegaly", "Hernia"}
    assert first.path == tmp_path / "images" / "00000001_000.png"
    assert (last.age_years, last.sex, last.view) == (411, "F", "AP")  # an impossible age is still the table's
    assert dataset.radiographs[1].findings == frozenset()
    assert (dataset.table, dataset.n_absent, dataset.n_unlisted) == (tmp_path / V2020, 0, 1)
    assert dataset.boxes == {}


def test_split_keeps_the_lists_order(tmp_path: Path) -> None:
    assert names(ChestXray14.open(make(tmp_path))) == SPLIT


def test_absent_images_are_counted_and_left_out_of_the_split(tmp_path: Path) -> None:
    dataset = ChestXray14.open(make(tmp_path, images=NAMES[1:]))
    assert dataset.n_absent == 1
    assert dataset.radiographs[0].path is None
    assert names(dataset)["train"] == SPLIT["train"][:2]
    assert dataset.listed["train"] == tuple(SPLIT["train"])


def test_a_broken_link_is_an_absent_image(tmp_path: Path) -> None:
    make(tmp_path, images=NAMES[1:])
    (tmp_path / "images" / NAMES[0]).symlink_to(tmp_path / "annex" / "not fetched")
    assert ChestXray14.open(tmp_path).n_absent == 1


def test_truth_is_in_findings_order(tmp_path: Path) -> None:
    radiographs = ChestXray14.open(make(tmp_path)).radiographs
    array = truth(radiographs)
    assert array.dtype == bool
    assert array.shape == (6, 14)
    assert [[FINDINGS[i] for i in row.nonzero()[0]] for row in array] == [
        ["Cardiomegaly", "Hernia"],
        [],
        ["Infiltration"],
        ["Pleural_Thickening"],
        [],
        ["Mass"],
    ]
    assert truth([]).shape == (0, 14)


def test_split_sha256_by_hand(tmp_path: Path) -> None:
    hashed = "".join(f"{split} {image}\n" for split, images in SPLIT.items() for image in images)
    before = open_data(make(tmp_path)).split_sha256()
    assert before == hashlib.sha256(hashed.encode()).hexdigest()
    (tmp_path / "images" / TEST[0]).unlink()
    assert open_data(tmp_path).split_sha256() != before


def test_split_name_is_checked(tmp_path: Path) -> None:
    dataset = ChestXray14.open(make(tmp_path))
    with pytest.raises(DatasetError, match="Found split 'train_val'; needed train, val or test"):
        dataset.split("train_val")  # type: ignore[arg-type]


def test_select(tmp_path: Path) -> None:
    dataset = open_data(make(tmp_path, images=NAMES[1:]))
    chosen = dataset.select([NAMES[3], NAMES[1]])
    assert chosen.names == (NAMES[3], NAMES[1])
    with pytest.raises(DatasetError, match=r"no row for 00000009_000\.png; needed a row for each of the 2 names"):
        dataset.select([NAMES[1], "00000009_000.png"])
    with pytest.raises(DatasetError, match=r"no file for 00000001_000\.png; needed all 2 images"):
        dataset.select([NAMES[1], NAMES[0]])


# The table


@pytest.mark.parametrize(
    "table",
    [
        pytest.param("\ufeff" + lines(HEADER, *ROWS), id="byte order mark"),
        pytest.param(lines(HEADER, *ROWS).replace("\n", "\r\n"), id="CRLF"),
        pytest.param(lines(HEADER, *ROWS).rstrip("\n"), id="no newline at the end"),
        pytest.param(lines(HEADER, *ROWS, ""), id="blank line"),
        pytest.param(lines(HEADER, *ROWS).replace("Patient Gender", "Patient Sex"), id="renamed column"),
        pytest.param(lines(HEADER + ",", *(row + "," for row in ROWS)), id="commas at the end"),
        pytest.param(lines(HEADER, *(row + "," for row in ROWS)), id="commas at the end of rows alone"),
        pytest.param(lines(HEADER + ",", *ROWS), id="comma at the end of the header alone"),
        pytest.param(lines(HEADER, *ROWS).replace("Cardiomegaly|Hernia", '"Cardiomegaly|Hernia"'), id="quotes"),
        pytest.param(lines(HEADER, *ROWS).replace(",58,", ",058Y,"), id="age in years as first released"),
    ],
)
def test_forms_a_table_may_have(tmp_path: Path, table: str) -> None:
    plain = ChestXray14.open(make(tmp_path / "plain")).radiographs
    root = make(tmp_path / "form")
    (root / V2020).write_bytes(table.encode())
    for got, wanted in zip(ChestXray14.open(root).radiographs, plain, strict=True):
        assert (got.image, got.patient, got.findings, got.age_years) == (
            wanted.image,
            wanted.patient,
            wanted.findings,
            wanted.age_years,
        )


@pytest.mark.parametrize(
    ("age", "years"), [("058Y", 58), ("011M", 0), ("018M", 1), ("005D", 0), ("0", 0), ("411", 411)]
)
def test_ages(tmp_path: Path, age: str, years: int) -> None:
    table = lines(HEADER, *ROWS).replace(",58,", f",{age},")
    assert ChestXray14.open(make(tmp_path, table)).radiographs[0].age_years == years


def test_v2020_is_preferred(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / V2017).write_text(lines(HEADER, *ROWS).replace("Mass", "Nodule"))
    assert ChestXray14.open(tmp_path).radiographs[5].findings == {"Mass"}
    (tmp_path / V2020).unlink()
    assert ChestXray14.open(tmp_path).radiographs[5].findings == {"Nodule"}


def test_columns_are_found_by_name(tmp_path: Path) -> None:
    header = "View Position,Patient ID,Image Index,Patient Age,Finding Labels,Patient Gender"
    rows = (f"{f[6]},{f[3]},{f[0]},{f[4]},{f[1]},{f[5]}" for f in (row.split(",") for row in ROWS))
    assert ChestXray14.open(make(tmp_path, lines(header, *rows))).radiographs[0].findings == {"Cardiomegaly", "Hernia"}


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("Mass", "mass", "row 7: found finding 'mass'"),
        ("Mass", "Infiltrate", "row 7: found finding 'Infiltrate'"),
        ("Mass", "", "row 7: found finding ''"),
        ("Mass", "Mass|", "row 7: found finding ''"),
        ("Mass", "Mass|Mass", "row 7: found 'Mass|Mass'; needed each finding once"),
        ("Mass", "No Finding|Mass", "row 7: found 'No Finding|Mass'"),
        ("Mass", "Mass|No Finding", "row 7: found 'Mass|No Finding'"),
        (",7,33", ",8,33", "row 7: found Patient ID '8' for 00000007_000.png; needed the same patient, 7"),
        (",7,33", ", 7,33", "row 7: found Patient ID ' 7'"),
        (",7,33", ",,33", "row 7: found Patient ID ''"),
        (",7,33", ",\u0667,33", "row 7: found Patient ID '\u0667'"),
        (",7,33", ",7.0,33", "row 7: found Patient ID '7.0'"),
        (",7,33", "," + "9" * 5000 + ",33", "row 7: found Patient ID"),
        (",33,M", ",,M", "row 7: found age ''"),
        (",33,M", ",-1,M", "row 7: found age '-1'"),
        (",33,M", ",nan,M", "row 7: found age 'nan'"),
        (",33,M", ",33,O", "row 7: found sex 'O'"),
        (",33,M,PA", ",33,M,LL", "row 7: found view 'LL'"),
        ("00000007_000.png,M", "00000002_000.png,M", "row 7: found 00000002_000.png a second time"),
        ("00000007_000.png,M", "../0000007_000.png,M", "row 7: found '../0000007_000.png'"),
        ("00000007_000.png,M", "00000007_000.jpg,M", "row 7: found '00000007_000.jpg'"),
        (",Mass,0", ",Mass", "row 7: found 10 fields; needed 11"),
        (",Mass,0", ",Mass,0,0", "row 7: found 12 fields; needed 11"),
        (",Mass,0", ',"Mass,0', "row 7: found a broken row"),
        (HEADER, HEADER.replace("Finding Labels", "Labels"), "row 1: found the columns 'Image Index', 'Labels', "),
        (HEADER, HEADER.replace("Patient Gender", "Sex"), "needed a column Patient Gender or Patient Sex"),
        (HEADER, HEADER.replace(",", ";"), "row 2: found 1 fields; needed 11"),
        (HEADER, "", "row 1: found no column names"),
        (lines(*ROWS), "", "found a header and no row"),
        (lines(HEADER, *ROWS), "", "row 1: found no column names"),
    ],
)
def test_wrong_tables_are_refused(tmp_path: Path, old: str, new: str, found: str) -> None:
    table = lines(HEADER, *ROWS)
    assert table.count(old) == 1
    message = refusal(make(tmp_path, table.replace(old, new)))
    assert message.startswith(str(tmp_path / V2020))
    assert found in message


def test_a_table_in_another_encoding_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / V2020).write_bytes(lines(HEADER, *ROWS).encode("utf-16"))
    assert "needed readable UTF-8 text" in refusal(tmp_path)


def test_a_wrong_folder_says_what_was_looked_for(tmp_path: Path) -> None:
    assert f"{tmp_path}: found none of {V2020}, {V2017}; needed one of them" in refusal(tmp_path)
    assert "absent: found none of" in refusal(tmp_path / "absent")


# The images


def test_every_layout_of_the_archive(tmp_path: Path) -> None:
    make(tmp_path, images=NAMES[:2])
    parts = (tmp_path / "images_001" / "images", tmp_path / "images_256")
    for folder, name in zip(parts, NAMES[2:], strict=False):
        folder.mkdir(parents=True)
        (folder / name).touch()
        (folder / "Thumbs.db").touch()
    (tmp_path / "images_002.tar.gz").touch()
    (tmp_path / "images" / "00000099_000.png").touch()  # not in the table: ignored
    dataset = ChestXray14.open(tmp_path)
    assert dataset.n_absent == 2
    assert dataset.radiographs[2].path == parts[0] / NAMES[2]
    assert dataset.radiographs[3].path == parts[1] / NAMES[3]


def test_the_same_name_in_two_folders_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "images_256").mkdir()
    (tmp_path / "images_256" / NAMES[0]).touch()
    message = refusal(tmp_path)
    assert (
        f"found two files for 1 images: {tmp_path / 'images' / NAMES[0]} and {tmp_path / 'images_256' / NAMES[0]}"
        in message
    )


STEMS = tuple(name.removesuffix(".png") for name in NAMES)


@pytest.mark.parametrize(
    "place",
    [
        "images/images/{}.png",
        "images_001/images/{}.png",
        "images-224/images-224/{}.png",
        "images/{}.PNG",
        "images/{}.jpg",
        "images-512/{}.jpeg",
        "Images/a/b/{}.JPG",
        "{}.png",
        "train/{}.png",
        "archive/images_001/images/{}.png",
        "images/{}.dcm",
    ],
)
def test_every_layout_of_others(tmp_path: Path, place: str) -> None:
    make(tmp_path, images=())
    (tmp_path / "images").rmdir()
    for stem in STEMS:
        path = tmp_path / place.format(stem)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        path.with_name(f"._{path.name}").touch()  # what macOS leaves in archives
    dataset = ChestXray14.open(tmp_path)
    assert names(dataset) == SPLIT
    assert [radiograph.path for radiograph in dataset.radiographs] == [tmp_path / place.format(stem) for stem in STEMS]
    assert (dataset.n_absent, dataset.strays, dataset.left_out()) == (0, (), ())


def test_folders_that_are_linked_in_are_entered_once(tmp_path: Path) -> None:
    make(tmp_path / "disk", images=NAMES)
    make(tmp_path / "root", images=())
    (tmp_path / "root" / "images").rmdir()
    (tmp_path / "root" / "images").symlink_to(tmp_path / "disk" / "images")
    (tmp_path / "disk" / "images" / "loop").symlink_to(tmp_path / "disk" / "images")
    assert ChestXray14.open(tmp_path / "root").n_absent == 0


@pytest.mark.parametrize("other", ["images/{}.jpg", "images/small/{}.png", "images-224/{}.png", "IMAGES/{}.PNG"])
def test_two_files_that_may_be_one_image_are_counted_and_named(tmp_path: Path, other: str) -> None:
    make(tmp_path)
    for stem in STEMS[:3]:
        path = tmp_path / other.format(stem)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    message = refusal(tmp_path)
    assert "found two files for 3 images" in message
    assert str(tmp_path / other.format(STEMS[0])) in message


def test_what_is_left_out_is_counted_and_named(tmp_path: Path) -> None:
    make(tmp_path, images=[*NAMES[1:], "00000099_000.png", "heart.png", "00000001.jpg", "notes.txt"])
    dataset = ChestXray14.open(tmp_path)
    assert dataset.left_out() == (
        f"1 of 6 rows of {V2020} have no image on disk",
        f"3 image files without a row in {V2020}: 00000001.jpg, heart.png, 00000099_000.png",
    )


def test_no_image_says_what_lies_there_instead(tmp_path: Path) -> None:
    dataset = open_data(make(tmp_path, images=["1.png", "2.png"]))
    with pytest.raises(DatasetError) as caught:
        dataset.require("train")
    assert str(caught.value) == (
        f"{tmp_path}: found none of the 3 train images on disk, and 6 of 6 rows of {V2020} have no image on disk; "
        f"2 image files without a row in {V2020}: 1.png, 2.png; "
        f"needed at least one. Next: put the images into {tmp_path}/images, called as in {V2020}, with any image suffix."
    )


def test_a_table_of_the_whole_data_set_takes_seconds(tmp_path: Path) -> None:
    rows = [
        f"{i // 4 + 1:08d}_{i % 4:03d}.png,No Finding,0,{i // 4 + 1},58,M,PA,2682,2749,0.143,0.143"
        for i in range(112_120)
    ]
    make(tmp_path, lines(HEADER, *rows), images=())
    (tmp_path / "train_val_list.txt").write_text(lines(*(row[:16] for row in rows[4:])))
    (tmp_path / "test_list.txt").write_text(lines(*(row[:16] for row in rows[:4])))
    for part in range(12):
        (tmp_path / f"images_{part + 1:03d}" / "images").mkdir(parents=True)
    for i, row in enumerate(rows[:20_000]):
        (tmp_path / f"images_{i % 12 + 1:03d}" / "images" / row[:16]).touch()
    start_s = time.perf_counter()
    dataset = ChestXray14.open(tmp_path)
    assert dataset.n_absent == 92_120
    assert time.perf_counter() - start_s < 30.0


# The split


def test_a_patient_in_both_lists_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "train_val_list.txt").write_text(lines(*TRAIN_VAL[:3]))
    (tmp_path / "test_list.txt").write_text(lines(*TEST, "00000001_000.png"))
    assert "found patients 1 in train_val_list.txt too; needed each patient in one list" in refusal(tmp_path)


def test_an_image_in_both_lists_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "test_list.txt").write_text(lines(*TEST, "00000001_000.png"))
    assert "found 00000001_000.png in train_val_list.txt too; needed each image in one list" in refusal(tmp_path)


def test_a_listed_image_without_a_row_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "test_list.txt").write_text(lines(*TEST, *(f"0000009{i}_000.png" for i in range(7))))
    assert "and 2 more without a row in the table" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["train_val_list.txt", "test_list.txt"])
def test_a_missing_list_is_refused(tmp_path: Path, name: str) -> None:
    make(tmp_path)
    (tmp_path / name).unlink()
    assert f"{name}: found no such file" in refusal(tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(
    patients=st.dictionaries(
        st.integers(1, 99_999_999), st.tuples(st.integers(1, 3), st.sampled_from(["train_val", "test", "neither"]))
    ),
    data=st.data(),
)
def test_no_patient_is_in_two_splits(tmp_path: Path, patients: dict[int, tuple[int, str]], data: st.DataObject) -> None:
    patients |= {1: (1, "train_val"), 3: (1, "test")}  # a list may not be empty
    lists: dict[str, list[str]] = {"train_val": [], "test": [], "neither": []}
    for patient, (n_images, where) in patients.items():
        lists[where] += [f"{patient:08}_{i:03}.png" for i in range(n_images)]
    rows = data.draw(st.permutations([name for part in lists.values() for name in part]))
    table = lines(HEADER, *(f"{name},No Finding,0,{int(name[:8])},5,F,PA,1,1,1,1" for name in rows))
    make(tmp_path, table, images=rows)
    for name in ("train_val", "test"):
        (tmp_path / f"{name}_list.txt").write_text(lines(*data.draw(st.permutations(lists[name]))))
    dataset = ChestXray14.open(tmp_path)
    train, val, test = ({radiograph.patient for radiograph in dataset.split(name)} for name in ("train", "val", "test"))
    assert not train & val
    assert not (train | val) & test
    assert train | val == {patient for patient, (_, where) in patients.items() if where == "train_val"}
    assert dataset.n_unlisted == len(lists["neither"])
    for image in rows:  # the next example has others
        (tmp_path / "images" / image).unlink()


def test_validation_patients_never_change() -> None:
    assert [patient for patient in range(1, 101) if is_validation_patient(patient)] == [
        *(7, 9, 10, 33, 40, 44, 51, 57, 59, 70, 71, 74, 90)
    ]
    # `printf 7 | sha256sum` begins 7902699be42c8a8e, which is 8719647946811673230 in decimal: it ends in 0.
    assert sum(is_validation_patient(patient) for patient in range(1, 30_806)) == 3151  # 10.2 % of the real numbers


# Lists


def test_read_names(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbf00000002_000.png\r\n\r\n00000001_000.png \n")
    assert read_names(path) == ("00000002_000.png", "00000001_000.png")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("00000001_000.png\n\n00000001_000.png\n", "row 3: found 00000001_000.png again (first in row 1)"),
        ("\n\n", "found no image name; needed at least one"),
    ],
)
def test_wrong_lists_are_refused(tmp_path: Path, content: str, found: str) -> None:
    path = tmp_path / "list.txt"
    path.write_text(content)
    with pytest.raises(DatasetError) as caught:
        read_names(path)
    assert str(caught.value).startswith(str(path))
    assert found in str(caught.value)


def test_a_list_that_is_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "list.txt")
    with pytest.raises(DatasetError, match="found no such file"):
        read_names(tmp_path / "list.txt")


# Boxes


def test_boxes(tmp_path: Path) -> None:
    make(tmp_path)
    rows = ("00000002_000.png,Infiltrate,225.5,547,86.75,79,,,", "00000002_000.png,Mass,0,0,1,1024,,,")
    (tmp_path / "BBox_List_2017.csv").write_text(lines(BOX_HEADER, *rows))
    assert ChestXray14.open(tmp_path).boxes == {
        "00000002_000.png": (Box("Infiltration", 225.5, 547.0, 86.75, 79.0), Box("Mass", 0.0, 0.0, 1.0, 1024.0))
    }


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ("00000009_000.png,Mass,1,1,1,1,,,", "row 2: found '00000009_000.png', which has no row in the table"),
        ("00000002_000.png,Masses,1,1,1,1,,,", "row 2: found finding 'Masses'"),
        ("00000002_000.png,Mass,1,1,1,,,,", "needed four numbers x, y, w, h"),
        ("00000002_000.png,Mass,1,1,0,1,,,", "row 2: found box ['1', '1', '0', '1']"),
        ("00000002_000.png,Mass,-1,1,1,1,,,", "row 2: found box"),
        ("00000002_000.png,Mass,nan,1,1,1,,,", "row 2: found box"),
        ("00000002_000.png,Mass,inf,1,1,1,,,", "row 2: found box"),
        ("00000002_000.png,Mass,1,1,1,1,7,,", "row 2: found 9 fields; needed 6"),
        ("00000002_000.png,Mass,1,1,1,1,,,\n00000002_000.png,Mass,1,1,1,1,,,", "row 3: found the same box"),
    ],
)
def test_wrong_boxes_are_refused(tmp_path: Path, row: str, found: str) -> None:
    make(tmp_path)
    (tmp_path / "BBox_List_2017.csv").write_text(lines(BOX_HEADER, row))
    message = refusal(tmp_path)
    assert message.startswith(str(tmp_path / "BBox_List_2017.csv"))
    assert found in message


# The real tables


@pytest.mark.dataset
def test_real_tables(real_root: Path) -> None:
    start_s = time.perf_counter()
    dataset = ChestXray14.open(real_root)
    took_s = time.perf_counter() - start_s
    assert len(dataset.radiographs) == 56_855  # patients with an even number
    assert (dataset.n_absent, dataset.n_unlisted) == (56_855 - 791, 0)
    assert {name: len(images) for name, images in dataset.listed.items()} == {
        "train": 39_932,
        "val": 4_244,
        "test": 12_679,
    }
    assert {name: len(images) for name, images in names(dataset).items()} == {"train": 333, "val": 30, "test": 428}
    assert sum(len(boxes) for boxes in dataset.boxes.values()) == 485
    hernia = truth(dataset.radiographs)[:, FINDINGS.index("Hernia")]
    assert hernia.sum() == 106
    assert took_s < 6  # about 0.8 s; the slack is for a busy machine
