"""The prepared cache: the very pixels of Preprocessing, whole after any kill, and refused where it isn't what is needed."""

import multiprocessing
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chexnet_deploy.datasets.chestxray14 import SPLITS, TEST_LIST, TRAIN_VAL_LIST
from chexnet_deploy.datasets.data_set import DataSet, open_data
from chexnet_deploy.errors import DatasetError
from chexnet_deploy.images.preprocessing import Preprocessing
from chexnet_deploy.images.reader import read_image
from training import cache as cache_module
from training.cache import INDEX, JOURNAL, PIXELS, Cache
from training.prepare import compare_with_images
from training.prepare import prepare as prepare_with

CHECKOUT = Path(__file__).parents[2]
PREPROCESSING = Preprocessing(resize_px=32)
ROW_BYTES = 32 * 32
CHUNK_IMAGES = 20


def ignore(phase: str, done: int, total: int) -> None:
    pass


def prepare(root: Path, folder: Path, **options: Any) -> Cache:
    options = {"workers": 1, "chunk_images": CHUNK_IMAGES, "on_phase": ignore} | options
    return prepare_with(open_data(root), PREPROCESSING, folder, **options)


def train_val(root: Path) -> list[str]:
    """Names in the table's order, from the files alone."""
    listed = set((root / TRAIN_VAL_LIST).read_text().split())
    rows = (root / "Data_Entry_2017_v2020.csv").read_text().splitlines()[1:]
    return [row.split(",")[0] for row in rows if row.split(",")[0] in listed]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def root(phantom_root: Path, tmp_path: Path) -> Path:
    """A copy of the phantoms that a test may change."""
    shutil.copytree(phantom_root, tmp_path / "root")
    return tmp_path / "root"


