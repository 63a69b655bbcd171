import csv
import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chexnet_deploy.datasets.findings import FINDINGS
from training.phantoms import draw as phantom
from training.phantoms.draw import PhantomSpec, Study, draw_radiograph, draw_with_regions, plan_studies, write_phantom

SIDE_PX = 96
SPEC = PhantomSpec(patients=30, test_patients=8, side_px=64, seed=5, prevalence=0.2)
OFFICIAL_HEADER = [
    "Image Index",
    "Finding Labels",
    "Follow-up #",
    "Patient ID",
    "Patient Age",
    "Patient Gender",
    "View Position",
    "OriginalImage[Width",
    "Height]",
    "OriginalImagePixelSpacing[x",
    "y]",
]


def study(*findings: str, patient: int = 1, view: str = "PA") -> Study:
    return Study(patient, 0, 60, "M", view, findings)  # type: ignore[arg-type]


def digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("phantom") / "set"
    write_phantom(root, SPEC, workers=1)
    return root


def read_rows(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_layout_is_the_official_one(root: Path) -> None:
    header, *rows = read_rows(root / "Data_Entry_2017_v2020.csv")
    assert header == OFFICIAL_HEADER
    names = [row[0] for row in rows]
    assert names[0] == "00000001_000.png"
    assert sorted(path.name for path in (root / "images").iterdir()) == names
    for row in rows:
        assert row[0] == f"{int(row[3]):08d}_{int(row[2]):03d}.png"
        assert row[1] == "No Finding" or set(row[1].split("|")) <= set(FINDINGS)
        assert 18 <= int(row[4]) <= 95
        assert row[5] in "FM"
        assert row[6] in ("AP", "PA")
        assert len(row) == len(header)


def test_images_are_8_bit_gray_of_the_asked_side(root: Path) -> None:
    for path in (root / "images").iterdir():
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "L", (64, 64))


def test_every_patient_is_in_one_list_only(root: Path) -> None:
    train = (root / "train_val_list.txt").read_text().split()
    test = (root / "test_list.txt").read_text().split()
    patients = {name[:8] for name in train}, {name[:8] for name in test}
    assert patients[0].isdisjoint(patients[1])
    assert [len(group) for group in patients] == [22, 8]
    assert sorted(train + test) == sorted(path.name for path in (root / "images").iterdir())


def test_boxes_lie_in_the_image_and_name_a_finding_of_its_row(root: Path) -> None:
    labels = {row[0]: row[1].split("|") for row in read_rows(root / "Data_Entry_2017_v2020.csv")[1:]}
    lines = (root / "BBox_List_2017.csv").read_text().splitlines()
    assert lines[0] == "Image Index,Finding Label,Bbox [x,y,w,h],,,"
    boxes = [line.split(",") for line in lines[1:]]
    assert {box[1] for box in boxes} == set(phantom.BOX_NAMES.values())
    for name, finding, *numbers, _, _, _ in boxes:
        x, y, width, height = map(float, numbers)
        assert x >= 0
        assert y >= 0
        assert width >= 1
        assert height >= 1
        assert x + width <= 64
        assert y + height <= 64
        assert finding.replace("Infiltrate", "Infiltration") in labels[name]


def test_files_do_not_depend_on_the_run_or_the_workers(root: Path, tmp_path: Path) -> None:
    write_phantom(tmp_path / "again", SPEC, workers=2)
    assert digests(tmp_path / "again") == digests(root)


def test_another_seed_is_another_patient() -> None:
    first, second = (draw_radiograph(study(), seed=seed, side_px=SIDE_PX) for seed in (0, 1))
    assert np.abs(first.astype(int) - second).mean() > 5


@pytest.mark.parametrize("finding", FINDINGS)
def test_a_finding_changes_its_region_and_more_than_the_rest(finding: str) -> None:
    inside, outside = [], []
    for patient in range(1, 7):
        healthy = draw_radiograph(study(patient=patient), seed=2, side_px=SIDE_PX)
        ill = draw_with_regions(study(finding, patient=patient), seed=2, side_px=SIDE_PX)
        x, y, width, height = map(int, ill.boxes[finding])
        change = np.abs(ill.pixels.astype(int) - healthy)
        region = np.zeros(change.shape, dtype=bool)
        region[y : y + height, x : x + width] = True
        inside.append(change[region].mean())
        outside.append(change[~region].mean())
    assert np.mean(inside) > 4  # gray levels
    assert np.mean(inside) > np.mean(outside)


