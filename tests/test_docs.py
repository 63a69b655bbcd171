"""The README and the pages it leads to say what is true: commands run as printed, on phantoms and with a recipe of one epoch."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from chexnet_deploy.bundle.bundle import Bundle
from chexnet_deploy.datasets.chestxray14 import ChestXray14
from chexnet_deploy.datasets.data_set import open_data
from chexnet_deploy.datasets.table_columns import Description
from chexnet_deploy.inputs import tomllib
from chexnet_deploy.runtime.sessions.open import check_known_answers, open_session
from tests.browser import Browser
from tests.command_line import chexnet
from tests.export.from_onnx.test_bundle import resnet
from tests.foreign import write_onnx
from tests.serving.running import Running

CHECKOUT = Path(__file__).parents[1]
README = (CHECKOUT / "README.md").read_text()
EMBEDDING = (CHECKOUT / "docs" / "embedding.md").read_text()
ON_SITE = (CHECKOUT / "docs" / "on-site.md").read_text()
RECIPE = """
resize_px = 32
epochs = 1
batch_size = 16
max_learning_rate = 1e-3
weight_decay = 1e-2
seed = 5
"""
# What stands in for the commands' own size: recipes for 224 px, and a machine of its own for torchrun.
SMALLER = {
    "training/recipes/chexnet14.toml": "recipe.toml",
    "training/recipes/pneumonia.toml": "pneumonia.toml",
    "--resize-px 224": "--resize-px 32",
    "torchrun": "python -m torch.distributed.run --standalone",
}


# In the order of a user's day: what one makes the next ones use.
PAGES = (
    "README.md",
    *(f"docs/{name}.md" for name in ("training", "evaluation", "reading-files", "signing", "tensorrt")),
)
# Pages that other tests here run.
OTHER_PAGES = (
    "engines/README.md",
    *(
        f"docs/{name}.md"
        for name in ("embedding", "foreign-models", "on-site", "own-data", "serving", "serving-with-triton", "tutorial")
    ),
)
NOT_RUN = "# not run here: "
REASONS = """
docs/dicom-node.md: needs node.toml, see below, and somebody to send results to
docs/dicom-node.md: needs certificates
docs/scaling.md: starts Ray clusters
docs/serving-with-triton.md: needs NVIDIA's container
docs/serving-with-triton.md: needs NVIDIA's containers
docs/training.md: downloads ImageNet weights and takes a GPU
docs/training.md: needs such a file
"""
ALL_PAGES = (
    "README.md",
    "engines/README.md",
    *sorted(f"docs/{path.name}" for path in (CHECKOUT / "docs").glob("*.md")),
)


def blocks(language: str, page: str = "README.md") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (CHECKOUT / page).read_text(), flags=re.DOTALL)


def commands() -> list[str]:
    """Return the lines of all blocks but the README's first and those that say why they are not run."""
    found = [block for page in PAGES for block in blocks("sh", page) if not block.startswith(NOT_RUN)]
    return "".join(found[1:]).strip().split("\n")


def test_every_block_is_run_or_says_why_it_is_not() -> None:
    found = [(page, block) for page in ALL_PAGES for language in ("sh", "python") for block in blocks(language, page)]
    reasons = [f"{page}: {block.split(chr(10))[0].removeprefix(NOT_RUN)}" for page, block in found if NOT_RUN in block]
    assert (len(found), reasons) == (28, REASONS.strip().splitlines())
    assert {page for page, block in found if NOT_RUN not in block} <= {*PAGES, *OTHER_PAGES}


def test_every_extra_that_a_page_installs_is_one() -> None:
    extras = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {
        extra
        for page in ALL_PAGES
        for names in re.findall(r"pip install '(?:chexnet-deploy|\.)\[([\w,-]+)\]'", (CHECKOUT / page).read_text())
        for extra in names.split(",")
    }
    assert {"cpu", "node", "serve"} <= named <= {*extras}


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
    for line in commands():
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


