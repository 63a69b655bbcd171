"""The README says what is true: its commands run as printed, on phantoms and with a recipe of one epoch."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.datasets.chestxray14 import ChestXray14
from chexnet_deploy.datasets.data_set import open_data
from chexnet_deploy.datasets.table_columns import Description
from chexnet_deploy.inputs import tomllib
from tests.command_line import chexnet
from tests.serving.running import Running

CHECKOUT = Path(__file__).parents[1]
README = (CHECKOUT / "README.md").read_text()
EMBEDDING = (CHECKOUT / "docs" / "embedding.md").read_text()
RECIPE = """
resize_px = 32
epochs = 1
batch_size = 16
max_learning_rate = 1e-3
weight_decay = 1e-2
seed = 0
"""
# What stands in for the commands' own size: recipes for 224 px, and a machine of its own for torchrun.
SMALLER = {
    "training/recipes/chexnet14.toml": "recipe.toml",
    "training/recipes/pneumonia.toml": "pneumonia.toml",
    "--resize-px 224": "--resize-px 32",
    "torchrun": "python -m torch.distributed.run --standalone",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    makefile = (CHECKOUT / "Makefile").read_text()
    for command in blocks("sh")[0].split("\n")[:2]:
        assert f"\n{command.removeprefix('make ')}: " in makefile


@pytest.mark.slow
def test_commands_on_your_own_data_and_the_scanner_example(
    phantom_root: Path, phantom_predictions: Path, phantom_readers: Path, tmp_path: Path
) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "pneumonia.toml").write_text(f'findings = ["Pneumonia"]\nloss = "weighted_bce"\n{RECIPE}')
    shutil.copy(phantom_predictions, tmp_path / "predictions.csv")
    shutil.copy(phantom_root / "Data_Entry_2017_v2020.csv", tmp_path / "labels.csv")
    shutil.copytree(phantom_readers, tmp_path / "expert_labels")
    radiograph = tmp_path / "radiograph.png"
    shutil.copy(sorted((phantom_root / "images").iterdir())[0], radiograph)
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    for line in "".join(blocks("sh")[1:]).strip().split("\n"):
        smaller = line.replace("ROOT", str(phantom_root))
        for long, short in SMALLER.items():
            smaller = smaller.replace(long, short)
        smaller, _, redirected = smaller.partition(" > ")
        words = shlex.split(smaller)
        if words[:2] == ["chexnet-deploy", "serve"]:
            service = Running([str(tmp_path / words[2])], tmp_path / "serve.log")
            service.wait_for_log("ready: ")
            assert "Pneumonia" in service.json("POST", "/predict", radiograph.read_bytes())["probabilities"]
            assert service.stop() == 0
            continue
        words = [sys.executable, *(words[1:] if words[0] == "python" else ["-m", "chexnet_deploy", *words[1:]])]
        if "--precision" in words:
            words += ["--calibration-images", "100"]  # the phantom set is small
        if "benchmarks.gpu" in words:
            words += ["--dry-run", "--images", "20", "--row-deadline-s", "1", "--out", "gpu.json"]
        if "bench" in words:
            words += ["--min-runs", "1", "--min-duration-s", "0"]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        if redirected:
            (tmp_path / redirected).write_text(done.stdout)
        # 3: forty phantom patients are too few to prove parity.
        assert done.returncode == (3 if "bench" in words else 0), f"{line}\n{done.stderr}"
    done = subprocess.run(
        [sys.executable, "-c", blocks("python")[0]], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_table_is_made_from_the_committed_results() -> None:
    from benchmarks.cpu.real import markdown_table, read_results

    table = README.split("<!-- python -m benchmarks.cpu.real --table -->\n")[1].split("<!-- end -->")[0]
    assert table.strip() == markdown_table(read_results())


def test_the_peers_table_is_made_from_the_committed_results() -> None:
    from benchmarks.cpu.peers import OUT
    from benchmarks.cpu.peers_page import Results, markdown_table

    table = README.split("<!-- python -m benchmarks.cpu.peers --table -->\n")[1].split("<!-- end -->")[0]
    assert table.strip() == markdown_table(Results.model_validate_json(OUT.read_text())).strip()


@pytest.mark.parametrize("name", ["phantoms", "real"])
def test_the_quantisers_table_is_made_from_the_committed_results(name: str) -> None:
    from benchmarks.int8.quantisers import RESULTS, Results, markdown_table

    page = (CHECKOUT / "docs" / "quantisation.md").read_text()
    table = page.split(f"<!-- python -m benchmarks.int8.quantisers --name {name} --table -->\n")[1].split(
        "<!-- end -->"
    )[0]
    results = Results.model_validate_json((RESULTS / f"quantisers-{name}.json").read_text())
    assert table.strip() == markdown_table(results)


@pytest.mark.parametrize("name", ["demo", "chexnet-96px"])
def test_the_table_of_int8_forms_is_made_from_the_committed_results(name: str) -> None:
    from benchmarks.int8.variants import RESULTS, Results, markdown_table

    page = (CHECKOUT / "docs" / "quantisation.md").read_text()
    table = page.split(f"<!-- python -m benchmarks.int8.variants --name {name} --table -->\n")[1].split("<!-- end -->")[
        0
    ]
    results = Results.model_validate_json((RESULTS / f"int8-forms-{name}.json").read_text())
    assert table.strip() == markdown_table(results)


def test_the_startup_table_is_made_from_the_committed_results() -> None:
    from benchmarks.cpu.startup import OUT, markdown_table

    table = EMBEDDING.split("<!-- python -m benchmarks.cpu.startup --table -->\n")[1].split("<!-- end -->")[0]
    assert table.strip() == markdown_table(json.loads(OUT.read_text()))


def test_the_serving_table_is_made_from_the_committed_results() -> None:
    from benchmarks.services.serving import OUT, markdown_table

    page = (CHECKOUT / "docs" / "serving.md").read_text()
    table = page.split("<!-- python -m benchmarks.services.serving --table -->\n")[1].split("<!-- end -->")[0]
    assert table.strip() == markdown_table(json.loads(OUT.read_text()))


def test_the_embedding_guides_program_runs(bundles: dict[str, Bundle], phantom_root: Path, tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", EMBEDDING, flags=re.DOTALL)
    shutil.copytree(bundles["fp32"].path, tmp_path / "bundles" / "first" / "int8")  # it opens sooner
    radiograph = tmp_path / "radiograph.png"
    shutil.copy(sorted((phantom_root / "images").iterdir())[0], radiograph)
    for content, said in ((radiograph.read_bytes(), "Pneumonia"), (b"no image", "refused: unreadable")):
        radiograph.write_bytes(content)
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert said in done.stdout


OWN_DATA = (CHECKOUT / "docs" / "own-data.md").read_text()


def test_the_tables_described_are_described_right() -> None:
    for block in re.findall(r"```toml\n(.*?)```", OWN_DATA, flags=re.DOTALL):
        Description.model_validate(tomllib.loads(block))


def write_hospital(folder: Path, phantom: ChestXray14) -> None:
    """The phantoms as the page's table, beside its TOML; some labels are missing, some uncertain."""
    (toml, *_) = re.findall(r"```toml\n(.*?)```", OWN_DATA, flags=re.DOTALL)
    (folder / "hospital.toml").write_text(toml)
    (folder / "scans" / "images").mkdir(parents=True)
    rows = ["Folder;Image;Case;Gender;Age;Projection;Pleural effusion;Large heart;Note"]
    for i, r in enumerate(phantom.radiographs):
        assert r.path is not None
        shutil.copy(r.path, folder / "scans" / "images" / f"{i}.png")
        effusion = "-1,0" if i % 40 == 3 else f"{int('Effusion' in r.findings)},0"
        heart = "" if i % 7 == 5 else f"{int('Cardiomegaly' in r.findings)}"
        rows.append(f'images;{i};case {r.patient};{r.sex};{r.age_years};{r.view};{effusion};{heart};"seen; twice"')
    rows.append("images;nowhere;case 9999;F;50;PA;0;0;")
    rows.append("images;lateral;case 9999;F;50;LL;0;0;")
    (folder / "hospital.csv").write_text("\r\n".join(rows), encoding="utf-8-sig", newline="")


