"""ExpertLabels: every reader read every image, the majority is theirs, and anything else is refused."""

from pathlib import Path

import numpy as np
import pytest

from chexnet_deploy.datasets.findings import FINDINGS
from chexnet_deploy.datasets.radiologist_labels import (
    MAJORITY_FILE,
    MAJORITY_READERS,
    READERS_FILE,
    ExpertLabels,
    read_individual_readers,
    read_majority,
)
from chexnet_deploy.errors import DatasetError

COLUMNS = ",".join(finding.replace("_", " ") for finding in FINDINGS)
READERS_HEADER = f"Image ID,Patient ID,Reader ID,Abnormal,{COLUMNS},Other"
MAJORITY_HEADER = f"Image ID,Patient ID,Abnormal,{COLUMNS},Other"
ONE, TWO = "00000001_000.png", "00000002_003.png"
OTHERS = ("4343880271", "4343882583")
READERS = tuple(sorted((*MAJORITY_READERS, *OTHERS)))
# Who sees what: two of the three voters see the thickening of TWO, one voter and both others the mass of ONE.
SEEN = {
    (TWO, MAJORITY_READERS[0]): {"Pleural_Thickening"},
    (TWO, MAJORITY_READERS[2]): {"Pleural_Thickening", "Hernia"},
    (ONE, MAJORITY_READERS[1]): {"Mass"},
    (ONE, OTHERS[0]): {"Mass"},
    (ONE, OTHERS[1]): {"Mass"},
}


def cells(seen: set[str]) -> str:
    return ",".join("YES" if finding in seen else "NO" for finding in FINDINGS)


def reader_row(image: str, reader: str) -> str:
    return f"{image},{int(image[:8])},{reader},1,{cells(SEEN.get((image, reader), set()))},NO"


# Readers in another order for each image, as in the real file.
READER_ROWS = tuple(
    reader_row(image, reader) for image, readers in ((TWO, READERS), (ONE, READERS[::-1])) for reader in readers
)
MAJORITY_ROWS = (f"{ONE},1,YES,{cells(set())},NO", f"{TWO},2,YES,{cells({'Pleural_Thickening'})},NO")


def lines(*rows: str) -> str:
    return "".join(f"{row}\n" for row in rows)


def make(
    root: Path,
    readers: str = lines(READERS_HEADER, *READER_ROWS),
    majority: str = lines(MAJORITY_HEADER, *MAJORITY_ROWS),
) -> Path:
    (root / READERS_FILE).write_text(readers)
    (root / MAJORITY_FILE).write_text(majority)
    return root


def refusal(root: Path) -> str:
    with pytest.raises(DatasetError) as caught:
        ExpertLabels.open(root)
    message = str(caught.value)
    assert ": found " in message
    assert "; needed " in message
    assert ". Next: " in message
    assert "\n" not in message
    return message


def test_reads_and_majority(tmp_path: Path) -> None:
    labels = ExpertLabels.open(make(tmp_path))
    assert labels.images == (TWO, ONE)
    assert labels.patients.tolist() == [2, 1]
    assert labels.readers == READERS
    assert labels.reads.shape == (5, 2, 14)
    for r, reader in enumerate(READERS):
        for i, image in enumerate(labels.images):
            seen = {FINDINGS[c] for c in np.flatnonzero(labels.reads[r, i])}
            assert seen == SEEN.get((image, reader), set())
    assert [FINDINGS[c] for c in np.flatnonzero(labels.majority[0])] == ["Pleural_Thickening"]
    assert not labels.majority[1].any()


@pytest.mark.parametrize("spelling", ["Pleural Thickening", "Pleural_Thickening"])
def test_columns_go_by_name_not_by_place(tmp_path: Path, spelling: str) -> None:
    names = [spelling if finding == "Pleural_Thickening" else finding for finding in reversed(FINDINGS)]
    row = ",".join("YES" if name == spelling else "NO" for name in names)
    path = tmp_path / "labels.csv"
    path.write_text(lines(f"Patient ID,{','.join(names)},Image ID", f"1,{row},{ONE}"))
    images, labels = read_majority(path)
    assert images == (ONE,)
    assert [FINDINGS[c] for c in np.flatnonzero(labels[0])] == ["Pleural_Thickening"]