def test_heart_is_wider_than_055_of_the_chest_in_cardiomegaly_only() -> None:
    for patient in range(1, 20):
        for view in ("AP", "PA"):
            healthy = draw_with_regions(study(patient=patient, view=view), seed=0, side_px=32)
            ill = draw_with_regions(study("Cardiomegaly", patient=patient, view=view), seed=0, side_px=32)
            assert healthy.heart_ratio < 0.55 < ill.heart_ratio


def test_effusion_is_brighter_than_the_lung_it_replaces() -> None:
    for patient in range(1, 6):
        healthy = draw_radiograph(study(patient=patient), seed=2, side_px=SIDE_PX)
        ill = draw_with_regions(study("Effusion", patient=patient), seed=2, side_px=SIDE_PX)
        x, y, width, height = map(int, ill.boxes["Effusion"])
        box = np.s_[y : y + height, x : x + width]
        # Exposure control moves both pictures, so each is measured against its own mean.
        assert ill.pixels[box].mean() - ill.pixels.mean() > healthy[box].mean() - healthy.mean()


def test_prevalence_views_and_sexes_are_near_what_was_asked() -> None:
    studies = plan_studies(PhantomSpec(patients=3000, test_patients=0, seed=1, prevalence=0.15))
    for finding in FINDINGS:
        assert np.mean([finding in s.findings for s in studies]) == pytest.approx(0.15, abs=0.03)
    assert np.mean([s.view == "AP" for s in studies]) == pytest.approx(0.38, abs=0.04)
    assert np.mean([s.sex == "F" for s in studies]) == pytest.approx(0.44, abs=0.04)
    assert {s.follow_up for s in studies} == {0, 1, 2, 3}


def test_findings_mostly_persist_between_follow_ups() -> None:
    studies = plan_studies(PhantomSpec(patients=3000, test_patients=0, prevalence=0.15))
    visits = {(s.patient, s.follow_up): s.findings for s in studies}
    pairs = [(findings, visits.get((patient, visit + 1))) for (patient, visit), findings in visits.items()]
    stayed = [finding in later for now, later in pairs if later is not None for finding in now]
    assert 0.5 < np.mean(stayed) < 0.95


def test_label_noise_flips_the_asked_share_in_the_table_only(tmp_path: Path) -> None:
    noisy = PhantomSpec(patients=60, test_patients=0, side_px=32, seed=5, label_noise=0.1)
    write_phantom(tmp_path / "noisy", noisy, workers=1)
    rows = read_rows(tmp_path / "noisy" / "Data_Entry_2017_v2020.csv")[1:]
    wrong = [
        (finding in row[1].split("|")) != (finding in truth.findings)
        for row, truth in zip(rows, plan_studies(noisy), strict=True)
        for finding in FINDINGS
    ]
    assert np.mean(wrong) == pytest.approx(0.1, abs=0.03)
    with Image.open(tmp_path / "noisy" / "images" / "00000001_000.png") as image:
        clean = draw_radiograph(plan_studies(noisy)[0], seed=5, side_px=32)
        np.testing.assert_array_equal(np.asarray(image), clean)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("patients", 0),
        ("test_patients", 11),
        ("side_px", 8),
        ("seed", -1),
        ("prevalence", 0.0),
        ("prevalence", float("nan")),
        ("label_noise", 0.5),
    ],
)
def test_refuses_a_spec_that_makes_no_sense(field: str, value: float) -> None:
    arguments = {"patients": 10, "test_patients": 2} | {field: value}
    with pytest.raises(ValueError, match=rf"^{field} is "):
        PhantomSpec(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [1, 2])
def test_nothing_is_left_after_an_exception(tmp_path: Path, workers: int) -> None:
    def fail(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_phantom(tmp_path / "set", SPEC, workers=workers, on_image=fail)
    assert list(tmp_path.iterdir()) == []


def test_never_writes_over_anything(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with pytest.raises(FileExistsError, match="never written over"):
        write_phantom(tmp_path / "set", SPEC)


def test_on_image_counts_to_the_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_phantom(
        tmp_path / "set",
        PhantomSpec(patients=3, test_patients=1, side_px=32),
        workers=1,
        on_image=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(i + 1, len(seen)) for i in range(len(seen))]


def test_command_line_writes_the_same_files(tmp_path: Path) -> None:
    phantom.main(
        [str(tmp_path / "cli"), "--patients", "3", "--side-px", "32", "--test-patients", "1", "--workers", "1"]
    )
    write_phantom(tmp_path / "api", PhantomSpec(patients=3, test_patients=1, side_px=32), workers=1)
    assert digests(tmp_path / "cli") == digests(tmp_path / "api")