@pytest.mark.slow
def test_the_commands_on_your_own_data_run(
    phantom: ChestXray14, checkpoint_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_hospital(tmp_path, phantom)
    shutil.copy(checkpoint_path, tmp_path / "best.safetensors")
    (tmp_path / "recipe.toml").write_text(f'findings = ["Effusion", "Cardiomegaly"]\n{RECIPE}')
    test = open_data(tmp_path / "hospital.toml").split("test")
    scores = [f"{name},{0.1 + 0.001 * i}" for i, name in enumerate(test.names)]
    (tmp_path / "predictions.csv").write_text("\n".join(["image,prob_Effusion", *scores]))
    monkeypatch.chdir(tmp_path)
    printed = {}
    (commands,) = re.findall(r"```sh\n(.*?)```", OWN_DATA, flags=re.DOTALL)
    for line in commands.strip().split("\n"):
        words = shlex.split(line)
        if words[0] == "python":
            environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
            done = subprocess.run(
                [sys.executable, *words[1:]], env=environment, capture_output=True, text=True, timeout=300
            )
        else:
            more = {"export": ["--calibration-images", "64"], "bench": ["--min-runs", "1", "--min-duration-s", "0"]}
            done = chexnet(*words[1:], *more.get(words[1], []))
        # Forty patients at most can't prove parity, and the untrained model may not have it.
        assert done.returncode in ((1, 3) if words[1] == "bench" else (0,)), f"{line}\n{done.stderr}"
        printed[words[1], words[2]] = done.stdout + done.stderr
    assert "note: 1 rows of hospital.csv are of other views" in printed["export", "best.safetensors"]
    assert "Not predicted: Cardiomegaly." in printed["evaluate", "--predictions"]
    report = json.loads((tmp_path / "evaluation" / "report.json").read_text())
    assert [row["finding"] for row in report["findings"]] == ["Cardiomegaly", "Effusion"]
    assert report["n_images"] == len(test.names)
    assert any(
        note.startswith("Predicted, but not labelled in hospital.csv: Atelectasis, ") for note in report["notes"]
    )
    parity = json.loads((tmp_path / "bench" / "report.json").read_text())["engines"][0]["parity"]
    hernia = next(row for row in parity["findings"] if row["finding"] == "Hernia")
    assert hernia["why_not_assessable"] == "no image is labelled for it"
    assert (tmp_path / "run" / "best.safetensors").is_file()


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (CHECKOUT / "docs").glob("*.md"))])
def test_every_file_a_page_names_exists(page: str) -> None:
    text = (CHECKOUT / page).read_text()
    for name in re.findall(r"`((?:training|engines|benchmarks|chexnet_deploy|tests)/[\w/.-]+)`", text):
        assert (CHECKOUT / name).exists(), name


def test_the_scaling_tables_are_made_from_the_committed_results() -> None:
    from benchmarks.cpu.scaling_page import OUT, Results, markdown, read_peers

    page = (CHECKOUT / "docs" / "scaling.md").read_text()
    tables = page.split("<!-- python -m benchmarks.cpu.scaling --table -->\n")[1].split("<!-- end -->")[0]
    assert tables.strip() == markdown(Results.model_validate_json(OUT.read_text()), read_peers()).strip()