def test_select_keeps_the_order_asked_for(tmp_path: Path) -> None:
    labels = ExpertLabels.open(make(tmp_path))
    swapped = labels.select((ONE, TWO))
    assert swapped.images == (ONE, TWO)
    np.testing.assert_array_equal(swapped.reads, labels.reads[:, ::-1])
    np.testing.assert_array_equal(swapped.majority, labels.majority[::-1])
    assert labels.select((ONE,)).patients.tolist() == [1]


@pytest.mark.parametrize("images", [(), (ONE, ONE), (ONE, "00000009_000.png")])
def test_select_refuses(tmp_path: Path, images: tuple[str, ...]) -> None:
    labels = ExpertLabels.open(make(tmp_path))
    with pytest.raises(DatasetError, match=r"found .*; needed .*\. Next: "):
        labels.select(images)


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        (READER_ROWS[:-1], f"no read of {ONE} by reader {READERS[0]};"),
        (READER_ROWS[:-2], f"no read of {ONE} by reader {READERS[0]} and 1 more;"),
        ((*READER_ROWS, READER_ROWS[0]), f"row 12: found a second read of {TWO} by reader {READERS[0]}"),
        ((READER_ROWS[0].replace("NO", "no", 1), *READER_ROWS[1:]), "row 2: found 'no' for Atelectasis"),
        ((READER_ROWS[0].replace("NO", "", 1), *READER_ROWS[1:]), "row 2: found '' for Atelectasis"),
        ((READER_ROWS[0].replace(",2,", ",3,", 1), *READER_ROWS[1:]), f"Patient ID '3' for {TWO}"),
        ((READER_ROWS[0].replace(READERS[0], ""), *READER_ROWS[1:]), "no Reader ID"),
        ((READER_ROWS[0].replace(".png", ".jpg"), *READER_ROWS[1:]), "'00000002_003.jpg'"),
        ((), "a header and no row"),
        (tuple(row for row in READER_ROWS if MAJORITY_READERS[1] not in row), f"no read by {MAJORITY_READERS[1]}"),
    ],
)
def test_wrong_readers_files_are_refused(tmp_path: Path, rows: tuple[str, ...], found: str) -> None:
    message = refusal(make(tmp_path, readers=lines(READERS_HEADER, *rows)))
    assert message.startswith(str(tmp_path / READERS_FILE))
    assert found in message


@pytest.mark.parametrize("column", ["Image ID", "Patient ID", "Reader ID", "Hernia", "Pleural Thickening"])
def test_missing_columns_are_refused(tmp_path: Path, column: str) -> None:
    message = refusal(make(tmp_path, readers=lines(READERS_HEADER.replace(column, "Else"), *READER_ROWS)))
    assert f"needed a column {column.replace(' T', '_T')}" in message


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        (MAJORITY_ROWS[:1], f"{TWO} in this file or in {READERS_FILE} alone"),
        ((*MAJORITY_ROWS, MAJORITY_ROWS[0]), f"row 4: found {ONE} a second time"),
        # all five readers see a mass three times in ONE, but of the three who vote only one does
        (
            (f"{ONE},1,YES,{cells({'Mass'})},NO", MAJORITY_ROWS[1]),
            f"another label than the majority of readers {', '.join(MAJORITY_READERS)} for Mass of {ONE};",
        ),
        ((MAJORITY_ROWS[0].replace("NO", "1", 1), MAJORITY_ROWS[1]), "row 2: found '1' for Atelectasis"),
    ],
)
def test_wrong_majority_files_are_refused(tmp_path: Path, rows: tuple[str, ...], found: str) -> None:
    message = refusal(make(tmp_path, majority=lines(MAJORITY_HEADER, *rows)))
    assert message.startswith(str(tmp_path / MAJORITY_FILE))
    assert found in message


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    (make(tmp_path) / MAJORITY_FILE).unlink()
    assert "no such file" in refusal(tmp_path)


@pytest.mark.dataset
def test_real_reads(real_root: Path) -> None:
    folder = real_root / "expert_labels"
    images, readers, reads = read_individual_readers(folder / READERS_FILE)
    assert reads.shape == (5, 386, 14)  # 810 in the release; patients with an even number here
    assert readers == READERS
    assert reads[:, :, FINDINGS.index("Pneumonia")].sum(axis=1).tolist() == [8, 5, 8, 1, 10]
    labels = ExpertLabels.open(folder)
    assert labels.images == images
    assert len(np.unique(labels.patients)) == 262
    assert labels.majority[:, FINDINGS.index("Pneumonia")].sum() == 0
    assert labels.majority[:, FINDINGS.index("Pleural_Thickening")].sum() == 20
