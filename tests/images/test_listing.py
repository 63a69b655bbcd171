import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chexnet_deploy.errors import DatasetError, ImageError
from chexnet_deploy.images.listing import find_images, one_line


def grow(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def test_a_folder_is_walked_in_the_order_of_names(tmp_path: Path) -> None:
    root = grow(tmp_path / "in", "b.png", "a/z.PNG", "a.jpg", "C.jpeg", "a/a.dcm", "a/b/q.png", "10.png", "9.png")
    found = find_images([root])
    # A folder's own files first, then its folders; capitals before small letters and 10 before 9, as code points go.
    assert found.names == ("10.png", "9.png", "C.jpeg", "a.jpg", "b.png", "a/a.dcm", "a/z.PNG", "a/b/q.png")
    assert list(found.paths(6)) == [root / "a/z.PNG", root / "a/b/q.png"]
    assert not found.is_one_file


def test_what_is_no_image_by_name_is_counted_and_left_out(tmp_path: Path) -> None:
    root = grow(tmp_path / "in", "a.png", "notes.txt", "png", "a.png.bak", "._a.png", ".hidden/b.png", ".DS_Store")
    found = find_images([root])
    assert (found.names, len(found.others)) == (("a.png",), 6)


def test_links_to_folders_are_not_followed_and_links_to_files_are(tmp_path: Path) -> None:
    root = grow(tmp_path / "in", "a/one.png")
    (root / "a" / "loop").symlink_to(root)
    (root / "self.png").symlink_to(root / "self.png")
    (root / "two.png").symlink_to(root / "a" / "one.png")
    found = find_images([root])
    assert found.names == ("self.png", "two.png", "a/one.png")
    assert len(found.others) == 1


def test_a_linked_folder_that_is_named_is_walked(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(grow(tmp_path / "in", "a.png"))
    assert find_images([tmp_path / "link"]).names == ("a.png",)


def test_several_are_named_as_given(tmp_path: Path) -> None:
    grow(tmp_path, "one/a.png", "two/a.png", "x.bin")
    given_ = [tmp_path / "two", tmp_path / "x.bin", tmp_path / "one"]
    found = find_images(given_)
    assert found.names == tuple(str(tmp_path / name) for name in ("two/a.png", "x.bin", "one/a.png"))
    assert list(found.paths()) == [Path(name) for name in found.names]


def test_one_file_is_one_file(tmp_path: Path) -> None:
    assert find_images([tmp_path / "absent.png"]).is_one_file  # what it is, reading it says
    grow(tmp_path, "in/a.png")
    assert not find_images([tmp_path / "in"]).is_one_file


def test_a_list_is_relative_to_its_folder(tmp_path: Path) -> None:
    grow(tmp_path, "in/b.png", "in/a.png")
    (tmp_path / "list.txt").write_text("in/b.png\n\n  in/a.png \r\n")
    found = find_images([tmp_path / "list.txt"])
    assert found.names == ("in/b.png", "in/a.png")
    assert list(found.paths()) == [tmp_path / "in/b.png", tmp_path / "in/a.png"]


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["empty"], "no file called .png"),
        (["blank.txt"], "no file called .png"),
        (["in", "in"], "twice"),
        (["in", "in/a.png"], "found in"),
        (["in/deep", "in"], "found in"),
        (["in/a.png", "in/../in/a.png", "in/a.png"], "twice"),
        (["twice.txt"], "more than once"),
    ],
)
def test_refused(tmp_path: Path, arguments: list[str], found: str) -> None:
    grow(tmp_path, "in/a.png", "in/deep/b.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text("\n\n")
    (tmp_path / "twice.txt").write_text("in/a.png\nin/a.png\n")
    with pytest.raises(ImageError, match=found):
        find_images([tmp_path / argument for argument in arguments])


def test_a_list_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DatasetError, match="UTF-8"):
        find_images([tmp_path / "list.txt"])


def test_a_folder_that_can_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grow(tmp_path, "a.png", "deep/b.png")
    scan = os.scandir

    def locked(place: str) -> object:  # permissions don't bind root, who may run the tests
        if str(place).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(place))
        return scan(place)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(ImageError, match=r"deep: found a folder that can't be read \(Permission denied\)"):
        find_images([tmp_path])


def test_names_that_are_no_text_are_found_and_shown_as_one_line(tmp_path: Path) -> None:
    for name in (b"a\xff.png", b"b\n.png", "c é.png".encode()):
        Path(os.fsdecode(bytes(tmp_path) + b"/" + name)).write_bytes(b"x")
    found = find_images([tmp_path])
    assert [one_line(name) for name in found.names] == ["a\\udcff.png", "b\\n.png", "c é.png"]
    assert all(path.is_file() for path in found.paths())


@given(st.text())
def test_one_line_is_one_line_of_utf_8(text: str) -> None:
    shown = one_line(text)
    assert len(shown.encode().splitlines()) <= 1
    assert len(shown.splitlines()) <= 1
    assert one_line(shown) == shown


def test_the_hash_is_of_the_names_in_order(tmp_path: Path) -> None:
    grow(tmp_path, "one/a.png", "one/b.png", "two/a.png", "two/b.png", "three/b.png")
    first, same, other = (find_images([tmp_path / name]).sha256 for name in ("one", "two", "three"))
    assert first == same != other


DICOM = bytes(128) + b"DICM" + bytes(20)


def test_a_dicom_file_may_be_called_anything(tmp_path: Path) -> None:
    root = grow(tmp_path / "CD", "AUTORUN.INF", "VIEWER/viewer.exe", "README", "DICOM/short")
    (root / "DICOM" / "short").write_bytes(DICOM[:131])
    for name in (
        "DICOMDIR",
        "dicomdir",
        "DICOM/IM000001",
        "DICOM/ST1/IM000001",
        "DICOM/1.2.840.1.5",
        "a.ima",
        "b.dicom",
        ".x",
    ):
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).write_bytes(DICOM)
    os.mkfifo(root / "pipe")  # would be waited for
    (root / "socket").symlink_to("/nowhere")
    found = find_images([root])
    assert found.names == ("a.ima", "b.dicom", "DICOM/1.2.840.1.5", "DICOM/IM000001", "DICOM/ST1/IM000001")
    assert found.others == (
        ".x", "AUTORUN.INF", "DICOMDIR", "README", "dicomdir", "pipe", "socket", "DICOM/short", "VIEWER/viewer.exe",
    )  # fmt: skip


def test_a_folder_of_nothing_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"found no file called \.png, \.jpg, \.jpeg, \.dcm and no DICOM file"):
        find_images([grow(tmp_path / "in", "IM000001", "DICOMDIR")])
