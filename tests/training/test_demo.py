from pathlib import Path

import pytest

from chexnet_deploy.errors import SpecError
from training.demo import MARKER, PARTS, _make_room


def test_a_folder_of_someone_elses_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "phantom").mkdir()
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(SpecError, match="not a demo's"):
        _make_room(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"phantom", "thesis.txt"}


def test_an_earlier_demos_parts_are_cleared_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    _make_room(out)
    for name in (*PARTS, "mine"):
        (out / name).mkdir()
    _make_room(out)
    assert {path.name for path in out.iterdir()} == {MARKER, "mine"}
