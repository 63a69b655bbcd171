"""`python -m benchmarks.statistics.million_rows`: how long a table of a million images takes to read, and how much memory.

The table is in CheXpert's form: 14 findings, labels missing and uncertain, the patient in the path. Each row's image is there:
an empty file, in a folder that all patients' links lead to. One process reads it from the start of Python to the images of a
split; its peak is VmHWM (proc(5)). Ten thousand rows are read beside it: their time says what a row costs, and what the
machine's other work makes of it.
"""

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final

import typer

from benchmarks.common import RESULTS, checkout_environment, write_results
from chexnet_deploy.terminal import run_program

BAR_S: Final = 60.0
BAR_MIB: Final = 1024.0
FEW: Final = 10_000
_IMAGES_A_PATIENT: Final = 8
_FINDINGS: Final = (
    *(
        "No Finding",
        "Enlarged Cardiomediastinum",
        "Cardiomegaly",
        "Lung Opacity",
        "Lung Lesion",
        "Edema",
        "Consolidation",
    ),
    *("Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices"),
)
_READ: Final = """
import json, sys, time
from pathlib import Path
from chexnet_deploy.datasets.data_set import open_data
start_s, start_core_s = time.perf_counter(), time.process_time()
data = open_data(Path(sys.argv[1]))
images = data.require("train").for_findings(("Edema", "Effusion"))
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"rows": len(data.images.names), "train_images": len(images.names), "notes": data.notes,
    "seconds": round(time.perf_counter() - start_s, 2), "core_seconds": round(time.process_time() - start_core_s, 2),
    "peak_mib": round(int(peak.split()[1]) / 1024, 1)}))
"""


def write_table(folder: Path, n_rows: int) -> Path:
    """Write a table of that many images, the images as empty files, and its TOML; return the TOML."""
    header = ",".join(("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *_FINDINGS))
    with (folder / "train.csv").open("w") as table:
        table.write(f"{header}\n")
        table.writelines(_rows(folder, n_rows))
    toml = folder / "train.toml"
    toml.write_text(
        'table = "train.csv"\nsplit = "by patient"\nuncertain = "ones"\n'
        '[findings]\nEdema = "Edema"\nEffusion = "Pleural Effusion"\n'
        + "".join(f'"{name}" = "{name}"\n' for name in _FINDINGS if name not in ("Edema", "Pleural Effusion"))
    )
    return toml


def _rows(folder: Path, n_rows: int) -> Iterator[str]:
    generator = random.Random(0)
    (folder / "images").mkdir()
    (folder / "train").mkdir()
    for i in range(_IMAGES_A_PATIENT):
        (folder / "images" / f"view{i}_frontal.jpg").touch()
    for i in range(n_rows):
        patient, view = divmod(i, _IMAGES_A_PATIENT)
        if view == 0:
            (folder / f"train/patient{patient:06d}").symlink_to(folder / "images")
        labels = ",".join(generator.choices(("", "1.0", "0.0", "-1.0"), (60, 20, 15, 5), k=len(_FINDINGS)))
        sex, position = ("Male", "Female")[patient % 2], ("AP", "PA")[i % 2]
        yield f"train/patient{patient:06d}/view{view}_frontal.jpg,{sex},{patient % 90},Frontal,{position},{labels}\n"


def read(toml: Path) -> dict[str, object]:
    """Return what reading it takes, in a process of its own."""
    command = [sys.executable, "-c", _READ, str(toml)]
    done = subprocess.run(command, env=checkout_environment(), capture_output=True, text=True, check=True)
    found: dict[str, object] = json.loads(done.stdout)
    return found


def main(
    rows: Annotated[int, typer.Option(min=FEW, help="Rows of the table.")] = 1_000_000,
    out: Annotated[Path, typer.Option(help="Results.")] = RESULTS / "million-rows-cpu.json",
) -> None:
    """Write both tables, read each, write the JSON; exits 1 beyond the bars."""
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for n_rows in (FEW, rows):
            own = Path(folder) / str(n_rows)
            own.mkdir()
            found[str(n_rows)] = read(write_table(own, n_rows))
    typer.echo(write_results(out, {"bars": {"seconds": BAR_S, "peak_mib": BAR_MIB}, "tables": found}))
    many = found[str(rows)]
    is_within = float(str(many["seconds"])) <= BAR_S and float(str(many["peak_mib"])) <= BAR_MIB
    raise typer.Exit(0 if is_within else 1)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(main)
    run_program(app)