@pytest.mark.slow
def test_the_commands_on_other_peoples_models(bundles: dict[str, Bundle], phantom_root: Path, tmp_path: Path) -> None:
    page = (CHECKOUT / "docs" / "foreign-models.md").read_text()
    for name, contract in zip(
        ("contract", "served"), re.findall(r"```toml\n(.*?)```", page, flags=re.DOTALL), strict=True
    ):
        (tmp_path / f"{name}.toml").write_text(contract)
    for name in ("theirs", "int8"):
        write_onnx(tmp_path / f"{name}.onnx", 4)
    resnet(tmp_path / "resnet.onnx", channels=1)
    shutil.copytree(bundles["fp32"].path, tmp_path / "bundles" / "first" / "fp32")
    service = Running([str(bundles["fp32"].path), "--provider", "cpu"], tmp_path / "serve.log")
    service.wait_for_log("ready: ")
    (commands,) = re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL)
    # 3: forty phantom patients are too few to prove parity; 1: the made-up model is no CheXNet.
    for line, code in zip(commands.strip().split("\n"), (0, 3, 1, 0, 0, 3), strict=True):
        words = shlex.split(line.replace("ROOT", str(phantom_root)).replace(":8000", f":{service.port}"))[1:]
        quick = ["--min-runs", "1", "--min-duration-s", "0"] if words[0] == "bench" else []
        done = subprocess.run(
            [sys.executable, "-m", "chexnet_deploy", *words, *quick],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == code, f"{line}\n{done.stdout}\n{done.stderr}"
    assert service.stop() == 0


TABLES = [
    (page, command)
    for page in ("README.md", *(f"docs/{path.name}" for path in sorted((CHECKOUT / "docs").glob("*.md"))))
    for command in re.findall(r"<!-- (python -m .*--table) -->", (CHECKOUT / page).read_text())
]


@pytest.mark.parametrize(("page", "command"), TABLES)
def test_a_table_is_what_its_command_prints_of_the_committed_results(page: str, command: str) -> None:
    table = (CHECKOUT / page).read_text().split(f"<!-- {command} -->\n")[1].split("<!-- end -->")[0]
    done = subprocess.run(
        [sys.executable, *shlex.split(command)[1:]], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    assert table.strip() == done.stdout.strip()


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


@pytest.mark.slow
def test_the_tutorial_runs_on_smaller_bundles(bundles: dict[str, Bundle], phantom_root: Path, tmp_path: Path) -> None:
    for name in ("fp32", "int8"):
        shutil.copytree(bundles[name].path, tmp_path / "demo" / "bundles" / name)
    (tmp_path / "demo" / "phantom").symlink_to(phantom_root)
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    made, *steps = blocks("sh", "docs/tutorial.md")
    assert made == "make demo\n"
    for line in "".join(steps).strip().split("\n"):
        command, _, exits = line.partition(" # exits with ")
        command = command.replace("chexnet-deploy", f"{sys.executable} -m chexnet_deploy")
        # Forty phantom patients decide nothing.
        is_bench, more = " bench " in command, " --min-runs 1 --min-duration-s 0"
        done = subprocess.run(
            command + more * is_bench, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == (3 if is_bench else int(exits or 0)), f"{line}\n{done.stderr}"
        if exits:
            assert re.match("error: broken/model.onnx does not match its manifest: sha256 [0-9a-f]{12}…", done.stderr)
    assert (tmp_path / "proof" / "report.html").is_file()
    program = blocks("python", "docs/tutorial.md")[0]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert "Pneumothorax" in done.stdout, done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation as a site."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_axe_finds_nothing_in_the_documentation(site: Path, browser: Browser) -> None:
    found = {}
    for path in sorted(set(site.rglob("*.html")) - {site / "404.html"}):  # its links are a server's
        browser.open(path.as_uri())
        found[path.relative_to(site).as_posix()] = browser.violations([400])  # narrow, as there most has to be scrolled
    assert len(found) > 20
    assert {name: each for name, each in found.items() if each} == {}


@pytest.mark.slow
def test_the_documentation_site_builds_without_a_warning(site: Path) -> None:
    pages = {path.relative_to(site).as_posix(): path.read_text() for path in site.rglob("*.html")}
    assert "sensitivity" in pages["commands.html"]
    assert "Predictor.open" in pages["reference.html"]
    for name, page in pages.items():  # it opens where there is no network
        assert not re.search(r"""<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="https?:""", page), name


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
    bench = json.loads((tmp_path / "bench" / "report.json").read_text())
    assert [row["finding"] for row in bench["engines"][0]["parity"]["findings"]] == ["Cardiomegaly", "Effusion"]
    assert any("not measured, as the labels or an engine lack them: A" in note for note in bench["notes"])
    assert (tmp_path / "run" / "best.safetensors").is_file()


def test_the_on_site_page_s_commands_run(bundles: dict[str, Bundle], phantom_root: Path, tmp_path: Path) -> None:
    (commands,) = re.findall(r"```sh\n(.*?)```", ON_SITE, flags=re.DOTALL)
    shutil.copytree(bundles["int8-cpu"].path, tmp_path / "bundles" / "first" / "int8-cpu")
    shutil.copy(sorted((phantom_root / "images").iterdir())[0], tmp_path / "radiograph.png")
    said = []
    for line in commands.strip().split("\n"):
        # Forty phantom patients can't show 95 %.
        smaller = line.replace("ROOT", str(phantom_root)).replace("--sensitivity 0.95", "--sensitivity 0.6")
        for name in ("bundles/", "radiograph.png", "site.pem"):
            smaller = smaller.replace(f" {name}", f" {tmp_path}/{name}")
        done = chexnet(*shlex.split(smaller)[1:])
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        said.append(done.stdout)
    assert "int8-cpu.site.json" in said[0]
    assert "operating points of site " in said[1]
    assert "signed by" in said[3]


def run_block(block: str, folder: Path, codes: dict[str, int] | None = None) -> None:
    """Run the commands of a block in a folder; `codes` by command, where not 0."""
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    for line in block.strip().split("\n"):
        words = [sys.executable, "-m", "chexnet_deploy", *shlex.split(line)[1:]]
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == (codes or {}).get(words[3], 0), f"{line}\n{done.stderr}"


@pytest.mark.slow
def test_the_triton_page_s_commands_and_program_run(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    for name in ("fp32", "int8-cpu"):
        shutil.copytree(bundles[name].path, tmp_path / "bundles" / "first" / name)
    page = "docs/serving-with-triton.md"
    run_block(blocks("sh", page)[0], tmp_path)
    (program,) = blocks("python", page)
    options = ["--provider", "cpu", "--name", "chexnet_int8_cpu"]
    service = Running([str(tmp_path / "models" / "chexnet_int8_cpu" / "1"), *options], tmp_path / "serve.log")
    service.wait_for_log("ready: ")
    done = subprocess.run(
        [sys.executable, "-c", program.replace("localhost:8000", f"localhost:{service.port}")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
    )
    assert service.stop() == 0
    with closing(open_session(bundles["int8-cpu"], provider="cpu")) as session:
        here = check_known_answers(session, bundles["int8-cpu"], n_probes=32)
    assert done.stdout.startswith("largest logit error: "), done.stderr
    assert float(done.stdout.split()[-1]) == pytest.approx(here, abs=1e-4)


@pytest.mark.slow
def test_the_serving_page_s_command_runs(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    shutil.copytree(bundles["int8-cpu"].path, tmp_path / "bundles" / "first" / "int8-cpu")
    (block,) = blocks("sh", "docs/serving.md")
    install, command = block.strip().split("\n")
    assert install.startswith("pip install ")
    program, what, bundle, *options = shlex.split(command)
    assert (program, what, options) == ("chexnet-deploy", "serve", ["--port", "8000"])
    service = Running([str(tmp_path / bundle)], tmp_path / "serve.log")
    service.wait_for_log("ready: ")
    assert service.stop() == 0


@pytest.mark.slow
def test_the_commands_by_which_a_verdict_travels_run(
    bundles: dict[str, Bundle], phantom_root: Path, tmp_path: Path
) -> None:
    shutil.copytree(bundles["fp32"].path, tmp_path / "fp32")
    shutil.copytree(bundles["int8"].path, tmp_path / "BUNDLE")
    shutil.copy(CHECKOUT / "engines" / "int8.toml", tmp_path)
    run_block("chexnet-deploy keygen release.pem", tmp_path)
    (block,) = blocks("sh", "engines/README.md")
    quick = block.replace("ROOT", f"{phantom_root} --min-runs 1 --min-duration-s 0 --provider cpu")
    run_block(quick, tmp_path, {"bench": 3})  # forty phantom patients are too few to prove parity
    assert (tmp_path / "BUNDLE" / "attestation.sig").is_file()


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (CHECKOUT / "docs").glob("*.md"))])
def test_every_file_a_page_names_exists(page: str) -> None:
    text = (CHECKOUT / page).read_text()
    for name in re.findall(r"`((?:training|engines|benchmarks|chexnet_deploy|tests)/[\w/.-]+)`", text):
        assert (CHECKOUT / name).exists(), name