@pytest.fixture(scope="module")
def made(phantom_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "cache"
    prepare(phantom_root, folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of the finished cache that a test may damage."""
    shutil.copytree(made, tmp_path / "cache")
    return tmp_path / "cache"


def test_every_row_is_what_preprocessing_gives(phantom_root: Path, made: Path) -> None:
    cache = Cache.open(made, PREPROCESSING, open_data(phantom_root))
    assert list(cache.names) == train_val(phantom_root)
    assert cache.pixels.shape == (len(cache.names), 1, 32, 32)
    assert (cache.quarantined, cache.absent) == ((), ())
    for row, name in enumerate(cache.names):
        expected = PREPROCESSING(read_image(phantom_root / "images" / name))
        np.testing.assert_array_equal(cache.pixels[row : row + 1], expected)
    assert sorted(path.name for path in made.iterdir()) == [INDEX, "lock", PIXELS]


def test_pixels_can_not_be_written(phantom_root: Path, made: Path) -> None:
    with pytest.raises(ValueError, match="read-only"):
        prepare(phantom_root, made).pixels[0] = 0


def test_processes_and_chunks_change_no_byte(phantom_root: Path, made: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    cache = prepare(
        phantom_root, tmp_path / "cache", workers=2, chunk_images=50, on_phase=lambda _, *step: seen.append(step)
    )
    assert (tmp_path / "cache" / PIXELS).read_bytes() == (made / PIXELS).read_bytes()
    assert seen[-1] == (len(cache.names), len(cache.names))
    assert seen == sorted(seen)


def test_rows_are_in_the_order_asked_and_unknown_names_are_refused(phantom_root: Path, made: Path) -> None:
    cache = prepare(phantom_root, made)
    assert cache.rows([cache.names[3], cache.names[0], cache.names[3]]).tolist() == [3, 0, 3]
    assert cache.rows([]).tolist() == []
    test_image = (phantom_root / TEST_LIST).read_text().split()[0]
    with pytest.raises(DatasetError, match=f"no row for 1 names .*{test_image}"):
        cache.rows([cache.names[0], test_image])


def test_a_pickled_cache_holds_no_pixels(phantom_root: Path, made: Path) -> None:
    cache = prepare(phantom_root, made)
    content = pickle.dumps(cache)
    assert len(content) < cache.pixels.nbytes / 4
    again = pickle.loads(content)
    assert again.names == cache.names
    np.testing.assert_array_equal(again.pixels, cache.pixels)


def test_a_finished_cache_is_opened_without_its_images(root: Path, made: Path) -> None:
    """Beside the tables nothing is needed: no PNG is read again, and they may be gone."""
    before = files(made)
    shutil.rmtree(root / "images")
    cache = prepare(root, made)
    assert len(cache.names) == len(train_val(root))
    assert files(made) == before


def test_test_images_are_never_read(root: Path, made: Path, tmp_path: Path) -> None:
    test_images = (root / TEST_LIST).read_text().split()
    for name in test_images:
        (root / "images" / name).write_bytes(b"not an image")
    cache = prepare(root, tmp_path / "cache", max_bad=0)
    assert not set(cache.names) & set(test_images)
    assert (tmp_path / "cache" / PIXELS).read_bytes() == (made / PIXELS).read_bytes()


def test_a_train_image_of_a_test_patient_is_refused(phantom_data: DataSet, tmp_path: Path) -> None:
    # open_data would refuse such lists; the cache does not rely on it.
    leaking = {**phantom_data.rows, "train": np.append(phantom_data.rows["train"], phantom_data.rows["test"][0])}
    dataset = replace(phantom_data, rows=leaking)
    with pytest.raises(DatasetError, match="images of test patients"):
        prepare_with(dataset, PREPROCESSING, tmp_path / "cache", workers=1, on_phase=ignore)
    assert not (tmp_path / "cache").exists()


KILLED_AT_SYNC = f"""
import os, signal, sys
from pathlib import Path
from chexnet_deploy.datasets.data_set import open_data
from chexnet_deploy.images.preprocessing import Preprocessing
from training.prepare import prepare

left, sync = int(sys.argv[3]), os.fsync
def sync_or_die(handle):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    sync(handle)
os.fsync = sync_or_die
prepare(open_data(Path(sys.argv[1])), Preprocessing(resize_px=32), Path(sys.argv[2]), workers=1,
        chunk_images={CHUNK_IMAGES}, on_phase=lambda *step: None)
"""


def test_killed_anywhere_it_goes_on_to_the_same_bytes_and_redoes_nothing(
    root: Path, made: Path, tmp_path: Path
) -> None:
    """SIGKILL at the k-th sync: before rows, between rows and line, inside the writing of the journal and the index.

    A run syncs the journal and its folder, then rows and line of each chunk, then the index and its folder. Between runs
    every image of a finished chunk is replaced by garbage: reading one again would quarantine it.
    """
    folder, names = tmp_path / "cache", train_val(root)
    codes, n_finished = [], []
    for kth in (1, 2, 3, 4, 5, 3, 6, 7, 8, 3, 4):  # the last two: in the index's writing, and just behind it
        command = [sys.executable, "-c", KILLED_AT_SYNC, str(root), str(folder), str(kth)]
        codes.append(subprocess.run(command, cwd=CHECKOUT, check=False).returncode)
        journal = (folder / JOURNAL).read_bytes() if (folder / JOURNAL).exists() else b""
        n_finished.append(max(0, len(journal.splitlines()) - 1))
        for name in names[: n_finished[-1] * CHUNK_IMAGES]:
            (root / "images" / name).write_bytes(b"read twice")
    assert codes == [-9] * 11
    assert n_finished == [0, 0, 0, 1, 2, 2, 4, 6, 9, 9, 9]
    assert prepare(root, folder, max_bad=0).names == tuple(names)
    assert {name: (folder / name).read_bytes() for name in (PIXELS, INDEX)} == {
        name: (made / name).read_bytes() for name in (PIXELS, INDEX)
    }


def stop_after(n_images: int) -> Callable[[str, int, int], None]:
    def on_phase(phase: str, done: int, total: int) -> None:
        if phase == "preparing" and done >= n_images:
            raise KeyboardInterrupt

    return on_phase


def stopped(root: Path, folder: Path, n_images: int = 50, **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare(root, folder, on_phase=stop_after(n_images), **options)


@pytest.mark.parametrize("torn", [b'{"names":["0000', b"\x00" * 40, b"\x00" * 40 + b"\n", b"{}\n"])
def test_a_torn_journal_goes_on_before_the_tear(phantom_root: Path, made: Path, tmp_path: Path, torn: bytes) -> None:
    stopped(phantom_root, tmp_path / "cache")
    with (tmp_path / "cache" / JOURNAL).open("ab") as journal:
        journal.write(torn)
    prepare(phantom_root, tmp_path / "cache")
    assert files(tmp_path / "cache") == files(made)


def test_a_finished_chunk_whose_rows_have_changed_is_made_again(phantom_root: Path, made: Path, tmp_path: Path) -> None:
    stopped(phantom_root, tmp_path / "cache")
    with (tmp_path / "cache" / PIXELS).open("r+b") as pixels:
        pixels.seek(CHUNK_IMAGES * ROW_BYTES)  # the second chunk's first pixel
        pixels.write(b"\xaa\x55")
    prepare(phantom_root, tmp_path / "cache")
    assert files(tmp_path / "cache") == files(made)


def test_images_mended_or_found_in_between_are_taken_in(root: Path, made: Path, tmp_path: Path) -> None:
    first, second, *_ = train_val(root)
    good = {name: (root / "images" / name).read_bytes() for name in (first, second)}
    (root / "images" / first).write_bytes(b"half a copy")
    (root / "images" / second).unlink()
    stopped(root, tmp_path / "cache")
    for name, content in good.items():
        (root / "images" / name).write_bytes(content)
    prepare(root, tmp_path / "cache")
    assert files(tmp_path / "cache") == files(made)


def test_an_unfinished_cache_is_no_cache(phantom_root: Path, tmp_path: Path) -> None:
    dataset = open_data(phantom_root)
    with pytest.raises(DatasetError, match=r"no cache .*python -m training\.prepare"):
        Cache.open(tmp_path / "cache", PREPROCESSING, dataset)
    stopped(phantom_root, tmp_path / "cache")
    with pytest.raises(DatasetError, match="an unfinished cache"):
        Cache.open(tmp_path / "cache", PREPROCESSING, dataset)


def test_a_flipped_bit_is_found_by_verify(phantom_root: Path, folder: Path) -> None:
    names = train_val(phantom_root)
    prepare(phantom_root, folder).verify(ignore)
    content = bytearray((folder / PIXELS).read_bytes())
    content[(CHUNK_IMAGES + 1) * ROW_BYTES] ^= 1  # the second chunk's second image
    (folder / PIXELS).write_bytes(content)
    damaged = f"{names[CHUNK_IMAGES]} to {names[2 * CHUNK_IMAGES - 1]}"
    with pytest.raises(DatasetError, match=f"changed bytes in 1 of .*{damaged}"):
        prepare(phantom_root, folder).verify(ignore)


@pytest.mark.parametrize("damage", ["shorter", "longer", "gone", "index", "no index", "version", "newer"])
def test_damage_is_found_on_opening(phantom_root: Path, folder: Path, damage: str) -> None:
    index = (folder / INDEX).read_bytes()
    pixels = (folder / PIXELS).read_bytes()
    actions: dict[str, tuple[Callable[[], object], str]] = {
        "shorter": (lambda: (folder / PIXELS).write_bytes(pixels[:-1]), "needed .* bytes|found .* bytes"),
        "longer": (lambda: (folder / PIXELS).write_bytes(pixels + b"\0"), "found .* bytes"),
        "gone": (lambda: (folder / PIXELS).unlink(), "can't be read: No such file"),
        "index": (lambda: (folder / INDEX).write_bytes(index.replace(b"_000.png", b"_001.png", 1)), "changed bytes"),
        "no index": (lambda: (folder / INDEX).write_bytes(b"[]"), "not the index of a cache"),
        "version": (lambda: (folder / INDEX).write_bytes(index.replace(b'"version": 1', b'"version": 2')), "format 2"),
        "newer": (lambda: (folder / INDEX).unlink(), "pixels without a journal"),
    }
    act, message = actions[damage]
    act()
    with pytest.raises(DatasetError, match=message):
        prepare(phantom_root, folder)


def test_other_pixels_than_asked_for_are_refused(
    phantom_data: DataSet, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DatasetError, match=r"of 32 px; needed 64 px\. Next: give another folder"):
        Cache.open(folder, Preprocessing(resize_px=64), phantom_data)
    with pytest.raises(DatasetError, match="another Preprocessing"):
        Cache.open(folder, Preprocessing(resize_px=32, mean=(0.5, 0.5, 0.5)), phantom_data)
    with pytest.raises(DatasetError, match="of 32 px"):
        prepare_with(phantom_data, Preprocessing(resize_px=64), folder, workers=1, on_phase=ignore)
    # A Pillow that rounds otherwise makes another thing of the probe.
    monkeypatch.setattr(cache_module, "_PROBE_SIDE_PX", 1023)
    with pytest.raises(DatasetError, match=r"resized by Pillow .* needed those of Pillow"):
        Cache.open(folder, PREPROCESSING, phantom_data)


@pytest.mark.parametrize("finished", [True, False])
def test_another_list_is_refused(root: Path, folder: Path, finished: bool) -> None:
    if not finished:
        shutil.rmtree(folder)
        stopped(root, folder)
    before = files(folder)
    names = (root / TRAIN_VAL_LIST).read_text().split()
    (root / TRAIN_VAL_LIST).write_text("".join(f"{name}\n" for name in names[:-1]))
    with pytest.raises(DatasetError, match=f"another table or .*{len(names)} images; needed these {len(names) - 1}"):
        prepare(root, folder)
    assert files(folder) == before


def test_labels_can_be_corrected_without_a_new_cache(root: Path, made: Path) -> None:
    table = root / "Data_Entry_2017_v2020.csv"
    table.write_text(table.read_text().replace("No Finding", "Hernia", 3))
    assert len(prepare(root, made).names) == len(train_val(root))


def test_absent_images_are_named_and_refused_once_they_are_there(root: Path, tmp_path: Path) -> None:
    names = train_val(root)
    (root / "images" / names[7]).rename(root / "kept.png")
    cache = prepare(root, tmp_path / "cache")
    assert cache.absent == (names[7],)
    assert list(cache.names) == names[:7] + names[8:]
    (root / "kept.png").rename(root / "images" / names[7])
    with pytest.raises(DatasetError, match=f"1 images on disk that were not there .*{names[7]}"):
        prepare(root, tmp_path / "cache")


def test_without_any_image_nothing_is_made(root: Path, tmp_path: Path) -> None:
    shutil.rmtree(root / "images")
    with pytest.raises(DatasetError, match="found none of the 143 train images on disk"):
        prepare(root, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_corrupt_images_are_quarantined_up_to_the_cap(root: Path, tmp_path: Path) -> None:
    names = train_val(root)
    bad = [names[4], names[30]]
    (root / "images" / bad[0]).write_bytes(b"")
    whole = (root / "images" / bad[1]).read_bytes()
    (root / "images" / bad[1]).write_bytes(whole[:-20])
    with pytest.raises(DatasetError, match=f"found 2 images that can't be read .*{bad[0]}: found 0 bytes.*at most 1"):
        prepare(root, tmp_path / "cache", max_bad=1)
    assert not (tmp_path / "cache" / INDEX).exists()
    cache = prepare(root, tmp_path / "cache", max_bad=2)
    assert [image.name for image in cache.quarantined] == bad
    assert "truncated" in cache.quarantined[1].reason
    assert str(root) not in (tmp_path / "cache" / INDEX).read_text()
    # What is left keeps name and row together.
    assert list(cache.names) == [name for name in names if name not in bad]
    row = cache.rows([names[31]])[0]
    np.testing.assert_array_equal(cache.pixels[row][None], PREPROCESSING(read_image(root / "images" / names[31])))
    with pytest.raises(DatasetError, match=f"1 of them quarantined: '{bad[0]}'"):
        cache.rows([bad[0]])
    with pytest.raises(DatasetError, match="found 2 images that can't be read"):
        prepare(root, tmp_path / "cache", max_bad=0)


def test_a_second_process_is_refused_and_disturbs_nothing(phantom_root: Path, made: Path, tmp_path: Path) -> None:
    messages = []

    def also_prepare(phase: str, done: int, total: int) -> None:
        with pytest.raises(DatasetError, match="another process is preparing this cache") as refused:
            prepare(phantom_root, tmp_path / "cache")
        messages.append(str(refused.value))

    prepare(phantom_root, tmp_path / "cache", on_phase=also_prepare)
    assert messages
    assert files(tmp_path / "cache") == files(made)


def test_a_killed_worker_is_a_clear_stop(phantom_root: Path, made: Path, tmp_path: Path) -> None:
    def kill_one(phase: str, done: int, total: int) -> None:
        for worker in multiprocessing.active_children()[:1]:
            worker.kill()
            worker.join()

    with pytest.raises(DatasetError, match="a worker process died"):
        prepare(phantom_root, tmp_path / "cache", workers=2, on_phase=kill_one)
    prepare(phantom_root, tmp_path / "cache")
    assert files(tmp_path / "cache") == files(made)


FILE_SIZE_LIMITED = """
import resource, sys
from training.prepare import app
from chexnet_deploy.terminal import run_program
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop()), resource.RLIM_INFINITY))
run_program(app)
"""


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(phantom_root: Path, made: Path, tmp_path: Path) -> None:
    arguments = [str(phantom_root), "--cache", str(tmp_path / "cache"), "--resize-px", "32", "--workers", "1"]
    command = [sys.executable, "-c", FILE_SIZE_LIMITED, *arguments, str(50 * ROW_BYTES)]
    run = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "can't be written: File too large; finished chunks are kept" in run.stderr.replace("\n", " ")
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "cache" / INDEX).exists()
    command = [sys.executable, "-m", "training.prepare", *arguments, "--verify"]
    run = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "verified: every row as written, 32 images read again and equal" in run.stdout
    assert (tmp_path / "cache" / PIXELS).read_bytes() == (made / PIXELS).read_bytes()


def test_too_little_space_is_said_before_anything_is_read(
    phantom_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("training.prepare.shutil.disk_usage", lambda path: usage)
    with pytest.raises(DatasetError, match="0 MiB free; needed"):
        prepare(phantom_root, tmp_path / "cache")


@pytest.mark.parametrize("way", ["", "cache", f"cache/{PIXELS}/x", f"cache/{JOURNAL}/x"])
def test_what_can_not_be_written_is_said(phantom_root: Path, tmp_path: Path, way: str) -> None:
    # Root may write into read-only folders, so a file or a folder stands in the way.
    (tmp_path / "at" / way).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "at" / way).write_bytes(b"in the way")
    with pytest.raises(DatasetError, match="Next: "):
        prepare(phantom_root, tmp_path / "at" / "cache")
    assert (tmp_path / "at" / way).read_bytes() == b"in the way"


def test_a_changed_image_is_found_by_reading_some_again(root: Path, made: Path) -> None:
    dataset = open_data(root)
    cache = prepare(root, made)
    assert compare_with_images(cache, dataset, PREPROCESSING) == 32
    shutil.copy(root / "images" / cache.names[1], root / "images" / cache.names[0])
    with pytest.raises(DatasetError, match=f"{cache.names[0]}: found other pixels"):
        compare_with_images(cache, dataset, PREPROCESSING)


@pytest.mark.dataset
def test_real_radiographs_are_cached_to_the_bit(real_root: Path, tmp_path: Path) -> None:
    dataset = open_data(real_root)
    preprocessing = Preprocessing()
    cache = prepare_with(dataset, preprocessing, tmp_path / "cache", on_phase=ignore)
    assert set(cache.names) == {name for split in SPLITS[:2] for name in dataset.split(split).names}
    assert compare_with_images(cache, dataset, preprocessing) == 32
