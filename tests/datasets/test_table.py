"""Anyone's tables of images: read right, or refused with the row. The images are empty files: nothing here may read them."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest

from chexnet_deploy.datasets.chestxray14 import is_validation_patient
from chexnet_deploy.datasets.data_set import DataSet, open_data
from chexnet_deploy.datasets.labelled import NOT_LABELLED
from chexnet_deploy.errors import ChexnetError, DatasetError, MissingPackageError, SpecError

Open: TypeAlias = Callable[..., DataSet]
BARE = "image,patient,Mass,Edema\na.png,P1,1,0\nb.png,P1,0,\nc.png,P2,0.0,1.0\n"

CHEXPERT = """\
Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Cardiomegaly,Pleural Effusion
train/patient00001/study1/view1_frontal.jpg,Female,68,Frontal,AP,1.0,,-1.0
train/patient00001/study2/view1_frontal.jpg,Female,69,Frontal,PA,,1.0,0.0
train/patient00002/study1/view1_frontal.jpg,Male,87,Frontal,AP,,0.0,1.0
train/patient00002/study1/view2_lateral.jpg,Male,87,Lateral,,,,1.0
"""
PADCHEST = """\
,ImageID,ImageDir,StudyDate_DICOM,PatientID,PatientSex_DICOM,Projection,Labels
0,1_a.png,0,20140915,20536686640136348236148679891455886468,F,PA,"['pulmonary mass', ' cardiomegaly']"
1,1_b.png,0,20140915,20536686640136348236148679891455886468,F,L,"['pulmonary mass']"
2,2_c.png,36,20150101,20536686640136348236148679891455886469,M,AP,['normal']
3,2_d.png,36,20150101,20536686640136348236148679891455886469,M,PA,
"""
VINDR = "image_id,rad_id,Aortic enlargement,Cardiomegaly\n" + "".join(
    f"{image},{reader},{label},1\n" for image, label in (("5f", 0), ("6a", 1)) for reader in ("R1", "R2", "R3")
)


@pytest.fixture
def read(tmp_path: Path) -> Open:
    """Write a table, a TOML where there is one, and an empty file for each image; read them."""

    def _read(table: str, toml: str | None = None, images: str = "a.png b.png c.png", name: str = "t.csv") -> DataSet:
        (tmp_path / name).write_bytes(table.encode())
        for image in images.split():
            (tmp_path / image).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / image).touch()
        if toml is None:
            return open_data(tmp_path / name)
        (tmp_path / "t.toml").write_text(f'table = "{name}"\n{toml}')
        return open_data(tmp_path / "t.toml")

    return _read


def labels_of(data: DataSet, *findings: str) -> list[list[int]]:
    labels: list[list[int]] = data.images.for_findings(findings).labels.tolist()
    return labels


def test_columns_are_recognised_and_empty_is_not_labelled(read: Open, tmp_path: Path) -> None:
    data = read(BARE)
    assert data.images.names == ("a.png", "b.png", "c.png")
    assert data.images.files[0] == str(tmp_path / "a.png")
    assert labels_of(data, "Edema", "Hernia", "Mass") == [
        [0, NOT_LABELLED, 1],
        [NOT_LABELLED, NOT_LABELLED, 0],
        [1, NOT_LABELLED, 0],
    ]
    assert data.images.shared_with(("Edema", "Hernia", "Mass")) == ("Edema", "Mass")
    assert data.images.patients[0] == data.images.patients[1] != data.images.patients[2]
    assert data.images.patients.min() > 99_999_999  # no number of ChestX-ray14's
    assert data.notes == ("t.csv has no split, so every row is a test image",)
    assert [len(data.rows[name]) for name in ("train", "val", "test")] == [0, 0, 3]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace(",", ";"),
        lambda text: text.replace(",", "\t"),
        lambda text: text.replace(",", ";").replace("0.0", "0,0").replace("1.0", "1,0"),  # Excel in Germany
        lambda text: text.replace("a.png", "./a.png").replace("\nc", '\n"c').replace("c.png", 'c.png"'),
        lambda text: text.replace("patient", "Subject ID").replace("image", "File Name"),
        lambda text: text.replace("Mass", " mass ").replace("P1", " P1 "),
        lambda text: text + text.splitlines()[1] + "\n",  # the same row again
        lambda text: text.replace("image,", 'note,image,"two\nlines",').replace("\n", '\nx,').replace("x,lines", "lines")
        .replace(".png,", '.png,"a\nb",').rstrip("x,"),
    ],
)  # fmt: skip
def test_other_writings_of_the_same_table(read: Open, change: Callable[[str], str]) -> None:
    wanted, found = read(BARE), read(change(BARE), name="other.csv")
    assert labels_of(found, "Mass", "Edema") == labels_of(wanted, "Mass", "Edema")
    assert found.images.patients.tolist() == wanted.images.patients.tolist()
    assert found.images.files == wanted.images.files


def test_chexpert(read: Open) -> None:
    images = " ".join(line.split(",")[0] for line in CHEXPERT.splitlines()[1:])
    for toml, row, words in (
        (None, 5, "found the view 'Lateral' of train/patient00002/study1/view2_lateral.jpg; needed frontal images"),
        ('views = ["AP", "PA"]', 2, 'found Pleural Effusion -1, which is uncertain; needed .* uncertain = "ignore"'),
    ):
        with pytest.raises(DatasetError, match=f"row {row}: {words}"):
            read(CHEXPERT, toml, images).images.for_findings(("Pleural Effusion",))
    stated = 'views = ["AP", "PA"]\n[findings]\nEffusion = "Pleural Effusion"\nCardiomegaly = "Cardiomegaly"'
    for policy, label in (("ignore", NOT_LABELLED), ("zeros", 0), ("ones", 1)):
        data = read(CHEXPERT, f'uncertain = "{policy}"\nsplit = "train"\n{stated}', images)
        assert labels_of(data, "Cardiomegaly", "Effusion") == [[NOT_LABELLED, label], [1, 0], [0, 1]]
    assert (data.images.sex, data.images.view) == (("F", "F", "M"), ("AP", "PA", "AP"))
    assert data.images.age_years.tolist() == [68, 69, 87]
    first, second, third = data.images.patients.tolist()
    assert first == second != third  # out of the path
    assert data.notes == ("1 labels of -1 are taken as uncertain: ones", "1 rows of t.csv are of other views")


def test_padchest(read: Open) -> None:
    toml = 'path = "{ImageDir}/{ImageID}"\nviews = ["PA", "AP"]\n'
    images = "0/1_a.png 36/2_c.png 36/2_d.png"
    data = read(PADCHEST, toml, images)
    assert labels_of(data, "Cardiomegaly", "Pulmonary_Mass") == [[1, 1], [0, 0], [NOT_LABELLED, NOT_LABELLED]]
    assert data.images.names[0] == "0/1_a.png"
    assert len(set(data.images.patients.tolist())) == 2  # 38 digits, of which the last differs
    named = read(PADCHEST, f'{toml}[findings]\nMass = "pulmonary mass"\nHernia = "hiatal hernia"', images)
    assert labels_of(named, "Hernia", "Mass") == [[0, 1], [0, 0], [NOT_LABELLED, NOT_LABELLED]]


def test_vindr(read: Open) -> None:
    toml = 'path = "train/{image_id}.dicom"\npatient = "image_id"'
    images = "train/5f.dicom train/6a.dicom"
    data = read(VINDR, toml, images)  # three readers agree
    assert labels_of(data, "Aortic_enlargement", "Cardiomegaly") == [[0, 1], [1, 1]]
    assert data.notes[-1] == "4 rows of t.csv repeat another row"
    with pytest.raises(DatasetError, match=r"row 6: found train/6a.dicom again, .* than in row 5; .* several readers"):
        read(VINDR.replace("6a,R2,1", "6a,R2,0"), toml, images)
    boxes = "image_id,class_name,rad_id,x_min\n5f,Mass,R1,3\n5f,Edema,R1,\n"
    with pytest.raises(DatasetError, match=r"found labels of no finding|found the columns|needed at least one image"):
        read(boxes, toml, images).images.for_findings(("Mass",))


def test_a_dicom_folder_with_patients_in_its_folders(read: Open) -> None:
    table = "SOPInstanceUID;Folder;Sex;Pneumothorax\r\n1.2.3;PAT_01;W;1\r\n1.2.4;PAT_02;M;0\r\n"
    toml = 'path = "{Folder}/{SOPInstanceUID}.dcm"\npatient_in_path = "(PAT_[0-9]+)/"\nroot = "scans"'
    data = read(table, toml, "scans/PAT_01/1.2.3.dcm scans/PAT_02/1.2.4.dcm")
    assert labels_of(data, "Pneumothorax") == [[1], [0]]
    assert len(set(data.images.patients.tolist())) == 2
    assert (
        read(table.replace("PAT_01", "01\\PAT_01"), toml, "scans/01/PAT_01/1.2.3.dcm")
        .images.files[0]
        .endswith("01/PAT_01/1.2.3.dcm")
    )
    with pytest.raises(DatasetError, match=r"row 3: found no patient for 02/1.2.4.dcm; needed a path in which"):
        read(table.replace("PAT_02", "02"), toml, "scans/02/1.2.4.dcm")


@pytest.mark.parametrize(
    ("table", "toml", "words"),
    [
        (BARE.replace("P1,1", "P1,2"), None, "row 2: found Mass '2'; needed 0, 1, -1 or nothing"),
        (BARE.replace("P1,1", "P1,y"), None, "row 2: found Mass 'y'"),
        (BARE.replace("P1,1", "P1,-1"), None, "row 2: found Mass -1, which is uncertain; needed .* a TOML"),
        (BARE.replace("P1,1,0", "P1,1"), None, "row 2: found 3 fields; needed 4"),
        (BARE.replace("P1,1,0", 'P1,1,"0'), None, "found a broken row"),
        (BARE + "a.png,P1,0,0\n", None, "row 5: found a.png again, .* than in row 2; needed one row an image"),
        (BARE + "x/../a.png,P1,0,0\n", None, "row 5: found x/../a.png again"),
        (BARE + "d.png,P3,0,0\nd/e.png,P3,0,0\n", None,
         "row 5: found no file .*/d.png, and 1 more rows like it; needed every image on disk"),
        (BARE.replace("b.png", ""), None, "row 3: found no image"),
        (BARE.replace("P2", ""), None, "row 4: found no patient for c.png"),
        (BARE.replace("Edema", "mass"), None, "row 1: found the columns 'Mass', 'mass'; needed one column of Mass"),
        (BARE.replace("patient,Mass", "patient,Patient"), None, "row 1: found the columns 'patient', 'Patient'; needed one"),
        (BARE.replace("image", "scan"), None, "needed an image column"),
        (BARE, 'patient = "ward"', "needed one column 'ward', which the TOML names"),
        (BARE.replace("patient", "split").replace("P1", "fold3"), None, "row 2: found another word in the column of splits"),
        ("image,patient,split,Mass\na.png,1,train,0\nb.png,1,test,1\nc.png,2,val,0\n", None,
         "row 2: found a patient in train who is in test too, a.png; needed each patient in one split"),
        (BARE, "root = 'elsewhere'", "row 2: found no file .*elsewhere/a.png, and 2 more rows like it"),
        (BARE, 'views = ["PA"]', "found the views ''; needed one of"),
        (BARE, '[findings]\nMass = "Edema"\nLump = "Lump"', "needed one column 'Lump'"),
        (BARE.replace("P1,1", "P1,?"), '[findings]\nLump = "Mass"', r"row 2: found Lump '\?'"),
        ("image,patient,Labels\na.png,1,['x\n", None, "row 2: found labels"),
        ("image,patient,Labels\na.png,1,No Finding|Mass\n", None, "row 2: found 'No Finding|Mass'; needed No Finding alone"),
        (BARE.split("\n")[0] + "\n", None, "found a header and no row"),
        (BARE.replace("Mass", "Lump").replace("Edema", "Note"), None, "found labels of Lump, Note; needed at least one image"),
    ],
)  # fmt: skip
def test_what_can_t_be_right_is_refused_with_its_row(read: Open, table: str, toml: str | None, words: str) -> None:
    with pytest.raises(DatasetError, match=words) as caught:
        read(table, toml).images.for_findings(("Mass", "Edema"))
    assert ". Next: " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ('uncertain = "maybe"', "uncertain"),
        ("patients = 'x'", "patients: no such field"),
        ('patient_in_path = "p[0-9]+"', "needs a group"),
        ('patient_in_path = "("', "is no regular expression"),
        ("patient = ", "is not TOML"),
    ],
)
def test_a_wrong_toml_is_refused(read: Open, toml: str, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        read(BARE, toml)


def test_a_column_of_something_else_is_an_error_only_for_who_asks_for_it(read: Open) -> None:
    data = read(BARE.replace("Edema", "Report").replace("P1,0,", "P1,0,clear lungs"))
    assert data.images.findings == ("Mass",)
    assert labels_of(data, "Mass", "Edema") == [[1, NOT_LABELLED], [0, NOT_LABELLED], [0, NOT_LABELLED]]
    with pytest.raises(DatasetError, match="row 3: found Report 'clear lungs'"):
        data.images.for_findings(("Report",))


def test_without_patients_there_is_one_and_no_split_of_them(read: Open) -> None:
    table = BARE.replace("patient", "ward")
    data = read(table)
    assert len(set(data.images.patients.tolist())) == 1
    assert "no column of patients in t.csv: all images are taken as one patient's" in data.notes[1]
    assert len(data.require("test").names) == 3
    trained = read(table, 'split = "train"')
    with pytest.raises(DatasetError, match=r"found no column of patients in t.csv; needed whose they are.* Next: name"):
        trained.require("train")
    each = read(table, 'patient = "image"')  # the user's word that each image is another patient's
    assert (len(set(each.images.patients.tolist())), each.patients_unknown) == (3, "")


def test_images_named_as_nih_s_are_of_its_patients(read: Open) -> None:
    table = "image,Mass\n00000002_000.png,1\nx/00000003_000.png,0\n"
    images = "00000002_000.png x/00000003_000.png"
    assert read(table, None, images).images.patients.tolist() == [2, 3]
    with pytest.raises(
        DatasetError, match=r"row 3: found patient '4' for x/00000003_000.png; needed patient 3, as ChestX-ray14 names"
    ):
        read("image,patient,Mass\n00000002_000.png,2,1\nx/00000003_000.png,4,0\n", None, images)


def test_patients_are_divided_as_the_toml_says(read: Open) -> None:
    names = [f"{i}.png" for i in range(400)]
    table = "image,patient,Mass\n" + "".join(f"{name},{i // 2},1\n" for i, name in enumerate(names))
    data = read(table, 'split = "by patient"', " ".join(names))
    patients = {split: set(data.images.patients[rows].tolist()) for split, rows in data.rows.items()}
    assert [len(patients[split]) for split in ("train", "val", "test")] == [160, 21, 19]  # of 200, about 8 : 1 : 1
    assert all(is_validation_patient(patient) for patient in patients["val"])
    assert not patients["train"] & patients["test"]
    everything = read(table, 'split = "train"')
    assert [len(everything.rows[split]) for split in ("train", "val", "test")] == [358, 42, 0]
    with pytest.raises(
        DatasetError, match=r'found no test row; needed one at least. .* split = "test" where every row is'
    ):
        everything.require("test")


def test_words_of_splits_and_rows_of_none(read: Open) -> None:
    table = "image,patient,Set,Mass\na.png,1,Training,1\nb.png,2,valid,1\nc.png,3,,1\n"
    data = read(table)
    assert {split: rows.tolist() for split, rows in data.rows.items()} == {"train": [0], "val": [1], "test": []}


def test_missing_images_are_left_out_where_the_toml_says_so(read: Open) -> None:
    data = read(BARE + "d.png,P3,0,0\n", 'missing = "leave out"')
    assert data.split("test").names == ("a.png", "b.png", "c.png")
    assert data.notes[-1] == "1 of 4 rows of t.csv have no image on disk"
    with pytest.raises(DatasetError, match=r"found no file for d.png"):
        data.select(["d.png"])


def test_empty_can_be_told_to_be_absent(read: Open) -> None:
    assert labels_of(read(BARE, 'empty = "zeros"'), "Edema") == [[0], [0], [1]]


@pytest.mark.parametrize(
    ("age", "years"), [("63", 63.0), ("63,5", 63.5), ("063Y", 63.0), ("006M", 0.5), ("", np.nan), ("old", np.nan)]
)
def test_ages(read: Open, age: str, years: float) -> None:
    data = read(
        BARE.replace(",", ";")
        .replace("patient", "patient;Patient Age")
        .replace("P1;", f"P1;{age};")
        .replace("P2;", "P2;1;")
    )
    np.testing.assert_array_equal(data.images.age_years, [years, years, 1.0])


def test_parquet_says_the_same(read: Open, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="NOT RUN on Parquet: pyarrow is not installed")
    import pyarrow.parquet

    wanted = read(BARE)
    table = pa.table(
        {
            "image": ["a.png", "b.png", "c.png"],
            "patient": ["P1", "P1", "P2"],
            "Mass": pa.array([1, 0, 0], pa.int8()),
            "Edema": pa.array([0.0, None, 1.0]),
            "Labels": [["x"], [], None],
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    found = open_data(tmp_path / "t.parquet")
    assert labels_of(found, "Mass", "Edema") == labels_of(wanted, "Mass", "Edema")
    assert found.images.patients.tolist() == wanted.images.patients.tolist()
    (tmp_path / "t.toml").write_text('table = "t.parquet"\nlabels = "Labels"')
    assert labels_of(open_data(tmp_path / "t.toml"), "x") == [[1], [0], [NOT_LABELLED]]
    table = table.set_column(2, "Mass", pa.array([1.0, float("nan"), 2.0]))
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(DatasetError, match=r"t.parquet, row 3: found Mass '2'"):
        open_data(tmp_path / "t.parquet").images.for_findings(("Mass",))
    # pandas makes floats of whole numbers beside a gap; beyond 2^53 they are somebody else's.
    for number, is_exact in ((1234567890123.0, True), (2.0**54, False)):
        table = table.set_column(1, "patient", pa.array([number, 12.0, number]))
        pyarrow.parquet.write_table(table.drop(["Mass"]), tmp_path / "t.parquet")
        same = BARE.replace("P1,0,", "12,0,").replace("P1", f"{number:.0f}").replace("P2", f"{number}")
        if is_exact:
            patients = open_data(tmp_path / "t.parquet").images.patients.tolist()
            assert patients == read(same).images.patients.tolist()
        else:
            with pytest.raises(
                DatasetError, match=r"row 1: found the patient '1.8.*e.16', which a spreadsheet or a float"
            ):
                open_data(tmp_path / "t.parquet")
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(DatasetError, match="needed a readable Parquet table"):
        open_data(tmp_path / "t.parquet")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.delitem(__import__("sys").modules, "chexnet_deploy.datasets.parquet", raising=False)
    with pytest.raises(MissingPackageError, match=r"pip install 'chexnet-deploy\[table\]', or write the table as CSV"):
        open_data(tmp_path / "t.parquet")


def test_a_big_table_is_quick(read: Open) -> None:
    rows = "".join(f"{i}.png,{i // 4},{i % 2},\n" for i in range(50_000))
    with pytest.raises(ChexnetError, match=r"row 2: found no file .*/0.png, and 49,999 more rows like it"):
        read("image,patient,Mass,Edema\n" + rows, images="a.png")


def test_a_path_s_template_is_checked(read: Open) -> None:
    with pytest.raises(SpecError, match="Write each column as"):
        read(BARE, 'path = "{image}}"')


def test_columns_of_pictures_are_passed_over_and_a_table_needs_a_row(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="NOT RUN on Parquet: pyarrow is not installed")
    import pyarrow.parquet

    (tmp_path / "a.png").touch()
    columns = {"file": ["a.png"], "patient": ["1"], "Mass": [1], "image data": [{"bytes": b"\xff"}], "raw": [b"\xff"]}
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    assert labels_of(open_data(tmp_path / "t.parquet"), "Mass") == [[1]]
    pyarrow.parquet.write_table(pa.table(columns).slice(0, 0), tmp_path / "t.parquet")
    with pytest.raises(DatasetError, match="found columns and no row; needed at least one"):
        open_data(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    ("table", "asked", "found"),
    [
        ("image,patient,Opacity,Opacity\na.png,A,1,0\n", "Opacity", "row 1: found 2 columns of Opacity; needed one"),
        ("image,patient,lung opacity,Lung_Opacity\na.png,A,1,0\n", "Lung Opacity", "row 1: found 2 columns of lung opacity"),
        ("image,patient,Mass\na.png,A,1\nb.png,1.23457E+12,0\n", "Mass", "row 3: found the patient '1.23457E.12', which a spread"),
        ("image;patient;Mass\na.png;1,2E+09;1\n", "Mass", "row 2: found the patient '1,2E.09', which a spreadsheet"),
        ("image,patient,Mass\na.png,########,1\n", "Mass", "row 2: found the patient '########', which a spreadsheet"),
        ("image,patient,Mass\na.png,A,1\nb.png,#N/A,0\nc.png,None,0\n", "Mass", "row 3: found no patient for b.png, and 1 more"),
        ("image,patient,labels\na.png,A,Mass\nb.png,B,'Mass, Edema'\n", "Mass", "row 3: found labels 'Mass, Edema'; needed names"),
        ("image,patient,labels\na.png,A,normal\nb.png,B,Mass;Edema\n", "Mass", "row 3: found labels 'Mass;Edema'; needed names"),
    ],
)  # fmt: skip
def test_what_would_be_read_as_something_else_is_refused(read: Open, table: str, asked: str, found: str) -> None:
    """Of two columns the last counted; patients were one; a list with another separator had none of its findings."""
    with pytest.raises(DatasetError, match=found):
        read(table.replace("'", '"')).images.for_findings((asked,))


def test_columns_alike_that_nobody_asks_for_are_nobodys_business(read: Open) -> None:
    data = read("image,patient,note,note,Opacity,Opacity,Mass\na.png,A,x,y,1,0,1\n")
    assert data.images.for_findings(("Mass",)).labels.tolist() == [[1]]


def test_a_list_may_hold_commas_and_it_is_said_what_none_holds(read: Open) -> None:
    table = 'image,patient,labels\na.png,A,"opacity, right|Nodule/Mass"\nb.png,B,"hilum, left"\n'
    toml = '[findings]\nMass = "{}"\nOpacity = "opacity, right"\n'
    assert labels_of(read(table, toml.format("Nodule/Mass"), "a.png b.png"), "Mass", "Opacity") == [[1, 1], [0, 0]]
    assert labels_of(read(table, toml.format("hilum, left"), "a.png b.png"), "Mass", "Opacity") == [[0, 1], [1, 0]]
    assert read(table, toml.format("Mas"), "a.png b.png").notes[0] == "no list names 'Mas', so no image shows it"


@pytest.mark.parametrize("name", ["00000007_001.jpg", "00000007_001.DCM", "00000007_001"])
def test_a_patient_of_chestxray14_is_known_whatever_the_file_is_called(read: Open, name: str) -> None:
    assert read(f"image,patient,Mass\nx/{name},7,1\n", images=f"x/{name}").images.patients.tolist() == [7]
    with pytest.raises(
        DatasetError, match=f"row 2: found patient 'A' for x/{name}; needed patient 7, as ChestX-ray14 names"
    ):
        read(f"image,patient,Mass\nx/{name},A,1\n", images=f"x/{name}")
