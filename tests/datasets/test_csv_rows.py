"""The form of a table: what rows come out, and what is refused before anyone looks at a value."""

from pathlib import Path

import pytest

from chexnet_deploy.datasets.csv_rows import (
    MAX_QUOTED_CHARACTERS,
    Row,
    find_column,
    find_findings,
    read_columns,
    read_rows,
)
from chexnet_deploy.errors import DatasetError
from chexnet_deploy.inputs import quote_some, read_text


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "table.csv"


def header(*names: str) -> Row:
    return Row(Path("t.csv"), 1, names)


def test_rows_are_numbered_as_an_editor_does(path: Path) -> None:
    path.write_bytes(b'\xef\xbb\xbfa,b,\r\n1,"x,\ny"\r\n\r\n3,,\r\n')
    rows = [(row.number, list(row.fields)) for row in read_rows(path)]
    assert rows == [(1, ["a", "b"]), (3, ["1", "x,\ny"]), (5, ["3", "", ""])]


def test_columns_come_in_the_order_asked_for_and_by_any_of_their_names(path: Path) -> None:
    path.write_text("age,sex,image\n5,F,i\n")
    assert [list(row.fields) for row in read_columns(path, (("image",), ("gender", "sex")))] == [["i", "F"]]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("", "row 1: found no column names; needed a header"),
        ("\na\n1\n", "row 1: found no column names"),
        (",,\n1,2,3\n", "row 1: found no column names"),
        ("a\n\n", "found a header and no row; needed at least one"),
        ("a,b\n1\n", "row 2: found 1 fields; needed 2, as the header has"),
        ("a,b\n1,2,,3\n", "row 2: found 4 fields; needed 2"),
        ('a\n1\n"2\n', "row 3: found a broken row"),
        (f"a\n{'1' * 200_000}\n", "row 2: found a broken row (field larger than field limit"),
        ("b;c\n1;2\n", "row 1: found the columns 'b', 'c'; needed a column a or A"),
    ],
)
def test_a_wrong_form_is_refused(path: Path, content: str, found: str) -> None:
    path.write_text(content)
    with pytest.raises(DatasetError) as caught:
        list(read_columns(path, (("a", "A"),)))
    message = str(caught.value)
    assert message.startswith(str(path))
    assert found in message
    assert ". Next: " in message


def test_what_is_no_text_is_refused(path: Path, tmp_path: Path) -> None:
    for other, found in ((path, "no such file"), (tmp_path, "a folder")):
        with pytest.raises(DatasetError, match=found):
            read_text(other)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DatasetError, match="needed readable UTF-8 text"):
        read_text(path)


def test_a_long_value_is_cut_in_a_message() -> None:
    message = str(header().error("9" * 5000, "less"))
    assert f"found {'9' * MAX_QUOTED_CHARACTERS}...; needed less" in message
    assert quote_some(list("abcdefg")) == "'a', 'b', 'c', 'd', 'e' and 2 more"


def test_free_names() -> None:
    assert find_column(header("Note", "Image_Index"), ("image", "imageindex")) == 1
    assert find_column(header("Note"), ("image",)) is None
    found = find_findings(header("P_pleural-thickening", "mass prob", "Lump"), ("p", "prob"))
    assert found == {"Mass": 1, "Pleural_Thickening": 0}
    with pytest.raises(DatasetError, match="found the columns 'mass', 'p_Mass'; needed one column of Mass"):
        find_findings(header("mass", "p_Mass"), ("p",))
